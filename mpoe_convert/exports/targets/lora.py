"""Low-rank and core-space experts as PEFT adapters: one per expert, on the dense model that all share."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING

from ...errors import ExportError, RequestError
from ...options import OptionalText, assigned, called, described, in_home, option
from .. import targets
from . import Checked, ExportPlan, Part, PlannedTensor
from .dense import ExpertWeights, dense_tensors, loading, read_bias

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel

    from ...artifact.reader import Artifact, Mixture
    from ...source.checkpoint import Checkpoint
    from . import Export

ABOUT = "low-rank and core-space experts as PEFT adapters on the dense model that they share"
NEEDS: dict[str, tuple[str, ...]] = {}  # peft only compares
# Who shares what of the terms beside the shared matrix: kinds low-rank and core-space.
ADDITIONS = ([[False, False]], [[True, False, True]])

# Tasks whose PEFT wrappers add nothing to the adapter.
TASKS = {"AutoModelForCausalLM": "CAUSAL_LM", "AutoModelForSeq2SeqLM": "SEQ_2_SEQ_LM"}


@described
class Options(targets.Options):
    """Which model the adapters go on."""

    base: OptionalText = option(
        default=None,
        help="Folder or Hub id of the model that the adapters go on; its weights have to be what the experts "
        "share.",
        group="Target",
        metavar="MODEL",
        read=in_home,
        default_text="written beside them",
    )
    base_revision: str | None = option(default=None, help="Revision of a --base on the Hub.", group="Target")

    def check_together(self) -> None:
        if self.base_revision is not None and self.base is None:
            raise RequestError(
                f"{called('base_revision')} given without {called('base')}; expected the revision of a "
                "base on the Hub"
            )


def plan(source: Artifact, request: Export, expert_weights: ExpertWeights | None, output: Path) -> ExportPlan:
    """See `targets`.

    Raises:
        ExportError: the experts are not low-rank additions to a shared matrix, or the weights of the base
            that was named are not those that they share.
    """
    from ...artifact.reader import SHARED
    from ...source.checkpoint import open_checkpoint

    for mixture in source.mixtures:
        _check_low_rank(source, mixture)
    base = tuple(dense_tensors(source, {mixture.path: SHARED for mixture in source.mixtures}))
    if request.base is not None and source.architecture.is_custom:
        raise ExportError(
            f"{called('base')} is '{request.base}', and this {source.model_type} has custom code; "
            f"only the artifact's is run here: omit {called('base')}, and the base is written with that code"
        )
    if request.base is not None:
        _check_base(
            source, base, open_checkpoint(request.base, revision=request.base_revision, token=source.token)
        )
    model = request.base or str(output / "base")
    names = [f"expert-{expert}" for expert in range(source.num_experts)]
    modules = _modules(source)
    parts = [] if request.base else [Part("base", {"config.json": source.config}, base)]
    for expert, name in enumerate(names):
        config = _adapter_config(source, modules, model, request.base_revision, expert)
        tensors = tuple(_adapter(source, modules, expert))
        parts.append(Part(name, {"adapter_config.json": config}, tensors, adapter=True))
    warnings = ["The routers are not exported: whoever serves the adapters chooses one for each text."]
    checked = None
    if find_spec("peft"):
        experts = tuple(range(source.num_experts))
        checked = Checked(experts, tuple(names), "base", request.base, request.base_revision)
    elif request.check:
        warnings.append("Not compared with the artifact: that needs peft.")
    return ExportPlan(
        parts=tuple(parts),
        model_type=source.model_type,
        title="experts as adapters",
        about=(
            f"Each of the {source.num_experts} experts is a PEFT adapter (LoRA) on "
            f"{request.base or 'base/, the dense model that they share'}."
        ),
        usage=_usage(source, request.base or "path/to/this/base"),
        checked=checked,
        warnings=tuple(warnings),
        library="peft",
    )


def _usage(source: Artifact, base: str) -> str:
    from ...source.architecture import main_auto_class

    auto = main_auto_class(source.config, source.model_type)
    return (
        f"from peft import PeftModel\nfrom transformers import {auto}\n\n"
        f"model = {loading(source, base)}\n"
        'model = PeftModel.from_pretrained(model, "path/to/this/expert-0", adapter_name="expert-0")\n'
        'model.load_adapter("path/to/this/expert-1", adapter_name="expert-1")\n'
        'model.set_adapter("expert-1")'
    )


def _check_low_rank(source: Artifact, mixture: Mixture) -> None:
    for role in mixture.roles:
        whole, *thin = mixture.form[role]["terms"]
        if not (all(whole["shared"]) and [term["shared"] for term in thin] in ADDITIONS):
            kind = source.checkpoint.config["mpoe"].get("kind", "another kind")
            raise ExportError(
                f"the experts of '{source.checkpoint.source}' are of kind {kind}, not low-rank additions "
                "to a shared matrix (kinds low-rank and core-space), so they are no LoRA adapters; "
                f"{assigned('to', 'dense')} writes one of them"
            )


def _check_base(source: Artifact, tensors: tuple[PlannedTensor, ...], base: Checkpoint) -> None:
    """Raises ExportError if the weights of the base are not those that the experts share."""
    import torch

    from ...source.state_dict import is_buffer

    prefix = f"{_build(source).base_model_prefix}."
    for tensor in tensors:
        spellings = (tensor.name, tensor.name.removeprefix(prefix), prefix + tensor.name)
        name = next((name for name in spellings if name in base.tensors), None)
        if name is None and is_buffer(tensor.name):
            continue
        if name is None or not torch.equal(base.read(name), tensor.make()):
            what = "differs from that of" if name else "is not in"
            raise ExportError(
                f"{tensor.name} {what} '{base.source}': what experts share was trained, compressed or "
                "rounded since, so adapters on that base would compute other outputs; omit "
                f"{called('base')}, and the right base is written"
            )


def _build(source: Artifact) -> PreTrainedModel:
    """The dense model on the meta device."""
    return source.architecture.build(source.architecture.model_class)


def _modules(source: Artifact) -> dict[str, dict[str, list[str]]]:
    """By the paths of the layers: {path of a linear layer in the stock model: the roles that it plays}."""
    from ...source.locate import projection_names

    model = _build(source)
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    found: dict[str, dict[str, list[str]]] = {}
    for mixture in source.mixtures:
        layer = model.base_model.get_submodule(mixture.path)
        own = found.setdefault(mixture.path, {})
        for role, name in projection_names(layer, source.family.spellings, mixture.roles).items():
            own.setdefault(f"{prefix}{mixture.path}.{name}", []).append(role)
    return found


def _adapter_config(source: Artifact, modules: dict, base: str, revision: str | None, expert: int) -> dict:
    """adapter_config.json. Alpha is the rank: the products are added as they are."""
    from ...source.architecture import main_auto_class

    ranks, own_biases = {}, False
    for mixture in source.mixtures:
        for module, roles in modules[mixture.path].items():
            ranks[module] = sum(source.rank(mixture, role, expert) for role in roles)
            own_biases |= mixture.bias_kind(roles[0]) == "per-expert"
    rank = min(ranks.values())
    # A fused projection has twice the rank.
    others = {module: found for module, found in ranks.items() if found != rank}
    return {
        "peft_type": "LORA",
        "task_type": TASKS.get(main_auto_class(source.config, source.model_type)),
        "base_model_name_or_path": base,
        "revision": revision,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "lora_dropout": 0.0,
        "lora_bias": own_biases,
        "bias": "none",
        "fan_in_fan_out": source.family.transposed,
        "target_modules": sorted(ranks),
        "use_rslora": False,
        "use_dora": False,
    }


def _adapter(source: Artifact, modules: dict, expert: int) -> Iterator[PlannedTensor]:
    for mixture in source.mixtures:
        for module, roles in modules[mixture.path].items():
            rank = sum(source.rank(mixture, role, expert) for role in roles)
            inputs, outputs = mixture.size(roles[0])[0], sum(mixture.size(role)[1] for role in roles)
            dtype = source.dtype(mixture, roles[0])
            key = f"base_model.model.{module}"
            arguments = (source, mixture, roles, expert)
            yield PlannedTensor(f"{key}.lora_A.weight", (rank, inputs), dtype, partial(_lora_a, *arguments))
            yield PlannedTensor(f"{key}.lora_B.weight", (outputs, rank), dtype, partial(_lora_b, *arguments))
            if mixture.bias_kind(roles[0]) == "per-expert":
                dtype = source.checkpoint.tensors[f"{mixture.key}.{roles[0]}.bias"].dtype
                yield PlannedTensor(f"{key}.lora_B.bias", (outputs,), dtype, partial(_own_bias, *arguments))


def _lora_a(source: Artifact, mixture: Mixture, roles: list[str], expert: int) -> Tensor:
    """(rank, in), the down-projection; of a fused projection one role's rows above the other's."""
    import torch

    return torch.cat([source.factors(mixture, role, expert)[0].T for role in roles])


def _lora_b(source: Artifact, mixture: Mixture, roles: list[str], expert: int) -> Tensor:
    """(out, rank), the up-projection; of a fused projection one diagonal block per role."""
    import torch

    return torch.block_diag(*(source.factors(mixture, role, expert)[1].T for role in roles)).contiguous()


def _own_bias(source: Artifact, mixture: Mixture, roles: list[str], expert: int) -> Tensor:
    """(out,), the expert's bias minus the base's, which is expert 0's."""
    import torch

    from ...artifact.reader import SHARED

    return torch.cat(
        [
            read_bias(source, mixture, role, {expert: 1.0}) - read_bias(source, mixture, role, SHARED)
            for role in roles
        ]
    )
