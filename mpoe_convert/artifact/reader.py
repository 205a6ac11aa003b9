"""Read an artifact: the config of its base, and its experts' matrices, one at a time.

config.json and the weights are enough, as `save_pretrained` of a loaded model writes them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, FamilyError
from ..options import called, switched
from ..runtime.shapes import functions, modeling
from ..source.architecture import Architecture
from ..source.checkpoint import Checkpoint, check_config, open_weights, read_config, readable
from ..source.custom_code import code_of_artifact
from ..source.families import Family, Spelling
from ..source.json_files import read_json_object
from ..source.locate import family_by_hand
from ..source.mixtures import MixtureFamily
from ..source.pairs import family_of
from ..source.renames import namings
from ..source.repository import find_repository
from ..tensors import cast, check_finite
from .block import check_block, check_tensors, missing_mixtures, refuse_missing, refuse_unconverted
from .layout import REPORT_FILE, base_config, keeps_routers
from .own_code import has_our_code
from .rounding import SCALE, bits_of, layers_of, read_core

ROLES = ("gate", "up", "down")
# The empty share: selects the shared terms alone, to which low-rank experts are added.
SHARED: Mapping[int, float] = {}


@dataclass(frozen=True)
class Mixture:
    """One mixture of an artifact, by the names that the checkpoint uses.

    Attributes:
        key: prefix of its tensors: "transformer.h.0.mlp".
        layer: the same of its layer: "transformer.h.0"; where the source was a mixture, of the block.
        path: the layer's module path below the base model: "h.0".
        form: as `modeling_mpoe.FeedForward` reads it.
        spelling: how a dense checkpoint of the family names the FFN's tensors in this layer.
    """

    key: str
    layer: str
    path: str
    form: dict = field(repr=False)
    spelling: Spelling

    @property
    def roles(self) -> tuple[str, ...]:
        """The projections that the FFN has: ("gate", "up", "down") or ("up", "down")."""
        return tuple(role for role in ROLES if role in self.form)

    def bias_kind(self, role: str) -> str | None:
        """How biases are kept: "shared", "per-expert", or None for a projection without."""
        return self.form[role]["bias"]

    def size(self, role: str) -> tuple[int, int]:
        """(input, output) features of a projection."""
        term = self.form[role]["terms"][0]
        return prod(term["in_dims"]), prod(term["out_dims"])

    def roles_by(self, name_of: Callable[[str], str]) -> dict[str, list[str]]:
        """Tensor name -> the roles whose matrices it holds; a fused tensor holds two.

        Args:
            name_of: role -> name of the tensor in the target.
        """
        found: dict[str, list[str]] = {}
        for role in self.roles:
            found.setdefault(name_of(role), []).append(role)
        return found

    def dense_name(self, role: str) -> str:
        """The projection's module in a dense checkpoint: "transformer.h.0.mlp.c_fc"; a fused one for both."""
        name = self.spelling.gate if role == "gate" and not self.spelling.fused else None
        name = name or (self.spelling.down if role == "down" else self.spelling.up)
        return f"{self.layer}.{name}"


