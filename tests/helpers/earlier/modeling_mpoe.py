# Copyright the mpoe_convert contributors. Licensed under the Apache License, Version 2.0.
"""Transformers whose feed-forward networks (FFNs) are mixtures of experts with shared parameters.

This file ships with every converted checkpoint and needs torch and transformers only (written for and
tested with torch 2.13 and transformers 5.18 and 5.23). What is notable:

* One weight form. A projection is a sum of *terms*; a term is a chain of cores (a matrix product
  operator); a core is stored once for all experts (`central_k`) or once per expert (`aux_k`):

      y = x W_e        W_e =  aux_0[e] --D1-- central_1 --D2-- aux_2[e]
                                |                |                |
                            (i_0, j_0)       (i_1, j_1)       (i_2, j_2)

  Core k has shape (bond_left, in_dim, out_dim, bond_right), with a leading expert axis when it is
  per expert. MPOE (arXiv 2203.01104) is one chain with a shared central core; dense experts (sparse
  upcycling) are one chain of one per-expert core.
* Schedules. When the cores left of the centre carry input only and those right of it output only
  ("one-sided"), W_e = (L_e x I) C (I x R_e) acts on the activations and no expert matrix is ever
  built: all experts go through one matrix product with C. Otherwise, or where that is cheaper, the
  matrices of the experts that are hit are contracted first, and can be kept in inference.
* The model is the stock transformers class. `MPOE<Name>` is made on demand as a subclass of
  `transformers.<Name>`; its FFNs are swapped after the stock constructor has run. Which submodules,
  and how they are wired, stands in `config.mpoe`, so this file knows no model family. Classes of code that
  the source brought along are subclassed in `modeling_mpoe_source.py` beside this file, by `subclass`.
* Combine weights are the softmax over the chosen k logits and sum to one: identical experts compute
  exactly what the dense FFN computed, whatever the router says.

`config.mpoe` holds:

    format             version of this block, FORMAT_VERSION
    num_experts, top_k
    ffns               {path of a layer below the base model: index into forms}; other layers stay dense
    forms              [{"up": projection, "down": projection, "gate": projection if gated}, ...]; a
                       projection is {"terms": [{"in_dims", "out_dims", "bonds", "shared"}, ...], "bias"};
                       "adapter": size, if the experts are adapters behind a shared FFN
    family             how the FFN is wired into its layer; all paths relative to the layer:
      slot             the submodule that the mixture replaces
      absorbed         submodules whose work moved into it; they become Identity
      activation       where the stock activation module is found; it is taken over as it is
      inner_dropout    between activation and down projection: a module, or a rate that is set to zero
      outer_dropout    after the down projection, where the stock FFN applies it itself
      adds_residual    the stock FFN is called with the residual and adds it
    base_model_type, kind, base_auto_map   of the source, for people and tools; nothing here reads them
"""

import dataclasses
import functools
import inspect
import math
import os
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoModel, GenerationMixin, PretrainedConfig, PreTrainedModel

try:
    from transformers import initialization as init
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )
    from transformers.integrations.moe import _grouped_mm_fallback  # noqa: F401  (registers the operator)
    from transformers.modeling_outputs import ModelOutput
except ImportError as error:
    found = transformers.__version__
    raise ImportError(f"modeling_mpoe.py needs transformers 5.18 or newer, found {found}") from error

FORMAT_VERSION = 1
CLASS_PREFIX = "MPOE"
MODEL_TYPE_PREFIX = "mpoe_"

# Options at the top level of the config, each with its default; `from_pretrained(..., name=value)` sets them.
OPTIONS = {
    "router_aux_loss_coef": 0.01,  # of the load-balancing loss, added in training; 0: off
    "router_z_loss_coef": 0.0,  # of the router z-loss, added in training
    "output_router_logits": False,  # outputs carry `router_logits` and `aux_loss`
    "router_combine": "renormalised",  # see Router
    "router_jitter_noise": 0.0,
    "router_capacity_factor": None,
    "router_bias_update_rate": 0.0,  # of DeepSeek-V3's balancing without a loss; 0: the bias stays
    "router_balance_bias": False,  # there is such a bias; set by the rate
    "router_tasks": None,  # names of tasks: routers choose by task, see `MPOEMixin.route_by`; None: by token
    "mpoe_schedule": "auto",  # see FeedForward; MPOE_SCHEDULE in the environment comes first
    "mpoe_cache": "off",  # see MatrixCache: off, hit, all; MPOE_CACHE comes first
    "mpoe_cache_bytes": None,  # limit for the whole model; MPOE_CACHE_BYTES comes first
}
OPTION_TYPES = {
    "router_aux_loss_coef": float,
    "router_z_loss_coef": float,
    "output_router_logits": bool,
    "router_combine": str,
    "router_jitter_noise": float,
    "router_capacity_factor": float | None,
    "router_bias_update_rate": float,
    "router_balance_bias": bool,
    "router_tasks": list[str] | None,
    "mpoe_schedule": str,
    "mpoe_cache": str,
    "mpoe_cache_bytes": int | None,
}

# What the choice between schedules assumes of the machine: two cores of a server. Only the ratio counts.
_FLOPS = 1e11  # per second
_BANDWIDTH = 1e10  # bytes per second
# Up to so many numbers every row gets a copy of its own experts' cores.
_FEW_NUMBERS = 1 << 23
_REPEATABLE = 256  # calls of one FFN that a backward pass to come may repeat
_ROUTER_FIELDS = ("aux_loss", "router_logits")
# From so many rows per expert on, a processor computes expert by expert ...
_MANY_ROWS = 384
# ... and with gradients only if an expert has no more numbers than this for itself: the gradient of every
# weight[expert] is as large as all experts together.
_OWN_NUMBERS = 1 << 18


# ---------------------------------------------------------------------------------------------------
# Chains of cores


def merge_cores(cores: Sequence[Tensor]) -> Tensor:
    """Contract neighbouring cores into one: (..., l, i, o, r) each -> (..., l, prod i, prod o, r).

    The leading "..." is an expert axis that some cores may have and others not.
    """
    merged = cores[0]
    for core in cores[1:]:
        merged = torch.einsum("...aIOb,...bior->...aIiOor", merged, core)
        merged = merged.flatten(-5, -4).flatten(-3, -2)
    return merged


def contract_chain(cores: Sequence[Tensor]) -> Tensor:
    """Multiply a whole chain (outer bonds 1) out: (in, out), or (E, in, out) if any core has experts."""
    return merge_cores(cores).squeeze(-1).squeeze(-3)


def chain_shapes(term: dict) -> list[tuple[int, int, int, int]]:
    """Core shapes (bond_left, in_dim, out_dim, bond_right) of a term, without the expert axis."""
    bonds = [1, *term["bonds"], 1]
    return list(zip(bonds[:-1], term["in_dims"], term["out_dims"], bonds[1:], strict=True))


def matrix_shape(shape: tuple[int, int, int, int]) -> tuple[int, int]:
    """The shape in which a core is stored."""
    bond_left, in_dim, out_dim, bond_right = shape
    return bond_left * in_dim, out_dim * bond_right


def name_cores(term: dict) -> list[str]:
    """Parameter names of a term's cores, from left to right."""
    return [f"central_{k}" if shared else f"aux_{k}" for k, shared in enumerate(term["shared"])]


def multiply_left(weight: Tensor, x: Tensor) -> Tensor:
    """The transpose of weight (l, q) times every x (N, l, p) -> (N, q, p)."""
    if torch.is_grad_enabled():  # one product over transposed copies, whose gradient is not made per row
        return weight.mT @ x
    return torch.bmm(weight.mT.expand(x.shape[0], -1, -1), x)


