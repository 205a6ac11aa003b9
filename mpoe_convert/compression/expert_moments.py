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

from ..decomposition.stack_metric import Moments
from ..decomposition.symmetric import add_gram, diagonal, packed_length, packed_size, unpacked
from ..ranks import ALONE, Ranks
from ..source.expert_layout import Layout
from .batches import Batch, is_held_out, share_of, token_mask
from .lockstep import Lockstep
from .named_experts import ExpertCall, as_marked, combine_weights, first_input, watch_calls
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


class Borrowing(Moments):
    """M_e per token of the layer, with what expert e borrows: (S_e + c M) / total.

    S_e is the sum over its own n_e tokens, M the mean over all tokens of all experts, c = `borrowed` times
    the number of features. This is (n_e + c) / total times (n_e M_e + c M) / (n_e + c): the moment shrinks
    towards the layer's, and an expert that saw no token counts as one that saw c.
    """

    def __init__(self, sums: Tensor, tokens: Tensor, total: int, borrowed: float) -> None:
        self.sums, self.total = sums, max(total, 1)
        features = packed_size(sums.shape[-1])
        self.sum = sum_of(sums)
        self.borrowed = borrowed * features / max(int(tokens.sum()), 1)  # of the sum
        self.extra = (self.sum * self.borrowed).to(sums.dtype)

    def __len__(self) -> int:
        return len(self.sums)

    def __getitem__(self, expert: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]  (one expert, never a slice)
        if not 0 <= expert < len(self):
            raise IndexError(expert)
        return unpacked((self.sums[expert] + self.extra) / self.total)

    def mean(self) -> Tensor:
        return unpacked(self.sum * ((1 / len(self) + self.borrowed) / self.total))

    def levels(self) -> list[float]:
        extra = float(diagonal(self.sum).mean()) * self.borrowed
        return [(float(diagonal(each).double().mean()) + extra) / self.total for each in self.sums]


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
        return module._apply_gate(run_projection(module, "gate_up_proj", expert, rows))
    return module.act_fn(run_projection(module, "up_proj", expert, rows))


def expert_outputs(module: Any, expert: int, inner: Tensor) -> Tensor:
    """What an expert gives for its hidden neurons (N, inner) -> (N, in), before its combine weight."""
    y = run_projection(module, "down_proj", expert, inner)
    return module.post_expert_norm(y) if getattr(module, "has_post_expert_norm", False) else y


def run_projection(module: Any, name: str, expert: int, rows: Tensor) -> Tensor:
    """Rows (N, in) by the matrix, and bias, that one expert has in the tensor of that name -> (N, out)."""
    weight = getattr(module, name)[expert]
    y = rows @ (weight if module.is_transposed else weight.mT)
    return y + getattr(module, f"{name}_bias")[expert] if module.has_bias else y


def collect(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    save: Save,
    *,
    wanted: Callable[[str], bool] = lambda path: True,
    ranks: Ranks = ALONE,
    layout: Layout | None = None,
    moments: bool = True,
) -> None:
    """Run the stock mixture over its batches; moments are summed over those that are not held out.

    Args:
        model: in eval mode, without a cache.
        batches: as for `DenseRun`.
        save: called with the path of every experts module in `model` and what was found there, in the order
            of the layers; in the first process alone.
        wanted: whether a path's moments are collected.
        ranks: the processes that share the batches.
        layout: of experts that were named by hand; the wanted paths are theirs.
        moments: False: `ExpertScores` alone, which take no memory.

    Raises:
        CheckpointError: the model computes NaN or Inf.
    """
    named = model.named_modules()
    modules: dict[str, nn.Module] = {
        path: module for path, module in named if (layout or is_experts(module)) and wanted(path)
    }
    walk = _Walk(model, batches, save, len(modules), moments, layout, ranks)
    running = _watched if layout is not None and layout.listed else _run_by
    with torch.no_grad(), running(walk, modules):
        walk.lockstep.run([partial(run_batch, model, batches[n]) for n in walk.own], walk.release)


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


@contextmanager
def _watched(walk: _Walk, modules: dict[str, nn.Module]) -> Iterator[None]:
    """The walk sees what the experts of lists get; these run as ever."""
    assert walk.layout is not None
    handles: list[Any] = []
    for path, module in modules.items():
        block = walk.model.get_submodule(path.rpartition(".")[0])
        handles.append(block.register_forward_pre_hook(partial(walk.enter, path, module), with_kwargs=True))
        handles.append(block.register_forward_hook(partial(walk.leave, path)))
        handles += watch_calls(module, walk.layout, walk.calls.append, apart=True)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _call(
    walk: _Walk, path: str, module: nn.Module, signature: inspect.Signature, *args: Tensor, **kwargs: Tensor
) -> Tensor:
    return walk.meet(path, module, *signature.bind(*args, **kwargs).args)


