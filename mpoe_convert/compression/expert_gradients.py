"""What errors at a mixture's experts do to the loss: mean squares of the gradients at their projections.

::

    x --gate, up--> a --act--> h --down--> y_e     gradients at a and at y_e of the tokens routed to e,
                                                   combine weight included, beside the sum of g^2

The gradient at the output of the experts module is enough: from there each expert's own are computed again,
on the inputs, experts and combine weights that the module was called with.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..planning.plan import FFNPlan
from ..ranks import Ranks
from ..source.expert_layout import Layout, biases_of
from ..source.mixtures import MixtureFamily
from .batches import Batch, token_mask
from .dense_run import DenseRun, Progress
from .expert_moments import expert_outputs, run_projection
from .fisher import run_backward
from .named_experts import (
    ExpertCall,
    as_marked,
    combine_weights,
    first_input,
    watch_calls,
    watch_gradients,
)
from .stream import check_activations

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def expert_sensitivities(
    run: DenseRun, model: PreTrainedModel, modules: dict[str, nn.Module], progress: Progress
) -> dict[str, dict[str, Tensor]]:
    """Per layer and projection, what a unit of squared output error costs.

    The expected rise of the loss, in nats per scored prediction, is this times the squared error of the
    projection's outputs in the experts' metric (`ExpertMoments.metric`), if errors and gradients are
    independent and all outputs of a projection matter alike: half the mean square of the gradient, as in
    `gradient_moments`.

    Args:
        model: the stock mixture, whole.
        modules: by the paths of the plan's layers, their experts.

    Returns:
        By path and role, () in float64.

    Raises:
        DataError: no label is scored.
        CheckpointError: a gradient is NaN or Inf.
    """
    ffns = {ffn.ffn.path: ffn for ffn in run.plan.ffns}
    family = run.plan.family
    layout = family.layout if isinstance(family, MixtureFamily) else None
    sums = {path: _Squares(ffns[path], model, module, layout, run.ranks) for path, module in modules.items()}
    handles = [handle for path, module in modules.items() for handle in sums[path].handles(module)]

    def begin(batch: Batch) -> None:
        for each in sums.values():
            each.batch = batch

    try:
        scored = run_backward(run, model, begin, progress)
    finally:
        for handle in handles:
            handle.remove()
    for each in sums.values():
        each.add_up()
    return {path: each.per(scored) for path, each in sums.items()}


class _Squares:
    """Sums over the tokens that are routed to the experts of one layer.

    Attributes:
        batch: the one that runs.
        combine: what is added to g^2.
        squares: by role, what is added to the squared gradients, per output.
        tokens: that were counted, without regard to routing.
    """

    def __init__(
        self, ffn: FFNPlan, model: PreTrainedModel, module: Any, layout: Layout | None, ranks: Ranks
    ) -> None:
        self.ffn, self.model, self.module, self.layout, self.ranks = ffn, model, module, layout, ranks
        self.batch: Batch = {}
        self.combine: list[float] = []
        self.squares: dict[str, list[float]] = {matrix.role: [] for matrix in ffn.matrices}
        self.tokens = 0
        self.calls: list[ExpertCall] = []  # of the experts of a list, in the pass that runs

    def handles(self, module: nn.Module) -> Iterator[Any]:
        """Hooks by which the sums grow."""
        if self.layout is None or not self.layout.listed:
            yield module.register_forward_hook(self.watch, with_kwargs=True)
            return
        path = next(path for path, each in self.model.named_modules() if each is module)
        block = self.model.get_submodule(path.rpartition(".")[0])
        yield block.register_forward_hook(self._weigh, with_kwargs=True)
        yield from watch_calls(module, self.layout, self.calls.append, apart=False)
        yield from watch_gradients(module, self.layout, self._add_rows)

    def _weigh(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Behind a block with a list of experts: its tokens, and the squares of their combine weights."""
        x = first_input(args, kwargs)
        counted = self._counted(x.reshape(-1, x.shape[-1]))
        self.tokens += int(counted.sum())
        y = output[0] if isinstance(output, tuple) else output
        scales = combine_weights(y, self.calls, counted)
        self.combine += [float(scale.double().square().sum()) for scale in scales]
        self.calls.clear()

    def _counted(self, x: Tensor) -> Tensor:
        """(tokens,) which of the tokens (tokens, d) are no padding."""
        mask = token_mask(self.model, self.batch, decoder=".decoder." in f".{self.ffn.ffn.path}.")
        if mask is None or mask.numel() != len(x):
            return x.new_ones(len(x), dtype=torch.bool)
        return mask.reshape(-1).bool().to(x.device)

    def _add_rows(self, role: str, gradient: Tensor) -> None:
        """The gradients (n, out) at what a projection of a list's experts gives, combine weight included."""
        self.squares[role].append(float(gradient.float().square().mean(1).sum()))

    def watch(self, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any], y: Tensor) -> None:
        bound = inspect.signature(module.forward).bind(*args, **kwargs).args
        x, experts, weights = (tensor.detach() for tensor in bound[:3])
        y.register_hook(partial(self._add, x, experts, weights))

    def add_up(self) -> None:
        """Put what all processes have in place of what this one has."""
        every = self.ranks.gathered((self.combine, self.squares, self.tokens))
        self.combine = [value for combine, _, _ in every for value in combine]
        self.squares = {role: [v for _, squares, _ in every for v in squares[role]] for role in self.squares}
        self.tokens = sum(tokens for _, _, tokens in every)

    def per(self, scored: int) -> dict[str, Tensor]:
        """Half the mean squares, per unit of g^2 and scored prediction."""
        found = {}
        combine = math.fsum(self.combine)  # exact, so that the order does not matter
        for role, parts in self.squares.items():
            value = torch.tensor(math.fsum(parts), dtype=torch.float64)
            check_activations(value, f"{self.ffn.ffn.path} (gradients, {role})")
            found[role] = 0.5 * value / (combine or 1.0) * (self.tokens / scored)
        return found

    def _add(self, x: Tensor, experts: Tensor, weights: Tensor, gradient: Tensor) -> None:
        """x and gradient (tokens, d), experts and weights (tokens, k)."""
        kept = self._counted(x)
        x, experts, weights, gradient = (t[kept] for t in (x, experts, weights, gradient))
        self.tokens += len(x)
        for expert in experts.unique().tolist():
            rows, places = (experts == expert).nonzero(as_tuple=True)
            combine = weights[rows, places].unsqueeze(-1)
            self.combine.append(float(combine.double().square().sum()))
            self._add_expert(expert, x[rows], combine * gradient[rows])

    def _add_expert(self, expert: int, x: Tensor, gradient: Tensor) -> None:
        """x and gradient (n, d), of the tokens that are routed to one expert; the gradient at its output."""
        module = as_marked(self.module, self.layout)
        projections = getattr(module, "projections", self.ffn.ffn.projections)
        first = "gate_up_proj" if module.has_gate else "up_proj"
        with torch.enable_grad():
            answer = run_projection(module, first, expert, x).detach().requires_grad_(True)
            inner = module._apply_gate(answer) if module.has_gate else module.act_fn(answer)
            y = expert_outputs(module, expert, inner)
            (behind,) = torch.autograd.grad(y, answer, gradient.to(y.dtype))
        for role in self.squares:
            part = gradient if role == "down" else biases_of(behind, projections[role])
            self.squares[role].append(float(part.float().square().mean(1).sum()))
