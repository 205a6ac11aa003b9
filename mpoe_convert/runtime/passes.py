"""Passes: how the routers' losses join the graph of a forward pass, and its outputs.

The losses join at the combine weights (`_AddGradient`), not at the model's loss: that may be computed
outside of the model, and gradient checkpointing throws the graph of a layer away and makes it again.
Compiled code, which keeps no such Python state, adds them to the model's loss.

A pass that shows its routers (`output_router_logits`) keeps the contract of transformers' own mixtures
instead: the load-balancing loss is `aux_loss` of the outputs, and is in their loss if they have one. A loss
that is computed outside of the model adds `coef * outputs.aux_loss`, and it is counted once.

The losses that join at the combine weights are scaled as the model's own loss is. What scales a loss that
is computed outside of the model is known only if `add_router_losses` was given that loss.
"""

import dataclasses
import functools
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .choices import Routing
from .header import ModelOutput
from .routers import efficiency_loss, load_balancing_loss, router_z_loss

if TYPE_CHECKING:
    from .mixture import FeedForward

_ROUTER_FIELDS = ("aux_loss", "router_logits")


class _AddGradient(torch.autograd.Function):
    """An identity on a tensor; its backward pass starts a loss's gradient too, times a factor known then."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, loss: Tensor, factor: Callable[[], float | Tensor]) -> Tensor:
        ctx.factor, ctx.device = factor, loss.device
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:  # pyright: ignore[reportIncompatibleMethodOverride]  (autograd's way)
        return grad, torch.as_tensor(ctx.factor(), dtype=torch.float32, device=ctx.device), None


class _NoteGradient(torch.autograd.Function):
    """An identity on a scalar of the outputs; its backward pass passes the gradient on to `note`.

    `anchor`: a tensor behind all layers, whose backward pass therefore waits for this one; None if the
    scalar's own graph has them.
    """

    @staticmethod
    def forward(ctx: Any, scalar: Tensor, anchor: Tensor | None, note: Callable[[Tensor], None]) -> Tensor:
        ctx.note = note
        return scalar.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:  # pyright: ignore[reportIncompatibleMethodOverride]  (autograd's way)
        ctx.note(grad)
        return grad, None, None


class Call(NamedTuple):
    """One call of one mixture in a pass."""

    ffn: "FeedForward"
    routing: Routing
    mask: Tensor | None  # (T,) zero for padding
    loss: Tensor  # the routers' losses, times their coefficients; detached where they joined the weights


class Noted(NamedTuple):
    """A call of one mixture in training, which a checkpoint may repeat in the backward pass."""

    of: "RouterPass | None"  # None: of no pass of a model
    mask: Tensor | None  # (T,)
    task: Tensor | None
    lacks_shown: bool  # see `RouterPass.repeat`
    num_tokens: int  # T
    sketch: Tensor  # (S,) see `_sketch`


class Repeatable(deque):
    """Calls of one mixture that a checkpoint may repeat; those that none repeats fall out in time."""

    def __reduce__(self) -> tuple[Any, ...]:  # copies of a model start empty
        return functools.partial(Repeatable, maxlen=self.maxlen), ()

    def note(
        self,
        tokens: Tensor,
        of: "RouterPass | None",
        mask: Tensor | None,
        task: Tensor | None,
        lacks_shown: bool = False,
    ) -> None:
        """Note a call with tokens (T, H)."""
        self.append(Noted(of, mask, task, lacks_shown, tokens.shape[0], _sketch(tokens)))

    def take(self, tokens: Tensor) -> Noted | None:
        """Take out the call that is repeated with tokens (T, H), in whatever order calls are; None: none is.

        Kernels may differ in the last digits when they run again: it is the call whose tokens are nearest,
        and of equal ones the latest.
        """
        places = [i for i, noted in enumerate(self) if noted.num_tokens == tokens.shape[0]][::-1]
        if not places:
            return None
        nearest = 0
        if len(places) > 1:
            sketches = torch.stack([self[i].sketch.to(tokens.device) for i in places])  # (calls, S)
            nearest = int((sketches - _sketch(tokens)).abs().sum(1).argmin())
        noted = self[places[nearest]]
        del self[places[nearest]]
        return noted


def _sketch(tokens: Tensor) -> Tensor:
    """(S,) a few sums over tokens (T, H), which tell calls with different tokens, or another order, apart."""
    features = tokens.detach()[:, :8].float()  # (T, S)
    return (torch.linspace(1, 2, len(features), device=features.device)[:, None] * features).sum(0)


def in_backward() -> bool:
    """Whether a backward pass is running, which may repeat the forward pass of checkpointed layers."""
    return torch._C._current_graph_task_id() != -1


class RouterPass:
    """One forward pass of a model whose routers are watched or learn.

    The routers' losses join the graph at the combine weights: whatever loss reaches an FFN optimises them,
    and a checkpointed call that the backward pass repeats joins again.

    Attributes:
        mask_of: (mixture, T, number of its call) -> (T,) or None, see `mask`; None when the pass is over.
        shows: the load-balancing loss joins the outputs (see above), and only the others the combine weights.
        calls: of the mixtures so far; emptied when the pass is over.
        num_calls: their number; the loss is the mean over them.
        total: that loss, a scalar without gradient; None before the pass is over, if no coefficient is set,
            and in compiled code.
        share: this pass's share of an optimizer's step, below one if Trainer accumulates gradients.
        task: that the call was given, numbers (B,) or embeddings (B, H), see `Router`.
        scale: the gradient of the model's own loss: a GradScaler's factor, say. Known once the backward pass
            has begun, as is `shown_scale`, that of `aux_loss` of the outputs.
        went_back: whether a backward pass has reached a mixture.
    """

    def __init__(
        self,
        learns: bool,
        shows: bool,
        aux_coef: float,
        z_coef: float,
        mask_of: Callable[["FeedForward", int, int], Tensor | None],
        likeness_coef: float = 0.0,
        efficiency_coef: float = 0.0,
    ):
        self.learns, self.shows, self.aux_coef, self.z_coef = learns, shows, aux_coef, z_coef
        self.likeness_coef, self.efficiency_coef = likeness_coef, efficiency_coef
        self.mask_of: Callable[[FeedForward, int, int], Tensor | None] | None = mask_of
        self.calls: list[Call] = []
        self.num_calls = 0
        self.total: Tensor | None = None
        self.share: float | Tensor = 1.0
        self.task: Tensor | None = None
        self.scale: float | Tensor = 1.0
        self.shown_scale: float | Tensor = 0.0
        self.went_back = False

    def factor(self) -> float | Tensor:
        """dL / d (loss of a call), asked for in the backward pass."""
        self.went_back = True
        share = self.share
        if isinstance(share, Tensor) and isinstance(self.scale, Tensor):
            share = share.to(self.scale.device)
        return self.scale * share / max(self.num_calls, 1)

    def shown_factor(self) -> float | Tensor:
        """dL / d (load-balancing loss of a call) of the shown loss, asked for in the backward pass."""
        return self.shown_scale / max(self.num_calls, 1)

    def note_scale(self, grad: Tensor) -> None:
        """Called by the backward pass with the gradient of the model's own loss."""
        self.scale = grad

    def note_shown_scale(self, grad: Tensor) -> None:
        """Called by the backward pass with the gradient of `aux_loss` of the outputs."""
        self.shown_scale = grad

    def add_to(self, loss: Tensor, share: float | Tensor) -> Tensor:
        """A scalar: a loss that was made of the pass's outputs, plus this share of the pass's own."""
        if self.total is None:
            return loss
        self.share = share
        loss = _NoteGradient.apply(loss, None, self.note_scale)
        return loss + torch.as_tensor(share, device=loss.device) * self.total.to(loss.device)

    def mask(self, ffn: "FeedForward", num_tokens: int) -> Tensor | None:
        """(T,) which of the tokens of a mixture's next call count; None: all."""
        index = sum(call.ffn is ffn for call in self.calls)
        return self.mask_of(ffn, num_tokens, index)  # pyright: ignore[reportOptionalCall]  (None after the pass alone)

    def add(
        self,
        ffn: "FeedForward",
        tokens: Tensor,
        routing: Routing,
        mask: Tensor | None,
        task: Tensor | None = None,
    ) -> Routing:
        """Note a call of a mixture with tokens (T, H).

        Returns:
            its routing, whose weights carry the losses' gradient.
        """
        self.num_calls += 1
        if torch.compiler.is_compiling():  # joins the model's loss when the pass is over
            self.went_back = True  # a compiled backward pass does not tell
            self.calls.append(Call(ffn, routing, mask, self.loss(routing, mask)))
            return routing
        joined, loss = self.join(routing, mask)
        self.calls.append(Call(ffn, routing, mask, loss.detach()))
        if self.learns:
            # A reentrant checkpoint makes the graph when it repeats the call: `aux_loss` has none before.
            ffn.repeatable.note(tokens, self, mask, task, self.shows and not torch.is_grad_enabled())
        return joined

    def repeat(self, routing: Routing, mask: Tensor | None, lacks_shown: bool) -> Routing:
        """Like `add`, for a call that the backward pass repeats; nothing is noted.

        `lacks_shown`: the shown loss had no graph when the call was made, so its gradient joins here.
        """
        joined, _ = self.join(routing, mask)
        if not (lacks_shown and joined.choices.weights.requires_grad):
            return joined
        aux = load_balancing_loss(routing, mask)
        return joined.weighted(_AddGradient.apply(joined.choices.weights, aux, self.shown_factor))

    def join(self, routing: Routing, mask: Tensor | None) -> tuple[Routing, Tensor]:
        """(the routing, whose weights carry the losses' gradient; the losses)."""
        loss, weights = self.loss(routing, mask), routing.choices.weights
        if not (self.learns and torch.is_grad_enabled() and weights.requires_grad):
            return routing, loss
        return routing.weighted(_AddGradient.apply(weights, loss, self.factor)), loss

    def loss(self, routing: Routing, mask: Tensor | None) -> Tensor:
        """A scalar: the losses of one call that join at its weights, times their coefficients."""
        loss = routing.logits.new_zeros(())
        if self.aux_coef and not self.shows:
            loss = loss + self.aux_coef * load_balancing_loss(routing, mask)
        if self.z_coef:
            loss = loss + self.z_coef * router_z_loss(routing, mask)
        if routing.likeness is not None and self.likeness_coef:
            loss = loss + self.likeness_coef * routing.likeness
        if routing.gates is not None and self.efficiency_coef:
            loss = loss + self.efficiency_coef * efficiency_loss(routing.gates, mask)
        return loss


