"""What the command says before libraries that take seconds are imported, and how it ends when interrupted."""

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.tiny import save_tiny
from huggingface_hub import constants
from transformers import MixtralConfig, MixtralForCausalLM

from mpoe_convert import Recipe, convert, plan
from mpoe_convert.cli import app
from mpoe_convert.source import memo

MODELS = ("transformers.modeling_utils", "transformers.models.gpt2.modeling_gpt2")
SLOW = ("torch", "transformers", "datasets", "accelerate", *MODELS)
# Families of which a plan is made without their models: one of each kind.
KNOWN = {
    "gpt2": "AutoModelForCausalLM",
    "llama": "AutoModelForCausalLM",
    "bert": "AutoModelForMaskedLM",
    "t5": "AutoModelForSeq2SeqLM",
    "bart": "AutoModelForSeq2SeqLM",
}
EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-gpt2"
# Runs commands one after the other; says of each its exit code, what it printed, and what is imported then.
CHILD = f"""
import json, sys
from click.testing import CliRunner
from mpoe_convert.cli import main
for args in json.loads(sys.argv[1]):
    done = CliRunner().invoke(main, args, prog_name="mpoe-convert")
    trouble = repr(done.exception) if done.exception and not isinstance(done.exception, SystemExit) else ""
    imported = sorted({{*{SLOW}}} & {{*sys.modules}})
    print(json.dumps([done.exit_code, done.stdout, done.stderr + trouble, imported]))
"""


