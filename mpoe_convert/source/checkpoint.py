"""A checkpoint: all headers are checked when it is opened, a tensor is read when it is asked for.

Opening reads no tensor data. It builds a model, on the meta device, only to tell a trainer's wrapper from a
module of that name. Any fault of the folder, its config, its index or its
files is a CheckpointError of one line before other work starts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from ..errors import CheckpointError, FamilyError, RequestError, few
from ..options import switched
from . import custom_code, hub
from .architecture import Architecture
from .families import PAIR, REFUSED, refusal
from .json_files import read_json_object
from .paths import stays_inside
from .ranges import RemoteWeights
from .repository import Folder, HubSnapshot, Repository, find_repository
from .safetensors_file import TensorInfo, read_header, read_tensor
from .sentence_encoder import local_module_files
from .torch_file import BinReader, dtype_name
from .wrappers import unwrap

if TYPE_CHECKING:
    import torch


# How transformers itself dequantises a model, by the method that config.json names.
DEQUANTISE = {
    "mxfp4": " (AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=Mxfp4Config("
    "dequantize=True)), then save_pretrained)",
    "fp8": " (AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=FineGrainedFP8Config("
    "dequantize=True)), then save_pretrained)",
}
FOREIGN = {
    ".h5": "TensorFlow",
    ".msgpack": "Flax",
    ".gguf": "GGUF",
    ".onnx": "ONNX",
    ".pth": "PyTorch .pth",
    ".pt": "PyTorch .pt",
    ".ckpt": "training .ckpt",
    ".safetensors": "safetensors of another name",
    ".bin": ".bin of another name",
}


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """An opened checkpoint; `open_checkpoint` makes it.

    Attributes:
        source: what the user typed.
        folder: where its files are.
        revision: the commit of a Hub source.
        config: config.json; without its auto_map where custom code must not run.
        tensors: name -> header, in natural order (h.2 before h.10).
        shared_storage: name -> the earlier name whose storage, offset, shape and stride it repeats (tied
            weights in a `.bin`; safetensors files cannot share).
        headers_only: nothing but JSON and companions is local, and `read` refuses.
        remote: the weight files on the Hub that `read` reads parts of; None: they are local.
        code: folder of the custom code, if there is some and it may run.
        stored_names: name -> the name in the file, of tensors whose wrappers were taken off
            (`wrappers.unwrap`).
        key_mapping: what `from_pretrained` needs to read those names.
        notes: what a user should know of it.
    """

    source: str
    folder: Path
    revision: str | None
    config: dict
    tensors: dict[str, TensorInfo]
    shared_storage: dict[str, str] = field(default_factory=dict)
    headers_only: bool = False
    code: Path | None = None
    stored_names: dict[str, str] = field(default_factory=dict)
    key_mapping: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    remote: RemoteWeights | None = None
    _bins: BinReader | None = field(default=None, repr=False)
    _halves: dict[str, tuple[int, torch.Tensor]] = field(default_factory=dict, repr=False)

    @cached_property
    def architecture(self) -> Architecture:
        """The classes and the config of the model."""
        return Architecture(self.config, self.code)

    @property
    def uncut(self) -> Checkpoint:
        """What its tensors are read from, before experts are left out."""
        return self

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape of a tensor that `read` gives."""
        return self.tensors[name]

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor into memory of its own, with the dtype and shape of `tensors[name]`.

        Raises:
            CheckpointError: the name is unknown, the checkpoint was opened with `headers_only`, or the file
                has changed or cannot be read any more.
            HubError: the weights are on the Hub, which refuses, cannot be reached, or has other ones now.
        """
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(
                f"'{self.source}' has no tensor {name!r}, expected one of its "
                f"{len(self.tensors)} names: look them up in `tensors`"
            )
        if self.headers_only:
            raise CheckpointError(
                f"cannot read tensor {name!r}: only the headers of '{self.source}' were fetched; "
                "open it without headers_only to download the weights"
            )
        path, stored = self.folder / info.file, self.stored_names.get(name, name)
        if self.remote is not None:
            tensor = self.remote.read(info, stored)
        elif path.suffix == ".bin":
            assert self._bins is not None  # opening the folder made it
            tensor = self._bins.read(path, stored)
        else:
            tensor = read_tensor(path, stored)
        found = (dtype_name(tensor), tuple(tensor.shape))
        if found != (info.dtype, info.shape):
            raise CheckpointError(
                f"'{path}': tensor {name!r} is now {found[0]} {list(found[1])}, expected "
                f"{info.dtype} {list(info.shape)}: the file changed meanwhile, run again"
            )
        return tensor

    def read_for(self, name: str, part: int | None) -> torch.Tensor:
        """`read` of a tensor that may hold gate and up. One on the Hub is requested once for both.

        Args:
            part: whose half is wanted, 0 or 1; then the tensor is kept until it is read for the other one.
                None: it is not shared.
        """
        if part is None or self.remote is None:
            return self.read(name)
        wanted, kept = self._halves.pop(name, (None, None))
        if kept is not None and wanted == part:
            return kept
        tensor = self.read(name)
        self._halves[name] = 1 - part, tensor
        return tensor

    @property
    def stored_files(self) -> list[str]:
        """The names of the weight files that its tensors lie in."""
        return sorted({info.file for info in self.tensors.values()})

    def names(self) -> list[str]:
        """Paths of the source's files, also of those that were left on the Hub; of a folder its entries."""
        if self.revision is None:
            return Folder(self.source, self.folder).names()
        return HubSnapshot(self.source, self.folder, self.revision).names()

    def companion_files(self) -> list[Path]:
        """The companions, to be copied beside converted weights: tokenizer, generation config, licence.

        Only files directly in the folder, the named chat templates that transformers keeps in a subfolder,
        and the modules of a sentence encoder with their weights; never the model's own weights, config.json,
        README, code, indexes or hidden files.

        Raises:
            CheckpointError: modules.json is damaged, or names a folder outside.
        """
        found = [path for path in self.folder.iterdir() if _is_companion(path.name)]
        found += [*self.folder.glob(hub.CHAT_TEMPLATES), *local_module_files(self.folder)]
        return sorted({path for path in found if path.is_file()})


