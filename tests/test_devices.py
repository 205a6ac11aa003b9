"""The device of every command: one meaning, told in one line where it is not there."""

import pytest
import torch
from click.testing import CliRunner

from mpoe_convert import Recipe, convert, evaluate
from mpoe_convert.cli import main
from mpoe_convert.devices import check_device, pick_device
from mpoe_convert.errors import RequestError

MISSING = f"cuda:{torch.cuda.device_count()}"
TOLD = {
    "banana": "{} is 'banana'; expected auto, cpu, cuda, cuda:N or mps",
    MISSING: f"{{}}{{}}{MISSING}{{}} is not available here; {{}}{{}}auto{{}} picks one that is",
}


def told(name: str, option: str, before: str = "", after: str = "") -> str:
    """The message, with the option's name and what stands around its values."""
    return TOLD[name].format(*(option, before, after) * 2)


@pytest.mark.parametrize("name", TOLD)
def test_what_is_no_device_here(name):
    with pytest.raises(RequestError) as caught:
        pick_device(name)
    check_device("auto"), check_device("cpu")
    assert str(caught.value) == told(name, "device", "='", "'")


def test_auto_is_cuda_or_the_cpu():
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", TOLD)
def test_every_command_tells_it_in_one_line(name, tmp_path, tiny_gpt2):
    text = tmp_path / "text.txt"
    text.write_text("w3 w4 w5 w6")
    commands = {
        "convert": [str(tiny_gpt2), "-o", str(tmp_path / "out")],
        "plan": ["plan", str(tiny_gpt2)],
        "evaluate": ["evaluate", str(tiny_gpt2), "--data", str(text)],
    }
    for command, arguments in commands.items():
        done = CliRunner().invoke(main, [*arguments, "--device", name])
        assert (done.exit_code, done.stderr) == (2, f"Error: {told(name, '--device', ' ')}\n"), command


def test_from_python_too(tmp_path, tiny_gpt2):
    with pytest.raises(RequestError, match="banana"):
        evaluate(str(tiny_gpt2), "text.txt", device="banana")
    with pytest.raises(RequestError, match="not available here"):
        convert(Recipe(str(tiny_gpt2), device=MISSING), tmp_path / "out")
