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
from .fingerprint import check_is_about
from .inspect import inspect
from .layout import CARD_FILE, TRAINING_REPORT_FILE, read_artifact, register_files

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


FOLDER = "pictures"
FORMATS = ("png", "svg")
SMALLEST = 1e-9  # an error of zero is drawn as this
# Which parts of a `Summary` all experts share, and which each expert owns.
PARTS = (
    (("central tensors", "shared"), ("biases", "shared")),
    (("auxiliary tensors", "per expert"), ("biases", "per expert")),
)
ERRORS = "Error and clone drift per matrix when converted"
SIZES = "FFN parameters, stored and used per token, beside both references"
LOSSES = "Losses over the steps of training"
LOAD = "Load of the experts over the steps of training"
MANY_LAYERS = 16  # with more of them, only the load of every second (third, ...) is drawn
MANY_EXPERTS = 16  # with more of them, only the most and the least used one are told apart
MANY_TICKS = 40
SHARED, OWN, ROUTERS, REFERENCE, INK = "#20639b", "#f6a01a", "#8f2d56", "#9aa5b1", "#333333"
ROLES = {"gate": ("^", "#8f2d56"), "up": ("o", "#20639b"), "down": ("s", "#d1660f")}
STYLES = ("-", "--", "-.")  # beside the colour, so that neighbours differ twice


def draw_pictures(folder: str | Path) -> dict[str, tuple[str, ...]]:
    """Draw an artifact's reports as PNG and SVG files, and show them in its model card.

    Args:
        folder: an artifact; those that `finetune` wrote have losses and expert load as well.

    Returns:
        {name of the picture: its files inside the artifact}

    Raises:
        CheckpointError: the folder is no artifact, or a report in it is damaged or about other weights.
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
        check_is_about(folder / TRAINING_REPORT_FILE, training)
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
        raise OutputError(f"cannot write the pictures of '{folder}': {error}") from error
    return written


def _save(figure: Figure, path: Path) -> None:
    """Equal artifacts get equal files: no date, and the same names inside."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "mpoe"}):
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


def _figures(folder: Path, report: dict, training: dict | None) -> Iterator[tuple[str, str, Figure]]:
    """(name, caption, figure) of every picture for which the reports hold data."""
    yield "error", f"{ERRORS}, relative to the dense weight (zero is drawn as 1e-9)", _errors(report)
    yield "parameters", SIZES, _sizes(folder, report)
    log = training["log"] if training else []
    written = None if training is None else training.get("written_step")
    if any("loss" in entry or "eval_loss" in entry for entry in log):
        yield "losses", LOSSES + _of_weights(written), _losses(log, written)
    if sum("expert_load" in entry for entry in log) > 1:
        yield "load", f"{LOAD}, per layer{_of_weights(written)}", _load(log, written)


def _of_weights(written: int | None) -> str:
    return "" if written is None else f"; the weights are those of step {written}"


