"""The import graph of the package: every module imports only from those below it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mpoe_convert"
# From the top down; see the modules' own first lines for what each is.
ORDER = [
    *(
        "__main__",
        "cli",
        "render",
        "exporting",
        "averaging",
        "exports.onnx",
        "exports.lora",
        "exports.moe",
        "exports.dense",
        "exports",
        "moe_targets",
        "finetuning",
        "evaluation",
        "runs",
        "training",
        "recording",
        "conversion",
        "compression",
        "budget",
        "sensitivity",
        "divergence",
        "correction",
        "calibration",
        "allocation",
        "loading",
        "corpus",
        "converted",
        "building",
        "neurons",
        "moments",
        "verification",
        "publishing",
        "destination",
        "pictures",
        "summary",
        "card",
        "snippets",
        "report",
        "artifact",
        "routing",
    ),
    *(
        "planning",
        "alternating",
        "factoring",
        "experts.adapter",
        "experts.dense",
        "experts.low_rank",
        "experts.mpo",
        "mpo",
        "recipe",
        "experts",
        "families",
        "stock",
    ),
    *(
        "checkpoint",
        "source_code",
        "architecture",
        "torch_bin",
        "hub",
        "hub_errors",
        "weight_files",
        "safetensors_header",
    ),
    *(
        "sites",
        "libraries",
        "runtime.modeling_mpoe",
        "runtime.build",
        "runtime.rules",
        "runtime",
        "verify_child",
    ),
    "errors",
]


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imported(path: Path) -> set[str]:
    """Modules of the package that a file imports anywhere, by their names in ORDER."""
    depth = len(path.relative_to(PACKAGE).parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level == 0 and module.split(".")[0] == "mpoe_convert":
                module = module.removeprefix("mpoe_convert").lstrip(".")
            elif node.level == 0:
                continue
            elif node.level < depth:
                module = f"{path.parent.name}.{module}".rstrip(".")
            found |= {module} if module else {alias.name for alias in node.names}
    return found


# The parts of `modeling_mpoe.py` are not imported; `runtime.build` holds their order.
MODULES = {
    module_name(path): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if PACKAGE / "runtime" not in path.parents or path.stem in ("__init__", "build", "modeling_mpoe")
}


def test_every_module_has_its_place():
    assert set(MODULES) - {""} == set(ORDER)


def test_imports_are_found():
    assert {"artifact", "planning", "building", "mpo"} <= imported(MODULES["conversion"])


@pytest.mark.parametrize("name", ORDER)
def test_imports_point_down(name):
    below = set(ORDER[ORDER.index(name) + 1 :]) | {"__version__"}
    assert imported(MODULES[name]) <= below


@pytest.mark.parametrize(("library", "only"), [("click", {"cli"}), ("rich", {"render"})])
def test_libraries_that_have_one_home(library, only):
    users = {
        name for name, path in MODULES.items() if f"import {library}" in path.read_text(encoding="utf-8")
    } | {name for name, path in MODULES.items() if f"from {library}" in path.read_text(encoding="utf-8")}
    assert users == only


def test_import_of_the_package_is_light():
    code = "import sys, mpoe_convert.cli; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
