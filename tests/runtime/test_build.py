"""`modeling_mpoe.py` is what its parts make, and needs torch and transformers only."""

import ast
import shutil
import sys
from itertools import pairwise

import pytest
import torch
from helpers.modules import load_module
from transformers.dynamic_module_utils import get_imports, get_relative_imports

from mpoe_convert.runtime import MODELING_PATH, build


def test_the_committed_file_is_built_from_its_parts():
    assert MODELING_PATH.read_text(encoding="utf-8") == build.build(), (
        "run python -m mpoe_convert.runtime.build"
    )


def test_check_fails_on_an_edited_file(tmp_path, monkeypatch, capsys):
    edited = tmp_path / "modeling_mpoe.py"
    edited.write_text(build.build() + "x = 1\n")
    monkeypatch.setattr(build, "MODELING_PATH", edited)
    assert build.main(["--check"]) == 1 and "not what its parts make" in capsys.readouterr().err
    assert build.main([]) == 0 and build.main(["--check"]) == 0


def test_it_needs_torch_and_transformers_only():
    """As transformers sees it, which looks for the imports of remote code."""
    outside = {name for name in get_imports(MODELING_PATH) if name not in sys.stdlib_module_names}
    assert outside == {"torch", "transformers"} and not get_relative_imports(MODELING_PATH)


def test_everything_of_a_part_is_in_the_built_file_once():
    found = ast.parse(MODELING_PATH.read_text(encoding="utf-8")).body
    names = [node.name for node in found if isinstance(node, (ast.ClassDef, ast.FunctionDef))]
    assert len(set(names)) == len(names)
    parts = [build.read_part(name) for name in build.part_names()]
    assert set(names) == {name for part in parts for name in part.defines} & set(names)
    lines = MODELING_PATH.read_text(encoding="utf-8").splitlines()
    starts = [lines.index(f"# {number}. {part.title}") for number, part in enumerate(parts[1:], 1)]
    assert all(one < other for one, other in pairwise(starts))


BODIES = {
    "no docstring": ("x = 1\n", "has no docstring"),
    "an import in the body": (
        '"""B."""\n\nx = 1\nfrom .config import OPTIONS\n',
        "imports a part in its body",
    ),
    "a part below": ('"""B."""\n\nfrom .model import subclass\n', "imports model, which is not above it"),
    "an unknown name": (
        '"""B."""\n\nfrom .config import NOTHING\n',
        r"imports \['NOTHING'\], which config does not define",
    ),
    "another name": ('"""B."""\n\nfrom .config import OPTIONS as O\n', r"renames \['OPTIONS'\]"),
    "a name that is taken": ('"""B."""\n\nOPTIONS = {}\n', r"defines \['OPTIONS'\], as config does"),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A copy of the parts, from which is built."""
    for name in build.part_names():
        path = f"{name.replace('.', '/')}.py"
        (tmp_path / path).parent.mkdir(exist_ok=True)
        shutil.copyfile(build.FOLDER / path, tmp_path / path)
    monkeypatch.setattr(build, "FOLDER", tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", BODIES)
def test_parts_that_do_not_fit_are_named(name, folder):
    text, message = BODIES[name]
    (folder / "chains.py").write_text(text)
    with pytest.raises(build.BuildError, match=message):
        build.build()


RULE = '''"""Rule first: every token goes to expert 0.

Of no use."""

import torch

from ..choices import Choices, rule


@rule
def first(router, logits, bias, context):
    """See above."""
    tokens = torch.arange(len(logits))
    return Choices(tokens, 0 * tokens, torch.ones(len(logits)), per_token=1)
'''


def test_a_rule_is_one_file(folder, tmp_path):
    (folder / "rules" / "first.py").write_text(RULE)
    text = build.build()
    assert "Rule first: every token goes to expert 0\n# \n".replace("# \n", "#\n# Of no use.") in text
    built = tmp_path / "built_with_a_rule.py"
    built.write_text(text)
    module = load_module(built)
    assert sorted(module.RULES) == ["expert-choice", "first", "top-any", "top-k", "top-p"]
    choices = module.Router(4, 3, 2, "first")(torch.zeros(5, 4)).choices
    assert choices.experts.tolist() == [0] * 5
