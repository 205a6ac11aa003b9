"""Kinds, layouts, selections, shared experts and sizes in any combination.

Either two of them do not go together, and the message names both; or the model converts and loads, computes
what the dense one does where the guide says so, learns and is watched.
"""

import re
from collections import Counter
from functools import cache
from math import log
from random import Random

import pytest
import torch
import transformers
from helpers.mixtures import fill
from helpers.tiny import HIDDEN, INNER, make_inputs, save_tiny
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from mpoe_convert import Recipe, convert, router_stats
from mpoe_convert.decomposition.sites import LAYOUTS
from mpoe_convert.errors import MpoeError
from mpoe_convert.experts import BIASES, KINDS
from mpoe_convert.experts.selection import SELECTIONS
from mpoe_convert.runtime import modeling_mpoe as modeling

# FFNs with biases, with a gate and without: type -> (head, variant)
MODELS = {"llama": ("AutoModelForCausalLM", 1), "bert": ("AutoModelForMaskedLM", 0)}
FULL = HIDDEN * INNER  # no bond of any chain is wider
OF_ONE_KIND = {"layout": "mpo", "sites": "mpo", "gauge": "mpo", "parts": "split"}
SHARES = ("low-rank", "adapter", "core-space")  # kinds whose experts share the dense FFN
SIZED = ("low-rank", "adapter", "mpo")  # kinds whose experts may differ in size

# ---------------------------------------------------------------------------------------------------
# Combinations


def combination(seed: int) -> dict:
    """Options of a recipe, and the model's type under "model". A few choices may be any."""
    generator = Random(seed)

    def choose(every, fitting):
        return generator.choice(list(every if generator.random() < 0.06 else fitting))

    kind, select, experts = map(generator.choice, (KINDS, SELECTIONS, (2, 3, 4, 6)))
    takes_tokens = select == "expert-choice"
    found = {"kind": kind, "experts": experts, "noise": 0.0}
    found["select"] = choose(SELECTIONS, ["top-k"] if takes_tokens and kind == "split" else [select])
    found["model"] = choose(MODELS, ["bert"] if takes_tokens else MODELS)
    least = 2 if select in ("top-p", "top-any") else 1
    found["top_k"] = choose([None, 2, 1, 3, 4, 6], [None, *range(least, experts + 1)])
    found["shared_experts"] = choose([0, 1, 2], [0] if kind in SHARES else [0, 0, 1, 2])
    found["bias"] = choose(BIASES, [None, {"adapter": "shared", "split": "per-expert"}.get(kind)])
    found["threshold"] = choose([None, 0.5], [None, 0.5] if select == "top-p" else [None])
    every = {"layout": LAYOUTS, "sites": [3, 5], "gauge": ["identity"], "parts": [2, 3]}
    for name, values in every.items():
        found[name] = choose([None, *values], [None, *values] if kind == OF_ONE_KIND[name] else [None])
    number, layout = number_of_sites(given_of(found)) - 1, found["layout"]
    sizes = (FULL, 2) if layout == "balanced" else (2, 3, 4, 8, 16)
    one = generator.choice(sizes)
    per_bond = [one] * number if layout == "balanced" else generator.choices(sizes, k=number)
    per_expert = "/".join(map(str, generator.choices(sizes, k=experts)))
    ways = [one] + [per_bond] * (kind == "mpo")
    if kind in SIZED and not found["shared_experts"] and number == 2:
        ways.append(per_expert)
    found["bond_dim"] = choose([one, 1, 17, per_bond, [2] * 3, per_expert, per_expert + "/2"], ways)
    return given_of(found)


# Of a seed, because Hypothesis' own choices would repeat each other.
COMBINATIONS = st.integers(0, 2**63 - 1).map(combination)


def given_of(found: dict) -> dict:
    """Without what stays at its default."""
    return {name: value for name, value in found.items() if value is not None}


# ---------------------------------------------------------------------------------------------------
# What has a meaning, by an account of its own


def layout_of(asked: dict) -> str:
    return asked.get("layout", "one-sided" if "sites" in asked else "blocks")


def number_of_sites(asked: dict) -> int:
    return asked.get("sites", 5 if layout_of(asked) == "balanced" else 3)


def cuts(asked: dict) -> bool:
    """Whether chains are truncated: only balanced ones are, where their bonds are not full."""
    size = asked["bond_dim"]
    return layout_of(asked) == "balanced" and not all(
        n == FULL for n in (size if isinstance(size, list) else [size])
    )


def experts_chosen(asked: dict) -> int:
    """The most that a token goes to, in the mean for expert-choice."""
    return asked.get("top_k", asked["experts"] if asked["select"] in ("top-p", "top-any") else 2)


def sizes_of(asked: dict) -> list[int] | None:
    return list(map(int, asked["bond_dim"].split("/"))) if isinstance(asked["bond_dim"], str) else None