def add_losses(
    outputs: ModelOutput | tuple[Any, ...], running: RouterPass, arguments: dict
) -> ModelOutput | tuple[Any, ...]:
    """The model's outputs with the routers' losses, except the shown one, in their loss."""
    losses = [call.loss for call in running.calls]
    if not losses:
        return outputs
    total = torch.stack([loss.to(losses[0].device) for loss in losses]).mean()
    if not torch.compiler.is_compiling():
        running.total = total.detach()
    total = total * torch.as_tensor(running.share, device=total.device)
    key, tensor = _loss_of(outputs, arguments)
    if tensor is not None:  # the gradient has joined at the combine weights; here it is the value that counts
        if not torch.compiler.is_compiling():
            tensor = _NoteGradient.apply(tensor, None, running.note_scale)
        tensor = tensor + total.to(tensor.device)
    elif total.requires_grad:
        key, tensor = _first_output(outputs)
        tensor = _AddGradient.apply(tensor, total, lambda: 1.0)
    else:
        return outputs
    if isinstance(outputs, tuple):
        return (*outputs[:key], tensor, *outputs[key + 1 :])
    outputs[key] = tensor
    return outputs


@functools.cache
def _with_router_fields(base: type[Any]) -> type[Any]:
    """The output class, a dataclass, with `aux_loss` and `router_logits`."""
    known = {field.name for field in dataclasses.fields(base)}
    more = [(n, object, dataclasses.field(default=None)) for n in _ROUTER_FIELDS if n not in known]
    return dataclasses.make_dataclass(base.__name__, more, bases=(base,), namespace={"__module__": __name__})


