"""Build `modeling_mpoe.py` from its parts.

    python -m mpoe_convert.runtime.build           write it
    python -m mpoe_convert.runtime.build --check   exit with 1 if it is not what its parts make

A part is a module of this folder: a docstring whose first line is the section's title, imports, and a body.
The built file has the docstring of `header.py` with a table of contents, all imports once, and the parts'
bodies unchanged, each under a banner made of the part's docstring. Imports from other parts fall away. Every
file of `rules/` is a part.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from . import MODELING_PATH

FOLDER = MODELING_PATH.parent
# From the bottom up: a part uses what stands above it in the built file.
BELOW_RULES = ("header", "config", "costs", "linears", "chains", "parts", "choices", "weights")
ABOVE_RULES = ("routers", "passes", "mixing", "mixture", "experts", "contrast", "model")
RULER = "# " + "-" * 99
Import = ast.Import | ast.ImportFrom


class BuildError(Exception):
    """The parts make no file."""


@dataclass(frozen=True)
class Part:
    """A part, read.

    Attributes:
        name: "chains" or "rules.top_k".
        licence: the comment above the docstring, if there is one.
        docstring: as written, without quotes.
        imports: from outside of the runtime.
        relative: what it takes from other parts: {part: names}.
        body: everything behind the imports, unchanged.
        defines: names that the body binds at its top level.
    """

    name: str
    licence: str
    docstring: str
    imports: tuple[Import, ...]
    relative: dict[str, tuple[str, ...]]
    body: str
    defines: frozenset[str]

    @property
    def title(self) -> str:
        return self.docstring.partition("\n")[0].rstrip(".")


def part_names() -> tuple[str, ...]:
    """All parts, in their order in the built file."""
    rules = sorted(path.stem for path in (FOLDER / "rules").glob("*.py") if path.stem != "__init__")
    return (*BELOW_RULES, *(f"rules.{name}" for name in rules), *ABOVE_RULES)


def read_part(name: str) -> Part:
    """Raises BuildError if the module is more than a docstring, imports and a body."""
    file = f"{name.replace('.', '/')}.py"
    text = (FOLDER / file).read_text(encoding="utf-8")
    tree = ast.parse(text)
    docstring = ast.get_docstring(tree, clean=False)
    if docstring is None:
        raise BuildError(f"{file} has no docstring; expected one, whose first line is a title")
    end, imports, relative, statements = tree.body[0].end_lineno, [], {}, tree.body[1:]
    while statements and (isinstance(statements[0], Import) or _is_for_types(statements[0])):
        statement = statements.pop(0)
        end = statement.end_lineno
        if isinstance(statement, ast.ImportFrom) and statement.level:
            above = name.split(".")[: -statement.level]
            wanted = ".".join([*above, statement.module or ""])
            relative[wanted] = tuple(alias.name for alias in statement.names)
            if renamed := [alias.name for alias in statement.names if alias.asname]:
                raise BuildError(f"{file} renames {renamed}; in the built file they have one name")
        elif isinstance(statement, Import):
            imports.append(statement)
    for node in (node for statement in statements for node in ast.walk(statement)):
        if isinstance(node, ast.ImportFrom) and node.level:
            raise BuildError(f"{file}:{node.lineno} imports a part in its body; expected that at its top")
    lines = text.splitlines()
    return Part(
        name=name,
        licence="\n".join(lines[: tree.body[0].lineno - 1]),
        docstring=docstring,
        imports=tuple(imports),
        relative=relative,
        body="\n".join(lines[end:]).strip("\n"),
        defines=frozenset(_bound(statements)),
    )


def _is_for_types(statement: ast.stmt) -> bool:
    """Whether it is `if TYPE_CHECKING:`, of which nothing remains."""
    return isinstance(statement, ast.If) and ast.unparse(statement.test) == "TYPE_CHECKING"


def _bound(statements: Iterable[ast.stmt]) -> Iterable[str]:
    """Names that statements bind in their own scope."""
    for statement in statements:
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            yield statement.name
        elif isinstance(statement, Import):
            yield from (alias.asname or alias.name for alias in statement.names)
        elif isinstance(statement, ast.Try):
            yield from _bound(statement.body)
        elif isinstance(statement, (ast.Assign, ast.AnnAssign)):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            yield from (target.id for target in targets if isinstance(target, ast.Name))


def check_parts(parts: Iterable[Part]) -> None:
    """Raises BuildError if a part uses one below it or an unknown name, or binds a name that is taken."""
    above: dict[str, Part] = {}
    owner: dict[str, str] = {}
    for part in parts:
        for name, wanted in part.relative.items():
            if name not in above:
                raise BuildError(f"{part.name} imports {name}, which is not above it: {', '.join(above)}")
            if missing := sorted(set(wanted) - above[name].defines):
                raise BuildError(f"{part.name} imports {missing}, which {name} does not define")
        if taken := sorted(part.defines & owner.keys()):
            raise BuildError(f"{part.name} defines {taken}, as {owner[taken[0]]} does; rename one")
        above[part.name] = part
        owner |= dict.fromkeys(part.defines, part.name)


def _render_imports(parts: Sequence[Part]) -> str:
    """Those of all parts once, in ruff's order: the standard library, then the rest; modules, then names."""
    modules: set[str] = set()
    names: dict[str, set[str]] = {}
    for node in (node for part in parts for node in part.imports):
        if isinstance(node, ast.Import):
            modules |= {ast.unparse(alias) for alias in node.names}
        else:
            names.setdefault(str(node.module), set()).update(alias.name for alias in node.names)
    if not any("TYPE_CHECKING" in part.body for part in parts):  # `if TYPE_CHECKING:` at the top falls away
        names.get("typing", set()).discard("TYPE_CHECKING")
    lines = [f"import {module}" for module in sorted(modules)]
    for module, found in sorted(names.items()):
        lines += [f"from {module} import {', '.join(sorted(found, key=_import_order))}"] if found else []
    sections: tuple[list[str], list[str]] = ([], [])
    for line in lines:
        sections[line.split()[1].split(".")[0] not in sys.stdlib_module_names].append(line)
    return "\n\n".join("\n".join(section) for section in sections)


def _import_order(name: str) -> tuple[int, str]:
    """CONSTANTS, Classes, functions."""
    kind = 0 if name.isupper() else 1 if name[0].isupper() else 2
    return kind, name.lower() if kind == 1 else name


def _banner(number: int, part: Part) -> str:
    """A ruler, the section's number and title, and what else the docstring says, as a comment."""
    more = part.docstring.partition("\n")[2].rstrip()
    lines = [f"{number}. {part.title}", *(more.split("\n") if more else [])]
    return "\n".join([RULER, *(f"# {line}".rstrip() for line in lines)])


def build() -> str:
    """The text of `modeling_mpoe.py`. Raises BuildError."""
    found = [read_part(name) for name in part_names()]
    check_parts(found)
    header, *parts = found
    contents = "\n".join(f"    {number}. {part.title}" for number, part in enumerate(parts, 1))
    docstring = header.docstring.replace("{contents}", contents)
    imports = _render_imports(found)
    head = f'{header.licence}\n"""{docstring}"""\n\n{imports}\n\n{header.body}'
    sections = [f"{_banner(number, part)}\n\n\n{part.body}" for number, part in enumerate(parts, 1)]
    return "\n\n\n".join([head, *sections]) + "\n"


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
