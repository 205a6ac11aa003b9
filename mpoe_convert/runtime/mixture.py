"""The mixture: the FFN of several experts with a router of its own."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from .choices import DEFAULT_RULE, EXPERT_CHOICE, TOP_ANY, Choices, Routing
from .config import CONFIG_OPTIONS
from .costs import mean
from .mixing import Mixing
from .parts import hidden_size_of
from .passes import Noted, Repeatable, RouterPass, in_backward
from .routers import Router

_NO_BIAS = (
    "router_bias_update_rate or router_balance_bias is set with the rule 'top-any', whose experts have "
    "thresholds that are learned; leave it out, and balance by router_aux_loss_coef"
)
_IS_BALANCED = "{} is set with the rule 'expert-choice', whose load is balanced; leave it out"
_REPEATABLE = 256  # calls of one FFN that a backward pass to come may repeat


class FeedForward(Mixing):
    """The mixture that takes the place of a dense FFN: down(act(up x)) or down(act(gate x) * up x).

    Attributes:
        router: chooses the experts.
        rule: the name in `RULES` by which it does.
        shared: experts that every token passes beside those that the router chooses, behind them in the
            stacks (DeepSeekMoE, arXiv 2401.06066).
        weight_scale: of all combine weights. With M shared experts 1 / (1 + M), so that identical experts
            compute what the dense FFN did; one if each holds neurons of its own.
    """

    router: Router

    def __init__(
        self,
        form: dict,
        num_experts: int,
        top_k: int,
        rule: str = DEFAULT_RULE,
        shared_experts: int = 0,
        parts: int = 1,
        threshold: float = 1.0,
    ):
        router = Router(hidden_size_of(form), num_experts, top_k, rule, parts, threshold)
        super().__init__(form, num_experts + shared_experts, top_k + shared_experts, router)
        self.rule = rule
        self.shared = range(num_experts, num_experts + shared_experts)
        self.weight_scale = 1.0 if parts > 1 else 1 / (1 + shared_experts)
        self.outer_dropout: nn.Module = nn.Identity()
        self.adds_residual = False
        self.in_decoder = False
        self.register_buffer("balance_bias", None)  # (E,) see Router; None: not used
        self.task: Tensor | None = None  # see Router; a pass may bring its own
        self.load: Tensor | None = None  # (E,) how often experts were chosen since the bias moved
        self.router_pass: RouterPass | None = None  # of the model, while it runs
        self.repeatable = Repeatable(maxlen=_REPEATABLE)

    @classmethod
    def from_block(cls, form: dict, block: dict) -> "FeedForward":
        """The mixture of a form of `config.mpoe`, which is `block`."""
        names = ("rule", "shared_experts", "parts", "threshold")
        more = {name: block[name] for name in names if name in block}
        return cls(form, block["num_experts"], block["top_k"], **more)

    # ------------------------------------------------------------------------------------- options

    def configure(self, config: PretrainedConfig, num_mixtures: int) -> None:
        """Take over the config's router and schedule options, the latter overruled by the environment.

        Raises:
            ValueError: an option has a value that it cannot have.
        """
        for option in CONFIG_OPTIONS:
            option.check(getattr(config, option.name))
        self.router.combine = config.router_combine
        if self.differ and config.router_size_penalty:
            routed = self.own_by_expert[: self.router.num_experts]
            self.router.sizes = tuple(size / mean(routed) for size in routed)
        if self.rule == TOP_ANY:
            _check_learned_thresholds(config)
        if self.rule == EXPERT_CHOICE:
            _check_expert_choice(config)
        self.router.jitter_noise = config.router_jitter_noise
        self.router.capacity_factor = config.router_capacity_factor
        if config.router_tasks is not None:
            self.router.add_tasks(len(config.router_tasks))
        if config.router_bias_update_rate or config.router_balance_bias:
            config.router_balance_bias = True  # so that it is loaded again, whatever the rate then is
            self.add_balance_bias()
        self.configure_schedule(config, num_mixtures)

    def add_balance_bias(self) -> None:
        """Let there be a bias (E,), zero at first; one that is there stays.

        Raises:
            ValueError: the rule is top-any or expert-choice.
        """
        if self.rule == TOP_ANY:
            raise ValueError(_NO_BIAS)
        if self.rule == EXPERT_CHOICE:
            raise ValueError(_IS_BALANCED.format("router_bias_update_rate or router_balance_bias"))
        if self.balance_bias is None:
            device = next(self.parameters()).device
            self.balance_bias = torch.zeros(self.shared.start, dtype=torch.float32, device=device)

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True):
        bias = self.balance_bias
        super()._apply(fn, recurse)
        if bias is not None and self.balance_bias is not None and self.balance_bias.dtype != bias.dtype:
            # In bfloat16 steps of `router_bias_update_rate` are lost in rounding.
            self.balance_bias = bias.to(self.balance_bias.device)
        return self

    # ------------------------------------------------------------------------------------- forward

    def forward(self, hidden_states: Tensor, residual: Tensor | None = None) -> Tensor:
        """(..., H) -> (..., H); plus the residual in families whose FFN adds it."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])  # (T, H)
        num_sequences = hidden_states.shape[0] if hidden_states.ndim > 2 else 1  # B
        choices = self._route(tokens, num_sequences).beside(self.shared, tokens.shape[0], self.weight_scale)
        output = self._mix(tokens, choices).reshape(hidden_states.shape)
        if self.down.bias is not None and self.down.bias_kind == "once":
            output = output + self.down.bias
        output = self.outer_dropout(output)
        return output + residual if self.adds_residual else output

    def _route(self, tokens: Tensor, num_sequences: int) -> Choices:
        """The choices for tokens (T, H) of B sequences that are to be computed."""
        running = self.router_pass
        if running is not None:
            mask = running.mask(self, tokens.shape[0])  # (T,)
            task = self.task if running.task is None else running.task
            routing = self.router(tokens, self.balance_bias, mask, task, num_sequences)
            return running.add(self, tokens, routing, mask, task).served()
        noted = None if torch.compiler.is_compiling() else self._repeated(tokens)
        if noted is None or noted.of is None:
            return self.router(
                tokens, self.balance_bias, task=self.task, num_sequences=num_sequences
            ).served()
        routing = self.router(tokens, self.balance_bias, noted.mask, noted.task, num_sequences)
        return noted.of.repeat(routing, noted.mask, noted.lacks_shown).served()

    def _repeated(self, tokens: Tensor) -> Noted | None:
        """The call that the backward pass repeats with tokens (T, H). One outside of it is noted: None.

        Raises:
            RuntimeError: the backward pass repeats a call that is not noted.
        """
        if not in_backward():
            if self.training:
                self.repeatable.note(tokens, None, None, None)  # it adds nothing when it is repeated
            return None
        noted = self.repeatable.take(tokens)
        if noted is None and self.training:
            raise RuntimeError(
                f"gradient checkpointing repeats a call of a mixture with {tokens.shape[0]} tokens that is "
                f"not among its last {_REPEATABLE} calls, or was repeated before; expected one backward pass "
                "for each forward pass, before so many others"
            )
        return noted

    @torch.no_grad()
    def note_load(self, routing: Routing, mask: Tensor | None) -> None:
        """Count the choices of a call, without padding, until the balancing bias moves."""
        load = routing.choices.load(self.shared.start, mask)  # (E,)
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


