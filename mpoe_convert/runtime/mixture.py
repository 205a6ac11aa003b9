"""The mixture: the FFN of several experts, its schedules and what they cost."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from .chains import Chain, MatrixCache, Picks
from .choices import DEFAULT_RULE, Choices, Routing
from .config import read_option
from .parts import Adapter, Projection
from .passes import Repeatable, RouterPass, in_backward
from .routers import Router

# What the choice between schedules assumes of the machine: two cores of a server. Only the ratio counts.
_FLOPS = 1e11  # per second
_BANDWIDTH = 1e10  # bytes per second
# Up to so many numbers every row gets a copy of its own experts' cores.
_FEW_NUMBERS = 1 << 23
_REPEATABLE = 256  # calls of one FFN that a backward pass to come may repeat
# From so many rows per expert on, a processor computes expert by expert ...
_MANY_ROWS = 384
# ... and with gradients only if an expert has no more numbers than this for itself: the gradient of every
# weight[expert] is as large as all experts together.
_OWN_NUMBERS = 1 << 18


class Inputs(NamedTuple):
    """What experts start from, per token or per row: one that the experts' shared parts have worked on."""

    rows: Tensor  # (N, H)
    up: Tensor | None = None  # (N, inner) what the terms of `up` that all share made of them
    gate: Tensor | None = None

    def take(self, index: Tensor) -> "Inputs":
        """Those at `index` (M,), in its order."""
        return Inputs(*(None if part is None else part[index] for part in self))

    def spread(self, choices: Choices) -> "Inputs":
        """Of the tokens -> of their choices."""
        return Inputs(*(None if part is None else choices.spread(part) for part in self))


