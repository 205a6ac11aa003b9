"""What people see: tables of plans, reports and comparisons, and the progress bar."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from .artifact.inspect import Summary
from .artifact.verify import Verification
from .conversion.report import MatrixReport, NeuronOrder, Report, Trial, plan_warnings
from .planning.plan import Budget, MatrixPlan, Plan, Totals
from .source.families import FAMILIES

if TYPE_CHECKING:
    from .artifact.push import Pushed
    from .exports.export import Exported
    from .training.evaluate import Evaluation


# Relative difference of outputs up to which they are said to agree.
NEAR = 0.05
# A terminal narrower than this would fold the tables; output to a file is not folded at all.
FILE_WIDTH = 200


def console(stderr: bool = False) -> Console:
    plain = Console(stderr=stderr, highlight=False)
    return plain if plain.is_terminal else Console(stderr=stderr, highlight=False, width=FILE_WIDTH)


def size(num_bytes: int) -> str:
    """1234567 -> "1.2 MB" (powers of 1,000, as safetensors and the Hub count)."""
    value = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} TB"


def _numbers(values: Iterable[int]) -> str:
    return ",".join(map(str, values)) or "–"


def _factors(in_dims: Iterable[int], out_dims: Iterable[int]) -> str:
    return f"{_numbers(in_dims)} x {_numbers(out_dims)}"


def _table(title: str, *columns: str, numbers: int = 0) -> Table:
    """A table whose last `numbers` columns hold numbers."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for k, column in enumerate(columns):
        right = k >= len(columns) - numbers
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    return table


def matrices_table(matrices: Iterable[MatrixPlan]) -> Table:
    """One row per matrix of a plan."""
    matrices = list(matrices)
    columns = ["matrix", "size", "sites (in x out)", "bonds", "full bonds", "dense", "stored"]
    if any(matrix.rank is not None for matrix in matrices):
        columns[-2:-2] = ["rank"]
    table = _table("Matrices", *columns, numbers=len(columns) - 5)
    for matrix in matrices:
        term = matrix.own_term
        table.add_row(
            matrix.name,
            f"{matrix.rows} x {matrix.cols}",
            _factors(term["in_dims"], term["out_dims"]),
            _numbers(term["bonds"]),
            _numbers(matrix.full_bonds),
            *(["whole" if matrix.rank is None else str(matrix.rank)] if "rank" in columns else []),
            f"{matrix.dense_params:,}",
            f"{matrix.stored_params:,}",
        )
    return table


def totals_table(ffn: Totals, model: Totals) -> Table:
    """Both references beside the artifact, for the FFNs and for the whole model."""
    table = _table("Totals", "", "dense base", "plain MoE", "this model", "of plain MoE", numbers=4)
    for label, t in (("FFNs", ffn), ("whole model", model)):
        table.add_row(
            f"{label}: parameters stored",
            f"{t.dense_params:,}",
            f"{t.plain_moe_params:,}",
            f"{t.stored_params:,}",
            f"{t.stored_params / t.plain_moe_params:.1%}",
        )
        table.add_row(
            f"{label}: used per token",
            f"{t.dense_params:,}",
            f"{t.plain_moe_active_params:,}",
            f"{t.active_params:,}",
            f"{t.active_params / t.plain_moe_active_params:.1%}",
        )
        table.add_row(
            f"{label}: bytes",
            size(t.dense_bytes),
            size(t.plain_moe_bytes),
            size(t.stored_bytes),
            f"{t.stored_bytes / t.plain_moe_bytes:.1%}",
        )
        table.add_row(
            f"{label}: FLOPs per token",
            f"{t.dense_flops_per_token:,}",
            f"{t.plain_moe_flops_per_token:,}",
            f"{t.flops_per_token:,}",
            f"{t.flops_per_token / t.plain_moe_flops_per_token:.1%}",
        )
    if ffn.rebuild_flops_per_forward:
        flops = f"{ffn.rebuild_flops_per_forward:,}"
        table.add_row("FFNs: FLOPs per forward pass to rebuild all experts", "", "", flops, "")
    return table


