# Copyright the mpoe_convert contributors. Licensed under the Apache License, Version 2.0.
"""Transformers whose feed-forward networks (FFNs) are mixtures of experts with shared parameters.

This file ships with every converted checkpoint and needs torch and transformers only (written for and
tested with torch 2.13 and transformers 5.18 and 5.24). What is notable:

* One form of weights. A projection is a sum of *terms*; a term is a chain of cores (a matrix product
  operator, MPO); a core is stored once for all experts (`central_k`) or once per expert (`aux_k`):

      y = x W_e        W_e =  aux_0[e] --D1-- central_1 --D2-- aux_2[e]
                                |                |                |
                            (i_0, j_0)       (i_1, j_1)       (i_2, j_2)

  Core k has shape (bond_left, in_dim, out_dim, bond_right), with a leading expert axis if there is one per
  expert. MPOE (arXiv 2203.01104) is one chain with a shared central core; dense experts (sparse upcycling,
  arXiv 2212.05055) are one chain of one per-expert core. An outer core may be untied: it then has a matrix
  for every value of the inputs (or outputs) between it and the chain's other end, as in a block tensor train
  (arXiv 2406.06248); matrices of 1 x 1 scale features.
* Schedules. If the cores left of the centre carry only inputs and those right of it only outputs (layouts
  "blocks" and "one-sided"), W_e = (L_e x I) C (I x R_e) acts on the activations, and no expert's matrix is
  ever built: all experts go through one matrix product with C. Otherwise, or where it is cheaper, the
  matrices of the experts that tokens go to are contracted first; in inference they can be kept.
* The model is the stock transformers class. `MPOE<Name>` is made on demand as a subclass of
  `transformers.<Name>`; its FFNs are swapped after the stock constructor has run. `config.mpoe` says which
  submodules are swapped and how they are wired, so this file knows no model family. Classes from a source's
  custom code are subclassed by `subclass` in `modeling_mpoe_source.py` beside this file.
* One form of decisions. A router returns `Choices`, a list of (token, expert, weight): losses, load, capacity
  and costs are made of it, and a selection rule is one function. Rule top-k gives every token k experts.
  Rule top-p (XMoE, arXiv 2403.18926) gives it as many as it takes to reach a probability, rule top-any
  (DynMoE, arXiv 2405.14297) all that it is like enough; by rule expert-choice (arXiv 2202.09368), of
  encoders, every expert takes its best tokens of a sequence. Compiled code, whose shapes must not depend on
  values, computes `top_k` experts per token, those that are not chosen with the weight zero.
* Combine weights are the softmax over the chosen logits (of rule top-any, equal) and sum to one: identical
  experts compute exactly what the dense FFN computed, whatever the router decides. Where every expert holds
  a part of the neurons (MoEfication, arXiv 2110.01786), they sum to one over the chosen ones of each part.

`config.mpoe` holds:

    format             version of this block, FORMAT_VERSION
    num_experts
    top_k              experts per token; with rule expert-choice in the mean, with others than top-k the most
                       that there may be
    rule               name of the selection rule, see `RULES`; "top-k" if it is absent
    threshold          of rule top-p, a probability
    parts              P: expert e holds part e mod P of an FFN's neurons, and the experts' outputs add up;
                       absent where experts are whole FFNs
    shared_experts     M: so many experts more, behind the others, which every token passes; 0 if it is absent
    ffns               {path of a layer below the base model: index into forms}; other layers stay dense
    forms              [{"up": projection, "down": projection, "gate": projection if gated}, ...]; a
                       projection is {"terms": [{"in_dims", "out_dims", "bonds", "shared"}, ...],
                       "bias": "shared", "per-expert", "once" (added to the sum) or null}; "untied",
                       one of a term's lists, is absent where no core is untied;
                       where experts differ in size, "by_expert" has what differs, {"bonds": [expert 0's,
                       expert 1's, ...], ...}, and the term's own lists are those of the largest expert;
                       "adapter": size, or one per expert, if the experts are adapters behind a shared FFN;
                       `PARTS` says which class reads which key
    family             how the FFN is wired into its layer; all paths are relative to the layer:
      slot             the submodule that the mixture replaces
      absorbed         submodules whose work moved into the mixture; they become Identity
      activation       where the stock activation module is found; it is used as it is
      inner_dropout    between activation and down-projection: a module, or a rate that is set to zero
      outer_dropout    after the down-projection, where the stock FFN applies it itself
      adds_residual    true if the stock FFN is called with the residual and adds it
                       where the source is a mixture, its blocks and routers stay:
      slot             the block that holds the experts; "" if the layer does
      experts          their name in it
      activation       where they have theirs, or its name in transformers' table; by default `act_fn`
      one_by_one       true if the block takes them from a list and calls each
      experts_at       the text by which they were named, for tools
    base_model_type, kind, base_auto_map   of the source, for people and tools; nothing here reads them

Letters of shapes: B sequences of a batch, T tokens (of all sequences, in one axis), H hidden size, E experts,
N choices, each of which is a row that passes one expert; k choices per token, so that N = T k for rule top-k.

Contents:
    1. Config: options at its top level, and the version of its `mpoe` block
    2. Costs: what a call of a mixture amounts to, counted in operations and in bytes
    3. Linear layers: large cores as the modules that libraries round
    4. Chains of cores: contraction, which expert a row goes to, matrices that are kept, the chain itself
    5. Parts of a mixture: projections, and adapters behind the FFN; the table of what a form may hold
    6. Choices: what a router decides, as a list of (token, expert, weight), and the table of selection rules
    7. Combine weights of experts that were chosen by their logits
    8. Rule expert-choice: every expert takes its best tokens of a sequence
    9. Rule top-any: every token goes to all experts that it is like enough, by learned thresholds
    10. Rule top-k: every token goes to the k experts with the largest logits
    11. Rule top-p: every token goes to as many experts as it takes to reach a probability
    12. Routers: which experts a token goes to, and the losses that routers learn from
    13. Passes: how the routers' losses join the graph of a forward pass, and its outputs
    14. Mixing: what several experts make of tokens, given the choices; schedules and what they cost
    15. The mixture: the FFN of several experts with a router of its own
    16. Experts: what takes the place of the experts of a stock mixture, whose routers stay
    17. Self-contrast: generation against what weakly chosen experts say (SCMoE, arXiv 2405.14507)
    18. The model: swapping FFNs in a stock model, its forward pass, and classes made on demand
"""

import ast
import copy
import dataclasses
import functools
import inspect
import itertools
import math
import operator
import os
import re
import sys
import textwrap
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from types import UnionType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle
from transformers import MODEL_MAPPING, AutoModel, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.utils.generic import ModelOutput

try:
    from transformers import initialization as init
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )
    from transformers.core_model_loading import ConversionOps, WeightConverter
    from transformers.integrations.moe import _grouped_mm_fallback  # noqa: F401  (registers the operator)
    from transformers.utils.generic import ModelOutput
except ImportError as error:
    found = transformers.__version__
    raise ImportError(f"modeling_mpoe.py needs transformers 5.18 or newer, found {found}") from error


# ---------------------------------------------------------------------------------------------------
# 1. Config: options at its top level, and the version of its `mpoe` block


FORMAT_VERSION = 1
CLASS_PREFIX = "MPOE"
MODEL_TYPE_PREFIX = "mpoe_"


class Option(NamedTuple):
    """An option at the top level of the config; `from_pretrained(..., name=value)` sets it."""

    name: str
    type: type | UnionType
    default: object
    meaning: str
    values: tuple[str, ...] | None = None  # all that it may be; None: any value of its type
    least: float | None = None  # that a number may be

    def check(self, value: Any) -> None:
        """Raises ValueError if the option cannot have this value."""
        if self.values is not None and value not in self.values:
            raise ValueError(f"{self.name} is {value!r}: choose one of {', '.join(self.values)}")
        kinds = self.type.__args__ if isinstance(self.type, UnionType) else (self.type,)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not any(_fits(value, kind) for kind in kinds) or (
            is_number and self.least is not None and value < self.least
        ):
            bound = "" if self.least is None else f" of at least {self.least:g}"
            words = " or ".join(_IN_WORDS[kind] for kind in kinds)
            raise ValueError(
                f"{self.name} is {value!r}: expected {words.replace('number', f'number{bound}')}"
            )


_IN_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list[str]: "a list of texts",
    type(None): "none",
}


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a type; a number has to be finite, and truth is none."""
    if kind == list[str]:
        return isinstance(value, list | tuple) and all(isinstance(each, str) for each in value)
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    if kind is float:
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, kind)


# In the order in which config.json lists them.
CONFIG_OPTIONS = (
    Option(
        "router_aux_loss_coef",
        float,
        0.005,
        "coefficient of Switch's load-balancing loss in training: the mean over the mixtures; if the load is "
        "balanced, that is the number of experts per token",
        least=0,
    ),
    Option(
        "router_size_penalty",
        bool,
        True,
        "where experts differ in size: in the load-balancing loss a choice counts by the size of its expert, "
        "the mean being 1, so that small experts are preferred (HMoE's parameter penalty); false: all alike",
    ),
    Option("router_z_loss_coef", float, 0.0, "coefficient of ST-MoE's router z-loss in training", least=0),
    Option(
        "router_likeness_loss_coef",
        float,
        0.01,
        "of rule `top-any`: coefficient of DynMoE's loss of the routers' rows in training, which makes them "
        "differ (diversity) and keeps them short (simplicity)",
        least=0,
    ),
    Option(
        "router_efficiency_loss_coef",
        float,
        0.01,
        "of rule `top-any`: coefficient in training of the share of the experts that a token goes to: fewer "
        "experts per token",
        least=0,
    ),
    Option(
        "output_router_logits",
        bool,
        False,
        "outputs carry `router_logits` and `aux_loss`. A loss that is computed outside of the model then has "
        "to add `router_aux_loss_coef * outputs.aux_loss`, or the load is not balanced. Tuples "
        "(`return_dict=False`) carry neither. Also an argument of a call, of which tuples are an error",
    ),
    Option(
        "router_combine",
        str,
        "renormalised",
        "combine weights: `renormalised`: softmax over the chosen logits, for one expert per token the "
        "straight-through 1; `raw`: probabilities, which change what the model computes until it is trained "
        "(not with rule `top-any`)",
        ("renormalised", "raw"),
    ),
    Option(
        "router_jitter_noise",
        float,
        0.0,
        "in training a router's inputs are multiplied by uniform random numbers from 1 +- this (Switch)",
        least=0,
    ),
    Option(
        "router_capacity_factor",
        float | None,
        None,
        "in training an expert takes at most this times its equal share of the choices, and the others are "
        "dropped; none: no limit",
        least=0,
    ),
    Option(
        "router_bias_update_rate",
        float,
        0.0,
        "balancing without a loss (DeepSeek-V3): a bias on the selection moves by this after each optimizer "
        "step, in compiled code after each pass; 0: it stays as it is. Not with rule `top-any`, whose "
        "thresholds are learned",
        least=0,
    ),
    Option(
        "router_balance_bias",
        bool,
        False,
        "there are such biases, which are loaded; a rate above 0 sets it",
    ),
    Option(
        "router_tasks",
        list[str] | None,
        None,
        "names of tasks: routers choose by the task of a sequence, see `route_by`; none: by token",
    ),
    Option(
        "mpoe_schedule",
        str,
        "auto",
        "`apply`: the cores act on the activations; `rebuild`: the matrices of the experts that are hit are "
        "contracted; `cached`: and kept, in inference; `auto`: the cheapest. The environment variable "
        "MPOE_SCHEDULE overrules it",
        ("auto", "apply", "rebuild", "cached"),
    ),
    Option(
        "mpoe_cache",
        str,
        "off",
        "whose contracted matrices are kept in inference: nobody's (`off`), the `hit` experts', or `all`. "
        "MPOE_CACHE overrules it",
        ("off", "hit", "all"),
    ),
    Option(
        "mpoe_cache_bytes",
        int | None,
        None,
        "limit in bytes of the kept matrices of the whole model; none: no limit. MPOE_CACHE_BYTES overrules "
        "it",
        least=0,
    ),
)
OPTIONS = {option.name: option.default for option in CONFIG_OPTIONS}


def read_option(config: PretrainedConfig, name: str) -> Any:
    """The value of an option; for `mpoe_...` the environment variable of that name comes first.

    Raises:
        ValueError: the option cannot have that value.
    """
    option = next(option for option in CONFIG_OPTIONS if option.name == name)
    value = getattr(config, name)
    text = os.environ.get(name.upper()) if name.startswith("mpoe_") else None
    if text is not None:
        value = text if option.values is not None else _whole_number(text)
    option.check(value)
    return value


def _whole_number(text: str) -> int | str:
    """The whole number that a text says, also as 1e9; the text if it says none."""
    try:
        return int(float(text))
    except (ValueError, OverflowError):
        return text


# ---------------------------------------------------------------------------------------------------
# 2. Costs: what a call of a mixture amounts to, counted in operations and in bytes


def mean(numbers: Sequence[int]) -> float:
    """As a whole number, if it is one."""
    total = sum(numbers)
    return total / len(numbers) if total % len(numbers) else total // len(numbers)


class Work(NamedTuple):
    """A call of a mixture, as far as its cost depends on it; all may be expected values."""

    tokens: float  # T
    rows: float  # N, one per choice
    experts: float  # that some choice fell on


class Cost(NamedTuple):
    """What a part takes for a `Work`."""

    flops: float  # of products of rows with weights, 2 per multiply-add
    rebuild_flops: float  # of contracting the experts' matrices
    nbytes: float  # of weights read; a matrix that is built is written and read once

    @classmethod
    def total(cls, costs: Iterable["Cost"]) -> "Cost":
        """The sum."""
        return cls(*map(sum, zip(*costs, strict=True)))


# ---------------------------------------------------------------------------------------------------
# 3. Linear layers: large cores as the modules that libraries round
#
# bitsandbytes, torchao, HQQ and compressed-tensors round the weights of `nn.Linear`, each behind a forward of
# its own. In a model that is loaded with a `quantization_config`, every large core (`is_large`) is such a
# layer, whose weight (o * r, l * i) is the transposed core; of a core that experts own there is one per
# expert, of the expert's size. Files keep names and shapes of cores: `LoadLinears` splits and transposes a
# core while it is loaded.


# A core where libraries are to round it: a layer, or one for each expert.
Layers = nn.Linear | nn.ModuleList
# Below so many rows or columns a core is small: scales of groups would weigh as much as what is saved.
_MIN_SIDE = 32
# A core with a smaller share of its projection's matrix is small beside the others, and cheap to keep exact.
_MIN_SHARE = 1 / 64


def is_large(rows: int, cols: int, matrix_size: int) -> bool:
    """Whether a core, as the matrix (rows, cols) of one expert, is worth rounding.

    Args:
        matrix_size: number of entries of the projection's matrix.
    """
    return min(rows, cols) >= _MIN_SIDE and rows * cols >= _MIN_SHARE * matrix_size


def as_linears(shapes: Mapping[str, tuple[int, int]], like: Tensor) -> Layers:
    """Layers for a core, or a list for one that experts own; with random weights.

    Args:
        shapes: see `Chain.layer_shapes`.
        like: with their dtype and device.
    """
    made = [
        nn.Linear(rows, cols, bias=False, device=like.device, dtype=like.dtype)
        for rows, cols in shapes.values()
    ]
    return made[0] if "" in shapes else nn.ModuleList(made)


def split_experts(core: Tensor, shapes: Sequence[tuple[int, int]]) -> Sequence[Tensor]:
    """The experts' matrices, of these shapes, in a stack, or in a vector that has one after the other."""
    if core.ndim == 3:
        return core.unbind()
    parts = core.split([rows * cols for rows, cols in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def matrix_of(layer: nn.Module, like: Tensor) -> Tensor:
    """The matrix (in, out) that a layer multiplies by, whatever holds it; dtype and device of `like`."""
    size: Any = layer.in_features
    return layer(torch.eye(size, dtype=like.dtype, device=like.device))


def dtype_of(core: Tensor | Layers) -> torch.dtype | None:
    """What a core computes in; None: its layers take rows of any dtype."""
    tensors = [core] if isinstance(core, Tensor) else [*core.parameters(), *core.buffers()]
    return next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), None)


