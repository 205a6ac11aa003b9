"""Split experts (MoEfication, arXiv 2110.01786): the hidden neurons of the dense FFN, divided among them.

Every neuron belongs to one part. With as many parts as experts, the outputs of all experts add up to the
dense FFN's. With fewer, expert e has part e mod P: whole copies of the FFN, cut into fine-grained experts
(DeepSeekMoE, arXiv 2401.06066), whose routers start with one row per copy ("virtual groups", arXiv
2410.07524). `--shared-experts` are parts that every token passes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ... import experts
from ...errors import RecipeError, SitesError
from ...options import LARGEST_COUNT, Numbers, again, assigned, called, described, option
from ...runtime.shapes import functions
from ..ffn import FFNShape, Fitted, Form, Parts, Targets
from ..matrixwise import whole_term

if TYPE_CHECKING:
    from torch import Tensor

    from ..ffn import Activations


DEFAULT_BIAS = "per-expert"
AUXILIARY_LR = 1.0
STARTS_EQUAL = False
ABOUT = "parts of the dense FFN's hidden neurons (MoEfication)"

# Standard deviation of the first weights of a router that chooses among copies.
ROUTER_STD = 0.02
# Names of activations whose neurons are off for most tokens.
_SPARSE = "relu"
_ACTIVATIONS = ("hidden_act", "activation_function", "hidden_activation", "dense_act_fn", "activation")


@described
class Options(experts.Options):
    """Which neurons an expert has."""

    SIZED_BY = "top_k"

    bond_dim: Numbers = again(  # pyright: ignore[reportIncompatibleVariableOverride]  (a narrower meaning)
        experts.Options, "bond_dim", "Ignored, an expert has inner size / parts neurons."
    )
    noise: float = again(
        experts.Options, "noise", "Of the copies of a part beyond the first; ignored where there are none."
    )
    parts: int | None = option(
        default=None,
        help="Parts that the hidden neurons are divided into, beside those of --shared-experts; fewer than "
        "--experts: every part has --experts / --parts copies, and a token's first choices cover all parts.",
        group="Experts",
        at_least=2,
        at_most=LARGEST_COUNT,
        default_text="as many as --experts",
    )

    def check_together(self) -> None:
        if self.bias == "shared":
            raise RecipeError(
                f"{called('bias')} is 'shared'; an expert of kind split has the biases of its own neurons: "
                "expected per-expert"
            )
        if self.parts is not None and self.experts % self.parts:
            raise RecipeError(
                f"{called('parts')} is {self.parts} with {self.experts} experts, which it does not divide; "
                f"expected {closest(self.parts, divisors(self.experts))}"
            )

    @property
    def num_parts(self) -> int:
        """P: parts that are routed."""
        return self.parts or self.experts

    @property
    def divides_neurons_by(self) -> int:
        return self.num_parts + self.shared_experts

    def resolved(self, compresses: bool) -> dict[str, Any]:
        return {"parts": self.num_parts}

    def routing(self) -> dict[str, Any]:
        return {"parts": self.num_parts, **super().routing()}

    def starts_exact(self) -> bool:
        return not self.varies and self.top_k % self.num_parts == 0

    def why_one_size(self, compresses: bool) -> str | None:
        return (
            f"{assigned('kind', 'split')}, whose experts have equal parts of the neurons; expected "
            f"{assigned('kind', 'adapter', 'low-rank', 'mpo')}"
        )

    def takes_activations(self) -> bool:
        return self.num_parts == self.experts and not self.starts_exact()

    def why_uncalibrated(self) -> str | None:
        if self.takes_activations():
            return None
        return f"{called('calibrate')} given, and all parts are chosen or have copies; leave it out"

    def check_budget(self) -> None:
        raise RecipeError(
            f"{called('keep')} or {called('max_error')} given with {assigned('kind', 'split')}, whose "
            f"experts are the dense FFN itself; expected another {called('kind')}"
        )

    def notes(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        if self.starts_exact():
            return ()
        activation = next((config[key] for key in _ACTIVATIONS if isinstance(config.get(key), str)), None)
        if activation is not None and _SPARSE in activation.lower():
            return ()
        chosen, parts = self.top_k + self.shared_experts, self.num_parts + self.shared_experts
        number = f"as many as its router chooses, at most {min(chosen, parts)}," if self.varies else chosen
        exact = assigned("top_k", self.num_parts)
        if self.varies:
            exact = f"{assigned('select', 'top-k')} with {exact}"
        return (
            f"a token passes {number} of {parts} parts of an FFN, and what the others would add is lost: "
            f"neurons with the activation {activation or 'of this model'} are rarely off, as those with ReLU "
            f"are. Expect worse outputs until the model is fine-tuned; {exact} computes what the dense model "
            "does.",
        )

    def first_state(self) -> str:
        return (
            "Together the parts are the dense FFN."
            if self.starts_exact()
            else "All parts together are the dense FFN; those that are chosen approximate it."
        )


def divisors(number: int) -> list[int]:
    """All of them, ascending."""
    small = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def closest(wanted: int, numbers: Iterable[int]) -> str:
    """The two numbers, of at least 2, on both sides of the wanted one: "12 or 16"."""
    known = sorted(number for number in numbers if number > 1)
    below = [number for number in known if number <= wanted]
    above = [number for number in known if number > wanted]
    return " or ".join(map(str, [*below[-1:], *above[:1]])) or "another model"


def describe(ffn: FFNShape, options: Options) -> Form:
    """See `experts`.

    Raises:
        SitesError: the parts cannot be equally large.
    """
    inner, shared = ffn.matrices["up"].cols, options.shared_experts
    parts = options.divides_neurons_by
    if inner % parts:
        has_copies = options.num_parts < options.experts
        raise SitesError(
            f"{ffn.name} has {inner} hidden neurons, which {parts} parts cannot share equally; expected "
            f"{called('parts' if has_copies else 'experts')} of "
            f"{closest(options.num_parts, [n - shared for n in divisors(inner)])}"
        )
    size, made = inner // parts, {}
    for role, matrix in ffn.matrices.items():
        rows, cols = (size, matrix.cols) if role == "down" else (matrix.rows, size)
        bias = ("once" if role == "down" else "per-expert") if matrix.has_bias else None
        made[role] = {"terms": [whole_term(rows, cols, None, shared=False)], "bias": bias}
    return Form(made)


def build(ffn: Targets, form: Form, options: Options) -> Parts:
    """See `experts`."""
    import torch

    if ffn.activations is None:
        first, *others = ffn.shape.matrices
        matrices = {first: ffn.target(first).matrix}
        parts, router = _by_weights(matrices[first], ffn, options)
    else:
        matrices, others = {role: ffn.target(role).matrix for role in ffn.shape.matrices}, []
        parts, router = _by_activations(matrices, ffn.activations, options)
    routed, shared = parts[: options.num_parts], parts[options.num_parts :]
    neurons = torch.cat([routed.repeat(options.experts // options.num_parts, 1), shared])
    yield "router", {"weight": router.cpu()}
    for role, matrix in matrices.items():
        yield role, _sliced(matrix, role, neurons)
    for role in others:
        yield role, _sliced(ffn.target(role).matrix, role, neurons)


def _by_weights(matrix: Tensor, ffn: Targets, options: Options) -> tuple[Tensor, Tensor]:
    """(parts, shared ones last; the router's rows) by what the neurons read, (in, inner) of gate or up.

    Shared are the parts whose neurons have the largest weights. The router of parts without copies has their
    centroids. Of copies it has a random row each, the same for all of its parts: the first choices are the
    parts of one copy.
    """
    import torch
    import torch.nn.functional as F

    from ...decomposition.partition import centroids, clusters

    columns = matrix.mT
    parts = clusters(F.normalize(columns, dim=1), options.num_parts + options.shared_experts)
    parts = parts[columns.norm(dim=1)[parts].mean(1).argsort(stable=True)]
    if options.num_parts == options.experts:
        return parts, centroids(columns, parts[: options.num_parts])
    rows = torch.randn(
        (options.experts // options.num_parts, matrix.shape[0]), generator=ffn.generator("router")
    )
    return parts, ROUTER_STD * rows.repeat_interleave(options.num_parts, 0)


def _by_activations(
    matrices: Mapping[str, Tensor], seen: Activations, options: Options
) -> tuple[Tensor, Tensor]:
    """The same by calibration text: of the ways below the one that loses least on held-out text.

    Neurons that are alike in their weights, or in how large they are on the text (co-activation); shared are
    the parts that contribute most; the router has centroids, or is fitted to what the parts contribute.
    """
    import torch.nn.functional as F

    from ...decomposition.partition import centroids, clusters, contributions, fitted_rows, lost

    columns, down = next(iter(matrices.values())).mT, matrices["down"]
    inputs, inner, held_inputs, held_inner = (
        part.to(down) for part in (seen.inputs, seen.inner, seen.held_inputs, seen.held_inner)
    )
    sizes = (inner.abs() * down.norm(dim=1)).mT
    found: list[tuple[float, Tensor, Tensor]] = []
    for features in (columns, sizes):
        parts = clusters(F.normalize(features, dim=1), options.num_parts + options.shared_experts)
        added = contributions(inner, down, parts)
        order = added.square().sum(0).argsort(stable=True)
        parts, routed = parts[order], parts[order[: options.num_parts]]
        for rows in (centroids(columns, routed), fitted_rows(inputs, added[:, order[: options.num_parts]])):
            error = lost(_left_out(held_inputs, rows, options), held_inner, down, routed)
            found.append((error, parts, rows))
    return min(found, key=lambda each: each[0])[1:]


def _left_out(inputs: Tensor, rows: Tensor, options: Options) -> Tensor:
    """(tokens, parts) one for parts that a router of these rows does not choose, else zero."""
    import torch

    rule, threshold = options.select, options.threshold or 1.0
    router = functions().Router(rows.shape[1], len(rows), options.top_k, rule, len(rows), threshold)
    router.weight = torch.nn.Parameter(rows.float())
    if router.threshold_bias is not None:
        router.threshold_bias = torch.nn.Parameter(rows.new_zeros(len(rows), dtype=torch.float32))
    with torch.no_grad():
        choices = router(inputs).choices
    found = torch.ones(len(inputs), len(rows), dtype=inputs.dtype, device=inputs.device)
    return found.index_put((choices.tokens, choices.experts), found.new_zeros(()))


def _sliced(matrix: Tensor, role: str, neurons: Tensor) -> Fitted:
    """The rows of down, or columns of gate and up, of every expert's neurons (E, n)."""
    own = matrix[neurons] if role == "down" else matrix.mT[neurons].mT  # (E, in, out)
    return Fitted([[own[:, None, :, :, None].contiguous()]], neurons=neurons)
