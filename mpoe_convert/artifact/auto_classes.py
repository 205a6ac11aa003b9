"""Write into a folder's files the classes that transformers' Auto classes otherwise choose by model type.

AutoTokenizer, AutoImageProcessor and their like look the model type up in tables. The type of an artifact is
in none of them, and that of an export is another one, so the files have to name what the source loads as.
"""

from __future__ import annotations

import hashlib
import warnings
from copy import deepcopy
from importlib import import_module
from logging import CRITICAL
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..source.architecture import Architecture
from ..source.checkpoint import Checkpoint
from ..source.json_files import read_json_object, write_json
from ..source.memo import remembered
from ..source.stock_shapes import stock_processors
from .layout import is_weights

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

TOKENIZER_CONFIG = "tokenizer_config.json"
PROCESSOR_CONFIG = "processor_config.json"
# Any of these is a tokenizer's vocabulary.
VOCABULARIES = (
    *("tokenizer.json", "vocab.json", "vocab.txt", "tekken.json"),
    *("spiece.model", "tokenizer.model", "sentencepiece.bpe.model", "sentencepiece.model", "tiktoken.model"),
    "source.spm",
)
# The class that takes a tokenizer.json as it is, by the name that every release of transformers knows.
BACKEND = "PreTrainedTokenizerFast"
_BACKENDS = ("TokenizersBackend", "PythonBackend", "MistralCommonBackend")


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds files of a tokenizer."""
    return any((folder / name).is_file() for name in (TOKENIZER_CONFIG, *VOCABULARIES))


def name_classes(folder: Path, checkpoint: Checkpoint, architecture: Architecture) -> None:
    """Name in a new artifact's files the tokenizer and the processors that its source loads as.

    Files that name a class that is found all the same stay as they are. Of custom code nothing is changed.

    Args:
        folder: the artifact, which holds the companions of its source already.
        checkpoint: the source.
        architecture: of the source; its code is run only if it may.

    Raises:
        CheckpointError: one of the files is no JSON object.
        OSError: one of the files cannot be read or written.
    """

    def name() -> None:
        _name_processors(folder, architecture)
        if has_tokenizer(folder) and not has_own_tokenizer(folder):
            _name_tokenizer(folder, checkpoint, architecture)

    def learn() -> dict[str, str]:
        before = _digests(folder)
        name()
        changed = [file for file, digest in _digests(folder).items() if before.get(file) != digest]
        return {file: (folder / file).read_text(encoding="utf-8") for file in changed}

    if architecture.code is not None:
        name()
        return
    of = [_known_as(checkpoint), architecture.config, _digests(folder)]
    for file, text in remembered("classes in files", of, learn).items():
        (folder / file).write_text(text, encoding="utf-8")


def _digests(folder: Path) -> dict[str, str]:
    """Name -> SHA-256 of the files directly in a folder, but its weights: a run that resumes has some."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and not is_weights(path.name))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _known_as(checkpoint: Checkpoint) -> str:
    """The name of a source: AutoTokenizer also goes by the names of some repositories."""
    return checkpoint.source if checkpoint.revision else str(checkpoint.folder)


def keep_tokenizer(folder: Path, source: Path, trusted: bool) -> None:
    """Let an export's tokenizer encode as the artifact's: name its class, or write it out as a plain backend.

    Args:
        folder: the export, which holds its config.json and the artifact's companions.
        source: the artifact.
        trusted: custom code of the artifact's tokenizer may run.
    """
    from transformers import PreTrainedConfig

    if not has_tokenizer(folder) or has_own_tokenizer(folder):
        return
    wanted = _load(source, PreTrainedConfig(), trusted)  # no model type has a say there
    if wanted is not None:
        _keep_class(folder, wanted, None, trusted)


# ---------------------------------------------------------------------------------------------------
# Tokenizers


def _name_tokenizer(folder: Path, checkpoint: Checkpoint, architecture: Architecture) -> None:
    from transformers import PreTrainedConfig

    config = architecture.make_config()
    config._name_or_path = _known_as(checkpoint)
    tokenizer = _load(checkpoint.folder, config, trusted=architecture.code is not None)
    if tokenizer is None:
        name = _by_table(architecture, _read(folder / TOKENIZER_CONFIG).get("tokenizer_class"))
    elif not type(tokenizer).__module__.startswith("transformers."):
        return
    else:
        name = _class_name(folder, type(tokenizer).__name__)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if getattr(backend, "fix_mistral_regex", False):  # a correction that is made by model type
            _write_backend(folder, tokenizer)
    if name:
        _write_class(folder, name)
    if tokenizer is not None:
        # Some classes are taken by model type, and not by name: LlamaTokenizer for a byte-level vocabulary.
        _keep_class(folder, tokenizer, PreTrainedConfig(), trusted=False)


