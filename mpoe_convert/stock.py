"""Looking at a stock transformers module, built on the meta device, for what names cannot tell."""

from __future__ import annotations

import copy
import inspect
import re
from typing import TYPE_CHECKING

from .errors import FamilyError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


def knows(model_type: str) -> bool:
    """Whether the installed transformers has this model type."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return model_type in CONFIG_MAPPING_NAMES


def stock_class(config: dict) -> type | None:
    """The transformers class that the config names first, if this release has it."""
    import transformers

    for name in config.get("architectures") or ():
        if isinstance(cls := getattr(transformers, name, None), type):
            return cls
    return None


def build(config: dict, cls: type | None = None) -> PreTrainedModel:
    """The stock model of a config.json on the meta device, without memory; by default AutoModel's class.

    Raises:
        FamilyError: transformers has no such model, or cannot build it from this config.
    """
    import torch
    from transformers import CONFIG_MAPPING, AutoModel

    model_type = config["model_type"]
    if not knows(model_type):
        raise FamilyError(f"transformers has no model type {model_type!r}; its code cannot be subclassed")
    try:
        with torch.device("meta"):
            stock = CONFIG_MAPPING[model_type].from_dict(config)
            return cls(stock) if cls else AutoModel.from_config(stock)
    except Exception as error:  # whatever the stock code thinks of this config
        raise FamilyError(
            f"transformers cannot build a {model_type} from this config.json "
            f"({type(error).__name__}: {error}), so what it computes cannot be told; repair the config"
        ) from error


def runs_per_token(config: dict, path: str) -> int:
    """How often a token passes a module: once, but ALBERT walks through all layers with a few groups."""
    match = re.search(r"(?:^|\.)albert_layer_groups\.(\d+)\.", path)
    if not match:
        return 1
    from transformers import AlbertConfig

    albert = AlbertConfig.from_dict(config)
    layers_each = albert.num_hidden_layers / albert.num_hidden_groups
    return sum(int(layer / layers_each) == int(match[1]) for layer in range(albert.num_hidden_layers))


def dense_flops_per_token(config: dict) -> int:
    """Of all Linear, Conv1D and Conv2d layers of the stock model, as `planning.Totals` counts them.

    Raises:
        FamilyError: as `build`.
    """
    from torch import nn
    from transformers import PreTrainedModel
    from transformers.pytorch_utils import Conv1D

    cls = stock_class(config)
    model = build(config, cls if cls and issubclass(cls, PreTrainedModel) else None)
    return sum(
        2 * module.weight.numel() * runs_per_token(config, path)
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D, nn.Conv2d))
    )


def describe_slot(model_type: str, config: dict, layer: str, slot: str, projections: tuple[str, ...]) -> dict:
    """The fields of a family row for a self-contained FFN module of a stock model.

    Args:
        model_type: the checkpoint's own; its class must be part of transformers.
        config: the checkpoint's own; some defaults are no model.
        layer: module path of one layer below the base model.
        slot: path of the FFN in the layer.
        projections: names of the linear layers in the slot, (up, down) or (gate, up, down).

    Raises:
        FamilyError: there is no such model, layer or projection, or no single activation, or the module
            computes something else than an FFN of these projections.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    model = build(config | {"model_type": model_type})
    try:
        module = model.get_submodule(f"{layer}.{slot}")
        linears = [module.get_submodule(name) for name in projections]
    except AttributeError as error:
        raise FamilyError(
            f"--ffn does not fit transformers' {type(model).__name__}: {error}; expected names below it, so "
            f"without {model.base_model_prefix}."
        ) from None
    if not all(isinstance(linear, (nn.Linear, Conv1D)) for linear in linears):
        kinds = sorted({type(linear).__name__ for linear in linears})
        raise FamilyError(f"--ffn names {', '.join(projections)} of types {kinds}; expected Linear or Conv1D")
    rest = {name: child for name, child in module.named_children() if name not in projections}
    dropouts = [name for name, child in rest.items() if isinstance(child, nn.Dropout)]
    activations = [name for name in rest if name not in dropouts]
    if len(activations) != 1 or len(dropouts) > 1:
        raise FamilyError(
            f"{layer}.{slot} holds {sorted(rest)} beside the projections; expected one activation and "
            "at most one dropout, so what it computes cannot be told from its parts"
        )
    own = [*module.named_parameters(), *module.named_buffers()]
    if own := [name for name, _ in own if name.partition(".")[0] not in projections]:
        raise FamilyError(
            f"{layer}.{slot} holds tensors beside the projections: {', '.join(own)}; expected an activation "
            "and nothing else that is learnt, because a mixture has no place for them"
        )
    row = {"activation": activations[0], "transposed": isinstance(linears[0], Conv1D)}
    if dropouts:
        row["outer_dropout"] = dropouts[0]
    row["adds_residual"] = "residual" in inspect.signature(module.forward).parameters
    if not _computes_an_ffn(module, projections, row):
        formula = "down(act(gate(x)) * up(x))" if len(projections) == 3 else "down(act(up(x)))"
        raise FamilyError(
            f"{layer}.{slot} of transformers' {type(model).__name__} does not compute {formula} with "
            f"--ffn …:{','.join(projections)}; name them in the order gate, up, down (or up, down). If they "
            "are, the module does more, such as scaling, and cannot be converted"
        )
    return row


def _computes_an_ffn(module: nn.Module, projections: tuple[str, ...], row: dict) -> bool:
    """Run the slot's own code and the formula on the CPU, with small random weights of small sizes."""
    import torch

    slot = copy.deepcopy(module).eval()
    generator = torch.Generator().manual_seed(0)
    hidden, inner = 6, 10  # different, so that a wrong order fails; even, so that halving works
    *gate, up, down = (slot.get_submodule(name) for name in projections)
    for linear in (*gate, up, down):
        in_features, out_features = (inner, hidden) if linear is down else (hidden, inner)
        shape = (in_features, out_features) if row["transposed"] else (out_features, in_features)
        linear.weight = torch.nn.Parameter(torch.randn(shape, generator=generator))
        if linear.bias is not None:
            linear.bias = torch.nn.Parameter(torch.randn(out_features, generator=generator))
        if row["transposed"]:
            linear.nf, linear.nx = out_features, in_features
    x, residual = torch.randn(2, 1, 3, hidden, generator=generator)
    act = slot.get_submodule(row["activation"])
    try:
        with torch.no_grad():
            expected = down(act(gate[0](x)) * up(x) if gate else act(up(x)))
            if row["adds_residual"]:
                found = slot(x, residual)
                expected = expected + residual
            else:
                found = slot(x)
        return torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
    except Exception:  # whatever the stock code wants beside the hidden states, or other shapes
        return False
