"""Sources with custom code: run only if it is trusted, and then kept beside the converted model."""

import copy
import json
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from helpers.child import run_child
from helpers.loopback_hub import LoopbackHub, User, environment
from helpers.models import assert_same_outputs, break_one_ffn, stored
from helpers.tiny import make_inputs, save_tiny, save_tokenizer
from safetensors.torch import load_file, save_file

from mpoe_convert import (
    Export,
    Finetuning,
    MpoeError,
    Pruning,
    Recipe,
    convert,
    evaluate,
    export,
    finetune,
    plan,
    prune,
    verify,
)
from mpoe_convert.artifact.layout import MODELING_FILE, own_files
from mpoe_convert.errors import (
    CheckpointError,
    ExportError,
    FamilyError,
    RecipeError,
    TrainingError,
    VerifyError,
)
from mpoe_convert.runtime import MODELING_PATH
from mpoe_convert.source.custom_code import GLUE_FILE

OWN_CODE = Path(__file__).parents[1] / "helpers" / "own_code"
SMALL = {"experts": 3, "bond_dim": 4, "noise": 0.0, "trust_remote_code": True}
LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 40,
    "pad_token_id": 0,
    "max_position_embeddings": 64,
}
MODELS = {
    "minstrel": {
        "AutoConfig": "configuration_minstrel.MinstrelConfig",
        "AutoModel": "modeling_minstrel.MinstrelModel",
        "AutoModelForCausalLM": "modeling_minstrel.MinstrelForCausalLM",
    },
    "scribe": {
        "AutoConfig": "modeling_scribe.ScribeConfig",
        "AutoModel": "modeling_scribe.ScribeModel",
        "AutoModelForMaskedLM": "modeling_scribe.ScribeForMaskedLM",
    },
    "wren": {
        "AutoConfig": "modeling_wren.WrenConfig",
        "AutoModel": "modeling_wren.WrenModel",
        "AutoModelForCausalLM": "modeling_wren.WrenForCausalLM",
        "AutoModelForSequenceClassification": "modeling_wren.WrenForSequenceClassification",
    },
    "llama": {
        "AutoModel": "modeling_loud.LoudModel",
        "AutoModelForCausalLM": "modeling_loud.LoudForCausalLM",
    },
}
FILES = {
    "minstrel": [
        "configuration_minstrel.py",
        "minstrel_layers.py",
        "modeling_minstrel.py",
        "tokenization_minstrel.py",
    ],
    "scribe": ["modeling_scribe.py"],
    "wren": ["modeling_wren.py"],
    "llama": ["modeling_loud.py"],
}
CASES = [
    (name, auto) for name, entries in MODELS.items() for auto in entries if auto.startswith("AutoModelFor")
]


def load(folder: Path, auto_class: str, **options):
    auto = getattr(transformers, auto_class)
    return auto.from_pretrained(folder, trust_remote_code=True, **options).eval()


def edit(path: Path, edits: list[tuple[str, str]]) -> None:
    text = path.read_text()
    for old, new in edits:
        assert old in text, old
        text = text.replace(old, new)
    path.write_text(text)


def save_own(name: str, auto_class: str, root: Path, edits: list[tuple[str, str]] = ()) -> Path:
    """A random model of a type with custom code, in whose second file texts were replaced.

    Every folder has a name of its own: by that transformers tells configs of the same code apart.
    """
    folder = root / f"{name}_{root.name}"
    folder.mkdir(parents=True)
    for file in FILES[name]:
        shutil.copyfile(OWN_CODE / file, folder / file)
    if edits:
        edit(folder / FILES[name][1], edits)
    config = {"model_type": name, "auto_map": MODELS[name]} | (LLAMA if name in ("wren", "llama") else {})
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    made = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = getattr(transformers, auto_class).from_config(made, trust_remote_code=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2) if parameter.ndim > 1 else parameter.add_(0.1)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    if name == "minstrel":
        path = folder / "tokenizer_config.json"
        entry = {"AutoTokenizer": [None, "tokenization_minstrel.MinstrelTokenizer"]}
        values = json.loads(path.read_text()) | {"tokenizer_class": "MinstrelTokenizer", "auto_map": entry}
        path.write_text(json.dumps(values))
    return folder


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """(source, artifact) of a case and recipe, made once."""
    made = {}

    def make(name: str, auto_class: str | None = None, **recipe) -> tuple[Path, Path]:
        auto_class = auto_class or next(auto for each, auto in CASES if each == name)
        key = repr((name, auto_class, recipe))
        if key not in made:
            root = tmp_path_factory.mktemp(name)
            folder = save_own(name, auto_class, root)
            convert(Recipe(folder, **(SMALL | recipe)), root / "out")
            made[key] = folder, root / "out"
        return made[key]

    return make