def conflicts(asked: dict) -> list[tuple[str, str]]:
    """Pairs of words of things that do not go together."""
    kind, select, experts = asked["kind"], asked["select"], asked["experts"]
    found = [(name, "kind") for name, owner in OF_ONE_KIND.items() if name in asked and kind != owner]
    if found:
        return found
    if "threshold" in asked and select != "top-p":
        found.append(("threshold", "select"))
    if select == "expert-choice":
        found += [("select", "kind")] * (kind == "split") + [("select", "decoder")] * (
            asked["model"] == "llama"
        )
    if experts_chosen(asked) > experts:
        found.append(("top_k", f"{experts} experts"))
    if select in ("top-p", "top-any") and experts_chosen(asked) == 1:
        found.append(("top_k", "select"))
    if asked["shared_experts"] and kind in SHARES:
        found.append(("shared_experts", "kind"))
    if (kind, asked.get("bias")) in (("adapter", "per-expert"), ("split", "shared")):
        found.append(("bias", f"kind {kind}"))
    return found + conflicts_of_sizes(asked)


def conflicts_of_sizes(asked: dict) -> list[tuple[str, str]]:
    kind, experts, size, sizes = asked["kind"], asked["experts"], asked["bond_dim"], sizes_of(asked)
    found = []
    if sizes and len(sizes) != experts:
        found.append((f"{len(sizes)} sizes", f"{experts} experts"))
    if sizes and kind not in SIZED:
        found.append(("bond_dim", "kind"))
    if sizes and asked["shared_experts"]:
        found.append(("bond_dim", "shared_experts"))
    if isinstance(size, list) and kind in SHARES:
        found.append(("bond_dim", f"kind {kind}"))
    elif kind in ("low-rank", "core-space") and max(sizes or [size]) > min(HIDDEN, INNER):
        found.append(("bond_dim", rf"{HIDDEN} x {INNER}|{INNER} x {HIDDEN}"))
    parts = asked.get("parts", experts)
    if experts % parts:
        found.append(("parts", "experts"))
    if kind == "split" and INNER % (parts + asked["shared_experts"]):
        found.append((f"{INNER} hidden neurons", "parts"))
    return found + (conflicts_of_chains(asked, sizes) if kind == "mpo" else [])


def conflicts_of_chains(asked: dict, sizes: list[int] | None) -> list[tuple[str, str]]:
    layout, size, sites = layout_of(asked), asked["bond_dim"], number_of_sites(asked)
    found = []
    if layout == "blocks" and sites != 3:
        found.append(("blocks", "sites"))
    if isinstance(size, list) and len(size) != sites - 1:
        found.append((f"{len(size)} bond dimensions", f"{sites} sites"))
    if layout != "balanced" and 1 in (sizes or [size]):
        found.append((layout, "bond limit 1"))
    if asked.get("gauge") == "identity" and not sizes and cuts(asked):
        found.append(("gauge", "bonds"))
    if sizes and layout not in ("blocks", "one-sided"):
        found.append(("bond_dim", "layout"))
    elif sizes and sites != 3:
        found.append(("bond_dim", "sites"))
    elif sizes and len(set(sizes)) > 1:
        sides = (HIDDEN,) if layout == "blocks" else (HIDDEN, INNER)
        own = {tuple(max(n for n in range(1, s + 1) if side % n == 0) for side in sides) for s in sizes}
        if len(own) == 1:
            found.append(("bond_dim", "bonds"))
    return found


def starts_as_dense(asked: dict) -> bool:
    """Whether the guide says that the model computes what the dense one does, noise apart."""
    if asked["kind"] == "split":  # a token has to pass every part, all equally often
        parts = asked.get("parts", asked["experts"])
        return asked["select"] == "top-k" and experts_chosen(asked) % parts == 0
    return asked["kind"] != "mpo" or not cuts(asked)


def stays_as_dense(asked: dict) -> bool:
    """Whether it does whatever the routers decide."""
    return starts_as_dense(asked) and (asked["kind"] != "split" or experts_chosen(asked) == asked["experts"])


