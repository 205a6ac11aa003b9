"""How much reconstruction error a model survives: examples/tiny-gpt2, before any retraining.

    python examples/benchmarks/error_and_perplexity.py [--json FILE]

The demo model is converted in several ways and evaluated on its own held-out text, as its training
script does it. Another Python version than the one that it was trained on has slightly different text.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from mpoe_convert import Recipe, convert

EXAMPLES = Path(__file__).resolve().parents[1]
WAYS = [
    *({"layout": layout, "noise": noise} for layout in ("one-sided", "two-sided") for noise in (0.0, 0.01)),
    *({"noise": noise} for noise in (0.03, 0.1, 0.3, 1.0)),
    *({"layout": "balanced", "bond_dim": bond, "noise": 0.0} for bond in (64, 48, 32, 24, 16, 8, 4)),
]


def held_out_stream(tokenizer):
    """(tokens, bytes) of the demo model's held-out documents."""
    sys.path.insert(0, str(EXAMPLES))
    import train_tiny_gpt2 as training

    _, held_out = training.split(training.collect_documents())
    size = sum(len(document.encode()) for document in held_out)
    return training, training.pack(tokenizer, held_out), size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    source = EXAMPLES / "tiny-gpt2"
    tokenizer = AutoTokenizer.from_pretrained(source)
    training, stream, size = held_out_stream(tokenizer)

    def perplexity(folder) -> float:
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        return training.evaluate(model, stream, size)["perplexity"]

    dense = perplexity(source)
    rows = [{"way": "dense base", "error": 0.0, "drift": 0.0, "perplexity": dense}]
    with tempfile.TemporaryDirectory() as folder:
        for number, way in enumerate(WAYS):
            report = convert(Recipe(str(source), **way), f"{folder}/{number}")
            text = ", ".join(f"{key} {value}" for key, value in way.items())
            row = {"way": text, "error": report.max_error, "drift": report.max_drift}
            rows.append(row | {"perplexity": perplexity(f"{folder}/{number}")})
            assert way["noise"] or report.max_error > 1e-6 or abs(rows[-1]["perplexity"] - dense) < 1e-3
    table = Table("conversion", "largest error", "clone drift", "held-out perplexity")
    for row in rows:
        table.add_row(row["way"], f"{row['error']:.1e}", f"{row['drift']:.1e}", f"{row['perplexity']:.2f}")
    Console(width=110).print(table)
    print(json.dumps(rows, indent=2))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
