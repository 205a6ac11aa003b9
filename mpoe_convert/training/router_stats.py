"""Statistics of the routers of a loaded model."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import TrainingError
from ..runtime.modeling_mpoe import in_backward
from .roles import check_model

if TYPE_CHECKING:
    from ..runtime.modeling_mpoe import FeedForward, MixtureMixin, Routing


class RouterStats:
    """What one router decided, over all tokens that were watched; padding does not count.

    Attributes:
        num_tokens: how many.
        load: (E,) each expert's share of the choices; sums to one.
        experts_per_token: mean number of experts that a token goes to, without those of --shared-experts.
        load_by_size: {parameters that an expert owns: share of the choices that fell on such experts}.
        own_params: mean number of parameters that the chosen experts of a token own together.
        counts: (E + 1,) share of the tokens that go to none, one, ..., all experts; sums to one.
        probability: (E,) mean router probability.
        entropy: of the router's softmax, mean over tokens, in nats; log(E) if the router is indifferent.
        dropped: share of the combine weights that was lost to the capacity.
        similarity: (E, E) mean cosine between experts' outputs on the same tokens; None if not asked for.
    """

    def __init__(self, num_experts: int, sizes: Sequence[int] = ()):
        self.num_tokens = 0.0
        self._sizes = sizes or [0] * num_experts
        self._choices = torch.zeros(num_experts, dtype=torch.float64)
        self._counts = torch.zeros(num_experts + 1, dtype=torch.float64)
        self._probability = torch.zeros(num_experts, dtype=torch.float64)
        self._entropy = self._dropped = self._weight = 0.0
        self._cosines = torch.zeros(num_experts, num_experts, dtype=torch.float64)
        self._compared = 0

    @torch.no_grad()
    def add(self, routing: Routing, mask: Tensor | None) -> None:
        """Count a call. `mask` (T,) is zero for padding."""
        logits, choices, room = routing[:3]
        counted = torch.ones_like(logits[:, 0]) if mask is None else mask.to(logits)  # (T,)
        probabilities = logits.softmax(-1)  # (T, E)
        entropy = torch.special.entr(probabilities).sum(-1)  # (T,)
        weights = counted[choices.tokens] * choices.weights  # (N,)
        self.num_tokens += float(counted.sum())
        self._choices += choices.load(len(self._choices), counted).cpu().double()
        number = choices.tokens.bincount(minlength=len(logits))  # (T,)
        self._counts += number.bincount(counted, minlength=len(self._counts)).cpu().double()
        self._probability += (counted @ probabilities).cpu().double()
        self._entropy += float(counted @ entropy)
        self._weight += float(weights.sum())
        self._dropped += 0.0 if room is None else float(weights[~room].sum())

    @torch.no_grad()
    def compare(self, ffn: FeedForward, tokens: Tensor) -> None:
        """Compare the outputs of a mixture's experts for tokens (T, H)."""
        outputs = ffn.run_all_experts(tokens)[: num_routed(ffn)]  # (E, T, H)
        directions = F.normalize(outputs.cpu().double(), dim=-1)
        self._cosines += torch.einsum("eth,fth->ef", directions, directions)
        self._compared += len(tokens)

    @property
    def load(self) -> Tensor:
        return self._choices / self._choices.sum().clamp(min=1)

    @property
    def experts_per_token(self) -> float:
        return float(self._choices.sum()) / max(self.num_tokens, 1)

    @property
    def load_by_size(self) -> dict[int, float]:
        found = dict.fromkeys(sorted(set(self._sizes)), 0.0)
        for size, share in zip(self._sizes, self.load.tolist(), strict=True):
            found[size] += share
        return found

    @property
    def own_params(self) -> float:
        return self.experts_per_token * sum(size * share for size, share in self.load_by_size.items())

    @property
    def counts(self) -> Tensor:
        return self._counts / max(self.num_tokens, 1)

    @property
    def probability(self) -> Tensor:
        return self._probability / max(self.num_tokens, 1)

    @property
    def entropy(self) -> float:
        return self._entropy / max(self.num_tokens, 1)

    @property
    def dropped(self) -> float:
        return self._dropped / self._weight if self._weight else 0.0

    @property
    def similarity(self) -> Tensor | None:
        return self._cosines / self._compared if self._compared else None

    def __repr__(self) -> str:
        load = ", ".join(f"{part:.3f}" for part in self.load.tolist())
        return (
            f"RouterStats({self.num_tokens:.0f} tokens, {self.experts_per_token:.2f} experts each, "
            f"load [{load}], entropy {self.entropy:.3f} nats)"
        )


