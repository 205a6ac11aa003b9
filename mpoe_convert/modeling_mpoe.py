# Copyright the mpoe_convert contributors. Licensed under the Apache License, Version 2.0.
"""Transformers whose feed-forward networks (FFNs) are mixtures of experts with shared parameters.

This file ships with every converted checkpoint and needs torch and transformers only (written for and
tested with torch 2.13 and transformers 5.23). What is notable:

* One weight form. A projection is a sum of *terms*; a term is a chain of cores (a matrix product
  operator); a core is stored once for all experts (`central_k`) or once per expert (`aux_k`):

      y = x W_e        W_e =  aux_0[e] --D1-- central_1 --D2-- aux_2[e]
                                |                |                |
                            (i_0, j_0)       (i_1, j_1)       (i_2, j_2)

  Core k has shape (bond_left, in_dim, out_dim, bond_right), with a leading expert axis when it is
  per expert. MPOE (arXiv 2203.01104) is one chain with a shared central core; dense experts (sparse
  upcycling) are one chain of one per-expert core.
* Two schedules. When the cores left of the centre carry input only and those right of it output only
  ("one-sided"), W_e = (L_e x I) C (I x R_e) acts on the activations and no expert matrix is ever
  built: all experts go through one matrix product with C. Otherwise the matrices of the experts that
  are hit are contracted first.
* The model is the stock transformers class. `MPOE<Name>` is made on demand as a subclass of
  `transformers.<Name>`; its FFNs are swapped after the stock constructor has run. Which submodules,
  and how they are wired, stands in `config.mpoe`, so this file knows no model family.
* Combine weights are the softmax over the chosen k logits and sum to one: identical experts compute
  exactly what the dense FFN computed, whatever the router says.

`config.mpoe` holds:

    format             version of this block, FORMAT_VERSION
    num_experts, top_k
    ffns               {path of a layer below the base model: index into forms}; other layers stay dense
    forms              [{"up": projection, "down": projection, "gate": projection if gated}, ...]; a
                       projection is {"terms": [{"in_dims", "out_dims", "bonds", "shared"}, ...], "bias"}
    family             how the FFN is wired into its layer; all paths relative to the layer:
      slot             the submodule that the mixture replaces
      absorbed         submodules whose work moved into it; they become Identity
      activation       where the stock activation module is found; it is taken over as it is
      inner_dropout    between activation and down projection: a module, or a rate that is set to zero
      outer_dropout    after the down projection, where the stock FFN applies it itself
      adds_residual    the stock FFN is called with the residual and adds it
    base_model_type, kind   for people; nothing here reads them
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoModel, PretrainedConfig, PreTrainedModel

try:
    from transformers import initialization as init
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )
    from transformers.integrations.moe import _grouped_mm_fallback  # noqa: F401  (registers the operator)
except ImportError as error:
    found = transformers.__version__
    raise ImportError(f"modeling_mpoe.py needs transformers 5.23 or newer, found {found}") from error

FORMAT_VERSION = 1
CLASS_PREFIX = "MPOE"
MODEL_TYPE_PREFIX = "mpoe_"


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


class Groups(NamedTuple):
    """Rows sorted by expert: the expert of every row, and where each expert's rows end.

    `sizes` repeats `ends` as Python integers; None while compiling, where reading them would break
    the graph.
    """

    experts: Tensor  # (N,) ascending
    ends: Tensor  # (E,) int32
    sizes: list[int] | None

    @classmethod
    def of(cls, experts: Tensor, num_experts: int) -> "Groups":
        counts = torch.zeros(num_experts, dtype=torch.int64, device=experts.device)
        counts = counts.scatter_add(0, experts, torch.ones_like(experts))
        sizes = None if torch.compiler.is_compiling() else counts.tolist()  # one synchronisation per FFN
        return cls(experts, counts.cumsum(0).to(torch.int32), sizes)

    def linear(self, rows: Tensor, weight: Tensor, rows_each: int = 1) -> Tensor:
        """Each row times its expert's matrix: (N * rows_each, in), (E, in, out) -> (.., out)."""
        if self.sizes is None:  # an opaque operator of fixed output shape, unknown to autocast
            device, dtype = rows.device.type, rows.dtype
            if torch.is_autocast_enabled(device):
                dtype = torch.get_autocast_dtype(device)
            rows, weight = rows.to(dtype), weight.to(dtype).contiguous()
            return torch.ops.transformers.grouped_mm_fallback(rows, weight, self.ends * rows_each)
        parts = rows.split([size * rows_each for size in self.sizes])
        # unbind, not weight[e]: the gradient is then stacked once, not added up from E full-size zeros.
        products = [part @ own for part, own in zip(parts, weight.unbind(), strict=True) if len(part)]
        return torch.cat(products) if products else rows @ weight[0]


