"""Models and tokenizers for training and evaluation, converted or dense, by transformers' Auto classes.

`trust` is `trust_remote_code` of `from_pretrained`, if it is given.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import TrainingError
from ..runtime import MODELING_PATH
from ..source.architecture import main_auto_class
from ..source.custom_code import references
from ..source.texts import TASKS
from .layout import MODELING_FILE, base_config
from .reader import Artifact

if TYPE_CHECKING:
    from transformers import PreTrainedModel


AUTO_CLASSES = {
    "causal": "AutoModelForCausalLM",
    "masked": "AutoModelForMaskedLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "classification": "AutoModelForSequenceClassification",
}


def from_pretrained(auto, name: str, *, trust_remote_code: bool = False, **options):
    """`auto.from_pretrained` with its many errors told in one line.

    Args:
        trust_remote_code: run the code that lies beside the weights; where that is `modeling_mpoe.py` of this
            release and nothing else, it is run anyway.

    Raises:
        TrainingError: `name` is no folder, does not load, or has custom code that is not trusted.
    """
    if name.startswith(("/", ".", "~")) and not Path(name).is_dir():
        raise TrainingError(f"{name} is not a folder; expected a model's, or a Hub id")
    trusted = trust_remote_code or _has_our_code(name, options.get("revision"), options.get("token"))
    try:
        return auto.from_pretrained(name, trust_remote_code=trusted, **options)
    except (OSError, ValueError, RuntimeError) as error:
        if not trusted and "trust_remote_code=True" in str(error):
            raise TrainingError(
                f"{name} has custom code: read it, and pass --trust-remote-code "
                "(trust_remote_code=True) to run it"
            ) from error
        raise TrainingError(f"{name} cannot be loaded: {error}") from error


def _has_our_code(name: str, revision: str | None, token: str | None) -> bool:
    """Whether all code that a folder or Hub id would run is this release's `modeling_mpoe.py`. Runs none."""
    from transformers.utils.hub import cached_file

    def read(file: str) -> bytes:
        path = cached_file(
            name, file, revision=revision, token=token, _raise_exceptions_for_missing_entries=False
        )
        return Path(path).read_bytes() if path else b""

    try:
        configs = [json.loads(read(file) or "{}") for file in ("config.json", "tokenizer_config.json")]
        maps = [config.get("auto_map") for config in configs]
        if {*references(maps)} != {("", Path(MODELING_FILE).stem)} or read("custom_generate/generate.py"):
            return False
        return read(MODELING_FILE) == MODELING_PATH.read_bytes()
    except (OSError, ValueError, AttributeError):  # loading says what is the matter
        return False


def load_artifact(source: Artifact, **options) -> PreTrainedModel:
    """The whole model of an opened artifact, by the code that came with it, for inference."""
    import transformers

    auto = getattr(transformers, main_auto_class(source.config, source.model_type))
    # The folder of a Hub id in the cache has the weights and no code.
    name = source.checkpoint.source if source.checkpoint.revision else str(source.checkpoint.folder)
    revision = source.checkpoint.revision or "main"
    trust = {"trust_remote_code": True}  # an artifact is opened as one, with its code
    return from_pretrained(auto, name, revision=revision, token=source.token, **trust, **options).eval()


def task_of(model: str, task: str | None, token: str | None = None, **trust: bool) -> tuple[str, str]:
    """(task, Auto class): the task that was asked for, or what the model's head is for."""
    from transformers import AutoConfig

    if task:
        return task, AUTO_CLASSES[task]
    config = from_pretrained(AutoConfig, model, token=token, **trust).to_dict()
    if config.get("mpoe"):
        config = base_config(config)
    elif not trust.get("trust_remote_code"):
        config.pop("auto_map", None)
    auto_class = main_auto_class(config, config["model_type"])
    for found, name in AUTO_CLASSES.items():
        if name == auto_class:
            return found, auto_class
    raise TrainingError(
        f"the head of {model} ({config['architectures']}) is for none of {', '.join(TASKS)}; name a task"
    )


def load_tokenizer(name: str, token: str | None = None, **trust: bool):
    """The tokenizer, padding by its end-of-text token where it has nothing else."""
    from transformers import AutoTokenizer

    tokenizer = from_pretrained(AutoTokenizer, name, token=token, **trust)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def max_length(model: str, token: str | None = None, **trust: bool) -> int | None:
    """How many positions a model has, where its config says."""
    from transformers import AutoConfig

    return positions(from_pretrained(AutoConfig, model, token=token, **trust))


def positions(config) -> int | None:
    """The same, of a config."""
    names = ("max_position_embeddings", "n_positions", "max_source_positions")
    return next((value for name in names if (value := getattr(config, name, None))), None)
