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


# ------------------------------------------------------------------------------------------------ paths

# Arguments of type `str` that name a file, a folder or a repository.
NAMES = {"source", "model", "output", "artifact", "against"}
# Attributes that are paths, or what a user typed for one.
ATTRIBUTES = {"folder", "parent", "source"}
# What writes texts and files rather than messages.
NO_MESSAGES = {"card.py", "pictures.py", "shapes.py", "build.py"}


def is_path(node: ast.expr, paths: set[str]) -> bool:
    """Whether an expression is a path, as far as its form says."""
    if isinstance(node, ast.Name):
        return node.id in paths
    if isinstance(node, ast.Attribute):
        return node.attr in ATTRIBUTES or (node.attr == "name" and is_path(node.value, paths))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
        return is_path(node.left, paths)
    if isinstance(node, ast.Call):
        return ast.unparse(node.func) in ("Path", "as_path") or (
            isinstance(node.func, ast.Attribute)
            and node.func.attr in ("readlink", "resolve", "with_name")
            and is_path(node.func.value, paths)
        )
    return False


def paths_of(function: ast.FunctionDef) -> set[str]:
    """Names of paths in a function: arguments by their types, and what is assigned."""
    found = set()
    for arg in [*function.args.args, *function.args.kwonlyargs]:
        kind = ast.unparse(arg.annotation) if arg.annotation else ""
        if re.search(r"\bPath\b(?!\])", kind) or (kind.startswith("str") and arg.arg in NAMES):
            found.add(arg.arg)
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and is_path(node.value, found):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found


def unquoted(tree: ast.AST) -> Iterator[str]:
    """Paths that stand in a text without quotes."""
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        paths = paths_of(function)
        for text in ast.walk(function):
            if not isinstance(text, ast.JoinedStr) or len(text.values) < 2:
                continue
            before = ""
            for part in text.values:
                if isinstance(part, ast.Constant):
                    before = part.value
                elif isinstance(part, ast.FormattedValue):
                    if (
                        part.conversion == -1
                        and is_path(part.value, paths)
                        and before[-1:] not in ("'", '"', "`")
                    ):
                        yield f"{function.name}: {before}{{{ast.unparse(part.value)}}}"
                    before = ""


def test_paths_in_messages_are_quoted():
    """A name with blanks cannot be told from the words around it."""
    modules = {path for path in PACKAGE.rglob("*.py") if path.parent.name not in ("cli", "runtime")}
    modules -= OF_COMMANDS
    read = [path for path in sorted(modules) if path.name not in NO_MESSAGES]
    assert len(read) > 100
    found = [
        (path.name, text) for path in read for text in unquoted(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert found == []


def test_the_walk_sees_paths():
    code = """
def check(path: Path, source: str, count: int, files: list[Path]):
    below = path / "x"
    raise E(f"{path} is bad: {below}, {self.folder}, {path.name}, {below / 'y'}, {source}, {Path(count)}!")
    raise E(f"'{path}', {source!r}, `{below}`, {count / 2}, {files}, {len(source)} stay")
"""
    paths = ("path", "below", "self.folder", "path.name", "below / 'y'", "source", "Path(count)")
    assert [text.partition("{")[2][:-1] for text in unquoted(ast.parse(code))] == list(paths)
