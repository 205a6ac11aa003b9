"""Parts of a mixture: projections, and adapters behind the FFN; the table of what a form may hold.

A part says itself what it owns, what it costs and what it starts as. Another type of part is one more class
and one more row in `PARTS`.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .chains import Chain, MatrixCache, Picks, check_one_each, run_each
from .costs import Cost, Work, mean
from .header import init
from .linears import split_experts


class Part(nn.Module):
    """What a mixture is made of: the router, and what the form of the experts lists.

    Attributes:
        acts: it works on the activations, without an expert's matrix being built.
        behind: it works on what the FFN made of a token, in the order of `PARTS`: (N, H) -> (N, H).
        in_float32: its parameters are float32 in every model dtype.
        initial_scale: standard deviation of the entries of matrices in a new model; None: the config's.
        shared_params: parameters that are stored once.
        own_by_expert: parameters that each expert has for itself; empty: none has any.
        own_params: their mean.
    """

    acts = True
    behind = False
    in_float32 = False
    initial_scale: float | None = None
    shared_params: int
    own_by_expert: tuple[int, ...] = ()

    @property
    def own_params(self) -> float:
        return mean(self.own_by_expert) if self.own_by_expert else 0

    @property
    def stored_params(self) -> int:
        """Of all experts."""
        return self.shared_params + sum(self.own_by_expert)

    @classmethod
    def from_form(cls, form: dict, key: str, num_experts: int) -> "Part":
        """The part that stands under a key of a form, see `config.mpoe`."""
        raise NotImplementedError

    def cost(self, work: Work, schedule: str) -> Cost:
        """Of a call of the mixture; for the schedules see `FeedForward`."""
        raise NotImplementedError

    def reset_parameters(self, std: float) -> None:
        """Start as a new model does, where entries of matrices have the standard deviation `std`."""
        raise NotImplementedError


class Started(NamedTuple):
    """What a projection made of M rows, as far as it is the same for all experts."""

    total: Tensor | None  # (M, out) the sum of the common terms; None: there are none
    starts: tuple[Tensor | None, ...]  # by term (M, features), see `Chain.num_start`; None: it has no start

    def each(self, function: Callable[[Tensor], Tensor]) -> "Started":
        """The same, of other rows, by a function of a tensor."""
        total, starts = self
        return Started(
            None if total is None else function(total),
            tuple(None if start is None else function(start) for start in starts),
        )


class Projection(Part):
    """y = sum of terms + bias, for rows that each have one expert.

    `spec`: {"terms": [{"in_dims", "out_dims", "bonds", "shared"[, "untied"]}, ...],
             "bias": "shared" | "per-expert" | "once" | None}
    "once": it is added to the weighted sum of the experts, not to each of them.
    `sees_tokens`: its input is the token itself, so that common terms, and what others begin with, work on a
    token once, however many experts it has.
    """

    # What is linear and the same for all experts at its end works on the sum of what a token's experts made,
    # see `finish`.
    ends_once = False

    def __init__(self, spec: dict, num_experts: int, sees_tokens: bool = True):
        super().__init__()
        # A tuple, so not registered a second time. PEFT puts wrappers in the place of modules.
        self._chains = tuple(Chain(term, num_experts) for term in spec["terms"])
        self.terms = nn.ModuleList(self._chains)
        self.sees_tokens = sees_tokens
        self.bias_kind = spec["bias"]
        out_features = math.prod(spec["terms"][0]["out_dims"])
        if self.bias_kind is None:
            self.bias = None
        else:
            size = (num_experts, out_features) if self.bias_kind == "per-expert" else (out_features,)
            self.bias = nn.Parameter(torch.empty(size))
        self.acts = all(chain.acts for chain in self._chains)
        self._shared_bias = out_features if self.bias_kind in ("shared", "once") else 0
        self._own_bias = out_features if self.bias_kind == "per-expert" else 0
        self.shared_params = self._shared_bias + sum(chain.shared_params for chain in self._chains)
        each = zip(*(chain.own_by_expert for chain in self._chains), strict=True)
        self.own_by_expert = tuple(self._own_bias + sum(numbers) for numbers in each)

    @classmethod
    def from_form(cls, form: dict, key: str, num_experts: int) -> "Projection":
        return cls(form[key], num_experts, sees_tokens=key != "down")

    def start(self, tokens: Tensor, applies: bool) -> Started:
        """What is the same for all experts of tokens (T, in).

        `applies`: other terms than the common ones are started too.
        """
        picks = Picks(0)
        total: Tensor | None = None
        starts: list[Tensor | None] = []
        for term, chain in zip(self.terms, self._chains, strict=True):
            if chain.is_common:
                part = term(tokens, picks)
                total = part if total is None else total + part
            is_started = applies and chain.num_start > 0
            starts.append(term(tokens, picks, span="start") if is_started else None)
        return Started(total, tuple(starts))

    def forward(
        self,
        rows: Tensor,
        picks: Picks,
        rebuild: bool = False,
        cache: MatrixCache | None = None,
        started: Started | None = None,
        ends: bool = True,
    ) -> Tensor:
        """(N, in) -> (N, out); see `Chain`.

        Args:
            started: what is the same for all experts, if done.
            ends: False: what `finish` takes instead, (N, features).
        """
        picks = Picks(*picks)  # as in a chain
        if not ends:
            return self._unfinished(rows, picks)
        total, starts = (None, (None,) * len(self._chains)) if started is None else started
        y = total  # (N, out)
        for term, chain, begun in zip(self.terms, self._chains, starts, strict=True):
            if total is not None and chain.is_common:
                continue
            part = term(rows, picks, rebuild, cache) if begun is None else term(begun, picks, span="rest")
            y = part if y is None else y + part
        assert y is not None, "a projection has at least one term"
        if self.bias is None or self.bias_kind == "once":
            return y
        return y + (self.bias if self.bias_kind == "shared" else self.bias[picks.experts])

    def has_start(self) -> bool:
        """Whether terms of which experts own something begin with what is the same for all of them."""
        return any(chain.num_start for chain in self._chains)

    def has_end(self) -> bool:
        """Whether the last of its work, which is linear, is the same for all experts."""
        ends = any(chain.is_common or chain.num_end for chain in self._chains)
        return ends and not self.sees_tokens and self.bias_kind in (None, "once")

    def _unfinished(self, rows: Tensor, picks: Picks) -> Tensor:
        """(N, in) -> (N, features): the terms without their ends, side by side; see `finish`."""
        parts = [
            rows if chain.is_common else term(rows, picks, span="own")
            for term, chain in zip(self.terms, self._chains, strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat([part.to(parts[-1].dtype) for part in parts], dim=1)

    def finish(self, sums: Tensor) -> Tensor:
        """What is left to do: weighted sums (T, features) of a token's unfinished rows -> (T, out)."""
        picks, y, place = Picks(0), None, 0
        for term, chain in zip(self.terms, self._chains, strict=True):
            width = chain.in_features if chain.is_common else chain.own_features
            part = sums[:, place : place + width]
            place += width
            if chain.is_common or chain.num_end:
                part = term(part, picks, span="whole" if chain.is_common else "end")
            y = part if y is None else y + part
        assert y is not None, "a projection has at least one term"
        return y

    def cost(self, work: Work, schedule: str) -> Cost:
        spared = (work.rows - work.tokens) * (self.sees_tokens or self.ends_once)
        costs = [
            chain.cost(work.tokens, 1, "apply")
            if chain.is_common and (self.sees_tokens or (self.ends_once and schedule == "apply"))
            else chain.cost(
                work.rows,
                work.experts,
                schedule,
                spared * (chain.start_flops if self.sees_tokens else chain.end_flops),
            )
            for chain in self._chains
        ]
        if self.bias is not None:
            nbytes = (self._shared_bias + work.experts * self._own_bias) * self.bias.itemsize
            costs.append(Cost(0, 0, nbytes))
        return Cost.total(costs)

    @torch.no_grad()
    def reset_parameters(self, std: float) -> None:
        for chain in self._chains:
            chain.reset_parameters(std)
        if self.bias is not None:
            init.zeros_(self.bias)