def _keep_class(
    folder: Path, wanted: PreTrainedTokenizerBase, config: PretrainedConfig | None, trusted: bool
) -> None:
    """Write a tokenizer out as a plain backend where a folder's files load as another class.

    Args:
        folder: with the files.
        wanted: the tokenizer that they are to load as.
        config / trusted: as of `_load`.
    """
    found = _load(folder, config, trusted)
    if found is not None and type(found) is not type(wanted) and hasattr(wanted, "backend_tokenizer"):
        _write_backend(folder, wanted)


def has_own_tokenizer(folder: Path) -> bool:
    """Whether the tokenizer is custom code, whose class the auto_map names."""
    auto_map = _read(folder / TOKENIZER_CONFIG).get("auto_map") or ()
    return isinstance(auto_map, list) or "AutoTokenizer" in auto_map


def _load(folder: Path, config: PretrainedConfig | None, trusted: bool) -> PreTrainedTokenizerBase | None:
    """What AutoTokenizer loads from a folder, or None if it cannot.

    Args:
        folder: with the tokenizer's files.
        config: in place of the folder's config.json.
        trusted: custom code may run.
    """
    from transformers import AutoTokenizer, logging

    level = logging.get_verbosity()
    logging.set_verbosity(CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=trusted)
    except Exception:  # damaged files, missing libraries, and whatever custom code raises
        return None
    finally:
        logging.set_verbosity(level)


def _class_name(folder: Path, loaded: str) -> str:
    """The name under which an artifact finds the class that was loaded."""
    if loaded == "MistralCommonBackend" and not (folder / "tokenizer.json").is_file():
        return loaded
    return BACKEND if loaded in _BACKENDS else loaded


def _write_class(folder: Path, name: str) -> None:
    path = folder / TOKENIZER_CONFIG
    values = _read(path)
    if _found_as(values.get("tokenizer_class")) != _found_as(name):
        write_json(path, values | {"tokenizer_class": name})


def _found_as(name: str | None) -> str | None:
    """The class that a name stands for where no model type has a say."""
    if not isinstance(name, str):
        return None
    return BACKEND.removesuffix("Fast") if name in _BACKENDS else name.removesuffix("Fast")


def _by_table(architecture: Architecture, named: str | None) -> str | None:
    """The class that AutoTokenizer would choose, for a tokenizer that does not load here.

    The rule is that of `transformers.models.auto.tokenization_auto.AutoTokenizer.from_pretrained`: a class
    that the files name is taken, but not of model types that are known for wrong names, nor of those whose
    class is the plain backend.
    """
    from transformers.models.auto import tokenization_auto as table

    model_type = architecture.model_type
    stock = table.TOKENIZER_MAPPING_NAMES.get(model_type)
    named = next((each for each in (named, architecture.config.get("tokenizer_class")) if each), None)
    if not stock or _found_as(named) == _found_as(stock):
        return named if _is_in_transformers(named) else stock and _class_name(Path(), stock)
    if stock in _BACKENDS:
        return BACKEND
    wrong = getattr(table, "MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS", ())
    return stock if named is None or model_type in wrong or not _is_in_transformers(named) else named


def _is_in_transformers(name: str | None) -> bool:
    """Whether transformers has this tokenizer class, be it under its older or newer name."""
    import transformers

    stem = str(name).removesuffix("Fast")
    return hasattr(transformers, stem) or hasattr(transformers, stem + "Fast")


def _write_backend(folder: Path, tokenizer: Any) -> None:
    """Write a tokenizer.json that makes the plain backend encode texts as this tokenizer does."""
    (folder / "tokenizer.json").write_text(tokenizer.backend_tokenizer.to_str(), encoding="utf-8")
    path = folder / TOKENIZER_CONFIG
    values = {"tokenizer_class": BACKEND, "model_input_names": list(tokenizer.model_input_names)}
    # Defaults of the class, which the plain backend has not.
    names = ("padding_side", "truncation_side", "model_max_length", "clean_up_tokenization_spaces")
    values |= {name: getattr(tokenizer, name) for name in names}
    tokens = {name: tokenizer.special_tokens_map.get(name) for name in tokenizer.SPECIAL_TOKENS_ATTRIBUTES}
    values |= {name: str(token) for name, token in tokens.items() if isinstance(token, str)}
    write_json(path, _read(path) | values)


