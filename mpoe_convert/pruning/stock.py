"""What an artifact of a mixture keeps of its source's model: config, routers, corrections."""

from __future__ import annotations

from dataclasses import fields

from ..artifact.reader import Artifact
from ..errors import CheckpointError, few
from ..source.checkpoint import Checkpoint
from ..source.in_memory import InMemory
from ..source.mixtures import Located, locate_experts
from ..source.safetensors_file import TensorInfo


def stock_of(source: Artifact) -> tuple[InMemory, Located]:
    """The source's model with all its experts, from headers; and where its experts are.

    The matrices that the artifact has in cores stand there with the shapes that the source has.

    Raises:
        FamilyError: transformers does not build the source's model any more.
        CheckpointError: some layers have experts that were not converted.
    """
    architecture, checkpoint = source.architecture, source.checkpoint
    model = architecture.build(architecture.model_class)
    stored = {name: info for name, info in checkpoint.tensors.items() if source.owner(name) is None}
    state = {**dict(model.named_parameters(remove_duplicate=False)), **model.state_dict()}
    tensors = {
        name: stored.get(name) or TensorInfo(name, "float32", tuple(tensor.shape), "")
        for name, tensor in state.items()
    }
    as_stored = {each.name: getattr(checkpoint, each.name) for each in fields(Checkpoint)}
    changes = {"config": source.config, "tensors": tensors}
    memory = InMemory(**as_stored | changes, disk=checkpoint, model=model, groups={})
    located = locate_experts(memory)
    converted = {mixture.path for mixture in source.mixtures}
    if left := [ffn.path for ffn in located.ffns if ffn.path not in converted]:
        raise CheckpointError(
            f"'{checkpoint.source}' has {few(left)} with experts as its source holds them, which cannot go; "
            "expected an artifact of which all layers with experts were converted"
        )
    return memory, located
