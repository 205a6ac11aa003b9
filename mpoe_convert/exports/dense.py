"""One expert, or an average of them, back in the architecture of the base: the inverse of a conversion."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING

from .. import exports
from ..errors import ExportError, RecipeError
from ..options import again, default_of, described, in_order, option
from ..text_options import TextSource
from . import Checked, ExportPlan, Made, Part

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from ..converted import Converted, Mixture
    from . import Export

Shares = Mapping[str, Mapping[int, float]]

ABOUT = "one expert, or the average of all, in the architecture of the base model"
NEEDS: dict[str, tuple[str, ...]] = {}


@described
class Options(exports.Options, TextSource):
    """Which expert, or which average of them."""

    expert: int | None = option(
        None, "Number of the expert to write.", group="Target", at_least=0, default_text="0"
    )
    calibrate: tuple[str, ...] = again(
        TextSource,
        "calibrate",
        "Write the average of the experts, weighted by the combine weights that the routers give them on "
        "this text: files or Hub datasets, as for `finetune --data`, or builtin (the language reference of "
        "Python). Repeatable.",
    )

    def check_together(self) -> None:
        if self.expert is not None and self.calibrate:
            raise RecipeError("expert and calibrate given; expected one expert, or the average by a text")
        given = [each.name for each in in_order(TextSource) if getattr(self, each.name) != default_of(each)]
        if given and not self.calibrate:
            raise RecipeError(f"{given[0]} given without calibrate; expected the text that it is about")


def plan(source: Converted, request: Export, shares: Shares | None, output: Path) -> ExportPlan:
    """See `exports`.

    Args:
        shares: by the paths of the layers, what every expert counts in the average; None: one expert.
    """
    expert = request.expert or 0
    if not 0 <= expert < source.num_experts:
        raise RecipeError(
            f"expert is {expert}; {source.checkpoint.source} has {source.num_experts}, expected 0 to "
            f"{source.num_experts - 1}"
        )
    if shares is None:
        shares = {mixture.path: {expert: 1.0} for mixture in source.mixtures}
        title, about = f"expert {expert}", f"Every mixture was replaced by its expert {expert}"
    else:
        title = "the average of the experts"
        about = (
            "Every mixture was replaced by the average of its experts, weighted by the combine weights that "
            f"its router gave them on {', '.join(request.calibrate)}"
        )
    is_own = source.architecture.is_own
    classes = "the code that lies beside it" if is_own else "the stock classes of transformers"
    return ExportPlan(
        parts=(Part("", {"config.json": source.config}, tuple(dense_tensors(source, shares))),),
        model_type=source.model_type,
        title=title,
        about=f"{about}: this is a dense {source.model_type} again, of {classes}.",
        usage=usage(source),
        checked=Checked(experts=None if request.calibrate else (expert,), same=not request.calibrate),
    )


def usage(source: Converted, model: str = "path/to/this") -> str:
    from ..card import main_auto_class

    auto = main_auto_class(source.config, source.model_type)
    return f"from transformers import {auto}\n\nmodel = {loading(source, model)}"


def loading(source: Converted, model: str) -> str:
    """The expression that loads it, in Python."""
    from ..card import main_auto_class

    auto = main_auto_class(source.config, source.model_type)
    trust = ", trust_remote_code=True" if source.architecture.is_own else ""
    return f'{auto}.from_pretrained("{model}"{trust})'


def dense_tensors(source: Converted, shares: Shares) -> Iterator[Made]:
    """The tensors of the dense model: those of an FFN stand where the first of its mixture's stood.

    Raises:
        ExportError: the experts are adapters that have been trained (their output is not zero).
    """
    done = set()
    for name in source.checkpoint.tensors:
        mixture = source.owner(name)
        if mixture is None:
            yield copied(source, name)
        elif mixture.key not in done:
            done.add(mixture.key)
            yield from _ffn(source, mixture, shares[mixture.path])


def copied(source: Converted, name: str, new_name: str | None = None) -> Made:
    """A tensor as it is."""
    info = source.checkpoint.tensors[name]
    return Made(new_name or name, info.shape, info.dtype, partial(source.checkpoint.read, name))


def check_adapters(source: Converted, mixture: Mixture, shares: Mapping[int, float]) -> None:
    """Adapters that add nothing, as right after conversion, are left out; raises ExportError for others."""
    if not source.adapters_are_idle(mixture, shares):
        raise ExportError(
            f"the experts of {mixture.key} are adapters that have been trained: y + gelu(y A) B behind the "
            "FFN is no matrix, so no other architecture holds it; expected experts of another kind"
        )


def _ffn(source: Converted, mixture: Mixture, shares: Mapping[int, float]) -> Iterator[Made]:
    check_adapters(source, mixture, shares)
    for name, roles in mixture.roles_by(mixture.dense_name).items():
        rows, cols = mixture.size(roles[0])[0], sum(mixture.size(role)[1] for role in roles)
        shape = (rows, cols) if source.family.transposed else (cols, rows)
        dtype = source.dtype(mixture, roles[0])
        yield Made(f"{name}.weight", shape, dtype, partial(weight, source, mixture, roles, shares))
        if mixture.bias_kind(roles[0]) is not None:
            dtype = source.checkpoint.tensors[f"{mixture.key}.{roles[0]}.bias"].dtype
            yield Made(f"{name}.bias", (cols,), dtype, partial(_bias, source, mixture, roles, shares))


def weight(source: Converted, mixture: Mixture, roles: list[str], shares: Mapping[int, float]) -> Tensor:
    """A weight as checkpoints of the family hold it; of several roles: fused, one above the other."""
    import torch

    matrix = torch.cat([source.matrix(mixture, role, shares) for role in roles], dim=1)
    return matrix if source.family.transposed else matrix.T.contiguous()


def _bias(source: Converted, mixture: Mixture, roles: list[str], shares: Mapping[int, float]) -> Tensor:
    import torch

    return torch.cat([source.bias(mixture, role, shares) for role in roles])
