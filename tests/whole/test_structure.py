"""The rooms of the package and the direction of their imports."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import mpoe_convert

PACKAGE = Path(__file__).parents[2] / "mpoe_convert"
# From the top down. A room imports only from the lines below its own; rooms on one line do not import each
# other.
LEVELS = (
    ("__main__",),
    ("cli",),
    ("training", "exports", "conversion", "pruning"),
    ("compression",),
    ("planning",),
    ("experts",),
    ("artifact", "decomposition"),
    ("source",),
    ("runtime",),
    ("ranks",),
    ("devices", "request"),
    ("tables", "tensors", "extras", "allocator"),
    ("options",),
    ("errors",),
)
LEVEL_OF = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py")) if module_name(path)}


def imported(name: str, *, annotations: bool = True) -> set[str]:
    """Modules of the package that a module imports anywhere, inside functions too.

    Args:
        annotations: also what is imported for type checkers alone.
    """
    path = MODULES[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if not annotations:
        tree.body = [node for node in tree.body if not _is_for_type_checkers(node)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            absolute = [alias.name for alias in node.names]
            found |= {each.partition(".")[2] for each in absolute if each.partition(".")[0] == "mpoe_convert"}
        if not isinstance(node, ast.ImportFrom):
            continue
        module = (node.module or "").split(".") if node.module else []
        if node.level:
            base = package[: len(package) - (node.level - 1)] + module
        elif module[0] == "mpoe_convert":
            base = module[1:]
        else:
            continue
        for alias in node.names:
            full = ".".join([*base, alias.name])
            found.add(full if full in MODULES else ".".join(base))
    return found - {"", name}


def _is_for_type_checkers(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def test_every_module_is_in_a_room():
    assert {name.partition(".")[0] for name in MODULES} == set(LEVEL_OF)


def test_imports_are_found():
    assert {"artifact.layout", "experts", "compression.prepare", "errors"} <= imported("conversion.convert")
    assert "runtime.shapes" in imported("decomposition.als")  # inside the package, by relative name


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name):
    room = name.partition(".")[0]
    others = {each for each in imported(name) if each.partition(".")[0] != room}
    assert not {each for each in others if LEVEL_OF[each.partition(".")[0]] <= LEVEL_OF[room]}


def test_parts_of_the_modelling_file_are_for_reading():
    """They are imported by each other only; what runs is the file that is built from them."""
    parts = {name for name in MODULES if name.startswith("runtime.")} - {
        "runtime.modeling_mpoe",
        "runtime.build",
        "runtime.shapes",
    }
    assert len(parts) > 5
    for name in set(MODULES) - parts:
        assert not imported(name) & parts, name


def test_no_circles_inside_rooms():
    """Packages count as their `__init__`, so that a module may import what the package's own file defines."""
    graph = {name: imported(name, annotations=False) for name in MODULES}
    assert list(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize(("library", "only"), [("click", {"cli"}), ("rich", {"cli", "tables"})])
def test_libraries_that_have_one_home(library, only):
    def uses(path: Path) -> bool:
        text = path.read_text(encoding="utf-8")
        return f"import {library}" in text or f"from {library}" in text

    assert {name.partition(".")[0] for name, path in MODULES.items() if uses(path)} == only


def test_import_of_the_package_is_light():
    code = "import sys, mpoe_convert.cli; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_type_checkers_see_the_public_names():
    """The imports for type checkers name what `__getattr__` finds, in the same modules."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    [block] = [node for node in tree.body if _is_for_type_checkers(node)]
    seen = {alias.asname: node.module for node in block.body for alias in node.names}
    assert seen == mpoe_convert._HOME


def test_benchmarks_import_what_is_there():
    """Few are run by tests: whoever measures next would find that a name has moved."""
    folder = PACKAGE.parent / "examples/benchmarks"
    trees = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in folder.glob("*.py")}
    for stem, tree in trees.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom) or node.module is None:
                continue
            names = {alias.name for alias in node.names}
            if node.module in trees:
                assert names <= _defined(trees[node.module]), (stem, node.module)
            elif node.module == "mpoe_convert":
                assert names <= {*mpoe_convert.__all__}, stem
            elif node.module.startswith("mpoe_convert."):
                inside = node.module.removeprefix("mpoe_convert.")
                found = _defined(ast.parse(MODULES[inside].read_text(encoding="utf-8")))
                assert all(name in found or f"{inside}.{name}" in MODULES for name in names), (stem, inside)


def _defined(tree: ast.Module) -> set[str]:
    """Names at the top level of a module, imported ones too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {(alias.asname or alias.name) for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found
