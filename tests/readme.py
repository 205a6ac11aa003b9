"""The generated parts of README.md: `python tests/readme.py` writes them, a test checks them."""

import re
from pathlib import Path

import click

README = Path(__file__).parents[1] / "README.md"


def options_table(name: str) -> str:
    """Every option of a command, in the order and the words of --help."""
    from mpoe_convert.cli import main

    rows = ["| option | meaning |", "|---|---|"]
    command = main.commands[name]
    context = click.Context(command)
    for param in command.get_params(context):
        if isinstance(param, click.Option) and "--help" not in param.opts:
            record = param.get_help_record(context)
            meaning = re.sub(r"\s+", " ", record[1]).replace("|", "\\|")
            names = record[0].replace("|", "\\|")  # in a table, also within code
            rows.append(f"| `{names}` | {meaning} |")
    return "\n".join(rows)


def families_table() -> str:
    """The table of families, as `mpoe-convert families --json` has it."""
    from mpoe_convert.families import families_json

    rows = ["| `model_type` | layers | tensors | gated |", "|---|---|---|---|"]
    for row in families_json():
        types = ", ".join(row["model_types"])
        layers = ", ".join(f"`{layer}`" for layer in row["layers"])
        tensors = ", ".join(f"`{name}`" for name in dict.fromkeys(row["projections"]))
        rows.append(f"| {types} | {layers} | {tensors} | {'yes' if row['gated'] else 'no'} |")
    return "\n".join(rows)


def moe_table() -> str:
    """Which families have an exact mixture in transformers."""
    from mpoe_convert.moe_targets import MOE_TARGETS

    rows = ["| base | mixture | combine weights | layers left dense | llama.cpp |", "|---|---|---|---|---|"]
    for row in MOE_TARGETS:
        weights = ", ".join(row.weighing) + ("" if row.top_k else ", one expert per token")
        dense = "yes" if row.dense_layers else "no"
        engine = row.llama_cpp or "no"
        rows.append(f"| {', '.join(row.sources)} | {row.model_type} | {weights} | {dense} | {engine} |")
    return "\n".join(rows)


def with_generated_parts(text: str) -> str:
    """The README with its generated parts made anew."""
    tables = {
        "options": options_table("convert"),
        "finetune": options_table("finetune"),
        "export": options_table("export"),
        "moe": moe_table(),
        "push": options_table("push"),
        "families": families_table(),
    }
    for name, table in tables.items():
        pattern = rf"(<!-- {name}: [^\n]*-->\n).*?(<!-- end of {name} -->)"
        text, count = re.subn(
            pattern, lambda match, table=table: f"{match[1]}{table}\n{match[2]}", text, flags=re.DOTALL
        )
        assert count == 1, name
    return text


if __name__ == "__main__":
    README.write_text(with_generated_parts(README.read_text(encoding="utf-8")), encoding="utf-8")
