"""Pictures of an artifact: errors and parameters, and losses and expert load if it was fine-tuned."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import OutputError
from ..extras import need
from ..request import as_path
from ..source.json_files import read_json_object
from .card_file import set_section
from .inspect import inspect
from .layout import CARD_FILE, TRAINING_REPORT_FILE, read_artifact, register_files

if TYPE_CHECKING:
    from matplotlib.figure import Figure


FOLDER = "pictures"
FORMATS = ("png", "svg")
SMALLEST = 1e-9  # an error of zero is drawn as this
# Which parts of a `Summary` all experts share, and which each expert owns.
PARTS = (
    (("central tensors", "shared"), ("biases", "shared")),
    (("auxiliary tensors", "per expert"), ("biases", "per expert")),
)
ERRORS = (
    "Error and clone drift per matrix when converted, relative to the dense weight (zero is drawn as 1e-9)"
)
MANY = 16  # layers; with more of them, only the load of every second (third, ...) is drawn
ROLE_MARKERS = {"gate": "^", "up": "o", "down": "s"}
SHARED, OWN, ROUTERS, REFERENCE = "#20639b", "#f6a01a", "#8f2d56", "#9aa5b1"


def draw_pictures(folder: str | Path) -> dict[str, tuple[str, ...]]:
    """Draw an artifact's reports as PNG and SVG files, and show them in its model card.

    Args:
        folder: an artifact; those that `finetune` wrote have losses and expert load as well.

    Returns:
        {name of the picture: its files inside the artifact}

    Raises:
        CheckpointError: the folder is no artifact, or a report in it is damaged.
        OutputError: the folder cannot be written to, or holds something else called pictures.

    >>> from mpoe_convert import draw_pictures
    >>> draw_pictures("out")["error"]
    ('pictures/error.png', 'pictures/error.svg')
    """
    need("report", "matplotlib", extra="report")
    folder = as_path("folder", folder)
    _, report = read_artifact(folder)
    training = None
    if (folder / TRAINING_REPORT_FILE).is_file():
        training = read_json_object(folder / TRAINING_REPORT_FILE, "a training report", remedy="train again")
    written, texts = {}, []
    try:
        (folder / FOLDER).mkdir(exist_ok=True)
        for name, caption, figure in _figures(folder, report, training):
            written[name] = tuple(f"{FOLDER}/{name}.{suffix}" for suffix in FORMATS)
            for path in written[name]:
                _save(figure, folder / path)
            texts.append(f"![{caption}]({written[name][0]})\n\n*{caption}*")
        set_section(folder / CARD_FILE, "Pictures", "\n\n".join(texts))
        register_files(folder, [path for paths in written.values() for path in paths])
    except OSError as error:
        raise OutputError(f"cannot write the pictures of {folder}: {error}") from error
    return written


def _save(figure: Figure, path: Path) -> None:
    """Equal artifacts get equal files: no date, and the same names inside."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "mpoe"}):
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


def _figures(folder: Path, report: dict, training: dict | None) -> Iterator[tuple[str, str, Figure]]:
    """(name, caption, figure) of every picture for which the reports hold data."""
    yield "error", ERRORS, _errors(report)
    yield (
        "parameters",
        "FFN parameters, stored and used per token, against both references",
        _sizes(folder, report),
    )
    log = training["log"] if training else []
    if any("loss" in entry or "eval_loss" in entry for entry in log):
        yield "losses", "Losses over the steps of training", _losses(log)
    if sum("expert_load" in entry for entry in log) > 1:
        yield "load", "Load of the experts over the steps of training, per layer", _load(log)


