"""The model as an ONNX graph, experts and routers included, for any batch and length; no key-value cache.

torch.onnx traces the schedule that applies the cores to a few tokens: every row takes the cores of its own
experts. The model sorts tokens by expert instead where the experts' matrices have to be built, or where an
expert owns a great deal. The exporter cannot trace that (torch 2.13: no ONNX function for aten.sort.stable).
"""

from __future__ import annotations

import logging
import warnings
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

from ...errors import ExportError, VerifyError, one_line
from ...options import assigned
from .. import targets
from . import ExportPlan, Part
from .dense import ExpertWeights

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from torch import Tensor, nn
    from torch.onnx import ONNXProgram
    from transformers import PreTrainedModel

    from ...artifact.reader import Artifact
    from ...artifact.verify import Comparison
    from ...runtime.modeling_mpoe import FeedForward
    from . import Export

ABOUT = "the whole model as an ONNX graph"
NEEDS = {"onnx": ("onnx", "onnxruntime", "onnxscript")}

FILE = "model.onnx"
# A protobuf holds two gigabytes; the weights of larger models are written beside the graph.
MAX_BYTES_INSIDE = 1_500_000_000
# The example is short, and its sizes differ from those of all other dimensions.
EXAMPLE_LENGTH = 3
EXAMPLE_ROWS = 2 * EXAMPLE_LENGTH
SCHEDULE = "apply"


class Options(targets.Options):
    """None."""


def plan(source: Artifact, request: Export, expert_weights: ExpertWeights | None, output: Path) -> ExportPlan:
    """See `targets`.

    Raises:
        ExportError: torch.onnx cannot trace the experts.
    """
    _check(source)
    return ExportPlan(
        parts=(Part("", {"config.json": source.config}, ()),),
        model_type=source.model_type,
        title="as an ONNX graph",
        about=(
            f"{FILE} is the whole model, {source.num_experts} experts per mixture and {source.top_k} per "
            "token, in float32, for any batch and length."
        ),
        usage=f'import onnxruntime\n\nsession = onnxruntime.InferenceSession("path/to/this/{FILE}")',
        checked=None,
        warnings=("The graph has no key-value cache: generation reads the whole text for every token.",),
        library="onnx",
        write=partial(_write, source, request.check),
        num_bytes_written=4 * sum(prod(info.shape) for info in source.checkpoint.tensors.values()),
    )


def _check(source: Artifact) -> None:
    import torch

    from ...runtime.modeling_mpoe import EXPERT_CHOICE, FeedForward

    if source.options["router_tasks"] is not None:
        raise ExportError("routers that choose by task take task_ids, for which the graph has no input")
    if source.rule == EXPERT_CHOICE:
        raise ExportError(
            f"the experts of '{source.checkpoint.source}' take more tokens of a longer sequence (selection "
            f"rule {EXPERT_CHOICE}), and the graph has one number for all; {assigned('to', 'dense')} writes "
            "a stock model"
        )
    for mixture in {id(mixture.form): mixture for mixture in source.mixtures}.values():
        with torch.device("meta"):
            ffn = FeedForward.from_block(mixture.form, source.checkpoint.config["mpoe"]).eval()
            tokens = torch.empty(EXAMPLE_ROWS, mixture.size("up")[0])
        ffn.schedule = SCHEDULE
        if _sorts(ffn, tokens):
            what = "own too much each" if ffn.acts else "have cores that cannot act on the activations"
            raise ExportError(
                f"the experts of '{source.checkpoint.source}' {what}, so that tokens are sorted by expert, "
                "which torch.onnx cannot trace (no ONNX function for aten.sort.stable); expected layout "
                "one-sided or blocks, or kind low-rank, core-space or adapter; "
                f"{assigned('to', 'dense', 'moe')} writes stock models"
            )


class _Sorting(Exception):
    pass