def itemsize_of(core: Tensor | Layers) -> int:
    """Bytes per number of a matrix that is built from a core; 2 where its layers take rows of any dtype."""
    if isinstance(core, nn.Module):
        dtype = dtype_of(core)
        return 2 if dtype is None else dtype.itemsize
    return core.itemsize


def bytes_of(core: Tensor | Layers) -> int:
    """Bytes that a core is held in, as it is now."""
    if isinstance(core, nn.Module):
        return sum(tensor.numel() * tensor.itemsize for tensor in (*core.parameters(), *core.buffers()))
    return core.numel() * core.itemsize


def is_recorded() -> bool:
    """Whether a graph is made for other tokens too: by torch.compile, torch.export or torch.jit.trace."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]  (documented, yet not exported)


def run_by_expert(layers: Layers, x: Tensor, experts: Tensor | int) -> Tensor:
    """x (N, p, in), each row by the layer of its expert (N,), or all by that of one -> (N, p, out).

    In a graph, whose shapes cannot follow the choices, every layer runs on all rows.
    """
    assert isinstance(layers, nn.ModuleList)
    if isinstance(experts, int):
        return layers[experts](x)
    if is_recorded():
        y = layers[0](x)
        for expert in range(1, len(layers)):
            y = torch.where((experts == expert)[:, None, None], layers[expert](x), y)
        return y
    hit = experts.unique().tolist() or [0]  # one synchronisation
    places = [(experts == expert).nonzero().squeeze(-1) for expert in hit]
    made = [layers[expert](x[place]) for expert, place in zip(hit, places, strict=True)]
    return torch.cat(made)[torch.cat(places).argsort()]


class _SplitCore(ConversionOps):
    """A core, or those of all experts, into the weights of its layers, by their names."""

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """`full_layer_name`: of the first weight."""
        ((core,),), first = input_dict.values(), kwargs["full_layer_name"]
        if core.ndim == 2:
            return {first: core.mT.contiguous()}
        name = first.removesuffix(".0.weight")
        layers = kwargs["model"].get_submodule(name)
        own = split_experts(core, [(layer.in_features, layer.out_features) for layer in layers])
        return {f"{name}.{expert}.weight": matrix.mT.contiguous() for expert, matrix in enumerate(own)}

    @property
    def reverse_op(self) -> ConversionOps:
        """Layers are saved as what they are."""
        return self


class LoadLinears(WeightConverter):
    """Loads cores into linear layers, which a quantiser rounds one by one."""

    __slots__ = ()

    @classmethod
    def of_model(cls, model: nn.Module) -> list[WeightConverter]:
        """For the cores of a model that are linear layers, wherever they are in it: below any prefix."""
        names: dict[str, list[str]] = {".weight": [], ".0.weight": []}
        for name, module in model.named_modules():
            parent, _, core = name.rpartition(".")
            if core in getattr(model.get_submodule(parent), "core_names", ()):
                names[".0.weight" if isinstance(module, nn.ModuleList) else ".weight"].append(re.escape(name))
        return [
            cls(rf"(?<![^.])({'|'.join(found)})$", rf"\1{tail}", [_SplitCore()])
            for tail, found in names.items()
            if found
        ]

    def convert(self, layer_name: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """{name: weight} of the layers of one core; `layer_name` is that of the first."""
        operation, self.quantization_operation = self.quantization_operation, None
        made = super().convert(layer_name, *args, **kwargs)
        if operation is None:
            return made
        loading = kwargs.pop("loading_info", None)
        rounded: dict[str, Any] = {}
        for name, weight in made.items():
            rounded |= operation.convert(
                {name: [weight]},
                source_patterns=[name],
                target_patterns=[name],
                full_layer_name=name,
                missing_keys=loading.missing_keys if loading else None,
                **kwargs,
            )
        return rounded

    def reverse_transform(self) -> WeightConverter:
        """Layers are saved as what they are: nothing matches."""
        return type(self)(r"(?!)", "none", self.operations)


# ---------------------------------------------------------------------------------------------------
# 4. Chains of cores: contraction, which expert a row goes to, matrices that are kept, the chain itself
#
# A chain multiplies rows x (N, in) by a matrix (in, out) that is never stored, only its cores: core k has the
# shape (l, i, o, r), left bond, input dimension, output dimension, right bond. It is stored as the matrix
# (l * i, o * r), which optimizers, LoRA and kernels know; one per expert in a stack (E, l * i, o * r).
#
# A core that carries only inputs multiplies the features of its site alike for every value p of the inputs
# to its right (`L (x) I`); one that carries only outputs alike for the outputs to its left. An *untied* core
# has a matrix of its own for every such value: the index p is copied, not contracted, as in a block tensor
# train (BTT, arXiv 2406.06248). Its shape is (P * l, i, o, r), p slowest; stored as (P * l * i, o * r).
# One at an end of a chain, with l = i = o = r = 1, is a vector that scales the inputs (or the outputs).
#
# Where experts differ in size (HMoE, arXiv 2408.10681), so do the shapes of their cores. Such a core is one
# vector, the experts' matrices one after the other, with nothing between them.


def merge_cores(cores: Sequence[Tensor]) -> Tensor:
    """Contract neighbouring cores into one: (..., l, i, o, r) each -> (..., l, prod i, prod o, r).

    The leading "..." is an expert axis that some cores may have and others not.
    """
    merged = cores[0]
    for core in cores[1:]:  # over the bond b between them
        merged = torch.einsum("...aIOb,...bior->...aIiOor", merged, core)  # (..., l, I, i, O, o, r)
        merged = merged.flatten(-5, -4).flatten(-3, -2)  # (..., l, I * i, O * o, r)
    return merged


def contract_chain(cores: Sequence[Tensor], copies: Sequence[int] | None = None) -> Tensor:
    """Contract a whole chain, whose outer bonds are 1: (in, out), or (E, in, out) if any core has experts.

    `copies`: per core, see `count_copies`; None: no core is untied.
    """
    if copies is None or max(copies) == 1:
        return merge_cores(cores).squeeze(-1).squeeze(-3)
    centre = next((k for k, core in enumerate(cores) if core.shape[-2] > 1), len(cores) - 1)
    merged = cores[centre]  # (..., l, I, O, r)
    for k in reversed(range(centre)):  # its inputs i stand before those to its right
        if copies[k] == 1:
            merged = merge_cores([cores[k], merged])
        else:
            untied = cores[k].unflatten(-4, (copies[k], -1)).squeeze(-2)  # (..., I, l, i, r)
            merged = _apart_left(untied, merged)
    for k in range(centre + 1, len(cores)):  # its outputs o stand behind those to its left
        if copies[k] == 1:
            merged = merge_cores([merged, cores[k]])
        else:
            untied = cores[k].unflatten(-4, (copies[k], -1)).squeeze(-3)  # (..., O, l, o, r)
            merged = _apart_right(merged, untied)
    return merged.squeeze(-1).squeeze(-3)


def _apart_left(untied: Tensor, merged: Tensor) -> Tensor:
    """(..., I, l, i, r) and (..., r, I, O, R) over r, apart for every I -> (..., l, i * I, O, R)."""
    if untied.shape[-3:] == (1, 1, 1):
        return untied.transpose(-4, -3) * merged
    if _is_plain(untied, merged):
        number, left, size, _ = untied.shape
        made = _multiply_apart(untied.flatten(1, 2), merged.transpose(0, 1).flatten(2))
        return made.reshape(left, size * number, *merged.shape[2:])
    return torch.einsum("...Ilir,...rIOR->...liIOR", untied, merged).flatten(-4, -3)


def _apart_right(merged: Tensor, untied: Tensor) -> Tensor:
    """(..., L, I, O, l) and (..., O, l, o, r) over l, apart for every O -> (..., L, I, O * o, r)."""
    if untied.shape[-3:] == (1, 1, 1):
        return merged * untied.transpose(-4, -2)
    if _is_plain(merged, untied):
        made = _multiply_apart(merged.flatten(0, 1).transpose(0, 1), untied.flatten(2))
        return made.reshape(*merged.shape[:2], -1, untied.shape[-1])
    return torch.einsum("...LIOl,...Olor->...LIOor", merged, untied).flatten(-3, -2)


def _is_plain(*cores: Tensor) -> bool:
    """Whether a product may be written in place: no expert axis, no gradient."""
    return max(core.ndim for core in cores) == 4 and not (torch.is_grad_enabled() or is_recorded())


def _multiply_apart(first: Tensor, second: Tensor) -> Tensor:
    """(P, m, k) times (P, k, n) -> (m, P, n), without a copy into that order."""
    made = first.new_empty(first.shape[1], len(first), second.shape[2])
    torch.bmm(first, second, out=made.transpose(0, 1))
    return made


def count_copies(term: dict) -> list[int]:
    """P per core of a term: how many matrices it has. 1, unless it is untied."""
    ins, outs = term["in_dims"], term["out_dims"]
    untied = term.get("untied") or [False] * len(ins)
    later = [math.prod(ins[k + 1 :]) for k in range(len(ins))]  # inputs to the right of a core
    earlier = [math.prod(outs[:k]) for k in range(len(outs))]  # outputs to its left
    return [max(i, o) if apart else 1 for i, o, apart in zip(later, earlier, untied, strict=True)]


def term_of(term: dict, expert: int) -> dict:
    """A term as one expert has it: where experts differ in size, with the dimensions of this one."""
    lists = term.get("by_expert", {})
    return term | {key: values[expert] for key, values in lists.items()}


def check_one_each(what: str, values: Sequence[Any], num_experts: int) -> None:
    """Raises ValueError: what `config.mpoe` lists by expert is not one value for each."""
    if len(values) != num_experts:
        raise ValueError(
            f"config.mpoe lists {what} of {len(values)} experts, and there are {num_experts}; expected one "
            "value for each: take config.json as it came with these weights"
        )


def chain_shapes(term: dict) -> list[tuple[int, int, int, int]]:
    """Core shapes (P * bond_left, in_dim, out_dim, bond_right) of a term, without the expert axis."""
    bonds = [1, *term["bonds"], 1]
    lefts = [copies * bond for copies, bond in zip(count_copies(term), bonds[:-1], strict=True)]
    return list(zip(lefts, term["in_dims"], term["out_dims"], bonds[1:], strict=True))


def matrix_shape(shape: tuple[int, int, int, int]) -> tuple[int, int]:
    """The shape in which a core is stored."""
    bond_left, in_dim, out_dim, bond_right = shape
    return bond_left * in_dim, out_dim * bond_right


def name_cores(term: dict) -> list[str]:
    """Parameter names of a term's cores, from left to right."""
    return [f"central_{k}" if shared else f"aux_{k}" for k, shared in enumerate(term["shared"])]


class Step(NamedTuple):
    """What a core does to rows, as a chain acts on them core after core.

    An input core takes x (N, width, inputs) and gives (N, r, inputs): one more site of the inputs is summed.
    Another takes x (N, outputs, width) and gives (N, outputs, o * r).
    """

    is_input: bool
    copies: int
    width: int  # l * i
    inputs: int  # features of the inputs that the cores behind it take
    outputs: int  # features of the outputs that the cores before it gave

    def run(self, x: Tensor, core: Any, picks: "Picks", shared: bool) -> Tensor:
        """x (N, ...) times the core, or for each row times that of its expert."""
        num_rows = x.shape[0]
        if self.is_input:
            x = x.reshape(num_rows, self.width, self.inputs)
            if self.copies > 1:
                return _multiply_untied(x.mT, core, self.copies, picks, shared).mT  # (N, r, inputs)
            if shared and self.inputs == 1:
                return multiply_right(x.mT, core).mT  # (N, r, 1)
            return multiply_left(core, x) if shared else picks.left(x, core)  # (N, r, inputs)
        x = x.reshape(num_rows, self.outputs, self.width)
        if self.copies > 1:
            return _multiply_untied(x, core, self.copies, picks, shared)
        return multiply_right(x, core) if shared else picks.right(x, core)  # (N, outputs, o * r)


