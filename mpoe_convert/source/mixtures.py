"""Mixtures as sources: where the experts of a stock model are, how its tensors hold them, and who is refused.

Since transformers 5 the sparse blocks of some sixty families call a module `experts` with the hidden states,
the chosen experts and their weights, and mark its class with flags: transposed, gate and up concatenated or
interleaved, biases. These flags are the table of families here. The block's router, its rule and its shared
experts are not looked at: they stay. Each kind of module is run on small random numbers beside ours, so that
what the flags say is confirmed before anything is converted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, FamilyError, few
from ..options import called
from ..runtime.shapes import functions
from .architecture import knows
from .checkpoint import Checkpoint
from .expert_layout import Layout, biases_of, computes_the_same, matrices_of
from .families import Family, refusal
from .ffn import FFN, Source
from .in_memory import InMemory
from .named_experts import check_blocks, find, is_marked, parse, proposals, read

if TYPE_CHECKING:
    from torch import Tensor, nn

# Config keys with the number of experts; more than one: a mixture.
NUMBERS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
# Config keys with the number of experts per token.
_TOP_K = (
    *("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts", "moe_top_k"),
    *("num_selected_experts", "router_top_k", "top_k"),
)


@dataclass(frozen=True)
class MixtureFamily(Family):
    """How the blocks of a mixture stand in their layers; found in the model, not in the table of families.

    Attributes:
        experts: their name in the block.
        layout: of experts that are named by hand and that transformers does not mark.
    """

    experts: str = "experts"
    layout: Layout | None = None

    def runtime(self) -> dict:
        found: dict = {"slot": self.slot, "experts": self.experts}
        if self.by_hand is not None:
            found["experts_at"] = self.by_hand
        if self.layout is not None:
            found |= {"activation": self.layout.activation, "one_by_one": self.layout.one_by_one}
        return found


@dataclass(frozen=True)
class Located:
    """The experts of a model.

    Attributes:
        family: where the blocks are.
        ffns: one per layer with experts, in layer order.
        num_experts, top_k: of all of them.
        groups, top_groups: their routers choose groups of experts first, so many of so many.
    """

    family: MixtureFamily
    ffns: tuple[FFN, ...]
    num_experts: int
    top_k: int
    groups: int = 1
    top_groups: int = 1


def is_mixture(checkpoint: Checkpoint) -> bool:
    """Whether config.json or the names of tensors speak of experts. Imports nothing."""
    parts = [checkpoint.config, *(part for part in checkpoint.config.values() if isinstance(part, dict))]
    if any(_most(part.get(key)) > 1 for part in parts for key in NUMBERS):
        return True
    return any(map(_is_of_experts, checkpoint.tensors))


def _is_of_experts(name: str) -> bool:
    return ".experts." in name or "block_sparse_moe" in name


def _most(count: object) -> int:
    """The largest integer in a config value that is an integer or a list of one per layer."""
    counts = count if isinstance(count, list) else [count]
    return max((item for item in counts if isinstance(item, int)), default=0)


def refuse(checkpoint: Checkpoint) -> None:
    """Raises FamilyError for a mixture of custom code, whose experts have to be named."""
    architecture = checkpoint.architecture
    if not architecture.is_custom:
        return
    texts = " or ".join(f'{called("experts_at")} "{each}"' for each in proposals(architecture.base))
    told = f"name its experts by hand: {texts}"
    if not texts:
        told = f"none of its modules holds experts that {called('experts_at')} could name"
    if knows(model_type := architecture.model_type):
        told += f"; or leave out {called('trust_remote_code')}, to take transformers' code of {model_type!r}"
    raise FamilyError(f"'{checkpoint.source}' is a mixture of experts with custom code: {told}")


def locate_experts(memory: InMemory, experts_at: str | None = None) -> Located:
    """Find the experts of a mixture, and check that its tensors are complete; reads headers only.

    Args:
        experts_at: the text of --experts-at, which names them.

    Raises:
        FamilyError: transformers' code for this model calls its experts in a way that is not known here, or
            they are not where the text says.
        CheckpointError: tensors are missing or have another shape than config.json says.
    """
    model_type, base = memory.config["model_type"], memory.model.base_model
    if experts_at is None:
        family, found = _family(memory, base)
    else:
        family, found = family_by_hand(base, model_type, experts_at)
    if family.layout is None:
        for kind in {(type(module), _flags(module)): module for module in found.values()}.values():
            check_module(model_type, kind)
    counts = {path: size_of(module, family.layout)[0] for path, module in found.items()}
    if len({*counts.values()}) > 1:
        raise FamilyError(
            f"the layers have {sorted({*counts.values()})} experts; expected one number in all layers"
        )
    _check_tensors(memory)
    prefix = _prefix(memory, base)
    ffns = tuple(_ffn(layer, module, family, memory, prefix) for layer, module in found.items())
    blocks = [base.get_submodule(".".join(filter(None, [layer, family.slot]))) for layer in found]
    top_k = max(_top_k(block, memory.config) for block in blocks)
    groups = max(_attribute(block, ("num_group",)) or 1 for block in blocks)
    top_groups = min(_attribute(block, ("topk_group",)) or 1 for block in blocks)
    return Located(family, ffns, next(iter(counts.values())), top_k, groups, top_groups)


def family_by_hand(base: Any, model_type: str, experts_at: str) -> tuple[MixtureFamily, dict[str, Any]]:
    """What the text of --experts-at says: the family, and {path of a layer: its experts}.

    Raises:
        FamilyError: the text does not fit the model, or its experts cannot be replaced.
    """
    named = parse(experts_at)
    found = find(base, named)
    layout = read(base, named, found)
    check_blocks(base, named, found, layout or Layout(sources_of(next(iter(found.values())), ""), None))
    family = MixtureFamily(
        (model_type,),
        (named.layers,),
        named.slot,
        (),
        activation="",
        by_hand=experts_at,
        experts=named.experts,
        layout=layout,
    )
    return family, found


def _family(memory: InMemory, base: nn.Module) -> tuple[MixtureFamily, dict[str, Any]]:
    """The same of a model whose experts transformers marks. Raises FamilyError."""
    model_type = memory.config["model_type"]
    marked = dict(experts_modules(base))
    if not marked:
        raise FamilyError(_why_not(memory, base))
    slots = {path: _split(path) for path in marked}
    slot = next(iter(slots.values()))[1]
    if any(each[1] != slot for each in slots.values()):
        raise FamilyError(
            f"experts in blocks of several names ({few([*marked])}); expected one name in all layers"
        )
    family = MixtureFamily((model_type,), (), slot, (), activation="")
    return family, {slots[path][0]: module for path, module in marked.items()}


def experts_modules(base: nn.Module) -> Iterator[tuple[str, Any]]:
    """(path below the base model, module) of those that transformers marks as experts."""
    for path, module in base.named_modules():
        if is_marked(module):
            yield path, module


def _split(path: str) -> tuple[str, str]:
    """(path of the layer, the block's path in it) of an experts module."""
    match = re.fullmatch(r"((?:\w+\.)*?\d+)((?:\.\w+)*?)\.experts", path)
    if match is None:
        raise FamilyError(f"experts at {path}; expected in numbered layers, in a module named experts")
    return match[1], match[2].removeprefix(".")


def _why_not(memory: InMemory, base: nn.Module) -> str:
    model_type = memory.config["model_type"]
    named = [path for path, _ in base.named_modules() if path.endswith(".experts")]
    has_tensors = any(map(_is_of_experts, memory.disk.tensors))
    if not named and (has_tensors or not any(hasattr(type(base.config)(), key) for key in NUMBERS)):
        return (
            f"this {model_type} names experts in config.json or in its tensors, and no layer of "
            f"{type(base).__name__} has any; correct config.json"
        )
    if not named:
        return refusal(
            model_type,
            "by config.json all its layers are dense, and dense layers of mixtures are not converted",
        )
    who = f"{named[0]} of {type(base).__name__}"
    why = f"{who} is not called as the experts of other families are"
    if found := proposals(base):
        return f"{refusal(model_type, why)}; to name them by hand: " + " or ".join(
            f'{called("experts_at")} "{each}"' for each in found
        )
    return refusal(model_type, why)


def _flags(module: Any) -> tuple[bool, ...]:
    names = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm")
    return tuple(bool(getattr(module, name, False)) for name in names)


def size_of(module: Any, layout: Layout | None = None) -> tuple[int, int, int]:
    """(experts, hidden size, inner size) of an experts module; layout: of one that was named by hand."""
    return (layout or Layout(sources_of(module, ""), None)).size(module)


def _names(module: Any) -> dict[str, str]:
    """Role -> name of the tensor in an experts module."""
    up = "gate_up_proj" if module.has_gate else "up_proj"
    return ({"gate": up} if module.has_gate else {}) | {"up": up, "down": "down_proj"}


def sources_of(module: Any, prefix: str) -> dict[str, Source]:
    """Role -> where the matrices of all experts are."""
    found = {}
    for role, name in _names(module).items():
        weight = prefix + name
        part = None if role == "down" or not module.has_gate else ("gate", "up").index(role)
        found[role] = Source(
            weight,
            f"{weight}_bias" if module.has_bias else None,
            module.is_transposed,
            part,
            interleaved=part is not None and not module.is_concatenated,
            stacked=True,
        )
    return found


def _ffn(layer: str, module: Any, family: MixtureFamily, memory: InMemory, prefix: str) -> FFN:
    block = ".".join(filter(None, [layer, family.slot]))
    start, key = f"{prefix}{block}.{family.experts}.", f"{prefix}{block}.{functions().MIXTURE}"
    layout, unread = family.layout, ()
    sources = sources_of(module, start) if layout is None else layout.sources(start)
    count, _, _ = size_of(module, family.layout)
    if layout is not None and layout.listed:
        stacks = {start + name: tuple(f"{start}{e}.{name}" for e in range(count)) for name in layout.tensors}
        memory.stacks.update(stacks)
        unread = tuple(name for names in stacks.values() for name in names)
    return FFN(layer, int(layer.rpartition(".")[2]), key, (sources,) * count, unread)


def _prefix(memory: InMemory, base: nn.Module) -> str:
    """What stands in front of the base model's names in those of the model."""
    return "" if base is memory.model else f"{memory.model.base_model_prefix}."


def _top_k(block: nn.Module, config: dict) -> int:
    """Experts per token, as the block or its router knows it, or config.json."""
    names = ("top_k", "num_experts_per_tok", "topk", "num_experts_per_token", "moe_topk")
    if (found := _attribute(block, names)) is not None:
        return found
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    return next((most for part in parts for key in _TOP_K if (most := _most(part.get(key)))), 1)


def _attribute(block: nn.Module, names: Iterable[str]) -> int | None:
    """The first whole number under one of these names that a block or a module in it has."""
    for module in (block, *block.children()):
        for name in names:
            if isinstance(found := getattr(module, name, None), int):
                return found
    return None


def _check_tensors(memory: InMemory) -> None:
    """Raises CheckpointError if a tensor of the model is missing, or has another shape."""
    learnt = {name: each for name, each in memory.model.named_parameters(remove_duplicate=False)}
    tied = {*(getattr(memory.model, "all_tied_weights_keys", None) or ())}
    missing = [name for name in learnt if name not in memory.tensors and name not in tied]
    if missing:
        raise CheckpointError(
            f"'{memory.source}' lacks {few(missing)} of {type(memory.model).__name__}; correct config.json, "
            "or fetch the files that belong together"
        )
    for name, info in memory.tensors.items():
        if name in learnt and info.shape != tuple(learnt[name].shape):
            raise CheckpointError(
                f"'{memory.source}': {name} has the shape {list(info.shape)}, and config.json asks for "
                f"{list(learnt[name].shape)}; correct config.json, or fetch the files that belong together"
            )


# ---------------------------------------------------------------------------------------------------
# Reading


def read_stack(checkpoint: Checkpoint, source: Source) -> Tensor:
    """The matrices of all experts (E, in, out), in the dtype of the source.

    Raises:
        CheckpointError: one holds NaN or Inf; names the expert.
    """
    return _read(checkpoint, source.weight, matrices_of, source)


def read_biases(checkpoint: Checkpoint, source: Source) -> Tensor:
    """The biases of all experts (E, out), of a projection that has some. Raises as `read_stack`."""
    assert source.bias is not None
    return _read(checkpoint, source.bias, biases_of, source)


def _read(
    checkpoint: Checkpoint, name: str, part: Callable[[Tensor, Source], Tensor], source: Source
) -> Tensor:
    from ..tensors import check_finite

    tensor = part(checkpoint.read_for(name, source.part), source).contiguous()
    stored = checkpoint.name_on_disk(name) if isinstance(checkpoint, InMemory) else name
    for expert, own in enumerate(tensor):
        check_finite(own, f"{stored} (expert {expert})")
    return tensor


def check_module(model_type: str, module: Any) -> None:
    """Run a small copy of stock experts beside ours. Raises FamilyError if they compute different things."""
    name = type(module).__name__
    if getattr(module, "has_post_expert_norm", False):
        raise FamilyError(refusal(model_type, f"{name} has a norm behind every expert"))
    try:
        same = computes_the_same(module, Layout(sources_of(module, ""), None))
    except Exception as error:  # the model's code may need anything else
        raise FamilyError(
            refusal(model_type, f"{name} does not run on small numbers ({type(error).__name__})")
        ) from error
    if not same:
        raise FamilyError(
            refusal(model_type, f"{name} computes something else than down(act(gate x) * up x)")
        )
