"""Self-contrast: generation against what weakly chosen experts say (SCMoE, arXiv 2405.14507).

With z_strong, the logits of the model, and z_weak, those of the same model when every token goes to one
weak expert in every layer, the next token is drawn by

    z = (1 + b) z_strong - b z_weak    where z_strong >= max z_strong + log(alpha), else -inf

Both passes are one batch: the sequences, and behind them the same ones once more, whose tokens are routed
weakly. So both keep their keys and values in one cache, and weights are read once for both.

Where the source was a mixture, its own routers stay. Nearly all of them choose by `torch.topk` of one score
per expert, which then gives a token of the weak pass its weak expert for each of its k choices. How much
these weigh is up to the router: as much as other k choices together, where it normalises weights.
"""

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle
from transformers.utils.generic import ModelOutput

from .choices import Choices, Context, Rule, preferences
from .experts import ExpertList, HoldsExperts
from .mixing import Mixing
from .routers import Router
from .weights import weigh

# As in the authors' code: the weak expert of a token is its third best ...
WEAK_RANK = 2
# ... and tokens count whose strong probability is at least this share of the most probable one's (alpha).
_PLAUSIBLE = 0.1
_MODES = ("greedy_search", "sample")
# What `generate` returns for B sequences.
_CONTRASTED = ("sequences", "scores", "logits")
# Arguments that bring no text begin so.
_IMAGES = ("pixel_values", "image_", "video_", "mm_")


def contrast(strong: Tensor, weak: Tensor, strength: float) -> Tensor:
    """(..., V) contrasted logits of both passes' (..., V), in float32; `strength` is b."""
    strong, weak = strong.float(), weak.float()
    counts = strong >= strong.amax(-1, keepdim=True) + math.log(_PLAUSIBLE)
    return torch.where(counts, (1 + strength) * strong - strength * weak, -math.inf)


def choose_weakly(router: Router, logits: Tensor, bias: Tensor | None) -> Choices:
    """One expert per token, that of rank `WEAK_RANK`, or the last one if there are fewer.

    It weighs what an only choice does: one, or with raw probabilities its own.
    """
    experts = _of_weak_rank(preferences(logits, bias)).indices  # (T, 1)
    ranked = logits.gather(-1, experts)
    return Choices.of_table(experts, weigh(router, logits, ranked, experts))


def _of_weak_rank(scores: Tensor) -> Any:
    """Values and indices (T, 1) of the scores (T, E) of rank `WEAK_RANK`, or of the last ones."""
    rank = min(WEAK_RANK, scores.shape[-1] - 1)
    values, indices = scores.topk(rank + 1, dim=-1)
    return torch.return_types.topk((values[:, rank:], indices[:, rank:]))


class _WeakTopK(TorchFunctionMode):
    """Inside, `topk` of the scores (T, E) of E experts chooses weakly for the second half of the tokens.

    Attributes:
        weak: (T / 2, 1) the experts that it chose last; None: it has not been called.
    """

    def __init__(self, num_experts: int):
        super().__init__()
        self.num_experts = num_experts
        self.weak: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func not in (torch.topk, Tensor.topk):
            return found
        scores = args[0] if args else kwargs["input"]
        if scores.shape != (*found.indices.shape[:1], self.num_experts):
            return found
        half = scores.shape[0] // 2
        weak = _of_weak_rank(scores[half:])
        self.weak = weak.indices
        pairs = zip(found, weak, strict=True)
        values, indices = (torch.cat([both[:half], one.expand_as(both[half:])]) for both, one in pairs)
        return torch.return_types.topk((values, indices))


@contextmanager
def choosing_both(model: Any) -> Iterator[None]:
    """While this is open, all routers choose weakly for the second half of the tokens."""
    routers = [module for module in model.modules() if isinstance(module, Router)]
    rules = [router.select for router in routers]
    hooks = []
    try:
        for router in routers:
            router.select = functools.partial(_choose_both, router.select)
        for block in model.modules():
            if isinstance(block, HoldsExperts):
                hooks += _stock_router_chooses_both(block, block.experts)
        yield
    finally:
        for router, rule in zip(routers, rules, strict=True):
            router.select = rule
        for hook in hooks:
            hook.remove()


