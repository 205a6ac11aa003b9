"""Published ways to compress a mixture, from their papers' formulas, for `compression_mixtures.py`.

HC-SMoE (arXiv 2410.08589), D2-MoE (arXiv 2502.17298), MoBE (arXiv 2508.05257), SLBF (arXiv 2610.09342),
rounding to nearest; routers without some experts; and how often greedy text falls into a loop.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mpoe_convert.compression.expert_moments import expert_outputs, hidden_neurons
from mpoe_convert.decomposition.stack_bases import alone


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


# (parameters: A (n, d1, r), mixing logits (n, m), and those of the bases; the bases (m, r, d2) of the latter)
Start = tuple[list[Tensor], Callable[..., Tensor]]


def mixed(a: Tensor, logits: Tensor, bases: Tensor) -> Tensor:
    """W_i = A_i silu(sum_j softmax(logits_i)_j B_j): (n, d1, d2) of (n, d1, r), (n, m), (m, r, d2)."""
    return a @ _mixture(logits, bases)


def _mixture(logits: Tensor, bases: Tensor) -> Tensor:
    return torch.nn.functional.silu(torch.einsum("nm,mrd->nrd", logits.softmax(-1), bases))


def mobe_start(stack: Tensor, numbers: int) -> Start:
    """MoBE of (n, d1, d2) in n d1 r + m r d2 + n m numbers: m = n / 2 bases, of the largest rank r <= d1.

    A and one basis of every n / m experts, from the SVD of all their rows.
    """
    n, d1, d2 = stack.shape
    m = max(n // 2, 1)
    r = min((numbers - n * m) // (n * d1 + m * d2), d1)
    u, s, vh = torch.linalg.svd(stack.reshape(m, n // m * d1, d2), full_matrices=False)
    a = (u[..., :r] * s[:, None, :r]).reshape(n, d1, r)
    return [a, torch.eye(m).repeat_interleave(n // m, 0), vh[:, :r].clone()], lambda bases: bases


def slbf_start(stack: Tensor, numbers: int, owned: float = 0.65) -> Start:
    """SLBF of (n, d1, d2) in n d1 r + n k (r + d2 - k) + n^2 numbers, at most the share `owned` of them in A.

    Ranks r <= d1, k <= r. A: left singular vectors; U = [1; 0] and V, right ones; an expert's basis is U V.
    """
    n, d1, d2 = stack.shape
    r = min(int(owned * numbers / (n * d1)), d1)
    k = max(k for k in range(1, r + 1) if n * (d1 * r + k * (r + d2 - k) + n) <= numbers or k == 1)
    u, _, vh = torch.linalg.svd(stack, full_matrices=False)
    left = torch.eye(r, k).to(stack).repeat(n, 1, 1)
    return [u[..., :r].clone(), torch.eye(n), left, vh[:, :k].clone()], lambda u, v: u @ v


def trained_bases(
    stack: Tensor, start: Start, steps: int, rate: float, slower: float, decay: float
) -> tuple[Tensor, float]:
    """A mixture of bases trained on weights (n, d1, d2): these, and their relative squared error.

    AdamW on the mean squared error of the weights over their standard deviation, its rate falling to nothing
    by a cosine. A is solved for in the end.

    Args:
        rate: of A and the logits; times `slower`, of the bases.
    """
    aim = stack / stack.std()
    parameters = [part.detach().float().requires_grad_() for part in start[0]]
    groups = [{"params": parameters[:2]}, {"params": parameters[2:], "lr": slower * rate}]
    optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16):
            made = mixed(*parameters[:2], start[1](*parameters[2:]))
        optimizer.zero_grad()
        (made.float() - aim).square().mean().backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        mixture = _mixture(parameters[1], start[1](*parameters[2:])).double()
        made = torch.linalg.lstsq(mixture.mT, aim.mT.double()).solution.mT @ mixture
    error = float((made - aim).square().sum() / aim.double().square().sum())
    return (made * stack.std()).to(stack.dtype), error


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