class MPOEChain(nn.Module):
    """One term of a projection: a chain of shared (`central_k`) and per-expert (`aux_k`) cores.

    A core is stored as a matrix (bond_left * in_dim, out_dim * bond_right), or a stack of one per expert:
    shapes that optimizers, LoRA and kernels know.
    """

    def __init__(self, term: dict, num_experts: int):
        super().__init__()
        self.shapes = chain_shapes(term)
        self.in_features, self.out_features = math.prod(term["in_dims"]), math.prod(term["out_dims"])
        self.shared = tuple(term["shared"])
        self.core_names = name_cores(term)
        for name, shape, shared in zip(self.core_names, self.shapes, self.shared, strict=True):
            size = matrix_shape(shape) if shared else (num_experts, *matrix_shape(shape))
            self.register_parameter(name, nn.Parameter(torch.empty(size)))

    @property
    def cores(self) -> list[Tensor]:
        """(l, i, o, r) each, or (E, l, i, o, r)."""
        parameters = (getattr(self, name) for name in self.core_names)
        return [p.reshape(*p.shape[:-2], *s) for p, s in zip(parameters, self.shapes, strict=True)]

    @property
    def centre(self) -> slice | None:
        """Where the shared cores stand, if they are one run of neighbours."""
        if not any(self.shared):
            return None
        first, last = self.shared.index(True), len(self.shared) - 1 - self.shared[::-1].index(True)
        return slice(first, last + 1) if all(self.shared[first : last + 1]) else None

    @property
    def is_one_sided(self) -> bool:
        """Cores left of the shared ones carry input only, those right of them output only."""
        centre = self.centre
        return (
            centre is not None
            and all(out_dim == 1 for _, _, out_dim, _ in self.shapes[: centre.start])
            and all(in_dim == 1 for _, in_dim, _, _ in self.shapes[centre.stop :])
        )

    def forward(self, rows: Tensor, groups: Groups) -> Tensor:
        """(N, in) rows sorted by expert -> (N, out)."""
        cores = self.cores
        rows = rows.to(cores[0].dtype)
        if all(self.shared):
            return rows @ contract_chain(cores)
        if self.is_one_sided:
            return self._act_on(rows, groups, cores)
        if groups.sizes is not None and 0 in groups.sizes:  # build the matrices that are needed
            hit = [e for e, size in enumerate(groups.sizes) if size] or [0]
            cores = [c if s else c[hit] for c, s in zip(cores, self.shared, strict=True)]
            groups = groups._replace(sizes=[groups.sizes[e] for e in hit])
        return groups.linear(rows, contract_chain(cores))

    def _act_on(self, rows: Tensor, groups: Groups, cores: list[Tensor]) -> Tensor:
        """y = (L_e x I) C (I x R_e) on the activations; no expert's matrix is built."""
        num_rows, centre = rows.shape[0], self.centre
        middle = merge_cores(cores[centre])  # (r, m, n, s)
        r, m, n, s = middle.shape
        if centre.start > 0:
            left = merge_cores(cores[: centre.start])[:, 0, :, 0]  # (E, a, r)
            x = rows.reshape(num_rows, left.shape[1], m).transpose(1, 2)  # (N, m, a)
            x = groups.linear(x.flatten(0, 1), left, rows_each=m)  # (N*m, r)
            rows = x.reshape(num_rows, m, r).transpose(1, 2).reshape(num_rows, r * m)
        y = rows @ middle.reshape(r * m, n * s)  # shared by all experts
        if centre.stop < len(cores):
            right = merge_cores(cores[centre.stop :])[:, :, 0, :, 0]  # (E, s, b)
            y = groups.linear(y.reshape(num_rows * n, s), right, rows_each=n)  # (N*n, b)
        return y.reshape(num_rows, self.out_features)

    @property
    def flops_per_row(self) -> int:
        """Floating-point operations per row (2 per multiply-add), without building any matrix."""
        if all(self.shared) or not self.is_one_sided:
            return 2 * self.in_features * self.out_features
        centre = self.centre
        r, s = self.shapes[centre.start][0], self.shapes[centre.stop - 1][3]
        a = math.prod(shape[1] for shape in self.shapes[: centre.start])
        b = math.prod(shape[2] for shape in self.shapes[centre.stop :])
        middle_in, middle_out = self.in_features // a * r, self.out_features // b * s
        left = self.in_features * r if centre.start > 0 else 0
        right = middle_out * b if centre.stop < len(self.shapes) else 0
        return 2 * (left + middle_in * middle_out + right)

    @property
    def rebuild_flops(self) -> int:
        """Operations to contract one expert's matrix; 0 where the cores act on the activations."""
        if self.is_one_sided or len(self.shapes) == 1:
            return 0
        flops, rows, cols = 0, 1, 1
        for l, i, o, r in self.shapes:  # noqa: E741  (bond names)
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


