"""The user's choices: one frozen value that says everything a conversion depends on."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Self

from .. import experts
from ..artifact.rounding import BITS
from ..devices import DEVICES, is_device
from ..errors import RecipeError
from ..experts import KINDS
from ..experts.selection import EXPERT_CHOICE, LIMITED, TOP_K, TOP_P
from ..options import (
    OptionGroup,
    Text,
    Texts,
    assigned,
    by_name,
    called,
    default_of,
    described,
    in_home,
    option,
)
from ..request import Request, plugin_options
from ..source.text_options import TextSource

DTYPES = ("float32", "bfloat16", "float16")
ALLOCATIONS = ("loss", "measured", "energy", "uniform")
SHARED = ("auto", "none", "input", "output", "both", "base")
METRICS = ("loss", "outputs", "diagonal", "weights")
# Bytes: what is smaller was meant in another unit, as 2 for 2GB.
SMALLEST_FILE = 1000
# Of a number in a text: no model needs more, and Python reads only some thousands.
_DIGITS = r"\d{1,18}"


def parse_layers(text: str) -> tuple[range, ...]:
    """ "0-5,8" -> (range(0, 6), range(8, 9)). No lists: they may be huge. Raises RecipeError."""
    parts = []
    for part in str(text).split(","):
        match = re.fullmatch(rf"\s*({_DIGITS})(?:\s*-\s*({_DIGITS}))?\s*", part)
        if not match:
            raise RecipeError(f"{called('layers')} is {text!r}; expected numbers and ranges such as 0-5,8")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise RecipeError(f"{called('layers')} is {text!r}; the range {part.strip()} runs backwards")
        parts.append(range(first, last + 1))
    return tuple(parts)


def parse_size(text: str | int) -> int:
    """ "2GB" -> 2,000,000,000 bytes; GiB, MiB and KiB are powers of 1,024. Raises RecipeError."""
    units = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
    number = rf"({_DIGITS}(?:\.{_DIGITS})?)"
    match = re.fullmatch(rf"{number}\s*([KMGT]?)(i?)B?", str(text).strip(), re.IGNORECASE)
    if not match or (match[3] and not match[2]):
        raise RecipeError(f"{called('max_shard_size')} is {text!r}; expected a size such as 2GB or 500MB")
    unit = units[match[2].upper()]
    if match[3]:
        unit = 1024 ** round(math.log(unit, 1000))
    size = int(float(match[1]) * unit)
    if size < SMALLEST_FILE:
        raise RecipeError(
            f"{called('max_shard_size')} is {text!r}; expected at least 1KB, such as 2GB or 500MB"
        )
    return size


def _read_layers(value: object) -> str:
    """Raises RecipeError unless they can be parsed."""
    parse_layers(str(value))
    return str(value)


def _read_size(value: object) -> str:
    """A size as text. Raises RecipeError unless it can be parsed."""
    parse_size(str(value))
    return str(value)


@described
class WeightFiles(OptionGroup):
    """How weights are split into files."""

    max_shard_size: str = option(
        default="1GB",
        help="Largest size of one weight file, such as 500MB or 2GB.",
        group="Output",
        metavar="SIZE",
        read=_read_size,
    )


@described
class CodeOfArtifacts(OptionGroup):
    """Whether code that an artifact brings along is run."""

    trust_remote_code: bool = option(
        default=False,
        help="Run custom code that the artifact brings along. The `modeling_mpoe.py` of this release is run "
        "without it.",
        group="General",
    )


if TYPE_CHECKING:
    from ..experts.kinds import mpo, split

    @described
    class _KindOptions(mpo.Options, split.Options):  # pyright: ignore[reportIncompatibleVariableOverride]  (fields of one name are merged)
        """The options of all kinds."""

else:
    _KindOptions = plugin_options(
        "kind", experts.Options, {name: experts.load(name).Options for name in KINDS}
    )


@described
class Recipe(_KindOptions, WeightFiles, TextSource, Request):
    """What to convert and how. The same recipe on the same source gives byte-identical tensors.

    The options of the expert kinds (`mpoe_convert.experts`) are fields as well.

    Raises:
        RecipeError: a value is out of range or contradicts another.
    """

    NOUN = "recipe"
    MEANT = frozenset({"experts"})  # without it a mixture keeps all that it has

    model: Text = option(
        help="Hub id or local folder of a dense checkpoint, or of a mixture of experts.",
        kw_only=False,
        flag="MODEL",
        read=in_home,
    )
    revision: str | None = option(default=None, help="Branch, tag or commit of a Hub model.", group="Source")
    trust_remote_code: bool = option(
        default=False,
        help="Run the custom code that the source brings along; it is copied into the artifact.",
        group="Source",
    )
    ffn: str | None = option(
        default=None,
        help="Where the FFNs are, for an architecture that `mpoe-convert families` does not list: "
        '"layers.{}.mlp:gate_proj,up_proj,down_proj", or two names for FFNs without a gate.',
        group="Source",
    )
    experts_at: str | None = option(
        default=None,
        help="Where the experts of a mixture are whose code says nothing of it, such as custom code: "
        '"layers.{}.mlp.experts"; with ":gate,up,down" behind it to name their matrices.',
        group="Source",
    )
    layers: str | None = option(
        default=None,
        help="Numbers of the layers to convert, such as 0-5,8. The FFNs of all others stay dense.",
        group="Source",
        read=_read_layers,
        default_text="all",
    )
    include: Texts = option(
        default=(),
        help="Convert only FFNs whose names match this pattern, such as 'decoder.*'. Repeatable.",
        group="Source",
        metavar="GLOB",
        item="pattern",
    )
    exclude: Texts = option(
        default=(),
        help="Leave FFNs whose names match this pattern dense. Repeatable.",
        group="Source",
        metavar="GLOB",
        item="pattern",
    )
    kind: str = option(
        default="mpo",
        help=f"What an expert is made of. {experts.about_kinds()}.",
        group="Experts",
        choices=KINDS,
    )
    device: str = option(
        default="auto",
        help=f"Where matrices are decomposed: {DEVICES}.",
        group="Decomposition",
        valid=is_device,
        expected=DEVICES,
    )
    dtype: str | None = option(
        default=None,
        help="Dtype of the stored weights.",
        group="Output",
        choices=DTYPES,
        default_text="as in the source",
    )
    bits: int | None = option(
        default=None,
        help="Round the large cores to so many bits, 8 or 4, in the format of compressed-tensors, which is "
        "needed to load them; they cannot be trained.",
        group="Output",
        at_least=min(BITS),
        at_most=max(BITS),
        valid=lambda bits: bits in BITS,
        expected="8 or 4",
        default_text="not rounded",
    )
    keep: float | None = option(
        default=None,
        help="Compress: parameters that the converted FFNs may store, with all experts, biases and routers, "
        "as a share of the dense FFNs' parameters, such as 0.6.",
        group="Compression",
        above=0,
        at_most=math.inf,
        expected="a share above 0, such as 0.6 for 60 %",
    )
    max_error: float | None = option(
        default=None,
        help="Compress: largest relative error of any matrix, measured in --metric, such as 0.3. With --keep "
        "both hold; alone, the FFNs become as small as it allows.",
        group="Compression",
        above=0,
        below=1,
        such_as=0.3,
    )
    allocation: str | None = option(
        default=None,
        help="How the parameters of --keep are shared out among the matrices. loss: smallest expected "
        "increase of the model's loss; measured: the same, after measuring the increase for each "
        "matrix alone; energy: smallest sum of squared relative errors; uniform: the same share for "
        "every matrix.",
        group="Compression",
        choices=ALLOCATIONS,
        default_text="loss with --metric loss, else energy",
    )
    metric: str | None = option(
        default=None,
        help="What a compressed matrix, or a truncated chain, is fitted to. loss: its outputs on the "
        "calibration text, weighted by the gradients of the model's loss (holds the whole model in "
        "memory; not for chains); outputs: its outputs there, unweighted; diagonal: its weights, scaled "
        "by the root mean square of their inputs; weights: its weights (plain SVD).",
        group="Compression",
        choices=METRICS,
        default_text="loss with --calibrate (outputs for truncated chains), else weights",
    )
    share: str | None = option(
        default=None,
        help="Of a mixture as the source, with --keep: what the experts of a layer share. none: nothing, "
        "each is cut to a low rank alone; input, output: a basis of the inputs, of the outputs; both: bases "
        "on both sides; base: a whole matrix, to which each adds a low rank; auto: for every matrix the one "
        "with the smallest error.",
        group="Compression",
        choices=SHARED,
        default_text="auto",
    )
    correct: bool = option(
        default=False,
        help="Fit the matrices one after another, each to the dense model's outputs on the inputs that the "
        "compressed layers before it produce. With --metric loss or outputs.",
        group="Compression",
    )
    search: bool = option(
        default=False,
        help="Try every combination of --metric, --allocation and --correct that you have not set (up to 12) "
        "and keep the one closest to the dense model on held-out calibration text. With --keep and "
        "--calibrate.",
        group="Compression",
    )

    def __post_init__(self) -> None:
        if "top_k" not in self.given and self.top_k:  # where the number varies, there is no limit
            default = default_of(by_name(type(self))["top_k"])
            object.__setattr__(self, "top_k", self.experts if self.select in LIMITED else default)
        super().__post_init__()

    def read_from_file(self, names: Collection[str]) -> Self:
        """As `Request` says; but a limit of the experts per token stays one."""
        made = super().read_from_file(names)
        if made.select in LIMITED:
            object.__setattr__(made, "given", made.given | (self.given & {"top_k"}))
        return made

    def check_together(self) -> None:
        self._check_selection()
        self._check_sizes()
        if "experts" in self.given:  # else it is that of the source, if the source is a mixture
            self.check_against_experts()
        if self.experts_at is not None and self.ffn is not None:
            raise RecipeError(
                f"{called('ffn')} given with {called('experts_at')}; the one names the FFNs of a dense "
                "source, the other the experts of a mixture: expected one of them"
            )
        if self.share is not None and self.keep is None:
            raise RecipeError(
                f"{called('share')} given without {called('keep')}; experts stay whole then, and share "
                "nothing"
            )
        if self.search and (self.keep is None or self.max_error is not None):
            keep = called("keep")
            given = f"without {keep}" if self.keep is None else f"with {called('max_error')}"
            raise RecipeError(
                f"{called('search')} given {given}; expected {keep} alone, so that all variants have one size"
            )
        if self.compresses:
            self._check_budget()
        elif not self._may_score_experts:
            self.check_chains()

    def _check_selection(self) -> None:
        if self.threshold is not None and self.select != TOP_P:
            raise RecipeError(
                f"{called('threshold')} given with {assigned('select', self.select)}; expected with "
                f"{assigned('select', TOP_P)} only"
            )
        if self.select == EXPERT_CHOICE and self.kind == "split":
            raise RecipeError(
                f"{assigned('select', EXPERT_CHOICE)} with {assigned('kind', 'split')}, of which a token "
                f"that one expert takes would pass one part; expected another {called('kind')} or "
                f"{called('select')}"
            )
        if self.select in LIMITED and self.top_k == 1:
            raise RecipeError(
                f"{called('top_k')} is 1 with {assigned('select', self.select)}, whose number of experts per "
                f"token then never varies; expected at least 2, or {assigned('select', TOP_K)}"
            )

    def _check_sizes(self) -> None:
        """What has a meaning where every expert has a size of its own."""
        if self.own_options.sizes is None:
            return
        if why := self.own_options.why_one_size(self.compresses):
            raise RecipeError(
                f"{assigned('bond_dim', self.bond_dim)}, a size for every expert, given with {why}"
            )
        if self.shared_experts:
            raise RecipeError(
                f"{called('shared_experts')} given with {assigned('bond_dim', self.bond_dim)}, sizes of the "
                "routed experts; expected one of them"
            )

    def check_against_experts(self) -> None:
        """Raises RecipeError for what so many experts do not allow."""
        sizes = self.own_options.sizes
        if sizes is not None and len(sizes) != self.experts:
            raise RecipeError(
                f"{assigned('bond_dim', self.bond_dim)} has {len(sizes)} sizes for {self.experts} experts; "
                "expected one for each, or one number for all"
            )
        if self.top_k > self.experts:
            raise RecipeError(
                f"{called('top_k')} is {self.top_k} with {self.experts} experts; expected 1 to {self.experts}"
            )
        if self.keep is not None and self.keep > self.experts:
            raise RecipeError(
                f"{called('keep')} is {self.keep:g} with {self.experts} experts; expected a share of the "
                "dense FFNs' parameters, such as 0.6 for 60 %"
            )

    @property
    def compresses(self) -> bool:
        """Whether matrices are compressed under a budget."""
        return self.keep is not None or self.max_error is not None

    def _check_budget(self) -> None:
        if self.allocation == "loss" and self.metric not in (None, "loss"):
            raise RecipeError(
                f"{assigned('allocation', 'loss')} given with {assigned('metric', self.metric)}; expected "
                f"with {assigned('metric', 'loss')}"
            )
        if self.allocation == "measured" and self.keep is None:
            raise RecipeError(
                f"{assigned('allocation', 'measured')} given without {called('keep')}; there is no budget to "
                "share out"
            )
        self.own_options.check_budget()

    @property
    def _may_score_experts(self) -> bool:
        """Whether text may be there to choose the experts of a mixture that stay: the source will tell."""
        return bool(self.calibrate) and "experts" in self.given and self.allocation is None

    def check_chains(self) -> None:
        """Raises RecipeError for fitting without a budget and without chains that are truncated."""
        given = [name for name in ("allocation", "correct", "metric", "calibrate") if getattr(self, name)]
        may_truncate = self.own_options.may_truncate()
        if given == ["calibrate"] and self.own_options.takes_activations():
            return
        if given == ["calibrate"] and (why := self.own_options.why_uncalibrated()):
            raise RecipeError(why)
        if given and (given[0] in ("allocation", "correct") or not may_truncate):
            raise RecipeError(
                f"{called(given[0])} given without {called('keep')} or {called('max_error')}; nothing is "
                "compressed then"
            )
        if self.metric == "loss":
            raise RecipeError(
                f"{assigned('metric', 'loss')} given without {called('keep')} or {called('max_error')}; "
                f"expected outputs, diagonal or weights for chains that {called('bond_dim')} truncates"
            )

    def selects(self, name: str, index: int) -> bool:
        """Whether the FFN of layer `index` called `name` is to be converted."""
        if self.layers is not None and not any(index in part for part in parse_layers(self.layers)):
            return False
        if self.include and not any(fnmatchcase(name, pattern) for pattern in self.include):
            return False
        return not any(fnmatchcase(name, pattern) for pattern in self.exclude)