def show_routers(outputs: Any, running: RouterPass) -> ModelOutput:
    """The outputs with `router_logits`, (T, E) per call, and `aux_loss`, a scalar, which joins their loss.

    `outputs`: no tuple.
    """
    calls = running.calls
    if not calls:  # the decoder alone is run, and the mixtures are in the encoder
        return outputs
    aux = [load_balancing_loss(call.routing, call.mask) for call in calls]
    mean = torch.stack([loss.to(aux[0].device) for loss in aux]).mean()
    if running.learns and not all(call.routing.logits.requires_grad for call in calls):
        anchor = next((v for v in outputs.values() if isinstance(v, Tensor) and v.requires_grad), None)
        mean = _NoteGradient.apply(mean, anchor, running.note_shown_scale)
    if running.learns and running.aux_coef and outputs.get("loss") is not None:
        loss = outputs["loss"]
        added = running.aux_coef * torch.as_tensor(running.share, device=mean.device) * mean
        outputs["loss"] = loss + added.to(loss.device)
    shown = {"aux_loss": mean, "router_logits": tuple(call.routing.logits for call in calls)}
    if not torch.compiler.is_compiling():  # the stock class cannot be rebuilt from a tree with more fields
        return _with_router_fields(type(outputs))(**outputs, **shown)
    for name, value in shown.items():
        outputs[name] = value
    return outputs


def _loss_of(outputs: ModelOutput | tuple[Any, ...], arguments: dict) -> tuple:
    """Key and value of the loss among a model's outputs, or (None, None)."""
    if isinstance(outputs, tuple):
        has_loss = any(arguments.get(name) is not None for name in ("labels", "start_positions"))
        return (0, outputs[0]) if has_loss and outputs[0].ndim == 0 else (None, None)
    loss = outputs.get("loss")
    return (None, None) if loss is None else ("loss", loss)


def _first_output(outputs: ModelOutput | tuple[Any, ...]) -> tuple:
    """Key and value of the first tensor that was computed from the hidden states."""
    items = enumerate(outputs) if isinstance(outputs, tuple) else outputs.items()
    return next((key, value) for key, value in items if isinstance(value, Tensor) and value.requires_grad)
