"""Score models with EleutherAI's lm-evaluation-harness on a text of your own, converted or dense alike.

    pip install lm-eval
    python examples/lm_eval_own_text.py notes.txt examples/tiny-gpt2 out

The harness's own tasks work as well (they are fetched from the Hub):

    lm_eval --model hf --model_args pretrained=out,trust_remote_code=True --tasks lambada_openai --device cpu
"""

import argparse
import json
import tempfile
from pathlib import Path

import lm_eval
import torch

METRICS = ("word_perplexity", "byte_perplexity", "bits_per_byte")


def own_text(path: Path, folder: Path) -> dict:
    """A task of the harness: rolling log-likelihood of the text's paragraphs, each a document."""
    paragraphs = [part for part in path.read_text(encoding="utf-8").split("\n\n") if part.strip()]
    data = folder / "text.jsonl"
    data.write_text("\n".join(json.dumps({"page": part}) for part in paragraphs), encoding="utf-8")
    return {
        "task": path.stem,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{page}}",
        "metric_list": [
            {"metric": name, "aggregation": aggregation, "higher_is_better": False}
            for name, aggregation in zip(
                METRICS, ("weighted_perplexity",) * 2 + ("bits_per_byte",), strict=True
            )
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("models", nargs="+", help="artifacts, model folders or Hub ids")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        task = own_text(options.text, Path(folder))
        print(f"{'model':40} " + " ".join(f"{name:>16}" for name in METRICS))
        for model in options.models:
            arguments = {"pretrained": model, "trust_remote_code": True}
            found = lm_eval.simple_evaluate(
                model="hf",
                model_args=arguments,
                tasks=[task],
                device="cuda" if torch.cuda.is_available() else "cpu",
                bootstrap_iters=0,
                log_samples=False,
            )
            scores = found["results"][options.text.stem]
            print(f"{model:40} " + " ".join(f"{scores[f'{name},none']:16.4f}" for name in METRICS))


if __name__ == "__main__":
    main()
