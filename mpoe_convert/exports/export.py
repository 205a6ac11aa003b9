"""Export a converted model: read lazily, contract, write shard by shard, compare."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import count
from math import prod
from pathlib import Path

from ..artifact.auto_classes import has_tokenizer, keep_tokenizer
from ..artifact.card_file import source_front_matter
from ..artifact.companions import copy_companions
from ..artifact.folder import check_apart, check_output, check_space, staged
from ..artifact.layout import CARD_FILE, EXPORT_REPORT_FILE, file_names
from ..artifact.reader import Artifact, open_artifact
from ..artifact.verify import MAX_TOLERANCE, ROUNDING, ChildRequest, Comparison, compare_export
from ..artifact.weight_files import num_bytes, split_into_shards, write_planned
from ..errors import ExportError
from ..extras import need
from ..options import assigned, called
from ..planning.recipe import parse_size
from ..request import as_path, as_text, check_function, check_token
from ..source.architecture import main_auto_class
from ..source.json_files import write_json
from ..source.paths import is_dir
from ..source.text_options import check_calibration
from . import targets
from .card import write_export
from .targets import Checked, Export, ExportPlan, Part

HALVES = ("bfloat16", "float16")

# Called as progress(what, tensors made, tensors in all); 0 in all while what was written is compared.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Exported:
    """An export that was written.

    Attributes:
        artifact / revision: the converted model.
        base_model: the dense model that it was converted from, if its card says so.
        to / model_type: the target, and the architecture that was written.
        about: the same in words.
        expert_shares: of an average: {path of a layer: {expert: its weight}}.
        params: parameters in the weight files; None: a graph was written.
        bytes: of all files.
        comparison: of the outputs with the artifact's; None: not asked for, or not possible.
        files: paths in the folder.
    """

    artifact: str
    revision: str | None
    to: str
    model_type: str
    about: str
    expert_shares: dict[str, Mapping[int, float]] | None
    params: int | None
    warnings: tuple[str, ...]
    comparison: Comparison | None
    bytes: int = 0
    base_model: str | None = None
    files: tuple[str, ...] = ()

    def to_json(self) -> dict:
        """A dictionary of plain values."""
        return asdict(self)


def export(
    model: str | Path,
    output: str | Path,
    request: Export | str | None = None,
    *,
    overwrite: bool = False,
    revision: str | None = None,
    token: str | None = None,
    progress: Progress | None = None,
) -> Exported:
    """Write a converted model in a form that needs no custom code.

    >>> from mpoe_convert import Export, export
    >>> exported = export("out", "out-dense", Export(to="dense", expert=1))
    >>> exported.model_type, exported.comparison.relative_difference < 1e-4
    ('gpt2', True)

    Args:
        model: artifact, a folder or a Hub id; before or after training.
        output: the folder to write; appears whole or not at all.
        request: what to write, or its target alone; by default the first expert, dense.
        overwrite: replace an artifact or an export of this tool that is already there.
        revision: branch, tag or commit of a Hub id.
        token: for models of the Hub; by default the stored login.
        progress: called as progress(what, tensors made, tensors in all); 0 in all while outputs are compared.

    Returns:
        The contents of export_report.json.

    Raises:
        ExportError: the model has no exact form in that target.
        VerifyError: the outputs of the export differ from the model's; nothing is left behind.
        MpoeError: the model or the output is wrong in another way.
    """
    request, output = Export.of(request), as_path("output", output)
    model = as_text("model", model)
    check_token(token)
    check_function("progress", progress, "tensor, made, total")
    check_output(output, overwrite)
    check_calibration(request)
    shard_bytes = parse_size(request.max_shard_size)
    target = targets.load(request.to)
    source = open_artifact(
        str(model), revision=revision, token=token, trust_remote_code=request.trust_remote_code
    )
    if source.checkpoint.revision is None:
        check_apart(output, source.checkpoint.folder)
    if source.keeps_routers and request.to != "moe":
        raise ExportError(
            f"'{source.checkpoint.source}' was made of a mixture, a {source.model_type}, and none of its "
            f"experts is a model by itself; expected {assigned('to', 'moe')}"
        )
    plan, expert_weights = _plan(source, request, output)
    for extra, libraries in target.NEEDS.items():
        need(f"export, {assigned('to', request.to)},", *libraries, extra=extra)
    with staged(output, overwrite) as folder:
        _write_parts(folder, plan, source, shard_bytes, progress or (lambda *_: None))
        comparison = plan.write(folder) if plan.write else None
        if plan.checked and request.check:
            if progress:
                progress("comparing with the artifact", 0, 0)
            comparison = _compare(folder, source, plan.checked)
        report = Exported(
            artifact=source.checkpoint.source,
            revision=source.checkpoint.revision,
            to=request.to,
            model_type=plan.model_type,
            about=plan.about,
            expert_shares=expert_weights,
            params=sum(prod(tensor.shape) for part in plan.parts for tensor in part.tensors) or None,
            warnings=plan.warnings,
            comparison=comparison,
        )
        return _finish(folder, report, plan, source_front_matter(source.checkpoint.folder))


def _plan(
    source: Artifact, request: Export, output: Path
) -> tuple[ExportPlan, dict[str, Mapping[int, float]] | None]:
    """All that will be written, for which there is room, and the experts' weights in an average."""
    expert_weights = None
    if request.calibrate:
        need(f"export, {called('calibrate')},", "datasets", extra="calibrate")
        from .average import measure_expert_weights

        expert_weights = measure_expert_weights(source, request)
    plan = targets.load(request.to).plan(source, request, expert_weights, output)
    num_written = sum(num_bytes(tensor) for part in plan.parts for tensor in part.tensors)
    check_space(output, num_written + plan.num_bytes_written)
    return plan, expert_weights