class MPOEProjection(nn.Module):
    """y = sum of terms + bias, for rows that each have one expert.

    `spec`: {"terms": [{"in_dims", "out_dims", "bonds", "shared"}, ...],
             "bias": "shared" | "per-expert" | None}
    """

    def __init__(self, spec: dict, num_experts: int):
        super().__init__()
        self.terms = nn.ModuleList(MPOEChain(term, num_experts) for term in spec["terms"])
        out_features = math.prod(spec["terms"][0]["out_dims"])
        self.bias_kind = spec["bias"]
        if self.bias_kind is None:
            self.bias = None
        else:
            size = (out_features,) if self.bias_kind == "shared" else (num_experts, out_features)
            self.bias = nn.Parameter(torch.empty(size))

    def forward(self, rows: Tensor, groups: Groups) -> Tensor:
        """(N, in) -> (N, out)."""
        y = self.terms[0](rows, groups)
        for term in self.terms[1:]:
            y = y + term(rows, groups)
        if self.bias is None:
            return y
        return y + (self.bias if self.bias_kind == "shared" else self.bias[groups.experts])

    @torch.no_grad()
    def reset_parameters(self, std: float) -> None:
        for term in self.terms:
            term.reset_parameters(std)
        if self.bias is not None:
            init.zeros_(self.bias)


