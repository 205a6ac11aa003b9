"""Models and tokenizers for training and evaluation, converted or dense, by transformers' Auto classes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .card import main_auto_class
from .converted import Converted
from .corpus import TASKS
from .errors import TrainingError
from .modeling_mpoe import CLASS_PREFIX, MODEL_TYPE_PREFIX

if TYPE_CHECKING:
    from transformers import PreTrainedModel

AUTO_CLASSES = {
    "causal": "AutoModelForCausalLM",
    "masked": "AutoModelForMaskedLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "classification": "AutoModelForSequenceClassification",
}


def from_pretrained(auto, name: str, *, trust_remote_code: bool = True, **options):
    """`auto.from_pretrained` with its many errors told in one line.

    Args:
        trust_remote_code: run the code that lies beside the weights, as artifacts need it.

    Raises:
        TrainingError: `name` is no folder, or does not load.
    """
    if name.startswith(("/", ".", "~")) and not Path(name).is_dir():
        raise TrainingError(f"{name} is not a folder; expected a model's, or a Hub id")
    try:
        return auto.from_pretrained(name, trust_remote_code=trust_remote_code, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise TrainingError(f"{name} cannot be loaded: {error}") from error


def load_converted(source: Converted, **options) -> PreTrainedModel:
    """The whole model of an opened artifact, by the code that came with it, for inference."""
    import transformers

    auto = getattr(transformers, main_auto_class(source.config, source.model_type))
    # The folder of a Hub id in the cache has the weights and no code.
    name = source.checkpoint.source if source.checkpoint.revision else str(source.checkpoint.folder)
    revision = source.checkpoint.revision or "main"
    return from_pretrained(auto, name, revision=revision, token=source.token, **options).eval()


def task_of(model: str, task: str | None, token: str | None = None) -> tuple[str, str]:
    """(task, Auto class): the task that was asked for, or what the model's head is for."""
    from transformers import AutoConfig

    if task:
        return task, AUTO_CLASSES[task]
    config = from_pretrained(AutoConfig, model, token=token).to_dict()
    config["architectures"] = [a.removeprefix(CLASS_PREFIX) for a in config.get("architectures") or ()]
    auto_class = main_auto_class(config, config["model_type"].removeprefix(MODEL_TYPE_PREFIX))
    for found, name in AUTO_CLASSES.items():
        if name == auto_class:
            return found, auto_class
    raise TrainingError(
        f"the head of {model} ({config['architectures']}) is for none of {', '.join(TASKS)}; name a task"
    )


def load_tokenizer(name: str, token: str | None = None, *, trust_remote_code: bool = True):
    """The tokenizer, padding by its end-of-text token where it has nothing else."""
    from transformers import AutoTokenizer

    tokenizer = from_pretrained(AutoTokenizer, name, token=token, trust_remote_code=trust_remote_code)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def max_length(model: str, token: str | None = None) -> int | None:
    """How many positions a model has, where its config says."""
    from transformers import AutoConfig

    return positions(from_pretrained(AutoConfig, model, token=token))


def positions(config) -> int | None:
    """The same, of a config."""
    names = ("max_position_embeddings", "n_positions", "max_source_positions")
    return next((value for name in names if (value := getattr(config, name, None))), None)
