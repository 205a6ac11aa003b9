"""Messages call options as the caller does: the source spells no flag out, except for the command line."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import mpoe_convert
from mpoe_convert.cli import main
from mpoe_convert.options import assigned, called, named_by_flags, switched, switched_off

PACKAGE = Path(mpoe_convert.__file__).parent
FLAGS = {
    flag
    for command in main.commands.values()
    for param in command.params
    for flag in (*param.opts, *param.secondary_opts)
    if flag.startswith("--")
}
# What is for the command line in every case: help of options, whole shell commands, this tool's own script.
OF_HELP = {"help", "default_text", "flag"}
COMMANDS = ("mpoe-convert ", "`finetune --")
OF_COMMANDS = {
    PACKAGE / "conversion/write.py",
    PACKAGE / "artifact/snippets.py",
    PACKAGE / "runtime/build.py",
}


def texts(tree: ast.AST) -> Iterator[str]:
    """Texts that are no docstrings, no help of an option, and no whole command."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        if isinstance(node, ast.keyword) and node.arg in OF_HELP:
            continue
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        yield from texts(node)


def spelled_out(path: Path) -> Iterator[tuple[str, str]]:
    name = path.relative_to(PACKAGE).as_posix()
    for text in texts(ast.parse(path.read_text(encoding="utf-8"))):
        flags = {*re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", text)} & FLAGS - {"--help"}
        if flags and not any(command in text for command in COMMANDS):
            yield name, text


def test_no_message_spells_a_flag_out():
    assert {"--bond-dim", "--no-check", "--option", "--overwrite", "--against"} <= FLAGS
    modules = {path for path in PACKAGE.rglob("*.py") if path.parent.name != "cli"} - OF_COMMANDS
    assert len(modules) > 100
    assert [found for path in modules for found in spelled_out(path)] == []


def test_the_walk_sees_messages_and_leaves_help_out(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    code = (
        '"""--seed"""\nraise E(f"{x} given; drop --revision")\noption(help="see --seed")\nx = "no--seed --x"'
    )
    (tmp_path / "module.py").write_text(code, encoding="utf-8")
    assert [*spelled_out(tmp_path / "module.py")] == [("module.py", " given; drop --revision")]


def test_names_of_python_and_of_the_command_line():
    def names() -> tuple[str, ...]:
        return (
            called("bond_dim"),
            assigned("to", "dense", "moe"),
            switched("overwrite"),
            switched_off("check"),
        )

    assert names() == ("bond_dim", "to='dense' or 'moe'", "overwrite=True", "check=False")
    with named_by_flags():
        assert names() == ("--bond-dim", "--to dense or moe", "--overwrite", "--no-check")
