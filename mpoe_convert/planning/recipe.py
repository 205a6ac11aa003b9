"""The user's choices: one frozen value that says everything a conversion depends on."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from fnmatch import fnmatchcase
from os import PathLike
from pathlib import Path
from types import MappingProxyType

from ..decomposition import SVDS
from ..decomposition.sites import LAYOUTS
from ..devices import check_device_name
from ..errors import RecipeError

BIASES = ("shared", "per-expert")
DTYPES = ("float32", "bfloat16", "float16")
GAUGES = ("canonical", "identity")
NEURON_ORDERS = ("auto", "source")
ALLOCATIONS = ("loss", "measured", "energy", "uniform")
METRICS = ("loss", "outputs", "diagonal", "weights")
# Calibration text that every Python has: its language reference.
BUILTIN_TEXT = "builtin"
# MPOE's reference code splits every matrix into five near-equal sites; three are enough at full bonds.
DEFAULT_SITES = MappingProxyType({"one-sided": 3, "two-sided": 3, "balanced": 5})


@dataclass(frozen=True)
class Recipe:
    """What to convert and how. The same recipe on the same source gives byte-identical tensors.

    Attributes:
        model: Hub id or local folder (text or a path) of a dense checkpoint.
        revision: branch, tag or commit of a Hub id.
        experts: experts per FFN (n), at least 2.
        top_k: experts chosen per token (k), at most `experts`.
        kind: what an expert is made of; a module of `mpoe_convert.experts`.
        layout: how a matrix is split into sites; see `mpoe_convert.sites`.
        sites: odd number of sites; by default 3, and 5 for the balanced layout. Kind mpo only.
        bond_dim: upper limit of every bond, or one limit per bond (a list). Of kind low-rank: the rank; of
            kind adapter: the adapter's width.
        factors: explicit site dimensions "in,in,inxout,out,out" of the hidden x inner size. Kind mpo only.
        noise: standard deviation of the perturbation of experts 1.. relative to the core's own
            root mean square; expert 0 is exact. 0 makes all experts equal.
        seed: of the perturbation and of the router rows, 0 to 2**63 - 1.
        bias: "shared" or "per-expert"; by default what the kind prefers.
        layers: layer numbers to convert, such as "0-5,8" (every stack); by default all.
        include / exclude: glob patterns on FFN names, such as "decoder.*".
        dtype: dtype of the stored floating-point tensors; by default as in the source.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps"; where matrices are decomposed.
        svd: "auto", "exact" or "randomized".
        gauge: "canonical" (the centre is the orthogonality centre of TT-SVD) or "identity" (outer cores are
            identities, the centre is the matrix; for full outer bonds). Kind mpo only.
        neuron_order: where bonds are cut: "auto" puts hidden neurons that look alike next to each other where
            less is lost then (see `neurons`), "source" leaves them as they are.
        max_shard_size: upper limit of one weight file, such as "2GB".
        keep: compress: numbers that the converted FFNs may store, experts, biases and routers included, as a
            share of the dense FFNs' numbers. The shared matrix becomes a product of two thin ones.
        max_error: compress: largest relative error that a matrix may have in the metric. With `keep` both
            hold; alone it gives the smallest FFNs that meet it.
        allocation: how ranks are shared out under `keep`: "loss" minimises the expected change of the
            model's loss (with metric "loss"), "measured" the same, half way (geometrically) between what is
            expected and what cutting every matrix alone was seen to change (with calibration), "energy" the
            sum of the squared relative errors of all matrices, "uniform" keeps the same share of every
            matrix. By default "loss" where it can, else "energy".
        metric: what a compressed matrix, or a chain with cut bonds, should be near in: outputs on the
            calibration text, weighed by what the model's "loss" makes of them; "outputs", all alike
            (SVD-LLM's whitening); "diagonal" (inputs weighed by their mean squares, as ASVD and AWT do); or
            "weights" (plain SVD). By default "loss" with calibration and "weights" without; chains take all
            but "loss", by default "outputs" with calibration. "loss" takes gradients, the whole model in
            memory.
        correct: fit every matrix to what reaches it behind those that are compressed already, one after the
            other, against the dense model's outputs. With metric "loss" or "outputs".
        search: of the metrics "loss" and "outputs", each with its own allocation, "measured" and "uniform",
            corrected and not, as far as they are left open here: write all, compare each with the dense model
            on calibration text that none was fitted to, and keep the nearest. With `keep` and calibration.
        calibrate: calibration text: files or Hub datasets (see `corpus.read`), or "builtin".
        calibration_tokens: how many of its tokens; evenly spread over the text.
        calibration_split: of Hub datasets.
        text_column / target_column: of the calibration data. Targets, where the data have them, are what an
            encoder-decoder is to say, or another language model right behind the text; they count then.
        ffn: where the FFNs are, for architectures that are not in the table:
            "layers.{}.mlp:gate_proj,up_proj,down_proj" (or "…:up,down").
        trust_remote_code: run code of its own that the source has beside its weights, as transformers does
            with the option of that name. A source that has none is converted as without it.

    Raises:
        RecipeError: a value is out of range or contradicts another.
    """

    model: str
    revision: str | None = None
    experts: int = 8
    top_k: int = 2
    kind: str = "mpo"
    layout: str = "one-sided"
    sites: int | None = None
    bond_dim: int | tuple[int, ...] = 64
    factors: str | None = None
    noise: float = 0.01
    seed: int = 0
    bias: str | None = None
    layers: str | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    dtype: str | None = None
    device: str = "auto"
    svd: str = "auto"
    neuron_order: str = "auto"
    gauge: str = "canonical"
    max_shard_size: str = "1GB"
    keep: float | None = None
    max_error: float | None = None
    allocation: str | None = None
    metric: str | None = None
    correct: bool = False
    search: bool = False
    calibrate: tuple[str, ...] = ()
    calibration_tokens: int = 65536
    calibration_split: str = "train"
    text_column: str = "text"
    target_column: str = "target"
    ffn: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self):
        if isinstance(self.model, PathLike):
            object.__setattr__(self, "model", str(self.model))
        self._check_text()
        for name in ("include", "exclude", "calibrate"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        object.__setattr__(self, "bond_dim", _bond_dim(self.bond_dim))
        self._check_experts()
        self._check_choices()
        parse_size(self.max_shard_size)
        if self.layers is not None:
            parse_layers(self.layers)
        self._check_sites()
        self._check_budget()

    def _check_text(self) -> None:
        needed = ("model", "device", "calibration_split", "text_column", "target_column")
        for name in (*needed, "revision", "factors", "ffn"):
            value = getattr(self, name)
            if not isinstance(value, str) and (value is not None or name in needed):
                raise RecipeError(f"{name} is {value!r}; expected text (quote it in a recipe file)")
        for name in ("trust_remote_code", "correct", "search"):
            if not isinstance(value := getattr(self, name), bool):
                raise RecipeError(f"{name} is {value!r}; expected true or false")
        for name, what in (("include", "pattern"), ("exclude", "pattern"), ("calibrate", "source")):
            value = getattr(self, name)
            if not isinstance(value, (str, list, tuple)) or not all(isinstance(v, str) for v in value):
                raise RecipeError(f"{name} is {value!r}; expected a {what} or a list of {what}s")

    def _check_experts(self) -> None:
        for name in ("experts", "top_k", "seed"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise RecipeError(f"{name} is {value!r}; expected a whole number")
        if self.experts < 2:
            raise RecipeError(f"experts is {self.experts}; a mixture needs at least 2")
        if not 1 <= self.top_k <= self.experts:
            raise RecipeError(
                f"top_k is {self.top_k} with {self.experts} experts; expected 1 to {self.experts}"
            )
        if not 0 <= self.seed < 2**63:
            raise RecipeError(f"seed is {self.seed}; expected 0 to 2**63 - 1, as torch's generators take")
        is_number = isinstance(self.noise, (int, float)) and not isinstance(self.noise, bool)
        if not (is_number and 0 <= self.noise < math.inf):
            raise RecipeError(f"noise is {self.noise!r}; expected a number of at least 0, such as 0.01")

    def _check_sites(self) -> None:
        sites = 3 if self.sites is None else self.sites
        if not isinstance(sites, int) or isinstance(sites, bool) or sites < 3 or sites % 2 == 0:
            raise RecipeError(f"sites is {sites!r}; expected an odd number of at least 3")
        given = [name for name in ("sites", "factors") if getattr(self, name) is not None]
        if given and self.kind != "mpo":
            raise RecipeError(
                f"{' and '.join(given)} given with kind {self.kind!r}, whose experts have no sites; expected "
                "with --kind mpo only"
            )
        if self.gauge != "canonical" and self.kind != "mpo":
            raise RecipeError(
                f"gauge {self.gauge} given with kind {self.kind!r}; expected with --kind mpo only"
            )
        if len(given) == 2 and self.sites != self.num_sites:
            raise RecipeError(
                f"sites is {self.sites} but factors {self.factors!r} has {self.num_sites}; give one of them"
            )

    def _check_choices(self) -> None:
        from ..experts import KINDS

        choices = {"kind": KINDS, "layout": LAYOUTS, "svd": SVDS, "gauge": GAUGES}
        choices |= {"neuron_order": NEURON_ORDERS}
        choices |= {"dtype": (None, *DTYPES), "bias": (None, *BIASES)}
        choices |= {"allocation": (None, *ALLOCATIONS), "metric": (None, *METRICS)}
        for name, allowed in choices.items():
            value = getattr(self, name)
            if value not in allowed:
                names = ", ".join(str(a) for a in allowed if a is not None)
                raise RecipeError(f"{name} is {value!r}; expected one of {names}")
        check_device_name(self.device)

    @property
    def compresses(self) -> bool:
        """Under a budget."""
        return self.keep is not None or self.max_error is not None

    @property
    def may_cut(self) -> bool:
        """Whether bonds may be too small for some matrix, as far as can be told without its size."""
        return self.kind == "mpo" and (self.layout == "balanced" or self.factors is not None)

    def _check_budget(self) -> None:
        for name, limit in (("keep", math.inf), ("max_error", 1.0)):
            value = getattr(self, name)
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is not None and not (is_number and 0 < value < limit):
                below = "" if limit == math.inf else f" and below {limit:g}"
                raise RecipeError(f"{name} is {value!r}; expected a number above 0{below}, such as 0.6")
        check_calibration_tokens(self.calibration_tokens)
        if self.search and (self.keep is None or self.max_error is not None):
            given = "without --keep" if self.keep is None else "with --max-error"
            raise RecipeError(
                f"search given {given}; expected --keep alone: sizes that differ do not compare"
            )
        if not self.compresses:
            self._check_chains()
            return
        if self.allocation == "loss" and self.metric not in (None, "loss"):
            raise RecipeError(f"allocation loss given with metric {self.metric}; expected with --metric loss")
        if self.allocation == "measured" and self.keep is None:
            raise RecipeError("allocation measured given without --keep; there is no budget to share out")
        if self.kind == "mpo" and (self.layout != "one-sided" or self.factors is not None):
            what = f"layout {self.layout}" if self.factors is None else "explicit factors"
            raise RecipeError(
                f"--keep and --max-error given with {what}; expected with --layout one-sided or another "
                "--kind (chains of other layouts are cut by --bond-dim)"
            )

    def _check_chains(self) -> None:
        """What has a meaning without a budget: fitting chains whose bonds --bond-dim cuts."""
        given = [name for name in ("allocation", "correct", "metric", "calibrate") if getattr(self, name)]
        if given and (given[0] in ("allocation", "correct") or not self.may_cut):
            raise RecipeError(f"{given[0]} given without --keep or --max-error; nothing is compressed then")
        if self.metric == "loss":
            raise RecipeError(
                "metric loss given without --keep or --max-error; expected outputs, diagonal or weights for "
                "chains that --bond-dim cuts"
            )

    @classmethod
    def from_mapping(cls, values: Mapping) -> Recipe:
        """A recipe from the contents of a recipe file; unknown names are errors."""
        known = {field.name for field in fields(cls)}
        values = normalised(values)
        unknown = sorted(set(values) - known)
        if unknown:
            raise RecipeError(f"unknown recipe keys {unknown}; known are {sorted(known)}")
        if "model" not in values:
            raise RecipeError("the recipe names no model")
        return cls(**{key: value for key, value in values.items() if value is not None})

    def replace(self, **changes) -> Recipe:
        """A copy with other values, checked again."""
        return replace(self, **changes)

    def to_mapping(self) -> dict:
        """Plain values, as a recipe file holds them."""
        values = asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @property
    def num_sites(self) -> int:
        if self.factors is not None:
            return self.factors.split("x")[0].count(",") + 1
        return self.sites or DEFAULT_SITES[self.layout]

    def selects(self, name: str, index: int) -> bool:
        """Whether the FFN of layer `index` called `name` is to be converted."""
        if self.layers is not None and not any(index in part for part in parse_layers(self.layers)):
            return False
        if self.include and not any(fnmatchcase(name, pattern) for pattern in self.include):
            return False
        return not any(fnmatchcase(name, pattern) for pattern in self.exclude)


def check_calibration_tokens(tokens: object) -> None:
    """Raises RecipeError unless they are a number of tokens."""
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
        raise RecipeError(f"calibration_tokens is {tokens!r}; expected a whole number of at least 1")


def normalised(values: Mapping) -> dict:
    """The same values under the names of Recipe's fields: "bond-dim" -> "bond_dim".

    Raises:
        RecipeError: a name is given twice, in two spellings.
    """
    key2value, spelled = {}, {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name in key2value:
            raise RecipeError(f"the recipe gives {name} twice, as {spelled[name]!r} and {key!r}; keep one")
        key2value[name], spelled[name] = value, key
    return key2value


def read_recipe(path: str | Path) -> dict:
    """The mapping in a YAML recipe file.

    Raises:
        RecipeError: the file cannot be read or does not hold a mapping.
    """
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"cannot read the recipe {path}: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"the recipe {path} holds {type(values).__name__}; expected `name: value`")
    return values


def _bond_dim(value) -> int | tuple[int, ...]:
    if isinstance(value, str):
        return parse_bond_dim(value)
    bonds = value if isinstance(value, (tuple, list)) else (value,)
    if not bonds or any(not isinstance(b, int) or isinstance(b, bool) for b in bonds):
        raise RecipeError(f"bond_dim is {value!r}; expected a whole number, or one for every bond")
    if min(bonds) < 1:
        raise RecipeError(f"bond_dim is {value}; a bond needs at least 1")
    return tuple(bonds) if isinstance(value, (tuple, list)) else value


def parse_bond_dim(text: str) -> int | tuple[int, ...]:
    """ "64" -> 64; "12,64,64,16" -> (12, 64, 64, 16)."""
    try:
        bonds = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise RecipeError(
            f"bond_dim is {text!r}; expected a whole number, or one for every bond: 12,64,64,16"
        ) from None
    return _bond_dim(bonds if len(bonds) > 1 else bonds[0])


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
