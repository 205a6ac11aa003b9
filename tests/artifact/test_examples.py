"""The examples in docstrings of functions that users call: they run as they stand."""

import inspect
import shutil
import textwrap

import pytest

import mpoe_convert


def example(function) -> str:
    """The code below "Example::" in a docstring."""
    _, found, code = inspect.getdoc(function).partition("Example::\n")
    assert found, f"{function.__name__} has no example"
    return textwrap.dedent(code)


@pytest.mark.parametrize("name", ["verify", "draw_pictures"])
def test_examples_run(name, artifact, tmp_path, monkeypatch, capsys):
    dense, out = artifact("gpt2")
    shutil.copytree(out, tmp_path / "out")
    shutil.copytree(dense, tmp_path / "path/to/dense")
    monkeypatch.chdir(tmp_path)
    function = getattr(mpoe_convert, name)
    exec(example(function), {name: function})
    assert name != "verify" or capsys.readouterr().out.endswith("True\n")


def test_the_example_of_push_names_its_arguments():
    """It needs a Hub, so it is bound to the signature and not run."""
    called = []

    class Result:
        url = "https://hub/commit"

    def push(*args, **options):
        called.append(inspect.signature(mpoe_convert.push).bind(*args, **options))
        return Result()

    exec(example(mpoe_convert.push), {"push": push, "print": lambda text: None})
    assert called[0].arguments["repo_id"].count("/") == 1