class _Walk:
    """All batches of this process side by side; the sums of the layer that they are at."""

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Sequence[Batch],
        save: Save,
        count: int,
        moments: bool,
        layout: Layout | None,
        ranks: Ranks,
    ) -> None:
        self.model, self.batches, self.save, self.layout, self.ranks = model, batches, save, layout, ranks
        self.own = share_of(batches, ranks)
        self.make = _MomentSums if moments else _Sums
        self.lockstep = Lockstep()
        self.path, self.sums = "", None
        self.calls: list[ExpertCall] = []  # of the experts of a list, in the block that runs
        self.calls_left = [count] * len(self.own)

    def wait(self, *_: object) -> None:
        """In front of a module's own forward pass, where streamed weights are not there yet."""
        self.lockstep.wait()

    def release(self) -> None:
        if self.sums is not None:
            found = self.sums.finish(self.ranks)
            if found is not None:
                self.save(self.path, found)
        self.sums = None

    def meet(self, path: str, module: nn.Module, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """What the module computes; x (tokens, in), experts and weights (tokens, k)."""
        marked = as_marked(module, self.layout)
        if self.sums is None:
            inner, outer = marked.down_proj.shape[1:][:: 1 if marked.is_transposed else -1]
            self.path, self.sums = path, self.make(len(marked.down_proj), outer, inner, x.device)
        y = self.sums.add(marked, x, experts, weights, self._counted(x))
        self._leave(path, y)
        return y

    def _leave(self, path: str, y: Tensor) -> None:
        check_activations(y, path)
        self.calls_left[self.lockstep.current] -= 1
        if not self.calls_left[self.lockstep.current]:
            self.lockstep.stop()  # behind the last experts

    def enter(
        self,
        path: str,
        experts: nn.Module,
        block: nn.Module,
        args: tuple[Tensor, ...],
        kwargs: dict[str, Tensor],
    ) -> None:
        """In front of a block with a list of experts."""
        assert self.layout is not None
        self.lockstep.wait()
        x = first_input(args, kwargs)
        if self.sums is None:
            self.path, self.sums = path, self.make(*self.layout.size(experts), x.device)
        self.calls.clear()
        self.counted = self._counted(x.reshape(-1, x.shape[-1]))
        self.sums.total += int(self.counted.sum())
        torch.set_grad_enabled(True)

    def leave(self, path: str, block: nn.Module, args: tuple[Tensor, ...], output: Any) -> Any:
        """Behind a block with a list of experts."""
        y = output[0] if isinstance(output, tuple) else output
        scales = combine_weights(y, self.calls, self.counted)
        torch.set_grad_enabled(False)
        if self.sums is not None:
            for call, scale in zip(self.calls, scales, strict=True):
                self.sums.add_call(call, scale)
        self.calls.clear()
        self._leave(path, y.detach())
        if isinstance(output, tuple):
            return tuple(each.detach() if isinstance(each, Tensor) else each for each in output)
        return output.detach()

    @property
    def _number(self) -> int:
        """Of the batch whose pass runs."""
        return self.own[self.lockstep.current]

    @property
    def _counts(self) -> bool:
        """Whether that batch is summed, in this process."""
        is_spare = self.ranks.rank >= len(self.batches)
        return not is_spare and not is_held_out(self._number, self.batches)

    def _counted(self, x: Tensor) -> Tensor:
        """(tokens,) which of the rows that the current pass brings to the experts are summed."""
        if not self._counts:
            return x.new_zeros(len(x), dtype=torch.bool)
        mask = token_mask(self.model, self.batches[self._number], decoder=".decoder." in f".{self.path}")
        if mask is None or mask.numel() != len(x):
            return x.new_ones(len(x), dtype=torch.bool)
        return mask.reshape(-1).bool().to(x.device)


class _Sums:
    """Sums over batches that become the `ExpertScores` of one layer.

    What a batch adds is float32, its sum float64, as in `MomentSums.add`.
    """

    def __init__(self, count: int, hidden: int, inner: int, device: torch.device) -> None:
        self.total = 0
        self.tokens = torch.zeros(count, dtype=torch.int64)
        self.saliency = torch.zeros(count, dtype=torch.float64)

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
                self.saliency[expert] += float(norms.sum())
                self.note(expert, states[own], inner, scale[own])
        return outputs.to(x.dtype)

    def note(self, expert: int, x: Tensor, inner: Tensor, scale: Tensor) -> None:
        """Of an expert's rows: inputs (n, in), hidden neurons (n, inner), weights (n, 1), 0: not counted."""

    def add_call(self, call: ExpertCall, scale: Tensor) -> None:
        """Add a call of an expert of a list, with the weights of its rows (n, 1), 0: not counted."""
        if not (chosen := int((scale != 0).sum())):
            return
        self.tokens[call.expert] += chosen
        norms = (call.output.detach().flatten(0, -2).float() * scale).norm(dim=-1)
        self.saliency[call.expert] += float(norms.sum())
        self.note(call.expert, call.inputs, call.inner, scale)

    def finish(self, ranks: Ranks) -> ExpertScores | None:
        """What all processes have; None in others than the first."""
        found = self._added_up(ranks)
        return None if found is None else ExpertScores(**found)

    def _added_up(self, ranks: Ranks, **more: Tensor) -> dict[str, Any] | None:
        sums = {"tokens": self.tokens, "saliency": self.saliency, "total": torch.tensor(self.total)}
        found: dict[str, Any] = ranks.add_up(sums | more)
        return found | {"total": int(found["total"])} if ranks.is_first else None


class _MomentSums(_Sums):
    """Sums over batches that become the `ExpertMoments` of one layer."""

    def __init__(self, count: int, hidden: int, inner: int, device: torch.device) -> None:
        super().__init__(count, hidden, inner, device)
        options = {"dtype": torch.float64, "device": device}
        self.inputs = torch.zeros(count, packed_length(hidden), **options)
        self.inner = torch.zeros(count, packed_length(inner), **options)

    def note(self, expert: int, x: Tensor, inner: Tensor, scale: Tensor) -> None:
        add_gram(self.inputs[expert], x.float() * scale)
        add_gram(self.inner[expert], inner.float() * scale)

    def finish(self, ranks: Ranks) -> ExpertMoments | None:
        found = self._added_up(ranks, inputs=self.inputs, inner=self.inner)
        if found is None:
            return None
        return ExpertMoments(**found | {name: found[name].float() for name in ("inputs", "inner")})
