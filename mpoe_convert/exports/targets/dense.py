"""One expert, or an average of them, back in the architecture of the base: the inverse of a conversion."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING

from ...errors import ExportError, RequestError
from ...options import LARGEST_COUNT, Texts, again, called, default_of, described, in_order, option
from ...source.text_options import TextSource
from .. import targets
from . import Checked, ExportPlan, Part, PlannedTensor

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from ...artifact.reader import Artifact, Mixture
    from . import Export

# {path of a layer: {expert: its weight in the average}}; the weights of a layer sum to one.
ExpertWeights = Mapping[str, Mapping[int, float]]

ABOUT = "one expert, or the average of all, in the architecture of the base model"
NEEDS: dict[str, tuple[str, ...]] = {}


@described
class Options(targets.Options, TextSource):
    """Which expert, or which average of them."""

    expert: int | None = option(
        default=None,
        help="Number of the expert to write.",
        group="Target",
        at_least=0,
        at_most=LARGEST_COUNT,
        default_text="0",
    )
    calibrate: Texts = again(
        TextSource,
        "calibrate",
        "Write the average of the experts, weighted by the combine weights that the routers give them on "
        "this text: files or Hub datasets, as for `finetune --data`, or builtin (the language reference of "
        "Python). Repeatable.",
    )

    def check_together(self) -> None:
        if self.expert is not None and self.calibrate:
            raise RequestError(
                f"{called('expert')} and {called('calibrate')} given; expected one expert, or the average "
                "by a text"
            )
        given = [each.name for each in in_order(TextSource) if getattr(self, each.name) != default_of(each)]
        if given and not self.calibrate:
            raise RequestError(
                f"{called(given[0])} given without {called('calibrate')}; expected the text that it is about"
            )


def plan(source: Artifact, request: Export, expert_weights: ExpertWeights | None, output: Path) -> ExportPlan:
    """See `targets`.

    Args:
        expert_weights: of the average; None: one expert.

    Raises:
        RequestError: there is no such expert.
        ExportError: the experts have trained adapters, or a token passes several FFNs in any case.
    """
    expert, number = request.expert or 0, source.num_experts // source.parts
    if not 0 <= expert < number:
        what = "" if source.parts == 1 else " whole copies of its FFNs"
        raise RequestError(
            f"{called('expert')} is {expert}; '{source.checkpoint.source}' has {number}{what}, "
            f"expected 0 to {number - 1}"
        )
    if source.parts == 1 and source.shared_experts:
        raise ExportError(
            f"a token of '{source.checkpoint.source}' passes {source.shared_experts + 1} FFNs or more, "
            f"{source.shared_experts} of them always ({called('shared_experts')}); no dense FFN of the "
            "base's size computes that"
        )
    if expert_weights is None:
        expert_weights = {mixture.path: {expert: 1.0} for mixture in source.mixtures}
        title, about = f"expert {expert}", f"Every mixture was replaced by its expert {expert}"
        if source.parts > 1:
            title, about = "all parts", "The parts of every FFN were put together again"
    else:
        title = "the average of the experts"
        about = (
            "Every mixture was replaced by the average of its experts, weighted by the combine weights that "
            f"its router gave them on {', '.join(request.calibrate)}"
        )
    is_custom = source.architecture.is_custom
    classes = "the code that lies beside it" if is_custom else "the stock classes of transformers"
    return ExportPlan(
        parts=(Part("", {"config.json": source.config}, tuple(dense_tensors(source, expert_weights))),),
        model_type=source.model_type,
        title=title,
        about=f"{about}: this is a dense {source.model_type} again, of {classes}.",
        usage=usage(source),
        checked=Checked(experts=None if request.calibrate else (expert,), same=not request.calibrate),
    )


def usage(source: Artifact, model: str = "path/to/this") -> str:
    """Python that loads the export by transformers."""
    from ...source.architecture import main_auto_class

    auto = main_auto_class(source.config, source.model_type)
    return f"from transformers import {auto}\n\nmodel = {loading(source, model)}"


def loading(source: Artifact, model: str) -> str:
    """The expression that loads `model`, in Python."""
    from ...source.architecture import main_auto_class

    auto = main_auto_class(source.config, source.model_type)
    trust = ", trust_remote_code=True" if source.architecture.is_custom else ""
    return f'{auto}.from_pretrained("{model}"{trust})'


def dense_tensors(source: Artifact, expert_weights: ExpertWeights) -> Iterator[PlannedTensor]:
    """The tensors of the dense model.

    Raises:
        ExportError: the adapters are trained (their output is not zero).
    """
    yield from tensors_with(source, lambda mixture: _ffn(source, mixture, expert_weights[mixture.path]))


def tensors_with(
    source: Artifact, tensors_of: Callable[[Mixture], Iterator[PlannedTensor]]
) -> Iterator[PlannedTensor]:
    """The artifact's tensors, each mixture's replaced by `tensors_of` it, where the first of them stood."""
    done = set()
    for name in source.checkpoint.tensors:
        mixture = source.owner(name)
        if mixture is None:
            yield copied(source, name)
        elif mixture.key not in done:
            done.add(mixture.key)
            yield from tensors_of(mixture)


def copied(source: Artifact, name: str, new_name: str | None = None) -> PlannedTensor:
    """A tensor of the artifact, unchanged; under another name if one is given."""
    info = source.checkpoint.tensors[name]
    return PlannedTensor(new_name or name, info.shape, info.dtype, partial(source.checkpoint.read, name))


def check_adapters(source: Artifact, mixture: Mixture, expert_weights: Mapping[int, float]) -> None:
    """Raises ExportError if the adapters are trained. Those that still add nothing can be left out."""
    if not source.adapters_add_nothing(mixture, expert_weights):
        raise ExportError(
            f"the experts of {mixture.key} are adapters that have been trained: y + gelu(y A) B behind the "
            "FFN is no matrix, so no other architecture holds it; expected experts of another kind"
        )


def _ffn(source: Artifact, mixture: Mixture, expert_weights: Mapping[int, float]) -> Iterator[PlannedTensor]:
    check_adapters(source, mixture, expert_weights)
    for name, roles in mixture.roles_by(mixture.dense_name).items():
        sizes = [_size(source, mixture, role) for role in roles]
        rows, cols = sizes[0][0], sum(size[1] for size in sizes)
        shape = (rows, cols) if source.family.transposed else (cols, rows)
        dtype = source.dtype(mixture, roles[0])
        yield PlannedTensor(
            f"{name}.weight", shape, dtype, partial(weight, source, mixture, roles, expert_weights)
        )
        if mixture.bias_kind(roles[0]) is not None:
            dtype = source.checkpoint.tensors[f"{mixture.key}.{roles[0]}.bias"].dtype
            make = partial(_fused_bias, source, mixture, roles, expert_weights)
            yield PlannedTensor(f"{name}.bias", (cols,), dtype, make)


def weight(
    source: Artifact, mixture: Mixture, roles: list[str], expert_weights: Mapping[int, float]
) -> Tensor:
    """A weight as the family's checkpoints hold it; of several roles: fused, one above the other."""
    import torch

    matrix = torch.cat([_matrix(source, mixture, role, expert_weights) for role in roles], dim=1)
    return matrix if source.family.transposed else matrix.T.contiguous()


