"""Record an evaluation in an artifact: evaluation_report.json, and its card's metadata and section."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from ..artifact.card_file import EVALUATION, open_card, set_section
from ..artifact.fingerprint import is_about, sha256_of, weights_of
from ..artifact.layout import CARD_FILE, EVALUATION_REPORT_FILE, read_artifact, register_files
from ..artifact.loading import AUTO_CLASSES
from ..artifact.snippets import PIPELINE_TAGS
from ..errors import CheckpointError, OutputError
from ..source.json_files import read_json_object, write_json
from ..source.texts import BUILDERS
from .intervals import Metric, notes
from .tasks import TASKS, Score

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

# Keys of a recorded evaluation that are read again.
_KEYS = {"task", "data", "split", "sha256", "settings", "count", "metrics", "other", "against", "differences"}


def record_evaluation(folder: str | Path, evaluation: Mapping) -> None:
    """Write an evaluation into an artifact; an earlier one of the same task on the same data is replaced.

    Those of other weights than the folder's are removed.

    All evaluations are in evaluation_report.json, as tables in a section of the card, and as a `model-index`
    in the Hub's format in the card's metadata. Results from elsewhere in that metadata are kept.

    Args:
        folder: the artifact.
        evaluation: from `Evaluation.to_json`. Of data files only the names and a hash are kept.

    Raises:
        CheckpointError: the folder is no artifact, or its card or report of evaluations is damaged.
        OutputError: a file cannot be written.
    """
    folder = Path(folder)
    path = folder / EVALUATION_REPORT_FILE
    try:
        weights = weights_of(folder)
        found = _without_paths(evaluation) | weights
        recorded = recorded_evaluations(folder)
        stale = [each for each in recorded if not is_about(each, weights)]
        kept = [each for each in recorded if is_about(each, weights) and not _same_subject(each, found)]
        evaluations = [*kept, found]
        write_json(path, {"evaluations": evaluations})
        set_section(folder / CARD_FILE, EVALUATION, "\n\n".join(map(_in_words, evaluations)))
        results, gone = ([r for each in some for r in eval_results(each)] for some in (evaluations, stale))
        _set_results(folder, results, gone)
        register_files(folder, [EVALUATION_REPORT_FILE])
    except OSError as error:
        raise OutputError(f"cannot write the evaluation into '{folder}': {error}") from error


def recorded_evaluations(folder: Path) -> list[dict]:
    """The evaluations that are recorded in an artifact.

    Raises:
        CheckpointError: as `record_evaluation`.
    """
    read_artifact(folder)
    open_card(folder / CARD_FILE)
    path = folder / EVALUATION_REPORT_FILE
    if not path.is_file():
        return []
    found = read_json_object(path, "evaluations", remedy="delete it").get("evaluations")
    if not isinstance(found, list) or not all(
        isinstance(each, dict) and each.keys() >= _KEYS for each in found
    ):
        raise CheckpointError(f"'{path}' holds no evaluations as this tool writes them: delete it")
    return found


def eval_results(evaluation: Mapping) -> list[EvalResult]:
    """The `EvalResult`s of one evaluation, by which `huggingface_hub` writes a model-index."""
    from huggingface_hub import EvalResult

    tag = PIPELINE_TAGS[AUTO_CLASSES[evaluation["task"]]]
    name = ", ".join(evaluation["data"])
    first = evaluation["data"][0]
    builder = BUILDERS.get(Path(first).suffix.lower())
    dataset, _, subset = first.partition(":")
    return [
        EvalResult(
            task_type=tag,
            task_name=tag.replace("-", " ").capitalize(),
            dataset_type=builder[0] if builder else dataset,
            dataset_name=name,
            dataset_config=name if builder else subset or None,  # tells files apart
            dataset_split=None if builder else evaluation["split"],
            dataset_revision=_short(evaluation["sha256"]),
            metric_type=score.hub,
            metric_name=score.label,
            metric_value=evaluation["metrics"][score.name]["value"],
            metric_args=evaluation["settings"],
        )
        for score in _scores_of(evaluation)
        if evaluation["metrics"][score.name]["value"] is not None
    ]


def _scores_of(evaluation: Mapping) -> list[Score]:
    """The scores that an evaluation has; it may have been recorded by a release with others."""
    return [score for score in TASKS[evaluation["task"]].scores if score.name in evaluation["metrics"]]


def _same_subject(one: Mapping, other: Mapping) -> bool:
    return all(one[key] == other[key] for key in ("task", "data", "split", "sha256"))


def _short(sha256: str | None) -> str | None:
    return sha256 and sha256[:12]


def _sha256(sources: Sequence[str]) -> str | None:
    """Hash of the contents of data files, which tells files of one name apart; None for Hub datasets."""
    return sha256_of(Path(source) for source in sources if Path(source).is_file())


def _without_paths(evaluation: Mapping) -> dict:
    """The evaluation without the paths of files and models on this machine."""
    kept = {key: value for key, value in evaluation.items() if key != "model"}
    data = [Path(source).name if Path(source).is_file() else source for source in evaluation["data"]]
    other = evaluation["other"]
    if other is not None and Path(other).is_dir():
        other = Path(other).resolve().name
    return kept | {"data": data, "other": other, "sha256": _sha256(evaluation["data"])}


def _set_results(folder: Path, results: Sequence, gone: Sequence) -> None:
    """Write results into the card's metadata and take those out that are gone; others in it are kept."""
    made = open_card(folder / CARD_FILE)
    ours = {_place(result) for result in (*results, *gone)}
    data = cast("ModelCardData", made.data)
    others = [result for result in data.eval_results or () if _place(result) not in ours]
    data.eval_results = [*others, *results]
    data.model_name = data.model_name or folder.resolve().name
    made.save(folder / CARD_FILE)


def _place(result: EvalResult) -> tuple:
    """What tells the results in a card apart."""
    return *result.unique_identifier, result.metric_type


def _in_words(evaluation: Mapping) -> str:
    is_file = Path(evaluation["data"][0]).suffix.lower() in BUILDERS
    split = f" (SHA-256 {_short(evaluation['sha256'])}…)" if is_file else f" (split {evaluation['split']})"
    settings = ", ".join(f"{key} {value}" for key, value in evaluation["settings"].items())
    other, differences = evaluation["other"], evaluation["differences"] or {}
    names = ["metric", "this model", *([other, "difference"] if other else [])]
    rows = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for score in _scores_of(evaluation):
        shown = [evaluation["metrics"][score.name]]
        if other:
            difference = f"{score.name} ratio" if score.is_ratio else score.name
            shown += [evaluation["against"][score.name], differences[difference]]
        cells = (Metric(**n).in_words() for n in shown)
        rows.append(f"| {score.label} | {' | '.join(cells)} |")
    note = ["Perplexities are compared by their ratio."] if "perplexity ratio" in differences else []
    found = [
        {name: Metric(**n) for name, n in evaluation[key].items()}
        for key in ("metrics", "against", "differences")
        if evaluation[key]
    ]
    note += notes(*found)
    return "\n\n".join(
        [
            f"By `mpoe-convert evaluate` on {', '.join(evaluation['data'])}{split}: {evaluation['count']:,} "
            f"{TASKS[evaluation['task']].unit}, {settings}; 95 % intervals.",
            "\n".join(rows),
            *note,
        ]
    )