def code_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.py")}


# ---------------------------------------------------------------------------------------------------
# What it computes


@pytest.mark.parametrize(("name", "auto_class"), CASES)
def test_every_head_computes_what_the_source_computes(name, auto_class, own):
    folder, out = own(name, auto_class)
    dense, model = load(folder, auto_class), load(out, auto_class)
    assert type(model).__name__ == f"MPOE{type(dense).__name__}" and len(model.mixtures()) == 2
    inputs = make_inputs(dense, auto_class)
    assert_same_outputs(dense, model, inputs)
    break_one_ffn(model)
    with pytest.raises(AssertionError):
        assert_same_outputs(dense, model, inputs)


@pytest.mark.parametrize("name", MODELS)
def test_the_base_model_loads_from_a_heads_checkpoint(name, own):
    folder, out = own(name)
    dense, model = load(folder, "AutoModel"), load(out, "AutoModel")
    assert_same_outputs(dense, model, make_inputs(dense, "AutoModel"))


def test_a_process_without_this_package_loads_it(own, tmp_path):
    cases, expected = {}, {}
    for name, auto_class in CASES:
        folder, out = own(name, auto_class)
        dense = load(folder, auto_class)
        inputs = make_inputs(dense, auto_class)
        with torch.no_grad():
            expected[f"{name} {auto_class}"] = dense(**inputs).logits
        text = "w7 w3"
        cases[f"{name} {auto_class}"] = {
            "folder": str(out),
            "auto_class": auto_class,
            "inputs": inputs,
            "text": text,
        }
    for name, found in run_child(cases, tmp_path).items():
        logits = expected[name]
        torch.testing.assert_close(found["logits"], logits, rtol=0, atol=2e-5 * logits.abs().max().item())
        # The minstrel's own tokenizer adds a word.
        assert found["ids"] == ([7, 3, 39] if name.startswith("minstrel") else [7, 3]), name


def test_a_known_type_is_of_stock_classes_unless_its_own_are_trusted(own, tmp_path):
    folder, out = own("llama")
    stock = Path(shutil.copytree(folder, tmp_path / "of_llama"))
    change(stock / "config.json", architectures=["LlamaForCausalLM"])
    convert(Recipe(stock, **SMALL | {"trust_remote_code": False}), tmp_path / "stock")
    assert code_in(tmp_path / "stock").keys() == {MODELING_FILE}
    ids = {"input_ids": torch.arange(3, 12)[None]}
    stock, loud = (load(path, "AutoModelForCausalLM") for path in (tmp_path / "stock", out))
    assert (type(stock).__name__, type(loud).__name__) == ("MPOELlamaForCausalLM", "MPOELoudForCausalLM")
    with torch.no_grad():
        torch.testing.assert_close(loud(**ids).logits, 2 * stock(**ids).logits, rtol=1e-5, atol=1e-5)


def test_a_source_without_code_is_converted_as_without_trust(tmp_path):
    folder = save_tiny("gpt2", "AutoModelForCausalLM", tmp_path / "dense")
    for trusted in (False, True):
        convert(Recipe(folder, **SMALL | {"trust_remote_code": trusted}), tmp_path / str(trusted))
    first, second = (
        {p.name: p.read_bytes() for p in (tmp_path / each).iterdir() if p.suffix in (".py", ".safetensors")}
        | {"config": (tmp_path / each / "config.json").read_bytes()}
        for each in ("False", "True")
    )
    assert first == second


# ---------------------------------------------------------------------------------------------------
# What lies there


