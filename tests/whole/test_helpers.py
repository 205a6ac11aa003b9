"""Helpers that stand between the tests and what they test change nothing of it."""

import sys
import traceback
from pathlib import Path

from helpers.remote_code import read_once
from transformers import dynamic_module_utils as utils

CODE = "import json\n\ndef fail():\n    raise ValueError({text!r})\n"


def error_of(folder: Path, text: str) -> tuple[str, str]:
    """(file of the traceback, message) of a file of that folder, loaded as code beside a model is."""
    folder.mkdir(exist_ok=True)
    path = folder / "code_of_errors.py"
    path.write_text(CODE.format(text=text))
    function = utils.get_class_from_dynamic_module("code_of_errors.fail", str(folder))
    try:
        function()
    except ValueError as error:
        return traceback.extract_tb(error.__traceback__)[-1].filename, str(error)
    raise AssertionError("it did not fail")


def test_code_beside_models_that_is_read_once_is_the_code_of_each(tmp_path):
    """The same content has a path of its own in each folder; other content is other code."""
    with read_once():
        found = [error_of(tmp_path / name, text) for name, text in zip("abb", ["x", "x", "y"], strict=True)]
    files, messages = zip(*found, strict=True)
    assert messages == ("x", "x", "y")
    modules = {sys.modules[name].__file__ for name in sys.modules if name.endswith(".code_of_errors")}
    assert len({*files}) == 3 and {*files} <= modules


def test_imports_of_code_that_is_read_once_are_those_of_its_content(tmp_path):
    path, stock = tmp_path / "code.py", utils.get_imports
    with read_once():
        found = []
        for text in ("import json", "import re, json", "import json"):
            path.write_text(text)
            found.append(utils.get_imports(path))
            found[-1].append("changed by who asked")
    assert found == [[*names, "changed by who asked"] for names in (["json"], ["json", "re"], ["json"])]
    assert utils.get_imports is stock
