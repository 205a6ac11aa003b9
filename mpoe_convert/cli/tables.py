"""What commands print: results as tables and lines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from rich.console import Console

from ..errors import counted
from ..experts.selection import in_short, of_block
from ..tables import Cell, Table, drawn, escape, listed, listed_bonds, short_paths, size, warning

if TYPE_CHECKING:
    from ..artifact.inspect import Summary
    from ..artifact.push import Pushed
    from ..artifact.verify import Verification
    from ..conversion.report import Report
    from ..exports.export import Exported
    from ..pruning.report import Smaller
    from ..training.evaluate import Evaluation

# Relative difference of outputs up to which they are said to agree.
NEAR = 0.05
# A terminal narrower than this would fold the tables; output to a file is not folded at all.
FILE_WIDTH = 200


def console(stderr: bool = False) -> Console:
    plain = Console(stderr=stderr, highlight=False)
    return plain if plain.is_terminal else Console(stderr=stderr, highlight=False, width=FILE_WIDTH)


def print_report(report: Report, output: str, out: Console, *, per_matrix: bool) -> None:
    out.print(*drawn(report.shown(per_matrix=per_matrix)), sep="\n")
    _print_written(output, out)


def print_export(result: Exported, output: str, out: Console) -> None:
    out.print(escape(result.about))
    out.print("" if result.params is None else f"{result.params:,} parameters, ", end="")
    out.print(size(result.bytes))
    for text in result.warnings:
        out.print(warning(text))
    if result.comparison:
        out.print(result.comparison.in_words())
    out.print(f"Written to [bold]{escape(output)}[/].")


def print_pruning(result: Smaller, output: str, out: Console) -> None:
    out.print(*drawn(result.shown()), sep="\n")
    _print_written(output, out)


def _print_written(output: str, out: Console) -> None:
    """Where an artifact is, and the command that checks it, to be pasted into a shell."""
    out.print(f"Written to [bold]{escape(output)}[/]. Check it: mpoe-convert verify {escape(quote(output))}")


def print_evaluation(result: Evaluation, out: Console) -> None:
    unit = "tokens" if result.task in ("causal", "masked") else "examples"
    rows = []
    model, other_model = short_paths([result.model, str(result.other or result.model)])
    for name, metric in result.metrics.items():
        found = {model: metric}
        if result.against and result.differences:
            other = result.differences.get(name) or result.differences[f"{name} ratio"]
            header = f"{other_model} (against)" if other_model == model else other_model
            found |= {header: result.against[name], "difference": other}
        texts = {column: m.in_words() for column, m in found.items()}
        rows.append({"": name} | texts)
    out.print(Table(f"{result.count:,} {unit}, 95 % intervals", tuple(rows)).rich())
    if result.other and "perplexity" in result.metrics:
        out.print("Perplexities are compared by their ratio.", highlight=False)
    out.print(*result.notes, sep="\n", end="\n" if result.notes else "", highlight=False)


def print_training(report: dict, output: str, out: Console) -> None:
    from ..training.card import outcome, score_in_words, steps_taken

    names = {"eval_loss": "loss", "eval_perplexity": "perplexity", "eval_accuracy": "accuracy"}
    held_out = {entry["step"]: entry for entry in report["log"] if "eval_loss" in entry}
    rows = tuple(
        {"step": step}
        | {name: score_in_words(key, entry[key]) for key, name in names.items() if key in entry}
        for step, entry in held_out.items()
    )
    if rows:
        out.print(Table("Held-out data", rows).rich())
    out.print(*outcome(report), sep="\n", highlight=False)
    out.print(f"{steps_taken(report)}; written to {escape(output)}", highlight=False)


def training_line(logs: Mapping[str, float]) -> str:
    """One logged dictionary of Trainer in words."""
    shown = {"loss": "loss", "eval_loss": "held-out loss", "eval_perplexity": "perplexity"}
    shown |= {"eval_accuracy": "accuracy", "grad_norm": "gradient norm", "learning_rate": "learning rate"}
    parts = [f"{name} {logs[key]:.4g}" for key, name in shown.items() if key in logs]
    entropies = {key: value for key, value in logs.items() if key.startswith("load_entropy/")}
    if entropies:
        worst = min(entropies, key=lambda name: entropies[name])
        mean = sum(entropies.values()) / len(entropies)
        parts.append(f"load entropy {mean:.3f} (lowest {entropies[worst]:.3f}, {worst.partition('/')[2]})")
    numbers = [value for key, value in logs.items() if key.startswith("experts_per_token/")]
    if numbers:
        parts.append(f"experts per token {sum(numbers) / len(numbers):.2f}")
    return "  ".join(parts)


def print_verification(result: Verification, out: Console) -> None:
    compared = f"compared with {result.against} in float32:"
    if result.reference_error is not None:
        compared = f"not compared with {result.against}, because {result.reference_error}"
    out.print(escape(f"{result.artifact} loads as {result.model_class} by {result.auto_class}; {compared}"))
    rows = tuple({"outputs": name, "": value} for name, value in result.rows().items())
    out.print(Table("", rows, left=("outputs",)).rich())
    verdict = "DIFFERENT" if result.is_sound else "DAMAGED"
    for problem in result.problems():
        out.print(f"[red]{verdict}[/]: {escape(problem)}")
    if not result.ok:
        return
    if result.tolerance is None:
        why = "it was trained since" if result.trained else "it leaves out neurons of the dense model's FFNs"
        out.print(f"[green]OK[/]: it loads, is finite, and agrees with its reports; {why}.")
    elif result.relative_difference is not None and result.relative_difference < NEAR:
        out.print("[green]OK[/]: the outputs agree.")
    else:
        out.print("[green]OK[/]: the outputs differ, and by no more than is allowed.")


def print_summary(summary: Summary, out: Console) -> None:
    block, recipe = summary.config["mpoe"], summary.report["recipe"]
    of_mixture = "experts" in block["family"]
    converted = counted(len(block["ffns"]), "layer" if of_mixture else "FFN")
    revision = f" at {summary.report['revision']}" if summary.report["revision"] else ""
    out.print(
        f"[bold]{escape(summary.folder)}[/]: {summary.config['model_type']}, "
        f"{converted} of {block['num_experts']} experts, "
        f"{in_short(of_block(block), block['top_k'], block.get('threshold'))}"
        f"{f', and {shared} shared' if (shared := block.get('shared_experts')) else ''}; from "
        f"{escape(recipe['model'])}{revision}"
    )
    parts = tuple(
        {"part": part, "tensors": count, "parameters": params, "bytes": size(num_bytes)}
        for part, (count, params, num_bytes) in summary.parts.items()
    )
    out.print(Table("Parts", parts, left=("part",)).rich())
    out.print(_forms_table(block).rich())
    out.print(f"Loads by {', '.join(summary.heads)}.")
    if block.get("base_auto_map"):
        out.print("Its base has custom code, which lies in the folder and is run with it.")
    for line in _measured_of_experts(summary) if of_mixture else _measured(summary):
        out.print(line)
    if summary.bits:
        worst = max((summary.report.get("rounding") or {"errors": {"": 0.0}})["errors"].values())
        out.print(
            f"Large cores are rounded to {summary.bits} bits, which changes the matrices by up to "
            f"{worst:.2e} of their norm; loading needs pip install compressed-tensors."
        )
    for text in summary.report["warnings"]:
        out.print(warning(text))


def _measured(summary: Summary) -> Iterator[str]:
    """The errors of an artifact of a dense model, and what was pruned since."""
    recipe, report = summary.report["recipe"], summary.report
    layout = f", layout {recipe['layout']}" if recipe["layout"] else ""
    yield (
        f"Largest relative error {report['max_relative_error']:.2e}, clone drift "
        f"{report['max_clone_drift']:.2e}; {recipe['kind']} experts{layout}, noise {recipe['noise']:g}, seed "
        f"{recipe['seed']}."
    )
    for step in report.get("pruning", ()):
        yield f"Of {step['experts_before']} experts per mixture {step['experts']} were left, by {step['by']}."


def _measured_of_experts(summary: Summary) -> Iterator[str]:
    """The same where the source was a mixture."""
    recipe, fewer = summary.report["recipe"], summary.report.get("fewer_experts")
    if fewer:
        yield (
            f"Of {fewer['source_experts']} experts per layer {summary.config['mpoe']['num_experts']} are "
            "left, with the routers' rows for them."
        )
    kept = "all numbers" if recipe["keep"] is None else f"{recipe['keep']:.1%} of the numbers at most"
    whose = "these experts" if fewer and recipe["keep"] is None else "the source's experts"
    routers = "" if fewer else "; its routers"
    yield f"Largest relative error {summary.report['max_relative_error']:.2e}; {kept} of {whose}{routers}."


def _forms_table(block: dict) -> Table:
    """What the projections of the FFNs are made of, one row per form and term."""
    rows: list[dict[str, Cell]] = []
    unit = "layers" if "experts" in block["family"] else "FFNs"
    for number, form in enumerate(block["forms"]):
        count = sum(index == number for index in block["ffns"].values())
        for role, spec in form.items():
            start: dict[str, Cell] = {unit: str(count), "projection": role}
            if role == "adapter":
                widths = spec if isinstance(spec, int) else "/".join(map(str, spec))
                rows.append(start | {"sites (in x out)": f"width {widths}"})
                continue
            rows += [
                start
                | {
                    "sites (in x out)": f"{listed(term['in_dims'])} x {listed(term['out_dims'])}",
                    "bonds": listed_bonds(term),
                    "shared cores": listed(k for k, shared in enumerate(term["shared"]) if shared) or "none",
                    "bias": spec["bias"],
                }
                for term in spec["terms"]
            ]
    left = (unit, "projection", "sites (in x out)", "bonds", "shared cores", "bias")
    return Table("Projections, cores counted from 0", tuple(rows), left)


def print_push(pushed: Pushed, out: Console) -> None:
    what = f"{counted(len(pushed.files), 'file')}, {size(pushed.num_bytes)}"
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


def print_families(families: Iterable[Mapping[str, list[str]]], out: Console) -> None:
    rows = tuple(
        {
            "model types": ", ".join(row["model_types"]),
            "layers": ", ".join(row["layers"]),
            "tensors": ", ".join(dict.fromkeys(row["projections"])),
        }
        for row in families
    )
    out.print(Table("Families", rows, left=("model types", "layers", "tensors")).rich())
    out.print('Others by hand: --ffn "layers.{}.mlp:gate_proj,up_proj,down_proj"')
    out.print(
        "Mixtures of experts are converted too, these also by hand:", '--experts-at "layers.{}.mlp.experts"'
    )