@pytest.mark.parametrize("name", MODELS)
def test_the_code_of_the_source_lies_beside_ours_unchanged(name, own):
    folder, out = own(name)
    ours = {MODELING_FILE: MODELING_PATH.read_bytes(), GLUE_FILE: (out / GLUE_FILE).read_bytes()}
    assert code_in(out) == code_in(folder) | ours
    config = json.loads((out / "config.json").read_text())
    assert config["mpoe"]["base_auto_map"] == MODELS[name]
    assert all(entry.startswith("modeling_mpoe_source.MPOE") for entry in config["auto_map"].values())
    assert set(config["auto_map"]) == {"AutoConfig", *MODELS[name]}
    card = (out / "README.md").read_text()
    assert all(f"`{file}`" in card for file in FILES[name]) and "Read it before you run it" in card
    assert set(code_in(out)) <= set(own_files(out))


def test_an_artifact_that_lacks_code_is_not_pushed(own, tmp_path):
    out = Path(shutil.copytree(own("minstrel")[1], tmp_path / "out"))
    (out / "minstrel_layers.py").unlink()
    with pytest.raises(CheckpointError, match=r"lacks 'minstrel_layers.py', which its code needs"):
        own_files(out)


@pytest.mark.parametrize(("name", "auto_class"), CASES)
def test_saved_and_loaded_again_it_is_the_same(name, auto_class, own, tmp_path):
    _, out = own(name, auto_class)
    model = load(out, auto_class, router_aux_loss_coef=0.5, mpoe_schedule="rebuild")
    model.save_pretrained(tmp_path / "once")
    assert code_in(tmp_path / "once") == {n: b for n, b in code_in(out).items() if "tokenization" not in n}
    again = load(tmp_path / "once", auto_class)
    assert (again.config.router_aux_loss_coef, again.config.mpoe_schedule) == (0.5, "rebuild")
    assert again.config.to_dict().keys() == model.config.to_dict().keys()
    again.save_pretrained(tmp_path / "twice")
    for saved in (tmp_path / "once", tmp_path / "twice"):
        found, expected = stored(saved), stored(out)
        assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in found)
        config = json.loads((saved / "config.json").read_text())
        assert config["auto_map"] == json.loads((out / "config.json").read_text())["auto_map"]


def test_a_tokenizer_of_its_own_is_saved_with_its_code(own, tmp_path):
    _, out = own("minstrel")
    tokenizer = transformers.AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    assert type(tokenizer).__name__ == "MinstrelTokenizer" and tokenizer("w5")["input_ids"] == [5, 39]
    load(out, "AutoModelForCausalLM").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert code_in(tmp_path) == code_in(out)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)
    assert again("w5")["input_ids"] == [5, 39]


@pytest.mark.parametrize("name", MODELS)
def test_models_are_copied_and_pickled(name, own, tmp_path):
    """As AutoModel gives them at the first load, which may add a class for `generate` to old code."""
    auto_class = next(auto for each, auto in CASES if each == name)
    model = load(Path(shutil.copytree(own(name)[1], tmp_path / f"first_{name}")), auto_class)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(again) is type(model)
        assert_same_outputs(model, again, make_inputs(model, auto_class), tolerance=0)


def test_a_constructor_of_the_configs_own_has_run(own):
    config = transformers.AutoConfig.from_pretrained(own("minstrel")[1], trust_remote_code=True)
    assert type(config)().inner == 24 and type(config)(width=32).inner == 48
    assert type(config)().mpoe is None and config.mpoe["num_experts"] == 3


# ---------------------------------------------------------------------------------------------------
# Whether it runs


def marked(name: str, tmp_path: Path) -> tuple[Path, Path]:
    """(source whose every file leaves a mark when it runs, the mark)."""
    folder = save_own(name, next(auto for each, auto in CASES if each == name), tmp_path)
    mark = tmp_path / "mark"
    for file in FILES[name]:
        path = folder / file
        path.write_text(f"{path.read_text()}\nopen({str(mark)!r}, 'w').close()\n")
    return folder, mark


TEXT = "w7 w3 w9 w4 w5 w6 w8 " * 60


