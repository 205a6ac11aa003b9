"""What self-contrast changes: next-token accuracy, loss, repetition and speed of a fine-tuned model.

    python examples/benchmarks/self_contrast.py MODEL TEXT

MODEL is a language model of mpoe-convert, whose source was a mixture, or which is fine-tuned, because experts
of a fresh one are alike; TEXT a file that it was not trained on. The logits of the chosen experts and of the
weak ones are contrasted as `generate` does (SCMoE, arXiv 2405.14507). Greedy decoding goes on from windows of
the file.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

STRENGTHS = (0.1, 0.25, 0.5, 0.9)
ALPHA = 0.1  # share of the best token's probability that a plausible one has
LENGTH, PROMPT, NEW = 256, 24, 120


def windows(model: str, text: Path, count: int) -> Tensor:
    """(count, LENGTH) token ids from the start of the file."""
    ids = AutoTokenizer.from_pretrained(model, trust_remote_code=True)(text.read_text(encoding="utf-8"))
    return torch.tensor(ids["input_ids"][: count * LENGTH]).view(-1, LENGTH)


def logits_of(model, rows: Tensor) -> tuple[Tensor, Tensor]:
    """(N, vocabulary) of all positions but the last, of the chosen experts and of the weak ones."""
    choosing_both, found = sys.modules[type(model).__module__].choosing_both, []
    with torch.no_grad(), choosing_both(model):
        for part in rows.split(8):
            halves = model(torch.cat([part, part])).logits[:, :-1].tensor_split(2)
            found.append([half.flatten(0, 1) for half in halves])
    strong, weak = (torch.cat(halves) for halves in zip(*found, strict=True))
    return strong, weak


def predictions(model, rows: Tensor) -> None:
    """Accuracy of the most probable token, and loss among plausible tokens, by strength."""
    strong, weak = logits_of(model, rows)
    labels = rows[:, 1:].flatten()
    implausible = strong < strong.amax(-1, keepdim=True) + torch.tensor(ALPHA).log()
    inside = ~implausible.gather(1, labels[:, None]).squeeze(1)
    losses = [f"{F.cross_entropy(logits, labels):.4f}" for logits in (strong, weak)]
    print(f"{len(labels):,} tokens; loss {losses[0]}, of the weak experts alone {losses[1]}")
    for strength in (0.0, *STRENGTHS):
        contrast = ((1 + strength) * strong - strength * weak).masked_fill(implausible, -torch.inf)
        accuracy = (contrast.argmax(-1) == labels).float().mean()
        loss = F.cross_entropy(contrast[inside], labels[inside])
        print(f"strength {strength}: accuracy {accuracy:.4f}, loss among plausible tokens {loss:.4f}")


def repetition(model, prompts: Tensor) -> None:
    """Share of the 4-grams of greedy texts that have occurred in the text before."""
    for strength in (0.0, *STRENGTHS):
        made = greedy(model, prompts, NEW, strength)[:, prompts.shape[1] :].tolist()
        grams = [[tuple(row[i : i + 4]) for i in range(len(row) - 3)] for row in made]
        share = statistics.mean(1 - len(set(each)) / len(each) for each in grams)
        print(f"strength {strength}: repeated 4-grams {share:.3f}")


def latency(model, prompts: Tensor, rounds: int = 5) -> None:
    """Time with self-contrast over time without, medians of alternating runs."""
    seconds = {0.0: [], 0.5: []}
    for _ in range(rounds):
        for strength, found in seconds.items():
            start = time.perf_counter()
            greedy(model, prompts, 64, strength)
            found.append(time.perf_counter() - start)
    ratio = statistics.median(seconds[0.5]) / statistics.median(seconds[0.0])
    print(f"batch {len(prompts)}: {ratio:.2f} times the time")


def greedy(model, prompts: Tensor, new: int, strength: float) -> Tensor:
    mask = torch.ones_like(prompts)
    lengths = {"max_new_tokens": new, "min_new_tokens": new}
    return model.generate(prompts, attention_mask=mask, do_sample=False, self_contrast=strength, **lengths)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--windows", type=int, default=48)
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(options.model, trust_remote_code=True).eval()
    rows = windows(options.model, options.text, options.windows)
    predictions(model, rows)
    repetition(model, rows[:32, :PROMPT])
    for batch in (1, 16):
        latency(model, rows[:batch, :PROMPT])


if __name__ == "__main__":
    main()
