"""The weight files of a conversion: what is known of each that is finished, and runs that go on from them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .. import __version__
from ..artifact.fingerprint import sha256_of
from ..artifact.folder import DONE, RUN
from ..compression.prepare import Prepared
from ..errors import RecipeError
from ..options import assigned, called, switched
from ..planning.mixtures import MixturePlan
from ..planning.plan import Plan
from ..source.checkpoint import Checkpoint
from ..source.json_files import read_json_object, write_json
from .mixtures import StackReport
from .report import MatrixReport, NeuronOrder

# ---------------------------------------------------------------------------------------------------
# Records


class Records:
    """What is known of the finished weight files of a run, in a folder beside the artifact in work.

    Args:
        folder: of the artifact in work.
        hashed: records hold the files' hashes, so that another run can rely on them.
    """

    def __init__(self, folder: Path, hashed: bool):
        self.artifact, self.folder, self.hashed = folder, folder.parent / DONE, hashed

    def begin(self) -> None:
        """Make the folder."""
        self.folder.mkdir(exist_ok=True)

    def add(
        self,
        file: str,
        reports: Sequence[MatrixReport],
        orders: Sequence[NeuronOrder],
        rounding: Mapping[str, float],
    ) -> None:
        """Note that a weight file is finished, and what was measured while it was made."""
        path = self.artifact / file
        record = {
            "size": path.stat().st_size,
            "sha256": sha256_of([path]) if self.hashed else None,
            "matrices": [asdict(report) for report in reports],
            "neuron_orders": [asdict(order) for order in orders],
            "rounding": dict(rounding),
        }
        unfinished = self.folder / f"{file}.tmp"
        write_json(unfinished, record)
        unfinished.replace(self._path(file))

    def holds(self, file: str) -> bool:
        """Whether a weight file is finished and as it was then."""
        path, record = self.artifact / file, self._path(file)
        if not (path.is_file() and record.is_file()):
            return False
        known = read_json_object(record)
        return path.stat().st_size == known["size"] and sha256_of([path]) == known["sha256"]

    def drop(self, file: str) -> None:
        """Forget a weight file."""
        self._path(file).unlink(missing_ok=True)

    def collect(
        self, plan: Plan
    ) -> tuple[tuple[MatrixReport, ...], tuple[NeuronOrder, ...], dict[str, float]]:
        """Reports on all matrices, orders of neurons, and errors of rounding, in the plan's order."""
        matrices, orders, errors = {}, {}, {}
        for file in plan.shards:
            record = read_json_object(self._path(file))
            errors |= record["rounding"]
            matrices |= {each["name"]: each for each in record["matrices"]}
            orders |= {each["ffn"]: NeuronOrder(**each) for each in record["neuron_orders"]}
        reports = (_report(matrices[matrix.name]) for matrix in plan.matrices)
        found = (orders[ffn.ffn.path] for ffn in plan.ffns if ffn.ffn.path in orders)
        rounding = {matrix.name: errors[matrix.name] for matrix in plan.matrices if matrix.name in errors}
        return tuple(reports), tuple(found), rounding

    def _path(self, file: str) -> Path:
        return self.folder / f"{file}.json"


def _report(values: Mapping[str, Any]) -> MatrixReport:
    kind = StackReport if "form" in values else MatrixReport
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return kind(**fields)


# ---------------------------------------------------------------------------------------------------
# Runs that go on


def resume_run(records: Records, prepared: Prepared, checkpoint: Checkpoint) -> list[str]:
    """Keep of an interrupted run the weight files that hold, and nothing else; note what this run makes.

    Returns:
        The files that are kept.

    Raises:
        RecipeError: the interrupted run made something else.
    """
    path, wanted = records.artifact.parent / RUN, _identity(prepared, checkpoint)
    if path.is_file():
        _check_same(read_json_object(path), wanted)
    else:
        unfinished = path.with_suffix(".tmp")
        write_json(unfinished, wanted)
        unfinished.replace(path)
    kept = [file for file in prepared.plan.shards if records.holds(file)]
    for file in set(prepared.plan.shards) - set(kept):
        records.drop(file)
    for found in sorted(records.artifact.rglob("*"), reverse=True):
        if found.is_dir():
            found.rmdir()
        elif found.parent != records.artifact or found.name not in kept:
            found.unlink()
    return kept


def _identity(prepared: Prepared, checkpoint: Checkpoint) -> dict[str, Any]:
    """What a run makes, of what."""
    plan, calibration = prepared.plan, prepared.calibration or prepared.activated
    made = [[tensor.name, tensor.shape, tensor.dtype] for tensor in plan.tensors]
    ranks = [[matrix.name, matrix.spec] for matrix in plan.matrices]
    stay = plan.fewer.kept if isinstance(plan, MixturePlan) and plan.fewer else None
    digest = hashlib.sha256(json.dumps([made, ranks, plan.shards, stay], default=list).encode())
    return {
        "version": __version__,
        "recipe": plan.recipe.to_mapping(),
        "source": {file: _version(checkpoint, file) for file in checkpoint.stored_files},
        "calibration": calibration and calibration.folder.name,
        "plan": digest.hexdigest(),
    }


def _version(checkpoint: Checkpoint, file: str) -> str | list[int]:
    """What changes with a weight file of the source: its commit, or its size and time."""
    if checkpoint.revision is not None:
        return checkpoint.revision
    stat = (checkpoint.folder / file).stat()
    return [stat.st_size, stat.st_mtime_ns]


def _check_same(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises RecipeError that names the first difference."""
    checks: tuple[Callable[[], str | None], ...] = (
        lambda: _changed_version(found["version"], wanted["version"]),
        lambda: _changed_option(found["recipe"], wanted["recipe"]),
        lambda: _changed_file(found["source"], wanted["source"]),
        lambda: _unless_same(found, wanted, "calibration", "the calibration's text or source has changed"),
        lambda: _unless_same(found, wanted, "plan", "the plan differs from that of the interrupted run"),
    )
    if difference := next(filter(None, (check() for check in checks)), None):
        raise RecipeError(
            f"{difference}; repeat that run's options on the same source, or leave out "
            f"{switched('resume')} to begin anew"
        )


def _changed_version(found: str, wanted: str) -> str | None:
    return None if found == wanted else f"the interrupted run was of mpoe-convert {found}, this is {wanted}"


def _changed_option(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    for name in {**found, **wanted}:
        before, now = found.get(name), wanted.get(name)
        if before != now:
            return f"the interrupted run had {_given(name, before)}, this one has {_given(name, now)}"
    return None


def _given(name: str, value: object) -> str:
    return f"no {called(name)}" if value is None else assigned(name, value)


def _changed_file(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    changed = (file for file in {**found, **wanted} if found.get(file) != wanted.get(file))
    return next((f"the source's '{file}' has changed since the interrupted run" for file in changed), None)


def _unless_same(found: Mapping[str, Any], wanted: Mapping[str, Any], key: str, what: str) -> str | None:
    return None if found[key] == wanted[key] else what