# ---------------------------------------------------------------------------------------------------
# The check of one combination


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where "out" is written, beside the dense models "llama" and "bert"."""
    root = tmp_path_factory.mktemp("combinations")
    for model_type, (auto_class, variant) in MODELS.items():
        save_tiny(model_type, auto_class, root / model_type, variant)
    return root


@cache
def stock(folder):
    """(the dense model, inputs for it with padding)"""
    auto_class = MODELS[folder.name][0]
    model = getattr(transformers, auto_class).from_pretrained(folder)
    inputs = make_inputs(model, auto_class)
    inputs["attention_mask"][0, -2:] = 0
    return model.eval(), inputs


def check(asked: dict, folder) -> str:
    """ "refused" or "converted"; raises AssertionError for anything else."""
    options = {name: value for name, value in asked.items() if name != "model"}
    expected = conflicts(asked)
    try:
        report = convert(Recipe(str(folder / asked["model"]), **options), folder / "out", overwrite=True)
    except MpoeError as error:
        said = str(error)
        assert any(re.search(a, said) and re.search(b, said) for a, b in expected), (said, expected)
        assert "\n" not in said
        return "refused"
    assert not expected, expected
    dense, inputs = stock(folder / asked["model"])
    # the class of this file, of which the artifact has a copy that takes longer to load
    model, info = modeling.subclass(type(dense)).from_pretrained(folder / "out", output_loading_info=True)
    assert not any(info.values()) and not model.training
    assert report.plan.is_exact == starts_as_dense(asked)
    if starts_as_dense(asked):
        assert_same_where_real(dense, model, inputs)
    for number, (_, ffn) in enumerate(model.mixtures()):
        fill(ffn.router, number, 0.3 if asked["select"] == "top-any" else 1.0)
    if stays_as_dense(asked):
        assert_same_where_real(dense, model, inputs)
    check_counts(asked, model, report)
    check_statistics(asked, model, inputs)
    check_gradients(model, inputs)
    if asked["model"] == "llama":
        check_cache(model, inputs["input_ids"])
    return "converted"


def assert_same_where_real(dense, model, inputs: dict) -> None:
    """The logits of the tokens that are no padding."""
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected, found = (each(**inputs).logits[real] for each in (dense, model))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


def check_counts(asked: dict, model, report) -> None:
    """The plan's numbers are those of the module."""
    ffns = [ffn for _, ffn in model.mixtures()]
    assert report.plan.ffn_totals.stored_params == sum(p.numel() for ffn in ffns for p in ffn.parameters())
    assert all(ffn.num_experts == asked["experts"] + asked["shared_experts"] for ffn in ffns)


def check_statistics(asked: dict, model, inputs: dict) -> None:
    with torch.no_grad(), router_stats(model) as stats:
        model(**inputs)
    most, experts = experts_chosen(asked), asked["experts"]
    assert len(stats) == len(model.mixtures())
    for layer in stats.values():
        assert layer.num_tokens == inputs["attention_mask"].sum()
        for shares in (layer.load, layer.probability, layer.counts):
            assert float(shares.sum()) == pytest.approx(1) and float(shares.min()) >= 0
        assert sum(layer.load_by_size.values()) == pytest.approx(1)
        assert len(layer.load) == experts and len(layer.counts) == experts + 1 and not layer.counts[0]
        assert 0 <= layer.entropy <= log(experts) + 1e-6 and layer.dropped == 0
        if asked["select"] == "top-k":
            assert layer.experts_per_token == most and layer.counts[most] == 1
        elif asked["select"] == "expert-choice":  # C tokens per expert, rounded up; and those that none takes
            assert 1 <= layer.experts_per_token <= experts
        else:
            assert 1 <= layer.experts_per_token <= most and not layer.counts[most + 1 :].any()
        own = layer.own_params / layer.experts_per_token
        assert min(layer.load_by_size) <= own * (1 + 1e-9) and own <= max(layer.load_by_size) * (1 + 1e-9)


def check_gradients(model, inputs: dict) -> None:
    """Of every tensor, finite; zero for the experts that no token chose."""
    model.train()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    with router_stats(model) as stats:
        loss = model(**inputs, labels=labels).loss
    loss.backward()
    assert loss.isfinite()
    for path, ffn in model.mixtures():
        for name, parameter in ffn.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), (path, name)
        for part in (ffn.up, ffn.down, ffn.router):
            assert any(p.grad.any() for p in part.parameters()), path
        idle = (stats[path].load == 0).nonzero().flatten()
        for name, parameter in ffn.named_parameters():
            if "aux_" in name and not ffn.differ:
                assert not parameter.grad[idle].any(), (path, name)
    model.eval()


def check_cache(model, ids: torch.Tensor) -> None:
    """Generation with a cache is that without one."""
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad():
        found = [model.generate(ids, use_cache=use, **options) for use in (True, False)]
    torch.testing.assert_close(*found)


# An example takes a tenth of a second, too long to look for a smaller one that fails.
SETTINGS = settings(deadline=None, derandomize=True, max_examples=40, phases=[Phase.generate])


@SETTINGS
@given(COMBINATIONS)
def test_a_combination_is_refused_by_name_or_works(folder, asked):
    check(asked, folder)


@pytest.mark.slow
def test_many_combinations(folder):
    seen = Counter()

    @settings(SETTINGS, max_examples=1000)
    @given(COMBINATIONS)
    def run(asked):
        seen[check(asked, folder)] += 1

    run()
    assert min(seen["refused"], seen["converted"]) > 100