def open_checkpoint(
    model: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    headers_only: bool = False,
    stream: bool = False,
    trust_remote_code: bool = False,
) -> Checkpoint:
    """Open a model: check the config and every tensor header, read no data.

    A Hub source is judged by its config before its weights are downloaded.

    Args:
        model: folder or Hub id, see `find_repository`.
        revision: of a Hub id.
        token: Hub token.
        headers_only: leave the weights of a Hub source there, unless they are in the cache already or are
            `.bin` files, which have no remote headers.
        stream: leave the weights of a Hub source there, unless they are in the cache already, and read each
            tensor by requests for its bytes.
        trust_remote_code: custom code may run, here or later.

    Raises:
        CheckpointError: it is not a readable checkpoint of a model.
        FamilyError: it needs custom code, which is not trusted, or its model cannot be built.
        HubError: the Hub refuses or cannot be reached.
        RequestError: a revision or `stream` is given with a folder.
    """
    model = str(model)
    with readable(model):
        repository = find_repository(model, revision, token)
        if stream and repository.revision is None:
            raise RequestError(
                f"{switched('stream')} was given, but {model!r} is a local folder: leave it out, or pass a "
                "Hub id"
            )
        _reject_broken_links(repository.folder)
        config = read_config(repository)
        _reject_artifact(config, repository)
        check_config(config, repository)
        if trust_remote_code:
            repository.fetch_code()
        config, code = custom_code.admit(model, repository.folder, config, trust_remote_code, token)
        return _unwrapped(open_weights(repository, config, code, headers_only=headers_only, stream=stream))


