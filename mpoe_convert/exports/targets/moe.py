"""All experts as whole matrices in a mixture that transformers has: the same logits from stock code."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from ...errors import ExportError
from ...options import assigned
from .. import targets
from . import Checked, ExportPlan, Part, PlannedTensor
from .dense import ExpertWeights, check_adapters, copied, tensors_with, usage

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from ...artifact.reader import Artifact, Mixture
    from ..moe_architectures import MoeTarget
    from . import Export

ABOUT = "all experts as a mixture that transformers has, such as Mixtral: the same outputs from stock code"
NEEDS: dict[str, tuple[str, ...]] = {}

# Width of a shared expert that adds nothing; kernels are fast for multiples of 256.
IDLE_WIDTH = 256


class Options(targets.Options):
    """None."""


def plan(source: Artifact, request: Export, expert_weights: ExpertWeights | None, output: Path) -> ExportPlan:
    """See `targets`.

    Raises:
        ExportError: no mixture of transformers computes the same function; the message says why.
    """
    if source.keeps_routers:
        from ..source_mixture import plan_source

        return plan_source(source)
    target = _target(source)
    config = target_config(source, target)
    tensors = tuple(tensors_with(source, partial(_mixture, source, target, config)))
    about = (
        f"All {source.num_experts} experts of every mixture were written out as whole matrices of a "
        f"{target.model_type}, {source.top_k} per token: the same function, in transformers' stock classes."
    )
    return ExportPlan(
        parts=(Part("", {"config.json": config}, tensors),),
        model_type=target.model_type,
        title=f"as a {target.model_type}",
        about=about,
        usage=usage(source),
        checked=Checked(),
        warnings=_warnings(source, target),
    )


def _warnings(source: Artifact, target: MoeTarget) -> tuple[str, ...]:
    found = []
    dtypes = {source.dtype(mixture, "up") for mixture in source.mixtures}
    if target.model_type != "switch_transformers" and dtypes & {"bfloat16", "float16"}:
        found.append(
            f"Routers stay float32 in the file; {target.model_type} computes them in the model's dtype, so "
            "that in half precision a token may go to another expert."
        )
    combine = source.options["router_combine"]
    if target.llama_cpp not in (None, combine):
        found.append(
            f"llama.cpp computes other outputs from it: the combine weights of this model are {combine}, and "
            f"llama.cpp takes those of every {target.model_type} as {target.llama_cpp}."
        )
    return tuple(found)


def _target(source: Artifact) -> MoeTarget:
    from ..moe_architectures import MOE_TARGETS, NEAR_MISSES, TARGET_OF

    target = TARGET_OF.get(source.model_type)
    if source.architecture.is_custom:
        raise ExportError(
            f"'{source.checkpoint.source}' is a {source.model_type} with custom code, and no mixture of "
            f"transformers is known to compute the same; {assigned('to', 'dense')} writes one expert with "
            "that code"
        )
    if target is None:
        exact = "; ".join(f"{', '.join(row.sources)} -> {row.model_type}" for row in MOE_TARGETS)
        miss = NEAR_MISSES.get(source.model_type, "transformers has no mixture of that family")
        raise ExportError(f"no exact mixture of experts for {source.model_type}: {miss}; exact ones: {exact}")
    if obstacles := list(_obstacles(source, target)):
        raise ExportError(
            f"'{source.checkpoint.source}' is no {target.model_type}, which has no "
            f"{'; and no '.join(obstacles)}"
        )
    for mixture in source.mixtures:
        check_adapters(source, mixture, dict.fromkeys(range(source.num_experts), 1.0))
    return target


def _obstacles(source: Artifact, target: MoeTarget) -> Iterator[str]:
    """What the model has and the target has not."""
    from ...runtime.modeling_mpoe import DEFAULT_RULE

    if source.rule != DEFAULT_RULE:
        yield f"selection rule {source.rule}"
    if source.parts > 1:
        yield "experts whose outputs add up instead of being averaged (kind split)"
    if source.shared_experts:
        yield f"experts that every token passes, averaged with the others ({source.shared_experts})"
    if source.options["router_tasks"] is not None:
        yield "routers that choose by task"
    if any(source.balance_bias(mixture) is not None for mixture in source.mixtures):
        yield "balancing bias in the choice of experts (router_bias_update_rate)"
    combine = source.options["router_combine"]
    if combine not in target.weighing:
        yield f"combine weights that are {combine} (router_combine; it has {', '.join(target.weighing)})"
    if target.top_k is None and source.top_k != 1:
        yield f"{source.top_k} experts per token, but one"
    roles = target.experts or target.stacked
    if any(role not in roles for mixture in source.mixtures for role in mixture.roles):
        yield "experts with a gate"
    if any(mixture.bias_kind(role) for mixture in source.mixtures for role in mixture.roles):
        yield "biases in its experts"
    if source.kept_dense and target.dense_layers is None:
        yield f"layers without experts ({', '.join(source.kept_dense[:3])} were left dense)"
    if len(sizes := {mixture.size("up") for mixture in source.mixtures}) > 1:
        yield f"experts of several sizes ({sorted(sizes)})"
    resolved = _resolved(source)
    for name, (harmless, what) in target.fixed.items():
        value = resolved.get(name)
        if harmless and value not in harmless:
            yield f"{what} ({name} is {value})"


def _resolved(source: Artifact) -> dict:
    """The base's config with its class's defaults, which are not always the target's."""
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[source.model_type].from_dict(source.config).to_dict()


