"""The user's choices: one frozen value that says everything a conversion depends on."""

from __future__ import annotations

import math
import re
from fnmatch import fnmatchcase

from .. import experts
from ..devices import DEVICES, is_device
from ..errors import RecipeError
from ..experts import KINDS
from ..options import OptionGroup, described, option
from ..request import Request, plugin_options
from ..source.text_options import TextSource

DTYPES = ("float32", "bfloat16", "float16")
ALLOCATIONS = ("loss", "measured", "energy", "uniform")
METRICS = ("loss", "outputs", "diagonal", "weights")


def parse_layers(text: str) -> tuple[range, ...]:
    """ "0-5,8" -> (range(0, 6), range(8, 9)): numbers are not listed, they may be huge."""
    parts = []
    for part in str(text).split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        if not match:
            raise RecipeError(f"layers is {text!r}; expected numbers and ranges such as 0-5,8")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise RecipeError(f"layers is {text!r}; the range {part.strip()} runs backwards")
        parts.append(range(first, last + 1))
    return tuple(parts)


def parse_size(text: str | int) -> int:
    """ "2GB" -> 2,000,000,000 bytes; GiB, MiB and KiB are powers of 1,024."""
    units = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", str(text).strip(), re.IGNORECASE)
    if not match or (match[3] and not match[2]):
        raise RecipeError(f"max_shard_size is {text!r}; expected a size such as 2GB or 500MB")
    unit = units[match[2].upper()]
    if match[3]:
        unit = 1024 ** round(math.log(unit, 1000))
    size = int(float(match[1]) * unit)
    if size < 1:
        raise RecipeError(f"max_shard_size is {text!r}; expected at least one byte")
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
        "1GB",
        "Largest size of one weight file, such as 500MB or 2GB.",
        group="Output",
        metavar="SIZE",
        read=_read_size,
    )


_KIND_OPTIONS = plugin_options("kind", experts.Options, {kind: experts.load(kind).Options for kind in KINDS})


