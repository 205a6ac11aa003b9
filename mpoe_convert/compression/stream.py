"""Load and run the dense model, with one block in memory at a time where that is enough."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..artifact.folder import TemporaryFolder
from ..artifact.loading import from_pretrained
from ..errors import CheckpointError
from ..options import called
from ..planning.plan import FFNPlan
from ..source.checkpoint import Checkpoint
from ..source.families import Family
from ..source.locate import projection_names
from .batches import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.utils.generic import ModelOutput


def run_batch(model: PreTrainedModel, batch: Batch) -> ModelOutput:
    """The model's outputs. Labels are inputs of encoder-decoders; elsewhere they only say what is scored."""
    unread = () if model.config.is_encoder_decoder else ("labels",)
    return model(**{name: tensor.to(model.device) for name, tensor in batch.items() if name not in unread})


def check_activations(values: Tensor, where: str) -> None:
    """Raises CheckpointError if activations, or their squares, hold NaN or Inf."""
    if not torch.isfinite(values.sum()):
        raise CheckpointError(
            f"the dense model's activations at {where} hold NaN or Inf; expected a model that computes "
            f"finite numbers on the calibration text (try the {called('dtype')} of its training, or other "
            "text)"
        )


def projection_modules(model: PreTrainedModel, family: Family, plan: FFNPlan) -> dict[str, nn.Module]:
    """The stock modules of an FFN's projections by role; "gate" and "up" may be one fused module."""
    layer = model.base_model.get_submodule(plan.ffn.path)
    names = projection_names(layer, family.spellings, plan.ffn.projections)
    return {role: layer.get_submodule(name) for role, name in names.items()}


def keep_no_cache(model: PreTrainedModel) -> None:
    """Switch off the cache of keys and values, in every config of the model (T5's stacks have their own)."""
    for module in model.modules():
        if (config := getattr(module, "config", None)) is not None:
            config.use_cache = False


def load_dense(
    checkpoint: Checkpoint, device: torch.device | None = None, **options: object
) -> PreTrainedModel:
    """The dense model in eval mode, without a cache. Custom code runs only if the checkpoint is trusted.

    Args:
        device: where to; None: where `options` say.
        options: for `from_pretrained`.
    """
    from transformers import AutoModel

    cls, trusted = checkpoint.architecture.model_class or AutoModel, checkpoint.code is not None
    if checkpoint.key_mapping:
        options["key_mapping"] = checkpoint.key_mapping
    model = from_pretrained(cls, str(checkpoint.folder), trust_remote_code=trusted, **options).eval()
    keep_no_cache(model)
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = -1  # classifiers need one to find the last token of padded text
    if device is not None:
        nn.Module.to(model, device)  # in place; transformers wraps `to` without types of its arguments
    return model


@contextmanager
def streamed_model(
    checkpoint: Checkpoint, ffn_paths: Iterable[str], device: torch.device
) -> Iterator[PreTrainedModel]:
    """The dense model whose blocks with these FFNs are read from disk whenever they are called."""
    blocks = {_block_of(path) for path in ffn_paths}
    skeleton = checkpoint.architecture.build(checkpoint.architecture.model_class)
    base = f"{skeleton.base_model_prefix}." if skeleton.base_model is not skeleton else ""
    placement = dict(_placement(skeleton, {base + block for block in blocks}, str(device)))
    with closing(TemporaryFolder("mpoe-offload-")) as offloaded:
        options = {"device_map": placement, "offload_folder": str(offloaded.path), "dtype": "auto"}
        with warnings.catch_warnings():  # a parameter beside submodules needs an entry, too
            warnings.filterwarnings("ignore", "The following device_map keys do not match")
            model = load_dense(checkpoint, **options)
        yield model


def _block_of(path: str) -> str:
    """ "encoder.block.0.layer.1" -> "encoder.block.0": the block that is read as a whole."""
    parts = path.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    return ".".join(parts[: number + 1])


def _placement(
    module: nn.Module, blocks: set[str], device: str, prefix: str = ""
) -> Iterator[tuple[str, str]]:
    """accelerate's device map as (name of a module or tensor, "disk" for blocks, else the device)."""
    own = [name for name, _ in module.named_parameters(recurse=False)]
    own += [name for name, _ in module.named_buffers(recurse=False)]
    yield from ((prefix + name, device) for name in own if name not in module._non_persistent_buffers_set)
    for name, child in module.named_children():
        name = prefix + name
        if name in blocks:
            yield name, "disk"
        elif any(block.startswith(f"{name}.") for block in blocks):
            yield from _placement(child, blocks, device, f"{name}.")
        else:
            yield name, device