def multiply_right(x: Tensor, weight: Tensor) -> Tensor:
    """Every x (N, p, l) times weight (l, q) -> (N, p, q)."""
    if not torch.compiler.is_compiling() and x.is_cpu and x.shape[:2] == (2, 1):
        # A token's two experts: two matrix-vector products read the weight faster than one thin product.
        return torch.stack([row @ weight for row in x])
    return x @ weight


class Picks(NamedTuple):
    """Which expert's core each of N rows is multiplied by, in the way that suits their number.

    One of four:
        one expert for all rows         experts is an int
        each row with a copy of its own experts (N,); few rows
        rows sorted by expert           experts (N,) ascending, `sizes` rows for each expert
        the same, sizes on the device   experts (N,) ascending, expert e's rows end at `ends[e]`
    """

    experts: Tensor | int
    sizes: list[int] | None = None
    ends: Tensor | None = None

    @classmethod
    def of_sorted(cls, experts: Tensor, num_experts: int, on_device: bool) -> "Picks":
        counts = torch.zeros(num_experts, dtype=torch.int64, device=experts.device)
        counts = counts.scatter_add(0, experts, torch.ones_like(experts))
        if on_device:
            return cls(experts, ends=counts.cumsum(0).to(torch.int32))
        return cls(experts, sizes=counts.tolist())  # one synchronisation per FFN

    def right(self, x: Tensor, weight: Tensor) -> Tensor:
        """x (N, p, l) times its expert's matrix of (E, l, q) -> (N, p, q)."""
        if self.sizes is not None:
            return self._by_segment(x, weight, torch.matmul)
        if self.ends is not None:
            return self._grouped(x.flatten(0, 1), weight, x.shape[1]).unflatten(0, (-1, x.shape[1]))
        if isinstance(self.experts, int):
            return x @ weight[self.experts]
        return torch.bmm(x, weight.index_select(0, self.experts))

    def left(self, x: Tensor, weight: Tensor) -> Tensor:
        """The transpose of its expert's matrix of (E, l, q) times x (N, l, p) -> (N, q, p)."""
        if x.shape[-1] == 1 or self.ends is not None:
            return self.right(x.mT.contiguous(), weight).mT
        if self.sizes is not None:
            return self._by_segment(x, weight, lambda part, own: multiply_left(own, part))
        if isinstance(self.experts, int):
            return multiply_left(weight[self.experts], x)
        return torch.bmm(weight.index_select(0, self.experts).mT, x)

    def _by_segment(self, x: Tensor, weight: Tensor, product) -> Tensor:
        # unbind, not weight[e]: the gradient is then stacked once, not added up from E full-size zeros.
        segments = zip(x.split(self.sizes), weight.unbind(), strict=True)
        products = [product(part, own) for part, own in segments if len(part)]
        return torch.cat(products) if products else product(x, weight[0])

    def _grouped(self, rows: Tensor, weight: Tensor, rows_each: int) -> Tensor:
        device, dtype = rows.device.type, rows.dtype
        if torch.is_autocast_enabled(device):  # the operators below are unknown to autocast
            dtype = torch.get_autocast_dtype(device)
        rows, weight, ends = rows.to(dtype), weight.to(dtype).contiguous(), self.ends * rows_each
        if _can_group(rows, weight):
            return F.grouped_mm(rows, weight, offs=ends)
        return torch.ops.transformers.grouped_mm_fallback(rows, weight, ends)


def _can_group(rows: Tensor, weight: Tensor) -> bool:
    """Whether torch's grouped product takes these: CUDA from 8.0 on; in compiled code bfloat16 only."""
    if rows.device.type != "cuda" or not hasattr(F, "grouped_mm"):  # torch has it from 2.10 on
        return False
    if torch.cuda.get_device_capability(rows.device) < (8, 0):
        return False
    aligned = all(dim * rows.itemsize % 16 == 0 for dim in weight.shape[1:])
    if torch.compiler.is_compiling():
        return aligned and rows.dtype == torch.bfloat16
    return aligned and rows.data_ptr() % 16 == 0 and weight.data_ptr() % 16 == 0


class MatrixCache:
    """Experts' matrices kept between forward passes that need no gradient.

    An entry is dropped as soon as a core it was made from has changed: an optimizer's step, loading and
    `.to()` are noticed; writing through `parameter.data` is not.

    Args:
        keep: "hit": the experts that tokens went to; "all": every expert, from the first use on.
        limit: bytes for all matrices of this FFN; what does not fit is built each time. None: no limit.
    """

    def __init__(self, keep: str, limit: float | None = None):
        self.keep, self.limit = keep, math.inf if limit is None else limit
        self.entries: dict[tuple[int, int], tuple[tuple, Tensor]] = {}

    def __reduce__(self):  # copies of a model start empty
        return MatrixCache, (self.keep, self.limit)

    @property
    def nbytes(self) -> int:
        return sum(matrix.nbytes for _, matrix in self.entries.values())

    def matrix(self, chain: "Chain", cores: list[Tensor], expert: int) -> Tensor:
        """One expert's matrix (in, out), from the cache if it is there and still right."""
        if not all(isinstance(core, nn.Parameter) for core in cores):
            return chain.matrix(cores, expert)  # parametrised (PEFT): a new tensor each time
        autocast = torch.is_autocast_enabled(cores[0].device.type)
        state = (autocast, *((core.data_ptr(), core._version, core.dtype) for core in cores))
        wanted = [expert]
        if self.keep == "all":
            wanted += [e for e in range(chain.num_experts) if e != expert]
        for e in wanted:
            key = (id(chain), e)
            if key in self.entries and self.entries[key][0] == state:
                continue
            self.entries.pop(key, None)
            size = chain.in_features * chain.out_features * cores[0].itemsize
            if self.nbytes + size > self.limit:
                break
            self.entries[key] = (state, chain.matrix(cores, e))
        kept = self.entries.get((id(chain), expert))
        return chain.matrix(cores, expert) if kept is None else kept[1]


