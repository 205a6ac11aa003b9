"""Build `modeling_mpoe.py` from its parts.

    python -m mpoe_convert.runtime.build           write it
    python -m mpoe_convert.runtime.build --check   exit with 1 if it is not what its parts make

A part is a module of this folder: a docstring whose first line is the section's title, imports, and a body.
The built file has the docstring of `header.py` with a table of contents, all imports once, and the parts'
bodies unchanged, each under a banner made of the part's docstring. Imports from other parts fall away.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable
from dataclasses import dataclass

from . import MODELING_PATH

FOLDER = MODELING_PATH.parent
# From the bottom up: a part uses what stands above it in the built file.
PARTS = ("header", "config", "chains", "parts", "routers", "passes", "mixture", "model")
RULER = "# " + "-" * 99


class BuildError(Exception):
    """The parts make no file."""


@dataclass(frozen=True)
class Source:
    """A part, read.

    Attributes:
        name: "chains".
        licence: the comment above the docstring, if there is one.
        docstring: as written, without quotes.
        imports: from outside of the runtime.
        relative: imports from other parts that are needed when it is imported: {part: names}.
        body: everything behind the imports, unchanged.
        defines: names that the body binds at its top level.
    """

    name: str
    licence: str
    docstring: str
    imports: tuple[ast.Import | ast.ImportFrom, ...]
    relative: dict[str, tuple[str, ...]]
    body: str
    defines: frozenset[str]

    @property
    def title(self) -> str:
        return self.docstring.partition("\n")[0].rstrip(".")


def read_part(name: str) -> Source:
    """Raises BuildError if the module is more than a docstring, imports and a body."""
    text = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    tree = ast.parse(text)
    docstring = ast.get_docstring(tree, clean=False)
    if docstring is None:
        raise BuildError(f"{name}.py has no docstring; expected one, whose first line is a title")
    end, imports, relative, statements = tree.body[0].end_lineno, [], {}, tree.body[1:]
    while statements and (_is_import(statements[0]) or _is_for_types(statements[0])):
        statement = statements.pop(0)
        end = statement.end_lineno
        if isinstance(statement, ast.ImportFrom) and statement.level:
            relative[statement.module] = tuple(alias.name for alias in statement.names)
        elif _is_import(statement):
            imports.append(statement)
    for node in (node for statement in statements for node in ast.walk(statement)):
        if isinstance(node, ast.ImportFrom) and node.level:
            raise BuildError(f"{name}.py:{node.lineno} imports a part in its body; expected that at its top")
    lines = text.splitlines()
    return Source(
        name=name,
        licence="\n".join(lines[: tree.body[0].lineno - 1]),
        docstring=docstring,
        imports=tuple(imports),
        relative=relative,
        body="\n".join(lines[end:]).strip("\n"),
        defines=frozenset(_bound(statements)),
    )


def _is_import(statement: ast.stmt) -> bool:
    return isinstance(statement, (ast.Import, ast.ImportFrom))


def _is_for_types(statement: ast.stmt) -> bool:
    """Whether it is `if TYPE_CHECKING:`, of which nothing remains."""
    return isinstance(statement, ast.If) and ast.unparse(statement.test) == "TYPE_CHECKING"


def _bound(statements: Iterable[ast.stmt]) -> Iterable[str]:
    """Names that statements bind in their own scope."""
    for statement in statements:
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            yield statement.name
        elif _is_import(statement):
            yield from (alias.asname or alias.name for alias in statement.names)
        elif isinstance(statement, ast.Try):
            yield from _bound(statement.body)
        elif isinstance(statement, (ast.Assign, ast.AnnAssign)):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            yield from (target.id for target in targets if isinstance(target, ast.Name))


def check_parts(parts: list[Source]) -> None:
    """Raises BuildError if a part uses one below it, a name that is not there, or one that another binds."""
    above: dict[str, Source] = {}
    owner: dict[str, str] = {}
    for part in parts:
        for module, names in part.relative.items():
            if module not in above:
                raise BuildError(f"{part.name}.py imports {module}, which is not above it in {PARTS}")
            if missing := set(names) - above[module].defines:
                raise BuildError(
                    f"{part.name}.py imports {sorted(missing)}, which {module}.py does not define"
                )
        if twice := sorted(part.defines & owner.keys()):
            raise BuildError(f"{part.name}.py defines {twice}, as {owner[twice[0]]}.py does; rename one")
        above[part.name] = part
        owner |= dict.fromkeys(part.defines, part.name)


def _render_imports(imports: Iterable[ast.Import | ast.ImportFrom]) -> str:
    """All of them once, in ruff's order: the standard library, then the rest; modules, then names."""
    modules: set[tuple[str, str | None]] = set()
    names: dict[str, set[str]] = {}
    for node in imports:
        if isinstance(node, ast.Import):
            modules |= {(alias.name, alias.asname) for alias in node.names}
        else:
            names.setdefault(node.module or "", set()).update(alias.name for alias in node.names)
    names.get("typing", set()).discard("TYPE_CHECKING")
    sections = []
    for is_standard in (True, False):
        lines = [
            f"import {module} as {alias}" if alias else f"import {module}"
            for module, alias in sorted(modules, key=lambda pair: pair[0])
            if (module.split(".")[0] in sys.stdlib_module_names) == is_standard
        ]
        lines += [
            f"from {module} import {', '.join(sorted(found, key=_import_order))}"
            for module, found in sorted(names.items())
            if found and (module.split(".")[0] in sys.stdlib_module_names) == is_standard
        ]
        sections.append("\n".join(lines))
    return "\n\n".join(section for section in sections if section)


def _import_order(name: str) -> tuple[int, str]:
    """CONSTANTS, Classes, functions."""
    kind = 0 if name.isupper() and len(name) > 1 else 1 if name[:1].isupper() else 2
    return kind, name.lower() if kind == 1 else name


def _banner(number: int, part: Source) -> str:
    """A ruler, the section's number and title, and what else the docstring says, as a comment."""
    _, _, more = part.docstring.partition("\n")
    lines = [f"{number}. {part.title}", *(more.rstrip().split("\n") if more.strip() else [])]
    return "\n".join([RULER, *(f"# {line}".rstrip() for line in lines)])


def build() -> str:
    """The text of `modeling_mpoe.py`. Raises BuildError."""
    header, *parts = found = [read_part(name) for name in PARTS]
    check_parts(found)
    contents = "\n".join(f"    {number}. {part.title}" for number, part in enumerate(parts, 1))
    docstring = header.docstring.replace("{contents}", contents)
    imports = _render_imports(node for part in found for node in part.imports)
    sections = [f"{_banner(number, part)}\n\n\n{part.body}" for number, part in enumerate(parts, 1)]
    return (
        f'{header.licence}\n"""{docstring}"""\n\n{imports}\n\n{header.body}\n\n\n'
        + "\n\n\n".join(sections)
        + "\n"
    )


def main(arguments: list[str]) -> int:
    """See the module."""
    text = build()
    is_same = MODELING_PATH.exists() and MODELING_PATH.read_text(encoding="utf-8") == text
    if arguments == ["--check"]:
        print(f"{MODELING_PATH.name} is {'what' if is_same else 'not what'} its parts make", file=sys.stderr)
        return int(not is_same)
    MODELING_PATH.write_text(text, encoding="utf-8")
    print(f"{MODELING_PATH.name}: {len(text.splitlines())} lines, {'as before' if is_same else 'changed'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