def _figure(width: float, height: float, title: str) -> Figure:
    """An empty figure (inches), apart from pyplot, whose state belongs to the caller."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, fontsize=11)
    return figure


def _errors(report: dict) -> Figure:
    """One point per matrix: filled for the error of expert 0, hollow for the drift of a clone."""
    matrices, paths = report["matrices"], report["ffns"]
    figure = _figure(min(max(6, 4 + 0.35 * len(paths)), 16), 4.5, ERRORS)
    axes = figure.add_subplot()
    places = {path: place for place, path in enumerate(paths)}
    of_mixture = any("form" in matrix for matrix in matrices)
    by_role = {role: [m for m in matrices if m["name"].endswith(f".{role}")] for role in ROLES}
    roles = [role for role, own in by_role.items() if own]
    for number, role in enumerate(roles):
        (marker, color), own = ROLES[role], by_role[role]
        shift = 0.2 * (number - (len(roles) - 1) / 2)  # so that no point hides another
        where = [shift + next(places[p] for p in paths if f".{p}." in f".{m['name']}") for m in own]
        who = "all experts" if of_mixture else "expert 0"
        drawn = [("relative_error", f"{role}: error of {who}", color)]
        if report["max_clone_drift"]:
            drawn.append(("clone_drift", f"{role}: drift of a clone", "none"))
        for key, label, face in drawn:
            values = [max(m[key], SMALLEST) for m in own]
            axes.plot(where, values, ls="", marker=marker, color=color, markerfacecolor=face, label=label)
    step = -(-len(paths) // MANY_TICKS)
    axes.set(yscale="log", ylabel="relative Frobenius norm (no unit)", xlabel="FFN")
    axes.set_xticks(range(0, len(paths), step), paths[::step], rotation=60, ha="right", fontsize=7)
    axes.set_xlim(-0.6, len(paths) - 0.4)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=len(roles), fontsize=8)
    return figure


def _sizes(folder: Path, report: dict) -> Figure:
    totals = report["totals"]["ffn"]
    params = {part: numbers[1] for part, numbers in inspect(folder).parts.items()}
    shared, own = (sum(params.get(f"{what} ({whose})", 0) for what, whose in parts) for parts in PARTS)
    used = own * report["recipe"]["top_k"] / report["recipe"]["experts"]
    routers = params.get("routers", 0)  # none of ours where the source was a mixture
    plain = "plain MoE" if routers else "source"
    if routers and (steps := report.get("pruning")):
        plain += f" of {steps[0]['experts_before']} experts"
    most = ", at most" if totals.get("varies") else ""  # which earlier reports lack
    bars = [
        (f"this model, used per token{most}", shared, used, routers),
        ("this model, stored", shared, own, routers),
        (f"{plain}, used per token{most}", totals["plain_moe_active_params"], 0, 0),
        (f"{plain}, stored", totals["plain_moe_params"], 0, 0),
    ]
    if routers:
        bars.append(("dense base", totals["dense_params"], 0, 0))
    figure = _figure(8, 4, SIZES)
    axes = figure.add_subplot()
    for place, (name, shared, auxiliary, routing) in enumerate(bars):
        is_ours = name.startswith("this")
        axes.barh(place, shared, color=SHARED if is_ours else REFERENCE)
        axes.barh(place, auxiliary, left=shared, color=OWN)
        axes.barh(place, routing, left=shared + auxiliary, color=ROUTERS)
        total = shared + auxiliary + routing
        axes.annotate(f" {total:,.0f}", (total, place), va="center", fontsize=8)
    axes.set_yticks(range(len(bars)), [name for name, *_ in bars])
    axes.set(xlabel="parameters in the converted FFNs", xlim=(0, 1.25 * max(sum(bar[1:]) for bar in bars)))
    axes.xaxis.set_major_formatter(_count)
    for color, label in (
        (SHARED, "shared by all experts"),
        (OWN, "owned by the experts"),
        *([(ROUTERS, "routers")] if routers else []),
        (REFERENCE, "references, with their routers" if routers else "the source's experts"),
    ):
        axes.barh(0, 0, color=color, label=label)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    return figure


def _count(number: float, _: float) -> str:
    """A tick of an axis of counts: 2500000 -> "2.5 M"."""
    for size, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(number) >= size:
            return f"{number / size:g}{letter}"
    return f"{number:g}"


def _losses(log: list[dict], written: int | None) -> Figure:
    figure = _figure(8, 4.5, LOSSES)
    axes = figure.add_subplot()
    shown = (
        ("loss", "training, with the routers' losses (mean since the last point)", SHARED, "."),
        ("eval_loss", "held-out data", OWN, "o"),
    )
    for key, label, color, marker in shown:
        points = [(entry["step"], entry[key]) for entry in log if key in entry]
        if points:
            few = len(points) < 60
            axes.plot(*zip(*points, strict=True), color=color, label=label, marker=marker if few else None)
    axes.set(xlabel="optimizer step", ylabel="loss (nats)")
    _steps(axes, log, written)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return figure


def _steps(axes: Axes, log: list[dict], written: int | None) -> None:
    """Whole steps and plain numbers on the axes, and where the weights are from."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.ticklabel_format(useOffset=False)
    axes.grid(alpha=0.3)
    if written is None:
        return
    axes.axvline(written, color=INK, ls=":", lw=1.2, label=f"step {written}, whose weights were written")
    last = max(entry["step"] for entry in log)
    if last > written:
        axes.axvspan(written, last, color=INK, alpha=0.07, lw=0, label="later steps, not in the weights")


def _load(log: list[dict], written: int | None) -> Figure:
    """One small picture per layer: the share of every expert, beside the equal one."""
    entries = [(entry["step"], entry["expert_load"]) for entry in log if "expert_load" in entry]
    every = -(-len(entries[0][1]) // MANY_LAYERS)
    paths = list(entries[0][1])[::every]
    columns = min(len(paths), 4)
    rows = -(-len(paths) // columns)
    which = "" if every == 1 else f", one of every {every} layers"
    figure = _figure(max(3 * columns + 1, 6), 2.3 * rows + 1.4, f"{LOAD}, per layer{which}")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    steps = [step for step, _ in entries]
    for axes, path in zip(grid.flat, paths, strict=False):
        loads = list(zip(*(load[path] for _, load in entries), strict=True))  # expert by expert
        _draw_experts(axes, steps, loads)
        axes.axhline(1 / len(loads), color=INK, ls="--", lw=1, label=f"1/{len(loads)}: all alike", zorder=3)
        axes.set_title(path, fontsize=8)
        _steps(axes, log, written)
        axes.tick_params(labelsize=7)
    largest = max(share for _, load in entries for path in paths for share in load[path])
    grid.flat[0].set_ylim(0, 1.05 * largest)  # which all of them share
    for axes in grid.flat[len(paths) :]:
        axes.set_axis_off()
    for axes in grid.flat[max(len(paths) - columns, 0) : len(paths)]:  # the lowest of every column
        axes.set_xlabel("optimizer step", fontsize=8)
        axes.tick_params(labelbottom=True)
    figure.supylabel("share of the choices", fontsize=9)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(len(labels), 2 * columns), fontsize=7
    )
    return figure


def _draw_experts(axes: Axes, steps: list[int], loads: list[tuple[float, ...]]) -> None:
    """A line per expert; of many, all in one colour below the largest and the smallest share."""
    from matplotlib import colormaps

    if len(loads) > MANY_EXPERTS:
        for number, load in enumerate(loads):
            axes.plot(steps, load, color=REFERENCE, lw=0.5, label=None if number else "every expert")
        axes.plot(steps, list(map(max, zip(*loads, strict=True))), color=OWN, label="largest share")
        axes.plot(steps, list(map(min, zip(*loads, strict=True))), color=SHARED, label="smallest share")
        return
    marker = "." if len(steps) < 30 else None
    for number, load in enumerate(loads):
        color = colormaps["turbo"]((number + 0.5) / len(loads))
        style = STYLES[number % len(STYLES)]
        line = {"color": color, "ls": style, "lw": 1.2, "marker": marker, "markersize": 4}
        axes.plot(steps, load, **line, label=f"expert {number}")
