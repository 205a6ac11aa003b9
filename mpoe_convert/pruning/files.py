"""The files beside the weights of an artifact with fewer experts: config, reports, card."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from ..artifact.fingerprint import weights_of
from ..artifact.layout import (
    CARD_FILE,
    EVALUATION_REPORT_FILE,
    RECIPE_FILE,
    REPORT_FILE,
    TRAINING_REPORT_FILE,
    file_names,
    is_weights,
    listed_files,
    move_base_path,
    read_artifact,
)
from ..artifact.pictures import FOLDER as PICTURES
from ..artifact.reader import Artifact
from ..planning.fewer_experts import FewerExperts
from ..source.json_files import read_json_object, write_json
from .card import describe
from .forms import small_forms
from .report import Smaller

# Of a training report, what was measured on the weights with all experts.
_MEASURED = ("evaluation", "change")
# Begins the line of a recipe that tells what came after the conversion.
_SINCE = "# without what prune did to its artifact since, which has left"


def small_config(
    source: Artifact, kept: Mapping[str, Sequence[int]], experts: int, base: Mapping[str, Any]
) -> dict[str, Any]:
    """config.json with so many experts.

    Args:
        kept: by the paths of layers, the routed ones that stay.
        experts: how many these are.
        base: that of the source's model with them.
    """
    config = deepcopy(source.checkpoint.config)
    block = config["mpoe"]
    block |= {"num_experts": experts, "top_k": min(block["top_k"], experts)}
    block |= small_forms(block, kept, experts, source.shared_range)
    return config | {key: value for key, value in base.items() if value != source.config.get(key)}


def copy_companions(companions: Path, folder: Path) -> None:
    """Copy what belongs to an artifact beside its weights, but pictures and evaluations of them."""
    for name in listed_files(read_artifact(companions)[1]):
        is_measured = name == EVALUATION_REPORT_FILE or name.startswith(f"{PICTURES}/")
        if not (is_measured or is_weights(name)) and (companions / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(companions / name, folder / name)


def write_reports(folder: Path, output: Path, companions: Path, smaller: Smaller) -> None:
    """Write what was done into the reports and the card that were copied."""
    move_base_path(folder, companions, output)
    if (folder / TRAINING_REPORT_FILE).is_file():
        training = read_json_object(folder / TRAINING_REPORT_FILE, "a training report", remedy="train again")
        write_json(folder / TRAINING_REPORT_FILE, training | dict.fromkeys(_MEASURED) | weights_of(folder))
    describe(folder / CARD_FILE, smaller)
    _note_in_recipe(folder / RECIPE_FILE, smaller.experts)
    _, report = read_artifact(folder)
    recipe = report["recipe"]
    recipe |= {"experts": smaller.experts, "top_k": min(recipe["top_k"], smaller.experts)}
    report["pruning"] = [*report.get("pruning", ()), smaller.to_json()]
    if "fewer_experts" in report:  # of a mixture
        report["fewer_experts"] = _fewer(report["fewer_experts"], smaller)
    write_json(folder / REPORT_FILE, report | {"files": file_names(folder)})


def _note_in_recipe(path: Path, experts: int) -> None:
    """Say in the recipe, which repeats the conversion, how many experts are left since."""
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        lines = [line for line in lines if not line.startswith(_SINCE)]
        start = sum(line.startswith("#") for line in lines)
        lines.insert(start, f"{_SINCE} {experts} experts per mixture: see {REPORT_FILE}\n")
        path.write_text("".join(lines), encoding="utf-8")


def _fewer(before: Mapping[str, Any] | None, smaller: Smaller) -> dict[str, Any]:
    """The experts that are left of those of a mixture, by the numbers that they have in the source."""
    count = before["source_experts"] if before else smaller.experts_before
    numbers = {layer["path"]: layer["kept"] for layer in before["layers"]} if before else {}
    layers = tuple(layer.renumbered(numbers.get(layer.path, range(count)), count) for layer in smaller.layers)
    return FewerExperts(count, layers).to_json()
