"""README.md is true: its generated parts are current, its commands and snippets run."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from readme import README, with_generated_parts

ROOT = README.parent
# Section, language and code, in their order: blocks marked bash or python are run, others are not.
BLOCKS = [
    (section.partition("\n")[0], language, code)
    for section in README.read_text(encoding="utf-8").split("\n## ")
    for language, code in re.findall(r"^```(bash|python)\n(.*?)^```$", section, re.M | re.S)
]


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


def test_blocks_run(tmp_path):
    """In a copy of the examples, with the commands of this interpreter's environment first."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns("out*"))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    session: dict[str, str] = {}  # the Python blocks of a section are one session
    for section, language, code in BLOCKS:
        if language == "python":
            code = session[section] = session.get(section, "") + code
            command = [sys.executable, "-c", code]
        else:
            command = ["bash", "-euo", "pipefail", "-c", code]
        done = subprocess.run(
            command, cwd=tmp_path, env=os.environ | {"PATH": path}, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{section}:\n{code}\n{done.stderr[-2000:]}"


def test_nothing_is_left_to_fill_in():
    text = README.read_text(encoding="utf-8")
    assert "@@" not in text and "TO" + "DO" not in text


def test_there_are_blocks_to_run():
    assert sum(language == "bash" for _, language, _ in BLOCKS) >= 4
    assert sum(language == "python" for _, language, _ in BLOCKS) >= 2
