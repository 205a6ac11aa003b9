"""Collect second moments at every expert of a mixture on calibration text.

::

    x, experts, weights --[experts module]--> sum_e g_e(x) f_e(x)       f_e(x) = down_e(h)
                               |                                       h = act(gate_e(x)) * up_e(x)
        per expert: sum g^2 x^T x,  sum g^2 h^T h,  sum g norm(f(x)),  tokens

Since transformers 5 the sparse blocks call a module `experts` with the hidden states, the chosen experts and
their combine weights g; router, routing rule and shared experts stay the stock code's. That module's experts
are run here one after the other on the same arguments, with the module's own weights and activation, so that
nothing is computed twice. All batches wait for each other in front of every such module: the moments of one
layer alone are in memory.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..decomposition.symmetric import add_gram, packed_length, packed_size, unpacked
from .batches import Batch, is_held_out, token_mask
from .lockstep import Lockstep
from .stream import check_activations, run_batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# An expert's moment borrows from its layer's as if it had seen so many more tokens per input feature.
BORROWED = 1 / 16

_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "_apply_gate", "down_proj")

Save = Callable[[str, "ExpertScores"], None]


@dataclass(frozen=True, eq=False)
class ExpertScores:
    """What calibration found at the experts of one layer: sums over the tokens that are routed to each.

    Attributes:
        tokens: (E,) int64.
        total: tokens of the layer.
        saliency: (E,) sums of norm(g f(x)) in float64.
    """

    tokens: Tensor
    total: int
    saliency: Tensor

    @property
    def scores(self) -> Tensor:
        """(E,) float64, REAP's S_j: the mean of g_j norm(f_j) over the tokens routed to expert j; 0 without.

        arXiv 2510.13999; g is the weight that the router gave the expert, renormalised over the chosen ones
        where the router does so.
        """
        return self.saliency / self.tokens.clamp(min=1)


@dataclass(frozen=True, eq=False)
class ExpertMoments(ExpertScores):
    """The same, with second moments.

    Attributes:
        inputs: (E, packed in x in) sums of g^2 x^T x in float32, see `decomposition.symmetric`.
        inner: (E, packed inner x inner) sums of g^2 h^T h.
    """

    inputs: Tensor
    inner: Tensor

    def of(self, experts: Sequence[int]) -> ExpertMoments:
        """Those of some experts alone; `total` stays that of the layer."""
        kept = torch.tensor(experts)
        tensors = (self.saliency, self.inputs, self.inner)
        return ExpertMoments(self.tokens[kept], self.total, *(tensor[kept] for tensor in tensors))

    def metric(self, place: str, borrowed: float = BORROWED) -> Borrowing:
        """The moments of the inputs ("inputs") or hidden neurons ("inner"), one expert's at a time."""
        return Borrowing(getattr(self, place), self.tokens, self.total, borrowed)


