"""The dense model with one block in memory at a time, and several passes of it in lockstep."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..artifact.loading import from_pretrained
from ..errors import CheckpointError
from ..planning.plan import FFNPlan, Plan
from ..source.checkpoint import Checkpoint
from ..source.families import Family
from ..source.locate import projection_names
from .batches import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class InStep:
    """Runs functions side by side; whichever calls `wait` goes on when all the others wait too, or are over.

    Attributes:
        current: number of the function that runs.
    """

    def __init__(self):
        self.current = 0

    def run(self, functions: Sequence[Callable[[], None]], all_wait: Callable[[], None]) -> None:
        """`all_wait` is called whenever none of those that are left can go on by itself.

        Raises whatever a function raises; then, too, nothing keeps running.
        """
        from greenlet import getcurrent, greenlet

        self.main = getcurrent()
        walkers = [greenlet(function) for function in functions]
        try:
            while not all(walker.dead for walker in walkers):
                for self.current, walker in enumerate(walkers):
                    if not walker.dead:
                        walker.switch()
                all_wait()
        finally:
            for walker in walkers:
                if not walker.dead:
                    walker.throw()

    def wait(self) -> None:
        self.main.switch()

    @staticmethod
    def stop() -> None:
        """End the function that calls."""
        from greenlet import GreenletExit

        raise GreenletExit


def run_batch(model: PreTrainedModel, batch: Batch):
    """The model's outputs; labels are inputs of decoders, else they only say what counts."""
    unread = () if model.config.is_encoder_decoder else ("labels",)
    return model(**{name: tensor.to(model.device) for name, tensor in batch.items() if name not in unread})


def check_activations(values: Tensor, where: str) -> None:
    """Raises CheckpointError for NaN or Inf in activations or in their squares."""
    if not torch.isfinite(values.sum()):
        raise CheckpointError(
            f"the dense model's activations at {where} hold NaN or Inf; expected a model that computes "
            "numbers on the calibration text (try --dtype of its training, or leave out that text)"
        )


def projection_modules(model: PreTrainedModel, family: Family, plan: FFNPlan) -> dict[str, nn.Module]:
    """The stock modules of an FFN's projections by role; a fused one stands for both of its parts."""
    layer = model.base_model.get_submodule(plan.ffn.path)
    names = projection_names(layer, family.spellings, plan.ffn.projections)
    return {role: layer.get_submodule(name) for role, name in names.items()}


def keep_no_cache(model: PreTrainedModel) -> None:
    """No keys and values for a generation that will not come; T5's stacks have configs of their own."""
    for module in model.modules():
        if (config := getattr(module, "config", None)) is not None:
            config.use_cache = False


def _load(checkpoint: Checkpoint, **options) -> PreTrainedModel:
    """The dense model; no code of the source runs that is not trusted, and generation has no cache."""
    from transformers import AutoModel

    cls, trusted = checkpoint.architecture.model_class or AutoModel, checkpoint.code is not None
    model = from_pretrained(cls, str(checkpoint.folder), trust_remote_code=trusted, **options).eval()
    keep_no_cache(model)
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = -1  # classifiers want one to find the last token; blocks have none
    return model


@contextmanager
def streamed_model(plan: Plan, checkpoint: Checkpoint, device: torch.device) -> Iterator[PreTrainedModel]:
    """The dense model, its layers read from disk when they are called."""
    blocks = {_block_of(path) for path in (*(ffn.ffn.path for ffn in plan.ffns), *plan.kept_dense)}
    skeleton = checkpoint.architecture.build(checkpoint.architecture.model_class)
    base = f"{skeleton.base_model_prefix}." if skeleton.base_model is not skeleton else ""
    placement = dict(_placement(skeleton, {base + block for block in blocks}, str(device)))
    with TemporaryDirectory() as offloaded:
        options = {"device_map": placement, "offload_folder": offloaded, "dtype": "auto"}
        with warnings.catch_warnings():  # tensors of their own count as no submodules, and have to be there
            warnings.filterwarnings("ignore", "The following device_map keys do not match")
            model = _load(checkpoint, **options)
        yield model


def _block_of(path: str) -> str:
    """ "encoder.block.0.layer.1" -> "encoder.block.0": the layer that is read as a whole."""
    parts = path.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    return ".".join(parts[: number + 1])


def _placement(
    module: nn.Module, blocks: set[str], device: str, prefix: str = ""
) -> Iterator[tuple[str, str]]:
    """(module or tensor, "disk" for a block, else the device), the largest modules that lie in one place."""
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
