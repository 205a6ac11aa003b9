"""The command line: what it prints where, its exit codes, and a clear line for everything that goes wrong."""

import json
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from click.testing import CliRunner
from helpers.commands import driven, tree
from helpers.loopback_hub import LoopbackHub, environment
from helpers.tiny import make_config, make_inputs, make_model, outputs, save_tiny
from safetensors.torch import load_file, save_file

from mpoe_convert import Recipe, convert
from mpoe_convert.cli import main
from mpoe_convert.decomposition.sites import LAYOUTS
from mpoe_convert.planning.recipe import DTYPES
from mpoe_convert.request import read_recipe
from mpoe_convert.source import checkpoint

SMALL = ["--experts", "2", "--bond-dim", "4"]
COMMAND = [sys.executable, "-W", "error::UserWarning", "-m", "mpoe_convert"]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with the source "dense" and an artifact of it, "done": copied for every test."""
    folder = tmp_path_factory.mktemp("made")
    save_tiny("gpt2", "AutoModelForCausalLM", folder / "dense")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        convert(Recipe("dense", experts=2, bond_dim=4), "done")
    return folder


@pytest.fixture
def here(made, tmp_path, monkeypatch) -> Path:
    shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def call(*args: object):
    result = CliRunner().invoke(main, [str(arg) for arg in args], prog_name="mpoe-convert")
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def ok(*args: object) -> str:
    """stdout of a run that succeeds and is silent on stderr."""
    result = call(*args)
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    return result.stdout


def refused(*args: object, code: int = 1) -> str:
    """The one line on stderr of a run that fails, prints nothing and changes nothing."""
    before = tree(Path.cwd())
    result = call(*args)
    assert (result.exit_code, result.stdout) == (code, ""), result.output
    assert re.fullmatch(r"Error: [^\n]+\n", result.stderr), result.stderr
    assert tree(Path.cwd()) == before
    return result.stderr


def process(*args: str, **options) -> subprocess.CompletedProcess:
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **options.pop("env", {})}
    return subprocess.run([*COMMAND, *args], capture_output=True, text=True, env=variables, **options)


# --------------------------------------------------------------------------------- the command's own shape


def test_a_model_needs_no_command_name(here):
    for k, args in enumerate(
        (
            ["dense", "-o", "out0", *SMALL],
            ["convert", "dense", "-o", "out1", *SMALL],
            ["-o", "out2", *SMALL, "dense"],
            ["-q", "dense", "--experts=2", "--bond-dim=4", "-oout3"],
        )
    ):
        ok(*args)
        assert weights(f"out{k}") == weights("done")


def weights(folder: str) -> bytes:
    return Path(folder, "model.safetensors").read_bytes()


def test_a_folder_named_like_a_command_is_reached_by_its_path(here):
    Path("dense").rename("plan")
    ok("./plan", "-o", "out", *SMALL)
    assert load_file("out/model.safetensors").keys() == load_file("done/model.safetensors").keys()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "MODEL -o OUTPUT [OPTIONS]"),
        (["dense"], "Missing option '-o' / '--output' (or use --dry-run)."),
        (["-o", "out"], "Missing argument 'MODEL'."),
        (["plan"], "Missing argument 'MODEL'."),
        (["verify"], "Missing argument 'ARTIFACT'."),
        (["dense", "more", "-o", "out"], "unexpected extra argument"),
        (["dense", "-o", "out", "--expert", "4"], "No such option '--expert'"),
        (["dense", "-o", "out", "--experts", "many"], "'many' is not a valid integer"),
        (
            ["dense", "-o", "out", "--layout", "flat"],
            "'flat' is not one of 'blocks', 'one-sided', 'two-sided'",
        ),
        (
            ["dense", "-o", "out", "--kind", "mp0"],
            "'mp0' is not one of 'adapter', 'core-space', 'dense', 'low-rank', 'mpo', 'split'. ",
        ),
        (["dense", "-o", "out", "--kind", "mp0"], "Did you mean 'mpo'?"),
        (["verfy", "done"], "No such command 'verfy'. Did you mean 'verify'?"),
        (["evaluat", "done", "--data", "t.txt", "-o", "out"], "No such command 'evaluat'. Did you mean"),
    ],
)
def test_usage_errors_are_2_and_say_what_is_wrong(args, said, here):
    before = tree(here)
    result = call(*args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr and "Usage: mpoe-convert" in result.stderr
    assert tree(here) == before


def test_help_is_grouped_and_ends_with_examples():
    page = ok("--help")
    for heading in ("Commands", "Output:", "Source:", "Experts:", "Decomposition:", "General:", "Examples:"):
        assert heading in page
    assert page.strip().splitlines()[-3].strip() == "mpoe-convert gpt2 --experts 8 --bond-dim 64 -o out/"
    for name, command in main.commands.items():
        assert re.search(rf"^  {name} +\w", page, re.MULTILINE)
        text = ok(name, "--help")
        assert command.help.splitlines()[0] in text
        for param in command.params:
            assert all(option in text for option in param.opts if option.startswith("-"))


def test_the_defaults_in_the_help_are_those_of_the_recipe():
    page = " ".join(ok("--help").split())
    recipe = Recipe("m")
    for option, value in (("--experts", recipe.experts), ("--top-k", recipe.top_k), ("--seed", recipe.seed)):
        assert re.search(rf"{option} INTEGER [^\[]+\[default: {value}\]", page), option
    for text in (f"[default: {recipe.noise}]", f"[default: {recipe.bond_dim}]", f"[default: {recipe.kind}]"):
        assert text in page


def test_the_examples_of_the_help_can_be_parsed(here, monkeypatch):
    lines = [line.strip() for line in ok("--help").splitlines() if line.startswith("  mpoe-convert ")]
    assert len(lines) == 3
    Path("dense").rename("gpt2")
    Path("done").rename("out")
    for line in lines[:2]:
        words = line.split()[1:]
        assert call(*words, *(["--dry-run"] if words[0] == "gpt2" else [])).exit_code == 0, line


def test_version():
    from importlib.metadata import version

    assert ok("--version") == f"mpoe-convert, version {version('mpoe-convert')}\n"


def test_importing_and_help_do_not_wait_for_torch():
    code = (
        "import sys, mpoe_convert\n"
        "from mpoe_convert.cli import main\n"
        "for args in (['--help'], ['plan', '--help'], ['--version']):\n"
        "    main(args, standalone_mode=False)\n"
        "slow = {'torch', 'transformers', 'tensorly', 'huggingface_hub', 'numpy'} & set(sys.modules)\n"
        "assert not slow, slow\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script(shell):
    script = ok("completion", shell)
    assert "_MPOE_CONVERT_COMPLETE" in script and "mpoe-convert" in script


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("mpoe-convert ver", {"plain,verify"}),
        ("mpoe-convert gpt2 --lay", {"plain,--layers", "plain,--layout"}),
        ("mpoe-convert plan gpt2 --layout ", {f"plain,{layout}" for layout in LAYOUTS}),
        ("mpoe-convert -q gpt2 --dtype ", {f"plain,{dtype}" for dtype in DTYPES}),
        ("mpoe-convert gp", {"dir,gp"}),
    ],
)
def test_completion(words, expected):
    variables = {
        "_MPOE_CONVERT_COMPLETE": "bash_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(words.count(" ")),
    }
    result = CliRunner().invoke(main, [], prog_name="mpoe-convert", env=variables)
    assert expected <= set(result.stdout.split())


# --------------------------------------------------------------------------------------- what is printed


def test_stdout_holds_the_document_and_stderr_nothing(here):
    """A real process, neither stream a terminal: JSON there, not a character here."""
    done = process("dense", "-o", "out", "--json", *SMALL, cwd=here)
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    report = json.loads(Path("out/conversion_report.json").read_text())
    assert document == {key: value for key, value in report.items() if key not in ("base_path", "files")}
    assert document["recipe"]["experts"] == 2


def test_a_bar_with_the_matrix_and_its_error_on_a_terminal_and_only_on_stderr(here):
    master, terminal = pty.openpty()
    with subprocess.Popen(
        [*COMMAND, "dense", "-o", "out", "--json", *SMALL],
        stdout=subprocess.PIPE,
        stderr=terminal,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "120"},
    ) as run:
        os.close(terminal)
        shown = b""
        while True:
            try:
                part = os.read(master, 65536)
            except OSError:  # Linux's way of saying that the other end is closed
                break
            if not part:
                break
            shown += part
        document = json.loads(run.stdout.read())
    os.close(master)
    assert run.returncode == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert "2/2" in text  # FFNs, of which the model has two with two matrices each
    last = document["matrices"][-1]
    assert f"{last['name']}  error {last['relative_error']:.1e}" in text


def test_a_terminal_gets_no_bar_when_quiet(here, monkeypatch):
    from rich.console import Console

    from mpoe_convert.cli.progress import conversion_progress

    terminal = Console(force_terminal=True, stderr=True)
    with conversion_progress(False, terminal) as progress:
        assert progress is None
    with conversion_progress(True, terminal) as progress:
        assert progress is not None
    with conversion_progress(True, Console(force_terminal=False, stderr=True)) as progress:
        assert progress is None


def test_progress_counts_ffns(here):
    seen = []
    convert(Recipe("dense", experts=2, bond_dim=4), "out", progress=lambda *step: seen.append(step))
    assert [(name.split(".")[2], done, total) for name, done, total, report in seen if report] == [
        ("0", 0, 2),
        ("0", 1, 2),
        ("1", 1, 2),
        ("1", 2, 2),
    ]
    assert all(report is None or report.name == name for name, _, _, report in seen)


def test_tables_per_layer_or_per_matrix_or_none(here):
    plain = ok("dense", "-o", "a", *SMALL)
    verbose = ok("dense", "-o", "b", "-v", *SMALL)
    assert ok("dense", "-o", "c", "-q", *SMALL) == ""
    assert "h.1 mlp " in plain and "h.1 mlp.down" not in plain
    assert "h.1 mlp.down" in verbose
    assert "Written to a. Check it: mpoe-convert verify a" in plain
    for command in (["plan", "dense"], ["inspect", "done"], ["families"]):
        assert ok(*command) != "" == ok(*command, "-q")


def test_a_traceback_is_shown_on_demand(here):
    result = call("dense", "-o", "done", "-vv")
    assert result.stderr.startswith("Traceback") and result.stderr.count("Error: ") == 2


def test_every_json_is_one_document(here):
    plan = json.loads(ok("plan", "dense", "--json", *SMALL))
    assert plan == json.loads(ok("dense", "--dry-run", "--json", *SMALL))
    summary = json.loads(ok("inspect", "done", "--json"))
    families = json.loads(ok("families", "--json"))
    assert plan["totals"]["stored_params"] == sum(part["parameters"] for part in summary["parts"].values())
    stored = load_file("done/model.safetensors")
    assert {name: list(tensor.shape) for name, tensor in stored.items()} == {
        name: tensor["shape"] for name, tensor in plan["tensors"].items()
    }
    assert any("gpt2" in row["model_types"] for row in families)


def test_a_plan_reads_no_tensor_and_writes_nothing(here, monkeypatch):
    monkeypatch.setattr(checkpoint.Checkpoint, "read", lambda *_: pytest.fail("a tensor was read"))
    before = tree(here)
    page = ok("plan", "dense", *SMALL)
    assert page == ok("dense", "--dry-run", *SMALL) == ok("dense", "-o", "out", "--dry-run", *SMALL)
    assert tree(here) == before
    assert "nothing is truncated" in page and "model.safetensors" in page
    truncated = ok("plan", "dense", "--layout", "balanced", "--bond-dim", "2", "--experts", "2")
    assert "Bonds: truncated below the full ones." in truncated


def test_the_command_that_checks_an_artifact_can_be_pasted(here):
    page = ok("dense", "-o", "my out", *SMALL)
    assert page.splitlines()[-1] == "Written to my out. Check it: mpoe-convert verify 'my out'"


def test_inspect_says_what_an_artifact_is_made_of(here):
    page = ok("inspect", "done")
    for text in (
        "mpoe_gpt2, 2 FFNs of 2 experts, top 2; from dense",
        "central tensors",
        "AutoModelForCausalLM",
    ):
        assert text in page


# ---------------------------------------------------------------------------------------------- the recipe


def test_the_recipe_in_the_artifact_repeats_the_run(here):
    options = ["--layout", "two-sided", "--noise", "0.05", "--seed", "7", "--layers", "1", "--top-k", "1"]
    ok("dense", "-o", "out", "--experts", "3", "--bond-dim", "4", "--dtype", "bfloat16", *options)
    ok("--config", "out/mpoe_recipe.yaml", "-o", "out2")
    assert tree(Path("out")) == tree(Path("out2"))
    recipe = read_recipe("out/mpoe_recipe.yaml")
    assert (recipe["seed"], recipe["layers"], recipe["dtype"]) == (7, "1", "bfloat16")


def test_the_command_line_wins_over_the_recipe(here):
    ok("dense", "-o", "out", "--seed", "7", *SMALL)
    ok("--config", "out/mpoe_recipe.yaml", "-o", "out2", "--seed", "0")
    assert weights("out2") == weights("done") != weights("out")
    Path("dense").rename("moved")
    ok("moved", "--config", "out/mpoe_recipe.yaml", "-o", "out3")
    assert weights("out3") == weights("out")


def test_a_recipe_may_use_the_spelling_of_the_options(here):
    Path("r.yaml").write_text("model: dense\nexperts: 2\nbond-dim: 4\ntop-k: 2\ninclude: h.*\n")
    ok("--config", "r.yaml", "-o", "out")
    assert weights("out") == weights("done")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("expert: 4", "the recipe has no key 'expert'; did you mean 'experts'?"),
        ("colour: 4", "the recipe has no key 'colour'; its keys are the options that --help lists"),
        ("- experts", "the recipe 'r.yaml' holds no lines of the form `name: value`"),
        ("", "the recipe 'r.yaml' holds no lines of the form `name: value`"),
        ("experts: [", "cannot read the recipe 'r.yaml': "),
        ("experts: 1", "--experts is 1; expected a whole number of at least 2"),
        ("experts: four", "experts is 'four'; expected a whole number"),
        ("experts: true", "experts is True; expected a whole number"),
        ("noise: 1e-3", "--noise is '1e-3'; expected a number from 0 to 10, such as 0.01"),
        ("noise: .nan", "noise is nan; expected a number"),
        ("sites: four", "sites is 'four'; expected an odd number from 3 to 63"),
        ("sites: 4", "--sites is 4; expected an odd number from 3 to 63"),
        ("device: 0", "device is 0; expected auto, cpu, cuda, cuda:N or mps"),
        ("device: tpu", "device is 'tpu'; expected auto, cpu, cuda, cuda:N or mps"),
        ("revision: 1.0", "revision is 1.0; expected text (quote it in a YAML file)"),
        ("factors: [4, 4]", "factors is [4, 4]; expected text"),
        ("include: 3", "include is 3; expected a pattern or a list of patterns"),
        (
            "bond_dim: wide",
            "--bond-dim is 'wide'; expected a whole number of at least 1, one for every bond, such as 12,64",
        ),
        ("bond_dim: 2.5", "--bond-dim is 2.5; expected a whole number"),
        ("layers: 3-1", "layers is '3-1'; the range 3-1 runs backwards"),
        ("layout: flat", "layout is 'flat'; expected one of blocks, one-sided, two-sided, balanced"),
        ("max_shard_size: big", "--max-shard-size is 'big'; expected a size such as 2GB"),
    ],
)
def test_a_wrong_recipe_is_told(text, said, here):
    Path("r.yaml").write_text(text)
    assert said in refused("dense", "--config", "r.yaml", "-o", "out", code=2)


def test_a_recipe_that_is_not_there_is_told(here):
    assert "cannot read the recipe 'no.yaml': " in refused("--config", "no.yaml", "-o", "out", code=2)


# --------------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--bond-dim", "0"], 2, "--bond-dim is '0'; expected a whole number of at least 1"),
        (
            ["--bond-dim", "4,x"],
            2,
            "--bond-dim is '4,x'; expected a whole number of at least 1, one for every bond, such as 12,64",
        ),
        (["--bond-dim", "4,4,4"], 2, "transformer.h.0.mlp.up (16 x 24): "),
        (["--experts", "1"], 2, "experts is 1; expected a whole number of at least 2"),
        (["--top-k", "9"], 2, "--top-k is 9 with 8 experts; expected 1 to 8"),
        (["--top-k", "0"], 2, "--top-k is 0; expected a whole number of at least 1"),
        (["--noise", "-1"], 2, "--noise is -1.0; expected a number from 0 to 10"),
        (["--sites", "4"], 2, "--sites is 4; expected an odd number from 3 to 63"),
        (["--sites", "99"], 2, "--sites is 99; expected an odd number from 3 to 63"),
        (
            ["--sites", "63"],
            2,
            "mlp.up (16 x 24): 63 sites (--sites) are too many for 16 x 24 in the one-sided",
        ),
        (["--keep", "60"], 2, "--keep is 60 with 8 experts; expected a share of the dense FFNs'"),
        (["--keep", "2", "--bond-dim", "2", "--experts", "2"], 2, "expected less, such as 0.6 for 60 %"),
        (
            ["--layers", "1-7"],
            2,
            "--layers is '1-7', and 1-7 ends behind the last FFN, in layer 1; this model has 2",
        ),
        (["--revision", ""], 2, "--revision is ''; expected some text"),
        (["--token", "a b"], 2, "--token is text with blanks or empty; expected a Hub token"),
        (["--factors", "3,4,4x4,3,2"], 2, "multiply to 48 (3 * 4 * 4), but the matrix is 16 x 24"),
        (["--factors", "2,4,2x4,3,4"], 2, "multiply to 48 (4 * 3 * 4), but the matrix is 16 x 24"),
        (["--layers", "7"], 2, "and 7 matches no FFN; this model has 2 FFNs: h.0, h.1"),
        (["--layers", "a"], 2, "--layers is 'a'; expected numbers and ranges such as 0-5,8"),
        (
            ["--include", "encoder.*"],
            2,
            "--include 'encoder.*' matches no FFN; this model has 2 FFNs: h.0, h.1",
        ),
        (["--device", "cuda:99"], 2, "--device cuda:99 is not available here; --device auto picks one"),
        (["--revision", "v1"], 2, "--revision 'v1' was given, but 'dense' is a local folder"),
        (
            ["--max-shard-size", "0"],
            2,
            "--max-shard-size is '0'; expected at least 1KB, such as 2GB or 500MB",
        ),
    ],
)
def test_a_wrong_request_is_told(options, code, said, here):
    assert said in refused("dense", "-o", "out", *options, code=code)


def config_change(**changes):
    def change(folder: Path):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def edit_weights(change):
    def write(folder: Path):
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    return write


def put(name: str, value: float):
    def change(state):
        state[name].view(-1)[5] = value

    return edit_weights(change)


def truncate(folder: Path):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def overlap(folder: Path):
    raw = json.dumps(
        {name: {"dtype": "F32", "shape": [2], "data_offsets": span} for name, span in
         (("a", [0, 8]), ("b", [4, 12]))}
    ).encode()  # fmt: skip
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(12))


def index(**weight_map):
    def write(folder: Path):
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return write


class Hostile:
    def __reduce__(self):
        return os.system, ("touch hostile",)


def hostile_pickle(folder: Path):
    (folder / "model.safetensors").unlink()
    torch.save({"w": torch.ones(2), "x": Hostile()}, folder / "pytorch_model.bin")


def remove(name: str):
    return lambda folder: (folder / name).unlink()


DAMAGE = {
    "converted": (config_change(model_type="mpoe_gpt2"), "describes an already converted model: convert its"),
    "moe": (
        config_change(num_local_experts=8),
        "this gpt2 names experts in config.json or in its tensors, and no layer of GPT2Model has any",
    ),
    "moe-tensors": (
        edit_weights(lambda state: state.update({"h.0.experts.0.w": torch.ones(2, 2)})),
        "this gpt2 names experts in config.json or in its tensors, and no layer of GPT2Model has any",
    ),
    "quantised": (
        config_change(quantization_config={"quant_method": "gptq"}),
        "says the weights are quantised (gptq): dequantise first",
    ),
    "truncated": (truncate, "bytes of tensor data, expected 22464 by its header (truncated)"),
    "overlapping": (
        overlap,
        "tensor 'b' starts at data byte 4, expected 8 (it overlaps the tensor before it)",
    ),
    "index-outside": (
        index(a="../model.safetensors"),
        "names the file '../model.safetensors', expected a .safetensors file inside the folder",
    ),
    "index-missing": (
        index(a="model-1.safetensors"),
        "'dense' lacks 1 of the 1 shards that 'model.safetensors.index.json' names: 'model-1.safetensors'",
    ),
    "nan-in-an-ffn": (
        put("transformer.h.1.mlp.c_fc.weight", float("nan")),
        "transformer.h.1.mlp.c_fc.weight holds NaN or Inf in 1 of 384 places; repair the source first",
    ),
    "inf-in-a-bias": (
        put("transformer.h.0.mlp.c_proj.bias", float("inf")),
        "transformer.h.0.mlp.c_proj.bias holds NaN or Inf in 1 of 16 places",
    ),
    "nan-in-a-copy": (
        put("transformer.ln_f.bias", float("nan")),
        "transformer.ln_f.bias holds NaN or Inf in 1",
    ),
    "nan-in-an-attention-bias": (
        put("transformer.h.0.attn.c_attn.bias", float("nan")),
        "c_attn.bias holds NaN",
    ),
    "pickle": (
        hostile_pickle,
        "holds more than tensors (it asks for posix.system) and only tensors are loaded",
    ),
    "no-config": (remove("config.json"), "'dense' has no config.json, expected a transformers checkpoint"),
    "no-weights": (
        remove("model.safetensors"),
        "has no weights that can be read, expected model.safetensors",
    ),
    "no-type": (config_change(model_type=None), "has no 'model_type'"),
    "another-type": (
        config_change(model_type="bert"),
        "no FFN found: a bert checkpoint has tensors such as encoder.layer.0.intermediate.dense.weight, "
        "this one has transformer.h.0.",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_source_is_told(case, here):
    damage, said = DAMAGE[case]
    damage(Path("dense"))
    assert said in refused("dense", "-o", "out", *SMALL)
    assert not Path("hostile").exists()


def test_an_artifact_is_no_source(here):
    assert "describes an already converted model" in refused("done", "-o", "out", *SMALL)


def test_numbers_that_the_dtype_cannot_hold_are_told(here):
    for name in ("transformer.h.0.mlp.c_fc.weight", "transformer.h.0.mlp.c_fc.bias", "transformer.ln_f.bias"):
        shutil.copytree("dense", name)
        put(name, 1e20)(Path(name))
        said = refused(name, "-o", "out", "--dtype", "float16", *SMALL)
        assert "too large for float16; use another --dtype" in said
        ok(name, "-o", f"{name}.out", "--dtype", "bfloat16", *SMALL)


def test_a_causal_mask_of_infinities_is_no_weight(here):
    mask = {"transformer.h.0.attn.masked_bias": torch.tensor(-torch.inf)}
    edit_weights(lambda state: state.update(mask))(Path("dense"))
    ok("dense", "-o", "out", "-q", *SMALL)
    made = load_file("out/model.safetensors")
    assert made["transformer.h.0.attn.masked_bias"] == -torch.inf


def test_a_matrix_of_zeros_is_converted(here):
    """Zero-initialised layers exist; their relative error is zero and the report is still JSON."""
    zero = edit_weights(lambda state: state["transformer.h.0.mlp.c_proj.weight"].zero_())
    zero(Path("dense"))
    for layout in LAYOUTS:
        report = json.loads(
            ok("dense", "-o", layout, "--json", "--layout", layout, *SMALL),
            parse_constant=lambda name: pytest.fail(f"{name} is not JSON"),
        )
        matrix = next(m for m in report["matrices"] if m["name"] == "transformer.h.0.mlp.down")
        assert matrix["relative_error"] == matrix["clone_drift"] == 0


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_what_is_no_artifact_is_told(command, here):
    expected = "expected a folder that a conversion wrote, with conversion_report.json and a config.json"
    assert f"'dense' is not an artifact of mpoe-convert: {expected}" in refused(command, "dense")
    assert f"'nothing' is not a folder: {expected}" in refused(command, "nothing")
    report = Path("done/conversion_report.json")
    for text, said in (
        ("{", "is not JSON (Expecting"),
        ("[]", "holds a JSON list, expected a conversion report: convert again"),
        ("{}", "it lacks ['base_model'"),
    ):
        report.write_text(text)
        assert said in refused(command, "done")


def test_a_damaged_artifact_is_told(here):
    truncate(Path("done"))
    assert "model.safetensors' holds" in refused("inspect", "done")


def test_running_out_of_memory_is_told(here, monkeypatch):
    from mpoe_convert.conversion import convert as conversion

    def exhausted(*_):
        raise MemoryError

    monkeypatch.setattr(conversion, "finish_projection", exhausted)
    assert "out of memory while working on transformer.h.0.mlp.up; `mpoe-convert plan`" in refused(
        "dense", "-o", "out", *SMALL
    )


# ------------------------------------------------------------------------------------------------ verify


def verified(*args: str):
    result = call("verify", *args, "--json")
    assert result.stderr == ""
    return result.exit_code, json.loads(result.stdout)


def test_verify_accepts_clones_that_are_exact(here, own_process):
    ok("dense", "-o", "out", "--noise", "0", *SMALL)
    code, said = verified("out")
    assert (code, said["ok"], said["top1_agreement"], said["greedy_agreement"]) == (0, True, 1.0, 1.0)
    assert said["relative_difference"] < 1e-5 < said["tolerance"] == pytest.approx(1e-4, rel=0.1)
    assert (said["model_class"], said["auto_class"]) == ("MPOEGPT2LMHeadModel", "AutoModelForCausalLM")
    assert (said["problems"], said["trained"]) == ([], False)


def test_verify_accepts_the_default_noise(here):
    result = call("verify", "done")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "OK: the outputs agree." in result.stdout


def test_verify_refuses_an_artifact_whose_centre_was_doubled(here):
    def double(state):
        state["transformer.h.0.mlp.up.terms.0.central_2"] *= 2

    edit_weights(double)(Path("done"))
    result = call("verify", "done")
    assert (result.exit_code, result.stderr) == (1, "")
    assert "DIFFERENT: the outputs do not agree." in result.stdout


def test_verify_refuses_an_artifact_that_was_truncated(here):
    page = ok("dense", "-o", "out", "--layout", "balanced", "--bond-dim", "2", "--experts", "2")
    assert "Warning: truncation lost most of the model" in page
    code, said = verified("out")
    assert (code, said["ok"]) == (1, False)
    assert said["relative_difference"] > said["tolerance"] == 0.1


def test_verify_refuses_an_artifact_that_lacks_a_tensor(here):
    edit_weights(lambda state: state.pop("transformer.h.1.mlp.router.weight"))(Path("done"))
    said = refused("verify", "done")
    assert "transformer.h.1.mlp.router.weight is missing, expected [2, 16] by config.json" in said


def test_verify_tells_that_the_dense_model_is_gone(here):
    Path("dense").rename("moved")
    said = refused("verify", "done")
    assert "the dense model 'dense' is not a folder here; expected the one that was converted" in said
    for against in ("./nothing", "/nothing", "a/b/c"):
        said = refused("verify", "done", "--against", against)
        assert f"the dense model '{against}' is not a folder here; expected a folder or a Hub id" in said


def test_verify_tells_that_the_dense_model_does_not_load(here):
    Path("dense/model.safetensors").write_bytes(b"x")
    assert "the dense model" in (said := refused("verify", "done")) and "does not load or run: " in said


# -------------------------------------------------------------------------------- families outside the table

BY_HAND = {
    "arcee": ("layers.{}.mlp:up_proj,down_proj", {}),
    "nemotron": ("layers.{}.mlp:up_proj,down_proj", {}),
    "seed_oss": ("layers.{}.mlp:gate_proj,up_proj,down_proj", {}),
    "mpt": ("blocks.{}.ffn:up_proj,down_proj", {"expansion_ratio": 2}),
}


def save_outside(model_type: str, folder: Path) -> None:
    config = make_config(model_type)
    for key, value in BY_HAND[model_type][1].items():
        setattr(config, key, value)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
        model.tie_weights()
    model.save_pretrained(folder)


@pytest.mark.parametrize("model_type", BY_HAND)
def test_a_family_outside_the_table_is_named_and_converts_by_hand(model_type, here):
    from mpoe_convert.source.families import FAMILY_OF

    assert model_type not in FAMILY_OF, "choose another type for this test"
    save_outside(model_type, here / "other")
    said = refused("other", "-o", "out", *SMALL)
    ffn = BY_HAND[model_type][0]
    assert f"model type '{model_type}' is not in the table of families; its tensors look like " in said
    example = min(n for n in load_file("other/model.safetensors") if ".0." in n and n.endswith("weight"))
    assert example in said
    nearest = "" if model_type == "mpt" else "; nearest is llama"  # nothing in the table is called like it
    assert f'{nearest}; to name the FFNs by hand: --ffn "{ffn}"' in said
    ok("other", "-o", "out", "--ffn", ffn, "--noise", "0", "-q", *SMALL)
    auto = transformers.AutoModelForCausalLM
    dense = auto.from_pretrained("other").eval()
    model, info = auto.from_pretrained("out", trust_remote_code=True, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    inputs = make_inputs(dense, "AutoModelForCausalLM")
    expected, found = outputs(dense, inputs)["logits"], outputs(model.eval(), inputs)["logits"]
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * expected.abs().max().item())


@pytest.mark.parametrize(
    ("ffn", "said"),
    [
        ("mlp", 'expected "LAYERS.{}.SLOT:up,down" or "LAYERS.{}.SLOT:gate,up,down"'),
        ("layers.{}.mlp:up_proj", 'expected "LAYERS.{}.SLOT:up,down"'),
        ("layers.{}.ffn:up_proj,down_proj", "--ffn does not fit transformers' ArceeModel: "),
        ("layers.{}.mlp:up,down", "--ffn does not fit transformers' ArceeModel: "),
        ("layers.{}.mlp:up_proj,act_fn", "--ffn names up_proj, act_fn of types "),
    ],
)
def test_a_wrong_description_of_the_ffns_is_told(ffn, said, here):
    save_outside("arcee", here / "other")
    assert said in refused("other", "-o", "out", "--ffn", ffn, *SMALL)


# ----------------------------------------------------------------------------------------------- the Hub


@pytest.fixture
def hub_cli(tmp_path):
    """(hub, ask, process): the command in a process that can see the loopback Hub and nothing else."""
    with LoopbackHub() as hub:
        variables = environment(tmp_path / "home", hub.endpoint)
        del variables["HF_HUB_DISABLE_PROGRESS_BARS"]  # the command has to be silent by itself
        with driven(tmp_path, variables) as (ask, client):
            yield hub, ask, client


def big_tiny_gpt2(folder: Path, seed: int) -> dict[str, bytes]:
    """A checkpoint whose vocabulary makes it larger than the part that headers are read from."""
    model = make_model("gpt2", "AutoModelForCausalLM", seed=seed)
    model.resize_token_embeddings(10_000)
    model.save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_models_of_the_hub(hub_cli, tmp_path):
    hub, ask, client = hub_cli
    main_files, old_files = big_tiny_gpt2(tmp_path / "main", 0), big_tiny_gpt2(tmp_path / "old", 1)
    repo = hub.add("o/m", main_files, revisions={"v1": old_files})
    size = len(main_files["model.safetensors"])

    code, out, err = ask("plan", "o/m", "--json", *SMALL)
    assert (code, err) == (0, "")
    plan = json.loads(out)
    assert (plan["base_model"], plan["revision"]) == ("o/m", repo.commit("main"))
    assert hub.bytes_sent() < 120_000 < size / 4
    assert not list((tmp_path / "home").rglob("model.safetensors"))

    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    assert ask("o/m", "-o", "taken", *SMALL)[0] == 1
    assert hub.bytes_sent() < 120_000  # refused before anything is downloaded

    assert ask("o/m", "-o", "new", "-q", *SMALL) == [0, "", ""]
    assert ask("o/m", "--revision", "v1", "-o", "old-out", "-q", *SMALL) == [0, "", ""]
    for source, out in (("main", "new"), ("old", "old-out")):
        convert(Recipe(str(tmp_path / source), experts=2, bond_dim=4), tmp_path / f"local-{source}")
        local = (tmp_path / f"local-{source}" / "model.safetensors").read_bytes()
        assert (tmp_path / out / "model.safetensors").read_bytes() == local
    recipe = read_recipe(tmp_path / "old-out" / "mpoe_recipe.yaml")
    assert (recipe["model"], recipe["revision"]) == ("o/m", repo.commit("v1"))
    assert "base_model: o/m" in (tmp_path / "old-out" / "README.md").read_text()
    assert ask("--config", "old-out/mpoe_recipe.yaml", "-o", "again", "-q") == [0, "", ""]
    assert tree(tmp_path / "again") == tree(tmp_path / "old-out")

    files = {"config.json": main_files["config.json"], "model.safetensors": b""}
    hub.add("o/gated", files, refuse=(403, "GatedRepo", "Access to model o/gated is restricted"))
    assert ask("o/m", "--revision", "v9", "-o", "x")[0] == 1
    for args, said in (
        (["o/gated"], "'o/gated' is gated: accept its conditions on its Hub page, then run `hf auth login`"),
        (["o/absent"], "'o/absent' is neither a folder here nor a repository on the Hub that you can see"),
        (
            ["o/m", "--revision", "v9"],
            "'o/m' has no revision 'v9': expected a branch, a tag or a full commit",
        ),
        (["not/a/model"], "'not/a/model' is neither a folder here nor a Hub id"),
    ):
        for command in ([*args, "-o", "x"], ["plan", *args]):
            code, out, err = ask(*command, *SMALL)
            assert (code, out) == (1, "")
            assert said in err and re.fullmatch(r"Error: [^\n]+\n", err), err
    hub.__exit__()
    client.stdin.write("null\n")
    code, out, err = ask("o/absent", "-o", "x", *SMALL)
    assert (code, out) == (1, "")
    assert "no connection to the Hub for 'o/absent'" in err and err.count("\n") == 1, err
    assert "check the network and HF_ENDPOINT, or pass a local folder" in err
    assert not (tmp_path / "x").exists()


def test_a_recipe_may_name_its_output(here):
    Path("r.yaml").write_text("model: dense\noutput: named\nexperts: 2\nbond-dim: 4\n")
    assert call("--config", "r.yaml", "-q").exit_code == 0
    assert call("--config", "r.yaml", "-o", "given", "-q").exit_code == 0
    assert Path("named/config.json").exists() and Path("given/config.json").exists()
