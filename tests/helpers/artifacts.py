"""Artifacts as training leaves them."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from helpers.models import generative
from helpers.tiny import save_tiny
from mpoe_convert import Recipe, convert
from mpoe_convert.exports.moe_architectures import TARGET_OF

# Ways in which a model can be routed, by what a target can hold.
ROUTING = {"renormalised": {}, "raw": {"router_combine": "raw"}}


def converted(model_type: str, folder: Path, way: str = "renormalised", **recipe) -> Path:
    """An artifact whose experts differ and whose routers prefer some of them, as after training."""
    dense = save_tiny(model_type, generative(model_type), folder / "dense")
    top_k = 2 if TARGET_OF[model_type].top_k else 1
    convert(Recipe(str(dense), **{"experts": 3, "top_k": top_k, "bond_dim": 4} | recipe), folder / "out")
    perturb(folder / "out")
    set_options(folder / "out", **ROUTING[way])
    return folder / "out"


def set_options(out: Path, **options) -> None:
    path = out / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | options))


def perturb(out: Path, seed: int = 1) -> None:
    """Move every tensor of the mixtures, so that no two experts are alike, as training does."""
    generator = torch.Generator().manual_seed(seed)
    for path in out.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if any(part in name for part in (".aux_", ".central_", ".router.", "up.bias", "down.bias")):
                tensor += 0.1 * torch.randn(tensor.shape, generator=generator).to(tensor)
        save_file(tensors, path, metadata={"format": "pt"})