@described
class Recipe(_KIND_OPTIONS, WeightFiles, TextSource, Request):
    """What to convert and how. The same recipe on the same source gives byte-identical tensors.

    The options of the expert kinds (`mpoe_convert.experts`) are fields as well.

    Raises:
        RecipeError: a value is out of range or contradicts another.
    """

    NOUN = "recipe"

    model: str = option(help="Hub id or local folder of a dense checkpoint.", kw_only=False)
    revision: str | None = option(None, "Branch, tag or commit of a Hub model.", group="Source")
    trust_remote_code: bool = option(
        False,
        "Run the custom code that the source brings along; it is copied into the artifact.",
        group="Source",
    )
    ffn: str | None = option(
        None,
        "Where the FFNs are, for an architecture that `mpoe-convert families` does not list: "
        '"layers.{}.mlp:gate_proj,up_proj,down_proj", or two names for FFNs without a gate.',
        group="Source",
    )
    layers: str | None = option(
        None,
        "Numbers of the layers to convert, such as 0-5,8. The FFNs of all others stay dense.",
        group="Source",
        read=_read_layers,
        default_text="all",
    )
    include: tuple[str, ...] = option(
        (),
        "Convert only FFNs whose names match this pattern, such as 'decoder.*'. Repeatable.",
        group="Source",
        metavar="GLOB",
        item="pattern",
    )
    exclude: tuple[str, ...] = option(
        (),
        "Leave FFNs whose names match this pattern dense. Repeatable.",
        group="Source",
        metavar="GLOB",
        item="pattern",
    )
    kind: str = option(
        "mpo", f"What an expert is made of. {experts.about_kinds()}.", group="Experts", choices=KINDS
    )
    top_k: int = option(2, "Experts chosen per token.", group="Experts", at_least=1)
    device: str = option(
        "auto",
        f"Where matrices are decomposed: {DEVICES}.",
        group="Decomposition",
        valid=is_device,
        expected=DEVICES,
    )
    dtype: str | None = option(
        None, "Dtype of the stored weights.", group="Output", choices=DTYPES, default_text="as in the source"
    )
    keep: float | None = option(
        None,
        "Compress: parameters that the converted FFNs may store, with all experts, biases and routers, as a "
        "share of the dense FFNs' parameters, such as 0.6.",
        group="Compression",
        above=0,
        such_as=0.6,
    )
    max_error: float | None = option(
        None,
        "Compress: largest relative error of any matrix, measured in --metric, such as 0.3. With --keep both "
        "hold; alone, the FFNs become as small as it allows.",
        group="Compression",
        above=0,
        below=1,
        such_as=0.3,
    )
    allocation: str | None = option(
        None,
        "How the parameters of --keep are shared out among the matrices. loss: smallest expected increase of "
        "the model's loss; measured: the same, after measuring the increase for each matrix alone; energy: "
        "smallest sum of squared relative errors; uniform: the same share for every matrix.",
        group="Compression",
        choices=ALLOCATIONS,
        default_text="loss with --metric loss, else energy",
    )
    metric: str | None = option(
        None,
        "What a compressed matrix, or a truncated chain, is fitted to. loss: its outputs on the calibration "
        "text, weighted by the gradients of the model's loss (holds the whole model in memory; not for "
        "chains); outputs: its outputs there, unweighted; diagonal: its weights, scaled by the root mean "
        "square of their inputs; weights: its weights (plain SVD).",
        group="Compression",
        choices=METRICS,
        default_text="loss with --calibrate (outputs for truncated chains), else weights",
    )
    correct: bool = option(
        False,
        "Fit the matrices one after another, each to the dense model's outputs on the inputs that the "
        "compressed layers before it produce. With --metric loss or outputs.",
        group="Compression",
    )
    search: bool = option(
        False,
        "Try every combination of --metric, --allocation and --correct that you have not set (up to 12) and "
        "keep the one closest to the dense model on held-out calibration text. With --keep and --calibrate.",
        group="Compression",
    )

    def check_together(self) -> None:
        if self.top_k > self.experts:
            raise RecipeError(
                f"top_k is {self.top_k} with {self.experts} experts; expected 1 to {self.experts}"
            )
        if self.search and (self.keep is None or self.max_error is not None):
            given = "without --keep" if self.keep is None else "with --max-error"
            raise RecipeError(
                f"search given {given}; expected --keep alone: sizes that differ do not compare"
            )
        if self.compresses:
            self._check_budget()
        else:
            self._check_chains()

    @property
    def compresses(self) -> bool:
        """Under a budget."""
        return self.keep is not None or self.max_error is not None

    def _check_budget(self) -> None:
        if self.allocation == "loss" and self.metric not in (None, "loss"):
            raise RecipeError(f"allocation loss given with metric {self.metric}; expected with --metric loss")
        if self.allocation == "measured" and self.keep is None:
            raise RecipeError("allocation measured given without --keep; there is no budget to share out")
        self.own_options.check_budget()

    def _check_chains(self) -> None:
        """What has a meaning without a budget: fitting chains that --bond-dim truncates."""
        given = [name for name in ("allocation", "correct", "metric", "calibrate") if getattr(self, name)]
        may_truncate = self.own_options.may_truncate()
        if given and (given[0] in ("allocation", "correct") or not may_truncate):
            raise RecipeError(f"{given[0]} given without --keep or --max-error; nothing is compressed then")
        if self.metric == "loss":
            raise RecipeError(
                "metric loss given without --keep or --max-error; expected outputs, diagonal or weights for "
                "chains that --bond-dim truncates"
            )

    def selects(self, name: str, index: int) -> bool:
        """Whether the FFN of layer `index` called `name` is to be converted."""
        if self.layers is not None and not any(index in part for part in parse_layers(self.layers)):
            return False
        if self.include and not any(fnmatchcase(name, pattern) for pattern in self.include):
            return False
        return not any(fnmatchcase(name, pattern) for pattern in self.exclude)
