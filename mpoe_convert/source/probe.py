"""Probe an FFN module of the dense model: run it on random inputs to learn what tensor names do not say."""

from __future__ import annotations

import copy
import inspect
from typing import TYPE_CHECKING, Any, cast

from ..errors import FamilyError
from ..options import called

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel
    from transformers.pytorch_utils import Conv1D

    Linear = nn.Linear | Conv1D


# Sizes of a trial: different, so that a wrong order fails; even, so that halving works.
HIDDEN, INNER = 6, 10


def describe_slot(base: PreTrainedModel, layer: str, slot: str, projections: tuple[str, ...]) -> dict:
    """The fields of a family row for a self-contained FFN module.

    Args:
        base: the model without its head, on the meta device.
        layer: module path of one layer in it.
        slot: path of the FFN in the layer.
        projections: names of the linear layers in the slot, (up, down) or (gate, up, down); `up` of two may
            hold gate and up, one above the other.

    Raises:
        FamilyError: there is no such layer or projection, or no single activation, or the module computes
            something else than an FFN of these projections.
    """
    from transformers.pytorch_utils import Conv1D

    where = f"{layer}.{slot}"
    module, linears = _find(base, where, projections)
    activation, dropouts = _beside(module, where, projections)
    takes = list(inspect.signature(module.forward).parameters)[1:]
    if takes not in ([], ["residual"]):
        raise FamilyError(
            f"{where} takes {', '.join(takes)} beside the hidden states; a mixture takes nothing else"
        )
    row: dict[str, Any] = {"activation": activation, "transposed": isinstance(linears[0], Conv1D)}
    row["adds_residual"] = bool(takes)
    rates = [name for name, value in vars(module).items() if isinstance(value, float) and 0 < value < 1]
    places = [{}] if not dropouts else []
    places += [{place: name} for name in dropouts or rates for place in ("outer_dropout", "inner_dropout")]
    forms = [{}] if len(projections) == 3 else [{}, {"fused": True}]
    for found in (row | place | form for form in forms for place in places):
        if _computes_an_ffn(module, projections, found):
            return found
    formula = "down(act(gate(x)) * up(x))" if len(projections) == 3 else "down(act(up(x)))"
    raise FamilyError(
        f"{where} of {_name(base)} does not compute {formula} with "
        f"{called('ffn')} …:{','.join(projections)}; name them in the order gate, up, down (or up, down). "
        "If they are, the module does more, such as scaling, and cannot be converted"
    )