def run(cwd: Path, *commands: list[str], **variables: str) -> list[list]:
    """[exit code, stdout, stderr, slow libraries that are imported] of each command, in one fresh process."""
    command = [sys.executable, "-c", CHILD, json.dumps(commands)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**os.environ, **variables})
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with models, artifacts that are not whole, a text and a folder that is no artifact."""
    folder = tmp_path_factory.mktemp("waiting")
    save_tiny("gpt2", "AutoModelForCausalLM", folder / "dense")
    convert(Recipe(str(folder / "dense"), experts=2, bond_dim=4, max_shard_size="20KB"), folder / "done")
    for copy in ("cut", "edited"):
        shutil.copytree(folder / "done", folder / copy)
    min((folder / "cut").glob("*.safetensors")).unlink()
    edited = json.loads((folder / "edited" / "config.json").read_text(encoding="utf-8"))
    (folder / "edited" / "config.json").write_text(json.dumps(edited | {"mpoe_cache": 3}), encoding="utf-8")
    sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    config = MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, num_local_experts=4)
    MixtralForCausalLM(config).save_pretrained(folder / "mixture")
    (folder / "topics.txt").write_text("a text", encoding="utf-8")
    (folder / "rows.csv").write_text("txt,target\na,b\n", encoding="utf-8")
    (folder / "rows.jsonl").write_text('{"txt": "a"}\n', encoding="utf-8")
    (folder / "full").mkdir()
    (folder / "full" / "notes").write_text("mine", encoding="utf-8")
    return folder


FINETUNE = ["finetune", "dense", "-o", "out", "--data"]
EVALUATE = ["evaluate", "dense", "--data"]
PRUNING = ["--experts", "2", "--calibrate", "topics.txt"]
KEEP = ["--keep", "0.9", "--calibrate"]
OFFLINE = "is not complete in the local cache and offline mode is on"
REFUSED = {
    "a path of the model": (["./dnese", "-o", "out"], "no folder './dnese'", "dense"),
    "the path of a plan": (["plan", "dense/"[:-1] + "s/"], "there is no folder 'denses/'", "dense"),
    "an id of the model": (["dens", "-o", "out"], OFFLINE, "dense"),
    "a full output": (["dense", "-o", "full"], "'full' is not empty and not an artifact", None),
    "an output that is a file": (
        ["dense", "-o", "topics.txt"],
        "'topics.txt' exists and is not a folder",
        None,
    ),
    "an option": (["dense", "-o", "out", "--experts", "1"], "expected", None),
    "an option of dense sources": (
        ["mixture", "-o", "out", "--kind", "low-rank"],
        "--kind given with a",
        None,
    ),
    "the same of a plan": (["plan", "mixture", "--noise", "0.1"], "--noise given with a mixture", None),
    "more experts per token than there are": (["dense", "-o", "out", "--top-k", "9"], "with 8 experts", None),
    "more of a mixture than all": (["mixture", "-o", "out", "--keep", "2"], "the experts' numbers", None),
    "a search without text": (["dense", "-o", "out", "--search", "--keep", "0.9"], "calibration text", None),
    "layers that are not there": (["dense", "-o", "out", "--layers", "7"], "this model has 2 FFNs", None),
    "sizes of other experts": (["dense", "-o", "out", "--bond-dim", "2/4"], "2 sizes for 8 experts", None),
    "parts that do not divide": (
        ["dense", "-o", "out", "--kind", "split", "--experts", "7"],
        "equally",
        None,
    ),
    "a folder to stream": (["dense", "-o", "out", "--stream"], "'dense' is a local folder", None),
    "a calibration text": (["dense", "-o", "out", *KEEP, "topics.tx"], "topics.tx' is no file", "topics.txt"),
    "the same of a plan of weights": (["plan", "dense", *KEEP, "topic.txt"], "is no file", "topics.txt"),
    "a folder of calibration texts": (
        ["prune", "done", "-o", "out", *PRUNING, "--calibrate", "full"],
        "'full' is a folder; expected a file, one of .txt",
        None,
    ),
    "training data": ([*FINETUNE, "topics.tx"], "topics.tx' is no file; expected one of", "topics.txt"),
    "a column of calibration text": (
        ["dense", "-o", "out", *KEEP, "rows.csv"],
        "'rows.csv' has 2 columns ('txt', 'target'); calibration needs text (name the columns by",
        "txt",
    ),
    "the same where experts are left out": (
        ["prune", "done", "-o", "out", "--experts", "2", "--calibrate", "rows.csv"],
        "calibration needs text",
        "txt",
    ),
    "the same of an average of experts": (
        ["export", "done", "-o", "out", "--calibrate", "rows.jsonl"],
        "calibration needs text",
        "txt",
    ),
    "a column that is named": (
        ["plan", "dense", *KEEP, "rows.csv", "--text-column", "txt", "--target-column", "targt"],
        "calibration needs targt",
        "target",
    ),
    "a column of training data": (
        [*FINETUNE, "rows.csv"],
        "'rows.csv' has 2 columns ('txt', 'target'); every task needs text",
        "txt",
    ),
    "a column of held-out data": (
        [*FINETUNE, "topics.txt", "--eval-data", "rows.jsonl"],
        "'rows.jsonl' has 1 column ('txt'); every task needs text",
        "txt",
    ),
    "the column of tasks": (
        [*EVALUATE, "rows.csv", "--text-column", "txt", "--routed-by", "topic"],
        "every task needs topic",
        None,
    ),
    "a column of classes": (
        [*EVALUATE, "rows.csv", "--text-column", "txt", "--task", "classification"],
        "task classification needs label",
        None,
    ),
    "training data that may be an id": ([*FINETUNE, "topics"], OFFLINE, "topics.txt"),
    "held-out data": (
        [*FINETUNE, "topics.txt", "--eval-data", "./topic"],
        "./topic' is no file",
        "topics.txt",
    ),
    "a teacher": ([*FINETUNE, "topics.txt", "--teacher", "dens"], OFFLINE, "dense"),
    "a tokenizer": ([*FINETUNE, "topics.txt", "--tokenizer", "./x"], "no folder './x'", None),
    "data to score on": ([*EVALUATE, "topics.csv"], "topics.csv' is no file", "topics.txt"),
    "another model": ([*EVALUATE, "topics.txt", "--against", "no/such"], OFFLINE, None),
    "a model to export": (["export", "dense", "-o", "out"], "describes no converted model", None),
    "an artifact without a shard": (["prune", "cut", "-o", "out", *PRUNING], "lacks 1 of the", None),
    "an edited option": (
        ["finetune", "edited", "-o", "out", "--data", "topics.txt"],
        "mpoe_cache is 3",
        None,
    ),
    "the same of another model": ([*EVALUATE, "topics.txt", "--against", "edited"], "mpoe_cache is 3", None),
    "an artifact to export": (["export", "ful", "-o", "out"], OFFLINE, "full"),
    "the output of an export": (["export", "dense", "-o", "full"], "'full' is not empty and not", None),
    "an artifact to prune": (["prune", "ful", "-o", "out", *PRUNING], OFFLINE, "full"),
    "an artifact to verify": (["verify", "dnese"], "'dnese' is not a folder", "dense"),
    "an artifact to push": (["push", "dnese", "me/model"], "'dnese' is not a folder", "dense"),
}


def test_what_is_not_there_is_told_before_anything_slow_is_imported(made):
    before = sorted(made.rglob("*"))
    got = run(made, *(command for command, _, _ in REFUSED.values()), HF_HUB_OFFLINE="1")
    for (code, stdout, stderr, imported), (case, (_, said, near)) in zip(got, REFUSED.items(), strict=True):
        assert code in (1, 2) and stdout == "", (case, stderr)
        assert said in stderr and stderr.count("\n") == 1, (case, stderr)
        assert code == 2 or "name the columns by" not in stderr, case
        assert ("did you mean" in stderr) == (near is not None), (case, stderr)
        assert near is None or f"did you mean '{near}'?" in stderr, (case, stderr)
        assert imported == [], case
    assert sorted(made.rglob("*")) == before


def test_a_first_plan_of_a_known_family_imports_nothing_slow(made, tmp_path):
    """It is the plan that is made with the model itself, which this process has imported."""
    for model_type, auto in KNOWN.items():
        save_tiny(model_type, auto, tmp_path / model_type)
    options = ["--experts", "2", "--bond-dim", "4", "--json"]
    commands = [["plan", str(tmp_path / model_type), *options] for model_type in KNOWN]
    got = run(made, *commands, HF_HOME=str(tmp_path / "empty"), HF_ASSETS_CACHE=str(tmp_path / "empty"))
    for model_type, (code, stdout, stderr, imported) in zip(KNOWN, got, strict=True):
        assert (code, stderr, imported) == (0, "", []), model_type
        expected = plan(Recipe(str(tmp_path / model_type), experts=2, bond_dim=4)).to_json()
        assert json.loads(stdout) == json.loads(json.dumps(expected)), model_type


def test_a_first_conversion_of_a_known_family_imports_no_model(tmp_path):
    """Its files are those of a conversion in this process, which has imported the models."""
    shutil.copytree(EXAMPLE, tmp_path / "dense")
    command = ["dense", "-o", "fresh", "--experts", "2", "--bond-dim", "4", "-q"]
    [[code, _, stderr, imported]] = run(tmp_path, command, HF_ASSETS_CACHE=str(tmp_path / "empty"))
    assert (code, stderr) == (0, "") and not {*MODELS} & {*imported}
    convert(Recipe(str(tmp_path / "dense"), experts=2, bond_dim=4), tmp_path / "here")
    here, fresh = ({path.name: path for path in (tmp_path / name).iterdir()} for name in ("here", "fresh"))
    assert here.keys() == fresh.keys()
    for name in ("config.json", "model.safetensors", "tokenizer_config.json", "tokenizer.json"):
        assert here[name].read_bytes() == fresh[name].read_bytes(), name


def test_a_plan_of_a_model_that_was_asked_before_imports_nothing_slow(made, tmp_path, monkeypatch):
    """What is learnt of the stock model here is read there, and the plans are equal."""
    save_tiny("gpt_neo", "AutoModelForCausalLM", tmp_path / "neo")  # no family whose files are read instead
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path))
    recipe = Recipe(str(tmp_path / "neo"), experts=2, bond_dim=4)
    asked = plan(recipe).to_json()
    monkeypatch.setattr(memo, "_is_used", lambda: True)
    assert plan(recipe).to_json() == asked
    command = ["plan", recipe.model, "--experts", "2", "--bond-dim", "4", "--json"]
    package = str(memo.PACKAGE.parent)  # what was learnt holds for these very files
    [[code, stdout, stderr, imported]] = run(made, command, HF_ASSETS_CACHE=str(tmp_path), PYTHONPATH=package)
    assert (code, stderr, imported) == (0, "", [])
    assert json.loads(stdout) == json.loads(json.dumps(asked))


# --------------------------------------------------------------------------------------------- a first line


def test_a_line_says_what_begins_on_a_terminal_alone(monkeypatch, capsys):
    app.announce("Converting gpt2", quiet=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    app.announce("Converting gpt2", quiet=True)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}.items():
        monkeypatch.setenv(name, value)
    app.announce("Converting gpt2", quiet=False)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("RANK", "0")
    app.announce("Converting gpt2", quiet=False)
    assert capsys.readouterr() == ("", "Converting gpt2 …\n")


@pytest.fixture
def instead(tmp_path):
    """A folder with modules that are found before those that are installed."""

    def make(name: str, code: str) -> dict[str, str]:
        (tmp_path / f"{name}.py").write_text(code, encoding="utf-8")
        path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
        return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}

    return make


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["dense", "-o", "out"], "Converting dense …"),
        (["finetune", "dense", "-o", "out", "--data", "topics.txt"], "Fine-tuning dense …"),
        (["evaluate", "dense", "--data", "topics.txt"], "Scoring dense …"),
        (["export", "done", "-o", "out"], "Exporting done …"),
    ],
)
def test_the_line_comes_before_torch(args, said, made, instead):
    mine, theirs = pty.openpty()
    variables = instead("torch", "import os\nos._exit(7)")
    command = [sys.executable, "-m", "mpoe_convert", *args]
    done = subprocess.run(command, cwd=made, env=variables, stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)
    assert os.read(mine, 1000).decode().split("\r\n")[0] == said
    os.close(mine)
    assert (done.returncode, done.stdout) == (7, b"")


# ------------------------------------------------------------------------------------------------- interrupts

# What an import does to an interrupt that comes while it runs: it lets it through, hides it, or renames it.
KILL = "import os, signal\nos.kill(os.getpid(), signal.{})\n"
TRY = "import os, signal\ntry:\n    os.kill(os.getpid(), signal.{})\nexcept BaseException:\n    "
IMPORTS = {"lets it through": KILL, "hides it": TRY + "pass", "renames it": TRY + "raise ImportError"}


@pytest.mark.parametrize("sent", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("code", IMPORTS.values(), ids=IMPORTS)
def test_an_interrupt_while_libraries_are_imported_is_one_line(code, sent, made, instead):
    variables = instead("torch", code.format(sent) + "\nimport os\nos._exit(7)  # it went on")
    command = [sys.executable, "-m", "mpoe_convert", "dense", "-o", "out"]
    done = subprocess.run(command, cwd=made, env=variables, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (128 + getattr(signal, sent), "")
    assert done.stderr == f"Stopped by {sent}; no output was written.\n"


@pytest.mark.parametrize("code", IMPORTS.values(), ids=IMPORTS)
def test_an_interrupt_while_the_command_itself_is_imported_is_one_line(code, made, instead):
    variables = instead("click", code.format("SIGINT") + "\nimport os\nos._exit(7)  # it went on")
    command = [sys.executable, "-c", "from mpoe_convert.__main__ import main; main()", "plan", "dense"]
    done = subprocess.run(command, cwd=made, env=variables, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "Stopped by SIGINT; no output was written.\n"


def test_the_installed_script_is_that_entry():
    lines = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8").splitlines()
    assert 'mpoe-convert = "mpoe_convert.__main__:main"' in lines
