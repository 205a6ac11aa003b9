"""README.md is true: its generated parts are current, its commands and snippets run."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from readme import README, with_generated_parts

ROOT = README.parent
# In their order: ```bash and ```python blocks are run, ``` blocks without a name are not.
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```$", README.read_text(encoding="utf-8"), re.M | re.S)


def test_generated_parts_are_current():
    text = README.read_text(encoding="utf-8")
    assert with_generated_parts(text) == text, "run python tests/readme.py"


def test_every_command_is_documented():
    from mpoe_convert.cli import main

    text = README.read_text(encoding="utf-8")
    for command in set(main.commands) - {"convert"}:
        assert re.search(rf"mpoe-convert {command}\b|`{command}\b", text), command


def test_report_keys_are_documented(tiny_gpt2, tmp_path):
    from mpoe_convert import Recipe, convert

    report = convert(Recipe(str(tiny_gpt2), experts=2, bond_dim=4), tmp_path / "out").to_json()
    text = README.read_text(encoding="utf-8")
    keys = {*report, *report["totals"], *report["matrices"][0], "files"} - {"format", "ffn"}
    assert not [key for key in keys if f"`{key}`" not in text]


@pytest.fixture(scope="module")
def playground(tmp_path_factory):
    """A copy of the examples, with the commands of this interpreter's environment first."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(ROOT / "examples", folder / "examples", ignore=shutil.ignore_patterns("out*"))
    return folder


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_block_runs(number, playground):
    kind, code = BLOCKS[number]
    command = ["bash", "-euo", "pipefail", "-c", code] if kind == "bash" else [sys.executable, "-c", code]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command, cwd=playground, env=os.environ | {"PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_nothing_is_left_to_fill_in():
    text = README.read_text(encoding="utf-8")
    assert "@@" not in text and "TO" + "DO" not in text


def test_there_are_blocks_to_run():
    assert sum(kind == "bash" for kind, _ in BLOCKS) >= 4
    assert sum(kind == "python" for kind, _ in BLOCKS) >= 2
