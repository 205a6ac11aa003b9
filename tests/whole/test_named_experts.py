"""Mixtures whose experts are named by hand: as those that transformers marks, and of code of their own."""

import json

import pytest
import torch
from click.testing import CliRunner
from helpers.data import QUICK, words
from helpers.expert_mixtures import save_mixture, token_ids
from helpers.models import stored
from helpers.quire import AT, OWN, save_quire
from helpers.tiny import save_tiny
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mpoe_convert import Export, Finetuning, Recipe, convert, evaluate, export, finetune, plan, verify
from mpoe_convert.cli import main
from mpoe_convert.errors import CheckpointError, DataError, FamilyError, RecipeError
from mpoe_convert.request import read_recipe
from mpoe_convert.source import mixtures, named_experts
from mpoe_convert.source.hub import GENERATE_FILE


@pytest.fixture(scope="module", params=[False, True], ids=["a list", "tensors of all"])
def quire(request, tmp_path_factory):
    """(source, artifact, whether its experts are tensors of all)"""
    root = tmp_path_factory.mktemp("quire")
    source = save_quire(root / f"quire_{request.param}", request.param)
    convert(Recipe(str(source), **OWN), root / "out")
    return source, root / "out", request.param


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(words(4000))
    return str(path)


def load(folder, **options):
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, **options
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


def logits(model, ids=None):
    with torch.no_grad():
        return model(input_ids=token_ids() if ids is None else ids).logits


def difference(folder, source, ids=None) -> float:
    found, expected = (logits(load(each), ids) for each in (folder, source))
    return float((found - expected).norm() / expected.norm())


# ---------------------------------------------------------------- read without what transformers says of it

# Matrices (out, in) and (in, out), fused, with and without a gate; experts right in the layer.
UNMARKED = {
    "mixtral": "layers.{}.mlp.experts",
    "granitemoe": "layers.{}.block_sparse_moe.experts",
    "aria_text": "layers.{}.mlp.experts",
    "nemotron_h": "layers.{}.mixer.experts",
    "gemma4_text": "layers.{}.experts",
}


@pytest.mark.parametrize("model_type", UNMARKED)
def test_a_family_that_is_named_by_hand_gives_the_same_tensors(model_type, tmp_path, monkeypatch):
    source = save_mixture(model_type, tmp_path / "source")
    convert(Recipe(str(source)), tmp_path / "known")
    for module in (mixtures, named_experts):
        monkeypatch.setattr(module, "is_marked", lambda module: False)
    report = convert(Recipe(str(source), experts_at=UNMARKED[model_type]), tmp_path / "named")
    assert report.plan.family.layout is not None
    expected, found = stored(tmp_path / "known"), stored(tmp_path / "named")
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert difference(tmp_path / "named", source) < 2e-6


def test_marked_experts_may_be_named_too(tmp_path):
    source = save_mixture("gpt_oss", tmp_path / "source")  # whose gating is its own
    convert(Recipe(str(source), experts_at="layers.{}.mlp.experts"), tmp_path / "named")
    assert difference(tmp_path / "named", source) < 2e-6
    with pytest.raises(FamilyError, match="which transformers knows by itself; leave out what stands behind"):
        plan(Recipe(str(source), experts_at="layers.{}.mlp.experts:gate_up_proj,down_proj"))


# --------------------------------------------------------------------------------------- what users do


def test_it_computes_what_its_source_computes(quire):
    source, out, _ = quire
    assert difference(out, source) < 2e-6
    assert difference(out, source, token_ids((1, 1))) < 2e-6  # most experts get no token
    assert not any(".sheets." in name for name in stored(out))
    model = load(out)
    ids = token_ids()
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad.any() for name, p in model.named_parameters() if ".mixture." in name)
    for schedule in ("apply", "rebuild", "cached"):
        for _, experts in model._mixings():
            experts.schedule = schedule
        torch.testing.assert_close(logits(model), logits(load(source)), rtol=1e-4, atol=1e-4)


def test_a_list_of_experts_has_no_self_contrast(quire):
    """Its block hands every expert its rows: whose they are is not said."""
    _, out, bound = quire
    assert (out / GENERATE_FILE).exists() == bound
    model, ids = load(out), token_ids((1, 5))
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 2, "self_contrast": 0.5}
    if bound:
        assert model.generate(ids, **options).shape[0] == 1
        return
    with pytest.raises(ValueError, match="hand every expert of a list its rows"):
        model.generate(ids, **options)


def test_it_is_what_its_source_was(quire, tmp_path):
    source, out, bound = quire
    exported = export(out, tmp_path / "again", Export(to="moe", check=bound, trust_remote_code=True))
    expected, found = stored(source), stored(tmp_path / "again")
    assert exported.model_type == "quire" and expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    again = tmp_path / "again"
    assert (again / "modeling_quire.py").read_text() == (source / "modeling_quire.py").read_text()
    configs = [json.loads((folder / "config.json").read_text()) for folder in (source, again)]
    assert configs[0] == configs[1]
    assert "of the code that lies beside it" in (tmp_path / "again/README.md").read_text()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