def open_weights(
    repository: Repository,
    config: dict,
    code: Path | None,
    *,
    headers_only: bool = False,
    stream: bool = False,
) -> Checkpoint:
    """Fetch the weights of a repository and read their headers.

    Args:
        repository: where the files are.
        config: its config.json, as it was admitted.
        code: folder of the custom code that may run.
        headers_only, stream: as for `open_checkpoint`.

    Raises:
        CheckpointError: weights are missing, damaged or quantised, or they are to be streamed and cannot be.
        HubError: the Hub refuses or cannot be reached.
    """
    source, folder, revision = repository.source, repository.folder, repository.revision
    choices = _weight_choices(config, repository)
    if (headers_only or stream) and (found := repository.remote_headers(choices)) is not None:
        _reject_tensors(source, found.tensors)
        if stream:
            repository.fetch_modules()
        return Checkpoint(
            source,
            folder,
            revision,
            config,
            _natural(found.tensors),
            headers_only=not stream,
            code=code,
            remote=found.weights if stream else None,
        )
    if stream and not hub.weights_cached(folder, repository.names(), choices):
        raise CheckpointError(
            f"'{source}' has no safetensors files, whose tensors can be read one by one: leave out "
            f"{switched('stream')}"
        )
    repository.fetch_weights(choices)
    bins = BinReader()
    tensors, shared = _read_headers(repository, bins, choices)
    _reject_tensors(source, tensors)
    return Checkpoint(source, folder, revision, config, _natural(tensors), shared, code=code, _bins=bins)


