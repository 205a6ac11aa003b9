"""`modeling_mpoe.py` is what its parts make, and needs torch and transformers only."""

import ast
import sys
from itertools import pairwise

import pytest
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
    parts = [build.read_part(name) for name in build.PARTS]
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
        r"imports \['NOTHING'\], which config.py does not define",
    ),
    "a name that is taken": ('"""B."""\n\nOPTIONS = {}\n', r"defines \['OPTIONS'\], as config.py does"),
}


@pytest.mark.parametrize("name", BODIES)
def test_parts_that_do_not_fit_are_named(name, tmp_path, monkeypatch):
    text, message = BODIES[name]
    for part in build.PARTS:
        (tmp_path / f"{part}.py").write_bytes((build.FOLDER / f"{part}.py").read_bytes())
    (tmp_path / "chains.py").write_text(text)
    monkeypatch.setattr(build, "FOLDER", tmp_path)
    with pytest.raises(build.BuildError, match=message):
        build.build()