class Chain(nn.Module):
    """One term of a projection: a chain of shared (`central_k`) and per-expert (`aux_k`) cores.

    A core is stored as a matrix (bond_left * in_dim, out_dim * bond_right), or a stack of one per expert:
    shapes that optimizers, LoRA and kernels know.

    Attributes:
        acts: the cores can act on the activations one after the other, with no matrix built: at most one
            carries input and output, those left of it only input, those right of it only output.
        own_numbers: how many numbers one expert has for itself.
    """

    def __init__(self, term: dict, num_experts: int):
        super().__init__()
        self.num_experts = num_experts
        self.shapes = chain_shapes(term)
        self.in_features, self.out_features = math.prod(term["in_dims"]), math.prod(term["out_dims"])
        self.shared = tuple(term["shared"])
        self.core_names = name_cores(term)
        inputs = [k for k, i in enumerate(term["in_dims"]) if i > 1]
        outputs = [k for k, o in enumerate(term["out_dims"]) if o > 1]
        self.acts = not inputs or not outputs or inputs[-1] <= outputs[0]
        pairs = zip(self.shapes, self.shared, strict=True)
        self.own_numbers = sum(math.prod(shape) for shape, shared in pairs if not shared)
        for name, shape, shared in zip(self.core_names, self.shapes, self.shared, strict=True):
            size = matrix_shape(shape) if shared else (num_experts, *matrix_shape(shape))
            self.register_parameter(name, nn.Parameter(torch.empty(size)))

    def forward(
        self, rows: Tensor, picks: Picks, rebuild: bool = False, cache: MatrixCache | None = None
    ) -> Tensor:
        """(N, in) rows -> (N, out).

        Args:
            rows: in the order that `picks` describes.
            rebuild: contract the matrices of the experts that are hit, even if the cores could act.
            cache: where contracted matrices are kept; for `picks` of one expert.
        """
        cores = [getattr(self, name) for name in self.core_names]
        rows = rows.to(cores[0].dtype)
        if self.acts and not (rebuild and len(cores) > 1):
            return self._act(rows, picks, cores)
        if all(self.shared):
            return rows @ self.matrix(cores, 0)
        if isinstance(picks.experts, int):
            expert = picks.experts
            return rows @ (cache.matrix(self, cores, expert) if cache else self.matrix(cores, expert))
        hit = slice(None)
        if picks.sizes is not None:  # build the matrices that are needed
            hit = [e for e, size in enumerate(picks.sizes) if size] or [0]
            picks = picks._replace(sizes=[picks.sizes[e] for e in hit])
        return picks.right(rows.unsqueeze(1), self._contract(cores, hit)).squeeze(1)

    def matrix(self, cores: list[Tensor], expert: int) -> Tensor:
        """One expert's matrix, (in, out)."""
        return self._contract(cores, expert)

    def _contract(self, cores: list[Tensor], experts) -> Tensor:
        """The matrices of an index of experts: (in, out) for an integer, else (number, in, out)."""
        chosen = [c if shared else c[experts] for c, shared in zip(cores, self.shared, strict=True)]
        return contract_chain(
            [c.reshape(*c.shape[:-2], *s) for c, s in zip(chosen, self.shapes, strict=True)]
        )

    def _act(self, rows: Tensor, picks: Picks, cores: list[Tensor]) -> Tensor:
        """Core after core. The activations are (N, bond * input sites left) and then (N, outputs, bond)."""
        num_rows, inputs, outputs = rows.shape[0], self.in_features, 1
        x = rows.unsqueeze(-1)
        for core, (l, i, o, _), shared in zip(cores, self.shapes, self.shared, strict=True):  # noqa: E741
            if inputs > 1 and o == 1:  # takes input site i to the bond; the later inputs stand behind
                inputs //= i
                x = x.reshape(num_rows, l * i, inputs)
                if shared and inputs == 1:
                    x = multiply_right(x.mT, core).mT
                else:
                    x = multiply_left(core, x) if shared else picks.left(x, core)
                continue
            inputs //= i
            x = x.reshape(num_rows, outputs, l * i)
            x = multiply_right(x, core) if shared else picks.right(x, core)
            outputs *= o
        return x.reshape(num_rows, self.out_features)

    # ------------------------------------------------------------------------------------- cost

    @property
    def flops_per_row(self) -> int:
        """Floating-point operations per row (2 per multiply-add), the contraction of matrices apart."""
        if not self.acts:
            return 2 * self.in_features * self.out_features
        flops, inputs, outputs = 0, self.in_features, 1
        for l, i, o, r in self.shapes:  # noqa: E741
            inputs //= i
            flops += 2 * inputs * outputs * l * i * o * r
            outputs *= o
        return flops

    @property
    def rebuild_flops(self) -> int:
        """Operations to contract one expert's matrix."""
        flops, rows, cols = 0, 1, 1
        for l, i, o, r in self.shapes:  # noqa: E741
            flops += 2 * rows * cols * l * i * o * r
            rows, cols = rows * i, cols * o
        return flops - 2 * math.prod(self.shapes[0])  # the first core costs nothing

    @torch.no_grad()
    def reset_parameters(self, std: float) -> None:
        """Random experts: outer cores near isometries, the largest core of scale `std`."""
        sizes = [math.prod(shape) for shape in self.shapes]
        centre = sizes.index(max(sizes))
        for k, (name, shape) in enumerate(zip(self.core_names, self.shapes, strict=True)):
            l, i, o, r = shape  # noqa: E741  (bond names)
            fan = l * i * o if k < centre else i * o * r
            init.normal_(getattr(self, name), std=std if k == centre else fan**-0.5)


class Projection(nn.Module):
    """y = sum of terms + bias, for rows that each have one expert.

    `spec`: {"terms": [{"in_dims", "out_dims", "bonds", "shared"}, ...],
             "bias": "shared" | "per-expert" | None}
    """

    def __init__(self, spec: dict, num_experts: int):
        super().__init__()
        self.terms = nn.ModuleList(Chain(term, num_experts) for term in spec["terms"])
        self.is_common = [all(term["shared"]) for term in spec["terms"]]
        out_features = math.prod(spec["terms"][0]["out_dims"])
        self.bias_kind = spec["bias"]
        if self.bias_kind is None:
            self.bias = None
        else:
            size = (out_features,) if self.bias_kind == "shared" else (num_experts, out_features)
            self.bias = nn.Parameter(torch.empty(size))

    def common(self, tokens: Tensor) -> Tensor | None:
        """What terms that all experts share make of tokens (T, in): (T, out); None if there are none."""
        picks = Picks(0)
        parts = [
            term(tokens, picks) for term, shared in zip(self.terms, self.is_common, strict=True) if shared
        ]
        return sum(parts) if parts else None

    def forward(
        self,
        rows: Tensor,
        picks: Picks,
        rebuild: bool = False,
        cache: MatrixCache | None = None,
        common: Tensor | None = None,
    ) -> Tensor:
        """(N, in) -> (N, out); see `Chain`. `common`: what the shared terms make of the rows, if done."""
        y = common
        for term, shared in zip(self.terms, self.is_common, strict=True):
            if not shared or common is None:
                part = term(rows, picks, rebuild, cache)
                y = part if y is None else y + part
        if self.bias is None:
            return y
        return y + (self.bias if self.bias_kind == "shared" else self.bias[picks.experts])

    @torch.no_grad()
    def reset_parameters(self, std: float) -> None:
        for term in self.terms:
            term.reset_parameters(std)
        if self.bias is not None:
            init.zeros_(self.bias)


class Adapter(nn.Module):
    """One small bottleneck per expert behind an FFN that all share: y + gelu(y aux_0[e]) aux_1[e].

    PESC, arXiv 2401.02731. `aux_0` (E, H, r), `aux_1` (E, r, H).
    """

    def __init__(self, hidden_size: int, size: int, num_experts: int):
        super().__init__()
        self.hidden_size, self.size = hidden_size, size
        self.aux_0 = nn.Parameter(torch.empty(num_experts, hidden_size, size))
        self.aux_1 = nn.Parameter(torch.empty(num_experts, size, hidden_size))

    def forward(self, rows: Tensor, picks: Picks) -> Tensor:
        """(N, H) -> (N, H)."""
        inner = F.gelu(picks.right(rows.to(self.aux_0.dtype).unsqueeze(1), self.aux_0))
        return rows + picks.right(inner, self.aux_1).squeeze(1)

    @property
    def own_numbers(self) -> int:
        """Numbers that one expert has for itself."""
        return 2 * self.hidden_size * self.size

    @torch.no_grad()
    def reset_parameters(self, std: float) -> None:
        init.normal_(self.aux_0, std=std)
        init.zeros_(self.aux_1)


class Routing(NamedTuple):
    """What a router decided for T tokens; all floats are float32."""

    logits: Tensor  # (T, E), before any balancing bias
    weights: Tensor  # (T, k) combine weights; zero where the expert had no room
    experts: Tensor  # (T, k)
    dropped: Tensor | None  # (T, k) weights that were lost to the capacity; None without a capacity