def print_plan(plan: Plan, out: Console) -> None:
    recipe = plan.recipe
    out.print(
        f"[bold]{escape(plan.source)}[/] ({plan.model_type}): {len(plan.ffns)} FFNs -> "
        f"{recipe.experts} experts of kind {recipe.kind}, top {recipe.top_k}"
    )
    if plan.kept_dense:
        out.print(f"{len(plan.kept_dense)} FFNs stay dense: {', '.join(plan.kept_dense)}")
    out.print(matrices_table(plan.matrices))
    out.print(totals_table(plan.ffn_totals, plan.totals))
    out.print(_shards_table(plan))
    out.print(f"Peak memory for tensors, estimated: {size(plan.peak_bytes)}")
    if plan.budget:
        _print_budget(plan.budget, plan.recipe.keep, out)
    if not plan.budget:
        exact = "nothing is truncated" if plan.is_exact else "truncated: bonds are below the full ones"
        out.print(f"Bonds: {exact}.")
    _print_warnings(plan_warnings(plan), out)


def _print_budget(budget: Budget, asked: float | None, out: Console) -> None:
    """What was chosen, and what else there is."""
    losses = budget.chosen.loss is not None
    columns = ("FFN numbers kept", "root mean square error", *(("expected loss",) if losses else ()))
    table = _table("Budget: what other shares are predicted to cost", *columns, numbers=len(columns))
    others = [point for point in budget.curve if abs(point.keep - budget.chosen.keep) > 0.01]
    for point in sorted([*others, budget.chosen], key=lambda point: point.keep):
        cells = [f"{point.keep:.1%}", f"{point.error:.3f}", *([f"+{point.loss:.3g}"] if losses else ())]
        table.add_row(*cells, style="bold" if point == budget.chosen else None)
    out.print(table)
    text = "" if asked is None else f", asked {asked:.1%}"
    text += f" (calibrated on {budget.tokens:,} tokens)" if budget.tokens else ""
    out.print(
        f"Kept: {budget.chosen.keep:.1%} of the dense FFNs' numbers{text}; the least that can be met: "
        f"{budget.smallest_keep:.1%}, of which {budget.fixed:.1%} are what experts own, biases and routers."
    )


def _shards_table(plan: Plan) -> Table:
    table = _table("Weight files", "file", "tensors", "bytes", numbers=2)
    sizes = {tensor.name: tensor.num_bytes for tensor in plan.tensors}
    for file, names in plan.shards.items():
        table.add_row(file, str(len(names)), size(sum(sizes[name] for name in names)))
    return table


def _print_warnings(warnings: list[str], out: Console) -> None:
    for warning in warnings:
        out.print(f"[bold yellow]Warning:[/] {escape(warning)}")


def plan_json(plan: Plan) -> dict:
    from dataclasses import asdict

    return {
        "base_model": plan.source,
        "revision": plan.revision,
        "model_type": plan.model_type,
        "recipe": plan.recipe.to_mapping(),
        "totals": asdict(plan.totals) | {"ffn": asdict(plan.ffn_totals)},
        "exact": plan.is_exact,
        "peak_bytes": plan.peak_bytes,
        "kept_dense": list(plan.kept_dense),
        "warnings": plan_warnings(plan),
        "budget": asdict(plan.budget) if plan.budget else None,
        "matrices": [_matrix_json(matrix) for matrix in plan.matrices],
        "tensors": {t.name: {"shape": list(t.shape), "dtype": t.dtype} for t in plan.tensors},
        "shards": {file: list(names) for file, names in plan.shards.items()},
    }


def _matrix_json(matrix: MatrixPlan) -> dict:
    term = matrix.own_term
    return {
        "name": matrix.name,
        "shape": [matrix.rows, matrix.cols],
        **{key: term[key] for key in ("in_dims", "out_dims", "bonds")},
        "full_bonds": list(matrix.full_bonds),
        "rank": matrix.rank,
        "dense_params": matrix.dense_params,
        "stored_params": matrix.stored_params,
    }


def layers_table(matrices: Iterable[MatrixReport]) -> Table:
    """One row per FFN: its worst matrix counts."""
    matrices = list(matrices)
    measured = any(m.output_error is not None for m in matrices)
    columns = [
        "FFN",
        "largest error",
        *(["of outputs"] if measured else []),
        "clone drift",
        "dense",
        "stored",
    ]
    table = _table("Layers", *columns, numbers=len(columns) - 1)
    for ffn, group in groupby(matrices, key=lambda m: m.name.rpartition(".")[0]):
        group = list(group)
        table.add_row(
            ffn,
            f"{max(m.relative_error for m in group):.2e}",
            *([f"{max(m.output_error for m in group):.2e}"] if measured else []),
            f"{max(m.clone_drift for m in group):.2e}",
            f"{sum(m.dense_params for m in group):,}",
            f"{sum(m.stored_params for m in group):,}",
        )
    return table


