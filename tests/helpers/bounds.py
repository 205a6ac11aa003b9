"""The lower bounds that pyproject.toml declares: `python tests/helpers/bounds.py` prints them for pip."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement

PROJECT = Path(__file__).parents[2] / "pyproject.toml"
# Not tried in CI: wheels of gigabytes, and extras that no quick test needs. The bound of torch is that of the
# newest transformers; it and those of onnx were tried by hand.
BY_HAND = ("torch", "onnx", "onnxruntime", "onnxscript")
EXTRAS = ("calibrate", "report", "train")


def declared() -> dict[str, str]:
    """Distribution -> lower bound, of what users install, and of peft.

    Raises:
        ValueError: a dependency has none, or two extras differ.
    """
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *(line for extra in ("onnx", *EXTRAS) for line in extras[extra])]
    lines += [line for line in extras["test"] if line.startswith("peft")]
    found: dict[str, str] = {}
    for line in lines:
        requirement = Requirement(line)
        bounds = [each.version for each in requirement.specifier if each.operator == ">="]
        if len(bounds) != 1 or found.setdefault(requirement.name, bounds[0]) != bounds[0]:
            raise ValueError(f"{line}: expected one lower bound, the same in every extra")
    return found


def tried() -> dict[str, str]:
    """The bounds that CI installs and tests."""
    return {name: bound for name, bound in declared().items() if name not in BY_HAND}


if __name__ == "__main__":
    print("\n".join(f"{name}=={bound}" for name, bound in tried().items()))
