"""Mixing: what several experts make of tokens, given the choices; schedules and what they cost."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from .chains import MatrixCache, Picks
from .choices import Choices
from .config import read_option
from .costs import Cost, Work, mean
from .linears import is_recorded
from .parts import PARTS, Part, Projection, Started, differs
from .routers import Router

# What the choice between schedules assumes of the machine: two cores of a server. Only the ratio counts.
_FLOPS = 1e11  # per second
_BANDWIDTH = 1e10  # bytes per second
# Up to so many parameters in all, every row gets a copy of its own expert's cores: in graphs and on
# accelerators, and on a processor, where more of them no longer stay in its cache.
# Of GPT-2's FFN in blocks (examples/benchmarks/runtime.py), 32 tokens would copy 6 million: sorted they take
# 0.5 times as long, a step of training 0.7 times.
_FEW_COPIED_PARAMS = 1 << 23
_FEW_COPIED_BY_CPU = 1 << 21
# From so many rows per expert on, a processor computes expert by expert ...
_MANY_ROWS = 256
# ... and with gradients only if an expert owns no more parameters than this: the gradient of every
# weight[expert] is as large as all experts together.
_FEW_OWN_PARAMS = 1 << 18


class Inputs(NamedTuple):
    """What experts start from, per token (M = T) or per choice (M = N), once what is common is done."""

    rows: Tensor  # (M, H); what a common FFN made of the tokens, if the experts are behind it
    up: Started | None = None  # what `up` made of the rows, as far as it is common; None: nothing is done
    gate: Started | None = None

    def take(self, index: Tensor) -> "Inputs":
        """Those at `index`, in its order."""
        return self._each(lambda part: part[index])

    def spread(self, choices: Choices) -> "Inputs":
        """From one per token to one per choice."""
        return self._each(choices.spread)

    def _each(self, function: Callable[[Tensor], Tensor]) -> "Inputs":
        rows = function(self.rows)
        up = None if self.up is None else self.up.each(function)
        return Inputs(rows, up, None if self.gate is None else self.gate.each(function))


class Mixing(nn.Module):
    """Experts of one form: down(act(up x)) or down(act(gate x) * up x), for rows that each have one of them.

    `form`: {"up": spec, "down": spec, "gate": spec if gated}, and parts behind the FFN; `PARTS` says which
    class reads which key. `router`: None where the choices are made elsewhere.

    Schedules, the same function in different operations:
        apply     the cores act on the activations; matrices are built for chains that cannot act
        rebuild   the matrices of the experts that are hit are contracted, then used as dense experts
        cached    rebuild, with the matrices kept between calls; where no gradient is needed
    Which one runs is `schedule`, "auto" for the one that `seconds` says is fastest.

    Attributes:
        parts: the router, if there is one, and those of the form, in the order of `PARTS`.
        shared_params: parameters that are stored once.
        own_by_expert: parameters that each expert has for itself; `own_params` is their mean.
        differ: experts differ in size.
        top_k: choices per token; where it varies, what estimates go by.
    """

    up: Projection
    down: Projection
    gate: Projection | None

    def __init__(self, form: dict, num_experts: int, top_k: int, router: Router | None = None):
        super().__init__()
        if unknown := sorted(form.keys() - PARTS.keys()):
            raise ValueError(f"a form in config.mpoe has the parts {unknown}: this file knows {list(PARTS)}")
        self.num_experts, self.top_k = num_experts, top_k
        if router is not None:
            self.router = router
        for key, part in PARTS.items():
            setattr(self, key, part.from_form(form, key, num_experts) if key in form else None)
        # A tuple, so not registered a second time. PEFT puts wrappers in the place of modules.
        parts = tuple(getattr(self, key) for key in PARTS if key in form)
        self.parts: tuple[Part, ...] = parts if router is None else (router, *parts)
        each = zip(*(part.own_by_expert for part in self.parts if part.own_by_expert), strict=True)
        self.own_by_expert = tuple(map(sum, each)) or (0,) * num_experts
        self.own_params, self.differ = mean(self.own_by_expert), differs(form)
        self.acts = all(part.acts for part in self.parts)
        self._behind = tuple(key for key in PARTS if key in form and PARTS[key].behind)
        # Where experts own nothing in the FFN itself, it runs once per token, however many experts it has.
        self._is_common = not any(part.own_params for part in self.parts if not part.behind)
        if not self._behind and not self._is_common:
            self.down.ends_once = self.down.has_end()
        starts = (projection.has_start() for projection in (self.up, self.gate) if projection is not None)
        self._has_ends = self.down.ends_once or any(starts)
        self.act: nn.Module = nn.Identity()
        self.inner_dropout: nn.Module = nn.Identity()
        self.schedule = "auto"
        self.cache: MatrixCache | None = None
        self._decided: tuple[tuple | None, str] = (None, "apply")  # what `auto` decided last, and for what

    def configure_schedule(self, config: PretrainedConfig, num_mixtures: int) -> None:
        """Take over the config's schedule options, overruled by the environment.

        Raises:
            ValueError: an option has a value that it cannot have.
        """
        self.schedule = read_option(config, "mpoe_schedule")
        keep, limit = read_option(config, "mpoe_cache"), read_option(config, "mpoe_cache_bytes")
        if keep == "off":
            keep = "hit" if self.schedule == "cached" else None
        limit = None if limit is None else limit / num_mixtures
        self.cache = None if keep is None else MatrixCache(keep, limit)

    def train(self, mode: bool = True):
        if mode and self.cache is not None:
            self.cache.entries.clear()  # FSDP may gather changed cores into the memory of the old ones
        return super().train(mode)

    # ------------------------------------------------------------------------------------- cost

    @property
    def shared_params(self) -> int:
        return sum(part.shared_params for part in self.parts)

    @property
    def stored_params(self) -> int:
        return self.shared_params + sum(self.own_by_expert)

    def cost(self, work: Work, schedule: str = "apply") -> Cost:
        """Of a forward pass: the sum over the parts."""
        if not self._is_common:
            return Cost.total([part.cost(work, schedule) for part in self.parts])
        once = Work(work.tokens, work.tokens, 1)
        return Cost.total(
            [part.cost(work, schedule) if part.behind else part.cost(once, "apply") for part in self.parts]
        )

    def work(self, num_tokens: int, num_choices: int | None = None) -> Work:
        """A call with so many tokens and choices (by default `top_k` each), all experts equally likely."""
        rows = num_tokens * self.top_k if num_choices is None else num_choices
        share = rows / max(num_tokens, 1) / self.num_experts  # of the tokens, that an expert gets
        return Work(num_tokens, rows, self.num_experts * (1 - (1 - share) ** num_tokens))

    def flops(self, num_tokens: int, schedule: str = "apply", num_choices: int | None = None) -> float:
        """Floating-point operations of a forward pass (2 per multiply-add) in products with weights."""
        cost = self.cost(self.work(num_tokens, num_choices), schedule)
        return cost.flops + cost.rebuild_flops

    def bytes_read(self, num_tokens: int, schedule: str = "apply", num_choices: int | None = None) -> float:
        """Bytes of weights that a forward pass moves, matrices it builds included."""
        return self.cost(self.work(num_tokens, num_choices), schedule).nbytes

    def seconds(self, num_tokens: int, schedule: str, num_choices: int | None = None) -> float:
        """An estimate of a forward pass's time, for comparing schedules."""
        return _seconds(self.cost(self.work(num_tokens, num_choices), schedule))

    def choose_schedule(self, num_tokens: int, num_choices: int | None = None) -> str:
        """The schedule that will run."""
        if self.schedule != "auto":
            return self.schedule
        if is_recorded():
            return "apply"
        free = self.cache is not None and not torch.is_grad_enabled()
        case = (num_tokens, num_choices, free)
        if self._decided[0] != case:  # in decoding each call is like the last one
            work = self.work(num_tokens, num_choices)
            schedules = ("apply", "rebuild", "cached") if free else ("apply", "rebuild")
            self._decided = (case, min(schedules, key=lambda schedule: _seconds(self.cost(work, schedule))))
        return self._decided[1]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Mixing":
        self._decided = (None, "apply")  # another dtype has other costs
        return super()._apply(fn, recurse)

    # ------------------------------------------------------------------------------------- forward

    def _mix(self, tokens: Tensor, choices: Choices) -> Tensor:
        """What the chosen experts make of tokens (T, H), weighted and summed -> (T, H)."""
        schedule = self.choose_schedule(tokens.shape[0], choices.experts.shape[0])
        once = self._does_once(schedule)
        if not (once and self.down.ends_once):
            return self._sum(tokens, choices, schedule, once)
        return self.down.finish(self._sum(tokens, choices, schedule, once, ends=False))

    def _sum(self, tokens: Tensor, choices: Choices, schedule: str, once: bool, ends: bool = True) -> Tensor:
        """The weighted sum of what experts make of tokens (T, H) -> (T, H); for `ends` see `Projection`."""
        num_tokens, num_rows = tokens.shape[0], choices.experts.shape[0]
        inputs = self._prepare(tokens, once)
        applies = schedule == "apply" and self.acts
        # What differs in size cannot be gathered; in a graph every expert runs on all rows, see `run_each`.
        copies = applies and (not self.differ or is_recorded() or tokens.is_meta)
        few = _FEW_COPIED_BY_CPU if tokens.is_cpu and not is_recorded() else _FEW_COPIED_PARAMS
        if copies and num_rows * self.own_params <= few:
            rows = self._experts(inputs.spread(choices), Picks(choices.experts), ends=ends)  # (N, H)
            return choices.combine(rows, num_tokens)
        order = choices.experts.argsort(stable=True)  # (N,) the choices expert by expert
        # Sizes that Python reads break a compiled graph, halt a CUDA device, and have no value on meta.
        on_device = tokens.is_cuda and schedule != "cached" and not self.differ
        on_device = on_device or is_recorded() or tokens.is_meta
        picks = Picks.of_sorted(choices.experts[order], self.num_experts, on_device)
        if not on_device and self._goes_expert_by_expert(schedule, applies, num_rows):
            return self._mix_by_expert(inputs, choices, order.split(picks.sizes), schedule, ends)
        inputs = inputs.take(choices.tokens[order])
        rows = self._experts(inputs, picks, schedule, ends)  # (N, H), in that order
        if choices.per_token is None:
            return choices.take(order).combine(rows, num_tokens)
        return choices.combine(rows[order.argsort()], num_tokens)

    def _mix_by_expert(
        self, inputs: Inputs, choices: Choices, parts: Sequence[Tensor], schedule: str, ends: bool
    ) -> Tensor:
        """The same, one expert after the other; `parts`: the indices of each expert's choices."""
        output: Tensor | None = None
        dtype = inputs.rows.dtype
        for expert, part in enumerate(parts):
            if len(part) == 0:
                continue
            own = choices.take(part)  # M of the N
            rows = self._experts(inputs.take(own.tokens), Picks(expert), schedule, ends)  # (M, H)
            rows, dtype = rows * own.weights.unsqueeze(-1), rows.dtype
            if output is None:
                output = rows.new_zeros(len(inputs.rows), rows.shape[1])  # (T, H) in float32 at least
            output.index_add_(0, own.tokens, rows)
        assert output is not None, "there is at least one choice"
        return output.to(dtype)

    def _goes_expert_by_expert(self, schedule: str, applies: bool, num_rows: int) -> bool:
        """Whether one expert's whole FFN runs at a time: its activations stay in the processor's cache."""
        if num_rows == 0 or self._is_offloaded():
            return False  # accelerate would load an offloaded module once per expert
        if schedule == "cached" and self.cache is not None:
            return True
        if torch.is_grad_enabled() and self.own_params > _FEW_OWN_PARAMS:
            return False
        return not applies or num_rows >= _MANY_ROWS * self.num_experts

    def _is_offloaded(self) -> bool:
        """Whether accelerate loads modules when they are called."""
        return any("_hf_hook" in vars(module) for part in self.parts for module in part.modules())

    def _does_once(self, schedule: str) -> bool:
        """Whether shared cores at the beginning and the end of chains work on a token once.

        A chain is called twice then, and would be loaded twice.
        """
        return schedule == "apply" and self._has_ends and not self._is_offloaded()

    def _prepare(self, tokens: Tensor, once: bool = True) -> Inputs:
        """Do what is the same for all experts of a token: tokens (T, H); for `once` see `_does_once`."""
        if self._is_common:
            return Inputs(self._ffn(Inputs(tokens), Picks(0)))
        gate = None if self.gate is None else self.gate.start(tokens, once)
        return Inputs(tokens, self.up.start(tokens, once), gate)

    def _experts(self, inputs: Inputs, picks: Picks, schedule: str = "apply", ends: bool = True) -> Tensor:
        """(N, H) the outputs of experts for rows that each have the one that `picks` says."""
        rows = inputs.rows if self._is_common else self._ffn(inputs, picks, schedule, ends)  # (N, H)
        for key in self._behind:
            rows = getattr(self, key)(rows, picks)
        return rows

    def run_all_experts(self, tokens: Tensor) -> Tensor:
        """(E, T, H) what every expert makes of tokens (T, H), whatever the router decides."""
        inputs = self._prepare(tokens)
        return torch.stack([self._experts(inputs, Picks(expert)) for expert in range(self.num_experts)])

    def _ffn(self, inputs: Inputs, picks: Picks, schedule: str = "apply", ends: bool = True) -> Tensor:
        """The FFN itself: rows (N, H) -> (N, H)."""
        rebuild = schedule != "apply"
        cache = self.cache if schedule == "cached" and not torch.is_grad_enabled() else None
        up = self.up(inputs.rows, picks, rebuild, cache, inputs.up)  # (N, inner)
        gate = None
        if self.gate is not None:
            gate = self.gate(inputs.rows, picks, rebuild, cache, inputs.gate)  # (N, inner)
        inner = self.inner_dropout(self._activate(up, gate))
        return self.down(inner, picks, rebuild, cache, ends=ends)

    def _activate(self, up: Tensor, gate: Tensor | None) -> Tensor:
        """(N, inner) what the activation makes of the projections."""
        return self.act(up) if gate is None else self.act(gate) * up


def _seconds(cost: Cost) -> float:
    """On the machine of `_FLOPS` and `_BANDWIDTH`."""
    return (cost.flops + cost.rebuild_flops) / _FLOPS + cost.nbytes / _BANDWIDTH
