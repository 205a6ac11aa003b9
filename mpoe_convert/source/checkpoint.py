"""A dense source checkpoint: every header is checked first, every tensor read only when asked for.

Opening reads no tensor data and instantiates no model. Whatever is wrong with the folder, its
config, its index or its files is a CheckpointError of one line before any work starts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING

from ..errors import CheckpointError
from . import custom_code, hub
from .architecture import Architecture
from .json_files import read_json_object
from .safetensors_file import TensorInfo, read_header, read_tensor, tensor_info
from .torch_file import BinReader, dtype_name

if TYPE_CHECKING:
    import torch


MOE_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
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
    """An opened source: all headers in `tensors`, in natural order (h.2 before h.10); no data yet.

    `source` is what the user typed, `revision` the resolved commit of a Hub source.
    `shared_storage` maps a name to the earlier name whose storage, offset, shape and stride it
    repeats (tied weights in a `.bin`; safetensors files cannot share). With `headers_only` nothing
    but JSON and tokenizer files is local and `read` refuses. `code` is the folder of code of its own,
    if there is some and it may run.
    """

    source: str
    folder: Path
    revision: str | None
    config: dict
    tensors: dict[str, TensorInfo]
    shared_storage: dict[str, str] = field(default_factory=dict)
    headers_only: bool = False
    code: Path | None = None
    _bins: BinReader | None = field(default=None, repr=False)

    @cached_property
    def architecture(self) -> Architecture:
        return Architecture(self.config, self.code)

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor into memory of its own, with the dtype and shape of `tensors[name]`.

        Raises CheckpointError for an unknown name, for a checkpoint opened with `headers_only`, and
        when the file has changed or cannot be read any more.
        """
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(
                f"{self.source} has no tensor {name!r}, expected one of its "
                f"{len(self.tensors)} names: look them up in `tensors`"
            )
        if self.headers_only:
            raise CheckpointError(
                f"cannot read tensor {name!r}: only the headers of {self.source} were fetched; "
                "open it without headers_only to download the weights"
            )
        path = self.folder / info.file
        if path.suffix == ".bin":
            assert self._bins is not None  # opening the folder made it
            tensor = self._bins.read(path, name)
        else:
            tensor = read_tensor(path, name)
        found = (dtype_name(tensor), tuple(tensor.shape))
        if found != (info.dtype, info.shape):
            raise CheckpointError(
                f"{path}: tensor {name!r} is now {found[0]} {list(found[1])}, expected "
                f"{info.dtype} {list(info.shape)}: the file changed meanwhile, run again"
            )
        return tensor

    def companion_files(self) -> list[Path]:
        """The files to copy beside converted weights: tokenizer, processor, generation config, licences.

        Only files directly in the folder, and the named chat templates that transformers keeps in a
        subfolder; never weights, config.json, README, code, indexes or hidden files.
        """
        found = [path for path in self.folder.iterdir() if _is_companion(path.name)]
        return sorted(path for path in [*found, *self.folder.glob(hub.CHAT_TEMPLATES)] if path.is_file())


def open_checkpoint(
    model: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    headers_only: bool = False,
    converted: bool = False,
    trust_remote_code: bool = False,
) -> Checkpoint:
    """Open a local folder or a Hub id: check the config and every tensor header, read no data.

    `model` is a folder if one of that name exists or if it is written like a path; anything else is
    a Hub id. A Hub source is judged by its config before its weights are downloaded. With
    `headers_only` the weights of a Hub source stay there, unless they are in the cache already or
    are `.bin` files, which have no remote headers and are downloaded after all.

    `converted` says what is expected: a model that this tool converted, or a dense one. Of a dense one,
    code of its own may run with `trust_remote_code` only (no code is run here); an artifact's always may.

    Raises CheckpointError for anything that is not a readable checkpoint of that sort, HubError for Hub
    and network trouble.
    """
    model = str(model)
    try:
        folder = _local_folder(model)
        if folder is None:
            return _open_hub(model, revision, token, headers_only, converted, trust_remote_code)
        if revision is not None:
            raise CheckpointError(
                f"--revision {revision!r} was given, but {model} is a local folder: "
                "drop --revision, or pass a Hub id"
            )
        config = _read_config(folder, model, [path.name for path in folder.iterdir()], converted)
        config, code = _admit(model, folder, config, converted, trust_remote_code, token)
        return _open_folder(model, folder, None, config, code)
    except OSError as exc:  # the Hub's OSErrors are HubErrors by now
        raise CheckpointError(
            f"{exc.filename or model} cannot be read ({exc.strerror or exc}): check the path and "
            "its permissions"
        ) from exc