def _check_expert_choice(config: PretrainedConfig) -> None:
    """Raises ValueError for options that have no meaning with rule expert-choice."""
    if config.router_bias_update_rate or config.router_balance_bias:
        raise ValueError(_IS_BALANCED.format("router_bias_update_rate or router_balance_bias"))
    if config.router_capacity_factor is not None:
        raise ValueError(_IS_BALANCED.format("router_capacity_factor"))
    if config.router_tasks is not None:
        raise ValueError(
            "router_tasks is set with the rule 'expert-choice', whose experts choose among the tokens of a "
            "sequence, which have one task; leave it out"
        )
    if getattr(config, "chunk_size_feed_forward", 0):
        raise ValueError(
            f"chunk_size_feed_forward is {config.chunk_size_feed_forward} with the rule 'expert-choice', "
            "whose experts choose among all tokens of a sequence; expected 0"
        )


def _check_learned_thresholds(config: PretrainedConfig) -> None:
    """Raises ValueError for options that have no meaning with rule top-any."""
    if config.router_combine == "raw":
        raise ValueError(
            "router_combine is 'raw' with the rule 'top-any', whose gates are one or zero, no probabilities; "
            "expected 'renormalised'"
        )
    if config.router_bias_update_rate or config.router_balance_bias:
        raise ValueError(_NO_BIAS)