@dataclass(frozen=True, eq=False)
class Artifact:
    """An artifact opened for reading; `open_artifact` makes it. Tensors are read when they are asked for.

    Attributes:
        checkpoint: its files and tensor headers.
        config: config.json of the dense base, as it was before the conversion.
        options: of the routers and the runtime, see `modeling_mpoe.OPTIONS`.
        num_experts: per mixture.
        top_k: experts per token.
        rule: name of the selection rule, see `modeling_mpoe.RULES`.
        parts: P, where expert e has part e mod P of an FFN's neurons; 1: experts are whole FFNs.
        shared_experts: that every token passes, behind the others.
        family: the row that describes the base.
        mixtures: in layer order.
        token: the Hub token that it was opened with.
    """

    checkpoint: Checkpoint
    config: dict
    options: dict
    num_experts: int
    top_k: int
    rule: str
    family: Family
    mixtures: tuple[Mixture, ...]
    parts: int = 1
    shared_experts: int = 0
    token: str | None = field(default=None, repr=False)
    _cores: dict[str, list[list[Tensor]]] = field(default_factory=dict, repr=False)

    @cached_property
    def architecture(self) -> Architecture:
        """The classes of the dense base."""
        return Architecture(self.config, self.checkpoint.code)

    @property
    def keeps_routers(self) -> bool:
        """Whether the source was a mixture, whose routers stayed."""
        return keeps_routers(self.checkpoint.config)

    @property
    def model_type(self) -> str:
        """The model type of the base."""
        return self.config["model_type"]

    def dtype(self, mixture: Mixture, role: str) -> str:
        """The dtype of a projection's stored cores, by torch's name."""
        name = next(self._core_names(mixture, role))[1]
        names = [name, *(f"{layer}.{SCALE}" for layer in (name, f"{name}.0"))]
        return next(self.checkpoint.tensors[n].dtype for n in names if n in self.checkpoint.tensors)

    def matrix(self, mixture: Mixture, role: str, shares: Mapping[int, float]) -> Tensor:
        """The average of the experts' matrices, weighted by their shares: (in, out), in the stored dtype.

        Args:
            mixture: one of `mixtures`.
            role: one of its roles.
            shares: expert -> its share; the shares sum to one. `SHARED`: the shared terms alone.

        Raises:
            CheckpointError: the result holds NaN or Inf, or a tensor cannot be read.
        """
        with torch.device("meta"):
            chains = [functions().Chain(term, self.num_experts) for term in mixture.form[role]["terms"]]
        stored = getattr(torch, self.dtype(mixture, role))
        work = torch.float64 if stored == torch.float64 else torch.float32
        cores = self._read_cores(mixture, role)
        total: Tensor | None = None
        for number, chain in enumerate(chains):
            for expert, share in ({0: 1.0} if all(chain.shared) else shares).items():
                part = chain.matrix(cores[number], expert, work)
                part = part if share == 1 else share * part
                total = part if total is None else total + part
        assert total is not None, "shares of no expert, for a projection without shared terms"
        name = f"{mixture.key}.{role}"
        check_finite(total, name)
        return cast(name, total, stored)

    def bias(self, mixture: Mixture, role: str, shares: Mapping[int, float]) -> Tensor | None:
        """The average of the experts' biases, (out,), as `matrix`; None for a projection without bias.

        For `SHARED`, where every expert has a bias of its own, that of expert 0.
        """
        kind = mixture.bias_kind(role)
        if kind is None:
            return None
        bias = self.checkpoint.read(f"{mixture.key}.{role}.bias")
        if kind in ("shared", "once"):
            return bias
        if len(shares) < 2:
            return bias[next(iter(shares), 0)].clone()
        work = bias if bias.dtype == torch.float64 else bias.float()
        parts = [share * work[expert] for expert, share in shares.items()]
        return sum(parts[1:], parts[0]).to(bias.dtype)

    @property
    def shared_range(self) -> range:
        """The numbers of the shared experts."""
        return range(self.num_experts, self.num_experts + self.shared_experts)

    def of_copy(self, number: int) -> list[int]:
        """The experts that hold copy `number` of an FFN's neurons, with the shared ones."""
        routed = range(number * self.parts, (number + 1) * self.parts)
        return [*routed, *self.shared_range]

    def rank(self, mixture: Mixture, role: str, expert: int) -> int:
        """The rank of what a low-rank or core-space expert adds to the shared matrix."""
        return functions().term_of(mixture.form[role]["terms"][-1], expert)["bonds"][0]

    def factors(self, mixture: Mixture, role: str, expert: int) -> tuple[Tensor, Tensor]:
        """Two matrices, (in, rank) and (rank, out), whose product a low-rank or core-space expert adds."""
        with torch.device("meta"):
            chain = functions().Chain(mixture.form[role]["terms"][-1], self.num_experts)
        first, *others = chain.cores_of(self._read_cores(mixture, role)[-1], expert)
        return first[0, :, 0, :], functions().merge_cores(others)[:, 0, :, 0]

    def adapters_add_nothing(self, mixture: Mixture, experts: Mapping[int, float]) -> bool:
        """Whether the adapters of these experts, if the kind has adapters, output zero, as after conversion.

        Args:
            mixture: one of `mixtures`.
            experts: by number; empty: all experts.
        """
        if "adapter" not in mixture.form:
            return True
        ups = self.checkpoint.read(f"{mixture.key}.adapter.aux_1")
        if ups.ndim == 1:  # of experts that differ in size
            hidden = mixture.size("up")[0]
            ups = functions().split_experts(ups, [(width, hidden) for width in mixture.form["adapter"]])
        return not any(ups[expert].any() for expert in experts or range(self.num_experts))

    def balance_bias(self, mixture: Mixture) -> Tensor | None:
        """(E,) what the router adds to the probabilities before it chooses experts; None if that is zero."""
        name = f"{mixture.key}.balance_bias"
        bias = self.checkpoint.read(name) if name in self.checkpoint.tensors else None
        return bias if bias is not None and bias.any() else None

    def owner(self, name: str) -> Mixture | None:
        """The mixture that a tensor of the checkpoint belongs to; None for a tensor copied from the base."""
        return next((m for m in self.mixtures if name.startswith(f"{m.key}.")), None)

    @property
    def kept_dense(self) -> tuple[str, ...]:
        """Paths below the base model of the layers whose FFN was not converted."""
        found = set()
        copied = [name for name in self.checkpoint.tensors if self.owner(name) is None]
        for naming in namings(self.architecture, copied):
            for spelling in self.family.spellings:
                for layer, path in zip(spelling.layers, self.family.layers, strict=True):
                    pattern = re.compile(rf"{_numbered(layer)}\.{re.escape(spelling.up)}\.weight")
                    matches = map(pattern.fullmatch, naming.values())
                    found |= {path.format(match[1]) for match in matches if match}
            if found:
                break
        return tuple(sorted(found, key=lambda path: [int(n) for n in re.findall(r"\d+", path)]))

    def _core_names(self, mixture: Mixture, role: str) -> Iterator[tuple[int, str]]:
        """(index of the term, tensor name) of a projection's cores, from left to right."""
        for number, term in enumerate(mixture.form[role]["terms"]):
            for core in modeling().name_cores(term):
                yield number, f"{mixture.key}.{role}.terms.{number}.{core}"

    def _read_cores(self, mixture: Mixture, role: str) -> list[list[Tensor]]:
        """The cores of every term. Kept until another projection is read, since experts are read in turn."""
        key = f"{mixture.key}.{role}"
        if key not in self._cores:
            self._cores.clear()
            terms: list[list[Tensor]] = [[] for _ in mixture.form[role]["terms"]]
            for number, term in enumerate(mixture.form[role]["terms"]):
                chain = modeling().Chain(term, self.num_experts + self.shared_experts)
                for k, core in enumerate(chain.core_names):
                    name = f"{key}.terms.{number}.{core}"
                    terms[number].append(self._read_core(name, chain, k))
            self._cores[key] = terms
        return self._cores[key]

    def _read_core(self, name: str, chain: Any, number: int) -> Tensor:
        """A core of a chain, as it was before it was stored, or as it was rounded."""
        checkpoint = self.checkpoint
        if name in checkpoint.tensors:
            return checkpoint.read(name)
        shape = tuple(getattr(chain, chain.core_names[number]).shape)
        return read_core(checkpoint.read, layers_of(name, chain, number), bits_of(checkpoint.config), shape)


