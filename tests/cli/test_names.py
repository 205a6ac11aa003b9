"""Names that users give: too long for a file, or with "~" for their home; every command tells alike."""

import logging
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from helpers.tiny import save_tiny

from mpoe_convert import Export, Finetuning, Recipe
from mpoe_convert.artifact.inspect import inspect
from mpoe_convert.cli import main
from mpoe_convert.cli.checks import check_output_first
from mpoe_convert.cli.progress import silence_libraries
from mpoe_convert.errors import RequestError
from mpoe_convert.training.request import Scoring

SENTENCE = "a pasted sentence, " * 20  # more than the 255 bytes that a name can have
PRUNING = ["--experts", "2", "--calibrate"]
TRAIN = ["finetune", "dense", "--data", "topics.txt"]
COMMANDS = {
    "convert": ["convert", SENTENCE, "-o", "out"],
    "convert one word": [SENTENCE.replace(" ", ""), "-o", "out"],
    "convert a path": [f"./{SENTENCE}", "-o", "out"],
    "output": ["dense", "-o", SENTENCE],
    "plan": ["plan", SENTENCE],
    "calibrate": ["plan", "dense", "--keep", "0.9", "--calibrate", SENTENCE],
    "calibrate a file": ["plan", "dense", "--keep", "0.9", "--calibrate", f"{SENTENCE}.txt"],
    "config": ["plan", "--config", SENTENCE],
    "finetune": ["finetune", SENTENCE, "--data", "topics.txt", "-o", "out"],
    "data": ["finetune", "dense", "--data", SENTENCE, "-o", "out"],
    "held-out data": [*TRAIN, "-o", "out", "--eval-data", f"{SENTENCE}.jsonl"],
    "teacher": [*TRAIN, "-o", "out", "--teacher", SENTENCE],
    "tokenizer": [*TRAIN, "-o", "out", "--tokenizer", SENTENCE],
    "output of a run": [*TRAIN, "-o", SENTENCE],
    "evaluate": ["evaluate", SENTENCE, "--data", "topics.txt"],
    "evaluate and record": ["evaluate", SENTENCE, "--data", "topics.txt", "--record"],
    "evaluate data": ["evaluate", "dense", "--data", SENTENCE],
    "evaluate against": ["evaluate", "dense", "--data", "topics.txt", "--against", SENTENCE],
    "export": ["export", SENTENCE, "-o", "out"],
    "output of an export": ["export", "dense", "-o", SENTENCE],
    "base of an export": ["export", "dense", "-o", "out", "--to", "lora", "--base", SENTENCE],
    "prune": ["prune", SENTENCE, "-o", "out", *PRUNING, "topics.txt"],
    "output of a pruning": ["prune", "dense", "-o", SENTENCE, *PRUNING, "topics.txt"],
    "text of a pruning": ["prune", "dense", "-o", "out", *PRUNING, SENTENCE],
    "verify": ["verify", SENTENCE],
    "inspect": ["inspect", SENTENCE],
    "report": ["report", SENTENCE],
    "push": ["push", SENTENCE, "me/model"],
}


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """The user's home and working directory, with a text and a model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "topics.txt").write_text("a text", encoding="utf-8")
    save_tiny("gpt2", "AutoModelForCausalLM", tmp_path / "dense")
    return tmp_path


def told(args: list[str]) -> str:
    """What a command that is refused says, without "Error: "."""
    done = CliRunner().invoke(main, args)
    assert isinstance(done.exception, SystemExit) and done.exit_code in (1, 2), (args[0], done.exception)
    assert done.stdout == "" and done.stderr.count("\n") == 1, (args[0], done.output)
    return done.stderr.removeprefix("Error: ")


def test_a_name_that_no_file_can_have_is_told_in_one_line(home):
    for case, args in COMMANDS.items():
        said = told(args)
        assert "a pasted sentence" in said or "apastedsentence" in said, (case, said)
    assert sorted(path.name for path in home.iterdir()) == ["dense", "topics.txt"]


def test_requests_read_the_user_s_home_in_every_name(home):
    there, text = str(home / "dense"), str(home / "topics.txt")
    assert Recipe("~/dense").model == there
    assert Recipe.from_mapping(
        {"model": Path("~/dense"), "keep": 0.9, "calibrate": ["~/topics.txt", "o/d"]}
    ) == (Recipe(there, keep=0.9, calibrate=(text, "o/d")))
    run = Finetuning("~/dense", "~/topics.txt", ("~/topics.txt",), teacher="~/dense", tokenizer="~/dense")
    assert (run.model, run.data, run.eval_data) == (there, (text,), (text,))
    assert (run.teacher, run.tokenizer) == (there, there)
    score = Scoring("~/dense", "~/topics.txt", against="~/dense")
    assert (score.model, score.data, score.against) == (there, (text,), there)
    assert Export("lora", base="~/dense").base == there
    assert Recipe("~nobody-of-this-name/x").model == "~nobody-of-this-name/x"


def test_commands_find_what_lies_in_the_user_s_home(home):
    """Each goes on to say what the folder is, not that it is not there."""
    for command in (["verify"], ["inspect"], ["report"], ["push"]):
        said = told([*command, "~/dense", *["me/model"][: command == ["push"]]])
        assert f"'{home / 'dense'}' is not an artifact of mpoe-convert" in said
    said = told(["evaluate", "~/dense", "--data", "~/topics.txt", "--record"])
    assert f"'{home / 'dense'}' is not an artifact of mpoe-convert" in said
    full = home / "full"
    full.mkdir()
    (full / "notes").write_text("mine", encoding="utf-8")
    Path("run.yaml").write_text("model: ~/dense\noutput: ~/full\n", encoding="utf-8")
    for args in (["~/dense", "-o", "~/full"], ["convert", "--config", "run.yaml"], [*TRAIN, "-o", "~/full"]):
        assert str(full) in told(args)
    assert "full' is not empty" in told(["export", "~/dense", "-o", "~/full"])


def test_the_same_mistake_has_one_wording(home):
    said = {told(args) for args in (["plan", "./dnese"], ["evaluate", "./dnese", "--data", "topics.txt"])}
    said |= {told([*TRAIN, "-o", "out", "--teacher", "./dnese"])}
    assert said == {"there is no folder './dnese': check the path, or pass a Hub id; did you mean 'dense'?\n"}


def test_python_s_callers_are_told_of_long_names_too(home):
    with pytest.raises(RequestError, match=r"^folder is 'a pasted sentence.*\.\.\., too long a name"):
        inspect(SENTENCE)


@pytest.mark.skipif(sys.platform == "win32", reason="needs links")
def test_what_a_killed_run_left_beside_a_link_s_target_is_named(home, capsys):
    (home / "disk" / ".out.abcdefgh.partial").mkdir(parents=True)
    (home / "disk" / ".out.abcdefgh.partial" / "lock").touch()
    (home / "disk" / "out").mkdir()
    (home / "out").symlink_to("disk/out")
    check_output_first("out", overwrite=False, quiet=False)
    left = home / "disk" / ".out.abcdefgh.partial"
    assert capsys.readouterr().err == f"Removed '{left}', which a run that was killed had left.\n"
    assert not left.exists()


def test_datasets_does_not_tell_of_errors_beside_us():
    """It logs what it raises, which is told in one line of our own."""
    logger = logging.getLogger("datasets")
    before = logger.level
    try:
        silence_libraries()
        assert not logging.getLogger("datasets.packaged_modules.json.json").isEnabledFor(logging.ERROR)
    finally:
        logger.setLevel(before)
