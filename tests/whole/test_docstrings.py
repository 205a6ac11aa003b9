"""The examples in the docstrings of public functions run."""

import ast
import doctest
import inspect
import os
import shutil
from pathlib import Path

import pytest
from helpers.documents import ROOT

import mpoe_convert
from mpoe_convert import Recipe, convert

FUNCTIONS = [name for name in mpoe_convert.__all__ if inspect.isfunction(getattr(mpoe_convert, name))]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """What the examples start from: the demo model, an artifact of it, and a text."""
    folder = tmp_path_factory.mktemp("docstrings")
    shutil.copytree(ROOT / "examples" / "tiny-gpt2", folder / "examples" / "tiny-gpt2")
    convert(Recipe(str(folder / "examples" / "tiny-gpt2"), experts=2, bond_dim=8), folder / "out")
    (folder / "text.txt").write_text("Return True if both are equal. " * 200)
    return folder


@pytest.mark.parametrize("name", FUNCTIONS)
def test_examples_of_public_functions_run(name, place, tmp_path):
    function = getattr(mpoe_convert, name)
    [test] = doctest.DocTestFinder(recurse=False).find(function, name)
    assert test.examples, f"{name} has no example"
    test.globs = {public: getattr(mpoe_convert, public) for public in mpoe_convert.__all__}
    folder = shutil.copytree(place, tmp_path / "copy")
    before, told = os.getcwd(), []
    os.chdir(folder)
    try:
        doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=told.append)
    finally:
        os.chdir(before)
    assert not told, "".join(told)


def test_functions_that_are_tested_are_the_public_ones():
    assert {"convert", "plan", "verify", "finetune", "evaluate", "export", "freeze"} <= set(FUNCTIONS)


def test_the_example_of_push_names_its_arguments():
    """It needs a Hub, so it is bound to the signature and not run."""
    [test] = doctest.DocTestFinder(recurse=False).find(mpoe_convert.push, "push")
    call = ast.parse(test.examples[-1].source).body[0].value.value
    found = inspect.signature(mpoe_convert.push).bind(
        *map(ast.literal_eval, call.args),
        **{each.arg: ast.literal_eval(each.value) for each in call.keywords},
    )
    assert found.arguments["repo_id"].count("/") == 1
