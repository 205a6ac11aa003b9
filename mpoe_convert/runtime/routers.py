"""Routers: which experts a token goes to, and the losses that routers learn from."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .choices import DEFAULT_RULE, TOP_ANY, Choices, Context, Routing, find_rule
from .costs import Cost, Work
from .header import init
from .parts import Part
from .rules.top_any import likeness_loss, passing_gates


class Router(Part):
    """Decides which experts a token goes to, in float32 in every model dtype.

    It looks at the token, or, with `by_task`, at an embedding (H,) of the task that the token belongs to: one
    of `tasks` (number of tasks, H), or one that is given.

    Attributes:
        select: the selection rule.
        top_k: k, for rules that choose so many experts per token; for others the most that they choose, for
            rule expert-choice the mean number.
        threshold: of rule top-p, a probability.
        threshold_bias: (E,) of rule top-any, learned, what the cosine of an expert's row and the input is
            compared with; None with other rules, whose logits are products. (Trainers take what is called a
            bias out of weight decay.)
        parts: P, if expert e holds part e mod P of the FFN's neurons; 1: every expert is a whole FFN.
        combine: "renormalised": softmax over the chosen logits of experts that hold the same neurons; they
            sum to one, so that identical experts compute what the dense FFN did. For one such expert that is
            the constant one, so the weight is p / p.detach(): one in value, with the gradient of log p (p
            over all experts) to the router, and none to the token. "raw": the probability over all experts
            (Switch), which scales the FFN's output down.
        jitter_noise: in training the inputs are multiplied by uniform numbers from 1 +- this (Switch).
        sizes: of the experts, in means of all, where the balancing loss favours small ones; None: all count
            alike.
        capacity_factor: in training an expert takes at most this times N / E of the N choices, first
            choices before second, early tokens before late ones; others are dropped. None: no limit.
    """

    in_float32 = True

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        rule: str = DEFAULT_RULE,
        parts: int = 1,
        threshold: float = 1.0,
    ):
        super().__init__()
        self.top_k, self.parts, self.num_experts, self.threshold = top_k, parts, num_experts, threshold
        self.select = find_rule(rule)
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, dtype=torch.float32))
        self.shared_params = self.weight.numel()
        self.register_parameter("threshold_bias", None)
        if rule == TOP_ANY:
            self.threshold_bias = nn.Parameter(torch.empty(num_experts, dtype=torch.float32))
            self.shared_params += num_experts
        self.combine = "renormalised"
        self.jitter_noise = 0.0
        self.capacity_factor: float | None = None
        self.sizes: tuple[float, ...] | None = None
        self.by_task = False
        self.register_parameter("tasks", None)

    def add_tasks(self, number: int) -> None:
        """Choose by task from now on, with a table of so many embeddings (0: none, they are given)."""
        self.by_task = True
        if number:
            empty = torch.empty(number, self.weight.shape[1], dtype=torch.float32, device=self.weight.device)
            self.tasks = nn.Parameter(empty)
            self.shared_params += self.tasks.numel()

    def forward(
        self,
        tokens: Tensor,
        bias: Tensor | None = None,
        mask: Tensor | None = None,
        task: Tensor | None = None,
        num_sequences: int = 1,
    ) -> Routing:
        """Decide for tokens (T, H).

        Args:
            bias: (E,) for balancing: it changes the selection, not the weights.
            mask: (T,) zero for padding, which takes no room of the capacity.
            task: numbers (B,) or embeddings (B, H) of the tasks of B sequences; one, or one per sequence.
            num_sequences: B, of which rule expert-choice chooses in each.
        """
        device = tokens.device.type
        with nullcontext() if device == "meta" else torch.autocast(device, enabled=False):
            x = self._task_rows(tokens, task) if self.by_task else tokens.float()  # (T, H)
            if self.training and self.jitter_noise:
                x = x * torch.empty_like(x).uniform_(1 - self.jitter_noise, 1 + self.jitter_noise)
            logits = self.logits_of(x)  # (T, E)
            context = Context(num_sequences, mask, None if self.by_task else x)
            choices = self.select(self, logits, bias, context)
            routing = Routing(logits, choices, sizes=self.sizes)
            if not self.training:
                return routing
            if self.capacity_factor is not None:
                routing = routing._replace(room=self._has_room(routing.choices, mask, self.capacity_factor))
            if self.threshold_bias is None:
                return routing
            gates = passing_gates(logits, self.threshold_bias)
            return routing._replace(gates=gates, likeness=likeness_loss(self.weight))

    def logits_of(self, x: Tensor) -> Tensor:
        """(T, E) products of inputs (T, H) with the experts' rows; of rule top-any their cosines."""
        if self.threshold_bias is None:
            return F.linear(x, self.weight.float())
        return F.linear(F.normalize(x, dim=-1), F.normalize(self.weight.float(), dim=-1))

    def _task_rows(self, tokens: Tensor, task: Tensor | None) -> Tensor:
        """(T, H) embeddings of the tasks that the tokens belong to, sequence by sequence."""
        if task is None:
            raise ValueError(
                "the routers of this model choose by task: name one with model.route_by(...) or pass task_ids"
            )
        task = task.to(tokens.device)
        rows = (task if task.is_floating_point() else self.tasks[task]).float()  # (B, H)
        if tokens.shape[0] % rows.shape[0]:
            raise ValueError(
                f"{rows.shape[0]} tasks were given for {tokens.shape[0]} tokens; expected one, "
                "or one per sequence"
            )
        return rows.repeat_interleave(tokens.shape[0] // rows.shape[0], 0)

    def _has_room(self, choices: Choices, mask: Tensor | None, factor: float) -> Tensor:
        """(N,) whether the expert of a choice still takes it. Padding takes no room."""
        num_experts = self.num_experts
        # (N,) the first choices of all tokens, then the second ones, and so on
        order = choices.ranks().argsort(stable=True)
        ranked = choices.take(order)
        queues = F.one_hot(ranked.experts, num_experts)  # (N, E) a column for each expert's queue
        if ranked.real is not None:
            queues = queues * ranked.real.unsqueeze(-1)
        if mask is not None:
            queues = queues * mask.to(queues)[ranked.tokens].unsqueeze(-1)
        capacity = (factor * queues.sum() / num_experts).ceil().clamp(min=1)
        place = (queues.cumsum(0) * queues).sum(-1)  # (N,) 1 for the first in its expert's queue
        return (place <= capacity)[order.argsort()]

    def cost(self, work: Work, schedule: str) -> Cost:
        return Cost(2 * work.tokens * self.weight.numel(), 0, self.weight.nbytes)

    @torch.no_grad()
    def reset_parameters(self, std: float) -> None:
        init.normal_(self.weight, std=std)
        if self.threshold_bias is not None:  # rows of norm one, more or less
            init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)
            init.zeros_(self.threshold_bias)
        if self.tasks is not None:
            init.normal_(self.tasks)


