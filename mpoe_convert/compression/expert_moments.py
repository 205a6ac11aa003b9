"""Collect second moments at every expert of a mixture on calibration text.

::

    x, experts, weights --[experts module]--> sum_e g_e(x) f_e(x)       f_e(x) = down_e(h)
                               |                                       h = act(gate_e(x)) * up_e(x)
        per expert: sum g^2 x^T x,  sum g^2 h^T h,  tokens

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

from .batches import Batch, is_held_out, token_mask
from .lockstep import Lockstep
from .stream import check_activations, run_batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# An expert's moment borrows from its layer's as if it had seen so many more tokens per input feature.
BORROWED = 1 / 16

_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "_apply_gate", "down_proj")

Save = Callable[[str, "ExpertMoments"], None]


@dataclass(frozen=True, eq=False)
class ExpertMoments:
    """What calibration found at the experts of one layer: sums over the tokens that are routed to each.

    Attributes:
        tokens: (E,) int64.
        total: tokens of the layer.
        inputs: (E, in, in) sums of g^2 x^T x.
        inner: (E, inner, inner) sums of g^2 h^T h.
    """

    tokens: Tensor
    total: int
    inputs: Tensor
    inner: Tensor

    @property
    def unseen(self) -> list[int]:
        """Experts that no token of the calibration text was routed to."""
        return [expert for expert, count in enumerate(self.tokens.tolist()) if not count]

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
        self.extra = sum_of(sums) * (borrowed * sums.shape[-1] / max(int(tokens.sum()), 1))

    def __len__(self) -> int:
        return len(self.sums)

    def __getitem__(self, expert: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not 0 <= expert < len(self):
            raise IndexError(expert)
        return (self.sums[expert].double() + self.extra) / self.total


def sum_of(sums: Tensor) -> Tensor:
    """(n, n) in float64 of (E, n, n), without a float64 copy of all."""
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
    dtype: torch.dtype = torch.float64,
    wanted: Callable[[str], bool] = lambda path: True,
) -> None:
    """Run the stock mixture over its batches; moments are summed over those that are not held out.

    Args:
        model: in eval mode, without a cache.
        batches: as for `DenseRun`.
        save: called with the path of every experts module in `model` and what was found there, in the order
            of the layers.
        dtype: of the sums of moments between batches; a batch's own are summed in float32.
        wanted: whether a path's moments are collected.

    Raises:
        CheckpointError: the model computes NaN or Inf.
    """
    modules: dict[str, nn.Module] = {}
    modules |= {path: m for path, m in model.named_modules() if is_experts(m) and wanted(path)}
    walk = _Walk(model, batches, save, dtype, len(modules))
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
        self, model: PreTrainedModel, batches: Sequence[Batch], save: Save, dtype: torch.dtype, count: int
    ) -> None:
        self.model, self.batches, self.save, self.dtype = model, batches, save, dtype
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
            self.path, self.sums = path, _Sums(module, x, self.dtype)
        mask = token_mask(self.model, self.batches[current], decoder=".decoder." in f".{path}")
        counted = None if mask is None or mask.numel() != len(x) else mask.reshape(-1).bool().to(x.device)
        if is_held_out(current, self.batches):
            counted = x.new_zeros(len(x), dtype=torch.bool)
        y = self.sums.add(module, x, experts, weights, counted)
        check_activations(y, path)
        self.calls_left[current] -= 1
        if not self.calls_left[current]:
            self.lockstep.stop()  # behind the last experts
        return y


class _Sums:
    """Sums over batches that become the `ExpertMoments` of one layer."""

    def __init__(self, module: Any, x: Tensor, dtype: torch.dtype) -> None:
        count, (inner, outer) = len(module.down_proj), module.down_proj.shape[1:]
        if not module.is_transposed:
            inner, outer = outer, inner
        self.total = 0
        self.tokens = torch.zeros(count, dtype=torch.int64)
        self.inputs = torch.zeros(count, x.shape[-1], x.shape[-1], dtype=dtype, device=x.device)
        self.inner = torch.zeros(count, inner, inner, dtype=dtype, device=x.device)

    def add(
        self, module: nn.Module, x: Tensor, experts: Tensor, weights: Tensor, counted: Tensor | None
    ) -> Tensor:
        """Run the experts; add what the counted tokens (all if None) give."""
        outputs = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, weights.dtype))
        self.total += len(x) if counted is None else int(counted.sum())
        for expert in range(len(self.tokens)):
            rows, places = (experts == expert).nonzero(as_tuple=True)
            if not len(rows):
                continue
            combine = weights[rows, places].unsqueeze(-1)  # (n, 1)
            states = x[rows]
            inner = hidden_neurons(module, expert, states)
            given = expert_outputs(module, expert, inner)
            outputs.index_add_(0, rows, (given * combine).to(outputs.dtype))
            if counted is not None:
                chosen = counted[rows]
                states, inner, combine = (t[chosen] for t in (states, inner, combine))
            self._add_expert(expert, combine.float(), states, inner)
        return outputs.to(x.dtype)

    def _add_expert(self, expert: int, combine: Tensor, x: Tensor, inner: Tensor) -> None:
        self.tokens[expert] += len(x)
        for sums, rows in ((self.inputs, x), (self.inner, inner)):
            scaled = rows.float() * combine
            sums[expert] += scaled.mT @ scaled

    def finish(self) -> ExpertMoments:
        return ExpertMoments(self.tokens, self.total, self.inputs.cpu(), self.inner.cpu())