def open_artifact(
    model: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
) -> Artifact:
    """Open an artifact for reading; reads headers, no tensors.

    Args:
        model: folder or Hub id.
        revision: of a Hub id.
        token: Hub token.
        trust_remote_code: its code may run, here or later. That of this release may without.

    Raises:
        CheckpointError: it is no converted model, has another format version, is incomplete, or has code
            that is not trusted.
        FamilyError: its family is not in the table and its report does not name its FFNs.
        HubError: the Hub refused or could not be reached.
    """
    checkpoint, shapes = _open_checkpoint(model, revision, token, trust_remote_code)
    block, runtime = checkpoint.config["mpoe"], modeling()
    config = base_config(checkpoint.config)
    architecture = Architecture(config, checkpoint.code)
    if keeps_routers(checkpoint.config):
        wiring = block["family"]
        family: Family = MixtureFamily(
            (config["model_type"],),
            (),
            wiring["slot"],
            (),
            activation="",
            by_hand=wiring.get("experts_at"),
            experts=wiring["experts"],
        )
        mixtures = tuple(_experts(checkpoint, block))
    else:
        family = _family(checkpoint, architecture)
        mixtures = _mixtures(checkpoint, block, family, architecture)
    stored = {name: tuple(tensor.shape) for name, tensor in checkpoint.tensors.items()}
    keys = [(mixture.key, mixture.path) for mixture in mixtures]
    check_tensors(stored, keys, checkpoint.config, shapes, checkpoint.source)
    return Artifact(
        checkpoint=checkpoint,
        config=config,
        options={name: checkpoint.config.get(name, default) for name, default in runtime.OPTIONS.items()},
        num_experts=block["num_experts"],
        top_k=block["top_k"],
        rule=block.get("rule", runtime.DEFAULT_RULE),
        family=family,
        mixtures=mixtures,
        parts=block.get("parts", 1),
        shared_experts=block.get("shared_experts", 0),
        token=token,
    )