def test_code_does_not_run_without_trust(tmp_path):
    folder, mark = marked("minstrel", tmp_path)
    source, text = str(folder), tmp_path / "text.txt"
    text.write_text(TEXT)
    told = r"(?s)minstrel.*configuration_minstrel.py, modeling_minstrel.py.*trust_remote_code=True"
    for ask in (lambda: plan(Recipe(source)), lambda: convert(Recipe(source), tmp_path / "out")):
        with pytest.raises(FamilyError, match=told) as error:
            ask()
        assert "\n" not in str(error.value)
    told = r"has custom code: read it, and pass trust_remote_code=True"
    with pytest.raises(TrainingError, match=told):
        evaluate(source, str(text), length=8)
    with pytest.raises(TrainingError, match=told):
        finetune(Finetuning(source, str(text), steps=1), tmp_path / "tuned")
    assert not mark.exists() and not (tmp_path / "out").exists()
    change(folder / "config.json", mpoe={"format": 1})  # looks like an artifact
    (folder / "modeling_mpoe.py").write_bytes(MODELING_PATH.read_bytes())
    with pytest.raises(TrainingError, match=told):
        evaluate(source, str(text), length=8)
    assert not mark.exists()
    change(folder / "config.json", mpoe=None)
    convert(Recipe(source, **SMALL), tmp_path / "out")
    assert mark.exists()
    mark.unlink()
    with pytest.raises(VerifyError, match=told):
        verify(tmp_path / "out")
    with pytest.raises(TrainingError, match=told):
        evaluate(str(tmp_path / "out"), str(text), length=8)
    assert not mark.exists()
    assert "trust_remote_code" not in yaml.safe_load((tmp_path / "out/mpoe_recipe.yaml").read_text())
    assert "--trust-remote-code -o OUT" in (tmp_path / "out/mpoe_recipe.yaml").read_text()


def change(path: Path, **values) -> None:
    """Set values of a JSON file; None takes one out."""
    found = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in found.items() if value is not None}))


def test_an_artifact_with_other_code_than_ours_is_not_run_unasked(artifact, tmp_path):
    out = Path(shutil.copytree(artifact("gpt2")[1], tmp_path / "out"))
    (tmp_path / "text.txt").write_text(TEXT)
    ask = {"task": "causal", "length": 8, "limit": 2}
    evaluate(str(out), str(tmp_path / "text.txt"), **ask)
    (out / "custom_generate/generate.py").write_text("raise SystemExit")
    with pytest.raises(TrainingError, match="has custom code"):
        evaluate(str(out), str(tmp_path / "text.txt"), **ask)
    shutil.rmtree(out / "custom_generate")
    with (out / "modeling_mpoe.py").open("a") as file:
        file.write(f"open({str(tmp_path / 'mark')!r}, 'w').close()\n")
    with pytest.raises(TrainingError, match="has custom code"):
        evaluate(str(out), str(tmp_path / "text.txt"), **ask)
    assert not (tmp_path / "mark").exists()
    evaluate(str(out), str(tmp_path / "text.txt"), **ask, trust_remote_code=True)
    assert (tmp_path / "mark").exists()