# ---------------------------------------------------------------------------------------------------
# Processors


class _Processor(NamedTuple):
    """A kind of processor.

    Attributes:
        auto: its Auto class.
        keys: under which a file names its class; the first is written, the others are read for it too.
        part: of processor_config.json, where it may stand instead of in a file of its own.
        files: where it stands otherwise; the first that exists counts.
        table: module and name of transformers' table by model type.
    """

    auto: str
    keys: tuple[str, ...]
    part: str
    files: tuple[str, ...]
    table: tuple[str, str]

    def of_type(self, model_type: str) -> str | None:
        """The class of a model type, or None."""
        table = stock_processors() if self.auto == "AutoProcessor" else None
        if table is None:
            table = getattr(import_module(f"transformers.models.auto.{self.table[0]}"), self.table[1])
        found = table.get(model_type)
        # One class per backend, of which the one of torchvision has the plain name.
        classes = [found.get("torchvision"), *found.values()] if isinstance(found, dict) else [found]
        return next((name for name in classes if name), None)


_PROCESSORS = (
    _Processor(
        "AutoVideoProcessor",
        ("video_processor_type",),
        "video_processor",
        ("video_preprocessor_config.json", "preprocessor_config.json"),
        ("video_processing_auto", "VIDEO_PROCESSOR_MAPPING_NAMES"),
    ),
    _Processor(
        "AutoImageProcessor",
        ("image_processor_type", "feature_extractor_type"),
        "image_processor",
        ("preprocessor_config.json",),
        ("image_processing_auto", "IMAGE_PROCESSOR_MAPPING_NAMES"),
    ),
    _Processor(
        "AutoFeatureExtractor",
        ("feature_extractor_type",),
        "feature_extractor",
        ("preprocessor_config.json",),
        ("feature_extraction_auto", "FEATURE_EXTRACTOR_MAPPING_NAMES"),
    ),
)
_WHOLE = _Processor(
    "AutoProcessor",
    ("processor_class",),
    "",
    (PROCESSOR_CONFIG, "preprocessor_config.json", "video_preprocessor_config.json", TOKENIZER_CONFIG),
    ("processing_auto", "PROCESSOR_MAPPING_NAMES"),
)


def _name_processors(folder: Path, architecture: Architecture) -> None:
    """Name the processors that transformers has for the model type, where the files name none."""
    if "AutoConfig" in architecture.auto_map:
        return  # the tables are by config class
    values = {name: _read(folder / name) for name in _WHOLE.files if (folder / name).is_file()}
    before = deepcopy(values)
    for kind in _PROCESSORS:
        part = values.get(PROCESSOR_CONFIG, {}).get(kind.part)
        holders = (
            [part] if isinstance(part, dict) else [values[file] for file in kind.files if file in values]
        )
        if not (kind.auto == "AutoVideoProcessor" and _is_video_of_images(holders)):
            _name_class(kind, holders[:1], architecture)
    _name_class(_WHOLE, list(values.values()), architecture)
    for name, config in values.items():
        if config != before[name]:
            write_json(folder / name, config)


def _is_video_of_images(holders: list[dict]) -> bool:
    """Whether AutoVideoProcessor derives its class from that of the image processor."""
    import transformers

    image = holders[0].get("image_processor_type") if holders else None
    return bool(image) and hasattr(transformers, image.replace("ImageProcessor", "VideoProcessor"))


def _name_class(kind: _Processor, holders: list[dict], architecture: Architecture) -> None:
    """Write the class of the model type into the first of those that may name it, if none of them does."""
    config = architecture.config
    autos = [each.get("auto_map") or {} for each in [config, *holders]]
    named = any(key in each for key in kind.keys for each in holders) or kind.keys[0] in config
    if not holders or named or any(kind.auto in auto_map for auto_map in autos):
        return
    if name := kind.of_type(architecture.model_type):
        holders[0][kind.keys[0]] = name


def _read(path: Path) -> dict:
    return read_json_object(path) if path.is_file() else {}