class Adapter(Part):
    """One small bottleneck per expert behind an FFN that all share: y + gelu(y aux_0[e]) aux_1[e].

    PESC, arXiv 2401.02731. `aux_0` (E, H, r), `aux_1` (E, r, H); of experts that differ in r, vectors, see
    `split_experts`.

    Attributes:
        widths: r, of each expert.
    """

    behind = True
    shared_params = 0

    def __init__(self, hidden_size: int, size: int | list[int], num_experts: int):
        super().__init__()
        self.hidden_size = hidden_size
        self.widths = [size] * num_experts if isinstance(size, int) else size
        check_one_each("widths of adapters", self.widths, num_experts)
        self.differ = len(set(self.widths)) > 1
        total, r = hidden_size * sum(self.widths), self.widths[0]
        self.aux_0 = nn.Parameter(torch.empty((total,) if self.differ else (num_experts, hidden_size, r)))
        self.aux_1 = nn.Parameter(torch.empty((total,) if self.differ else (num_experts, r, hidden_size)))
        self.own_by_expert = tuple(2 * hidden_size * width for width in self.widths)

    @classmethod
    def from_form(cls, form: dict, key: str, num_experts: int) -> "Adapter":
        return cls(hidden_size_of(form), form[key], num_experts)

    def forward(self, rows: Tensor, picks: Picks) -> Tensor:
        """(N, H) -> (N, H)."""
        picks = Picks(*picks)  # as in a chain
        if self.differ:
            return self._run_each(rows, picks)
        inner = F.gelu(picks.right(rows.to(self.aux_0.dtype).unsqueeze(1), self.aux_0))  # (N, 1, r)
        return rows + picks.right(inner, self.aux_1).squeeze(1)

    def _run_each(self, rows: Tensor, picks: Picks) -> Tensor:
        """The same where experts differ in size."""
        first = split_experts(self.aux_0, [(self.hidden_size, width) for width in self.widths])
        second = split_experts(self.aux_1, [(width, self.hidden_size) for width in self.widths])

        def run(part: Tensor, expert: int) -> Tensor:
            return F.gelu(part @ first[expert]) @ second[expert]

        return rows + run_each(rows.to(self.aux_0.dtype), picks, len(self.widths), run)

    def cost(self, work: Work, schedule: str) -> Cost:
        nbytes = work.experts * self.own_params * self.aux_0.itemsize
        return Cost(2 * work.rows * self.own_params, 0, nbytes)

    @torch.no_grad()
    def reset_parameters(self, std: float) -> None:
        init.normal_(self.aux_0, std=std)
        init.zeros_(self.aux_1)


# Which class reads which key of a form, in the order of the artifact's tensors.
PARTS: dict[str, type[Part]] = {"gate": Projection, "up": Projection, "down": Projection, "adapter": Adapter}


def hidden_size_of(form: dict) -> int:
    """H: the input features of the up-projection."""
    return math.prod(form["up"]["terms"][0]["in_dims"])


def inner_size_of(form: dict) -> int:
    """The number of hidden neurons of an expert: the output features of the up-projection."""
    return math.prod(form["up"]["terms"][0]["out_dims"])


def differs(form: dict) -> bool:
    """Whether experts differ in size: in the cores of a chain, or in the widths of adapters."""
    terms = [term for key, spec in form.items() if PARTS.get(key) is Projection for term in spec["terms"]]
    widths = form.get("adapter", 0)
    return any("by_expert" in term for term in terms) or (isinstance(widths, list) and len(set(widths)) > 1)