def _open_checkpoint(
    model: str, revision: str | None, token: str | None, trusts_code: bool
) -> tuple[Checkpoint, list[dict[str, tuple[int, ...]]]]:
    """The checkpoint of an artifact, and the shapes of its forms, see `check_block`.

    Its custom code is fetched and may run, if that is trusted. Raises as `open_artifact`.
    """
    with readable(model):
        repository = find_repository(model, revision, token)
        config = read_config(repository)
        where = str(repository.folder / "config.json")
        refuse_unconverted(config, where)
        shapes = check_block(config, where)
        ours = {"quantization_config"} if bits_of(config) else set()
        check_config({key: value for key, value in config.items() if key not in ours}, repository)
        if not (trusts_code or has_our_code(model, revision, token)):
            raise CheckpointError(
                f"'{model}' has custom code, or that of another release: read it, and pass "
                f"{switched('trust_remote_code')} to run it"
            )
        code = code_of_artifact(repository.folder, config["mpoe"])
        if code is not None:
            repository.fetch_code()
        return open_weights(repository, config, code), shapes


def _family(checkpoint: Checkpoint, architecture: Architecture) -> Family:
    path = checkpoint.folder / REPORT_FILE
    report = read_json_object(path) if path.is_file() else {}
    by_hand = (report.get("recipe") or {}).get("ffn")
    model_type = architecture.model_type
    if by_hand:
        return family_by_hand(architecture, by_hand)
    family = None if architecture.is_custom else family_of(architecture)
    if family is None:
        raise FamilyError(
            f"{model_type} is not in the table of families or has custom code, and '{checkpoint.source}' "
            f"has no {REPORT_FILE} that says where its FFNs were ({called('ffn')}): put the report of the "
            "conversion beside the weights"
        )
    return family


def _mixtures(
    checkpoint: Checkpoint, block: dict, family: Family, architecture: Architecture
) -> tuple[Mixture, ...]:
    """All mixtures in the checkpoint's order. Raises CheckpointError if a mixture is missing."""
    end = f".{family.slot}.router.weight"
    routers = [name for name in checkpoint.tensors if name.endswith(end)]
    found: list[Mixture] = []
    for naming in namings(architecture, routers):
        layers = [(name.removesuffix(end), naming[name].removesuffix(end)) for name in routers]
        found = [mixture for layer, path in layers if (mixture := _mixture(layer, path, block, family))]
        if found:
            break
    missing = missing_mixtures(block, {mixture.path for mixture in found})
    if missing or not found:
        refuse_missing(missing or [*block["ffns"]], checkpoint.source)
    return tuple(found)


def _experts(checkpoint: Checkpoint, block: dict) -> Iterator[Mixture]:
    """The experts of an artifact of a mixture. Raises CheckpointError if those of a layer are missing."""
    for path, number in block["ffns"].items():
        layer = ".".join(filter(None, [path, block["family"]["slot"]]))
        tail = f"{layer}.{modeling().MIXTURE}"
        start = next((name.partition(tail)[0] for name in checkpoint.tensors if f"{tail}." in name), None)
        if start is None:
            refuse_missing([path], checkpoint.source)
        spelling = Spelling((), "", "")
        yield Mixture(f"{start}{tail}", f"{start}{layer}", path, block["forms"][number], spelling)


def _numbered(layer: str) -> str:
    """A regular expression for "h.{}" under any prefix, with the number as its group."""
    return r"(?:.*\.)?" + re.escape(layer).replace(r"\{\}", r"(\d+)")


def _mixture(layer: str, path_in_model: str, block: dict, family: Family) -> Mixture | None:
    """The mixture in a layer, of this prefix on disk and path in the model; None: not one of the family's."""
    for spelling in family.spellings:
        for pattern, path in zip(spelling.layers, family.layers, strict=True):
            match = re.fullmatch(_numbered(pattern), path_in_model)
            if match is None or path.format(match[1]) not in block["ffns"]:
                continue
            number = block["ffns"][path.format(match[1])]
            form = block["forms"][number]
            if ("gate" in form) == bool(spelling.gate or spelling.fused):
                return Mixture(f"{layer}.{family.slot}", layer, path.format(match[1]), form, spelling)
    return None