def _sorts(ffn: FeedForward, tokens: Tensor) -> bool:
    """Whether a mixture sorts the tokens (T, H) by expert; nothing is computed on the meta device."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class StopsAtSorting(TorchDispatchMode):
        def __torch_dispatch__(
            self,
            func: Callable[..., Any],
            types: Iterable[type],
            args: tuple[Any, ...] = (),
            kwargs: dict[str, Any] | None = None,
        ) -> Any:
            if func is torch.ops.aten.sort.stable:
                raise _Sorting
            return func(*args, **(kwargs or {}))

    try:
        with torch.no_grad(), StopsAtSorting():
            ffn(tokens, tokens)
    except _Sorting:
        return True
    return False


def _by_position(model: PreTrainedModel, inputs: list[str], outputs: list[str]) -> nn.Module:
    """The model as a module that is called with its inputs in order and returns a tuple of the outputs."""
    from torch import nn

    class ByPosition(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
            found = self.model(**dict(zip(inputs, values, strict=True)), return_dict=True)
            return tuple(found[name] for name in outputs)

    return ByPosition().eval()


def _write(source: Artifact, check: bool, folder: Path) -> Comparison | None:
    """Write the graph, and compare onnxruntime's outputs with the model's.

    Raises:
        ExportError: torch's exporter cannot trace the model.
        VerifyError: the outputs differ.
    """
    import torch

    from ...artifact.loading import load_artifact
    from ...artifact.verify import ROUNDING, Comparison
    from ...artifact.verify_child import compare, make_inputs
    from ...compression.stream import keep_no_cache

    model = load_artifact(source, dtype=torch.float32, mpoe_schedule=SCHEDULE)
    keep_no_cache(model)
    inputs, text = make_inputs(model)
    with torch.no_grad():
        found = {k: v for k, v in model(**inputs, return_dict=True).items() if isinstance(v, torch.Tensor)}
    expected = {name: value for name, value in found.items() if value.is_floating_point()}
    program = _trace(model, inputs, list(expected))
    num_bytes = sum(parameter.nbytes for parameter in model.parameters())
    program.save(folder / FILE, external_data=num_bytes > MAX_BYTES_INSIDE)
    if not check:
        return None
    import onnxruntime  # pyright: ignore[reportMissingImports]  # an extra's

    session = onnxruntime.InferenceSession(folder / FILE, providers=["CPUExecutionProvider"])
    computed = session.run(list(expected), {name: value.numpy() for name, value in inputs.items()})
    computed = {name: torch.from_numpy(value) for name, value in zip(expected, computed, strict=True)}
    result = compare(computed, expected, None, None)
    found = result["relative_difference"]
    if found is None:
        raise VerifyError("onnxruntime's outputs, or the model's, hold NaN or infinities; nothing was kept")
    if found > ROUNDING:
        raise VerifyError(
            f"onnxruntime's outputs differ from the model's by a relative {found:.2g}, expected at most "
            f"{ROUNDING:g}; nothing was kept"
        )
    return Comparison(**result, inputs=f"{text}, in onnxruntime", tolerance=ROUNDING)


def _trace(model: PreTrainedModel, inputs: dict[str, Tensor], outputs: list[str]) -> ONNXProgram:
    """The graph of a model, for any sizes of the batch and the sequence.

    Raises:
        ExportError: torch's exporter cannot trace the model.
    """
    import torch

    any_size = torch.export.Dim.DYNAMIC
    example, shapes = [], []
    for value in inputs.values():
        is_tokens = value.dtype == torch.int64
        example.append(value[..., :EXAMPLE_LENGTH].contiguous() if is_tokens else value)
        shapes.append({0: any_size} | ({value.ndim - 1: any_size} if is_tokens else {}))
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")  # it misses torchvision
    level = logger.level
    try:
        logger.setLevel(logging.ERROR)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                _by_position(model, list(inputs), outputs),
                tuple(example),
                dynamo=True,
                dynamic_shapes=(tuple(shapes),),
                input_names=list(inputs),
                output_names=outputs,
                verbose=False,
            )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # torch's exporter raises errors of many kinds
        reason = one_line(error.__cause__ or error, 300)
        raise ExportError(f"torch.onnx cannot trace this {type(model).__name__}: {reason}") from error
    finally:
        logger.setLevel(level)
    assert program is not None  # dynamo always returns one
    return program