def _open_hub(
    model: str, revision: str | None, token: str | None, headers_only: bool, converted: bool, trusted: bool
) -> Checkpoint:
    folder, commit = hub.download(model, revision=revision, token=token, weights=False)
    names = hub.listing(model, commit) or [path.name for path in folder.iterdir()]
    config = _read_config(folder, model, names, converted)
    wants_code = custom_code.code_of_artifact(folder, config["mpoe"]) if converted else trusted
    if wants_code and any(name.endswith(".py") for name in names):
        hub.download_code(model, commit, token)
    config, code = _admit(model, folder, config, converted, trusted, token)
    if headers_only and not hub.weights_cached(folder, names):
        headers = hub.remote_headers(model, commit, token)
        if headers is not None:
            tensors = {name: tensor_info(model, name, *header) for name, header in headers.items()}
            _reject_tensors(model, tensors)
            return Checkpoint(model, folder, commit, config, _natural(tensors), headers_only=True, code=code)
    hub.download(model, revision=commit, token=token)
    return _open_folder(model, folder, commit, config, code)


def _admit(model: str, folder: Path, config: dict, converted: bool, trusted: bool, token: str | None):
    """(config, folder of code that may run)."""
    if converted:
        return config, custom_code.code_of_artifact(folder, config["mpoe"])
    return custom_code.admit(model, folder, config, trusted, token)


def _local_folder(model: str) -> Path | None:
    path = Path(model).expanduser() if model.startswith("~") else Path(model)
    if path.is_dir() and model.strip():  # Path("") is the current folder, which nobody asked for
        return path
    if path.is_file():
        raise CheckpointError(
            f"{model} is a file, expected a folder with config.json and weights, or a Hub id: "
            f"pass its folder, {path.parent}"
        )
    dots = model in (".", "..") or model.startswith(("./", "../", ".\\", "..\\", "~"))
    if dots or path.is_absolute() or not model.strip():
        raise CheckpointError(f"there is no folder {model!r}: check the path, or pass a Hub id")
    return None


# --------------------------------------------------------------------------------------- the config


def _read_config(folder: Path, source: str, names: Iterable[str], converted: bool) -> dict:
    names = list(names)
    if "adapter_config.json" in names:
        raise CheckpointError(
            f"{source} is a PEFT adapter (it has adapter_config.json), not a whole model: "
            "merge it into its base model (merge_and_unload), save that, and convert the result"
        )
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"{source} has no config.json, expected a transformers checkpoint{_hint(folder, names)}"
        )
    config = read_json_object(path, "an object with 'model_type'")
    _reject_config(config, path, converted)
    return config


def _hint(folder: Path, names: list[str]) -> str:
    """Where the model may be instead: subfolders with a config, or what else was found."""
    subfolders = {str(PurePosixPath(name).parent) for name in names if name.endswith("/config.json")}
    subfolders |= {name for name in names if (folder / name / "config.json").is_file()}
    if subfolders:
        found = ", ".join(sorted(subfolders)[:5])
        first = "" if folder.joinpath(min(subfolders)).is_dir() else "download the repository and "
        return f"; found a config.json in its subfolder {found}: {first}pass that folder"
    found = ", ".join(sorted(names)[:8]) or "nothing"
    return f"; found {found}: check the path or the id"


def _reject_config(config: dict, path: Path, converted: bool) -> None:
    model_type = config.get("model_type")
    is_converted = "mpoe" in config or str(model_type).startswith("mpoe_")
    if converted and not isinstance(config.get("mpoe"), dict):
        raise CheckpointError(
            f"{path} describes no converted model (model type {model_type!r}, no mpoe block): expected an "
            "artifact of mpoe-convert, as a conversion or finetune writes it"
        )
    if is_converted and not converted:
        raise CheckpointError(f"{path} describes an already converted model: convert its dense base instead")
    if not isinstance(model_type, str) or not model_type:
        raise CheckpointError(
            f"{path} has no 'model_type' (old checkpoints lack it): add the architecture's name, "
            'for example "model_type": "bert", and run again'
        )
    parts = [value for key, value in config.items() if isinstance(value, dict) and key != "mpoe"]
    for part in [config, *parts]:
        if quantized := part.get("quantization_config"):
            method = quantized.get("quant_method") if isinstance(quantized, dict) else None
            raise CheckpointError(
                f"{path} says the weights are quantised ({method or 'unnamed method'}): dequantise first, "
                "or convert the original full-precision checkpoint"
            )
        for key in MOE_KEYS:
            if _most(part.get(key)) > 1:
                raise CheckpointError(
                    f"{path} describes a mixture of experts already ({key} = {part[key]}), "
                    "expected a dense model: choose a dense checkpoint"
                )


def _most(count: object) -> int:
    """The largest integer in a config value that is a number or, per layer, a list of numbers."""
    counts = count if isinstance(count, list) else [count]
    return max((item for item in counts if isinstance(item, int)), default=0)


# -------------------------------------------------------------------------------------- the weights


def _open_folder(
    source: str, folder: Path, revision: str | None, config: dict, code: Path | None
) -> Checkpoint:
    files, weight_map, index = weight_files(source, folder, revision)
    bins = BinReader()
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
                    f"{folder}: tensor {name!r} is in both {tensors[name].file} and {file}, "
                    "expected it once: fetch the checkpoint again"
                )
            tensors[name] = info
    _check_index(folder, weight_map, index, tensors)
    _reject_tensors(source, tensors)
    return Checkpoint(source, folder, revision, config, _natural(tensors), shared, code=code, _bins=bins)