def test_code_of_a_known_type_does_not_run_without_trust(tmp_path):
    folder, mark = marked("llama", tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    untrusting = Recipe(folder, **SMALL | {"trust_remote_code": False})
    with pytest.raises(
        FamilyError, match=r"Loud\w+ of custom code \(modeling_loud.py\); transformers' llama"
    ):
        plan(untrusting)
    change(folder / "config.json", architectures=["LlamaForCausalLM"])
    convert(untrusting, tmp_path / "out")
    assert verify(tmp_path / "out").ok
    evaluate(str(folder), str(tmp_path / "text.txt"), task="causal", length=8, limit=2)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        (
            {"AutoModel": "../../elsewhere.Model"},
            "an auto_map names ''; expected a module",
        ),
        ({"AutoModel": "/etc/elsewhere.Model"}, "an auto_map names '/etc/elsewhere'; expected a module"),
        (
            {"AutoConfig": "modeling_scribe.ScribeConfig"},
            "a custom config .* and no custom model",
        ),
        ({"AutoModel": None}, "maps AutoModel to None; expected .module.Class"),
        ({"AutoModel": ["m.C"]}, "maps AutoModel to "),
        ({"AutoModelForCausalLM": "modeling_scribe"}, "maps AutoModelForCausalLM to 'modeling_scribe'"),
        (["modeling_scribe.Scribe"], "the auto_map of .* is "),
    ],
)
def test_an_auto_map_that_cannot_be_followed_is_told(entries, said, own, tmp_path):
    folder = Path(shutil.copytree(own("scribe")[0], tmp_path / "source"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": entries}))
    with pytest.raises(MpoeError, match=said):
        plan(Recipe(folder, trust_remote_code=True))


def test_moments_of_other_code_are_not_taken_over(own, tmp_path):
    folder, _ = own("llama")
    other = Path(shutil.copytree(folder, tmp_path / "louder"))
    edit(other / "modeling_loud.py", [("2 * output", "3 * output")])
    batches = [{"input_ids": torch.arange(3, 39).reshape(2, 18)}] * 4
    recipe = SMALL | {"keep": 0.9, "metric": "loss"}
    plans = [plan(Recipe(each, **recipe), calibration=batches) for each in (folder, other)]
    assert plans[0].budget.chosen.loss != plans[1].budget.chosen.loss


def test_trust_is_true_or_false():
    with pytest.raises(RecipeError, match="trust_remote_code is 'yes'; expected true or false"):
        Recipe("m", trust_remote_code="yes")


def test_code_that_does_not_run_is_told_in_one_line(tmp_path):
    folder = save_own("scribe", "AutoModelForMaskedLM", tmp_path)
    for text, said in (("import not_there", "not_there"), ("1 / 0", "ZeroDivisionError")):
        (folder / "modeling_scribe.py").write_text(text)
        with pytest.raises(FamilyError, match=rf"^the code in .* does not give Auto.*{said}") as error:
            plan(Recipe(folder, trust_remote_code=True))
        assert "repair it" in str(error.value)
    (folder / "modeling_scribe.py").unlink()
    with pytest.raises(CheckpointError, match="lacks 'modeling_scribe.py', which its code needs"):
        plan(Recipe(folder, trust_remote_code=True))


# ---------------------------------------------------------------------------------------------------
# Which modules are FFNs

RETURN = "return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))"
NAMED = "layers.{}.mlp:gate_proj,up_proj,down_proj"
LOUD = "class Loud(nn.Linear):\n    def forward(self, x):\n        return 2 * super().forward(x)"
NO_FFNS = {
    "scaled": [(RETURN, f"{RETURN} * 0.5")],
    "other layers": [
        ("class Song", f"{LOUD}\n\n\nclass Song"),
        ("self.up_proj = nn.Linear", "self.up_proj = Loud"),
    ],
    "another argument": [
        (
            "def forward(self, x):\n        return self.down",
            "def forward(self, x, scale=1.0):\n        return self.down",
        )
    ],
    "dropout in training": [
        (RETURN, f"return F.dropout({RETURN.removeprefix('return ')}, 0.5, self.training)")
    ],
    "normalised": [(RETURN, RETURN.replace("self.up_proj(x)", "self.up_proj(F.normalize(x, dim=-1))"))],
}


@pytest.mark.parametrize("what", NO_FFNS)
def test_a_module_that_computes_something_else_is_refused(what, tmp_path):
    folder = save_own("minstrel", "AutoModelForCausalLM", tmp_path, NO_FFNS[what])
    with pytest.raises(FamilyError) as error:
        plan(Recipe(folder, trust_remote_code=True))
    said = "takes scale beside the hidden states" if what == "another argument" else "does not compute"
    assert said in str(error.value) and f'ffn "{NAMED}"' not in str(error.value)
    with pytest.raises(FamilyError, match=said):  # nor by hand
        plan(Recipe(folder, trust_remote_code=True, ffn=NAMED))


def test_every_layer_is_looked_at(tmp_path):
    edits = [
        ("self.mlp = Song(config)", "self.mlp = Song(config)\n        self.mlp.scale = next(SCALES)"),
        ("class Song", "SCALES = itertools.cycle((1, 2))\n\n\nclass Song"),
        ("import torch.nn", "import itertools\n\nimport torch.nn"),
        (RETURN, f"{RETURN} * self.scale"),
    ]
    folder = save_own("minstrel", "AutoModelForCausalLM", tmp_path, edits)
    with pytest.raises(FamilyError, match=r"^layers\.1\.mlp of the source's MinstrelModel does not compute"):
        plan(Recipe(folder, trust_remote_code=True))
    assert plan(Recipe(folder, trust_remote_code=True, layers="0")).kept_dense == ("layers.1",)


def test_the_first_layer_stands_for_all(tmp_path):
    """Also where it is left dense: what was seen there is what the artifact is built by."""
    edits = [
        ("self.mlp = Song(config)", "self.mlp = Song(config, next(NAMES))"),
        (
            "config):\n        super().__init__()\n        self.gate_proj",
            "config, name):\n        super().__init__()\n        self.name = name\n        self.gate_proj",
        ),
        ('self.act_fn = ACT2FN["silu"]', 'setattr(self, name, ACT2FN["silu"])'),
        ("self.act_fn(self", "getattr(self, self.name)(self"),
        ("class Song", 'NAMES = itertools.cycle(("act_fn", "other"))\n\n\nclass Song'),
        ("import torch.nn", "import itertools\n\nimport torch.nn"),
    ]
    folder = save_own("minstrel", "AutoModelForCausalLM", tmp_path, edits)
    with pytest.raises(FamilyError, match=r"layers\.1 is built differently from that of layers\.0"):
        plan(Recipe(folder, trust_remote_code=True, layers="1"))


def test_missing_tensors_are_told_by_the_models_own_class(tmp_path):
    folder = save_own("minstrel", "AutoModelForCausalLM", tmp_path)
    path = folder / "model.safetensors"
    state = load_file(path)
    for name in ("model.places.weight", "lm_head.weight"):
        del state[name]
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="lacks 'lm_head.weight', 'model.places.weight' of MinstrelFor"):
        plan(Recipe(folder, trust_remote_code=True))


def test_old_code_that_never_calls_post_init_is_checked_too(tmp_path):
    folder = save_own("minstrel", "AutoModelForCausalLM", tmp_path)
    edit(folder / "modeling_minstrel.py", [("        self.post_init()\n", "")])
    assert plan(Recipe(folder, **SMALL)).warnings == []


def test_other_names_are_asked_for(tmp_path):
    edits = [("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2"), ("mlp", "song")]
    folder = save_own("minstrel", "AutoModelForCausalLM", tmp_path, edits)
    told = r'no row of the table of families is this model\'s.*ffn "layers\.{}\.song:w1,w3,w2"$'
    with pytest.raises(FamilyError, match=told):
        plan(Recipe(folder, trust_remote_code=True))
    convert(Recipe(folder, **SMALL, ffn="layers.{}.song:w1,w3,w2"), tmp_path / "out")
    dense, model = (load(path, "AutoModelForCausalLM") for path in (folder, tmp_path / "out"))
    assert_same_outputs(dense, model, make_inputs(dense, "AutoModelForCausalLM"))


def test_a_head_that_does_not_name_its_base_is_told(tmp_path):
    folder = save_own("scribe", "AutoModelForMaskedLM", tmp_path)
    edit(folder / "modeling_scribe.py", [('base_model_prefix = "scribe"', 'base_model_prefix = "model"')])
    with pytest.raises(FamilyError, match=r"ScribeForMaskedLM has no layers\.0 .*_prefix is 'model'"):
        plan(Recipe(folder, trust_remote_code=True))


def test_a_fused_gate_and_the_place_of_a_dropout_are_seen(own, tmp_path):
    fused = (
        "gates, values = self.gate_up_proj(x).chunk(2, dim=-1)\n"
        "        return self.down_proj(self.act_fn(gates) * values)"
    )
    edits = [
        (RETURN, fused),
        ("self.gate_proj = nn.Linear(config.width, config.inner, bias=False)\n        ", ""),
        (
            "up_proj = nn.Linear(config.width, config.inner",
            "gate_up_proj = nn.Linear(config.width, 2 * config.inner",
        ),
    ]
    folder = save_own("minstrel", "AutoModelForCausalLM", tmp_path, edits)
    convert(Recipe(folder, **SMALL), tmp_path / "out")
    dense, model = (load(path, "AutoModelForCausalLM") for path in (folder, tmp_path / "out"))
    assert model.mixtures()[0][1].gate is not None
    assert_same_outputs(dense, model, make_inputs(dense, "AutoModelForCausalLM"))
    family = json.loads((own("scribe")[1] / "config.json").read_text())["mpoe"]["family"]
    assert (family["inner_dropout"], family["outer_dropout"]) == ("mlp.dropout", None)


# ---------------------------------------------------------------------------------------------------
# The other commands


@pytest.mark.parametrize(("name", "auto_class"), CASES)
def test_exported_it_is_the_source_again(name, auto_class, own, tmp_path):
    """With its code, its config, and, from the identity gauge, its weights to the bit."""
    folder, out = own(name, auto_class, gauge="identity")
    export(out, tmp_path / "back", Export(check=False, trust_remote_code=True))
    found, expected = load_file(tmp_path / "back" / "model.safetensors"), stored(folder)
    assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in found)
    for file in ("config.json", "tokenizer_config.json"):
        assert json.loads((tmp_path / "back" / file).read_text()) == json.loads((folder / file).read_text())
    assert code_in(tmp_path / "back") == code_in(folder)
    assert "trust_remote_code=True" in (tmp_path / "back" / "README.md").read_text()


