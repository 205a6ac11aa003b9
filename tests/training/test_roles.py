"""MPOE's gradient mask, learning rates by role, freezing."""

import pytest
import torch
import transformers
from helpers.models import token_ids
from scipy.stats import binomtest

from mpoe_convert import freeze, mask_centre, param_groups
from mpoe_convert.errors import TrainingError
from mpoe_convert.training.roles import role_of


@pytest.fixture
def model(artifact):
    _, out = artifact("llama", noise=0.1)
    return transformers.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)


def backward(model) -> None:
    ids = token_ids(2, 8)
    model(ids, labels=ids).loss.backward()


def by_role(model) -> dict[str, list]:
    roles: dict[str, list] = {}
    for name, parameter in model.named_parameters():
        roles.setdefault(role_of(name), []).append(parameter)
    return roles


def test_roles(model):
    names = {name: role_of(name) for name, _ in model.named_parameters()}
    layer = "model.layers.0.mlp."
    assert names[layer + "gate.terms.0.central_2"] == "central"
    assert names[layer + "down.terms.0.aux_2"] == "auxiliary"
    assert names[layer + "router.weight"] == "router"
    assert names["model.layers.0.self_attn.q_proj.weight"] == names["model.embed_tokens.weight"] == "other"
    counts = {role: list(names.values()).count(role) for role in set(names.values())}
    assert counts["central"] == 6 and counts["auxiliary"] == 12 and counts["router"] == 2


@pytest.mark.parametrize(
    "name",
    [
        "module.model.layers.0.mlp.up.terms.0.central_1",
        "_orig_mod.model.layers.0.mlp.up.terms.0.central_1",
        "base_model.model.model.layers.0.mlp.up.terms.0.base_layer.central_1",
        "model.layers.0.mlp.up.terms.0.parametrizations.central_1.original",
    ],
)
def test_wrappers_hide_no_role(name):
    assert role_of(name) == "central" and role_of(name.replace("central_1", "aux_0")) == "auxiliary"


def test_a_masked_step_moves_no_centre(model):
    """Neither the moments of earlier steps nor weight decay."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.5)
    backward(model)
    optimizer.step()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.zero_grad()
    backward(model)
    masked = mask_centre(model, step=1, probability=1.0)
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert sorted(masked) == sorted(set(before) - moved) and len(masked) == 6
    assert all(role_of(name) == "central" for name in masked)


def test_probability_zero_masks_nothing(model):
    backward(model)
    assert mask_centre(model, step=0, probability=0.0) == []
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(("per", "units"), [("step", 1), ("layer", 2), ("matrix", 6)])
def test_draws_are_seeded_and_of_the_probability(model, per, units):
    def draws(seed: int) -> list[tuple[str, ...]]:
        return [tuple(mask_centre(model, step, 0.75, seed=seed, per=per)) for step in range(200)]

    found = draws(0)
    assert found == draws(0) != draws(1)
    skipped = sum(len(names) for names in found) * units // 6
    assert binomtest(skipped, 200 * units, 0.75).pvalue > 1e-4
    sizes = {len(names) for names in found}
    assert sizes <= set(range(0, 7, 6 // units)) and (units == 1 or len(sizes) > 2)


def test_wrapped_models_draw_the_same(model):
    bare = [mask_centre(model, step, 0.5, per="matrix") for step in range(20)]
    wrapped = [mask_centre(torch.nn.ModuleDict({"m": model}), s, 0.5, per="matrix") for s in range(20)]
    assert [[f"m.{name}" for name in names] for names in bare] == wrapped


def test_groups_have_every_parameter_once(model):
    groups = param_groups(model, 1e-3, central=0.5, auxiliary=5, router=0, weight_decay=0.1)
    found = [id(p) for group in groups for p in group["params"]]
    assert sorted(found) == sorted(id(p) for p in model.parameters())
    rates = {group["role"]: group["lr"] for group in groups}
    assert rates == {"central": 5e-4, "auxiliary": 5e-3, "router": 0.0, "other": 1e-3}
    for group in groups:
        vectors = [
            p.dim() == 1 or (group["role"] == "auxiliary" and p[0].numel() in p.shape)
            for p in group["params"]
        ]
        assert any(vectors) == all(vectors)
        assert group["weight_decay"] == (0 if group["role"] == "router" or any(vectors) else 0.1)
    assert any(group["weight_decay"] == 0 and group["role"] == "other" for group in groups)  # norms
    assert any(group["weight_decay"] == 0 and group["role"] == "auxiliary" for group in groups)  # scales


def test_per_expert_biases_do_not_decay(artifact):
    _, out = artifact("gpt2", bias="per-expert")
    model = transformers.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    decaying = {
        id(p) for g in param_groups(model, 1.0, weight_decay=1) if g["weight_decay"] for p in g["params"]
    }
    biases = [p for name, p in model.named_parameters() if name.endswith("mlp.up.bias")]
    assert biases and all(p.dim() == 2 and id(p) not in decaying for p in biases)


def test_freezing(model):
    roles = by_role(model)
    left = freeze(model, "centre")
    assert not any(p.requires_grad for p in roles["central"])
    assert left == sum(p.numel() for role in ("auxiliary", "router", "other") for p in roles[role])
    left = freeze(model, "all-but-experts")
    assert not any(p.requires_grad for p in roles["other"])
    assert left == sum(p.numel() for role in ("auxiliary", "router") for p in roles[role])
    assert len(param_groups(model, 1.0)) == 2


def test_what_cannot_be_masked_or_frozen_is_told(artifact, model):
    dense = transformers.AutoModelForCausalLM.from_pretrained(artifact("llama", noise=0.1)[0])
    with pytest.raises(TrainingError, match="has no central tensors"):
        mask_centre(dense, 0, 0.5)
    with pytest.raises(TrainingError, match="expected 0 to 1"):
        mask_centre(model, 0, 1.5)
    with pytest.raises(TrainingError, match="one of step, layer, matrix"):
        mask_centre(model, 0, 0.5, per="core")
    with pytest.raises(TrainingError, match="one of centre, all-but-experts"):
        freeze(model, "everything")
    with pytest.raises(TrainingError, match="nothing is left"):
        freeze(dense, "all-but-experts")
    with pytest.raises(TrainingError, match="at least 0"):
        param_groups(model, 1.0, auxiliary=-1)