class FeedForward(nn.Module):
    """The mixture that takes the place of a dense FFN: down(act(up x)) or down(act(gate x) * up x).

    `form`: {"up": spec, "down": spec, "gate": spec if gated} (see `Projection`), and "adapter": its size,
    if the experts are adapters behind an FFN that is shared altogether.

    Schedules, the same function in different operations:
        apply     the cores act on the activations; matrices are built for chains that cannot act
        rebuild   the matrices of the experts that are hit are contracted, then used as dense experts
        cached    rebuild, with the matrices kept between calls; where no gradient is needed
    Which one runs is `schedule`, "auto" for the one that `seconds` says is fastest.
    """

    def __init__(self, form: dict, num_experts: int, top_k: int, rule: str = DEFAULT_RULE):
        super().__init__()
        hidden_size = math.prod(form["up"]["terms"][0]["in_dims"])
        self.num_experts = num_experts
        self.router = Router(hidden_size, num_experts, top_k, rule)
        self.gate = Projection(form["gate"], num_experts) if "gate" in form else None
        self.up = Projection(form["up"], num_experts)
        self.down = Projection(form["down"], num_experts)
        size = form.get("adapter")
        self.adapter = None if size is None else Adapter(hidden_size, size, num_experts)
        self.top_k = top_k
        self.act = nn.Identity()
        self.inner_dropout = nn.Identity()
        self.outer_dropout = nn.Identity()
        self.adds_residual = False
        self.in_decoder = False
        self.schedule = "auto"
        self.cache: MatrixCache | None = None
        self.register_buffer("balance_bias", None)  # (E,) see Router; None: not used
        self.task: Tensor | None = None  # see Router; a pass may bring its own
        self.load: Tensor | None = None  # (E,) how often experts were chosen since the bias moved
        self.router_pass: RouterPass | None = None  # of the model, while it runs
        self.repeatable = Repeatable(maxlen=_REPEATABLE)
        # Tuples, so not registered a second time. PEFT puts wrappers in the place of the modules.
        self._adapters = () if self.adapter is None else (self.adapter,)
        self._chains = tuple(module for module in self.modules() if isinstance(module, Chain))
        first = [*self.up.modules(), *(self.gate.modules() if self.gate is not None else ())]
        once = self._chains if self.adapter is not None else first
        # Those that work on a token once, however many experts it has.
        self._common = tuple(chain for chain in self._chains if chain in once and all(chain.shared))

    # ------------------------------------------------------------------------------------- cost

    @property
    def flops_per_token(self) -> int:
        """Floating-point operations per token (2 per multiply-add) in products with weights."""
        own = self.router.weight.numel() + self.top_k * self._adapter_numbers
        return 2 * own + sum(self._rows(chain) * chain.flops_per_row for chain in self._chains)

    def _rows(self, chain: Chain) -> int:
        """How many copies of a token pass a chain."""
        return 1 if chain in self._common else self.top_k

    @property
    def _adapter_numbers(self) -> int:
        return sum(adapter.own_numbers for adapter in self._adapters)

    @property
    def own_numbers(self) -> int:
        """Numbers that one expert has for itself, biases apart."""
        return self._adapter_numbers + sum(chain.own_numbers for chain in self._chains)

    @property
    def rebuild_flops(self) -> int:
        """Operations per forward pass to contract the matrices of all experts, where cores cannot act."""
        return self.num_experts * sum(chain.rebuild_flops for chain in self._chains if not chain.acts)

    def experts_hit(self, num_tokens: int, num_choices: int | None = None) -> float:
        """How many experts so many choices of so many tokens reach, if all are equally likely.

        By default every token has `top_k` choices, as in the methods below.
        """
        if not num_tokens:
            return 0.0
        per_token = self.top_k if num_choices is None else num_choices / num_tokens
        return self.num_experts * (1 - (1 - per_token / self.num_experts) ** num_tokens)

    def flops(self, num_tokens: int, schedule: str = "apply", num_choices: int | None = None) -> float:
        """Floating-point operations of a forward pass over that many tokens."""
        hit = self.experts_hit(num_tokens, num_choices)
        num_choices = num_tokens * self.top_k if num_choices is None else num_choices
        flops = 2.0 * (num_tokens * self.router.weight.numel() + num_choices * self._adapter_numbers)
        for chain in self._chains:
            rows = num_tokens if chain in self._common else num_choices
            acts = chain.acts and schedule == "apply"
            flops += rows * (chain.flops_per_row if acts else 2 * chain.in_features * chain.out_features)
            flops += 0 if acts or schedule == "cached" else hit * chain.rebuild_flops
        return flops

    def bytes_read(self, num_tokens: int, schedule: str = "apply", num_choices: int | None = None) -> float:
        """Bytes of weights that a forward pass over that many tokens moves, matrices it builds included."""
        hit = self.experts_hit(num_tokens, num_choices)
        total = self.router.weight.nbytes
        total += sum(hit * adapter.own_numbers * adapter.aux_0.itemsize for adapter in self._adapters)
        for chain in self._chains:
            stored = sum(
                math.prod(shape) * (1 if shared else hit)
                for shape, shared in zip(chain.shapes, chain.shared, strict=True)
            )
            matrices = hit * chain.in_features * chain.out_features
            if chain.acts and schedule == "apply":
                numbers = stored
            else:  # built: written and read once
                numbers = matrices if schedule == "cached" else stored + 2 * matrices
            total += numbers * getattr(chain, chain.core_names[0]).itemsize
        return total

    def seconds(self, num_tokens: int, schedule: str, num_choices: int | None = None) -> float:
        """A forward pass's time on the machine of `_FLOPS` and `_BANDWIDTH`; for comparing schedules."""
        flops = self.flops(num_tokens, schedule, num_choices)
        return flops / _FLOPS + self.bytes_read(num_tokens, schedule, num_choices) / _BANDWIDTH

    def configure(self, config: PretrainedConfig, num_mixtures: int) -> None:
        """Take over the config's router and schedule options, the latter overruled by the environment.

        Raises:
            ValueError: an option has a value that it cannot have.
        """
        self.router.combine = read_option(config, "router_combine")
        self.router.jitter_noise = config.router_jitter_noise
        self.router.capacity_factor = config.router_capacity_factor
        if config.router_tasks is not None:
            self.router.add_tasks(len(config.router_tasks))
        if config.router_bias_update_rate or config.router_balance_bias:
            config.router_balance_bias = True  # so that it is loaded again, whatever the rate then is
            self.add_balance_bias()
        self.schedule = read_option(config, "mpoe_schedule")
        keep, limit = read_option(config, "mpoe_cache"), read_option(config, "mpoe_cache_bytes")
        if keep == "off":
            keep = "hit" if self.schedule == "cached" else None
        limit = None if limit is None else float(limit) / num_mixtures
        self.cache = None if keep is None else MatrixCache(keep, limit)

    def add_balance_bias(self) -> None:
        if self.balance_bias is None:
            device = next(self.parameters()).device
            self.balance_bias = torch.zeros(self.num_experts, dtype=torch.float32, device=device)

    def choose_schedule(self, num_tokens: int, num_choices: int | None = None) -> str:
        """The schedule that will run for so many tokens; see `flops`."""
        if self.schedule != "auto":
            return self.schedule
        if torch.compiler.is_compiling():
            return "apply"
        free = self.cache is not None and not torch.is_grad_enabled()
        return min(
            ("apply", "rebuild", "cached")[: 3 if free else 2],
            key=lambda schedule: self.seconds(num_tokens, schedule, num_choices),
        )

    # ------------------------------------------------------------------------------------- forward

    def train(self, mode: bool = True):
        if mode and self.cache is not None:
            self.cache.entries.clear()  # FSDP may gather changed cores into the memory of the old ones
        self.repeatable.clear()
        return super().train(mode)

    def forward(self, hidden_states: Tensor, residual: Tensor | None = None) -> Tensor:
        """(..., H) -> (..., H); plus the residual in families whose FFN adds it."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])  # (T, H)
        output = self._mix(tokens, self._route(tokens)).reshape(hidden_states.shape)
        output = self.outer_dropout(output)
        return output + residual if self.adds_residual else output

    def _route(self, tokens: Tensor) -> Choices:
        """The choices for tokens (T, H) that are to be computed."""
        running = self.router_pass
        if running is not None:
            mask = running.mask(self, len(tokens))  # (T,)
            task = self.task if running.task is None else running.task
            routing = self.router(tokens, self.balance_bias, mask, task)
            return running.add(self, routing, mask, task).served()
        if self.training and not torch.compiler.is_compiling():
            if not in_backward():
                self.repeatable.clear()  # this call adds nothing when it is repeated
            elif self.repeatable:
                repeated, mask, task = self.repeatable.pop()  # the backward pass repeats the last call first
                routing = self.router(tokens, self.balance_bias, mask, task)
                return repeated.join(routing, mask)[0].served()
        return self.router(tokens, self.balance_bias, task=self.task).served()

    @torch.no_grad()
    def note_load(self, routing: Routing, mask: Tensor | None) -> None:
        """Count the choices of a call, without padding, until the balancing bias moves."""
        load = routing.choices.load(self.num_experts, mask)  # (E,)
        self.load = load if self.load is None else self.load + load

    @torch.no_grad()
    def update_bias(self, rate: float) -> None:
        """One step of DeepSeek-V3's balancing: up for experts with too little load, down for the others."""
        if self.load is None or self.balance_bias is None:
            return
        load, self.load = self.load, None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(load)
        self.balance_bias += rate * (load.mean() - load).sign()

    def _mix(self, tokens: Tensor, choices: Choices) -> Tensor:
        """What the chosen experts make of tokens (T, H), weighted and summed -> (T, H)."""
        num_tokens, num_rows = tokens.shape[0], choices.experts.shape[0]
        schedule = self.choose_schedule(num_tokens, num_rows)
        inputs = self._prepare(tokens)
        applies = schedule == "apply" and all(chain.acts for chain in self._chains)
        if applies and num_rows * self.own_numbers <= _FEW_NUMBERS:
            rows = self._experts(inputs.spread(choices), Picks(choices.experts))  # (N, H)
            return choices.combine(rows, num_tokens)
        order = choices.experts.argsort(stable=True)  # (N,) choices by expert
        on_device = torch.compiler.is_compiling() or (tokens.is_cuda and schedule != "cached")
        on_device = on_device or tokens.is_meta
        picks = Picks.of_sorted(choices.experts[order], self.num_experts, on_device)
        if not on_device and self._goes_expert_by_expert(schedule, applies, num_rows):
            return self._mix_by_expert(inputs, choices, order.split(picks.sizes), schedule)
        rows = self._experts(inputs.take(choices.tokens[order]), picks, schedule)  # (N, H), by expert
        if choices.per_token is None:
            return choices.take(order).combine(rows, num_tokens)
        return choices.combine(rows[order.argsort()], num_tokens)

    def _mix_by_expert(
        self, inputs: Inputs, choices: Choices, parts: Sequence[Tensor], schedule: str
    ) -> Tensor:
        """The same, one expert after the other; `parts`: for every expert the indices of its choices."""
        output, dtype = None, inputs.rows.dtype
        for expert, part in enumerate(parts):
            if len(part) == 0:
                continue
            own = choices.take(part)
            rows = self._experts(inputs.take(own.tokens), Picks(expert), schedule)  # (choices of it, H)
            rows, dtype = rows * own.weights.unsqueeze(-1), rows.dtype
            if output is None:
                output = rows.new_zeros(inputs.rows.shape)  # (T, H) in float32 at least
            output.index_add_(0, own.tokens, rows)
        return output.to(dtype)

    def _goes_expert_by_expert(self, schedule: str, applies: bool, num_rows: int) -> bool:
        """One expert's whole FFN at a time: its activations stay in the processor's cache."""
        if num_rows == 0 or any(hasattr(chain, "_hf_hook") for chain in self._chains):
            return False  # an offloaded module would be read once per expert
        if schedule == "cached" and self.cache is not None:
            return True
        if torch.is_grad_enabled() and self.own_numbers > _OWN_NUMBERS:
            return False
        return not applies or num_rows >= _MANY_ROWS * self.num_experts

    def _prepare(self, tokens: Tensor) -> Inputs:
        """Do what is the same for all experts of a token, once: tokens (T, H)."""
        if self.adapter is not None:
            return Inputs(self._ffn(Inputs(tokens), Picks(0)))
        return Inputs(tokens, self.up.common(tokens), None if self.gate is None else self.gate.common(tokens))

    def _experts(self, inputs: Inputs, picks: Picks, schedule: str = "apply") -> Tensor:
        """(N, H) the outputs of experts for rows that each have the one that `picks` says."""
        if self.adapter is not None:
            return self.adapter(inputs.rows, picks)
        return self._ffn(inputs, picks, schedule)

    def run_all_experts(self, tokens: Tensor) -> Tensor:
        """(E, T, H) what every expert makes of tokens (T, H), whatever the router decides."""
        inputs = self._prepare(tokens)
        return torch.stack([self._experts(inputs, Picks(expert)) for expert in range(self.num_experts)])

    def _ffn(self, inputs: Inputs, picks: Picks, schedule: str = "apply") -> Tensor:
        rebuild = schedule != "apply"
        cache = self.cache if schedule == "cached" and not torch.is_grad_enabled() else None
        up = self.up(inputs.rows, picks, rebuild, cache, inputs.up)
        if self.gate is None:
            inner = self.act(up)
        else:
            inner = self.act(self.gate(inputs.rows, picks, rebuild, cache, inputs.gate)) * up
        return self.down(self.inner_dropout(inner), picks, rebuild, cache)