def read_bias(source: Artifact, mixture: Mixture, role: str, expert_weights: Mapping[int, float]) -> Tensor:
    """(out,) of a projection that has a bias."""
    bias = source.bias(mixture, role, expert_weights)
    assert bias is not None, f"{mixture.key}.{role}"
    return bias


def _fused_bias(
    source: Artifact, mixture: Mixture, roles: list[str], expert_weights: Mapping[int, float]
) -> Tensor:
    import torch

    return torch.cat([_bias(source, mixture, role, expert_weights) for role in roles])


def _size(source: Artifact, mixture: Mixture, role: str) -> tuple[int, int]:
    """(input, output) features of the dense matrix."""
    rows, cols = mixture.size(role)
    if source.parts == 1:
        return rows, cols
    number = len(source.of_copy(0))
    return (rows * number, cols) if role == "down" else (rows, cols * number)


def _matrix(source: Artifact, mixture: Mixture, role: str, expert_weights: Mapping[int, float]) -> Tensor:
    """The dense matrix (in, out): the average of experts, or a copy's parts side by side."""
    import torch

    if source.parts == 1:
        return source.matrix(mixture, role, expert_weights)
    [copy] = expert_weights
    parts = [source.matrix(mixture, role, {expert: 1.0}) for expert in source.of_copy(copy)]
    return torch.cat(parts, dim=0 if role == "down" else 1)


def _bias(source: Artifact, mixture: Mixture, role: str, expert_weights: Mapping[int, float]) -> Tensor:
    """(out,) of the same."""
    import torch

    if source.parts == 1 or mixture.bias_kind(role) != "per-expert":
        return read_bias(source, mixture, role, expert_weights)
    [copy] = expert_weights
    return torch.cat([read_bias(source, mixture, role, {expert: 1.0}) for expert in source.of_copy(copy)])