class Borrowing(Sequence[Tensor]):
    """M_e per token of the layer, with what expert e borrows: (S_e + c M) / total.

    S_e is the sum over its own n_e tokens, M the mean over all tokens of all experts, c = `borrowed` times
    the number of features. This is (n_e + c) / total times (n_e M_e + c M) / (n_e + c): the moment shrinks
    towards the layer's, and an expert that saw no token counts as one that saw c.
    """

    def __init__(self, sums: Tensor, tokens: Tensor, total: int, borrowed: float) -> None:
        self.sums, self.total = sums, max(total, 1)
        features = packed_size(sums.shape[-1])
        self.extra = sum_of(sums) * (borrowed * features / max(int(tokens.sum()), 1))

    def __len__(self) -> int:
        return len(self.sums)

    def __getitem__(self, expert: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not 0 <= expert < len(self):
            raise IndexError(expert)
        return unpacked((self.sums[expert] + self.extra) / self.total)


def unseen_experts(tokens: Tensor) -> list[int]:
    """Experts that no token of the calibration text was routed to, by `ExpertMoments.tokens`."""
    return [expert for expert, count in enumerate(tokens.tolist()) if not count]


def sum_of(sums: Tensor) -> Tensor:
    """(length,) in float64 of (E, length), without a float64 copy of all."""
    total = torch.zeros_like(sums[0], dtype=torch.float64)
    for each in sums:
        total += each
    return total


def is_experts(module: nn.Module) -> bool:
    """Whether a module is one that sparse blocks call with hidden states, chosen experts and weights."""
    return all(hasattr(module, name) for name in _FLAGS)


def hidden_neurons(module: Any, expert: int, rows: Tensor) -> Tensor:
    """h of one expert for rows (N, in) -> (N, inner)."""
    if module.has_gate:
        return module._apply_gate(_project(module, "gate_up_proj", expert, rows))
    return module.act_fn(_project(module, "up_proj", expert, rows))


def expert_outputs(module: Any, expert: int, inner: Tensor) -> Tensor:
    """What an expert gives for its hidden neurons (N, inner) -> (N, in), before its combine weight."""
    y = _project(module, "down_proj", expert, inner)
    return module.post_expert_norm(y) if getattr(module, "has_post_expert_norm", False) else y


def _project(module: Any, name: str, expert: int, rows: Tensor) -> Tensor:
    weight = getattr(module, name)[expert]
    y = rows @ (weight if module.is_transposed else weight.mT)
    return y + getattr(module, f"{name}_bias")[expert] if module.has_bias else y


def collect(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    save: Save,
    *,
    wanted: Callable[[str], bool] = lambda path: True,
    moments: bool = True,
) -> None:
    """Run the stock mixture over its batches; moments are summed over those that are not held out.

    Args:
        model: in eval mode, without a cache.
        batches: as for `DenseRun`.
        save: called with the path of every experts module in `model` and what was found there, in the order
            of the layers.
        wanted: whether a path's moments are collected.
        moments: False: `ExpertScores` alone, which take no memory.

    Raises:
        CheckpointError: the model computes NaN or Inf.
    """
    modules: dict[str, nn.Module] = {}
    modules |= {path: m for path, m in model.named_modules() if is_experts(m) and wanted(path)}
    walk = _Walk(model, batches, save, len(modules), moments)
    with torch.no_grad(), _run_by(walk, modules):
        walk.lockstep.run([partial(run_batch, model, batch) for batch in batches], walk.release)


@contextmanager
def _run_by(walk: _Walk, modules: dict[str, nn.Module]) -> Iterator[None]:
    """The modules' forward passes go through the walk."""
    # accelerate keeps the module's own forward under this name, and calls it once the weights are there.
    names = {path: "_old_forward" if hasattr(m, "_old_forward") else "forward" for path, m in modules.items()}
    kept = {path: m.__dict__.get(names[path]) for path, m in modules.items()}
    handles = [m.register_forward_pre_hook(walk.wait, with_kwargs=True) for m in modules.values()]
    for path, module in modules.items():
        signature = inspect.signature(getattr(module, names[path]))
        setattr(module, names[path], partial(_call, walk, path, module, signature))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for path, module in modules.items():
            if kept[path] is None:
                delattr(module, names[path])
            else:
                setattr(module, names[path], kept[path])


def _call(
    walk: _Walk, path: str, module: nn.Module, signature: inspect.Signature, *args: Tensor, **kwargs: Tensor
) -> Tensor:
    return walk.meet(path, module, *signature.bind(*args, **kwargs).args)


class _Walk:
    """All batches side by side; the sums of the layer that they are at."""

    def __init__(
        self, model: PreTrainedModel, batches: Sequence[Batch], save: Save, count: int, moments: bool
    ) -> None:
        self.model, self.batches, self.save = model, batches, save
        self.make = _MomentSums if moments else _Sums
        self.lockstep = Lockstep()
        self.path, self.sums = "", None
        self.calls_left = [count] * len(batches)

    def wait(self, *_: object) -> None:
        """In front of a module's own forward pass, where streamed weights are not there yet."""
        self.lockstep.wait()

    def release(self) -> None:
        if self.sums is not None:
            self.save(self.path, self.sums.finish())
        self.sums = None

    def meet(self, path: str, module: nn.Module, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """What the module computes; x (tokens, in), experts and weights (tokens, k)."""
        current = self.lockstep.current
        if self.sums is None:
            self.path, self.sums = path, self.make(module, x)
        y = self.sums.add(module, x, experts, weights, self._counted(x))
        check_activations(y, path)
        self.calls_left[current] -= 1
        if not self.calls_left[current]:
            self.lockstep.stop()  # behind the last experts
        return y

    def _counted(self, x: Tensor) -> Tensor:
        """(tokens,) which of the rows that the current pass brings to the experts are summed."""
        batch = self.batches[self.lockstep.current]
        if is_held_out(self.lockstep.current, self.batches):
            return x.new_zeros(len(x), dtype=torch.bool)
        mask = token_mask(self.model, batch, decoder=".decoder." in f".{self.path}")
        if mask is None or mask.numel() != len(x):
            return x.new_ones(len(x), dtype=torch.bool)
        return mask.reshape(-1).bool().to(x.device)


class _Sums:
    """Sums over batches that become the `ExpertScores` of one layer."""

    def __init__(self, module: Any, x: Tensor) -> None:
        self.total = 0
        self.tokens = torch.zeros(len(module.down_proj), dtype=torch.int64)
        self.saliency = torch.zeros(len(module.down_proj), dtype=torch.float64)

    def add(self, module: nn.Module, x: Tensor, experts: Tensor, weights: Tensor, counted: Tensor) -> Tensor:
        """Run the experts; add what the counted tokens (tokens,) give."""
        order = experts.reshape(-1).argsort(stable=True)  # (token, place) pairs, one expert after the other
        rows = order // experts.shape[1]
        combine = weights.reshape(-1)[order].unsqueeze(-1)  # (pairs, 1)
        is_counted = counted[rows]
        scale = combine.float() * is_counted.unsqueeze(-1)
        chosen, count_experts = experts.reshape(-1)[order], len(self.tokens)
        counts = torch.bincount(chosen, minlength=count_experts)[:count_experts].tolist()
        seen = torch.bincount(chosen[is_counted], minlength=count_experts)[:count_experts].cpu()
        self.total += int(counted.sum())
        self.tokens += seen
        outputs = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, weights.dtype))
        states, start = x[rows], 0
        for expert, count in enumerate(counts):
            own, start = slice(start, start + count), start + count
            if not count:
                continue
            inner = hidden_neurons(module, expert, states[own])
            given = expert_outputs(module, expert, inner) * combine[own]
            outputs.index_add_(0, rows[own], given.to(outputs.dtype))
            if seen[expert]:
                norms = given.float().norm(dim=-1) * is_counted[own]
                self.saliency[expert] += float(norms.sum(dtype=torch.float64))
                self.note(expert, states[own], inner, scale[own])
        return outputs.to(x.dtype)

    def note(self, expert: int, x: Tensor, inner: Tensor, scale: Tensor) -> None:
        """Of an expert's rows: inputs (n, in), hidden neurons (n, inner), weights (n, 1), 0: not counted."""

    def finish(self) -> ExpertScores:
        return ExpertScores(self.tokens, self.total, self.saliency)


class _MomentSums(_Sums):
    """Sums over batches that become the `ExpertMoments` of one layer."""

    def __init__(self, module: Any, x: Tensor) -> None:
        super().__init__(module, x)
        count, (inner, outer) = len(module.down_proj), module.down_proj.shape[1:]
        if not module.is_transposed:
            inner, outer = outer, inner
        self.inputs = torch.zeros(count, packed_length(x.shape[-1]), device=x.device)
        self.inner = torch.zeros(count, packed_length(inner), device=x.device)

    def note(self, expert: int, x: Tensor, inner: Tensor, scale: Tensor) -> None:
        add_gram(self.inputs[expert], x.float() * scale)
        add_gram(self.inner[expert], inner.float() * scale)

    def finish(self) -> ExpertMoments:
        return ExpertMoments(self.tokens, self.total, self.saliency, self.inputs.cpu(), self.inner.cpu())