def load_balancing_loss(routing: Routing, mask: Tensor | None = None) -> Tensor:
    """E * sum over e of f_e P_e: f_e choices of expert e per token, P_e its mean probability; k if balanced.

    Switch Transformer, arXiv 2101.03961, equations 4-6, counted as transformers counts it, for one layer.
    `mask` (T,) is zero for tokens that do not count.

    Where the routing has sizes, a choice counts by that of its expert: f_e becomes h_e f_e with h_e the
    expert's size, the mean of all being 1 (the parameter penalty of HMoE, arXiv 2408.10681, in means rather
    than numbers of parameters). It is least where small experts are preferred.
    """
    num_experts = routing.logits.shape[-1]
    load = routing.choices.load(num_experts, mask)  # (E,)
    per_token = load / (routing.logits.shape[0] if mask is None else mask.sum().clamp(min=1))  # (E,)
    if routing.sizes is not None:
        per_token = per_token * per_token.new_tensor(routing.sizes)
    return num_experts * (per_token * _mean(routing.logits.softmax(-1), mask)).sum()


def router_z_loss(routing: Routing, mask: Tensor | None = None) -> Tensor:
    """Mean squared logsumexp of the logits (ST-MoE, arXiv 2202.08906, equation 5)."""
    return _mean(routing.logits.logsumexp(-1).square(), mask)


def efficiency_loss(gates: Tensor, mask: Tensor | None = None) -> Tensor:
    """Share of the experts that pass, of gates (T, E) (DynMoE, arXiv 2405.14297, in its code)."""
    return _mean(gates.mean(-1), mask)


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Over tokens, the first axis, that the mask (T,) counts."""
    if mask is None:
        return values.mean(0)
    mask = mask.to(values).reshape(-1, *[1] * (values.ndim - 1))  # (T, 1, ...)
    return (values * mask).sum(0) / mask.sum().clamp(min=1)