def test_it_is_calibrated_cut_trained_scored_and_exported(quire, text, tmp_path):
    source, _, bound = quire
    recipe = Recipe(str(source), **OWN, keep=0.6, calibrate=(text,), calibration_tokens=1024)
    report = convert(recipe, tmp_path / "out")
    totals = report.plan.ffn_totals
    biases = 2 * 4 * 2 * 24 if bound else 0  # of two layers, beside the matrices
    assert totals.stored_params - biases <= 0.6 * (totals.dense_params - biases)
    assert all(matrix.output_error < 1 for matrix in report.matrices)
    run = Finetuning(model=str(tmp_path / "out"), data=text, trust_remote_code=True, **QUICK)
    finetune(run, tmp_path / "tuned")
    scores = evaluate(str(tmp_path / "tuned"), data=text, limit=4, trust_remote_code=True)
    assert scores.metrics["perplexity"].value > 1
    assert verify(tmp_path / "tuned", trust_remote_code=True).problems() == []
    shown = CliRunner().invoke(main, ["inspect", str(tmp_path / "tuned")])
    assert shown.exit_code == 0 and "quire, 2 layers of 4 experts, top 2" in " ".join(shown.output.split())
    export(tmp_path / "tuned", tmp_path / "again", Export(to="moe", check=False, trust_remote_code=True))
    assert difference(tmp_path / "again", tmp_path / "tuned") < 1e-5


def test_a_recipe_file_repeats_the_run(quire, tmp_path):
    _, out, _ = quire
    again = Recipe.from_mapping(read_recipe(out / "mpoe_recipe.yaml")).replace(trust_remote_code=True)
    assert again.experts_at == AT
    convert(again, tmp_path / "again")
    expected, found = stored(out), stored(tmp_path / "again")
    assert expected.keys() == found.keys() and all(torch.equal(found[k], v) for k, v in expected.items())


def test_layers_that_are_left_out_stay_as_they_are(quire, tmp_path):
    source, _, _ = quire
    report = convert(Recipe(str(source), **OWN, layers="2"), tmp_path / "out")
    assert report.plan.kept_dense == ("leaves.1",)
    before, after = stored(source), stored(tmp_path / "out")
    kept = {name for name in before if not name.startswith("model.leaves.2.block.sheets.")}
    assert all(torch.equal(after[name], before[name]) for name in kept)
    assert difference(tmp_path / "out", source) < 2e-6


# ------------------------------------------------------------------------------------------- mistakes


def said(source, error=FamilyError, **recipe) -> str:
    """The one line that refuses a recipe."""
    with pytest.raises(error) as caught:
        plan(Recipe(str(source), **{"trust_remote_code": True} | recipe))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_mixture_of_custom_code_says_how_its_experts_are_named(tmp_path):
    source = save_quire(tmp_path / "quire_unnamed", bound=True, num_experts=4)
    message = said(source)
    assert message == f"'{source}' is a mixture of experts with custom code: name its experts by hand: " + (
        f'experts_at "{AT}"'
    )
    unknown = save_quire(tmp_path / "quire_unknown", bound=True)  # nothing says that it is a mixture
    assert f'; to name its experts by hand, if it is a mixture: experts_at "{AT}"' in said(unknown)
    shown = CliRunner().invoke(main, ["plan", str(source), "--trust-remote-code"])
    assert shown.exit_code == 1 and f'--experts-at "{AT}"' in shown.stderr


def test_a_wrong_path_is_told_with_the_nearest(quire):
    source = quire[0]
    assert said(source, experts_at="leaves.{}.block.sheet") == (
        f'experts_at does not fit QuireModel, which has no leaves.{{}}.block.sheet; did you mean "{AT}"?'
    )
    assert said(source, experts_at="model.leaves.{}.block.sheets").endswith(f'; did you mean "{AT}"?')
    message = said(source, experts_at="leaves.{}.norm")
    expected = f'experts_at names leaves.0.norm, a LayerNorm, which holds no experts; did you mean "{AT}"?'
    assert message == expected
    for text in ("leaves.block.sheets", "leaves.{}", "leaves.{}.a:b", "{}:a,b,c,d", "leaves.{}.a:b,c,d,e"):
        assert said(source, experts_at=text) == (
            f'experts_at is "{text}"; expected "LAYERS.{{}}.BLOCK.EXPERTS", with ":gate,up,down" behind it '
            "to name the matrices"
        )