def _unwrapped(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with the names that its tensors had before a trainer wrapped the model."""
    tensors, shared = checkpoint.tensors, checkpoint.shared_storage
    found = unwrap(checkpoint.source, checkpoint.architecture, tensors)
    if found is None:
        return checkpoint
    plain = {stored: name for name, stored in found.stored_names.items()}
    return replace(
        checkpoint,
        tensors={plain[name]: replace(info, name=plain[name]) for name, info in tensors.items()},
        shared_storage={plain[name]: plain[first] for name, first in shared.items()},
        stored_names=found.stored_names,
        key_mapping=dict.fromkeys(found.taken, ""),
        notes=(found.note,),
    )


@contextmanager
def readable(model: str) -> Iterator[None]:
    """Turn an OSError inside the block into a CheckpointError of one line; Hub errors are HubErrors."""
    try:
        yield
    except OSError as exc:
        raise CheckpointError(
            f"'{exc.filename or model}' cannot be read ({exc.strerror or exc}): check the path and "
            "its permissions"
        ) from exc


# --------------------------------------------------------------------------------------- the config


def _reject_broken_links(folder: Path) -> None:
    """Raise CheckpointError for a link to nothing where config.json or a companion has to be."""
    for path in sorted([*folder.iterdir(), *folder.glob(hub.CHAT_TEMPLATES)]):
        if path.name == "config.json" or _is_companion(path.name):
            _reject_broken_link(path)


def _reject_broken_link(path: Path) -> None:
    if path.is_symlink() and not path.exists():
        raise CheckpointError(
            f"'{path}' is a link to '{path.readlink()}', which is not there: download the model again, or "
            "copy it with what its links point to (cp -rL)"
        )


def read_config(repository: Repository) -> dict:
    """The config.json of a repository. Raises CheckpointError if it has none, or is a PEFT adapter."""
    names = repository.names()
    if "adapter_config.json" in names:
        raise CheckpointError(
            f"'{repository.source}' is a PEFT adapter (it has adapter_config.json), not a whole model: "
            "merge it into its base model (merge_and_unload), save that, and convert the result"
        )
    path = repository.folder / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"'{repository.source}' has no config.json, expected a transformers checkpoint"
            f"{_hint(repository.folder, names)}"
        )
    return read_json_object(path, "an object with 'model_type'")


def _hint(folder: Path, names: list[str]) -> str:
    """Where the model may be instead: subfolders with a config, or what else was found."""
    subfolders = {str(PurePosixPath(name).parent) for name in names if name.endswith("/config.json")}
    subfolders |= {name for name in names if (folder / name / "config.json").is_file()}
    if subfolders:
        found = few(sorted(subfolders), 5)
        first = "" if folder.joinpath(min(subfolders)).is_dir() else "download the repository and "
        return f"; found a config.json in its subfolder {found}: {first}pass that folder"
    found = few(sorted(names), 8) or "nothing"
    return f"; found {found}: check the path or the id"


def _reject_artifact(config: dict, repository: Repository) -> None:
    if "mpoe" in config or str(config.get("model_type")).startswith("mpoe_"):
        raise CheckpointError(
            f"'{repository.folder / 'config.json'}' describes an already converted model: convert its dense "
            "base instead"
        )


def check_config(config: dict, repository: Repository) -> None:
    """Check a config.

    Raises:
        CheckpointError: it has no model type, an entry is no such thing as transformers writes there, or the
            weights are quantised.
        FamilyError: it is of a mixture that cannot be converted.
    """
    path, model_type = repository.folder / "config.json", config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise CheckpointError(
            f"'{path}' has no 'model_type' (old checkpoints lack it): add the architecture's name, "
            'for example "model_type": "bert", and run again'
        )
    _check_entries(config, str(path))
    if model_type in REFUSED:
        raise FamilyError(refusal(model_type, REFUSED[model_type]))
    parts = [value for key, value in config.items() if isinstance(value, dict) and key != "mpoe"]
    for part in [config, *parts]:
        if quantized := part.get("quantization_config"):
            method = quantized.get("quant_method") if isinstance(quantized, dict) else None
            raise CheckpointError(
                f"'{path}' says the weights are quantised ({method or 'unnamed method'}): dequantise first, "
                f"or convert the original full-precision checkpoint{DEQUANTISE.get(str(method), '')}"
            )


def _check_entries(config: dict, path: str) -> None:
    """Entries that are read here, and that transformers reads without looking at what they are."""
    named = config.get("architectures")
    if not (named is None or (isinstance(named, list) and all(isinstance(name, str) for name in named))):
        raise _of_wrong_type(path, "architectures", named, 'a list of names, such as ["BertModel"]')
    parts = ("encoder", "decoder") if config["model_type"] == PAIR else ()
    for part in parts:
        if not isinstance(config.get(part), dict):
            raise _of_wrong_type(path, part, config.get(part), "that model's own config")


def _of_wrong_type(path: str, key: str, value: object, expected: str) -> CheckpointError:
    return CheckpointError(f"'{path}' has {key!r} {value!r}; expected {expected}: correct the entry")


# -------------------------------------------------------------------------------------- the weights


def _weight_choices(config: dict, repository: Repository) -> Sequence[str]:
    """Files to look for: the one that config.json names for transformers, or those of the usual names.

    Raises CheckpointError if transformers would not read the file that is named.
    """
    named = config.get("transformers_weights")
    if named is None:
        return hub.WEIGHT_FILES
    safe = isinstance(named, str) and named.removesuffix(hub.INDEX).endswith(".safetensors")
    if not safe or not stays_inside(named):
        raise CheckpointError(
            f"'{repository.folder / 'config.json'}' names the weights {named!r} (transformers_weights), "
            "expected a .safetensors file, or an index of such files, inside the folder: correct the entry, "
            "or leave it out"
        )
    return (named,)


def _read_headers(
    repository: Repository, bins: BinReader, choices: Sequence[str]
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """(name -> header, name -> earlier name of the same storage) of all weight files."""
    folder = repository.folder
    files, weight_map, index = weight_files(repository, choices)
    tensors: dict[str, TensorInfo] = {}
    shared: dict[str, str] = {}
    for file in files:
        path = folder / file
        if path.suffix == ".bin":
            infos, ties = bins.headers(path, file)
            shared.update(ties)
        else:
            infos = read_header(path, file)
        for name, info in infos.items():
            if name in tensors:
                raise CheckpointError(
                    f"'{folder}': tensor {name!r} is in both '{tensors[name].file}' and '{file}', "
                    "expected it once: fetch the checkpoint again"
                )
            tensors[name] = info
    _check_index(folder, weight_map, index, tensors)
    return tensors, shared


def weight_files(
    repository: Repository, choices: Sequence[str] = hub.WEIGHT_FILES
) -> tuple[list[str], dict[str, str], str]:
    """The weight files in a folder.

    Args:
        repository: where they are.
        choices: files of weights, or indexes of shards, to look for; the first that is there counts.

    Returns:
        (names of the files, {tensor: file} of their index, name of the index); {} and "" without an index.

    Raises:
        CheckpointError: there are none, or a file that the index names is missing.
    """
    folder = repository.folder
    for choice in choices:
        _reject_broken_link(folder / choice)
        if not (folder / choice).is_file():
            continue
        if not choice.endswith(hub.INDEX):
            return [choice], {}, ""
        weight_map = _read_index(folder, choice, Path(choice.removesuffix(hub.INDEX)).suffix)
        return sorted(set(weight_map.values())), weight_map, choice
    if choices != hub.WEIGHT_FILES:
        raise CheckpointError(
            f"'{repository.source}' lacks {choices[0]}, the weights that its config.json names "
            "(transformers_weights): fetch them, or leave the entry out"
        )
    names = [name for name in repository.names() if name != "config.json"]
    raise CheckpointError(
        f"'{repository.source}' has no weights that can be read, expected model.safetensors, "
        f"pytorch_model.bin or an index of shards{_foreign(names) or _hint(folder, names)}"
    )


def _foreign(names: list[str]) -> str:
    top = sorted(name for name in names if "/" not in name and Path(name).suffix in FOREIGN)
    if not top:
        return ""
    found = ", ".join(f"'{name}' ({FOREIGN[Path(name).suffix]})" for name in top[:5])
    return f"; found only {found}: save the model with transformers as safetensors first"


def _read_index(folder: Path, index: str, suffix: str) -> dict[str, str]:
    path = folder / index
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not weight_map or not all(isinstance(file, str) for file in weight_map.values()):
            raise ValueError("its weight_map is empty or names something other than files")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise CheckpointError(
            f"'{path}' is not an index of shards ({exc}), expected an object with "
            "'weight_map': {tensor: file}: fetch it again"
        ) from exc
    files = sorted(set(weight_map.values()))
    for file in files:
        if not stays_inside(file) or PurePosixPath(file).suffix != suffix:
            raise CheckpointError(
                f"'{path}' names the file {file!r}, expected a {suffix} file inside the folder: "
                "do not trust this checkpoint"
            )
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise CheckpointError(
            f"'{folder}' lacks {len(missing)} of the {len(files)} shards that '{index}' names: "
            f"{few(missing)}: finish the download"
        )
    return weight_map


def _check_index(folder: Path, weight_map: dict, index: str, tensors: dict[str, TensorInfo]) -> None:
    # Tensors that a shard holds and the index does not name are kept: transformers reads whole
    # shards, too, and uses the index only to find them. A tensor that the index names and no shard holds
    # is missing, and the user should know now.
    for file in sorted(set(weight_map.values())):
        lost = [
            name
            for name, shard in weight_map.items()
            if shard == file and (name not in tensors or tensors[name].file != file)
        ]
        if lost:
            raise CheckpointError(
                f"'{folder / file}' lacks {len(lost)} tensors that '{index}' promises in it: "
                f"{few(lost)}: fetch the checkpoint again"
            )


def _reject_tensors(source: str, tensors: dict[str, TensorInfo]) -> None:
    if not tensors:
        raise CheckpointError(
            f"'{source}' holds weight files without a single tensor: fetch the checkpoint again"
        )
    for name, info in tensors.items():
        small = info.dtype in ("int8", "uint8") or info.dtype.startswith("float8")
        matrix = len(info.shape) >= 2 and name.endswith(".weight")
        if (small and matrix) or name.endswith(".qweight"):
            raise CheckpointError(
                f"'{source}' is quantised (tensor {name!r} in '{info.file}' is {info.dtype}), expected "
                "floating-point weights: dequantise first, or convert the original checkpoint"
            )


def _natural(tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    def key(name: str) -> list[str | int]:
        parts = re.split(r"([0-9]+)", name)  # text and digits alternate, so that keys compare
        return [int(part) if at % 2 else part for at, part in enumerate(parts)]

    return {name: tensors[name] for name in sorted(tensors, key=key)}


def _is_companion(name: str) -> bool:
    never = (*hub.NEVER_PATTERNS, ".*", "*.bin", "*.safetensors", "*.index.json", "config.json")
    if any(fnmatchcase(name, pattern) for pattern in never) or name.lower().startswith("readme"):
        return False
    return any(fnmatchcase(name, pattern) for pattern in hub.COMPANION_PATTERNS)