def reports_table(matrices: Iterable[MatrixReport]) -> Table:
    """One row per matrix."""
    matrices = list(matrices)
    measured = any(m.output_error is not None for m in matrices)
    columns = ["matrix", "size", "bonds", "error", "before the cast", "clone drift", "dense", "stored"]
    if measured:
        columns[4:4] = ["of outputs"]
    table = _table("Matrices", *columns, numbers=len(columns) - 3)
    for m in matrices:
        table.add_row(
            m.name,
            f"{m.shape[0]} x {m.shape[1]}",
            _numbers(m.bonds),
            f"{m.relative_error:.2e}",
            *([f"{m.output_error:.2e}"] if measured else []),
            f"{m.relative_error_before_cast:.2e}",
            f"{m.clone_drift:.2e}",
            f"{m.dense_params:,}",
            f"{m.stored_params:,}",
        )
    return table


def print_report(report: Report, output: str, out: Console, *, per_matrix: bool) -> None:
    table = reports_table if per_matrix else layers_table
    out.print(table(report.matrices))
    out.print(totals_table(report.plan.ffn_totals, report.plan.totals))
    if report.plan.budget:
        _print_budget(report.plan.budget, report.plan.recipe.keep, out)
    if report.trials:
        out.print(_trials_table(report.trials))
    if report.neuron_orders:
        out.print(_neuron_orders(report.neuron_orders))
    if report.divergence:
        out.print(report.divergence_in_words())
    _print_warnings(report.warnings, out)
    out.print(f"Written to [bold]{escape(output)}[/]. Check it: mpoe-convert verify {escape(output)}")


def _trials_table(trials: Sequence[Trial]) -> Table:
    """The nearest first; it is the one that was kept."""
    in_nats = trials[0].divergence.nats is not None
    what = "nats of divergence" if in_nats else "difference of the last hidden states"
    table = _table("Search: ways that were tried", "metric", "allocation", "corrected", what, numbers=1)
    for place, trial in enumerate(sorted(trials, key=lambda trial: trial.divergence.distance)):
        cells = trial.metric, trial.allocation, "yes" if trial.correct else "no"
        table.add_row(*cells, f"{trial.divergence.distance:.3g}", style=None if place else "bold")
    return table


def _neuron_orders(orders: Sequence[NeuronOrder]) -> str:
    """One line; errors are means over FFNs."""
    applied = [order for order in orders if order.applied]
    if not applied:
        return "Neurons: no order was found in which cutting the bonds loses less than in the source's."
    source, found = (
        sum(getattr(order, f"{name}_error") for order in applied) / len(applied)
        for name in ("source", "bisected")
    )
    return (
        f"Neurons: reordered in {len(applied)} of {len(orders)} FFNs, where cutting the bonds then loses "
        f"{found:.3f} instead of {source:.3f} (relative error of the weights, before any metric)."
    )


@contextmanager
def progress_bar(out: Console, enabled: bool) -> Iterator:
    """A progress callback for `convert`: a bar over FFNs on a terminal, nothing elsewhere."""
    if not (enabled and out.is_terminal):
        yield None
        return
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    bar = Progress(*columns, console=out, transient=True)

    def update(name: str, done: int, total: int, report: MatrixReport | None) -> None:
        if not bar.tasks:  # not before: a download has bars of its own
            bar.add_task("")
            bar.start()
        text = name if report is None else f"{name}  error {report.relative_error:.1e}"
        bar.update(bar.task_ids[0], description=escape(text), completed=done, total=total)

    try:
        yield update
    finally:
        if bar.tasks:
            bar.stop()


def quiet_libraries() -> None:
    """No progress bars and warnings of transformers and datasets among our own lines."""
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("accelerate").setLevel(logging.ERROR)


@contextmanager
def training_progress(out: Console, enabled: bool) -> Iterator:
    """A progress callback for `finetune`: a line for whatever is logged, a bar below on a terminal."""
    if not enabled:
        yield None
        return
    bar = Progress(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=out, transient=True)
    task = bar.add_task("")

    def update(step: int, steps: int, logs: Mapping[str, float]) -> None:
        bar.update(task, completed=step, total=steps)
        line = training_line(logs)
        if line:
            out.print(f"step {step}/{steps}  {line}", highlight=False)

    with bar if out.is_terminal else nullcontext():
        yield update


