"""Looking at a stock transformers module, built on the meta device, for what names cannot tell."""

from __future__ import annotations

import inspect

from .errors import FamilyError


def describe_slot(model_type: str, config: dict, layer: str, slot: str, projections: tuple[str, ...]) -> dict:
    """The fields of a family row for a self-contained FFN module of a stock model.

    Args:
        model_type: the checkpoint's own; its class must be part of transformers.
        config: the checkpoint's own; some defaults are no model.
        layer: module path of one layer below the base model.
        slot: path of the FFN in the layer.
        projections: names of the linear layers in the slot, (up, down) or (gate, up, down).

    Raises:
        FamilyError: there is no such model, layer or projection, or no single activation.
    """
    import torch
    from torch import nn
    from transformers import CONFIG_MAPPING, AutoModel
    from transformers.pytorch_utils import Conv1D

    if model_type not in CONFIG_MAPPING:
        raise FamilyError(f"transformers has no model type {model_type!r}; its code cannot be subclassed")
    try:
        with torch.device("meta"):
            model = AutoModel.from_config(CONFIG_MAPPING[model_type].from_dict(config))
    except Exception as error:  # whatever the stock code thinks of this config
        raise FamilyError(
            f"transformers cannot build a {model_type} from this config.json "
            f"({type(error).__name__}: {error}), so --ffn cannot be checked; repair the config"
        ) from error
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
    parameters = [p for p in inspect.signature(module.forward).parameters]
    if len(activations) != 1 or len(dropouts) > 1:
        raise FamilyError(
            f"{layer}.{slot} holds {sorted(rest)} beside the projections; expected one activation and "
            "at most one dropout, so what it computes cannot be told from its parts"
        )
    row = {"activation": activations[0], "transposed": isinstance(linears[0], Conv1D)}
    if dropouts:
        row["outer_dropout"] = dropouts[0]
    row["adds_residual"] = "residual" in parameters
    return row