class Router(nn.Module):
    """Chooses k experts per token. The weight and the arithmetic are float32 in every model dtype.

    It looks at the token, or, with `by_task`, at an embedding (H,) of the task that the token belongs to: one
    of `tasks` (number of tasks, H), or one that is given.

    Attributes:
        combine: "renormalised": softmax over the chosen logits; they sum to one, so that identical experts
            compute what the dense FFN did. For k = 1 that is the constant one, so the weight is
            p / p.detach(): one in value, with the gradient of log p (p over all experts). "raw": the
            probability over all experts (Switch), which scales the FFN's output down.
        jitter_noise: in training the inputs are multiplied by uniform numbers from 1 +- this (Switch).
        capacity_factor: in training an expert takes at most this times T k / E of the T k choices, first
            choices before second, early tokens before late ones; others add nothing. None: no limit.
    """

    def __init__(self, hidden_size: int, num_experts: int, top_k: int):
        super().__init__()
        self.top_k = top_k
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, dtype=torch.float32))
        self.combine = "renormalised"
        self.jitter_noise = 0.0
        self.capacity_factor: float | None = None
        self.by_task = False
        self.register_parameter("tasks", None)

    def add_tasks(self, number: int) -> None:
        """Choose by task from now on; with a table for so many, if any."""
        self.by_task = True
        if number:
            empty = torch.empty(number, self.weight.shape[1], dtype=torch.float32, device=self.weight.device)
            self.tasks = nn.Parameter(empty)

    def forward(
        self,
        tokens: Tensor,
        bias: Tensor | None = None,
        mask: Tensor | None = None,
        task: Tensor | None = None,
    ) -> Routing:
        """tokens (T, H).

        Args:
            task: numbers (B,) or embeddings (B, H) of the tasks of B sequences, one or as many as there are.
            bias: (E,) added to the probabilities to choose the experts, never to weigh them (DeepSeek-V3).
            mask: (T,) zero for padding, which takes no room of the capacity.
        """
        device = tokens.device.type
        with nullcontext() if device == "meta" else torch.autocast(device, enabled=False):
            x = self._task_rows(tokens, task) if self.by_task else tokens.float()
            if self.training and self.jitter_noise:
                x = x * torch.empty_like(x).uniform_(1 - self.jitter_noise, 1 + self.jitter_noise)
            logits = F.linear(x, self.weight.float())  # (T, E)
            if bias is None:
                chosen, experts = logits.topk(self.top_k, dim=-1)
            else:
                experts = (logits.softmax(-1) + bias.float()).topk(self.top_k, dim=-1).indices
                chosen = logits.gather(-1, experts)
            weights = self._weigh(logits, chosen, experts)
            if not self.training or self.capacity_factor is None:
                return Routing(logits, weights, experts, None)
            dropped = weights * ~self._has_room(experts, mask)
            return Routing(logits, weights - dropped, experts, dropped)

    def _task_rows(self, tokens: Tensor, task: Tensor | None) -> Tensor:
        """(T, H) embeddings of the tasks that the tokens belong to, sequence by sequence."""
        if task is None:
            raise ValueError(
                "the routers of this model choose by task: name one with model.route_by(...) or pass task_ids"
            )
        task = task.to(tokens.device)
        rows = (task if task.is_floating_point() else self.tasks[task]).float()
        if tokens.shape[0] % rows.shape[0]:
            raise ValueError(
                f"{rows.shape[0]} tasks were given for {tokens.shape[0]} tokens; expected one, "
                "or one per sequence"
            )
        return rows.repeat_interleave(tokens.shape[0] // rows.shape[0], 0)

    def _weigh(self, logits: Tensor, chosen: Tensor, experts: Tensor) -> Tensor:
        if self.combine == "renormalised" and self.top_k > 1:
            return chosen.softmax(-1)
        log_probability = logits.log_softmax(-1).gather(-1, experts)
        if self.combine == "raw":
            return log_probability.exp()
        return (log_probability - log_probability.detach()).exp()

    def _has_room(self, experts: Tensor, mask: Tensor | None) -> Tensor:
        num_experts = self.weight.shape[0]
        choices = F.one_hot(experts.T.reshape(-1), num_experts)  # (k * T, E), first choices first
        if mask is not None:
            choices = choices * mask.to(choices).repeat(experts.shape[1]).unsqueeze(-1)
        capacity = (self.capacity_factor * choices.sum() / num_experts).ceil().clamp(min=1)
        place = (choices.cumsum(0) * choices).sum(-1)  # 1 for the first in its expert's queue
        return (place <= capacity).reshape(experts.T.shape).T

    @torch.no_grad()
    def reset_parameters(self, std: float) -> None:
        init.normal_(self.weight, std=std)
        if self.tasks is not None:
            init.normal_(self.tasks)


def load_balancing_loss(routing: Routing, mask: Tensor | None = None) -> Tensor:
    """E * sum over e of f_e P_e: f_e tokens' choices per token, P_e mean probability; k if balanced.

    Switch Transformer, arXiv 2101.03961, equations 4-6, counted as transformers counts it, for one layer.
    `mask` (T,) is zero for tokens that do not count.
    """
    num_experts = routing.logits.shape[-1]
    choices = F.one_hot(routing.experts, num_experts).sum(1).float()
    return num_experts * (_mean(choices, mask) * _mean(routing.logits.softmax(-1), mask)).sum()


def router_z_loss(routing: Routing, mask: Tensor | None = None) -> Tensor:
    """Mean squared logsumexp of the logits (ST-MoE, arXiv 2202.08906, equation 5)."""
    return _mean(routing.logits.logsumexp(-1).square(), mask)


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Over tokens, the first axis, that the mask counts."""
    if mask is None:
        return values.mean(0)
    mask = mask.to(values).reshape(-1, *[1] * (values.ndim - 1))
    return (values * mask).sum(0) / mask.sum().clamp(min=1)


class _AddGradient(torch.autograd.Function):
    """A copy of the tensor; in the backward pass the loss is optimised too, by the pass's factor."""

    @staticmethod
    def forward(ctx, tensor: Tensor, loss: Tensor, router_pass: "RouterPass | None") -> Tensor:
        ctx.router_pass, ctx.device = router_pass, loss.device
        return tensor.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        factor = 1.0
        if ctx.router_pass is not None:
            ctx.router_pass.went_back = True
            factor = ctx.router_pass.factor
        return grad, torch.as_tensor(factor, dtype=torch.float32, device=ctx.device), None


class _NoteScale(torch.autograd.Function):
    """A copy of the loss; in the backward pass its gradient (a GradScaler's factor, say) is noted."""

    @staticmethod
    def forward(ctx, loss: Tensor, router_pass: "RouterPass") -> Tensor:
        ctx.router_pass = router_pass
        return loss.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        ctx.router_pass.scale = grad
        return grad, None


class Call(NamedTuple):
    """One call of one mixture in a pass."""

    ffn: "FeedForward"
    routing: Routing
    mask: Tensor | None  # (T,) zero for padding
    loss: Tensor  # the routers' losses, times their coefficients; detached where they joined the weights


class _Repeatable(deque):
    """Calls that a checkpoint may repeat in the backward pass; those that none repeats fall out in time."""

    def __reduce__(self):  # copies of a model start empty
        return functools.partial(_Repeatable, maxlen=self.maxlen), ()


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


class RouterPass:
    """One forward pass of a model whose routers are watched or learn.

    The routers' losses join the graph at the combine weights: whatever loss reaches an FFN optimises them,
    and a checkpointed call that the backward pass repeats joins again.

    Attributes:
        calls: of the mixtures so far; dropped when the pass is over.
        num_calls: how many; the loss is the mean over them.
        share: how much of an optimizer's step this pass is.
        task: that was given to this pass, see `Router`.
        scale: what the model's own loss is multiplied by; known once the backward pass has begun.
        went_back: whether a backward pass has reached a mixture.
    """

    def __init__(self, learns: bool, aux_coef: float, z_coef: float, mask_of):
        self.learns, self.aux_coef, self.z_coef, self.mask_of = learns, aux_coef, z_coef, mask_of
        self.calls: list[Call] = []
        self.num_calls = 0
        self.share: float | Tensor = 1.0
        self.task: Tensor | None = None
        self.scale: float | Tensor = 1.0
        self.went_back = False

    @property
    def factor(self) -> float | Tensor:
        share = self.share
        if isinstance(share, Tensor) and isinstance(self.scale, Tensor):
            share = share.to(self.scale.device)
        return self.scale * share / max(self.num_calls, 1)

    def mask(self, ffn: "FeedForward", num_tokens: int) -> Tensor | None:
        """Which of the tokens of a mixture's next call count."""
        return self.mask_of(ffn, num_tokens, sum(call.ffn is ffn for call in self.calls))

    def add(
        self, ffn: "FeedForward", routing: Routing, mask: Tensor | None, task: Tensor | None = None
    ) -> Tensor:
        """Take part in a call of a mixture; its combine weights."""
        self.num_calls += 1
        if torch.compiler.is_compiling():  # joins the model's loss when the pass is over
            self.went_back = True  # nobody will tell
            self.calls.append(Call(ffn, routing, mask, self.loss(routing, mask)))
            return routing.weights
        weights, loss = self.join(routing, mask)
        self.calls.append(Call(ffn, routing, mask, loss.detach()))
        if self.learns:
            ffn.repeatable.append((self, mask, task))
        return weights

    def join(self, routing: Routing, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """(combine weights that carry the losses' gradient, the losses)."""
        loss = self.loss(routing, mask)
        if not (self.learns and torch.is_grad_enabled() and routing.weights.requires_grad):
            return routing.weights, loss
        return _AddGradient.apply(routing.weights, loss, self), loss

    def loss(self, routing: Routing, mask: Tensor | None) -> Tensor:
        loss = routing.logits.new_zeros(())
        if self.aux_coef:
            loss = loss + self.aux_coef * load_balancing_loss(routing, mask)
        if self.z_coef:
            loss = loss + self.z_coef * router_z_loss(routing, mask)
        return loss


def _one_of(config: PretrainedConfig, name: str, values: tuple[str, ...]) -> str:
    """A config option; MPOE_SCHEDULE and MPOE_CACHE in the environment come first."""
    value = getattr(config, name)
    if name.startswith("mpoe_"):
        value = os.environ.get(name.upper(), value)
    if value not in values:
        raise ValueError(f"{name} is {value!r}: choose one of {', '.join(values)}")
    return value


def _combine(copies: Tensor, weights: Tensor) -> Tensor:
    """What a token's experts made of it (T, k, H), times the combine weights (T, k) -> (T, H)."""
    weights = weights.to(torch.promote_types(copies.dtype, torch.float32))
    return (copies * weights.unsqueeze(-1)).sum(1).to(copies.dtype)


class Inputs(NamedTuple):
    """What experts start from, per token or per row: one that the experts' shared parts have worked on."""

    rows: Tensor  # (N, H)
    up: Tensor | None = None  # (N, inner) what the terms of `up` that all share made of them
    gate: Tensor | None = None

    def take(self, index: Tensor) -> "Inputs":
        return Inputs(*(None if part is None else part[index] for part in self))

    def repeat(self, times: int) -> "Inputs":
        """Every one that often, copies side by side."""
        return Inputs(*(None if part is None else part.repeat_interleave(times, dim=0) for part in self))


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

    def __init__(self, form: dict, num_experts: int, top_k: int):
        super().__init__()
        hidden_size = math.prod(form["up"]["terms"][0]["in_dims"])
        self.num_experts = num_experts
        self.router = Router(hidden_size, num_experts, top_k)
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
        self.repeatable = _Repeatable(maxlen=_REPEATABLE)
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

    def experts_hit(self, num_tokens: int) -> float:
        """How many experts that many tokens reach, if all are equally likely."""
        return self.num_experts * (1 - (1 - self.top_k / self.num_experts) ** num_tokens)

    def flops(self, num_tokens: int, schedule: str = "apply") -> float:
        """Floating-point operations of a forward pass over that many tokens."""
        hit = self.experts_hit(num_tokens)
        flops = num_tokens * 2.0 * (self.router.weight.numel() + self.top_k * self._adapter_numbers)
        for chain in self._chains:
            rows = num_tokens * self._rows(chain)
            acts = chain.acts and schedule == "apply"
            flops += rows * (chain.flops_per_row if acts else 2 * chain.in_features * chain.out_features)
            flops += 0 if acts or schedule == "cached" else hit * chain.rebuild_flops
        return flops

    def bytes_read(self, num_tokens: int, schedule: str = "apply") -> float:
        """Bytes of weights that a forward pass over that many tokens moves, matrices it builds included."""
        hit = self.experts_hit(num_tokens)
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

    def seconds(self, num_tokens: int, schedule: str) -> float:
        """A forward pass's time on the machine of `_FLOPS` and `_BANDWIDTH`; for comparing schedules."""
        return self.flops(num_tokens, schedule) / _FLOPS + self.bytes_read(num_tokens, schedule) / _BANDWIDTH

    def configure(self, config: PretrainedConfig, num_mixtures: int) -> None:
        """Take over the config's router and schedule options, the latter overruled by the environment.

        Raises:
            ValueError: an option has a value that it cannot have.
        """
        self.router.combine = _one_of(config, "router_combine", ("renormalised", "raw"))
        self.router.jitter_noise = config.router_jitter_noise
        self.router.capacity_factor = config.router_capacity_factor
        if config.router_tasks is not None:
            self.router.add_tasks(len(config.router_tasks))
        if config.router_bias_update_rate or config.router_balance_bias:
            config.router_balance_bias = True  # so that it is loaded again, whatever the rate then is
            self.add_balance_bias()
        self.schedule = _one_of(config, "mpoe_schedule", ("auto", "apply", "rebuild", "cached"))
        keep = _one_of(config, "mpoe_cache", ("off", "hit", "all"))
        limit = os.environ.get("MPOE_CACHE_BYTES", config.mpoe_cache_bytes)
        if keep == "off":
            keep = "hit" if self.schedule == "cached" else None
        limit = None if limit is None else float(limit) / num_mixtures
        self.cache = None if keep is None else MatrixCache(keep, limit)

    def add_balance_bias(self) -> None:
        if self.balance_bias is None:
            device = next(self.parameters()).device
            self.balance_bias = torch.zeros(self.num_experts, dtype=torch.float32, device=device)

    def choose_schedule(self, num_tokens: int) -> str:
        """The schedule that will run."""
        if self.schedule != "auto":
            return self.schedule
        if torch.compiler.is_compiling():
            return "apply"
        free = self.cache is not None and not torch.is_grad_enabled()
        return min(
            ("apply", "rebuild", "cached")[: 3 if free else 2],
            key=functools.partial(self.seconds, num_tokens),
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
        weights, experts = self._route(tokens)
        output = self._mix(tokens, weights, experts).reshape(hidden_states.shape)
        output = self.outer_dropout(output)
        return output + residual if self.adds_residual else output

    def _route(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Combine weights and experts (T, k) of tokens (T, H)."""
        running = self.router_pass
        if running is not None:
            mask = running.mask(self, len(tokens))
            task = self.task if running.task is None else running.task
            routing = self.router(tokens, self.balance_bias, mask, task)
            return running.add(self, routing, mask, task), routing.experts
        if self.training and not torch.compiler.is_compiling():
            if not _in_backward():
                self.repeatable.clear()  # this call adds nothing when it is repeated
            elif self.repeatable:
                repeated, mask, task = self.repeatable.pop()  # the backward pass repeats the last call first
                routing = self.router(tokens, self.balance_bias, mask, task)
                return repeated.join(routing, mask)[0], routing.experts
        routing = self.router(tokens, self.balance_bias, task=self.task)
        return routing.weights, routing.experts

    @torch.no_grad()
    def note_load(self, routing: Routing, mask: Tensor | None) -> None:
        choices = F.one_hot(routing.experts, self.num_experts).sum(1).float()
        load = choices.sum(0) if mask is None else mask.to(choices) @ choices
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

    def _mix(self, tokens: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """tokens (T, H), combine weights and experts (T, k) -> (T, H)."""
        chosen = experts.reshape(-1)
        num_rows, top_k = chosen.shape[0], experts.shape[1]
        schedule = self.choose_schedule(tokens.shape[0])
        inputs = self._prepare(tokens)
        applies = schedule == "apply" and all(chain.acts for chain in self._chains)
        if applies and num_rows * self.own_numbers <= _FEW_NUMBERS:
            rows = self._experts(inputs.repeat(top_k), Picks(chosen))
            return _combine(rows.unflatten(0, experts.shape), weights)
        order = chosen.argsort(stable=True)  # sorts the copies by expert
        on_device = torch.compiler.is_compiling() or (tokens.is_cuda and schedule != "cached")
        on_device = on_device or tokens.is_meta
        picks = Picks.of_sorted(chosen[order], self.num_experts, on_device)
        if on_device or not self._goes_expert_by_expert(schedule, applies, num_rows):
            rows = self._experts(inputs.take(order // top_k), picks, schedule)
            return _combine(rows[order.argsort()].unflatten(0, experts.shape), weights)
        output = None
        for expert, part in enumerate(order.split(picks.sizes)):
            if len(part) == 0:
                continue
            rows = self._experts(inputs.take(part // top_k), Picks(expert), schedule)
            rows, dtype = rows * weights.reshape(-1)[part, None], rows.dtype
            if output is None:
                output = rows.new_zeros(tokens.shape)
            output.index_add_(0, part // top_k, rows)
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

    def _ffn(self, inputs: Inputs, picks: Picks, schedule: str = "apply") -> Tensor:
        rebuild = schedule != "apply"
        cache = self.cache if schedule == "cached" and not torch.is_grad_enabled() else None
        up = self.up(inputs.rows, picks, rebuild, cache, inputs.up)
        if self.gate is None:
            inner = self.act(up)
        else:
            inner = self.act(self.gate(inputs.rows, picks, rebuild, cache, inputs.gate)) * up
        return self.down(self.inner_dropout(inner), picks, rebuild, cache)


# ---------------------------------------------------------------------------------------------------
# Into the stock model


def _take(layer: nn.Module, path: str | None):
    """The attribute at a dotted path, or None."""
    if path is None:
        return None
    for name in path.split("."):
        layer = getattr(layer, name)
    return layer


def _put(layer: nn.Module, path: str, value) -> None:
    parent, _, name = path.rpartition(".")
    setattr(layer.get_submodule(parent), name, value)


def _take_dropout(layer: nn.Module, path: str | None, slot: str) -> nn.Module:
    """The stock dropout as a module. A rate outside the slot would be applied again: it becomes zero."""
    dropout = _take(layer, path)
    if dropout is None:
        return nn.Identity()
    if isinstance(dropout, nn.Module):
        return dropout
    if not path.startswith(slot + "."):
        _put(layer, path, 0.0)
    return nn.Dropout(dropout)


def swap_ffn(layer: nn.Module, form: dict, block: dict) -> None:
    """Replace the dense FFN of a stock layer by a mixture of the given form; done twice, does nothing."""
    family = block["family"]
    if isinstance(_take(layer, family["slot"]), FeedForward):
        return
    ffn = FeedForward(form, block["num_experts"], block["top_k"])
    ffn.act = _take(layer, family["activation"])
    ffn.inner_dropout = _take_dropout(layer, family["inner_dropout"], family["slot"])
    ffn.outer_dropout = _take_dropout(layer, family["outer_dropout"], family["slot"])
    ffn.adds_residual = family["adds_residual"]
    _put(layer, family["slot"], ffn)
    for path in family["absorbed"]:
        _put(layer, path, nn.Identity())


def _has_submodule(model: nn.Module, path: str) -> bool:
    for name in path.split("."):
        model = getattr(model, name, None)
        if model is None:
            return False
    return True


class RouterStats:
    """What one router did, over all tokens that were watched and were no padding.

    Attributes:
        num_tokens: how many.
        load: (E,) each expert's part of the choices; sums to one.
        probability: (E,) mean router probability.
        entropy: of the router's softmax, mean over tokens, in nats; log(E) is indifferent.
        dropped: part of the combine weights lost to the capacity.
        similarity: (E, E) mean cosine between experts' outputs on the same tokens; None if not asked for.
    """

    def __init__(self, num_experts: int):
        self.num_tokens = 0.0
        self._choices = torch.zeros(num_experts, dtype=torch.float64)
        self._probability = torch.zeros(num_experts, dtype=torch.float64)
        self._entropy = self._dropped = self._weight = 0.0
        self._cosines = torch.zeros(num_experts, num_experts, dtype=torch.float64)
        self._compared = 0

    @torch.no_grad()
    def add(self, routing: Routing, mask: Tensor | None) -> None:
        num_experts = len(self._choices)
        counted = torch.ones_like(routing.logits[:, 0]) if mask is None else mask.to(routing.logits)
        probabilities = routing.logits.softmax(-1)
        choices = F.one_hot(routing.experts, num_experts).sum(1)
        entropy = torch.special.entr(probabilities).sum(-1)
        self.num_tokens += float(counted.sum())
        self._choices += (counted @ choices.to(counted)).cpu().double()
        self._probability += (counted @ probabilities).cpu().double()
        self._entropy += float(counted @ entropy)
        dropped = torch.zeros_like(routing.weights) if routing.dropped is None else routing.dropped
        self._dropped += float(counted @ dropped.sum(-1))
        self._weight += float(counted @ (routing.weights + dropped).sum(-1))

    @torch.no_grad()
    def compare(self, ffn: "FeedForward", tokens: Tensor) -> None:
        inputs = ffn._prepare(tokens)
        outputs = torch.stack([ffn._experts(inputs, Picks(e)) for e in range(ffn.num_experts)])
        directions = F.normalize(outputs.cpu().double(), dim=-1)  # (E, T, H)
        self._cosines += torch.einsum("eth,fth->ef", directions, directions)
        self._compared += len(tokens)

    @property
    def load(self) -> Tensor:
        return self._choices / self._choices.sum().clamp(min=1)

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
        return f"RouterStats({self.num_tokens:.0f} tokens, load [{load}], entropy {self.entropy:.3f} nats)"


def _add_losses(outputs, running: RouterPass, arguments: dict):
    """The model's outputs with the routers' losses in their loss."""
    losses = [call.loss for call in running.calls]
    if not losses:
        return outputs
    total = torch.stack([loss.to(losses[0].device) for loss in losses]).mean()
    total = total * torch.as_tensor(running.share, device=total.device)
    key, tensor = _loss_of(outputs, arguments)
    if tensor is not None:  # its gradient is at the combine weights already, but for compiled calls
        if not torch.compiler.is_compiling():
            tensor = _NoteScale.apply(tensor, running)
        tensor = tensor + total.to(tensor.device)
    elif total.requires_grad:
        key, tensor = _first_output(outputs)
        tensor = _AddGradient.apply(tensor, total, None)
    else:
        return outputs
    if isinstance(outputs, tuple):
        return (*outputs[:key], tensor, *outputs[key + 1 :])
    outputs[key] = tensor
    return outputs


@functools.cache
def _with_router_fields(base: type[ModelOutput]) -> type[ModelOutput]:
    """The output class with `aux_loss` and `router_logits`."""
    known = {field.name for field in dataclasses.fields(base)}
    more = [(n, object, dataclasses.field(default=None)) for n in _ROUTER_FIELDS if n not in known]
    return dataclasses.make_dataclass(base.__name__, more, bases=(base,), namespace={"__module__": __name__})


def _show_routers(outputs: ModelOutput, running: RouterPass) -> ModelOutput:
    calls = running.calls
    aux = [load_balancing_loss(call.routing, call.mask) for call in calls]
    shown = {"aux_loss": torch.stack([loss.to(aux[0].device) for loss in aux]).mean()}
    shown["router_logits"] = tuple(call.routing.logits for call in calls)
    if not torch.compiler.is_compiling():  # the stock class cannot be rebuilt from a tree with more fields
        return _with_router_fields(type(outputs))(**outputs, **shown)
    for name, value in shown.items():
        outputs[name] = value
    return outputs


def _loss_of(outputs, arguments: dict) -> tuple:
    """Key and value of the loss among a model's outputs, or (None, None)."""
    if isinstance(outputs, tuple):
        has_loss = any(arguments.get(name) is not None for name in ("labels", "start_positions"))
        return (0, outputs[0]) if has_loss and outputs[0].ndim == 0 else (None, None)
    loss = outputs.get("loss")
    return (None, None) if loss is None else ("loss", loss)


def _first_output(outputs) -> tuple:
    """Key and value of the first tensor that was computed from the hidden states."""
    items = enumerate(outputs) if isinstance(outputs, tuple) else outputs.items()
    return next((key, value) for key, value in items if isinstance(value, Tensor) and value.requires_grad)


def _check_tasks(task: Tensor | None, arguments: dict) -> None:
    """Raises ValueError if there are tasks for another number of sequences than the pass has."""
    if task is None:
        return
    for name in ("input_ids", "inputs_embeds", "decoder_input_ids", "pixel_values"):
        tensor = arguments.get(name)
        if tensor is not None and tensor.shape[0] % task.shape[0]:  # beams are sequences of one task
            raise ValueError(
                f"{task.shape[0]} tasks were given for {tensor.shape[0]} sequences; expected one, or one each"
            )


def _recording(forward):
    """A stock forward whose outputs carry the router losses; the same signature, and `task_ids` behind it."""
    signature = inspect.signature(forward)
    names = list(signature.parameters)[1:]
    parameters = list(signature.parameters.values())
    place = len(parameters) - (parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
    task_ids = inspect.Parameter("task_ids", inspect.Parameter.KEYWORD_ONLY, default=None)

    @functools.wraps(forward)
    def recording(self, *args, **kwargs):
        arguments = dict(zip(names, args, strict=False)) | kwargs
        return self._run_recording(forward, arguments, args, kwargs)

    recording.__signature__ = signature.replace(
        parameters=[*parameters[:place], task_ids, *parameters[place:]]
    )
    return recording


def _generating(generate):
    """A stock `generate` that takes `task_ids`, for encoders too."""

    @functools.wraps(generate)
    def generating(self, *args, task_ids=None, **kwargs):
        if task_ids is None:
            return generate(self, *args, **kwargs)
        before = [ffn.task for _, ffn in self.mixtures()]
        try:
            self.route_by(task_ids)
            return generate(self, *args, **kwargs)
        finally:
            for (_, ffn), task in zip(self.mixtures(), before, strict=True):
                ffn.task = task

    return generating


class MPOEMixin:
    """Turns a stock model class into one whose FFNs are mixtures, as `config.mpoe` says."""

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        block = config.mpoe
        if not block or block.get("format") != FORMAT_VERSION:
            found = block.get("format") if block else "no `mpoe` block"
            raise ValueError(
                f"{type(self).__name__} reads format {FORMAT_VERSION} of config.mpoe, found {found}; "
                "load the checkpoint with the modeling_mpoe.py that lies beside it"
            )
        base = self.base_model
        # A model may hold only one of the stacks, such as the encoder of T5.
        present = {path: form for path, form in block["ffns"].items() if _has_submodule(base, path)}
        if not present:
            raise ValueError(f"{type(self).__name__} has none of the layers {list(block['ffns'])}")
        for path, form in present.items():
            swap_ffn(base.get_submodule(path), block["forms"][form], block)
        self.mixture_paths = [f"{path}.{block['family']['slot']}" for path in present]
        for path, ffn in self.mixtures():
            ffn.configure(config, len(present))
            ffn.in_decoder = path.startswith("decoder")
        self._balancing: RouterPass | None = None  # the last pass whose load was noted
        self._versions: list[int] = []  # of the mixtures' parameters, then
        if self.loss_type is None and type(self).__name__.endswith("LMHeadModel"):
            self.loss_type = "ForCausalLM"  # what transformers falls back to, with a warning per call
        self.post_init()

    def mixtures(self) -> list[tuple[str, FeedForward]]:
        """The mixtures and their paths below the base model; a layer used several times is listed once.

        Where PEFT trains a copy of the whole FFN (`modules_to_save`), original and copies have one path.
        """
        found = [(path, self.base_model.get_submodule(path)) for path in self.mixture_paths]
        return [
            (path, ffn) for path, module in found for ffn in module.modules() if isinstance(ffn, FeedForward)
        ]

    def route_by(self, task: str | int | Sequence[str | int] | Tensor | None) -> None:
        """Let the routers choose by this task from now on; for models with `config.router_tasks`.

        `forward` and `generate` take the same as `task_ids`, for one call.

        Args:
            task: name or number of a task, or one per sequence of the batch; or embeddings (H,) or (B, H),
                computed elsewhere, in place of the learned ones.

        Raises:
            ValueError: the routers choose by token, or there is no such task.
        """
        found = None if task is None else self._task_numbers(task)
        for _, ffn in self.mixtures():
            ffn.task = found

    def _task_numbers(self, task) -> Tensor:
        """(B,) numbers or (B, H) embeddings of tasks."""
        known = self.config.router_tasks
        if known is None:
            raise ValueError(
                "the routers of this model choose by token; load it with router_tasks=[...], names of tasks, "
                "and train it"
            )
        if isinstance(task, Tensor):
            if task.is_floating_point():
                return task.reshape(-1, task.shape[-1])
            return task.reshape(-1)
        tasks = [task] if isinstance(task, (str, int)) else list(task)
        if strange := [t for t in tasks if t not in known and t not in range(len(known))]:
            raise ValueError(f"no such task: {strange}; this model knows {list(known)}")
        return torch.tensor([t if isinstance(t, int) else known.index(t) for t in tasks])

    def _run_recording(self, forward, arguments: dict, args: tuple, kwargs: dict):
        """A forward pass whose outputs carry the router losses."""
        config, mixtures = self.config, self.mixtures()
        task = kwargs.pop("task_ids", None)
        task = mixtures[0][1].task if task is None else self._task_numbers(task)
        _check_tasks(task, arguments)
        learns = self.training and torch.is_grad_enabled()
        show = kwargs.pop("output_router_logits", config.output_router_logits)
        coefs = (config.router_aux_loss_coef, config.router_z_loss_coef) if learns else (0.0, 0.0)
        rate = config.router_bias_update_rate if learns else 0.0
        needed = show or rate or any(coefs) or (learns and config.router_capacity_factor is not None)
        needed = needed or task is not None or (learns and config.router_tasks is not None)
        if not needed or any(ffn.router_pass is not None for _, ffn in mixtures):
            return forward(self, *args, **kwargs)
        if rate:
            self._follow_step()
        running = RouterPass(learns, *coefs, functools.partial(self._token_mask, arguments=arguments))
        running.share = self._share_of_step(arguments)
        running.task = task
        try:
            for _, ffn in mixtures:
                ffn.router_pass = running
            outputs = forward(self, *args, **kwargs)
        finally:
            for _, ffn in mixtures:
                ffn.router_pass = None
        if rate:
            for call in running.calls:
                call.ffn.note_load(call.routing, call.mask)
            self._balancing = running
        if any(coefs):
            outputs = _add_losses(outputs, running, arguments)
        if show and isinstance(outputs, ModelOutput):
            outputs = _show_routers(outputs, running)
        running.calls, running.mask_of = [], None
        return outputs

    def _follow_step(self) -> None:
        """Move the balancing biases once per optimizer's step, at the first pass after it."""
        last, before = self._balancing, self._versions
        parameters = [p for _, ffn in self.mixtures() for p in ffn.parameters() if p.requires_grad]
        self._versions = [p._version for p in parameters]
        if last is None or not last.went_back:
            return  # the backward pass is still to come, and repeats checkpointed calls with the same bias
        if self._versions != before or all(p.grad is None for p in parameters):
            self.update_router_bias()

    def update_router_bias(self) -> None:
        """Move the balancing biases now, by the load since they moved last.

        The first pass after an optimizer's step does so by itself. Called right after the step, it makes
        checkpoints of the training complete.
        """
        rate = self.config.router_bias_update_rate
        for _, ffn in self.mixtures():
            if rate:
                self.config.router_balance_bias = True
                ffn.add_balance_bias()
            ffn.update_bias(rate)

    def _share_of_step(self, arguments: dict) -> float | Tensor:
        """How much of an optimizer's step this pass is: Trainer's accumulated passes add up to one."""
        labels, num_items = arguments.get("labels"), arguments.get("num_items_in_batch")
        if labels is None or num_items is None or not getattr(self, "accepts_loss_kwargs", True):
            return 1.0
        shifted = self.loss_type == "ForCausalLM" and not self.config.is_encoder_decoder
        return (labels[..., int(shifted) :] != -100).sum() / num_items

    def _token_mask(self, ffn: FeedForward, num_tokens: int, index: int, *, arguments: dict) -> Tensor | None:
        """(T,) which of the tokens in a mixture's call are no padding, where the model's arguments tell.

        `index` is the number of the call in the pass: BERT may feed its FFNs chunk by chunk.
        """
        mask = arguments.get("attention_mask")
        if self.config.is_encoder_decoder and ffn.in_decoder:
            mask, labels = arguments.get("decoder_attention_mask"), arguments.get("labels")
            if mask is None and labels is not None and labels.numel() == num_tokens:
                mask = labels != -100
        if not isinstance(mask, Tensor) or mask.ndim not in (2, 3):
            return None
        mask = mask.flatten(0, -2)  # multiple choice: (batch, choices, length)
        if num_tokens % mask.shape[0]:
            return None
        length, chunk = num_tokens // mask.shape[0], getattr(self.config, "chunk_size_feed_forward", 0)
        if chunk and length == chunk < mask.shape[1]:
            start = index * chunk % mask.shape[1]
            return mask[:, start : start + chunk].reshape(-1)
        # With a cache the mask covers the past as well.
        return mask[:, -length:].reshape(-1) if length <= mask.shape[1] else None

    @contextmanager
    def router_stats(self, similarity_tokens: int = 0) -> Iterator[dict[str, "RouterStats"]]:
        """Watch the routers: inside the block every forward pass adds to the statistics of each mixture.

        Args:
            similarity_tokens: compare the experts' outputs on so many tokens per mixture and pass. This runs
                all experts on them.

        Yields:
            {path of the mixture below the base model: `RouterStats`}, filled as passes go by.
        """
        stats = {path: RouterStats(ffn.num_experts) for path, ffn in self.mixtures()}
        arguments: dict = {}
        calls = {ffn: 0 for _, ffn in self.mixtures()}
        signature = inspect.signature(self.forward)

        def take_arguments(module, args, kwargs):
            calls.update(dict.fromkeys(calls, 0))
            arguments.clear()
            arguments.update(dict(zip(signature.parameters, args, strict=False)) | kwargs)

        def watch(path: str, ffn: FeedForward, router, args, routing: Routing):
            if _in_backward():
                return  # a checkpoint repeats what was counted
            mask = self._token_mask(ffn, len(args[0]), calls[ffn], arguments=arguments)
            calls[ffn] += 1
            stats[path].add(routing, mask)
            if similarity_tokens:
                stats[path].compare(ffn, args[0][:similarity_tokens])

        handles = [self.register_forward_pre_hook(take_arguments, with_kwargs=True)]
        for path, ffn in self.mixtures():
            hook = functools.partial(watch, path, ffn)
            handles.append(ffn.router.register_forward_hook(hook))
        try:
            with torch.compiler.set_stance("force_eager"):  # compiled code would pass the hooks by
                yield stats
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def initialize_weights(self):
        super().initialize_weights()
        std = getattr(self.config, "initializer_range", None) or 0.02
        for module in self.modules():
            if isinstance(module, (Projection, Adapter, Router)):
                module.reset_parameters(std)
            elif isinstance(module, FeedForward) and module.balance_bias is not None:
                init.zeros_(module.balance_bias)


def _config_class(base: type, name: str, module: str) -> type:
    options = {"mpoe": None, **OPTIONS}
    body = {
        "model_type": MODEL_TYPE_PREFIX + base.model_type,
        **options,
        "__annotations__": {"mpoe": dict | None, **OPTION_TYPES},
        "__module__": module,
    }
    if module != __name__:  # code of the source may have a constructor, which a generated one would pass by

        def __init__(self, *args, **kwargs):
            ours = {option: kwargs.pop(option, default) for option, default in options.items()}
            base.__init__(self, *args, **kwargs)
            for option, value in ours.items():
                setattr(self, option, value)

        body["__init__"] = __init__
    return type(name, (base,), body)


def _model_class(base: type, name: str, module: str) -> type:
    config_class = subclass(base.config_class, module)
    body = {"config_class": config_class, "__module__": module, "forward": _recording(base.forward)}
    bases = (MPOEMixin, base)
    if module != __name__ and hasattr(base, "prepare_inputs_for_generation"):
        bases = (*bases, GenerationMixin)  # which AutoModel would add, to a copy of the class
    if GenerationMixin in bases or base.can_generate():
        body["generate"] = _generating(getattr(base, "generate", GenerationMixin.generate))
    # T5 takes `num_items_in_batch` and ignores it; Trainer must then average accumulated passes itself.
    if "loss_function" not in inspect.unwrap(base.forward).__code__.co_names:
        body["accepts_loss_kwargs"] = False
    # T5 keeps its output projection `wo` in float32 when the rest is float16; ours is called `down`.
    for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
        kept = getattr(base, attribute, None) or ()
        if "wo" in kept:
            body[attribute] = type(kept)([*kept, "down", "adapter"])
    cls = type(name, bases, body)
    # Key renames (GPT-NeoX's embed_out, ViT's old layer names) are looked up by class name.
    renames = get_checkpoint_conversion_mapping(base.__name__)
    if renames is not None:
        register_checkpoint_conversion_mapping(name, renames, overwrite=True)
    return cls


def subclass(base: type, module: str = __name__) -> type:
    """The subclass of a config or model class; made once, kept as an attribute of the module of that name.

    The base is a class of transformers, or one of the code that a checkpoint's source has of its own: that
    is subclassed in a module beside this one, so that saving a model copies all of its code.
    """
    namespace, name = vars(sys.modules[module]), CLASS_PREFIX + base.__name__
    if name in namespace:
        return namespace[name]
    if issubclass(base, PretrainedConfig):
        namespace[name] = _config_class(base, name, module)
        return namespace[name]
    namespace[name] = _model_class(base, name, module)
    if module == __name__:
        # Heads such as LlamaForSequenceClassification build their backbone by AutoModel.
        backbone = MODEL_MAPPING.get(base.config_class, None)
        if isinstance(backbone, type):
            subclass(backbone)
        if base is backbone:
            AutoModel.register(subclass(base.config_class), namespace[name], exist_ok=True)
    return namespace[name]


def __getattr__(name: str) -> type:
    base = getattr(transformers, name.removeprefix(CLASS_PREFIX), None)
    if not name.startswith(CLASS_PREFIX) or not isinstance(base, type):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if not issubclass(base, (PretrainedConfig, PreTrainedModel)):
        raise AttributeError(f"{name!r}: transformers.{base.__name__} is neither config nor model")
    return subclass(base)
