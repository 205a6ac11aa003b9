"""Which cores of a plan are rounded, what stands for them, and what the source would take, rounded alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from math import prod
from typing import TYPE_CHECKING

from ..artifact.rounding import BITS, Specs, group_size, rounding_config, stored_specs
from ..options import called
from ..runtime.shapes import modeling
from ..source.safetensors_file import DTYPE2BYTES
from ..tables import size

if TYPE_CHECKING:
    from .plan import FFNPlan, MatrixPlan, Plan


def large_cores(matrix: MatrixPlan) -> Iterator[str]:
    """Names of a projection's large cores."""
    for number, term in enumerate(matrix.spec["terms"]):
        chain = modeling().Chain(term, matrix.num_experts)
        for core, large in zip(chain.core_names, chain.large, strict=True):
            if large:
                yield f"{matrix.name}.terms.{number}.{core}"


def rounded_share(plan: Plan) -> float:
    """How many of the numbers of the converted FFNs are in large cores, which `bits` rounds."""
    sizes = {name: prod(shape) for ffn in plan.ffns for name, (shape, _) in ffn.tensors.items()}
    return sum(sizes[name] for matrix in plan.matrices for name in large_cores(matrix)) / sum(sizes.values())


def rounding_bytes(ffn: FFNPlan, bits: int | None) -> int:
    """Estimated memory that rounding takes beside an FFN's tensors: large cores as rounded, packed, in work.

    A core in work, of one expert, is held as floats, as their quotients by the steps, and as integers of 64
    bits, padded and shifted. Then an expert's matrix is held as it was, as it is, their difference, and its
    square.
    """
    large = [name for matrix in ffn.matrices for name in large_cores(matrix)]
    if bits is None or not large:
        return 0
    shapes = [ffn.tensors[name][0] for name in large]
    rounded = sum(prod(ffn.tensors[name][0]) * DTYPE2BYTES[ffn.tensors[name][1]] for name in large)
    packed = sum(prod(shape) * bits // 8 for shape in shapes)
    core = (4 + 4 + 3 * 8) * max(prod(shape[-2:]) for shape in shapes)
    compared = 4 * 4 * max(matrix.rows * matrix.cols for matrix in ffn.matrices)
    return rounded + packed + max(core, compared)


def without_large_cores(plan: Plan) -> str | None:
    """A warning, if there is nothing that `bits` could round."""
    if plan.recipe.bits is None or any(True for matrix in plan.matrices for _ in large_cores(matrix)):
        return None
    return (
        f"{called('bits')} rounds nothing: no core has 32 x 32 numbers, and a 64th of its matrix. Leave it "
        "out, or keep more."
    )


def rounded_specs(ffn: FFNPlan, bits: int | None) -> Specs:
    """{name: (shape, dtype)} of an FFN's tensors as stored, the large cores rounded."""
    if bits is None:
        return ffn.tensors
    large = {name for matrix in ffn.matrices for name in large_cores(matrix)}
    found: Specs = {}
    for name, (shape, dtype) in ffn.tensors.items():
        found |= stored_specs(name, shape, dtype, bits) if name in large else {name: (shape, dtype)}
    return found


def config_of(plan: Plan, bits: int) -> dict | None:
    """`quantization_config` of config.json; None: no core is rounded."""
    paths: dict[tuple[int, str], list[str]] = {}
    for ffn in plan.ffns:
        for matrix in ffn.matrices:
            for name in large_cores(matrix):
                shape = ffn.tensors[name][0]
                tail = re.escape(name.removeprefix(f"{ffn.ffn.key}.")) + (r"\.\d+" if len(shape) == 3 else "")
                size = group_size(shape[-2], bits) if bits == 4 else 0
                paths.setdefault((size, tail), []).append(re.escape(ffn.ffn.path))
    targets: dict[int, list[str]] = {}
    for (size, tail), found in paths.items():
        # One expression for all layers: an encoder that is loaded alone has none of the decoder's.
        targets.setdefault(size, []).append(rf"(.*\.)?({'|'.join(found)})\..*\b{tail}$")
    return rounding_config(targets, bits) if targets else None


def source_bytes(plan: Plan, bits: int) -> int:
    """Bytes of the source's matrices that are converted, rounded alone: the same codes and scales."""
    total = 0
    for matrix in plan.matrices:
        width = matrix.rows
        groups = width // group_size(width, bits)
        row = 4 * -(-width * bits // 32) + groups * DTYPE2BYTES[matrix.dtype]
        one = matrix.rows * matrix.cols + (matrix.cols if matrix.source.bias else 0)
        total += matrix.dense_params // one * matrix.cols * row  # of a mixture it is that of all experts
    return total


def rounding_in_words(plan: Plan) -> str:
    """The bytes of what is converted, beside those of the source's rounded alone."""
    alone = " and ".join(f"{size(source_bytes(plan, bits))} at {bits} bits" for bits in BITS)
    mine, bits = size(plan.ffn_totals.stored_bytes), plan.recipe.bits
    rounded = "" if bits is None else f", {rounded_share(plan):.1%} of the numbers at {bits} bits"
    return f"Bytes of what is converted: {mine}{rounded}; the source's matrices, only rounded, take {alone}."