def training_line(logs: Mapping[str, float]) -> str:
    """One logged dictionary of Trainer in words."""
    shown = {"loss": "loss", "eval_loss": "held-out loss", "eval_perplexity": "perplexity"}
    shown |= {"eval_accuracy": "accuracy", "grad_norm": "gradient norm", "learning_rate": "learning rate"}
    parts = [f"{name} {logs[key]:.4g}" for key, name in shown.items() if key in logs]
    entropies = {key: value for key, value in logs.items() if key.startswith("load_entropy/")}
    if entropies:
        worst = min(entropies, key=entropies.get)
        mean = sum(entropies.values()) / len(entropies)
        parts.append(f"load entropy {mean:.3f} (lowest {entropies[worst]:.3f}, {worst.partition('/')[2]})")
    return "  ".join(parts)


@contextmanager
def evaluation_progress(out: Console, enabled: bool) -> Iterator:
    """A progress callback for `evaluate`: a bar over batches on a terminal, nothing elsewhere."""
    if not (enabled and out.is_terminal):
        yield None
        return
    bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), console=out)
    tasks: dict[str, TaskID] = {}

    def update(model: str, done: int, total: int) -> None:
        if model not in tasks:
            tasks[model] = bar.add_task(escape(model))
        bar.update(tasks[model], completed=done, total=total)

    with bar:
        yield update


@contextmanager
def export_progress(out: Console, enabled: bool) -> Iterator:
    """A progress callback for `export`: a bar over tensors on a terminal, nothing elsewhere."""
    if not (enabled and out.is_terminal):
        yield None
        return
    bar = Progress(
        BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), console=out, transient=True
    )
    task = bar.add_task("")
    with bar:
        yield lambda name, done, total: bar.update(
            task, description=escape(name), completed=done, total=total
        )


def print_export(result: Exported, output: str, out: Console) -> None:
    out.print(escape(result.about))
    out.print("" if result.params is None else f"{result.params:,} parameters, ", end="")
    out.print(size(result.bytes))
    _print_warnings(list(result.warnings), out)
    if result.comparison:
        out.print(result.comparison.in_words())
    out.print(f"Written to [bold]{escape(output)}[/].")


def print_evaluation(result: Evaluation, out: Console) -> None:
    unit = "tokens" if result.task in ("causal", "masked") else "examples"
    names = [result.model, *([result.other, "difference"] if result.other else [])]
    table = _table(f"{result.count:,} {unit}, 95 % intervals", "", *names, numbers=len(names))
    for name, metric in result.metrics.items():
        found = [metric]
        if result.other:
            ratio = f"{name} ratio"
            other = result.differences.get(name) or result.differences[ratio]
            found += [result.against[name], other]
        table.add_row(name, *(f"{m.value:.4g} ({m.low:.4g} to {m.high:.4g})" for m in found))
    out.print(table)
    if result.other and "perplexity" in result.metrics:
        out.print("The difference of perplexities is their ratio.", highlight=False)


def print_training(report: dict, output: str, out: Console) -> None:
    names = {"eval_loss": "loss", "eval_perplexity": "perplexity", "eval_accuracy": "accuracy"}
    held_out = {entry["step"]: entry for entry in report["log"] if "eval_loss" in entry}
    table = _table("Held-out data", "step", *names.values(), numbers=4)
    for step, entry in held_out.items():
        table.add_row(str(step), *(f"{entry[key]:.4f}" if key in entry else "" for key in names))
    if held_out:
        out.print(table)
    if report["evaluation"]:
        out.print(f"Best checkpoint: {training_line(report['evaluation'])}", highlight=False)
    out.print(f"{report['steps']} steps in {report['seconds']:.0f} s; written to {output}", highlight=False)


def print_verification(result: Verification, out: Console) -> None:
    table = _table("", "outputs", "", numbers=1)
    table.add_row("inputs", result.inputs)
    table.add_row("relative difference", f"{result.relative_difference:.2e}")
    table.add_row("  allowed", f"{result.tolerance:.2e}")
    table.add_row("largest absolute difference", f"{result.max_difference:.2e}")
    if result.top1_agreement is not None:
        table.add_row("same largest output", f"{result.top1_agreement:.1%}")
    if result.greedy_agreement is not None:
        table.add_row("same greedily generated tokens", f"{result.greedy_agreement:.1%}")
    out.print(
        f"{escape(result.artifact)} loads as {result.model_class} by {result.auto_class}; compared with "
        f"{escape(result.against)} in float32:"
    )
    out.print(table)
    if not result.ok:
        out.print("[red]DIFFERENT[/]: the outputs do not agree.")
    elif result.relative_difference < NEAR:
        out.print("[green]OK[/]: the outputs agree.")
    else:
        out.print("[green]OK[/]: the outputs differ, and by no more than is allowed.")


