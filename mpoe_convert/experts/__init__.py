"""Expert kinds: one module of `experts.kinds` each, discovered.

A kind decides about a whole FFN (see `experts.ffn` for the values). It offers:

* `Options`: a subclass of `experts.Options` with the options that it reads, or that class itself. They become
  fields of `Recipe`, options of the command line and keys of recipe files; those of one kind only are refused
  with another;
* `DEFAULT_BIAS`: "shared" or "per-expert";
* `ABOUT`: what its experts are, for people;
* `STARTS_EQUAL`: all experts compute the dense FFN at first, whatever the noise;
* `AUXILIARY_LR`: the factor on the learning rate that suits what its experts own (examples/results);
* `describe(ffn, options)`: the `Form` that an FFN of these sizes becomes. Raises MpoeError;
* `build(ffn, form, options)`: the parts of that form, one after the other; the router is not among them.

Kinds whose experts are chains have both from `matrixwise`. The modules import torch inside functions, because
`--help` reads their options.
"""

from __future__ import annotations

import pkgutil
import re
from collections.abc import Mapping
from importlib import import_module
from types import ModuleType
from typing import Any, ClassVar

from ..options import LARGEST_COUNT, Numbers, OptionGroup, assigned, described, option
from . import kinds, selection

KINDS: tuple[str, ...] = tuple(
    sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(kinds.__path__))
)
BIASES = ("shared", "per-expert")


def load(kind: str) -> ModuleType:
    """The module of a kind."""
    return import_module(f"{kinds.__name__}.{kind.replace('-', '_')}")


def about_kinds() -> str:
    """What the experts of every kind are."""
    return "; ".join(f"{kind}: {load(kind).ABOUT}" for kind in KINDS)


def by_kind(attribute: str) -> str:
    """What the kinds say of something, the most frequent first: "shared; per-expert for dense"."""
    values: dict[str, list[str]] = {}
    for kind in KINDS:
        value = getattr(load(kind), attribute)
        values.setdefault(f"{value:g}" if isinstance(value, float) else str(value), []).append(kind)
    usual, *others = sorted(values, key=lambda value: (-len(values[value]), value))
    return "; ".join([usual, *(f"{other} for {' and '.join(values[other])}" for other in others)])


def _read_bonds(value: Any) -> Any:
    """ "64" -> 64; "12,64,64,16" -> (12, 64, 64, 16); "16/32" stays, as what is nothing, which is refused."""
    if not isinstance(value, str):
        return None if value in ((), []) else value
    if "/" in value:
        return "/".join(part.strip() for part in value.split("/"))
    try:
        bonds = [int(part) for part in value.split(",")]
    except ValueError:
        return value
    return bonds if len(bonds) > 1 else bonds[0]


def sizes_of(bond_dim: Any) -> tuple[int, ...] | None:
    """ "16/32/64" -> (16, 32, 64), one per expert; None: it is no such text.

    The slash has no meaning to shells and in YAML, where "16:32" is a number.
    """
    if not isinstance(bond_dim, str) or not re.fullmatch(r"\d{1,10}(/\d{1,10})+", bond_dim, re.ASCII):
        return None
    sizes = tuple(map(int, bond_dim.split("/")))
    return sizes if all(1 <= size <= LARGEST_COUNT for size in sizes) else None


def _is_bond_dim(value: Any) -> bool:
    return not isinstance(value, str) or sizes_of(value) is not None


