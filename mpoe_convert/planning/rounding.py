"""Which cores of a plan are rounded, what stands for them, and what the source would take, rounded alone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from math import prod
from typing import TYPE_CHECKING

from ..artifact.rounding import (
    BITS,
    Layers,
    Specs,
    group_size,
    layers_of,
    rounding_config,
    stored_specs,
)
from ..options import called
from ..runtime.shapes import modeling
from ..source.safetensors_file import DTYPE2BYTES
from ..tables import size

if TYPE_CHECKING:
    from .plan import FFNPlan, MatrixPlan, Plan


def large_cores(matrix: MatrixPlan) -> dict[str, Layers]:
    """{name: its linear layers} of a projection's large cores."""
    found = {}
    for number, term in enumerate(matrix.spec["terms"]):
        chain = modeling().Chain(term, matrix.num_experts)
        for k, core in enumerate(chain.core_names):
            if chain.large[k]:
                name = f"{matrix.name}.terms.{number}.{core}"
                found[name] = layers_of(name, chain, k)
    return found


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
    large = {name: layers for matrix in ffn.matrices for name, layers in large_cores(matrix).items()}
    if bits is None or not large:
        return 0
    rounded = sum(prod(ffn.tensors[name][0]) * DTYPE2BYTES[ffn.tensors[name][1]] for name in large)
    packed = sum(prod(ffn.tensors[name][0]) * bits // 8 for name in large)
    core = (4 + 4 + 3 * 8) * max(prod(shape) for layers in large.values() for shape in layers.values())
    compared = 4 * 4 * max(matrix.rows * matrix.cols for matrix in ffn.matrices)
    return rounded + packed + max(core, compared)


def without_large_cores(plan: Plan) -> str | None:
    """A warning, if there is nothing that `bits` could round."""
    if plan.recipe.bits is None or any(map(large_cores, plan.matrices)):
        return None
    return (
        f"{called('bits')} rounds nothing: no core has 32 x 32 numbers, and a 64th of its matrix. Leave it "
        "out, or keep more."
    )


def rounded_specs(ffn: FFNPlan, bits: int | None) -> Specs:
    """{name: (shape, dtype)} of an FFN's tensors as stored, the large cores rounded."""
    if bits is None:
        return ffn.tensors
    large = {name: layers for matrix in ffn.matrices for name, layers in large_cores(matrix).items()}
    found: Specs = {}
    for name, (shape, dtype) in ffn.tensors.items():
        found |= stored_specs(large[name], dtype, bits) if name in large else {name: (shape, dtype)}
    return found


def config_of(plan: Plan, bits: int) -> dict | None:
    """`quantization_config` of config.json; None: no core is rounded."""
    found: dict[int, dict[str, list[str]]] = {}
    for ffn in plan.ffns:
        for name, layers in (pair for matrix in ffn.matrices for pair in large_cores(matrix).items()):
            start = re.escape(name.removeprefix(f"{ffn.ffn.key}."))
            for group, tail in _by_group(name, layers, bits):
                found.setdefault(group, {}).setdefault(ffn.ffn.path, []).append(start + tail)
    return (
        rounding_config({group: _expression(tails) for group, tails in found.items()}, bits)
        if found
        else None
    )


def _by_group(name: str, layers: Layers, bits: int) -> Iterator[tuple[int, str]]:
    """(size of the groups, regular expression of what follows the core's name) of the layers of a core.

    The size is 0 where a row is one group: however long rows are, one description is for all of them.
    """
    experts: dict[int, list[str]] = {}
    for layer, (width, _) in layers.items():
        group = group_size(width, bits)
        experts.setdefault(group if group < width else 0, []).append(layer.removeprefix(name)[1:])
    for group, numbers in experts.items():
        some = rf"\.({'|'.join(numbers)})" if len(experts) > 1 else r"\.\d+"
        yield group, some if numbers[0] else ""


def _expression(tails: dict[str, list[str]]) -> str:
    """One regular expression for layers, by the paths of their FFNs.

    One for all: an encoder that is loaded alone has none of the decoder's layers, and compressed-tensors
    complains of expressions that match nothing.
    """
    paths: dict[tuple[str, ...], list[str]] = {}
    for path, own in tails.items():
        paths.setdefault(tuple(own), []).append(re.escape(path))
    each = [rf"{_any(found)}\..*\b{_any(own)}" for own, found in paths.items()]
    return rf"(.*\.)?{_any(each)}$"


def _any(expressions: Sequence[str]) -> str:
    """What matches one of these. Without needless groups: re tries what alternatives begin with only once."""
    return expressions[0] if len(expressions) == 1 else f"({'|'.join(expressions)})"


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