def target_config(source: Artifact, target: MoeTarget) -> dict:
    """config.json of the target.

    Raises:
        ExportError: the base has a setting or a head that the target has not.
    """
    from transformers import CONFIG_MAPPING, PretrainedConfig

    resolved = _resolved(source)
    # Sizes of heads are no field of every class that reads them.
    known = _settings(CONFIG_MAPPING[target.model_type]) | {"head_dim"}
    own = _settings(CONFIG_MAPPING[source.model_type]) - _settings(PretrainedConfig)
    if unknown := sorted(own - known - set(target.fixed)):
        raise ExportError(
            f"{target.model_type} has no setting like {source.model_type}'s {', '.join(unknown)}"
        )
    values = {name: value for name, value in resolved.items() if name in known}
    values |= dict(target.constants) | dict(target.weighing[source.options["router_combine"]])
    values |= {target.num_experts: source.num_experts, target.inner_size: source.mixtures[0].size("up")[1]}
    values |= {name: resolved[other] for name, other in target.depths.items()}
    if target.top_k is not None:
        values[target.top_k] = source.top_k
    if target.dense_layers is not None:
        values[target.dense_layers] = [int(re.findall(r"\d+", path)[-1]) for path in source.kept_dense]
    if target.idle_shared_expert:
        values["shared_expert_intermediate_size"] = min(IDLE_WIDTH, source.mixtures[0].size("up")[1])
    values["architectures"] = [_head(source, target)]
    values.pop("transformers_version", None)
    config = json.loads(CONFIG_MAPPING[target.model_type].from_dict(values).to_json_string())
    # Before transformers 5, configs knew one name only of the number of experts and of the rope's parameters.
    older = {target.num_experts: source.num_experts} | _older_rope(config.get("rope_parameters") or {})
    return config | older


def _older_rope(rope: dict) -> dict:
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    found = {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
    return found | ({} if scaling.get("rope_type", "default") == "default" else {"rope_scaling": scaling})


def _settings(config_class: type) -> set[str]:
    return {field.name for field in dataclasses.fields(config_class)}


def _head(source: Artifact, target: MoeTarget) -> str:
    """The target's class with the model's head."""
    from ...source.architecture import heads, main_auto_class

    auto = main_auto_class(source.config, source.model_type)
    known = heads(target.model_type)
    if auto not in known:
        names = ", ".join(source.config["architectures"])
        raise ExportError(f"{target.model_type} has no head like {names}; it has {', '.join(known.values())}")
    return known[auto]


def _mixture(source: Artifact, target: MoeTarget, config: dict, mixture: Mixture) -> Iterator[PlannedTensor]:
    slot = f"{mixture.layer}.{target.slot}"
    yield copied(source, f"{mixture.key}.router.weight", f"{slot}.{target.router}")
    if target.idle_shared_expert:
        yield from _idle_expert(source, mixture, slot, config["shared_expert_intermediate_size"])
    yield from _experts(source, mixture, target, slot)


def _experts(source: Artifact, mixture: Mixture, target: MoeTarget, slot: str) -> Iterator[PlannedTensor]:
    """The experts' weights, role by role, so that the cores of one projection are read once."""
    names = target.experts or target.stacked
    for name, roles in mixture.roles_by(names.__getitem__).items():
        inputs, outputs = mixture.size(roles[0])[0], sum(mixture.size(role)[1] for role in roles)
        dtype = source.dtype(mixture, roles[0])
        if target.stacked:
            make = partial(_stack, source, mixture, roles)
            yield PlannedTensor(f"{slot}.{name}", (source.num_experts, outputs, inputs), dtype, make)
            continue
        for expert in range(source.num_experts):
            make = partial(_weight, source, mixture, roles[0], expert)
            yield PlannedTensor(f"{slot}.{name.format(expert)}", (outputs, inputs), dtype, make)


def _weight(source: Artifact, mixture: Mixture, role: str, expert: int) -> Tensor:
    """(out, in) of one expert."""
    import torch

    return source.matrix(mixture, role, {expert: 1.0}).T.clone(memory_format=torch.contiguous_format)


def _stack(source: Artifact, mixture: Mixture, roles: list[str]) -> Tensor:
    """(E, out, in) of one role; of several roles, one above the other."""
    import torch

    experts = range(source.num_experts)
    return torch.cat(
        [torch.stack([_weight(source, mixture, role, e) for e in experts]) for role in roles], dim=1
    )


def _idle_expert(source: Artifact, mixture: Mixture, slot: str, width: int) -> Iterator[PlannedTensor]:
    """A shared expert of zeros, for targets that must have one."""
    import torch

    hidden = mixture.size("up")[0]
    dtype = source.dtype(mixture, "up")
    shapes = {
        "shared_expert.gate_proj.weight": (width, hidden),
        "shared_expert.up_proj.weight": (width, hidden),
        "shared_expert.down_proj.weight": (hidden, width),
        "shared_expert_gate.weight": (1, hidden),
    }
    for name, shape in shapes.items():
        # The expert's output is zero for any gate. The gate is not: llama.cpp divides by its logit.
        fill = torch.ones if name == "shared_expert_gate.weight" else torch.zeros
        yield PlannedTensor(f"{slot}.{name}", shape, dtype, partial(fill, shape, dtype=getattr(torch, dtype)))
