"""Published ways to compress a mixture, from their papers' formulas, for `compression_mixtures.py`.

REAP (arXiv 2510.13999), HC-SMoE (arXiv 2410.08589), D2-MoE (arXiv 2502.17298), rounding to nearest; and how
often greedy text falls into a loop.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mpoe_convert.compression.expert_moments import expert_outputs, hidden_neurons
from mpoe_convert.decomposition.stack_bases import alone


def saliencies(module, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
    """REAP's S_j, (E,): the mean of g_j norm(f_j) over the tokens routed to expert j; 0 if there are none.

    Args:
        module: stock experts.
        x: (tokens, in).
        experts, weights: (tokens, k), from the router.
    """
    found = torch.zeros(len(module.down_proj), dtype=torch.float64)
    for expert in range(len(found)):
        rows, places = (experts == expert).nonzero(as_tuple=True)
        if len(rows):
            answers = expert_outputs(module, expert, hidden_neurons(module, expert, x[rows]))
            found[expert] = (weights[rows, places] * answers.norm(dim=-1)).double().mean()
    return found


def dropped_experts(scores: Tensor, kept: int) -> list[int]:
    """The experts with the lowest scores (E,), all but `kept`; of equal ones the later ones."""
    order = scores.argsort(descending=True, stable=True)
    return sorted(order[kept:].tolist())


def without(dropped: Sequence[int], top_k: int):
    """A forward hook of a router that chooses among the other experts, combine weights renormalised."""

    def route(module, args, output):
        logits = output[0].clone()
        logits[:, list(dropped)] = -torch.inf
        top = logits.softmax(-1, dtype=torch.float).topk(top_k, dim=-1)
        weights = top.values / top.values.sum(-1, keepdim=True)
        return output[0], weights.to(output[1]), top.indices

    return route


def mean_outputs(module, rows: Tensor) -> Tensor:
    """(E, out) float64: every expert's mean answer to the same rows (N, in)."""
    return torch.stack(
        [
            expert_outputs(module, expert, hidden_neurons(module, expert, rows)).double().mean(0)
            for expert in range(len(module.down_proj))
        ]
    )


def clusters(features: Tensor, count: int) -> list[list[int]]:
    """HC-SMoE's `count` groups of experts with like features (E, n): average linkage on Euclidean distances.

    The two groups whose members lie nearest on average are joined until `count` are left; the groups, and the
    members of each, in ascending order.
    """
    distances = torch.cdist(features.double(), features.double())
    groups = [[expert] for expert in range(len(features))]
    while len(groups) > max(count, 1):
        pairs = [(a, b) for b in range(len(groups)) for a in range(b)]
        a, b = min(pairs, key=lambda pair: float(distances[groups[pair[0]]][:, groups[pair[1]]].mean()))
        groups[a] = sorted(groups[a] + groups.pop(b))
    return sorted(groups)


def merged(stack: Tensor, groups: Sequence[Sequence[int]], tokens: Tensor) -> Tensor:
    """A stack (E, ...) in which every expert is the mean of its group, weighed by their tokens (E,)."""
    found = torch.empty_like(stack)
    for group in map(list, groups):
        shares = tokens[group].double()
        shares = shares / shares.sum() if shares.any() else torch.full_like(shares, 1 / len(group))
        found[group] = torch.tensordot(shares, stack[group].double(), dims=1).to(stack.dtype)
    return found


def base_and_differences(
    stack: Tensor, fisher: Tensor, moments: Sequence[Tensor], rank: int
) -> tuple[Tensor, Tensor]:
    """D2-MoE: the base sum F_e o W_e / sum F_e, (in, out), and base and cut differences, (E, in, out).

    The differences are cut by whitened SVDs.

    Args:
        stack: W_e, (E, in, out).
        fisher: F_e, (E, in, out), squared gradients.
        moments: (in, in), of every expert's inputs.
        rank: of the differences.
    """
    weights = fisher.double() + 1e-12 * float(fisher.mean())
    base = (weights * stack.double()).sum(0) / weights.sum(0)
    found = []
    for matrix, moment in zip(stack, moments, strict=True):
        moment = moment.double() + 1e-6 * moment.diagonal().mean() * torch.eye(len(moment))
        first, second = alone(matrix.double() - base, moment, rank)
        found.append(base + first @ second)
    return base, torch.stack(found).to(stack.dtype)


def rounded(matrix: Tensor, bits: int, group: int = 64) -> Tensor:
    """Each group of entries of a row, times one scale, to the nearest of 2 ** bits - 1 levels around 0.

    Stores bits + 16 / group bits per entry.

    Args:
        matrix: (..., n); a last group may be shorter.
    """
    most = 2 ** (bits - 1) - 1
    parts = []
    for part in matrix.split(group, dim=-1):
        scale = part.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(part.dtype).tiny) / most
        parts.append((part / scale).round() * scale)
    return torch.cat(parts, -1)


def rounded_between(matrix: Tensor, bits: int, group: int) -> Tensor:
    """Each group of entries of a row to the nearest of 2 ** bits levels between its ends; one is 0.

    Stores bits + (16 + bits) / group bits per entry: a scale and a zero point.

    Args:
        matrix: (..., n), n a multiple of `group`.
    """
    groups = matrix.unflatten(-1, (-1, group))
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    most = 2**bits - 1
    step = ((high - low) / most).clamp(min=torch.finfo(matrix.dtype).tiny)
    zero = (-low / step).round()
    return ((((groups / step).round() + zero).clamp(0, most) - zero) * step).flatten(-2)


@torch.no_grad()
def loop_rate(model, prompts: Tensor, new: int = 96, tail: int = 48, period: int = 16) -> float:
    """How many of the greedy continuations of prompts (N, tokens) end in a loop."""
    texts = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
    )
    return float(loops(texts, tail, period).double().mean())


def loops(texts: Tensor, tail: int, period: int) -> Tensor:
    """(N,) bool: whether the last `tail` tokens of (N, tokens) repeat with a period of at most `period`."""
    end = texts[:, -tail:]
    found = [
        (end == texts[:, texts.shape[1] - tail - p : texts.shape[1] - p]).all(1) for p in range(1, period + 1)
    ]
    return torch.stack(found).any(0)