def _write_parts(
    folder: Path, plan: ExportPlan, source: Artifact, shard_bytes: int, progress: Progress
) -> None:
    numbers, total = count(1), sum(len(part.tensors) for part in plan.parts)
    for part in plan.parts:
        shards = _begin_part(folder / part.folder, part, source, shard_bytes)
        write_planned(
            folder / part.folder,
            shards,
            part.tensors,
            lambda made: progress(made.name, next(numbers), total),
        )


def _begin_part(
    folder: Path, part: Part, source: Artifact, shard_bytes: int
) -> Mapping[str, tuple[str, ...]]:
    """Write the files beside the weights; the weight files, and the names of their tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in part.configs.items():
        write_json(folder / name, values)
    if part.adapter:
        return {"adapter_model.safetensors": tuple(tensor.name for tensor in part.tensors)}
    copy_companions(folder, source.checkpoint, source.architecture)
    keep_tokenizer(folder, source.checkpoint.folder, source.architecture.code is not None)
    return split_into_shards(part.tensors, shard_bytes) if part.tensors else {}


def _compare(folder: Path, source: Artifact, checked: Checked) -> Comparison:
    """Raises VerifyError if the outputs have to agree and do not."""
    checkpoint = source.checkpoint
    rounded = any(info.dtype in HALVES for info in checkpoint.tensors.values())
    tolerance = None
    if checked.same:  # in half precision products of cores are rounded once more; that may move a choice
        tolerance = MAX_TOLERANCE if rounded else ROUNDING
    model = checked.base or str(folder / checked.model)
    request = ChildRequest(
        against=str(checkpoint.folder.resolve()) if checkpoint.revision is None else checkpoint.source,
        revision=checkpoint.revision,
        artifact=str(Path(model).resolve()) if is_dir(model) else model,
        artifact_revision=checked.base_revision,
        auto_class=main_auto_class(source.config, source.model_type),
        trust_remote_code=(True, source.architecture.code is not None),
        token=source.token,
        experts=checked.experts,
        adapters=checked.adapters and tuple(str((folder / name).resolve()) for name in checked.adapters),
        is_export=True,
        has_tokenizer=not (checked.base or checked.adapters) and has_tokenizer(folder / checked.model),
    )
    return compare_export(request, tolerance)


def _finish(folder: Path, report: Exported, plan: ExportPlan, front: dict) -> Exported:
    """Write the card, and the report that lists every file."""
    name = report.artifact if report.revision else Path(report.artifact).resolve().name
    paragraphs = [f"Written by `mpoe-convert export --to {report.to}` from {name}. {plan.about}"]
    paragraphs += [f"> **Note:** {text}" for text in plan.warnings]
    if report.comparison is not None:
        paragraphs.append(report.comparison.in_words())
    write_export(
        folder / CARD_FILE,
        f"{name}: {plan.title}",
        paragraphs,
        plan.usage,
        front,
        ("mpoe", plan.model_type),
        plan.library,
    )
    names = file_names(folder)
    report = replace(
        report,
        bytes=sum((folder / name).stat().st_size for name in names),
        base_model=front.get("base_model"),
        files=tuple(sorted([*names, EXPORT_REPORT_FILE])),
    )
    write_json(folder / EXPORT_REPORT_FILE, report.to_json())
    return report