def _figure(width: float, height: float) -> Figure:
    """An empty figure (inches), apart from pyplot, whose state belongs to the caller."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _errors(report: dict) -> Figure:
    matrices, paths = report["matrices"], report["ffns"]
    figure = _figure(min(4 + 0.35 * len(paths), 16), 4.5)
    axes = figure.add_subplot()
    places = {path: place for place, path in enumerate(paths)}
    for role, marker in ROLE_MARKERS.items():
        own = [m for m in matrices if m["name"].endswith(f".{role}")]
        if not own:
            continue
        where = [next(places[p] for p in paths if f".{p}." in f".{m['name']}") for m in own]
        errors = [max(m["relative_error"], SMALLEST) for m in own]
        axes.plot(
            where, errors, marker=marker, ls="-", lw=0.8, color=SHARED, label=f"{role}: error of expert 0"
        )
        if report["max_clone_drift"]:
            drifts = [max(m["clone_drift"], SMALLEST) for m in own]
            axes.plot(
                where, drifts, marker=marker, ls=":", lw=0.8, color=OWN, label=f"{role}: drift of a clone"
            )
    axes.set(yscale="log", ylabel="relative Frobenius norm")
    axes.set_xticks(range(len(paths)), paths, rotation=60, ha="right", fontsize=7)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=3, fontsize=8)
    return figure


def _sizes(folder: Path, report: dict) -> Figure:
    totals = report["totals"]["ffn"]
    params = {part: numbers[1] for part, numbers in inspect(folder).parts.items()}
    shared, own = (sum(params.get(f"{what} ({whose})", 0) for what, whose in parts) for parts in PARTS)
    used = own * report["recipe"]["top_k"] / report["recipe"]["experts"]
    bars = [
        ("this model, used per token", shared, used, params["routers"]),
        ("this model, stored", shared, own, params["routers"]),
        ("plain MoE, used per token", totals["plain_moe_active_params"], 0, 0),
        ("plain MoE, stored", totals["plain_moe_params"], 0, 0),
        ("dense base", totals["dense_params"], 0, 0),
    ]
    figure = _figure(8, 3.6)
    axes = figure.add_subplot()
    for place, (name, shared, auxiliary, routing) in enumerate(bars):
        is_ours = name.startswith("this")
        axes.barh(place, shared, color=SHARED if is_ours else REFERENCE)
        axes.barh(place, auxiliary, left=shared, color=OWN)
        axes.barh(place, routing, left=shared + auxiliary, color=ROUTERS)
        total = shared + auxiliary + routing
        axes.annotate(f" {total:,.0f}", (total, place), va="center", fontsize=8)
    axes.set_yticks(range(len(bars)), [name for name, *_ in bars])
    axes.set(xlabel="parameters in the converted FFNs", xlim=(0, 1.2 * totals["plain_moe_params"]))
    for color, label in ((SHARED, "shared"), (OWN, "of the experts"), (ROUTERS, "routers")):
        axes.barh(0, 0, color=color, label=label)
    axes.legend(loc="center right", fontsize=8)
    return figure


def _losses(log: list[dict]) -> Figure:
    figure = _figure(8, 4)
    axes = figure.add_subplot()
    shown = (("loss", "training, with the routers' losses", SHARED), ("eval_loss", "evaluation", OWN))
    for key, label, color in shown:
        points = [(entry["step"], entry[key]) for entry in log if key in entry]
        if points:
            axes.plot(
                *zip(*points, strict=True), color=color, label=label, marker="." if len(points) < 30 else None
            )
    axes.set(xlabel="step", ylabel="loss, nats")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _load(log: list[dict]) -> Figure:
    entries = [(entry["step"], entry["expert_load"]) for entry in log if "expert_load" in entry]
    paths = list(entries[0][1])
    paths = paths[:: -(-len(paths) // MANY)]
    columns = min(len(paths), 4)
    rows = -(-len(paths) // columns)
    figure = _figure(3 * columns + 1, 2.2 * rows + 0.8)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    steps = [step for step, _ in entries]
    for axes, path in zip(grid.flat, paths, strict=False):
        loads = list(zip(*(load[path] for _, load in entries), strict=True))  # expert by expert
        axes.stackplot(steps, loads, lw=0.3, edgecolor="white", baseline="zero")
        axes.set_title(path, fontsize=8)
        axes.margins(0)
    for axes in grid.flat[len(paths) :]:
        axes.set_axis_off()
    figure.supxlabel("step", fontsize=9)
    figure.supylabel("share of the choices, expert by expert", fontsize=9)
    return figure
