"""Fine-tune a converted model with the stock Trainer, on the text of Python's own documentation topics.

    python examples/finetune_with_trainer.py [ARTIFACT] [OUTPUT] [--steps N]

Needs accelerate (pip install "mpoe-convert[train]"). The script would train the dense model just as well: a
converted model is a transformers model.
"""

import argparse
import pydoc_data.topics

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments


def make_windows(tokenizer, length: int) -> list[dict]:
    """The language topics as token windows of equal length, inputs and labels the same."""
    text = "\n\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    tokens = tokenizer(text, return_tensors="pt").input_ids[0]
    windows = tokens[: len(tokens) // length * length].reshape(-1, length)
    return [{"input_ids": window, "labels": window} for window in windows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("artifact", nargs="?", default="out")
    parser.add_argument("output", nargs="?", default="out-finetuned")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.artifact, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(options.artifact, trust_remote_code=True)
    windows = make_windows(tokenizer, length=128)
    arguments = TrainingArguments(
        output_dir=options.output,
        max_steps=options.steps,
        per_device_train_batch_size=8,
        learning_rate=5e-4,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        seed=0,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=windows[8:])
    before = loss(model, windows[:8])
    trainer.train()
    print(f"loss on windows left out of training: {before:.3f} -> {loss(model, windows[:8]):.3f}")
    trainer.save_model(options.output)  # modeling_mpoe.py goes with it
    tokenizer.save_pretrained(options.output)


@torch.no_grad()
def loss(model, windows: list[dict]) -> float:
    model.eval()
    tokens = torch.stack([window["input_ids"] for window in windows]).to(model.device)
    return model(input_ids=tokens, labels=tokens).loss.item()


if __name__ == "__main__":
    main()