class MPOERouter(nn.Module):
    """Chooses k experts per token. The weight and the arithmetic are float32 in every model dtype."""

    def __init__(self, hidden_size: int, num_experts: int, top_k: int):
        super().__init__()
        self.top_k = top_k
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, dtype=torch.float32))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens (T, H) -> combine weights (T, k) float32, experts (T, k).

        The weights are the softmax over the chosen logits. For k = 1 that is the constant one, so the
        weight is p / p.detach(): one in value, with the gradient of log p (p over all experts).
        """
        with torch.autocast(tokens.device.type, enabled=False):
            logits = F.linear(tokens.float(), self.weight.float())  # (T, E)
            chosen, experts = logits.topk(self.top_k, dim=-1)
            if self.top_k > 1:
                return chosen.softmax(-1), experts
            probability = logits.softmax(-1).gather(-1, experts)
            return probability / probability.detach(), experts

    @torch.no_grad()
    def reset_parameters(self, std: float) -> None:
        init.normal_(self.weight, std=std)


class MPOEFeedForward(nn.Module):
    """The mixture that takes the place of a dense FFN: down(act(up x)) or down(act(gate x) * up x).

    `form`: {"up": spec, "down": spec, "gate": spec if gated} (see `MPOEProjection`).
    """

    def __init__(self, form: dict, num_experts: int, top_k: int):
        super().__init__()
        hidden_size = math.prod(form["up"]["terms"][0]["in_dims"])
        self.num_experts = num_experts
        self.router = MPOERouter(hidden_size, num_experts, top_k)
        self.gate = MPOEProjection(form["gate"], num_experts) if "gate" in form else None
        self.up = MPOEProjection(form["up"], num_experts)
        self.down = MPOEProjection(form["down"], num_experts)
        self.top_k = top_k
        self.act = nn.Identity()
        self.inner_dropout = nn.Identity()
        self.outer_dropout = nn.Identity()
        self.adds_residual = False

    @property
    def _chains(self) -> list[MPOEChain]:
        return [module for module in self.modules() if isinstance(module, MPOEChain)]

    @property
    def flops_per_token(self) -> int:
        """Floating-point operations per token (2 per multiply-add) in products with weights."""
        return 2 * self.router.weight.numel() + self.top_k * sum(c.flops_per_row for c in self._chains)

    @property
    def rebuild_flops(self) -> int:
        """Operations per forward pass to contract the matrices of all experts, where that is needed."""
        return self.num_experts * sum(chain.rebuild_flops for chain in self._chains)

    def forward(self, hidden_states: Tensor, residual: Tensor | None = None) -> Tensor:
        """(..., H) -> (..., H); plus the residual in families whose FFN adds it."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])  # (T, H)
        weights, experts = self.router(tokens)  # (T, k)
        order = experts.reshape(-1).argsort(stable=True)  # (T*k,) sorts the copies by expert
        groups = Groups.of(experts.reshape(-1)[order], self.num_experts)
        rows = self.down(self._inner(tokens[order // experts.shape[1]], groups), groups)
        copies = rows[order.argsort()].reshape(*experts.shape, rows.shape[-1])  # (T, k, H)
        weights = weights.to(torch.promote_types(rows.dtype, torch.float32))
        output = (copies * weights.unsqueeze(-1)).sum(1).to(rows.dtype)
        output = self.outer_dropout(output.reshape(hidden_states.shape))
        return output + residual if self.adds_residual else output

    def _inner(self, rows: Tensor, groups: Groups) -> Tensor:
        up = self.up(rows, groups)
        inner = self.act(up) if self.gate is None else self.act(self.gate(rows, groups)) * up
        return self.inner_dropout(inner)


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
    if isinstance(_take(layer, family["slot"]), MPOEFeedForward):
        return
    ffn = MPOEFeedForward(form, block["num_experts"], block["top_k"])
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
        if self.loss_type is None and type(self).__name__.endswith("LMHeadModel"):
            self.loss_type = "ForCausalLM"  # what transformers falls back to, with a warning per call
        self.post_init()

    @torch.no_grad()
    def initialize_weights(self):
        super().initialize_weights()
        std = getattr(self.config, "initializer_range", None) or 0.02
        for module in self.modules():
            if isinstance(module, (MPOEProjection, MPOERouter)):
                module.reset_parameters(std)


def _config_class(base: type, name: str) -> type:
    body = {
        "model_type": MODEL_TYPE_PREFIX + base.model_type,
        "mpoe": None,
        "__annotations__": {"mpoe": dict | None},
        "__module__": __name__,
    }
    return type(name, (base,), body)


def _model_class(base: type, name: str) -> type:
    config_class = _class(base.config_class)
    body = {"config_class": config_class, "__module__": __name__}
    # T5 keeps its output projection `wo` in float32 when the rest is float16; ours is called `down`.
    for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
        kept = getattr(base, attribute, None) or ()
        if "wo" in kept:
            body[attribute] = type(kept)([*kept, "down"])
    cls = type(name, (MPOEMixin, base), body)
    # Key renames (GPT-NeoX's embed_out, ViT's old layer names) are looked up by class name.
    renames = get_checkpoint_conversion_mapping(base.__name__)
    if renames is not None:
        register_checkpoint_conversion_mapping(name, renames, overwrite=True)
    return cls


def _class(base: type) -> type:
    """The subclass of a stock config or model class; made once, kept as an attribute of this module."""
    name = CLASS_PREFIX + base.__name__
    if name not in globals():
        if issubclass(base, PretrainedConfig):
            globals()[name] = _config_class(base, name)
        else:
            globals()[name] = _model_class(base, name)
            # Heads such as LlamaForSequenceClassification build their backbone by AutoModel.
            backbone = MODEL_MAPPING.get(base.config_class, None)
            if isinstance(backbone, type) and CLASS_PREFIX + backbone.__name__ not in globals():
                _class(backbone)
            if base is backbone:
                AutoModel.register(_class(base.config_class), globals()[name], exist_ok=True)
    return globals()[name]


def __getattr__(name: str) -> type:
    base = getattr(transformers, name.removeprefix(CLASS_PREFIX), None)
    if not name.startswith(CLASS_PREFIX) or not isinstance(base, type):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if not issubclass(base, (PretrainedConfig, PreTrainedModel)):
        raise AttributeError(f"{name!r}: transformers.{base.__name__} is neither config nor model")
    return _class(base)