class Layout(NamedTuple):
    """The cores of a chain by their shapes (P * l, i, o, r) and their numbers P of matrices, see `Chain`."""

    shapes: list[tuple[int, int, int, int]]
    copies: list[int]

    @classmethod
    def of(cls, term: dict) -> "Layout":
        """Of a term without `by_expert`."""
        return cls(chain_shapes(term), count_copies(term))

    @property
    def sizes(self) -> list[int]:
        """Numbers in each core."""
        return [math.prod(shape) for shape in self.shapes]

    def isometric_std(self, k: int, is_left: bool) -> float | None:
        """Of random numbers that make core k nearly an isometry; None: it scales features."""
        l, i, o, r = self.shapes[k]  # noqa: E741  (bond names)
        l //= self.copies[k]  # noqa: E741  (bond names)
        return None if l * i * o * r == 1 else (l * i * o if is_left else i * o * r) ** -0.5

    def steps(self) -> list[Step]:
        """What the cores do one after the other."""
        found: list[Step] = []
        inputs, outputs = math.prod(i for _, i, _, _ in self.shapes), 1
        for (left, i, o, _), copies in zip(self.shapes, self.copies, strict=True):
            is_input = inputs > 1 and o == 1
            inputs //= i
            found.append(Step(is_input, copies, left // copies * i, inputs, outputs))
            outputs *= o
        return found

    def flops_per_row(self, steps: int | None = None) -> int:
        """Operations of the first steps, see `Chain`; None: of all."""
        flops, inputs, outputs = 0, math.prod(i for _, i, _, _ in self.shapes), 1
        for shape, copies in zip(self.shapes[:steps], self.copies[:steps], strict=True):
            _, i, o, _ = shape
            inputs //= i  # a matrix (l * i, o * r) for every input and output
            if copies == 1 or math.prod(shape) > copies:
                flops += 2 * inputs * outputs * math.prod(shape) // copies
            outputs *= o
        return flops

    def rebuild_flops(self) -> int:
        """Operations to contract the matrix."""
        flops, rows, cols = 0, 1, 1
        for shape, copies in zip(self.shapes, self.copies, strict=True):
            _, i, o, _ = shape
            flops += 2 * rows * cols * math.prod(shape) // copies  # rows * cols: what is contracted so far
            rows, cols = rows * i, cols * o
        return flops - 2 * math.prod(self.shapes[0]) // self.copies[0]  # the first core costs nothing


def multiply_left(weight: Tensor | Layers, x: Tensor) -> Tensor:
    """The transpose of weight (l, q) times every x (N, l, p) -> (N, q, p)."""
    if isinstance(weight, nn.Module):
        return weight(x.mT).mT
    if torch.is_grad_enabled():  # one product over transposed copies, whose gradient is not made per row
        return weight.mT @ x
    return torch.bmm(weight.mT.expand(x.shape[0], -1, -1), x)


def multiply_right(x: Tensor, weight: Tensor | Layers) -> Tensor:
    """Every x (N, p, l) times weight (l, q) -> (N, p, q)."""
    return weight(x) if isinstance(weight, nn.Module) else x @ weight


def multiply_blocks(x: Tensor, weight: Tensor) -> Tensor:
    """Every x (N, P, l) times the P matrices of weight (P, l, q) -> (N, P, q)."""
    if weight.shape[-2:] == (1, 1):  # numbers that scale features
        return x * weight.squeeze(-1)
    return torch.bmm(x.transpose(0, 1), weight).transpose(0, 1)


class Picks(NamedTuple):
    """Which expert's core each of N rows is multiplied by, in the form that suits their number.

    One of four:
        one expert for all rows         experts is an int
        each row with a copy of its own experts (N,); few rows
        rows sorted by expert           experts (N,) ascending, `sizes` rows for each expert
        the same, sizes on the device   experts (N,) ascending, expert e's rows end at `ends[e]`
    """

    experts: Tensor | int
    sizes: list[int] | None = None
    ends: Tensor | None = None  # (E,) int32

    @classmethod
    def of_sorted(cls, experts: Tensor, num_experts: int, on_device: bool) -> "Picks":
        """For rows that are sorted by their experts (N,)."""
        counts = torch.zeros(num_experts, dtype=torch.int64, device=experts.device)
        counts = counts.scatter_add(0, experts, torch.ones_like(experts))  # (E,)
        if on_device:
            return cls(experts, ends=counts.cumsum(0).to(torch.int32))
        return cls(experts, sizes=counts.tolist())  # one synchronisation per FFN

    def right(self, x: Tensor, weight: Tensor | Layers) -> Tensor:
        """x (N, p, l) times its expert's matrix of (E, l, q) -> (N, p, q)."""
        if isinstance(weight, nn.Module):
            return run_by_expert(weight, x, self.experts)
        if self.sizes is not None:
            return self._by_segment(x, weight, torch.matmul)
        if self.ends is not None:
            ends = self.ends * x.shape[1]
            return _multiply_groups(x.flatten(0, 1), weight, ends).unflatten(0, (-1, x.shape[1]))
        if isinstance(self.experts, int):
            return x @ weight[self.experts]
        return torch.bmm(x, weight.index_select(0, self.experts))

    def left(self, x: Tensor, weight: Tensor | Layers) -> Tensor:
        """The transpose of its expert's matrix of (E, l, q) times x (N, l, p) -> (N, q, p)."""
        if x.shape[-1] == 1 or self.ends is not None or isinstance(weight, nn.Module):
            return self.right(x.mT.contiguous(), weight).mT
        if self.sizes is not None:
            return self._by_segment(x, weight, lambda part, own: multiply_left(own, part))
        if isinstance(self.experts, int):
            return multiply_left(weight[self.experts], x)
        return torch.bmm(weight.index_select(0, self.experts).mT, x)

    def blocks(self, x: Tensor, weight: Tensor) -> Tensor:
        """x (N, P, l) times the P matrices of its expert in (E, P, l, q) -> (N, P, q)."""
        if weight.shape[-2:] == (1, 1) and self.sizes is None:
            return x * weight.squeeze(-1)[self.experts]
        if self.sizes is not None:
            return self._by_segment(x, weight, multiply_blocks)
        if self.ends is not None:  # P * E groups: a block's rows, expert by expert
            num_rows, num_blocks, _ = x.shape
            starts = torch.arange(num_blocks, dtype=torch.int32, device=x.device) * num_rows  # (P,)
            ends = (starts.unsqueeze(-1) + self.ends).flatten()  # (P * E,)
            grouped = weight.transpose(0, 1).flatten(0, 1)  # (P * E, l, q)
            product = _multiply_groups(x.transpose(0, 1).flatten(0, 1), grouped, ends)  # (P * N, q)
            return product.unflatten(0, (num_blocks, num_rows)).transpose(0, 1)
        if isinstance(self.experts, int):
            return multiply_blocks(x, weight[self.experts])
        return (x.unsqueeze(-2) @ weight.index_select(0, self.experts)).squeeze(-2)

    def _by_segment(self, x: Tensor, weight: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """One product per expert: its rows of x (N, ...) with what is its own in (E, ...)."""
        assert self.sizes is not None
        hit = [expert for expert, size in enumerate(self.sizes) if size] or [0]
        # With gradients unbind, not weight[e]: they are then stacked once, not added up from E full-size
        # zeros. Without them views of the experts that nothing goes to would take longer than small products.
        own = weight.unbind() if torch.is_grad_enabled() else weight
        parts = x.split([self.sizes[expert] for expert in hit])
        products = [product(part, own[expert]) for part, expert in zip(parts, hit, strict=True)]
        return products[0] if len(products) == 1 else torch.cat(products)


def run_each(x: Tensor, picks: Picks, num_experts: int, function: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Rows x (N, ...), each by what `function` makes of it for its expert, where experts differ in size.

    In a compiled graph, whose shapes cannot follow the choices, every expert runs on all rows.
    """
    if isinstance(picks.experts, int):
        return function(x, picks.experts)
    if picks.sizes is not None:
        parts = enumerate(x.split(picks.sizes))
        made = [function(part, expert) for expert, part in parts if len(part)]
        return torch.cat(made) if made else function(x, 0)
    y = function(x, 0)
    for expert in range(1, num_experts):
        is_own = (picks.experts == expert).reshape(-1, *[1] * (y.ndim - 1))
        y = torch.where(is_own, function(x, expert), y)
    return y


def _multiply_groups(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """One kernel for all experts: rows (M, l), expert e's up to `ends[e]`, with (E, l, q) -> (M, q)."""
    device, dtype = rows.device.type, rows.dtype
    if torch.is_autocast_enabled(device):  # the operators below are unknown to autocast
        dtype = torch.get_autocast_dtype(device)
    rows, weight = rows.to(dtype), weight.to(dtype).contiguous()
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
        keep: "hit": of the experts that tokens went to; "all": of every expert, from the first use on.
        limit: bytes for all matrices of this FFN; what does not fit is built each time. None: no limit.
    """

    def __init__(self, keep: str, limit: float | None = None):
        self.keep, self.limit = keep, math.inf if limit is None else limit
        # {(id of the chain, expert): (state of its cores, matrix (in, out))}
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
        if self.keep == "all" and not chain.is_common:
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

    Attributes:
        large: per core, whether it may be rounded, and is a linear layer then; where experts differ in size,
            whether that of the largest may.
        acts: the cores can act on the activations one after the other, with no matrix built: at most one
            carries input and output, those left of it only input, those right of it only output.
        is_common: all cores are shared, so that every expert has the same matrix.
        num_start, num_end: cores that all experts share at the beginning and at the end of a chain that acts,
            and that is not common: what the first make of a token is the same for all of its experts, and the
            last may work on the sum of what several experts made.
        own_features: how many numbers per row the cores before these last ones give.
        start_flops, end_flops: what these take of `flops_per_row`.
        shapes, copies: see `Layout`; where experts differ in size, of the largest.
        layouts: one, or, where experts differ in size, one per expert.
        apart: per core, whether experts differ in its size; it is then a vector, see `split_experts`.
        shared_params: parameters that are stored once.
        own_by_expert: parameters that each expert has for itself.
        flops_per_row: operations per row (2 per multiply-add), but neither the contraction of matrices nor
            scales; of experts that differ the mean, as of `rebuild_flops`.
        rebuild_flops: operations to contract one expert's matrix.
    """

    def __init__(self, term: dict, num_experts: int):
        super().__init__()
        self.num_experts = num_experts
        self._differ = "by_expert" in term
        for key, values in term.get("by_expert", {}).items():
            check_one_each(key, values, num_experts)
        terms = [term_of(term, expert) for expert in range(num_experts)] if self._differ else [term]
        self.layouts = [Layout.of(own) for own in terms]
        self.steps = [layout.steps() for layout in self.layouts]
        largest = Layout.of(term)
        self.shapes, self.copies = largest.shapes, largest.copies
        self.in_features, self.out_features = math.prod(term["in_dims"]), math.prod(term["out_dims"])
        self.shared = tuple(bool(shared) for shared in term["shared"])
        self.is_common = all(self.shared)
        self.core_names = name_cores(term)
        self.acts = all(map(_acts, terms))
        if not self.acts and (self._differ or max(self.copies) > 1):
            what = "of experts that differ in size" if self._differ else "with an untied core"
            raise ValueError(f"a chain {what} has to carry its inputs left of its outputs")
        self._add_cores()
        self._count()
        self._find_ends(term, largest)

    def _add_cores(self) -> None:
        """Parameters for the cores; which experts differ in, and which are large."""
        self._stored = [  # per core, the matrix shapes of the layouts
            list(map(matrix_shape, shapes))
            for shapes in zip(*(own.shapes for own in self.layouts), strict=True)
        ]
        self.apart = [len(set(shapes)) > 1 for shapes in self._stored]
        neighbours = itertools.groupby(range(len(self._stored)), self.apart.__getitem__)
        self._groups = [(apart, list(group)) for apart, group in neighbours]  # of cores, from left to right
        cores = zip(self.core_names, self._stored, self.shared, self.apart, strict=True)
        for name, shapes, shared, apart in cores:
            if shared and apart:
                raise ValueError(
                    f"{name} is shared by experts in which it has the shapes {sorted(set(shapes))}"
                )
            numbers = (sum(rows * cols for rows, cols in shapes),)
            size = shapes[0] if shared else numbers if apart else (self.num_experts, *shapes[0])
            self.register_parameter(name, nn.Parameter(torch.empty(size)))
        whole = self.in_features * self.out_features
        self.large = [
            copies == 1 and is_large(*matrix_shape(shape), whole)
            for copies, shape in zip(self.copies, self.shapes, strict=True)
        ]

    def _count(self) -> None:
        """Parameters and operations."""
        sizes = zip(self.layouts[0].sizes, self.shared, strict=True)
        self.shared_params = sum(size for size, shared in sizes if shared)
        own = [sum(layout.sizes) - self.shared_params for layout in self.layouts]
        self.own_by_expert = tuple(own if self._differ else own * self.num_experts)
        whole = 2 * self.in_features * self.out_features
        self.flops_per_row = mean([own.flops_per_row() if self.acts else whole for own in self.layouts])
        self.rebuild_flops = mean([layout.rebuild_flops() for layout in self.layouts])

    def _find_ends(self, term: dict, largest: Layout) -> None:
        """The cores at both ends that are the same for all experts, and what they cost."""
        begins = self.acts and not self._differ and not self.is_common
        self.num_start = [*self.shared, False].index(False) if begins else 0
        self.num_end = [*self.shared[::-1], False].index(False) if begins else 0
        self.start_flops = largest.flops_per_row(self.num_start)
        self.own_features = self._features_before_end(term)
        self.end_flops = largest.flops_per_row() - largest.flops_per_row(len(self.shared) - self.num_end)

    def _features_before_end(self, term: dict) -> int:
        """How many numbers per row the cores before the last `num_end` give."""
        place = len(self.shared) - self.num_end
        bond = [1, *term["bonds"], 1][place]
        return bond * math.prod(term["in_dims"][place:]) * math.prod(term["out_dims"][:place])

    def use_linears(self) -> None:
        """Let the large cores be linear layers from now on, with random weights."""
        for k, name in enumerate(self.core_names):
            core = getattr(self, name)
            if not self.large[k] or isinstance(core, nn.Module):
                continue
            delattr(self, name)
            shapes = self.layer_shapes(k)
            self.add_module(name, as_linears(shapes, core))
            # see `matrix_of`
            self.rebuild_flops += mean([2 * rows * rows * cols for rows, cols in shapes.values()])

    def layer_shapes(self, k: int) -> dict[str, tuple[int, int]]:
        """{what follows the name of core k: (l * i, o * r)} of the matrices in it: one, or one per expert."""
        if self.shared[k]:
            return {"": self._stored[k][0]}
        shapes = self._stored[k] * (self.num_experts // len(self._stored[k]))
        return {f".{expert}": shape for expert, shape in enumerate(shapes)}

    def forward(
        self,
        rows: Tensor,
        picks: Picks,
        rebuild: bool = False,
        cache: MatrixCache | None = None,
        span: str = "whole",
    ) -> Tensor:
        """(N, in) rows -> (N, out).

        Args:
            rows: in the order that `picks` describes.
            rebuild: contract the matrices of the experts that are hit, even if the cores could act.
            cache: where contracted matrices are kept; for `picks` of one expert.
            span: "start": the first `num_start` cores alone, (N, in) -> (N, features); "rest": the others, of
                rows that these made; "end": the last `num_end` alone; "own": those before, of rows (N, in).
        """
        picks = Picks(*picks)  # what moves a module's arguments may have made a plain tuple of it
        cores = [getattr(self, name) for name in self.core_names]
        rows = rows.to(next(filter(None, map(dtype_of, cores)), rows.dtype))
        if self.acts and not (rebuild and len(cores) > 1):
            return self._act(rows, picks, cores, span)
        if self.is_common or isinstance(picks.experts, int):
            expert = picks.experts if isinstance(picks.experts, int) and not self.is_common else 0
            if cache and not any(isinstance(core, nn.Module) for core in cores):
                return rows @ cache.matrix(self, cores, expert)
            return rows @ self._contract(cores, expert, rows)
        hit = slice(None)
        if picks.sizes is not None:  # build the matrices that are needed
            hit = [e for e, size in enumerate(picks.sizes) if size] or [0]
            picks = picks._replace(sizes=[picks.sizes[e] for e in hit])
        return picks.right(rows.unsqueeze(1), self._contract(cores, hit, rows)).squeeze(1)

    def matrix(self, cores: Sequence[Tensor], expert: int, dtype: torch.dtype | None = None) -> Tensor:
        """One expert's matrix, (in, out), computed in the cores' dtype or another."""
        own = [core.to(dtype or core.dtype) for core in self.cores_of(cores, expert)]
        return contract_chain(own, self._layout_of(expert).copies)

    def cores_of(self, cores: Sequence[Tensor], expert: int) -> list[Tensor]:
        """One expert's cores (P * l, i, o, r) of those that are stored."""
        return self._shaped(cores, expert, cores[0])

    def _layout_of(self, expert: int) -> Layout:
        return self.layouts[expert if len(self.layouts) > 1 else 0]

    def _contract(
        self, cores: Sequence[Tensor | Layers], experts: int | list[int] | slice, like: Tensor
    ) -> Tensor:
        """The matrices of an index of experts: (in, out) for an integer, else (number, in, out).

        `like`: with dtype and device of what rounded cores become.
        """
        if isinstance(experts, int) or len(self.layouts) == 1:
            copies = self._layout_of(experts if isinstance(experts, int) else 0).copies
            return contract_chain(self._shaped(cores, experts, like), copies)
        hit = range(self.num_experts)[experts] if isinstance(experts, slice) else experts
        return torch.stack([self._contract(cores, expert, like) for expert in hit])

    def _shaped(
        self, cores: Sequence[Tensor | Layers], experts: int | list[int] | slice, like: Tensor
    ) -> list[Tensor]:
        """The cores (..., P * l, i, o, r) of an index of experts: an integer where they differ in size."""
        shapes = self._layout_of(experts if isinstance(experts, int) else 0).shapes
        found = []
        for k, (core, shape) in enumerate(zip(cores, shapes, strict=True)):
            if self.apart[k]:
                assert isinstance(experts, int)
                own = self._own(core, k)[experts]
                matrix = matrix_of(own, like) if isinstance(own, nn.Module) else own
                found.append(matrix.reshape(shape))
                continue
            chosen = _choose(core, slice(None) if self.shared[k] else experts, like)
            found.append(chosen.reshape(*chosen.shape[:-2], *shape))
        return found

    def _own(self, core: Tensor | Layers, k: int) -> Sequence[Tensor | nn.Module]:
        """The experts' matrices, or layers, in core k, in whose size they differ."""
        if isinstance(core, nn.ModuleList):
            return [*core]
        assert isinstance(core, Tensor)
        return split_experts(core, self._stored[k])

    def _act(self, rows: Tensor, picks: Picks, cores: list[Tensor], span: str) -> Tensor:
        """Core after core, see `Step`: rows (N, in) -> (N, out); for `span` see `forward`."""
        x = rows
        before_end = len(cores) - self.num_end
        first = {"rest": self.num_start, "end": before_end}.get(span, 0)
        end = {"start": self.num_start, "own": before_end}.get(span, len(cores))
        for apart, group in self._groups:
            if apart:
                x = self._act_apart(x, {k: self._own(cores[k], k) for k in group}, picks)
                continue
            for k in group:
                if first <= k < end:
                    x = self.steps[0][k].run(x, cores[k], picks, self.shared[k])
        return x.flatten(1)

    def _act_apart(self, x: Tensor, own: dict[int, Sequence[Tensor | nn.Module]], picks: Picks) -> Tensor:
        """x (N, ...) by neighbouring cores in whose size experts differ, {k: the experts'} -> (N, features).

        What is between such cores may have another size for every expert.
        """

        def run(part: Tensor, expert: int) -> Tensor:
            for k, matrices in own.items():
                part = self.steps[expert][k].run(part, matrices[expert], picks, True)
            return part.flatten(1)

        return run_each(x, picks, self.num_experts, run)

    # ------------------------------------------------------------------------------------- cost

    def cost(self, rows: float, experts: float, schedule: str, spared: float = 0) -> Cost:
        """Of so many rows that go to so many experts; for the schedules see `FeedForward`.

        `spared`: operations that are not done for every row, where the cores act.
        """
        cores = [getattr(self, name) for name in self.core_names]
        sizes = zip(map(bytes_of, cores), self.shared, strict=True)
        stored = sum(size if shared else size * experts / self.num_experts for size, shared in sizes)
        if self.acts and (schedule == "apply" or len(self.shapes) == 1):
            return Cost(rows * self.flops_per_row - spared, 0, stored)
        flops = rows * 2 * self.in_features * self.out_features
        built = experts * self.in_features * self.out_features * itemsize_of(cores[0])
        if schedule == "cached":
            return Cost(flops, 0, built)
        return Cost(flops, experts * self.rebuild_flops, stored + 2 * built)

    @torch.no_grad()
    def reset_parameters(self, std: float) -> None:
        """Random experts: outer cores near isometries, the largest core of scale `std`."""
        largest = Layout(self.shapes, self.copies)
        sizes = [min(of_core) for of_core in zip(*(layout.sizes for layout in self.layouts), strict=True)]
        centre = sizes.index(max(sizes))
        for k, name in enumerate(self.core_names):
            core = getattr(self, name)
            if isinstance(core, nn.Module):  # initialised as the linear layers of the stock model
                continue
            layouts = self.layouts if self.apart[k] else [largest]
            isometric = [layout.isometric_std(k, k < centre) for layout in layouts]
            stds = [own if own is None or k != centre else std for own in isometric]
            if self.apart[k]:
                pairs = zip(core.split([layout.sizes[k] for layout in layouts]), stds, strict=True)
                init.copy_(core, torch.cat([_random(part, own) for part, own in pairs]))
            elif stds[0] is None:  # it scales features
                init.ones_(core)
            else:
                init.normal_(core, std=stds[0])


def _random(like: Tensor, std: float | None) -> Tensor:
    """Numbers of this standard deviation; None: ones."""
    return torch.ones_like(like) if std is None else std * torch.randn_like(like)


def _acts(term: dict) -> bool:
    """Whether the chain can act on rows, see `Chain`."""
    inputs = [k for k, i in enumerate(term["in_dims"]) if i > 1]
    outputs = [k for k, o in enumerate(term["out_dims"]) if o > 1]
    return not inputs or not outputs or inputs[-1] <= outputs[0]


def _choose(core: Tensor | Layers, experts: int | list[int] | slice, like: Tensor) -> Tensor:
    """The experts' part of a core, which may be rounded; a shared core has one part, `slice(None)`."""
    if isinstance(core, nn.ModuleList):
        if isinstance(experts, int):
            return matrix_of(core[experts], like)
        hit = range(len(core))[experts] if isinstance(experts, slice) else experts
        return torch.stack([matrix_of(core[expert], like) for expert in hit])
    return matrix_of(core, like) if isinstance(core, nn.Module) else core[experts]


def _multiply_untied(x: Tensor, core: Tensor, copies: int, picks: Picks, shared: bool) -> Tensor:
    """x (N, P, l * i) with an untied core (P * l * i, q), or (E, P * l * i, q) -> (N, P, q)."""
    core = core.unflatten(-2, (copies, x.shape[-1]))
    return multiply_blocks(x, core) if shared else picks.blocks(x, core)


# ---------------------------------------------------------------------------------------------------
# 5. Parts of a mixture: projections, and adapters behind the FFN; the table of what a form may hold
#
# A part says itself what it owns, what it costs and what it starts as. Another type of part is one more class
# and one more row in `PARTS`.


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


# ---------------------------------------------------------------------------------------------------
# 6. Choices: what a router decides, as a list of (token, expert, weight), and the table of selection rules


class Choices(NamedTuple):
    """N choices: token `tokens[n]` goes to expert `experts[n]`, whose output is multiplied by `weights[n]`.

    A token may have no choice, one or many. A rule lists them token by token, each token's from the first
    choice to the last.
    """

    tokens: Tensor  # (N,) int64
    experts: Tensor  # (N,) int64
    weights: Tensor  # (N,) float32, the combine weights
    per_token: int | None = None  # k, if every token has k choices, side by side; None: their number varies
    # (N,) False for those that the rule did not choose, which stand in the list with the weight zero, so that
    # its length does not depend on values; None: all are chosen
    real: Tensor | None = None

    @classmethod
    def of_table(cls, experts: Tensor, weights: Tensor, chosen: Tensor | None = None) -> "Choices":
        """Of experts (T, k) and weights (T, k) per token, those that `chosen` (T, k) has; None: all."""
        k = experts.shape[-1]
        if chosen is not None and not has_fixed_shapes(experts):
            tokens, ranks = chosen.nonzero(as_tuple=True)
            index = torch.add(ranks, tokens, alpha=k)
            return cls(
                tokens,
                experts.reshape(-1).index_select(0, index),
                weights.reshape(-1).index_select(0, index),
            )
        places = torch.arange(experts.numel(), device=experts.device)
        choices = cls(places.div(k, rounding_mode="floor"), experts.reshape(-1), weights.reshape(-1), k)
        if chosen is None:
            return choices
        real = chosen.reshape(-1)
        return choices._replace(weights=choices.weights * real, real=real)

    def take(self, index: Tensor) -> "Choices":
        """Those at `index` (M,), in its order."""
        real = None if self.real is None else self.real.index_select(0, index)
        tokens, experts = self.tokens.index_select(0, index), self.experts.index_select(0, index)
        return Choices(tokens, experts, self.weights.index_select(0, index), real=real)

    def spread(self, values: Tensor) -> Tensor:
        """Values of the tokens (T, ...) -> one row for each choice (N, ...)."""
        if self.per_token is None:
            return values.index_select(0, self.tokens)
        return values.repeat_interleave(self.per_token, dim=0)

    def combine(self, rows: Tensor, num_tokens: int) -> Tensor:
        """One output per choice (N, H) -> (T, H), each token's weighted sum; zero for a token without."""
        weights = self.weights.to(torch.promote_types(rows.dtype, torch.float32))
        weighted = rows * weights.unsqueeze(-1)  # (N, H), in float32 at least
        if self.per_token is not None:  # reshape and sum: faster than by index, and in a fixed order on CUDA
            return weighted.unflatten(0, (num_tokens, self.per_token)).sum(1).to(rows.dtype)
        output = weighted.new_zeros(num_tokens, rows.shape[-1])
        return output.index_add_(0, self.tokens, weighted).to(rows.dtype)

    def beside(self, experts: range, num_tokens: int, scale: float) -> "Choices":
        """All weights times `scale`, and for every token these experts too, each with the weight `scale`."""
        if not experts:
            return self
        device, count = self.experts.device, len(experts)
        always = torch.arange(experts.start, experts.stop, device=device).repeat(num_tokens)
        tokens = torch.arange(num_tokens, device=device)
        weights = [self.weights * scale, self.weights.new_full((num_tokens * count,), scale)]
        if self.per_token is None:
            places = torch.cat([self.tokens, tokens.repeat_interleave(count)])
            return Choices(places, torch.cat([self.experts, always]), torch.cat(weights))
        k, shape = self.per_token + count, (num_tokens, self.per_token)
        both = torch.cat([self.experts.view(shape), always.view(num_tokens, count)], 1)
        joined = torch.cat([weights[0].view(shape), weights[1].view(num_tokens, count)], 1)
        return Choices(tokens.repeat_interleave(k), both.flatten(), joined.flatten(), per_token=k)

    def followed_by(self, others: "Choices", num_tokens: int) -> "Choices":
        """These, of the first `num_tokens` tokens, and `others`, all chosen, of the tokens behind them."""
        real = None
        if self.real is not None:
            real = torch.cat([self.real, torch.ones_like(others.experts, dtype=torch.bool)])
        return Choices(
            torch.cat([self.tokens, others.tokens + num_tokens]),
            torch.cat([self.experts, others.experts]),
            torch.cat([self.weights, others.weights]),
            real=real,
        )

    def load(self, num_experts: int, mask: Tensor | None = None) -> Tensor:
        """(E,) how many choices fell on each expert, in float32; `mask` (T,) is zero for padding."""
        counted = (
            torch.ones_like(self.weights) if mask is None else mask.to(self.weights)[self.tokens]
        )  # (N,)
        if self.real is not None:
            counted = counted * self.real
        return counted.new_zeros(num_experts).scatter_add(0, self.experts, counted)

    def ranks(self) -> Tensor:
        """(N,) a choice's place among those of its token, as a rule lists them: 0 for the first."""
        start = torch.searchsorted(self.tokens, self.tokens)  # (N,) where the token's choices begin
        return torch.arange(start.shape[0], device=start.device) - start


def has_fixed_shapes(tensor: Tensor) -> bool:
    """Whether shapes must not depend on values: in compiled code, and where there are none."""
    return torch.compiler.is_compiling() or tensor.is_meta


class Routing(NamedTuple):
    """What a router made of T tokens."""

    logits: Tensor  # (T, E) float32, before any balancing bias
    choices: Choices  # all that the rule chose
    room: Tensor | None = None  # (N,) False where the expert was full; None: there is no capacity
    gates: Tensor | None = None  # (T, E) of rule top-any, one for experts that pass, with a gradient
    likeness: Tensor | None = None  # () of its router's rows, a loss; both None without that rule
    sizes: tuple[float, ...] | None = None  # of the experts, by which a choice counts for the balancing loss

    def weighted(self, weights: Tensor) -> "Routing":
        """The same with other combine weights (N,)."""
        return self._replace(choices=self.choices._replace(weights=weights))

    def served(self) -> Choices:
        """The choices that are computed: those for which there was room.

        Compiled code, whose shapes must not depend on values, computes all, the others with weight zero.
        """
        if self.room is None:
            return self.choices
        if has_fixed_shapes(self.room):
            return self.choices._replace(weights=self.choices.weights * self.room)
        return self.choices.take(self.room.nonzero().squeeze(-1))


def preferences(logits: Tensor, bias: Tensor | None) -> Tensor:
    """(T, E) what experts are ranked by: the logits, or with a balancing bias (E,) probabilities plus it."""
    return logits if bias is None else logits.softmax(-1) + bias.float()


class Context(NamedTuple):
    """What a rule knows of T tokens beside their logits."""

    number: int = 1  # B sequences, all of T / B tokens
    mask: Tensor | None = None  # (T,) zero for padding; None: there is none, or none is known
    inputs: Tensor | None = None  # (T, H) the router's, if they are the tokens; None: they are tasks

    def first_half(self) -> "Context":
        """Of the first half of them."""
        return Context(self.number // 2, None if self.mask is None else self.mask.tensor_split(2)[0])


Rule = Callable[["Router", Tensor, Tensor | None, Context], Choices]
DEFAULT_RULE = "top-k"
TOP_ANY = "top-any"  # whose routers have thresholds of their own
EXPERT_CHOICE = "expert-choice"  # whose experts choose tokens
RULES: dict[str, Rule] = {}


def rule(function: Rule) -> Rule:
    """Enter a selection rule in the table: `top_k` is "top-k" in `config.mpoe`.

    A rule takes the router, logits (T, E) in float32, the balancing bias (E,) or None, and the context.
    """
    RULES[function.__name__.replace("_", "-")] = function
    return function


def find_rule(name: str) -> Rule:
    """Raises ValueError if there is no such rule."""
    if name not in RULES:
        raise ValueError(f"config.mpoe has the rule {name!r}: this file knows {', '.join(RULES)}")
    return RULES[name]


# ---------------------------------------------------------------------------------------------------
# 7. Combine weights of experts that were chosen by their logits


def weigh(
    router: "Router",
    logits: Tensor,
    ranked: Tensor,
    experts: Tensor,
    chosen: Tensor | None = None,
    inputs: Tensor | None = None,
) -> Tensor:
    """Combine weights (T, k) of up to k experts per token; those of experts that are not chosen do not count.

    Args:
        logits: (T, E) of all experts.
        ranked: (T, k) of the experts in question.
        experts: (T, k) their numbers.
        chosen: (T, k) which of them are chosen, one at least per token; None: all.
        inputs: see `Context`.
    """
    if router.combine == "raw":
        return logits.log_softmax(-1).gather(-1, experts).exp()  # (T, k)
    has_copies = router.parts < logits.shape[-1]  # of the same neurons
    if not has_copies or experts.shape[-1] == 1:
        return _straight_through_one(router, logits, experts, inputs)
    if router.parts > 1:
        weights, is_alone = _weigh_parts(ranked, experts, router.parts, chosen)
    elif chosen is None:
        return ranked.softmax(-1)
    else:
        weights = ranked.masked_fill(~chosen, -math.inf).softmax(-1)  # (T, k)
        is_alone = chosen & (chosen.sum(-1, keepdim=True) == 1)
    if not torch.is_grad_enabled():  # the weight of an expert that is alone is one as it is
        return weights
    return torch.where(is_alone, _straight_through_one(router, logits, experts, inputs), weights)


def _straight_through_one(router: "Router", logits: Tensor, experts: Tensor, inputs: Tensor | None) -> Tensor:
    """(T, k) p / p.detach() with p the experts' probabilities: ones, with the gradient of log p.

    The router has that gradient, `inputs` have none: they would be trained to raise the probabilities of
    experts that help, though a weight of one does not depend on them. Half of the parts of a Llama's FFNs
    diverged by that in a long run, see examples/results/README.md.
    """
    if not torch.is_grad_enabled():
        return torch.ones_like(experts, dtype=logits.dtype)
    if inputs is not None:
        logits = router.logits_of(inputs.detach())
    log_probability = logits.log_softmax(-1).gather(-1, experts)  # in float32 p itself may be 0
    return (log_probability - log_probability.detach()).exp()


def _weigh_parts(ranked: Tensor, experts: Tensor, parts: int, chosen: Tensor | None) -> tuple[Tensor, Tensor]:
    """(T, k) softmax over those of the chosen experts that hold the same neurons, see `Router`.

    And (T, k) whether there is no other that does.
    """
    part = experts % parts  # (T, k)
    same = part.unsqueeze(-1) == part.unsqueeze(-2)  # (T, k, k)
    if chosen is not None:  # those that are not chosen stand alone
        both = chosen.unsqueeze(-1) & chosen.unsqueeze(-2)
        same = same & (both | torch.eye(experts.shape[-1], dtype=torch.bool, device=experts.device))
    others = ranked.unsqueeze(-2).masked_fill(~same, -math.inf)
    return (ranked - others.logsumexp(-1)).exp(), same.sum(-1) == 1


# ---------------------------------------------------------------------------------------------------
# 8. Rule expert-choice: every expert takes its best tokens of a sequence


@rule
def expert_choice(router: "Router", logits: Tensor, bias: Tensor | None, context: Context) -> Choices:
    """Every expert takes the C tokens of a sequence whose probabilities of it are largest.

    Expert choice routing, arXiv 2202.09368: C = ceil(n k / E) of n tokens, padding not counted, where
    k = `router.top_k` is their capacity factor, the experts per token in the mean. With combine "raw" all is
    as in the paper: the weights are the probabilities, and a token that no expert takes gets nothing. Else
    the weights are the softmax over the experts that take a token, and one that none takes goes to its best
    one.

    Args:
        logits: (T, E).
        bias: None: the load is balanced.
    """
    assert bias is None
    chosen = taken(logits.detach().softmax(-1), router.top_k, context)  # (T, E)
    if router.combine != "raw":
        best = torch.zeros_like(chosen).scatter(-1, logits.argmax(-1, keepdim=True), True)
        chosen = chosen | (best & ~chosen.any(-1, keepdim=True))
    experts = logits.argsort(-1, descending=True)  # (T, E), the best first
    chosen, ranked = chosen.gather(-1, experts), logits.gather(-1, experts)
    weights = weigh(router, logits, ranked, experts, chosen, context.inputs)
    return Choices.of_table(experts, weights, chosen)


def taken(probabilities: Tensor, per_token: int, context: Context) -> Tensor:
    """(T, E) which tokens the experts take, of probabilities (T, E)."""
    scores = probabilities.unflatten(0, (context.number, -1))  # (B, L, E)
    length, num_experts = scores.shape[1:]
    most = min(-(-length * per_token // num_experts), length)  # C of a sequence without padding
    if context.mask is None:
        index = scores.topk(most, dim=1).indices  # (B, C, E)
        return torch.zeros_like(scores, dtype=torch.bool).scatter(1, index, True).flatten(0, 1)
    real = context.mask.bool().reshape(context.number, length, 1)  # (B, L, 1)
    index = scores.masked_fill(~real, -1).topk(most, dim=1).indices
    capacity = (real.sum(1, keepdim=True) * per_token + num_experts - 1) // num_experts  # (B, 1, 1)
    places = torch.arange(most, device=scores.device).view(1, -1, 1)
    has_room = (places < capacity).expand_as(index)  # (B, C, E)
    found = torch.zeros_like(scores, dtype=torch.bool).scatter(1, index, has_room)
    return (found & real).flatten(0, 1)


# ---------------------------------------------------------------------------------------------------
# 9. Rule top-any: every token goes to all experts that it is like enough, by learned thresholds


@rule
def top_any(router: "Router", logits: Tensor, bias: Tensor | None, context: Context) -> Choices:
    """Every expert whose score passes its threshold; the one of the largest score where none does.

    At most `router.top_k`: those that pass by the largest margins.

    DynMoE, arXiv 2405.14297: the weights are the gates, divided by their sum over the chosen experts that
    hold the same neurons.

    Args:
        logits: (T, E) cosines.
        bias: None: experts have thresholds that are learned.
    """
    assert bias is None and router.threshold_bias is not None
    margins = score_margins(logits, router.threshold_bias)  # (T, E)
    ranking = torch.where(margins > 0, margins + 2, logits)  # above all cosines: those that pass come first
    experts = ranking.topk(router.top_k, dim=-1).indices  # (T, k), the best first
    margins = margins.gather(-1, experts)
    chosen = F.pad(margins[:, 1:] > 0, (1, 0), value=True)  # (T, k) the first, whether it passes or not
    gates = torch.where(chosen, straight_through_one(margins), 0.0)
    part = experts % router.parts  # (T, k)
    none = gates.new_zeros(gates.shape[0], router.parts)
    holders = none.scatter_add(-1, part, gates)  # (T, P) of each part
    total = holders.gather(-1, part)  # (T, k)
    weights = gates / torch.where(total > 1.5, total, 1.0)
    return Choices.of_table(experts, weights, chosen)


def score_margins(cosines: Tensor, thresholds: Tensor) -> Tensor:
    """(T, E) sigmoid of the cosines (T, E) minus sigmoid of the thresholds (E,); above zero: it passes."""
    return cosines.sigmoid() - thresholds.float().sigmoid()


def straight_through_one(margins: Tensor) -> Tensor:
    """One in value, with the gradient of `margins`."""
    return margins - margins.detach() + 1 if torch.is_grad_enabled() else torch.ones_like(margins)


def passing_gates(cosines: Tensor, thresholds: Tensor) -> Tensor:
    """(T, E) the sign of relu(margin); its gradient takes the sign for an identity.

    So experts that do not pass get none.
    """
    margins = score_margins(cosines, thresholds)
    return torch.where(margins > 0, straight_through_one(margins), 0.0)


def likeness_loss(rows: Tensor) -> Tensor:
    """DynMoE's loss of a router's rows (E, H): the norm of N N^T - I, and their own mean norm.

    N are the rows with norm one. The first term makes the rows differ (diversity), the second keeps them
    short (simplicity), which changes no cosine.
    """
    directions = F.normalize(rows.float(), dim=-1)
    others = directions @ directions.mT - torch.eye(len(rows), device=rows.device)
    return others.norm() + rows.float().norm(dim=-1).mean()


# ---------------------------------------------------------------------------------------------------
# 10. Rule top-k: every token goes to the k experts with the largest logits


@rule
def top_k(router: "Router", logits: Tensor, bias: Tensor | None, context: Context) -> Choices:
    """k = `router.top_k` choices per token (Shazeer et al., arXiv 1701.06538).

    Args:
        logits: (T, E).
        bias: (E,) added to the probabilities to choose experts, never to weigh them (DeepSeek-V3, arXiv
            2412.19437, section 2.1.2).
    """
    experts = preferences(logits, bias).topk(router.top_k, dim=-1).indices  # (T, k), the best first
    ranked = logits.gather(-1, experts)  # (T, k)
    weights = weigh(router, logits, ranked, experts, inputs=context.inputs)
    return Choices.of_table(experts, weights)


# ---------------------------------------------------------------------------------------------------
# 11. Rule top-p: every token goes to as many experts as it takes to reach a probability


@rule
def top_p(router: "Router", logits: Tensor, bias: Tensor | None, context: Context) -> Choices:
    """From the most probable expert on, until they have the probability `router.threshold` together.

    XMoE, arXiv 2403.18926: one expert at least, `router.top_k` at most. Its weights are the probabilities
    (combine "raw").

    Args:
        logits: (T, E).
        bias: (E,) added to the probabilities to rank experts, see `top_k`.
    """
    probabilities = logits.softmax(-1)
    experts = preferences(logits, bias).topk(router.top_k, dim=-1).indices  # (T, k), the most probable first
    reached = probabilities.gather(-1, experts).cumsum(-1)  # (T, k)
    chosen = F.pad(reached[:, :-1], (1, 0)) < router.threshold  # (T, k) by those before
    ranked = logits.gather(-1, experts)
    weights = weigh(router, logits, ranked, experts, chosen, context.inputs)
    return Choices.of_table(experts, weights, chosen)


# ---------------------------------------------------------------------------------------------------
# 12. Routers: which experts a token goes to, and the losses that routers learn from


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


# ---------------------------------------------------------------------------------------------------
# 13. Passes: how the routers' losses join the graph of a forward pass, and its outputs
#
# The losses join at the combine weights (`_AddGradient`), not at the model's loss: that may be computed
# outside of the model, and gradient checkpointing throws the graph of a layer away and makes it again.
# Compiled code, which keeps no such Python state, adds them to the model's loss.
#
# A pass that shows its routers (`output_router_logits`) keeps the contract of transformers' own mixtures
# instead: the load-balancing loss is `aux_loss` of the outputs, and is in their loss if they have one. A loss
# that is computed outside of the model adds `coef * outputs.aux_loss`, and it is counted once.
#
# The losses that join at the combine weights are scaled as the model's own loss is. What scales a loss that
# is computed outside of the model is known only if `add_router_losses` was given that loss.


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


# ---------------------------------------------------------------------------------------------------
# 14. Mixing: what several experts make of tokens, given the choices; schedules and what they cost


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


# ---------------------------------------------------------------------------------------------------
# 15. The mixture: the FFN of several experts with a router of its own


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


# ---------------------------------------------------------------------------------------------------
# 16. Experts: what takes the place of the experts of a stock mixture, whose routers stay
#
# The stock block of a mixture routes and calls `self.experts(hidden_states, top_k_index, top_k_weights)`, or
# one of a list after the other: `self.experts[3](rows)`. That module alone is replaced. Ours stands in the
# block under the name `MIXTURE`, because serving engines replace every module named `experts` by their own;
# the block finds it through a property of its class.


# The name in the stock block of what replaces its `experts`.
MIXTURE = "mixture"


class Gating(nn.Module):
    """The stock experts' own way from gate and up to the hidden neurons, such as gpt-oss' clamped one.

    It has the attributes of the stock module, without its parameters.
    """

    def __init__(self, stock: Any):
        super().__init__()
        own = vars(nn.Module()).keys()
        vars(self).update({name: value for name, value in vars(stock).items() if name not in own})
        self._modules.update(stock._modules)
        self.function: Callable[..., Tensor] = type(stock)._apply_gate

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        """(N, inner) each -> (N, inner)."""
        if self.is_concatenated:
            return self.function(self, torch.cat([gate, up], dim=-1))
        return self.function(self, torch.stack([gate, up], dim=-1).flatten(-2))


class Activation(nn.Module):
    """A stock activation that is a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Experts(Mixing):
    """The experts of a stock mixture, in cores: called as the stock module is.

    Attributes:
        gating: the stock module's own, where it has one; None: act(gate) * up.
    """

    gating: Gating | None

    def __init__(
        self, form: dict, num_experts: int, top_k: int, stock: Any = None, activation: str | None = None
    ):
        super().__init__(form, num_experts, top_k)
        self.gating = None
        if stock is not None:
            act = find_activation(stock, activation)
            self.act = act if isinstance(act, nn.Module) else Activation(act)
            if self.gate is not None and activation is None and has_own_gating(stock):
                self.gating = Gating(stock)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(T, H), the experts (T, k) and the combine weights (T, k) of every token -> (T, H)."""
        num_tokens, per_token = top_k_index.shape
        tokens = torch.arange(num_tokens, device=top_k_index.device).repeat_interleave(per_token)
        choices = Choices(tokens, top_k_index.flatten(), top_k_weights.flatten(), per_token)
        return self._mix(hidden_states.reshape(num_tokens, -1), choices).reshape(hidden_states.shape)

    def _activate(self, up: Tensor, gate: Tensor | None) -> Tensor:
        if self.gating is None or gate is None:
            return super()._activate(up, gate)
        return self.gating(gate, up)


class ExpertList(Experts):
    """The same where the stock block takes its experts from a list, and calls each with its rows."""

    def __len__(self) -> int:
        return self.num_experts

    def __iter__(self) -> Iterator[Callable[..., Tensor]]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, expert: Any) -> Callable[..., Tensor]:
        return functools.partial(self, expert=range(len(self))[operator.index(expert)])

    def forward(self, hidden_states: Tensor, expert: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]  (the stock block's call)
        """(..., H) -> (..., H), all rows by one expert."""
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])  # (T, H)
        schedule = self.choose_schedule(rows.shape[0], rows.shape[0])
        inputs = self._prepare(rows, self._does_once(schedule))
        return self._experts(inputs, Picks(expert), schedule).reshape(hidden_states.shape)


def find_activation(stock: Any, name: str | None = None) -> Callable[[Tensor], Tensor]:
    """The activation of stock experts.

    Args:
        name: a path below the module, or a name of transformers' table; None: `act_fn`, where there is one.
    """
    if name is None:
        return getattr(stock, "act_fn", None) or nn.Identity()
    try:
        return operator.attrgetter(name)(stock)
    except AttributeError:
        return ACT2FN[name]


def has_own_gating(stock: Any) -> bool:
    """Whether stock experts compute something else than act(gate) * up of gate and up."""
    return type(stock)._apply_gate.__name__ != "_default_apply_gate"


class HoldsExperts(nn.Module):
    """What a stock block becomes a subclass of, when its experts are replaced."""

    @property
    def experts(self) -> nn.Module:
        """What the stock code calls."""
        return self._modules[MIXTURE]  # pyright: ignore[reportReturnType]  (always a module)


def replace_experts(block: nn.Module, form: dict, settings: dict, namespace: dict) -> None:
    """Put `Experts` of this form in the place of a stock block's; nothing to do if it has them.

    Args:
        settings: `config.mpoe`.
        namespace: of the module that keeps the block's class, so that the block can be pickled.
    """
    if isinstance(block, HoldsExperts):
        return
    family = settings["family"]
    name, kind = family["experts"], ExpertList if family.get("one_by_one") else Experts
    stock = getattr(block, name)
    made = kind(form, settings["num_experts"], settings["top_k"], stock, family.get("activation"))
    put_experts(block, made, name, namespace)


def put_experts(block: nn.Module, made: Experts, name: str, namespace: dict) -> None:
    """Put these in the place of the stock block's, which it calls by that name. See `replace_experts`."""
    delattr(block, name)
    setattr(block, MIXTURE, made)
    block.__class__ = block_class(type(block), namespace, name)


def block_class(stock: type[nn.Module], namespace: dict, experts: str = "experts") -> type[nn.Module]:
    """The subclass of a stock block's class. It has the stock name, by which transformers finds blocks.

    Args:
        experts: what the stock code calls its experts.
    """
    name = CLASS_PREFIX + stock.__name__
    if name not in namespace:
        body = {"__module__": namespace["__name__"], "__qualname__": name, experts: HoldsExperts.experts}
        namespace[name] = type(stock.__name__, (HoldsExperts, stock), body)
    return namespace[name]


# ---------------------------------------------------------------------------------------------------
# 17. Self-contrast: generation against what weakly chosen experts say (SCMoE, arXiv 2405.14507)
#
# With z_strong, the logits of the model, and z_weak, those of the same model when every token goes to one
# weak expert in every layer, the next token is drawn by
#
#     z = (1 + b) z_strong - b z_weak    where z_strong >= max z_strong + log(alpha), else -inf
#
# Both passes are one batch: the sequences, and behind them the same ones once more, whose tokens are routed
# weakly. So both keep their keys and values in one cache, and weights are read once for both.
#
# Where the source was a mixture, its own routers stay. Nearly all of them choose by `torch.topk` of one score
# per expert, which then gives a token of the weak pass its weak expert for each of its k choices. How much
# these weigh is up to the router: as much as other k choices together, where it normalises weights.


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


# ---------------------------------------------------------------------------------------------------
# 18. The model: swapping FFNs in a stock model, its forward pass, and classes made on demand


# What `MixtureMixin` is mixed into.
_Stock = PreTrainedModel if TYPE_CHECKING else object
# What routers that choose by task are told, see `MixtureMixin.route_by`.
_Task = str | int | Sequence[str | int] | Tensor


def _take(layer: nn.Module, path: str) -> Any:
    """The attribute at a dotted path."""
    return functools.reduce(getattr, path.split("."), layer)


def _put(layer: nn.Module, path: str, value: Any) -> None:
    """Set the attribute at a dotted path."""
    parent, _, name = path.rpartition(".")
    setattr(layer.get_submodule(parent), name, value)


def _take_dropout(layer: nn.Module, path: str | None, slot: str) -> nn.Module:
    """The stock dropout as a module.

    A rate that stands outside the slot is set to zero: the stock layer would apply it a second time.
    """
    if path is None or (dropout := _take(layer, path)) is None:
        return nn.Identity()
    if isinstance(dropout, nn.Module):
        return dropout
    if not path.startswith(slot + "."):
        _put(layer, path, 0.0)
    return nn.Dropout(dropout)


def _initial_scales(
    modules: Sequence[nn.Module], initialise: Callable[[nn.Module], None]
) -> dict[str, float]:
    """{projection: standard deviation of a dense FFN's matrix in a new model}, also on the meta device.

    Empty if the stock code draws them by other functions than those of `transformers.initialization`.

    Args:
        modules: whose matrices are those of the FFN, `down` last.
        initialise: the stock model's `_init_weights`.
    """
    drawn: dict[int, float] = {}

    def note(tensor: Tensor, mean: float = 0.0, std: float = 1.0, *args: Any, **kwargs: Any) -> Tensor:
        drawn[id(tensor)] = std
        return tensor

    names = ("normal_", "trunc_normal_")
    stock = {name: getattr(init, name) for name in names}
    try:
        for name in names:
            setattr(init, name, note)
        for module in modules:
            for part in reversed(list(module.modules())):  # as `initialize_weights` does, a parent last
                initialise(part)
    finally:
        for name, function in stock.items():
            setattr(init, name, function)
    matrices = [p for module in modules for p in module.parameters() if p.ndim == 2]
    scales = [drawn[id(matrix)] for matrix in matrices if id(matrix) in drawn]
    if len(scales) < max(len(matrices), 2):
        return {}
    return {"gate": scales[0], "up": scales[-2], "down": scales[-1]}


def swap_ffn(
    layer: nn.Module, form: dict, block: dict, initialise: Callable[[nn.Module], None] | None = None
) -> None:
    """Replace the dense FFN of a stock layer by a mixture of this form; nothing to do if it has one.

    Args:
        form: one of `config.mpoe["forms"]`.
        block: `config.mpoe`.
        initialise: the stock model's `_init_weights`, from which the mixture takes its scales.
    """
    family = block["family"]
    if isinstance(_take(layer, family["slot"]), FeedForward):
        return
    dense = [_take(layer, path) for path in (family["slot"], *family["absorbed"])]
    ffn = FeedForward.from_block(form, block)
    ffn.act = _take(layer, family["activation"])
    ffn.inner_dropout = _take_dropout(layer, family["inner_dropout"], family["slot"])
    ffn.outer_dropout = _take_dropout(layer, family["outer_dropout"], family["slot"])
    ffn.adds_residual = family["adds_residual"]
    if initialise is not None:
        for name, scale in _initial_scales(dense, initialise).items():
            if (part := getattr(ffn, name)) is not None:
                part.initial_scale = scale
    _put(layer, family["slot"], ffn)
    for path in family["absorbed"]:
        _put(layer, path, nn.Identity())


def _keeps_routers(config: PretrainedConfig) -> bool:
    """Whether the source was a mixture: its blocks and their routers stay, only experts are replaced."""
    return bool(config.mpoe) and bool(config.mpoe["family"].get("experts"))


def _innermost_model(model: nn.Module, path: str) -> PreTrainedModel:
    """The innermost of the models that hold the module at this path: it initialises the module."""
    names = path.split(".")
    inside = [model.get_submodule(".".join(names[:n])) for n in range(len(names) + 1)]
    return [module for module in inside if isinstance(module, PreTrainedModel)][-1]


def _is_in(part: str, name: str) -> bool:
    """Whether a name of transformers' lists, a part of a dotted name, is in a module's or tensor's name."""
    return re.search(rf"(?:^|\.){part}(?:\.|$)", name) is not None


def _has_submodule(model: nn.Module, path: str) -> bool:
    found: nn.Module | None = model
    for name in path.split("."):
        found = getattr(found, name, None)
        if found is None:
            return False
    return True


def _check_tasks(task: Tensor | None, arguments: dict) -> None:
    """Raises ValueError if there are tasks for another number of sequences than the pass has."""
    if task is None:
        return
    # The first that is given: the rows of `pixel_values` beside text are pieces of images.
    names = ("input_ids", "inputs_embeds", "decoder_input_ids", "pixel_values")
    tensor = next((arguments[name] for name in names if arguments.get(name) is not None), None)
    if tensor is not None and tensor.shape[0] % task.shape[0]:  # beams are sequences of one task
        raise ValueError(
            f"{task.shape[0]} tasks were given for {tensor.shape[0]} sequences; expected one, or one each"
        )


# Coefficients of the losses of all routers, and of those that have thresholds, as `RouterPass` takes them.
LOSS_COEFS = ("router_aux_loss_coef", "router_z_loss_coef")
THRESHOLD_LOSS_COEFS = ("router_likeness_loss_coef", "router_efficiency_loss_coef")
# What `_recording` adds to the parameters of a stock forward.
_OUR_ARGUMENTS = ("task_ids", "output_router_logits")


def _recording(stock: Callable[..., Any]) -> Callable[..., Any]:
    """A forward with the stock parameters and `_OUR_ARGUMENTS`. It hands over what differs from the defaults.

    It is written out as code. Whoever compiles it, vLLM for one, binds arguments by `inspect.signature` and
    expects the code to have the same variables, so that `*args` behind a made up signature will not do.
    """
    parameters = list(inspect.signature(stock).parameters.values())[1:]
    rest = next((p.name for p in parameters if p.kind is inspect.Parameter.VAR_KEYWORD), None)
    more = next((p.name for p in parameters if p.kind is inspect.Parameter.VAR_POSITIONAL), None)
    positional = [p for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    keyword_only = [p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
    keyword_only += [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for name in _OUR_ARGUMENTS
        if all(p.name != name for p in parameters)
    ]
    written = [_written(p) for p in positional] + [f"*{more or ''}"] + [_written(p) for p in keyword_only]
    written += [f"**{rest}"] if rest else []
    named = [*positional, *keyword_only]
    given = ", ".join(f"{p.name}={p.name}" for p in named)
    called = f"functools.partial(stock, self, *{more})" if more else "functools.partial(stock, self)"
    body = f"return self._run_recording({called}, defaults, dict({given}), {rest or '{}'}, added)"
    defaults = {p.name: p.default for p in named}
    # A stock mixture takes `output_router_logits`, or hands it on.
    added = {name for name in _OUR_ARGUMENTS if all(p.name != name for p in parameters)}
    added -= {"output_router_logits"} if rest else set()
    namespace: dict[str, Any] = {"stock": stock, "defaults": defaults, "added": added, "functools": functools}
    exec(f"def forward(self, {', '.join(written)}):\n    {body}\n", namespace)
    made: Any = functools.update_wrapper(namespace["forward"], stock)
    del vars(made)["__wrapped__"]  # its signature is its own
    made.__defaults__ = tuple(p.default for p in positional if p.default is not p.empty) or None
    made.__kwdefaults__ = {p.name: p.default for p in keyword_only if p.default is not p.empty}
    return made


def _run_noting(
    stock: Callable[..., Any],
    arguments: dict,
    mixtures: Sequence[tuple[str, FeedForward]],
    running: RouterPass,
) -> Any:
    """A stock forward pass in which the mixtures note for this `RouterPass` how they route."""
    try:
        for _, ffn in mixtures:
            ffn.router_pass = running
        return stock(**arguments)
    finally:
        for _, ffn in mixtures:
            ffn.router_pass = None


def _written(parameter: inspect.Parameter) -> str:
    """As code, with a default to be replaced if there is one."""
    return parameter.name if parameter.default is parameter.empty else f"{parameter.name}=None"


def _constructing(stock: Callable[..., None]) -> Callable[..., None]:
    """A constructor with the stock signature, which tells what a model may be made with."""

    @functools.wraps(stock)
    def constructing(self: "MixtureMixin", *args: Any, **kwargs: Any) -> None:
        MixtureMixin.__init__(self, *args, **kwargs)

    return constructing


def _generating(generate: Callable[..., Any]) -> Callable[..., Any]:
    """A stock `generate` that takes `task_ids`, for encoders too, and `self_contrast`, see `contrasting`."""

    @functools.wraps(generate)
    def generating(
        self: "MixtureMixin",
        *args: Any,
        task_ids: _Task | None = None,
        self_contrast: float | None = None,
        **kwargs: Any,
    ) -> Any:
        self._unpack()  # an encoder runs first, on its own
        before = [ffn.task for _, ffn in self.mixtures()]
        try:
            if task_ids is not None:
                self.route_by(task_ids)
            if not (strength := strength_of(self, self_contrast, args, kwargs)):
                return generate(self, *args, **kwargs)
            with contrasting(self, strength, kwargs):
                return strong_half(generate(self, *args, **kwargs))
        finally:
            for (_, ffn), task in zip(self.mixtures(), before, strict=True):
                ffn.task = task

    return generating


class MixtureMixin(_Stock):
    """Turns a stock model class into one whose FFNs are mixtures, as `config.mpoe` says."""

    _base_class: type[PreTrainedModel]  # the stock class
    # The last pass in training, and the versions of the mixtures' parameters then.
    _last_pass: RouterPass | None = None
    _versions: Sequence[int] = ()
    _contrasts = False  # whether generation with `self_contrast` is running

    def __init__(self, config: PretrainedConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        block = config.mpoe
        if not block or block.get("format") != FORMAT_VERSION:
            found = block.get("format") if block else "no `mpoe` block"
            raise ValueError(
                f"{type(self).__name__} reads format {FORMAT_VERSION} of config.mpoe, found {found}; "
                "load the checkpoint with the modeling_mpoe.py that lies beside it"
            )
        present = self._layer_paths()
        if not present:
            raise ValueError(f"{type(self).__name__} has none of the layers {list(block['ffns'])}")
        self._replace_ffns(present)
        self._note_paths()
        self._configure_mixtures(len(present))
        if self.loss_type is None and type(self).__name__.endswith("LMHeadModel"):
            self.loss_type = "ForCausalLM"  # what transformers falls back to, with a warning per call
        # A backbone's one stack (OPT's decoder) stays as its constructor makes it: vLLM compiles its class.
        if self.base_model is not self or config.is_encoder_decoder:
            for module in self.modules():
                if module is not self and isinstance(module, PreTrainedModel):
                    self._adopt(module)
        self._register_renames()
        self.post_init()

    def _replace_ffns(self, present: dict[str, int]) -> None:
        """Put mixtures in the place of FFNs, or our experts in that of a mixture's.

        Args:
            present: path of a layer of this model -> index in the block's `forms`.
        """
        base, block = self.base_model, self.config.mpoe
        for path, form in present.items():
            if _keeps_routers(self.config):
                stock = base.get_submodule(".".join(filter(None, [path, block["family"]["slot"]])))
                replace_experts(stock, block["forms"][form], block, globals())
            else:
                initialise = _innermost_model(base, path)._init_weights
                swap_ffn(base.get_submodule(path), block["forms"][form], block, initialise)

    def _configure_mixtures(self, number: int) -> None:
        """Let all mixtures, of which there are so many, take the config's options."""
        config = self.config
        self._rounds = getattr(config, "quantization_config", None) is not None
        for path, ffn in self._mixings():
            for chain in ffn.modules() if self._rounds else ():
                if isinstance(chain, Chain):
                    chain.use_linears()
            if not isinstance(ffn, FeedForward):
                ffn.configure_schedule(config, number)
                continue
            ffn.configure(config, number)
            ffn.in_decoder = "decoder" in (self._stack, path.partition(".")[0])
            if ffn.rule == EXPERT_CHOICE and (ffn.in_decoder or getattr(config, "is_decoder", False)):
                raise ValueError(
                    f"config.mpoe has the rule 'expert-choice' for {path}, a layer of a decoder, whose "
                    "experts would choose a token by later ones; convert with another selection rule"
                )

    def _register_renames(self) -> None:
        """Take over the key renames of a mixture's type, for its dense FFNs; or none, for experts of ours.

        One class serves both, so that its renames are those for the model that was made last.
        """
        stock_type = self.config.model_type.removeprefix(MODEL_TYPE_PREFIX)
        names = {self._base_class.__name__: type(self).__name__, stock_type: self.config.model_type}
        for stock, name in names.items():
            renames = get_checkpoint_conversion_mapping(stock)
            if renames is not None and _renames_experts(renames):
                ours = [] if _keeps_routers(self.config) else renames
                register_checkpoint_conversion_mapping(name, ours, overwrite=True)
        name, stock_type = type(self).__name__, self.config.model_type
        before = get_checkpoint_conversion_mapping(name)
        renames = [rename for rename in before or [] if not isinstance(rename, LoadLinears)]
        if self._rounds:
            before = renames if before is not None else get_checkpoint_conversion_mapping(stock_type) or []
            register_checkpoint_conversion_mapping(
                name, [*before, *LoadLinears.of_model(self.base_model)], overwrite=True
            )
        elif before is not None:
            register_checkpoint_conversion_mapping(name, renames, overwrite=True)

    def _layer_paths(self) -> dict[str, int]:
        """{path of a layer with a mixture below the base model: index of its form}, of those that are here.

        A model may hold only one of the stacks, such as the encoder of T5, or be one: then it notes that, and
        paths lack the name of the stack.
        """
        ffns, base = self.config.mpoe["ffns"], self.base_model
        self._stack = None  # "encoder" or "decoder", of a model that is one
        if not any(_has_submodule(base, path) for path in ffns):
            # T5's two stacks have one class.
            decodes = "Decoder" in type(self).__name__ or getattr(self.config, "is_decoder", False)
            self._stack = "decoder" if decodes else "encoder"
            start = self._stack + "."
            ffns = {path.removeprefix(start): form for path, form in ffns.items() if path.startswith(start)}
        return {path: form for path, form in ffns.items() if _has_submodule(base, path)}

    def _note_paths(self) -> None:
        """Note the paths of the mixtures below the base model."""
        parts = [self.config.mpoe["family"]["slot"], MIXTURE if _keeps_routers(self.config) else ""]
        self.mixture_paths = [".".join(filter(None, [path, *parts])) for path in self._layer_paths()]

    def _adopt(self, module: PreTrainedModel) -> None:
        """Let a stock model inside this one, the backbone of a head or a stack, be one of ours.

        It is complete by itself then: its forward pass has the routers' losses, and it saves as what it is.
        """
        if isinstance(module, MixtureMixin) or getattr(module.config, "mpoe", None) is None:
            return
        if not any(isinstance(child, Mixing) for child in module.modules()):
            return
        kept = next(cls.__module__ for cls in type(self).__mro__ if MixtureMixin in cls.__bases__)
        adopted: Any = subclass(type(module), kept)
        # Transformers registers a class when an object of it is made: what `output_hidden_states` captures.
        PreTrainedModel.__init__(adopted.__new__(adopted), module.config)
        if type(self)._auto_class is not None:
            adopted._auto_class = "AutoModel"  # saved with its code, as this model is
        module.__class__ = adopted
        mixin: Any = module
        mixin._note_paths()
        mixin._prune_plans()

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """As of the stock class; the config that a stack shares with its model is not changed.

        Cores that `--bits` rounded are packed for it, if a forward pass has made whole matrices of them.
        """
        if self._pack():
            try:
                return self.save_pretrained(*args, **kwargs)
            finally:
                self._unpack()
        if self._stack is None:
            return super().save_pretrained(*args, **kwargs)
        config, self.config = self.config, copy.deepcopy(self.config)
        self.config.auto_map = {k: v for k, v in (config.auto_map or {}).items() if k == "AutoConfig"}
        try:
            return super().save_pretrained(*args, **kwargs)
        finally:
            self.config = config

    def _pack(self) -> bool:
        """Let compressed-tensors pack what it has unpacked, if there is anything.

        Scales are kept, so that no number changes.
        """
        compressor = getattr(getattr(self, "hf_quantizer", None), "compressor", None)
        unpacked = any(
            hasattr(module, "weight") and hasattr(module, "weight_scale") for module in self.modules()
        )
        if compressor is None or not unpacked:
            return False
        compressor.compress_model(self)
        return True

    def _unpack(self) -> None:
        """Let compressed-tensors make matrices of what is packed, as in the model's forward pass."""
        compressor = getattr(getattr(self, "hf_quantizer", None), "compressor", None)
        if compressor is not None and any(hasattr(module, "weight_packed") for module in self.modules()):
            compressor.decompress_model(self)

    def mixtures(self) -> list[tuple[str, FeedForward]]:
        """The mixtures and their paths below the base model; a layer used several times is listed once.

        None where the source was a mixture: its blocks are the stock ones, with our `Experts` in them.
        Where PEFT trains a copy of the whole FFN (`modules_to_save`), original and copies have one path.
        """
        return [(path, ffn) for path, ffn in self._mixings() if isinstance(ffn, FeedForward)]

    def _mixings(self) -> list[tuple[str, Mixing]]:
        found = [(path, self.base_model.get_submodule(path)) for path in self.mixture_paths]
        return [(path, ffn) for path, module in found for ffn in module.modules() if isinstance(ffn, Mixing)]

    def route_by(self, task: _Task | None) -> None:
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

    def _task_numbers(self, task: _Task) -> Tensor:
        """(B,) numbers or (B, H) embeddings of tasks."""
        known = self.config.router_tasks
        if known is None:
            raise ValueError(
                "the routers of this model choose by token; load it with router_tasks=[...], names of tasks, "
                "and train it"
            )
        if isinstance(task, Tensor) and task.is_floating_point():
            return task.reshape(-1, task.shape[-1])
        if isinstance(task, Tensor) and torch.compiler.is_compiling():  # its values are not known
            return task.reshape(-1)
        tasks = task.reshape(-1).tolist() if isinstance(task, Tensor) else task
        tasks = [tasks] if isinstance(tasks, (str, int)) else list(tasks)
        if not tasks:
            raise ValueError(f"no task was given; this model knows {list(known)}")
        numbers = {name: i for i, name in enumerate(known)} | {i: i for i in range(len(known))}
        if strange := [t for t in tasks if type(t) not in (str, int) or t not in numbers]:
            raise ValueError(f"no such task: {strange}; this model knows {list(known)}")
        return task.reshape(-1) if isinstance(task, Tensor) else torch.tensor([numbers[t] for t in tasks])

    def _run_recording(
        self, stock: Callable[..., Any], defaults: dict, arguments: dict, more: dict, added: set[str]
    ) -> Any:
        """A forward pass whose outputs carry the router losses.

        Args:
            stock: the forward of the stock class, bound to this model.
            defaults: of `arguments`.
            arguments: by name, those of `_OUR_ARGUMENTS` among them.
            more: other keyword arguments.
            added: those of `_OUR_ARGUMENTS` that the stock forward does not take.
        """
        config = self.config
        given = {name: value for name, value in arguments.items() if value is not defaults[name]} | more
        if _keeps_routers(config):  # and their losses
            return stock(**{name: value for name, value in given.items() if name not in added})
        task, show = (given.pop(name, None) for name in _OUR_ARGUMENTS)
        returns_dict = given.get("return_dict")
        returns_dict = config.return_dict if returns_dict is None else returns_dict
        if show and not returns_dict:
            raise ValueError(
                "output_router_logits is set and return_dict is not: a tuple has no place for `aux_loss` and "
                "`router_logits`; expected return_dict=True"
            )
        show = config.output_router_logits if show is None else show
        in_sequences = config.mpoe.get("rule") == EXPERT_CHOICE  # and need their masks
        if not (self.training or show or config.router_tasks is not None or task is not None or in_sequences):
            return stock(**given)
        mixtures = self.mixtures()
        if any(ffn.router_pass is not None for _, ffn in mixtures):
            return stock(**given)  # part of a pass of the model around this one
        task = mixtures[0][1].task if task is None else self._task_numbers(task)
        _check_tasks(task, given)
        learns = self.training and torch.is_grad_enabled()
        coefs = self._loss_coefs(mixtures, learns)
        rate = config.router_bias_update_rate if learns else 0.0
        needed = show or rate or any(coefs) or (learns and config.router_capacity_factor is not None)
        needed = needed or in_sequences or task is not None or (learns and config.router_tasks is not None)
        # Checkpoints may repeat calls in training: each mixture notes which pass they belong to.
        if not (needed or (self.training and not torch.compiler.is_compiling())):
            return stock(**given)
        if rate:
            self._follow_step()
        shows = bool(show and returns_dict)
        mask_of = functools.partial(self.token_mask, arguments=given)
        aux, z, *of_thresholds = coefs
        running = RouterPass(learns, shows, aux, z, mask_of, *of_thresholds)
        running.share = self._share_of_step(given)
        running.task = task
        outputs = _run_noting(stock, given, mixtures, running)
        if rate:
            for call in running.calls:
                call.ffn.note_load(call.routing, call.mask)
        if rate or (learns and not torch.compiler.is_compiling()):
            self._last_pass = running
        if any(coefs):
            outputs = add_losses(outputs, running, given)
        if shows:
            outputs = show_routers(outputs, running)
        running.calls, running.mask_of = [], None
        return outputs

    def _loss_coefs(self, mixtures: Sequence[tuple[str, FeedForward]], learns: bool) -> list[float]:
        """The coefficients of the router losses in this pass, in the order of `RouterPass`."""
        rules = {ffn.rule for _, ffn in mixtures}
        names = (*LOSS_COEFS, *(THRESHOLD_LOSS_COEFS if TOP_ANY in rules else ()))
        coefs = [getattr(self.config, name) if learns else 0.0 for name in names]
        if EXPERT_CHOICE in rules:  # whose load is balanced
            coefs[0] = 0.0
        return coefs

    def _follow_step(self) -> None:
        """Move the balancing biases once per optimizer's step, at the first pass after it."""
        last, before = self._last_pass, self._versions
        parameters = [p for _, ffn in self.mixtures() for p in ffn.parameters() if p.requires_grad]
        self._versions = [p._version for p in parameters]
        if last is None or not last.went_back:
            return  # the backward pass is still to come, and repeats checkpointed calls with the same bias
        if self._versions != before or all(p.grad is None for p in parameters):
            self.update_router_bias()

    def update_router_bias(self) -> None:
        """Move the balancing biases now, by the load since their last move.

        The first pass after an optimizer's step calls it. A training loop that calls it right after the step
        writes checkpoints whose biases are up to date.
        """
        rate = self.config.router_bias_update_rate
        for _, ffn in self.mixtures():
            if rate:
                ffn.add_balance_bias()
                self.config.router_balance_bias = True
            ffn.update_bias(rate)

    def add_router_losses(self, loss: Tensor, share: float | Tensor = 1.0) -> Tensor:
        """A scalar: a loss that was made of the last pass's outputs in training, plus the routers' losses.

        The model's own loss has them. Any other optimises them too, but only so are they scaled as it is, by
        GradScaler or over accumulated passes. `aux_loss` of outputs that show it is not among them. Not for
        compiled code, which does not know what scales such a loss.

        Args:
            share: the pass's share of an optimizer's step, if the loss is only its part of a step's mean.

        Raises:
            ValueError: there was no pass in training.
        """
        if self._last_pass is None:
            raise ValueError("there was no forward pass in training whose routers' losses could be added")
        return self._last_pass.add_to(loss, share)

    def _share_of_step(self, arguments: dict) -> float | Tensor:
        """This pass's share of an optimizer's step: those of Trainer's accumulated passes add up to one."""
        labels, num_items = arguments.get("labels"), arguments.get("num_items_in_batch")
        if labels is None or num_items is None or not getattr(self, "accepts_loss_kwargs", True):
            return 1.0
        predicts_next = self.loss_type in ("ForCausalLM", "ForConditionalGeneration")
        shifted = predicts_next and not self.config.is_encoder_decoder
        return (labels[..., int(shifted) :] != -100).sum() / num_items

    def _validate_generation_mode(self, generation_mode: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        if self._contrasts:
            check_mode(generation_mode.value, config)
        super()._validate_generation_mode(generation_mode, config, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]  (of GenerationMixin)

    def adjust_generation_fn(self, *args: Any, **kwargs: Any) -> None:
        """As of the stock class. `generate` stays a method where `custom_generate/` only calls it."""
        super().adjust_generation_fn(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]  (of GenerationMixin)
        loaded = getattr(vars(self).get("generate"), "func", None)
        if getattr(loaded, "calls_method", False):
            del self.generate

    def token_mask(self, ffn: FeedForward, num_tokens: int, index: int, *, arguments: dict) -> Tensor | None:
        """(T,) which of the tokens of a mixture's call are no padding; None if the arguments do not tell.

        Args:
            index: number of the mixture's call in the pass: BERT may feed its FFNs chunk by chunk.
            arguments: of the model's forward pass, by name.
        """
        mask = arguments.get("attention_mask")
        if self.config.is_encoder_decoder and ffn.in_decoder and self._stack is None:
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

    def post_init(self) -> None:
        super().post_init()
        if "mixture_paths" in vars(self):  # the stock constructor comes here with the dense FFNs
            self._prune_plans()

    def _prune_plans(self) -> None:
        """Take names that match nothing, such as those of dense FFNs, out of the stock class's plans.

        Plans of parallelism have "*" for the number of a layer; what stays in float32 is part of a name.
        """
        names = [name for name, _ in self.named_modules()] + list(self.state_dict())
        patterns = {re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names}
        for attribute in ("_tp_plan", "_ep_plan", "_pp_plan", "_fsdp_plan"):
            plan = getattr(self, attribute, None) or {}
            setattr(self, attribute, {name: way for name, way in plan.items() if name in patterns})
        for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
            kept = set(getattr(self, attribute) or ())
            if _keeps_routers(self.config):  # in the dtype of the stock ones
                kept -= {"router"} - set(getattr(self._base_class, attribute, None) or ())
            setattr(self, attribute, {part for part in kept if any(_is_in(part, name) for name in names)})

    @classmethod
    def is_custom_code(cls) -> bool:
        """Whether the stock class is.

        In custom code transformers leaves out the initialisation of modules that have no parameter of their
        own, which is where GPT-2 scales its residual projections and T5 draws its attention.
        """
        return cls._base_class.is_custom_code()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """Whether the stock class can; layers that were not converted compute as it says."""
        return cls._base_class._can_set_experts_implementation()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Part):
            module.reset_parameters(
                module.initial_scale or getattr(self.config, "initializer_range", None) or 0.02
            )
        elif isinstance(module, FeedForward) and module.balance_bias is not None:
            init.zeros_(module.balance_bias)

    @torch.no_grad()
    def initialize_weights(self) -> None:
        for module in self.modules():
            # A stock model inside, such as LLaVA's text tower, would take them for initialised.
            if isinstance(module, (Part, FeedForward)):
                self._initialize_weights(module)
        super().initialize_weights()

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        is_ours = isinstance(module, (Part, FeedForward))
        super()._initialize_weights(module, is_custom_code and not is_ours)


# Numbers that trainers and servers read of a mixture's config, from `config.mpoe`.
_NUMBERS: dict[str, Callable[[Any], int]] = {
    "num_experts": lambda block: block["num_experts"],
    "num_experts_per_tok": lambda block: block["top_k"],
    "moe_intermediate_size": lambda block: inner_size_of(block["forms"][0]),
}


def _number(name: str) -> property:
    """A number of the block as an attribute of the config; there is none without a block."""

    def read(config: Any) -> int:
        if config.mpoe is None:
            raise AttributeError(f"{name!r}: this config has no `mpoe` block")
        return _NUMBERS[name](config.mpoe)

    return property(read, _ignore)


def _ignore(config: PretrainedConfig, value: object) -> None:
    """What the config.json of a dense model says of experts does not count."""


def _config_class(base: type, name: str, module: str) -> type:
    """The stock config class with `mpoe` and our options.

    It also has `_NUMBERS`, except those that the stock class has itself.
    """
    # What a stock mixture has of the same name has its own default.
    options = {"mpoe": None} | {name: value for name, value in OPTIONS.items() if not hasattr(base, name)}
    body = {
        "model_type": MODEL_TYPE_PREFIX + base.model_type,
        **options,
        "__annotations__": {"mpoe": dict | None}
        | {option.name: option.type for option in CONFIG_OPTIONS if option.name in options},
        "__module__": module,
    }
    body |= {name: _number(name) for name in _NUMBERS if not hasattr(base, name)}
    if module != __name__:  # custom code may have a constructor, which a generated one would bypass

        def __init__(self: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
            ours = {option: kwargs.pop(option, default) for option, default in options.items()}
            base.__init__(self, *args, **kwargs)
            for option, value in ours.items():
                setattr(self, option, value)

        body["__init__"] = __init__
    # Key renames of a whole model type (LLaVA's text tower and head) are looked up by that type.
    renames = get_checkpoint_conversion_mapping(base.model_type) if module == __name__ else None
    if renames is not None and not _renames_experts(renames):
        register_checkpoint_conversion_mapping(body["model_type"], renames, overwrite=True)
    return type(name, (base,), body)


# Their loss counts `num_items_in_batch` for single labels, not for several labels or in a regression.
_OF_WHOLE_SEQUENCES = re.compile("For(Sequence|Image|Video|Audio)Classification")


def counts_items(base: type) -> bool:
    """Whether the loss of a stock model class is the sum over items divided by `num_items_in_batch`.

    T5 and the heads that classify take that number and ignore it. False where the source cannot be read.
    """
    if _OF_WHOLE_SEQUENCES.search(base.__name__):
        return False
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(base.forward))))
    except (OSError, TypeError):
        return False
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    of_loss = [call for call in calls if getattr(call.func, "attr", None) == "loss_function"]
    return any(word.arg in (None, "num_items_in_batch") for call in of_loss for word in call.keywords)


def _model_class(base: type, name: str, module: str) -> type:
    """The stock model class with mixtures."""
    config_class = subclass(base.config_class, module)
    body = {
        "config_class": config_class,
        "__module__": module,
        "_base_class": base,
        "__init__": _constructing(base.__init__),
        "forward": _recording(base.forward),
    }
    bases = (MixtureMixin, base)
    # AutoModel adds it to a copy of a custom class that has no such base; others look for it among the bases.
    if GenerationMixin in base.__mro__ or (
        module != __name__ and hasattr(base, "prepare_inputs_for_generation")
    ):
        bases = (*bases, GenerationMixin)
    if GenerationMixin in bases or base.can_generate():
        body["generate"] = _generating(getattr(base, "generate", vars(GenerationMixin)["generate"]))
    if not counts_items(base):
        body["accepts_loss_kwargs"] = False  # Trainer then averages accumulated passes itself
    # T5 keeps its output projection `wo` in float32 when the rest is float16; ours is called `down`, and what
    # works on its output is in the same danger of overflowing.
    for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
        kept = getattr(base, attribute, None)
        if kept and "wo" in kept:
            behind = [key for key, part in PARTS.items() if part.behind]
            body[attribute] = type(kept)([*kept, "down", *behind])
    strict = body.get("_keep_in_fp32_modules_strict", getattr(base, "_keep_in_fp32_modules_strict", None))
    body["_keep_in_fp32_modules_strict"] = {*(strict or ()), "router"}
    cls = type(name, bases, body)
    # Key renames (GPT-NeoX's embed_out, ViT's old layer names) are looked up by class name.
    renames = get_checkpoint_conversion_mapping(base.__name__)
    if renames is not None and not _renames_experts(renames):
        register_checkpoint_conversion_mapping(name, renames, overwrite=True)
    _name_task(base.__name__, config_class.model_type, name)
    return cls


def _renames_experts(renames: list) -> bool:
    """Whether these are for a mixture, whose artifact has the names of the model itself."""
    return any("experts" in pattern for transform in renames for pattern in transform.target_patterns)


def _name_task(base: str, model_type: str, name: str) -> None:
    """Enter a class in transformers' tables of names for every task of its base.

    By them Trainer knows that labels are to be shifted for label smoothing, and pipelines which models they
    support.
    """
    for table, names in vars(modeling_auto).items():
        if table.startswith("MODEL_FOR_") and table.endswith("_MAPPING_NAMES") and base in names.values():
            names[model_type] = name


def subclass(base: type, module: str = __name__) -> type:
    """The subclass of a config or model class; made once and kept as an attribute of the module.

    Args:
        base: a class of transformers, or of the custom code of a checkpoint's source.
        module: name of the module that keeps it; for custom code one beside this file, so that saving a model
            copies all of its code.
    """
    namespace, name = vars(sys.modules[module]), CLASS_PREFIX + base.__name__
    if name in namespace:
        return namespace[name]
    if issubclass(base, PretrainedConfig):
        namespace[name] = _config_class(base, name, module)
        return namespace[name]
    namespace[name] = _model_class(base, name, module)
    # AutoModel loads stacks, which transformers does not export, as what they are.
    if module == __name__ and hasattr(transformers, base.__name__):
        # Heads such as LlamaForSequenceClassification build their backbone by AutoModel from the config.
        backbone = MODEL_MAPPING.get(base.config_class, None)
        if isinstance(backbone, type):
            subclass(backbone)
        if base is backbone:
            AutoModel.register(subclass(base.config_class), namespace[name], exist_ok=True)
    return namespace[name]


def _stock_class(name: str) -> Any:
    """The class of transformers with that name, or None; stacks are not in its namespace."""
    if hasattr(transformers, name):
        return getattr(transformers, name)
    for model_type, config in CONFIG_MAPPING_NAMES.items():
        if name.startswith(config.removesuffix("Config")):
            backbone = MODEL_MAPPING.get(transformers.CONFIG_MAPPING[model_type], None)
            found = isinstance(backbone, type) and getattr(sys.modules[backbone.__module__], name, None)
            if found:
                return found
    return None


def __getattr__(name: str) -> type:
    """`MPOE<Name>`: the subclass of `transformers.<Name>`, which `auto_map` of config.json asks for."""
    base = _stock_class(name.removeprefix(CLASS_PREFIX)) if name.startswith(CLASS_PREFIX) else None
    if not isinstance(base, type):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if issubclass(base, nn.Module) and not issubclass(base, PreTrainedModel):
        return block_class(base, globals())
    if not issubclass(base, PretrainedConfig | PreTrainedModel):
        raise AttributeError(f"{name!r}: transformers.{base.__name__} is neither config nor model")
    return subclass(base)
