"""Real checkpoints: load, score."""

import math

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def load(folder, auto=AutoModelForCausalLM):
    return auto.from_pretrained(folder, trust_remote_code=True).eval()


@torch.no_grad()
def perplexity(model, windows) -> float:
    """exp of the mean negative log-likelihood of every token but the first of each window."""
    return math.exp(model(input_ids=windows, labels=windows).loss.item())


def windows_of(folder, text: str, length: int, count: int) -> torch.Tensor:
    tokens = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids[0]
    return tokens[: length * count].reshape(count, length)
