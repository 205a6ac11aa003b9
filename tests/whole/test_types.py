"""Type checkers see the package's types: wrong names of options are errors, correct calls are none."""

import json
import re
import subprocess
import sys
import tomllib
from importlib.resources import files
from pathlib import Path

import pytest

from mpoe_convert import Export, Finetuning, Recipe
from mpoe_convert.options import by_name, default_of

ROOT = Path(__file__).parents[2]
GOOD = """
from pathlib import Path
from mpoe_convert import Export, Finetuning, Recipe, convert, evaluate, export, finetune, plan, verify

recipe = Recipe("gpt2", experts=3, bond_dim=[3, 4], include="h.*", calibrate=Path("t.txt"), keep=1)
share: float | None = recipe.keep
patterns: tuple[str, ...] = recipe.include
model: str = Recipe(Path("model"), exclude=("h.1", "h.2")).model
convert(recipe, Path("out"))
convert("gpt2", "out")
plan(Path("model"))
export("out", "dense", "dense")
export(Path("out"), "moe", Export("moe", check=False))
finetune(Finetuning("out", ["a.txt", Path("b.txt")], teacher=Path("gpt2")), "tuned")
evaluate("out", Path("t.txt"), length=16)
verify("out", against=Path("gpt2"), tolerance=0)
"""
BAD = """
from mpoe_convert import Export, Finetuning, Recipe, convert

Recipe("x", expert=3)
Recipe("x", experts="3")
Recipe("x", include=3)
Recipe()
Finetuning("m", "t.txt", step=3)
Finetuning("m")
Export("dense", experts=1)
convert(3, "out")
"""
# Libraries that the checkers need not read: what is checked is this package's.
LIBRARIES = "torch.*,transformers.*,datasets.*,numpy.*,accelerate.*,huggingface_hub.*,rich.*,matplotlib.*"
MYPY = f"""
[mypy]
mypy_path = {ROOT}
[mypy-{LIBRARIES}]
follow_imports = skip
ignore_missing_imports = true
[mypy-mpoe_convert.*]
ignore_errors = true
"""


def every_option() -> str:
    """Calls that give every option its default."""
    lines = []
    for request, needed in ((Recipe, '"x"'), (Finetuning, '"x", "y"'), (Export, "")):
        given = [f"{name}={default_of(each)!r}" for name, each in by_name(request).items() if each.kw_only]
        lines.append(f"{request.__name__}({', '.join(filter(None, [needed, *given]))})")
    return "\n".join(lines) + "\n"


def by_mypy(folder: Path) -> set[tuple[str, int]]:
    (folder / "mypy.ini").write_text(MYPY)
    names = sorted(path.name for path in folder.glob("*.py"))
    command = ["mypy", "--config-file", "mypy.ini", "--cache-dir", "cache", "--no-error-summary", *names]
    told = run(command, folder)
    return {(name, int(line)) for name, line in re.findall(r"^(\w+\.py):(\d+): error", told, re.MULTILINE)}


def by_pyright(folder: Path) -> set[tuple[str, int]]:
    settings = {"extraPaths": [str(ROOT)], "typeCheckingMode": "standard", "reportMissingImports": "none"}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    found = json.loads(run(["basedpyright", "--outputjson"], folder))["generalDiagnostics"]
    errors = [each for each in found if each["severity"] == "error"]
    return {(Path(each["file"]).name, each["range"]["start"]["line"] + 1) for each in errors}


def run(command: list[str], folder: Path) -> str:
    return subprocess.run([sys.executable, "-m", *command], cwd=folder, capture_output=True, text=True).stdout


@pytest.mark.parametrize(("checker", "check"), [("mypy", by_mypy), ("basedpyright", by_pyright)])
def test_wrong_calls_are_type_errors_and_correct_ones_none(checker, check, tmp_path):
    pytest.importorskip(checker)
    (tmp_path / "good.py").write_text(GOOD + every_option())
    (tmp_path / "bad.py").write_text(BAD)
    wrong = {("bad.py", number) for number, line in enumerate(BAD.splitlines(), 1) if number > 3}
    assert check(tmp_path) == wrong


def test_the_package_says_that_it_is_typed():
    """Also as it is installed in CI, from a wheel."""
    assert (files("mpoe_convert") / "py.typed").is_file()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "py.typed" in project["tool"]["setuptools"]["package-data"]["mpoe_convert"]