def _stock_router_chooses_both(block: nn.Module, experts: Any) -> tuple[RemovableHandle, ...]:
    """Hooks by which the block of a stock mixture does so."""
    mode = _WeakTopK(experts.num_experts)
    return (
        block.register_forward_pre_hook(functools.partial(_enter, mode)),
        block.register_forward_hook(functools.partial(_leave, mode), always_call=True),
        experts.register_forward_pre_hook(functools.partial(_check_weak, mode)),
    )


def _enter(mode: _WeakTopK, *_: Any) -> None:
    mode.weak = None
    mode.__enter__()


def _leave(mode: _WeakTopK, *_: Any) -> None:
    mode.__exit__(None, None, None)


def _check_weak(mode: _WeakTopK, module: nn.Module, args: tuple) -> None:
    """Raises ValueError if a block did not choose its experts (T, k) by the `topk` that was changed."""
    experts = args[1] if len(args) > 1 else None
    if mode.weak is None or experts is None or not experts[experts.shape[0] // 2 :].eq(mode.weak).all():
        raise ValueError(
            "self_contrast chooses weak experts where routers call topk on one score per expert, and one "
            "of this model chooses in another way: leave it out"
        )


def _choose_both(
    select: Rule, router: Router, logits: Tensor, bias: Tensor | None, context: Context
) -> Choices:
    """By the rule for the first half of the tokens, weakly for the second."""
    strong, weak = logits.tensor_split(2)
    return select(router, strong, bias, context.first_half()).followed_by(
        choose_weakly(router, weak, bias), strong.shape[0]
    )


def strength_of(model: Any, strength: float | None, args: tuple, arguments: dict) -> float:
    """b of a call of `generate`: `self_contrast`, or what the GenerationConfig says, or the model's; else 0.

    Args:
        model: one that generates.
        strength: `self_contrast` of the call.
        args: of `generate` by position, of which the second is a GenerationConfig.
        arguments: by name.
    """
    config = arguments.get("generation_config", args[1] if len(args) > 1 else None)
    configs = (config, getattr(model, "generation_config", None))
    found = (strength, *(getattr(each, "self_contrast", None) for each in configs))
    return next((each for each in found if each is not None), 0.0)


@contextmanager
def contrasting(model: Any, strength: float, arguments: dict) -> Iterator[None]:
    """While this is open, a model's forward pass also runs weakly, and returns contrasted logits (B, 1, V).

    Code that is compiled runs uncompiled: it would pass the hooks by, or keep an earlier strength.

    Args:
        model: one with mixtures.
        strength: b, above zero.
        arguments: of `generate`, by name.

    Raises:
        ValueError: the model or an argument has no weak pass.
    """
    mixtures = [ffn for _, ffn in model.mixtures()]
    _check([module for module in model.modules() if isinstance(module, Mixing)], strength, arguments)
    tasks = [ffn.task for ffn in mixtures]
    hooks = [
        model.register_forward_pre_hook(_repeat_inputs, with_kwargs=True),
        model.register_forward_hook(functools.partial(_contrast_output, strength)),
    ]
    if model.config.is_encoder_decoder:  # it runs first, on its own
        hooks.append(model.get_encoder().register_forward_pre_hook(_repeat_inputs, with_kwargs=True))
    try:
        model._contrasts = True
        for ffn in mixtures:
            ffn.task = None if ffn.task is None else torch.cat([ffn.task, ffn.task])
        with torch.compiler.set_stance("force_eager"), choosing_both(model):
            yield
    finally:
        model._contrasts = False
        for hook in hooks:
            hook.remove()
        for ffn, task in zip(mixtures, tasks, strict=True):
            ffn.task = task


def _check(mixtures: list, strength: float, arguments: dict) -> None:
    """Raises ValueError, see `contrasting`."""
    if not isinstance(strength, (int, float)) or not 0 < strength < math.inf:
        raise ValueError(f"self_contrast is {strength!r}: expected 0, which is off, or more, such as 0.5")
    if any(isinstance(ffn, ExpertList) for ffn in mixtures):
        raise ValueError(
            "self_contrast needs blocks that say which experts a token goes to, and those of this model hand "
            "every expert of a list its rows: leave it out"
        )
    if min(getattr(ffn, "router", ffn).num_experts for ffn in mixtures) < 2:
        raise ValueError(
            "self_contrast needs a second expert to choose a weak one, found one per mixture: leave it out"
        )
    cache = next((arguments[name] for name in ("past_key_values", "cache") if arguments.get(name)), None)
    if cache is not None and cache.get_seq_length():
        raise ValueError(
            "self_contrast needs a cache of both passes, found one that another call has filled: pass all "
            "tokens without it"
        )
    if arguments.get("cache_implementation") == "paged":
        check_mode("continuous_batching")
    given = (name for name, value in arguments.items() if value is not None)
    strange = [name for name in given if name == "encoder_outputs" or name.startswith(_IMAGES)]
    if strange:
        raise ValueError(
            f"self_contrast runs its weak pass on text, found {strange[0]}: leave out one of the two"
        )


def check_mode(mode: str, config: Any = None) -> None:
    """Raises ValueError if a way of generating, of transformers' `GenerationMode`, has no weak pass."""
    if getattr(config, "prefill_chunk_size", None) and "static" in (config.cache_implementation or ""):
        raise ValueError(
            "self_contrast reads prompts in chunks into a dynamic cache, found prefill_chunk_size with a "
            "static one, which is made for one pass: leave out one of the two"
        )
    if mode not in _MODES:
        raise ValueError(
            f"self_contrast goes with greedy decoding and sampling, found {mode.replace('_', ' ')}, which "
            "has no cache for a weak pass: leave out one of the two, beams by num_beams=1"
        )


def _repeat_inputs(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The arguments of a forward pass with all sequences twice."""
    return tuple(map(_twice, args)), {name: _twice(value, _axis(name)) for name, value in kwargs.items()}


def _axis(name: str) -> int:
    """Along which sequences lie in a model's argument.

    Positions (B, T) may have axes of their own in front, (3, B, T), for the height and width of an image.
    """
    return -2 if name == "position_ids" else 0


def _twice(value: Any, axis: int = 0) -> Any:
    """A tensor of B sequences, or masks by name, for 2 B. What has one axis is no tensor of sequences."""
    if type(value) is dict:
        return {name: _twice(each) for name, each in value.items()}
    if not isinstance(value, Tensor) or value.ndim < 2:
        return value
    return torch.cat([value, value], axis)


def _contrast_output(strength: float, module: nn.Module, args: tuple, output: Any) -> Any:
    """The output of a pass of 2 B sequences with the logits (B, 1, V) of their last tokens, contrasted."""
    strong, weak = output.logits[:, -1:].tensor_split(2)
    output.logits = contrast(strong, weak, strength)
    return output


def strong_half(generated: Any) -> Any:
    """What `generate` returned, without the weak pass's states and attention and the cache of both."""
    if not isinstance(generated, ModelOutput):
        return generated
    halves = {name: _first_half(value) for name, value in generated.items() if name not in _CONTRASTED}
    return type(generated)(**dict(generated) | halves)


def _first_half(value: Any) -> Any:
    """Of a tensor of 2 B sequences, or of those in a tuple; None of a cache."""
    if isinstance(value, tuple):
        return tuple(map(_first_half, value))
    return value.tensor_split(2)[0] if isinstance(value, Tensor) else None