@described
class Options(OptionGroup):
    """What every kind is told. A kind that reads an option in a way of its own declares it again.

    The hooks below are about a recipe as a whole; `recipe.own_options` has those of its kind.
    """

    # The option that makes a model nearer to the dense one, where no budget limits it.
    SIZED_BY: ClassVar[str] = "bond_dim"

    experts: int = option(
        default=8,
        help="Experts per FFN. Of a mixture as the source: how many of its own stay, chosen on the text of "
        "--calibrate.",
        group="Experts",
        at_least=2,
        at_most=LARGEST_COUNT,
    )
    top_k: int = option(
        default=2,
        help="Experts chosen per token; with --select expert-choice in the mean, with top-p and top-any the "
        "most that are chosen, all if this is not given.",
        group="Experts",
        at_least=1,
        at_most=LARGEST_COUNT,
    )
    select: str = option(
        default=selection.TOP_K,
        help="How many experts a token goes to. top-k: --top-k; top-p: as many as it takes for their "
        "probabilities to reach --threshold (XMoE); top-any: all whose learned thresholds it passes "
        "(DynMoE); expert-choice: each expert takes its best tokens of a sequence, in encoders.",
        group="Experts",
        choices=selection.SELECTIONS,
    )
    threshold: float | None = option(
        default=None,
        help="Probability that the chosen experts reach together, with --select top-p.",
        group="Experts",
        above=0,
        below=1,
        such_as=selection.THRESHOLD,
        default_text=f"{selection.THRESHOLD:g} with --select top-p",
    )
    bond_dim: Numbers = option(
        default=64,
        help="Size of what an expert owns; or one for each expert, such as 4/4/8/8 for four (HMoE; not with "
        "--kind core-space, dense and split).",
        group="Experts",
        metavar="INT|LIST",
        read=_read_bonds,
        at_least=1,
        at_most=LARGEST_COUNT,
        valid=_is_bond_dim,
        expected="a whole number of at least 1, one for every bond, such as 12,64,64,16, or one for every "
        "expert, such as 4/4/8/8",
    )
    noise: float = option(
        default=0.01,
        help="Standard deviation of the noise in the cores of all experts but expert 0, relative to the root "
        "mean square of the core; 0 makes exact copies.",
        group="Experts",
        at_least=0,
        at_most=10,
        such_as=0.01,
    )
    bias: str | None = option(
        default=None,
        help="Whether the experts of an FFN share its biases or each have their own.",
        group="Experts",
        choices=BIASES,
        default_text=lambda: by_kind("DEFAULT_BIAS"),
    )
    seed: int = option(
        default=0,
        help="Seed of the noise and of the routers' first weights.",
        group="Experts",
        at_least=0,
        below=2**63,
        expected="a whole number from 0 to 2**63 - 1, as the generators of torch take it",
    )

    shared_experts: int = option(
        default=0,
        help="Experts beside those of --experts that every token passes (DeepSeekMoE).",
        group="Experts",
        at_least=0,
        at_most=LARGEST_COUNT,
    )

    @property
    def stored_experts(self) -> int:
        """Routed and shared ones, which share a stack."""
        return self.experts + self.shared_experts

    @property
    def sizes(self) -> tuple[int, ...] | None:
        """The bond dimension of every expert, where there is one for each."""
        return sizes_of(self.bond_dim)

    @property
    def varies(self) -> bool:
        """Whether one token goes to more experts than another, at most `top_k`."""
        return self.select in selection.LIMITED

    @property
    def divides_neurons_by(self) -> int:
        """What the number of hidden neurons has to be a multiple of."""
        return 1

    def routing(self) -> dict[str, Any]:
        """What `config.mpoe` says of the routing beside the number of experts, see `modeling_mpoe`."""
        found: dict[str, Any] = {"rule": self.select} if self.select != selection.TOP_K else {}
        if self.threshold is not None:
            found["threshold"] = self.threshold
        return found | ({"shared_experts": self.shared_experts} if self.shared_experts else {})

    def starts_exact(self) -> bool:
        """Whether the chosen experts compute what the dense FFN does, as long as nothing is truncated."""
        return True

    def notes(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """What a user should know of such experts of a dense model with this config.json."""
        return ()

    def first_state(self) -> str | None:
        """How the experts start, in a sentence; None: each starts as the dense FFN, but for the noise."""
        return None

    def resolved(self, compresses: bool) -> dict[str, Any]:
        """Values for options that were left to the kind, so that a recipe repeats a run.

        compresses: under a budget.
        """
        return {}

    def why_uncalibrated(self) -> str | None:
        """Why text is of no use to the kind's own fits, if that needs words of the kind's own."""
        return None

    def why_one_size(self, compresses: bool) -> str | None:
        """What forbids that experts differ in size, why, and what was expected; None: nothing.

        compresses: under a budget.
        """
        return (
            f"{assigned('kind', 'dense')}, whose experts are whole copies of the FFN; expected "
            f"{assigned('kind', 'adapter', 'low-rank', 'mpo')}"
        )

    def takes_activations(self) -> bool:
        """Whether the kind looks at activations of the dense FFNs, if there is calibration text."""
        return False

    def may_truncate(self) -> bool:
        """Whether chains may lose something to their bond limit, as far as can be told without a matrix."""
        return False

    def check_budget(self) -> None:
        """Raises RecipeError: such experts cannot be compressed under `keep` or `max_error`."""