@pytest.mark.slow
def test_what_was_written_is_compared_in_another_process(own, tmp_path):
    _, out = own("minstrel", kind="low-rank")
    assert verify(out, trust_remote_code=True).relative_difference < 1e-5
    adapters = export(out, tmp_path / "lora", Export(to="lora", trust_remote_code=True))
    assert adapters.comparison.relative_difference < 1e-5
    assert {f"base/{file}" for file in FILES["minstrel"]} < set(adapters.files)


def test_exports_that_do_not_apply_are_refused(own, tmp_path):
    with pytest.raises(ExportError, match="is a llama with custom code, and no mixture"):
        export(own("llama")[1], tmp_path / "moe", Export(to="moe", trust_remote_code=True))
    folder, out = own("minstrel", kind="low-rank")
    with pytest.raises(ExportError, match="only the artifact's is run here: omit base"):
        export(out, tmp_path / "lora", Export(to="lora", base=str(folder), trust_remote_code=True))


@pytest.mark.parametrize("changed", ["the base's", "ours"])
def test_untrusted_code_of_an_artifact_is_not_run(changed, own, tmp_path):
    """Neither that of its base, nor a modeling_mpoe.py that is not this release's."""
    out, ran = tmp_path / "out", tmp_path / "ran"
    shutil.copytree(own("minstrel")[1], out)
    if changed == "ours":
        save_tiny("llama", "AutoModelForCausalLM", tmp_path / "dense")
        convert(Recipe(str(tmp_path / "dense"), **SMALL), out, overwrite=True)
        code = out / "modeling_mpoe.py"
    else:
        code = next(path for path in out.glob("*.py") if not path.name.startswith("modeling_mpoe"))
    code.write_text(f"open({str(ran)!r}, 'w')\n" + code.read_text())
    match = "has custom code, or that of another release: read it, and pass trust_remote_code=True"
    with pytest.raises(CheckpointError, match=match):
        export(out, tmp_path / "back", Export())
    with pytest.raises(CheckpointError, match=match):
        prune(out, tmp_path / "fewer", Pruning("builtin", 2))
    assert not ran.exists()


