"""MPO experts (MPOE, arXiv 2203.01104): one shared central core, auxiliary cores per expert."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ... import experts
from ...decomposition import sites as site_layouts
from ...decomposition.sites import LAYOUTS, MOST_SITES, SVDS
from ...errors import RecipeError, SitesError
from ...options import Numbers, again, assigned, called, described, option
from ..ffn import FFNShape, Fitted, Form, Parts, Target, Targets
from ..matrixwise import build_matrices, by_expert, describe_matrices, factored, perturbed

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from ...decomposition.sites import Dims, Sites


GAUGES = ("canonical", "identity")
# Layouts whose centre is as large as the matrix and can be factored itself.
WHOLE_CENTRES = ("blocks", "one-sided")
NEURON_ORDERS = ("auto", "source")
# MPOE's reference code splits every matrix into five near-equal sites; three are enough at full bonds.
DEFAULT_SITES = MappingProxyType({"blocks": 3, "one-sided": 3, "two-sided": 3, "balanced": 5})

DEFAULT_BIAS = "shared"
AUXILIARY_LR = 1.0
STARTS_EQUAL = False
ABOUT = "matrix product operators with a shared central tensor and auxiliary tensors of their own"


def _read_factors(value: Any) -> Any:
    """Raises RecipeError for a text that cannot be parsed."""
    if isinstance(value, str):
        try:
            site_layouts.check_num_sites(len(site_layouts.parse_factors(value)[0]))
        except SitesError as error:
            raise RecipeError(f"{called('factors')} is {value!r}: {error}") from None
    return value


@described
class Options(experts.Options):
    """How a matrix becomes a chain of cores."""

    bond_dim: Numbers = again(
        experts.Options,
        "bond_dim",
        "Largest bond dimension, the size that neighbouring cores share: one number, or one per bond, such "
        "as 12,64,64,16. One per expert for layouts blocks and one-sided.",
    )
    layout: str | None = option(
        default=None,
        help="How the inputs and outputs of a matrix are split among the cores. blocks, one-sided and "
        "two-sided chains are exact at any --bond-dim; balanced ones, those of the paper, are truncated by "
        "it. blocks: an expert has a matrix for every block of --bond-dim features of the smaller side, and "
        "scales of these features.",
        group="Decomposition",
        choices=LAYOUTS,
        default_text="blocks; one-sided with --keep, --max-error or --sites",
    )
    sites: int | None = option(
        default=None,
        help="Cores per chain, an odd number; 3 for --layout blocks.",
        group="Decomposition",
        at_least=3,
        at_most=MOST_SITES,
        valid=lambda sites: sites % 2 == 1,
        expected=f"an odd number from 3 to {MOST_SITES}",
        default_text="3; 5 for --layout balanced",
    )
    factors: str | None = option(
        default=None,
        help="Sizes that the cores carry, in place of --layout: factors of the hidden size, an x, factors of "
        "the inner size. 768 x 3072 is 3,4,4,4,4x4,4,8,6,4.",
        group="Decomposition",
        metavar="LISTxLIST",
        read=_read_factors,
    )
    svd: str = option(
        default="auto",
        help="How singular vectors are computed: exact; randomized, faster at truncated bonds and nearly as "
        "good; or auto, randomized for large matrices with small bonds.",
        group="Decomposition",
        choices=SVDS,
    )
    gauge: str = option(
        default="canonical",
        help="Which of the equivalent chains is stored. canonical: that of TT-SVD, whose orthogonality "
        "centre is the central core; identity: the central core is the matrix itself, the outer cores "
        "are identities (where no bond is truncated).",
        group="Decomposition",
        choices=GAUGES,
    )
    neuron_order: str = option(
        default="auto",
        help="Order of an FFN's hidden neurons in truncated chains: auto puts similar neurons next to each "
        "other where that lowers the error, source leaves them in place.",
        group="Decomposition",
        choices=NEURON_ORDERS,
    )

    def check_together(self) -> None:
        given = self.sites is not None and self.factors is not None
        if given and self.sites != num_sites(self):
            raise RecipeError(
                f"{called('sites')} is {self.sites} but {called('factors')} {self.factors!r} has "
                f"{num_sites(self)}; give one of them"
            )

    def resolved(self, compresses: bool) -> dict[str, Any]:
        """Outer cores of one-sided chains are smaller: under a budget more is left for the centre."""
        layout = self.layout or ("one-sided" if compresses else layout_of(self))
        return {"layout": layout, "sites": num_sites(self, layout)}

    def why_one_size(self, compresses: bool) -> str | None:
        if compresses:
            return (
                f"{called('keep')} or {called('max_error')}, which factor the centre between cores of "
                f"one size; expected {assigned('kind', 'adapter', 'low-rank')}"
            )
        if self.factors is not None or layout_of(self) not in WHOLE_CENTRES:
            what = assigned("layout", self.layout) if self.factors is None else called("factors")
            return (
                f"{what}, by which the centre depends on the bonds, so that experts could not share it; "
                f"expected {assigned('layout', *WHOLE_CENTRES)}"
            )
        if num_sites(self) != 3:
            return f"{assigned('sites', self.sites)}; expected {assigned('sites', 3)}"
        return None

    def may_truncate(self) -> bool:
        return self.layout == "balanced" or self.factors is not None

    def check_budget(self) -> None:
        if self.layout not in (None, *WHOLE_CENTRES) or self.factors is not None:
            what = assigned("layout", self.layout) if self.factors is None else called("factors")
            raise RecipeError(
                f"{called('keep')} and {called('max_error')} given with {what}; expected with "
                f"{assigned('layout', 'one-sided')} or blocks, or another {called('kind')} (chains of other "
                f"layouts are truncated by {called('bond_dim')})"
            )


def layout_of(options: Options) -> str:
    """The layout without a budget."""
    return options.layout or ("blocks" if options.sites is None else "one-sided")


def num_sites(options: Options, layout: str | None = None) -> int:
    """Cores per chain; of another layout than that of the options, if one is given."""
    if options.factors is not None:
        return len(site_layouts.parse_factors(options.factors)[0])
    return options.sites or DEFAULT_SITES[layout or layout_of(options)]


def terms(
    rows: int, cols: int, options: Options, swapped: bool, rank: int | None = None
) -> tuple[list[dict], Sites]:
    """See `matrixwise`. If `swapped`, explicit factors are read columns first.

    Where every expert has a bond dimension, the sites are those of the largest one.
    """
    if options.sizes is not None:
        each = [_choose(rows, cols, options, size) for size in options.sizes]
        largest = max(each, key=lambda sites: sites.auxiliary_params)
        if len(set(options.sizes)) > 1 and len({sites.bonds for sites in each}) == 1:
            raise SitesError(
                f"{assigned('bond_dim', options.bond_dim)} gives all experts the bonds {largest.bonds}, "
                "since each bond is the largest divisor up to its number; expected numbers with different "
                "largest divisors, or one number for all"
            )
        return [by_expert(_term(largest), list(map(_term, each)))], largest
    factors = site_layouts.parse_factors(options.factors) if options.factors else None
    if factors and swapped:
        factors = factors[1], factors[0]
    assert not isinstance(options.bond_dim, str)
    sites = _choose(rows, cols, options, options.bond_dim, factors)
    if options.gauge == "identity" and not sites.is_exact:
        raise RecipeError(
            f"the identity gauge needs full bonds {sites.full_bonds}, found {sites.bonds}; expected a larger "
            f"{called('bond_dim')} or {assigned('gauge', 'canonical')}"
        )
    shape = _term(sites)
    return [shape if rank is None else factored(shape, sites.centre, rank)], sites


def _choose(
    rows: int, cols: int, options: Options, bond_dim: int | Dims, factors: tuple[Dims, Dims] | None = None
) -> Sites:
    return site_layouts.choose(
        rows,
        cols,
        layout=layout_of(options),
        num_sites=num_sites(options),
        bond_dim=bond_dim,
        factors=factors,
    )


def _term(sites: Sites) -> dict:
    """The term of a chain over these sites."""
    term = {
        "in_dims": list(sites.in_dims),
        "out_dims": list(sites.out_dims),
        "bonds": list(sites.bonds),
        "shared": [k == sites.centre for k in range(sites.num_sites)],
    }
    return term | ({"untied": list(sites.untied)} if sites.untied else {})


def fit(target: Target, sites: Sites, options: Options, generator: Generator) -> Fitted:
    """See `matrixwise`. In the canonical gauge the orthogonality centre is the central core.

    Factors go where their side's outer cores leave them: for the one-sided layout, whose outer cores are
    orthogonal and carry one side only.
    """
    from ...decomposition.blocks import fit_blocks
    from ...decomposition.mpo import fit as fit_mpo

    if options.sizes is not None:
        return _fit_sizes(target.matrix, options, generator)
    if sites.untied:
        return Fitted([fit_blocks(target.matrix, sites, target.factors, gauge=options.gauge)])
    decompose = partial(fit_mpo, sites=sites, svd=options.svd, seed=options.seed, gauge=options.gauge)
    if target.factors is None:
        mpo = decompose(target.matrix)
        return Fitted([list(mpo.cores)], mpo.discarded)
    first, second = target.factors
    mpo = decompose(first @ second)
    left, right = mpo.cores[: sites.centre], mpo.cores[sites.centre + 1 :]
    return Fitted([[*left, *_between(left, first, second, right), *right]])


def _fit_sizes(matrix: Tensor, options: Options, generator: Generator) -> Fitted:
    """Cores of experts that differ in size, around the centre of the chain that fits into all of theirs."""
    from ...decomposition.sizes import common_sites, widened

    rows, cols = matrix.shape
    each = [_choose(rows, cols, options, size) for size in options.sizes or ()]
    small = common_sites(each)
    cores: list[Tensor | list[Tensor]] = []
    for k, core in enumerate(_decompose(matrix, small, options)):
        if k == small.centre:
            cores.append(core)
            continue
        first, *others = (widened(core, k, small, sites) for sites in each)
        cores.append([first, *(perturbed(other, options.noise, generator) for other in others)])
    return Fitted([cores])


def _decompose(matrix: Tensor, sites: Sites, options: Options) -> Sequence[Tensor]:
    """The cores of a matrix in a layout that is exact."""
    from ...decomposition.blocks import fit_blocks
    from ...decomposition.mpo import fit as fit_mpo

    if sites.untied:
        return fit_blocks(matrix, sites, gauge=options.gauge)
    return fit_mpo(matrix, sites=sites, svd=options.svd, seed=options.seed, gauge=options.gauge).cores


def _between(
    left: tuple[Tensor, ...], first: Tensor, second: Tensor, right: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """The cores between orthogonal outer ones that make the chain the product of two thin matrices."""
    import torch

    from ...runtime.shapes import functions

    inputs, outputs = functions().merge_cores(left)[0, :, 0, :], functions().merge_cores(right)[:, 0, :, 0]
    rank = first.shape[1]
    first = torch.einsum("ab,air->bir", inputs, first.reshape(inputs.shape[0], -1, rank))
    second = torch.einsum("roc,bc->rob", second.reshape(rank, -1, outputs.shape[1]), outputs)
    return first[:, :, None, :].contiguous(), second[:, None, :, :].contiguous()


def describe(ffn: FFNShape, options: Options) -> Form:
    """See `experts`."""
    return describe_matrices(ffn, options, terms)


def build(ffn: Targets, form: Form, options: Options) -> Parts:
    """See `experts`."""
    return build_matrices(ffn, form, options, fit)
