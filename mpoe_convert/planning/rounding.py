"""Which cores of a plan are rounded, what stands for them, and what the source would take, rounded alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..artifact.rounding import BITS, Specs, group_size, rounding_config, stored_specs
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


def rounded_specs(ffn: FFNPlan, bits: int | None) -> Specs:
    """{name: (shape, dtype)} of an FFN's tensors as stored, the large cores rounded."""
    if bits is None:
        return ffn.tensors
    large = {name for matrix in ffn.matrices for name in large_cores(matrix)}
    found: Specs = {}
    for name, (shape, dtype) in ffn.tensors.items():
        found |= stored_specs(name, shape, dtype, bits) if name in large else {name: (shape, dtype)}
    return found


def config_of(plan: Plan, bits: int) -> dict:
    """`quantization_config` of config.json."""
    targets: dict[int, list[str]] = {}
    for ffn in plan.ffns:
        start = r"(.*\.)?" + re.escape(ffn.ffn.path) + r"\..*"
        for matrix in ffn.matrices:
            for name in large_cores(matrix):
                width = group_size(ffn.tensors[name][0][-2], bits)
                tail = re.escape(name.removeprefix(f"{ffn.ffn.key}."))
                targets.setdefault(width if bits == 4 else 0, []).append(rf"{start}\b{tail}(\.\d+)?$")
    return rounding_config(targets, bits)


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
    rounded = "" if bits is None else f", large cores at {bits} bits"
    return f"Bytes of what is converted: {mine}{rounded}; the source's matrices, only rounded, take {alone}."