def test_it_is_calibrated_and_compressed(own, tmp_path):
    """On its own tokenizer's text, which ends in one word."""
    folder, _ = own("minstrel")
    (tmp_path / "text.txt").write_text(TEXT * 3)
    recipe = Recipe(
        folder, **SMALL, kind="mpo", keep=0.9, calibrate=str(tmp_path / "text.txt"), calibration_tokens=1024
    )
    report = convert(recipe, tmp_path / "out")
    assert report.divergence.nats > 0 and report.divergence.perplexity is not None
    assert len(load(tmp_path / "out", "AutoModelForCausalLM").mixtures()) == 2


def test_it_is_trained_and_stays_an_artifact(own, tmp_path):
    folder, out = own("minstrel")
    (tmp_path / "text.txt").write_text(TEXT)
    run = {"data": str(tmp_path / "text.txt"), "length": 8, "steps": 2, "batch_size": 2}
    with pytest.raises(TrainingError, match="has custom code: read it, and pass trust_remote_code=True"):
        finetune(Finetuning(str(out), teacher=str(folder), **run), tmp_path / "refused")
    finetune(Finetuning(str(out), teacher=str(folder), trust_remote_code=True, **run), tmp_path / "tuned")
    assert code_in(tmp_path / "tuned") == code_in(out)
    assert set(code_in(out)) <= set(own_files(tmp_path / "tuned"))
    assert load(tmp_path / "tuned", "AutoModelForCausalLM").mixtures()
    scores = evaluate(
        str(tmp_path / "tuned"), run["data"], against=str(folder), length=8, trust_remote_code=True
    )
    assert scores.against["perplexity"].value > 1