def print_summary(summary: Summary, out: Console) -> None:
    block, recipe = summary.config["mpoe"], summary.report["recipe"]
    revision = f" at {summary.report['revision']}" if summary.report["revision"] else ""
    out.print(
        f"[bold]{escape(summary.folder)}[/]: {summary.config['model_type']}, {len(block['ffns'])} FFNs of "
        f"{block['num_experts']} experts, top {block['top_k']}; from {escape(recipe['model'])}{revision}"
    )
    parts = _table("Parts", "part", "tensors", "parameters", "bytes", numbers=3)
    for part, (count, params, num_bytes) in summary.parts.items():
        parts.add_row(part, str(count), f"{params:,}", size(num_bytes))
    out.print(parts)
    out.print(_forms_table(block))
    out.print(f"Loads by {', '.join(summary.heads)}.")
    if summary.config["mpoe"].get("base_auto_map"):
        out.print("Its base has code of its own, which lies in the folder and is run with it.")
    out.print(
        f"Largest relative error {summary.report['max_relative_error']:.2e}, clone drift "
        f"{summary.report['max_clone_drift']:.2e}; {recipe['kind']} experts, layout {recipe['layout']}, "
        f"noise {recipe['noise']:g}, seed {recipe['seed']}."
    )
    _print_warnings(summary.report["warnings"], out)


def quiet_hub() -> None:
    """No words of huggingface_hub on what a commit holds; what it says when it tries again stays."""
    logging.getLogger("huggingface_hub.hf_api").setLevel(logging.ERROR)


def print_push(pushed: Pushed, out: Console) -> None:
    what = f"{len(pushed.files)} files, {size(pushed.num_bytes)}"
    gone = f", {len(pushed.deleted)} of an earlier artifact deleted" if pushed.deleted else ""
    if pushed.changed:
        out.print(f"Pushed to {escape(pushed.repo_id)} ({what}{gone}):", highlight=False)
    else:
        out.print(f"{escape(pushed.repo_id)} holds exactly this already ({what}):", highlight=False)
    out.print(pushed.pull_request or pushed.url, soft_wrap=True, markup=False)
    if pushed.left_out:
        out.print(
            f"Not the artifact's, and left out: {', '.join(pushed.left_out)}", soft_wrap=True, markup=False
        )


def print_pictures(folder: str, written: Mapping[str, Sequence[str]], out: Console) -> None:
    for name, paths in written.items():
        out.print(f"{name}: {', '.join(escape(str(Path(folder, path))) for path in paths)}", soft_wrap=True)
    out.print("The model card, README.md, shows them.")
    if "losses" not in written:
        out.print("Losses and expert load come with `mpoe-convert finetune`.")


def _forms_table(block: dict) -> Table:
    table = _table("Projections", "FFNs", "projection", "sites (in x out)", "bonds", "shared", "bias")
    for number, form in enumerate(block["forms"]):
        count = sum(index == number for index in block["ffns"].values())
        for role, spec in form.items():
            if role == "adapter":
                table.add_row(str(count), role, f"width {spec}", "–", "–", "–")
                continue
            for term in spec["terms"]:
                table.add_row(
                    str(count),
                    role,
                    _factors(term["in_dims"], term["out_dims"]),
                    _numbers(term["bonds"]),
                    _numbers(k for k, shared in enumerate(term["shared"]) if shared),
                    str(spec["bias"] or "–"),
                )
    return table


def families_rows() -> list[dict]:
    """The table of families as plain values."""
    return [
        {
            "model_types": list(row.model_types),
            "layers": list(row.spellings[0].layers),
            "projections": [p for s in row.spellings for p in (s.gate, s.up, s.down) if p],
            "gated": any(s.gate or s.fused for s in row.spellings),
        }
        for row in FAMILIES
    ]


def print_families(out: Console) -> None:
    table = _table("Families", "model types", "layers", "tensors")
    for row in families_rows():
        projections = ", ".join(dict.fromkeys(row["projections"]))
        table.add_row(", ".join(row["model_types"]), ", ".join(row["layers"]), projections)
    out.print(table)
    out.print('Others by hand: --ffn "layers.{}.mlp:gate_proj,up_proj,down_proj"')