def weight_files(source: str, folder: Path, revision: str | None) -> tuple[list[str], dict[str, str], str]:
    """The weight files by transformers' order of preference; what their index says, and its name, if any.

    Raises CheckpointError: there are none, or not all that the index names.
    """
    for single in hub.SINGLE.values():
        if (folder / single).is_file():
            return [single], {}, ""
        index = f"{single}.index.json"
        if (folder / index).is_file():
            weight_map = _read_index(folder, index, Path(single).suffix)
            return sorted(set(weight_map.values())), weight_map, index
    names = [path.name for path in folder.iterdir() if path.name != "config.json"]
    if revision is not None:
        names = hub.listing(source, revision) or names
    raise CheckpointError(
        f"{source} has no weights that can be read, expected model.safetensors, pytorch_model.bin "
        f"or an index of shards{_foreign(names) or _hint(folder, names)}"
    )


def _foreign(names: list[str]) -> str:
    top = sorted(name for name in names if "/" not in name and Path(name).suffix in FOREIGN)
    if not top:
        return ""
    found = ", ".join(f"{name} ({FOREIGN[Path(name).suffix]})" for name in top[:5])
    return f"; found only {found}: save the model with transformers as safetensors first"


def _read_index(folder: Path, index: str, suffix: str) -> dict[str, str]:
    path = folder / index
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not weight_map or not all(isinstance(file, str) for file in weight_map.values()):
            raise ValueError("its weight_map is empty or names something other than files")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise CheckpointError(
            f"{path} is not an index of shards ({exc}), expected an object with "
            "'weight_map': {tensor: file}: fetch it again"
        ) from exc
    files = sorted(set(weight_map.values()))
    for file in files:
        if not stays_inside(file) or PurePosixPath(file).suffix != suffix:
            raise CheckpointError(
                f"{path} names the file {file!r}, expected a {suffix} file inside the folder: "
                "do not trust this checkpoint"
            )
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of the {len(files)} shards that {index} names: "
            f"{_few(missing)}: finish the download"
        )
    return weight_map


def stays_inside(file: str) -> bool:
    """Judge the name, not where it leads: in the Hub's cache files are links to blobs elsewhere."""
    parts = PurePosixPath(file).parts
    plain = bool(parts) and ".." not in parts and "\\" not in file and file.isprintable()
    return plain and not PurePosixPath(file).is_absolute() and not PureWindowsPath(file).drive


def _check_index(folder: Path, weight_map: dict, index: str, tensors: dict[str, TensorInfo]) -> None:
    # Tensors that a shard holds and the index does not name are kept: transformers reads whole
    # shards, too, and uses the index only to find them. The other way round a tensor would be
    # missing, and the user should know now.
    for file in sorted(set(weight_map.values())):
        lost = [
            name
            for name, shard in weight_map.items()
            if shard == file and (name not in tensors or tensors[name].file != file)
        ]
        if lost:
            raise CheckpointError(
                f"{folder / file} lacks {len(lost)} tensors that {index} promises in it: "
                f"{_few(lost)}: fetch the checkpoint again"
            )


def _reject_tensors(source: str, tensors: dict[str, TensorInfo]) -> None:
    if not tensors:
        raise CheckpointError(
            f"{source} holds weight files without a single tensor: fetch the checkpoint again"
        )
    for name, info in tensors.items():
        if ".experts." in name or "block_sparse_moe" in name:
            raise CheckpointError(
                f"{source} is a mixture of experts already (tensor {name!r} in {info.file}), "
                "expected a dense model: choose a dense checkpoint"
            )
        small = info.dtype in ("int8", "uint8") or info.dtype.startswith("float8")
        matrix = len(info.shape) >= 2 and name.endswith(".weight")
        if (small and matrix) or name.endswith(".qweight"):
            raise CheckpointError(
                f"{source} is quantised (tensor {name!r} in {info.file} is {info.dtype}), expected "
                "floating-point weights: dequantise first, or convert the original checkpoint"
            )


def _natural(tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    def key(name: str) -> list[str | int]:
        parts = re.split(r"([0-9]+)", name)  # text and digits take turns, so that keys compare
        return [int(part) if at % 2 else part for at, part in enumerate(parts)]

    return {name: tensors[name] for name in sorted(tensors, key=key)}


def _few(names: list[str], limit: int = 3) -> str:
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(repr(name) for name in names[:limit]) + rest


def _is_companion(name: str) -> bool:
    never = (*hub.NEVER_PATTERNS, ".*", "*.bin", "*.safetensors", "*.index.json", "config.json")
    if any(fnmatchcase(name, pattern) for pattern in never) or name.lower().startswith("readme"):
        return False
    return any(fnmatchcase(name, pattern) for pattern in hub.COMPANION_PATTERNS)