def test_a_trained_checkpoint_under_another_name(test_data, tmp_path):
    """A real Llama as a type that transformers does not have."""
    folder = Path(shutil.copytree(test_data / "checkpoints/llama-stories260k", tmp_path / "stories_as_wren"))
    config = json.loads((folder / "config.json").read_text())
    changed = {"model_type": "wren", "architectures": ["WrenForCausalLM"], "auto_map": MODELS["wren"]}
    (folder / "config.json").write_text(json.dumps(config | changed))
    shutil.copyfile(OWN_CODE / "modeling_wren.py", folder / "modeling_wren.py")
    convert(Recipe(folder, **SMALL | {"bond_dim": 16}), tmp_path / "out")
    dense = transformers.AutoModelForCausalLM.from_pretrained(
        test_data / "checkpoints/llama-stories260k"
    ).eval()
    model = load(tmp_path / "out", "AutoModelForCausalLM")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    inputs = tokenizer("Once upon a time", return_tensors="pt")
    assert_same_outputs(dense, model, {"input_ids": inputs["input_ids"]})
    limits = {"max_new_tokens": 20, "do_sample": False}
    assert torch.equal(model.generate(**inputs, **limits), dense.generate(**inputs, **limits))


# ---------------------------------------------------------------------------------------------------
# The Hub

CLIENT = """
import json, sys
import torch, transformers
from mpoe_convert import Recipe, convert, plan, push
from mpoe_convert.errors import FamilyError

try:
    plan(Recipe("o/song"))
except FamilyError as error:
    print(json.dumps(str(error)), flush=True)
sys.stdin.readline()
auto, ids = transformers.AutoModelForCausalLM, torch.arange(3, 15)[None]
for source, target in (("o/song", "me/out"), ("o/elsewhere", "me/other")):
    recipe = Recipe(source, experts=3, bond_dim=4, noise=0.0, trust_remote_code=True)
    plan(recipe)
    folder = target.replace("/", "-")
    convert(recipe, folder)
    push(folder, target, token="hf_any")
    dense = auto.from_pretrained(source, trust_remote_code=True).eval()
    model = auto.from_pretrained(target, trust_remote_code=True).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(target, trust_remote_code=True)
    assert tokenizer("w7 w3")["input_ids"] == [7, 3, 39]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, dense(ids).logits)
    model.save_pretrained(f"saved-{folder}")
    auto.from_pretrained(f"saved-{folder}", trust_remote_code=True)
"""


def test_models_of_the_hub_with_their_code_there_or_elsewhere(own, tmp_path):
    folder, _ = own("minstrel")
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    code = {name: files.pop(name) for name in FILES["minstrel"]}
    pointing = {
        file: re.sub(rb'"(\w+\.Minstrel)', rb'"o/code--\1', files[file])
        for file in ("config.json", "tokenizer_config.json")
    }
    with LoopbackHub() as hub:
        hub.users = {"hf_any": User("me")}
        hub.add("o/song", files | code)
        hub.add("o/elsewhere", files | pointing)
        hub.add("o/code", code | {"model.safetensors": b"other", "setup/tool.py": b"1 / 0"})
        variables = environment(tmp_path / "home", hub.endpoint, HF_TOKEN="hf_any", HF_HUB_OFFLINE="0")
        variables["HF_MODULES_CACHE"] = str(tmp_path / "modules")
        with subprocess.Popen(
            [sys.executable, "-c", CLIENT],
            cwd=tmp_path,
            env=variables,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as client:
            said = json.loads(client.stdout.readline())
            fetched = hub.fetched(".py")
            _, err = client.communicate("\n")
        assert (client.returncode, "No files matched" in err) == (0, False), err[-3000:]
        assert "'o/song' has custom code (configuration_minstrel.py" in said and not fetched
        of_code = {get.path.rpartition("/")[2] for get in hub.fetched() if "/o/code/" in get.path}
        assert of_code == set(code)
        for target in ("me/out", "me/other"):
            pushed = hub.repos[target].revisions["main"]
            assert code.items() <= pushed.items() and GLUE_FILE in pushed
            assert json.loads(pushed["config.json"])["mpoe"]["base_auto_map"] == MODELS["minstrel"]
            entries = json.loads(pushed["tokenizer_config.json"])["auto_map"]
            assert entries == {"AutoTokenizer": [None, "tokenization_minstrel.MinstrelTokenizer"]}