def num_routed(ffn: FeedForward) -> int:
    """E: the experts that the router chooses from, without those that every token passes."""
    return ffn.num_experts - len(getattr(ffn, "shared", ()))  # which the code of earlier releases lacks


def _sizes(ffn: FeedForward) -> Sequence[int]:
    """(E,) parameters that each routed expert owns."""
    each = getattr(ffn, "own_by_expert", None)  # which the code of earlier releases lacks
    return (each or (int(ffn.own_params),) * ffn.num_experts)[: num_routed(ffn)]


def router_stats(
    model: nn.Module, similarity_tokens: int = 0
) -> AbstractContextManager[dict[str, RouterStats]]:
    """Watch the routers of a converted model, however it is wrapped (PEFT, DDP, compiled).

    >>> import torch
    >>> from transformers import AutoModelForCausalLM
    >>> from mpoe_convert import router_stats
    >>> model = AutoModelForCausalLM.from_pretrained("out", trust_remote_code=True)
    >>> with router_stats(model) as stats:
    ...     output = model(torch.arange(8)[None])
    >>> stats["h.0.mlp"].num_tokens, round(float(stats["h.0.mlp"].load.sum()), 3)
    (8.0, 1.0)

    Args:
        model: holds a converted model somewhere.
        similarity_tokens: compare the experts' outputs on so many tokens per mixture and pass. This runs all
            experts on them.

    Returns:
        Context manager that yields {path of the mixture below the base model: `RouterStats`}; inside the
        block every forward pass adds to them, generation with `self_contrast` without its weak pass.

    Raises:
        TrainingError: it is no model, or holds no converted one.
    """
    check_model(model)
    for module in model.modules():
        if hasattr(type(module), "router_stats"):  # the code of an earlier release brings its own
            return cast(Any, module).router_stats(similarity_tokens)
        if hasattr(type(module), "mixtures"):
            return _watch(cast("MixtureMixin", module), similarity_tokens)
    raise TrainingError(
        f"{type(model).__name__} holds no mixture made by mpoe-convert; expected a converted model"
    )


def _first_half(routing: Routing) -> Routing:
    """What `RouterStats` reads of it, for the first half of the tokens."""
    logits, choices, room = routing[:3]
    number = len(logits) // 2
    index = (choices.tokens < number).nonzero().squeeze(-1)
    room = None if room is None else room[index]
    return routing._replace(logits=logits[:number], choices=choices.take(index), room=room)


@contextmanager
def _watch(model: MixtureMixin, similarity_tokens: int) -> Iterator[dict[str, RouterStats]]:
    stats = {path: RouterStats(num_routed(ffn), _sizes(ffn)) for path, ffn in model.mixtures()}
    calls = {ffn: 0 for _, ffn in model.mixtures()}  # in the pass that is running
    arguments: dict = {}  # of that pass
    names = list(inspect.signature(model.forward).parameters)

    def start_pass(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.update(dict.fromkeys(calls, 0))
        arguments.clear()
        arguments.update(dict(zip(names, args, strict=False)) | kwargs)

    def add(path: str, ffn: FeedForward, router: nn.Module, args: tuple[Any, ...], routing: Routing) -> None:
        if in_backward():
            return  # a checkpointed call, repeated: it has been counted
        tokens = args[0]
        if getattr(model, "_contrasts", False):  # behind them are the same ones, which are routed weakly
            tokens, routing = tokens.tensor_split(2)[0], _first_half(routing)
        mask = model.token_mask(ffn, len(tokens), calls[ffn], arguments=arguments)
        calls[ffn] += 1
        stats[path].add(routing, mask)
        if similarity_tokens:
            stats[path].compare(ffn, tokens[:similarity_tokens])

    handles = [model.register_forward_pre_hook(start_pass, with_kwargs=True)]
    for path, ffn in model.mixtures():
        handles.append(ffn.router.register_forward_hook(functools.partial(add, path, ffn)))
    try:
        with torch.compiler.set_stance("force_eager"):  # compiled code would pass the hooks by
            yield stats
    finally:
        for handle in handles:
            handle.remove()