def test_a_dense_source_is_told(tmp_path):
    save_tiny("llama", "AutoModelForCausalLM", tmp_path / "llama")
    message = said(tmp_path / "llama", experts_at="layers.{}.mlp")
    assert message == (
        'experts_at names layers.0.mlp, a LlamaMLP, which is a dense FFN (ffn "layers.{}.mlp:gate_proj,'
        'up_proj,down_proj" names it) and holds no experts; no module of LlamaModel holds experts, it is a '
        "dense model"
    )
    assert said(tmp_path / "llama", experts_at="layers.{}.experts").endswith("it is a dense model")
    with pytest.raises(RecipeError, match="^ffn given with experts_at; the one names the FFNs of a dense"):
        Recipe("any", ffn="layers.{}.mlp:a,b", experts_at="layers.{}.experts")


TRIALS = {
    "another function": (
        "self.w2(self.act_fn",
        "2 * self.w2(self.act_fn",
        "computes something else than down(",
    ),
    "dropout": (
        'ACT2FN["silu"]',
        "nn.Sequential(nn.SiLU(), nn.Dropout(0.1))",
        "drops out in training (0.act_fn.1)",
    ),
    "a size of its own": (
        "sheet(states[rows])",
        "sheet(states[rows]) * (sheet.w1.in_features > 0)",
        "takes more of its experts than what they compute (AttributeError: ",
    ),
    "more arguments": (
        "def forward(self, x):\n        states",
        "def forward(self, x, y):\n        states",
        "does not run on hidden states alone (TypeError: ",
    ),
    "a norm of its own": (
        'self.act_fn = ACT2FN["silu"]',
        "self.act_fn, self.scale = nn.SiLU(), nn.Parameter(torch.ones(1))",
        "0.scale",
    ),
}


@pytest.mark.parametrize("what", TRIALS)
def test_what_cannot_be_replaced_is_refused_with_the_reason(what, tmp_path):
    old, new, reason = TRIALS[what]
    name = "quire_" + what.replace(" ", "_")
    source = save_quire(tmp_path / name, False, [(old, new)])
    assert reason in said(source, experts_at=AT)


def test_matrices_are_named_where_they_are_to_be(quire):
    source, _, bound = quire
    names = "opening,closing" if bound else "w1,w3,w2"
    planned = plan(Recipe(str(source), trust_remote_code=True, experts_at=f"{AT}:{names}"))
    assert planned.family.layout == plan(Recipe(str(source), **OWN)).family.layout
    wrong = "closing,opening" if bound else "w3,w1,w2"
    assert said(source, experts_at=f"{AT}:{wrong}").startswith("experts_at names leaves.1.block.sheets, and ")
    assert "; expected matrices of all experts" in said(source, experts_at=f"{AT}:a,b")


def test_damaged_experts_are_named(tmp_path):
    source = save_quire(tmp_path / "quire_damaged", False)
    tensors, name = load_file(source / "model.safetensors"), "model.leaves.1.block.sheets.2.w3.weight"
    lacking = {key: value for key, value in tensors.items() if key != name}
    save_file(lacking, source / "model.safetensors", metadata={"format": "pt"})
    assert f"lacks '{name}' of QuireForCausalLM" in said(source, CheckpointError, experts_at=AT)
    tensors[name].view(-1)[3] = float("nan")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{name} holds NaN or Inf in 1 of 384 places; repair"):
        convert(Recipe(str(source), **OWN), tmp_path / "out")


def test_a_block_that_is_called_by_name_is_calibrated(text, tmp_path):
    """As one that is called by place."""
    edits = [("self.block(self.norm(x + past))", "self.block(x=self.norm(x + past))")]
    reports = []
    for name, changes in (("quire_by_name", edits), ("quire_by_place", ())):
        source = save_quire(tmp_path / name, bound=False, edits=changes)
        recipe = Recipe(str(source), **OWN, keep=0.6, calibrate=(text,), calibration_tokens=1024)
        reports.append(convert(recipe, tmp_path / f"{name}_out"))
    by_name, by_place = ([matrix.output_error for matrix in report.matrices] for report in reports)
    assert by_name == by_place


def test_texts_with_padding_and_of_one_word_are_calibrated_and_short_ones_refused(quire, tmp_path):
    recipe = Recipe(str(quire[0]), **OWN, keep=0.6)
    ids = torch.randint(3, 40, (4, 2, 16), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(16) < 12).long().repeat(2, 1)
    for name, change in (
        ("padded", {"attention_mask": mask}),
        ("alike", {"input_ids": torch.full((2, 16), 7)}),
    ):
        batches = [{"input_ids": each} | change for each in ids]
        report = convert(recipe, tmp_path / name, calibration=batches)
        assert all(0 <= matrix.output_error < 1 for matrix in report.matrices)
    said = "calibration has 15 tokens beside those held out; expected the 16 that moments of 16 features need"
    with pytest.raises(DataError, match=said):
        convert(recipe, tmp_path / "out", calibration=[{"input_ids": each[:1, :5]} for each in ids])
