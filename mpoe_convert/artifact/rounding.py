"""Rounded cores as files hold them: the format `pack-quantized` of compressed-tensors.

A large core (see `runtime/linears.py`) is stored as the weight (o * r, l * i) of its linear layer; one that
experts own as a weight for each, of the expert's size. A weight is stored as integers of 8 or 4 bits packed
into int32 (`weight_packed`), scales (`weight_scale`), and its shape (`weight_shape`); it is integer * scale.
At 8 bits a row has one scale; at 4 bits a group of neighbours in a row has one, or a whole row whose width no
number from 32 to 128 divides.
transformers reads it by the library compressed-tensors, which defines the format.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PACKED, SCALE, SHAPE = "weight_packed", "weight_scale", "weight_shape"
BITS = (8, 4)
# At 4 bits groups of about so many neighbours share a scale, of no fewer and no more than these.
GROUP, GROUP_SIZES = 64, range(32, 129)
Specs = dict[str, tuple[tuple[int, ...], str]]
# By the names of the linear layers of a core, the matrices (l * i, o * r) whose transposes they have.
Layers = Mapping[str, tuple[int, int]]


def group_size(width: int, bits: int) -> int:
    """Entries of a row of `width` that share a scale.

    At 8 bits all of them; below, of the divisors of `width` from 32 to 128 the nearest to 64, else all.
    """
    divisors = () if bits == 8 else (size for size in GROUP_SIZES if width % size == 0)
    return min(divisors, key=lambda size: abs(size - GROUP), default=width)


def layers_of(name: str, chain: Any, number: int) -> Layers:
    """The linear layers of a chain's core of this name and number; one that experts own has one for each."""
    return {name + tail: shape for tail, shape in chain.layer_shapes(number).items()}


def stored_specs(layers: Layers, dtype: str, bits: int) -> Specs:
    """{name: (shape, dtype)} of the tensors that stand for a core."""
    specs: Specs = {}
    for layer, (width, height) in layers.items():
        specs[f"{layer}.{PACKED}"] = ((height, -(-width * bits // 32)), "int32")
        specs[f"{layer}.{SCALE}"] = ((height, width // group_size(width, bits)), dtype)
        specs[f"{layer}.{SHAPE}"] = ((2,), "int64")
    return specs


def round_core(layers: Layers, core: Tensor, bits: int) -> tuple[dict[str, Tensor], Tensor]:
    """(the tensors of `stored_specs`, the core that they stand for, in its dtype)."""
    import torch

    made: dict[str, Tensor] = {}
    exact = core.new_empty(core.shape)
    sizes = [rows * cols for rows, cols in layers.values()]
    parts = zip(core.flatten().split(sizes), exact.view(-1).split(sizes), strict=True)
    for (layer, shape), (part, rounded) in zip(layers.items(), parts, strict=True):
        weight = part.view(shape).mT.float()
        codes, scales = round_rows(weight, group_size(weight.shape[1], bits), bits, core.dtype)
        made[f"{layer}.{PACKED}"] = pack(codes, bits)
        made[f"{layer}.{SCALE}"] = scales
        made[f"{layer}.{SHAPE}"] = torch.tensor(weight.shape)
        rounded.view(shape).copy_(dequantise(codes, scales).mT)
    return made, exact


def round_rows(weight: Tensor, size: int, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(integers, scales in this dtype) of a weight (rows, cols), to the nearest in groups of this size.

    The largest number of a group is the largest integer, 127 or 7, up to the rounding of its scale.
    """
    groups = weight.unflatten(-1, (-1, size))
    largest = 2 ** (bits - 1) - 1
    scales = (groups.abs().amax(-1) / largest).to(dtype)
    steps = scales.to(weight.dtype).unsqueeze(-1)
    codes = (groups / steps.where(steps > 0, 1)).round().clamp(-largest - 1, largest)
    return codes.flatten(-2).char(), scales.contiguous()


def dequantise(codes: Tensor, scales: Tensor) -> Tensor:
    """The reverse of `round_rows`: (rows, cols) in the dtype of the scales."""
    groups = codes.unflatten(-1, (scales.shape[-1], -1)).to(scales.dtype)
    return (groups * scales.unsqueeze(-1)).flatten(-2)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Integers (rows, cols), shifted to be no less than 0, into int32 (rows, cols * bits / 32).

    The first of a word is in its lowest bits.
    """
    import torch
    from torch.nn.functional import pad

    per_word = 32 // bits
    words = pad(codes.to(torch.int64) + 2 ** (bits - 1), (0, -codes.shape[-1] % per_word))
    shifts = bits * torch.arange(per_word)
    words = (words.unflatten(-1, (-1, per_word)) << shifts).sum(-1)  # below 2**32
    return (words - ((words >> 31) << 32)).to(torch.int32)


def unpack(words: Tensor, bits: int, width: int) -> Tensor:
    """The reverse of `pack`; `width` is the number of columns."""
    import torch

    shifts = bits * torch.arange(32 // bits)
    codes = (words.to(torch.int64).unsqueeze(-1) >> shifts) & (2**bits - 1)
    return (codes.flatten(-2)[..., :width] - 2 ** (bits - 1)).to(torch.int8)


def read_core(read: Callable[[str], Tensor], layers: Layers, bits: int, shape: tuple[int, ...]) -> Tensor:
    """A core of this shape, as it would be stored if it were not rounded.

    Args:
        read: called with the name of a stored tensor.
    """
    import torch

    found = []
    for layer, (width, _) in layers.items():
        codes = unpack(read(f"{layer}.{PACKED}"), bits, width)
        found.append(dequantise(codes, read(f"{layer}.{SCALE}")).mT.flatten())
    return torch.cat(found).view(shape)


def bits_of(config: dict) -> int:
    """The bits of an artifact's rounded cores, from config.json; 0: none are rounded as `--bits` does."""
    found = config.get("quantization_config")
    if not isinstance(found, dict) or found.get("format") != "pack-quantized":
        return 0
    groups = found.get("config_groups")
    first = next(iter(groups.values()), None) if isinstance(groups, dict) else None
    bits = ((first or {}).get("weights") or {}).get("num_bits") if isinstance(first, dict) else None
    return bits if bits in BITS else 0


def rounding_config(targets: Mapping[int, str], bits: int) -> dict:
    """`quantization_config` of config.json.

    Args:
        targets: size of a group, 0 for a whole row -> regular expression of the modules with such groups.
    """
    groups = {}
    for number, (size, names) in enumerate(sorted(targets.items())):
        weights = {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False}
        weights |= {"strategy": "group", "group_size": size} if size else {"strategy": "channel"}
        groups[f"group_{number}"] = {
            "targets": [f"re:{names}"],
            "weights": weights,
            "input_activations": None,
            "output_activations": None,
        }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [],
    }