def _find(
    base: PreTrainedModel, where: str, projections: tuple[str, ...]
) -> tuple[nn.Module, list[nn.Module]]:
    """The module at a path, and its projections. Raises FamilyError unless they are linear layers there."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    try:
        module = base.get_submodule(where)
        linears = [module.get_submodule(name) for name in projections]
    except AttributeError as error:
        raise FamilyError(
            f"{called('ffn')} does not fit {_name(base)}: {error}; expected names below it, so without "
            f"{base.base_model_prefix}."
        ) from None
    if not all(isinstance(linear, (nn.Linear, Conv1D)) for linear in linears):
        kinds = sorted({type(linear).__name__ for linear in linears})
        raise FamilyError(
            f"{called('ffn')} names {', '.join(projections)} of types {kinds}; expected Linear or Conv1D"
        )
    return module, linears


def _beside(module: nn.Module, where: str, projections: tuple[str, ...]) -> tuple[str, list[str]]:
    """(name of the activation, names of dropouts) of what a module holds beside its projections.

    Raises:
        FamilyError: it holds more.
    """
    from torch import nn

    rest = {name: child for name, child in module.named_children() if name not in projections}
    dropouts = [name for name, child in rest.items() if isinstance(child, nn.Dropout)]
    activations = [name for name in rest if name not in dropouts]
    if len(activations) != 1 or len(dropouts) > 1:
        raise FamilyError(
            f"{where} holds {sorted(rest)} beside the projections; expected one activation and at most one "
            "dropout"
        )
    tensors = [*module.named_parameters(), *module.named_buffers()]
    if own := [name for name, _ in tensors if name.partition(".")[0] not in projections]:
        raise FamilyError(
            f"{where} holds tensors beside the projections: {', '.join(own)}; expected an activation "
            "and nothing else that is learnt, because a mixture has no place for them"
        )
    return activations[0], dropouts


def _name(model: PreTrainedModel) -> str:
    whose = "transformers'" if type(model).__module__.startswith("transformers.") else "the source's"
    return f"{whose} {type(model).__name__}"


def _computes_an_ffn(module: nn.Module, projections: tuple[str, ...], row: dict) -> bool:
    """Run the slot's own code and the formula on the CPU, with small random weights of small sizes.

    Both in evaluation and in training. To find where the dropout acts, put something visible in its place (a
    module that adds 1, or a rate of 1, which leaves zeros) and see which formula still matches.
    """
    import torch

    slot = copy.deepcopy(module)
    *gate, up, down = cast("list[Linear]", [slot.get_submodule(name) for name in projections])
    act = slot.get_submodule(row["activation"])
    place, dropout = next(((k, v) for k, v in row.items() if k.endswith("_dropout")), (None, None))
    is_rate = dropout is not None and not isinstance(getattr(slot, dropout), torch.nn.Module)
    generator = torch.Generator().manual_seed(0)
    for linear in (*gate, up, down):
        _shrink(linear, linear is down, row, generator, with_bias=is_rate)
    if dropout is not None:
        setattr(slot, dropout, 1.0 if is_rate else _add_one())
    x, residual = torch.randn(2, 1, 3, HIDDEN, generator=generator)

    def apply(layer: Linear, x: torch.Tensor) -> torch.Tensor:
        """Multiply by the layer's weight, whatever a custom class of linear layers does beside that."""
        y = x @ (layer.weight if row["transposed"] else layer.weight.T)
        return y if layer.bias is None else y + layer.bias

    def drop(y: torch.Tensor, here: str) -> torch.Tensor:
        if place != here:
            return y
        return y * (not slot.training) if is_rate else y + 1

    def expect() -> torch.Tensor:
        if row.get("fused"):
            gates, values = apply(up, x).chunk(2, dim=-1)
            y = act(gates) * values
        else:
            y = act(apply(gate[0], x)) * apply(up, x) if gate else act(apply(up, x))
        y = drop(apply(down, drop(y, "inner_dropout")), "outer_dropout")
        return y + residual if row["adds_residual"] else y

    inputs = (x, residual) if row["adds_residual"] else (x,)
    try:
        with torch.no_grad():
            pairs = [(slot.train(mode)(*inputs), expect()) for mode in (False, True)]
        return all(torch.allclose(found, expected, rtol=1e-4, atol=1e-4) for found, expected in pairs)
    except Exception:  # the model's code may need other inputs or shapes, and may raise anything
        return False


def _shrink(linear: Linear, leads_back: bool, row: dict, generator: torch.Generator, with_bias: bool) -> None:
    """Give a layer a small random matrix, and a bias if it has one or `with_bias` asks for one."""
    import torch
    from transformers.pytorch_utils import Conv1D

    in_features, out_features = (INNER, HIDDEN) if leads_back else (HIDDEN, INNER)
    if row.get("fused") and not leads_back:
        out_features *= 2
    shape = (in_features, out_features) if row["transposed"] else (out_features, in_features)
    linear.weight = torch.nn.Parameter(torch.randn(shape, generator=generator))
    if linear.bias is not None or with_bias:
        linear.bias = torch.nn.Parameter(torch.randn(out_features, generator=generator))
    if isinstance(linear, Conv1D):
        linear.nf, linear.nx = out_features, in_features


def _add_one() -> nn.Module:
    import torch

    class AddOne(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    return AddOne()
