"""Load models, configs and tokenizers, converted or dense, by transformers' Auto classes.

`trust` stands for the optional argument `trust_remote_code` of `from_pretrained`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist

from ..errors import MpoeError, TrainingError, few, one_line
from ..options import switched
from ..source.architecture import main_auto_class
from ..source.hub import asked_once
from ..source.repository import local_folder, suggesting
from ..source.texts import TASKS
from .block import check_folder
from .layout import base_config
from .own_code import has_our_code
from .reader import Artifact

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


AUTO_CLASSES = {
    "causal": "AutoModelForCausalLM",
    "masked": "AutoModelForMaskedLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "classification": "AutoModelForSequenceClassification",
}


# What options may add to a mixture that has none of it.
_MADE_NEW = (".router.tasks", ".balance_bias")


class HoldsMixtures(Protocol):
    """What a converted model has beyond a `PreTrainedModel`, whichever release's code it was loaded by."""

    def mixtures(self) -> list[tuple[str, Any]]:
        """(path below the base model, mixture) of every mixture."""
        ...

    def route_by(self, task: str) -> None: ...

    def update_router_bias(self) -> None: ...

    def add_router_losses(self, loss: torch.Tensor, share: float | torch.Tensor) -> torch.Tensor: ...


def from_pretrained(auto: Any, name: str, *, trust_remote_code: bool = False, **options: Any) -> Any:
    """`auto.from_pretrained(name, **options)`, with any failure as a TrainingError of one line.

    Args:
        auto: an Auto class, or the class of a model, for which missing weights are the caller's concern.
        name: folder or Hub id.
        trust_remote_code: run the code beside the weights. `modeling_mpoe.py` of this release is run even
            without it, if there is no other code.

    Raises:
        CheckpointError: `name` is a missing folder.
        HubError: it is no Hub id either, or the Hub cannot be asked; names what may have been meant.
        TrainingError: it does not load, has custom code that is not trusted, lacks weights of layers, or has
            others than its config says.
    """
    local_folder(name)  # which raises
    with suggesting(name), asked_once(name):
        return _from_pretrained(auto, name, trust_remote_code, options)


def _from_pretrained(auto: Any, name: str, trust_remote_code: bool, options: dict[str, Any]) -> Any:
    """`from_pretrained` without its checks of the name."""
    trusted = trust_remote_code or has_our_code(name, options.get("revision"), options.get("token"))
    is_model = auto.__name__.startswith("AutoModel")
    if is_model:
        options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        found = auto.from_pretrained(name, trust_remote_code=trusted, **options)
    except MpoeError:
        raise
    except Exception as error:  # a config may say anything, and custom code do so
        if not trusted and "trust_remote_code=True" in str(error):
            raise TrainingError(
                f"'{name}' has custom code: read it, and pass {switched('trust_remote_code')} to run it"
            ) from error
        raise TrainingError(f"'{name}' cannot be loaded: {_reason(error)}") from error
    if not is_model:
        return found
    model, info = found
    _check_shapes(name, info["mismatched_keys"])
    _check_layers(name, model, info["missing_keys"])
    return model


def load_alone(auto: Any, name: str, device: torch.device, **options: Any) -> Any:
    """A model to be run, on a device, in one of several processes, whatever the others do meanwhile.

    compressed-tensors shares the packing of a model out over all processes that torch.distributed knows, and
    waits for them. So it sees none of them, and matrices are unpacked here, not in the first forward pass.

    Args:
        auto, name, options: as for `from_pretrained`, which says what is raised.
        device: where the model goes.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return from_pretrained(auto, name, **options).to(device).eval()
    is_initialized = dist.is_initialized
    dist.is_initialized = lambda: False
    try:
        model = from_pretrained(auto, name, **options).to(device).eval()
        compressor = getattr(getattr(model, "hf_quantizer", None), "compressor", None)
        if compressor is not None:
            compressor.decompress_model(model)
    finally:
        dist.is_initialized = is_initialized
    return model


def _reason(error: Exception) -> str:
    """Why transformers does not load something, without the names of all that it would."""
    found = re.match(
        r"Unrecognized configuration class .*?\.(\w+)'> for this kind of AutoModel: (\w+)", str(error)
    )
    if found:
        return f"transformers has no {found[2]} for its {found[1]}; expected another task, or another model"
    return one_line(re.split(r",? or contain one of the following strings", str(error))[0], 400)


def _check_shapes(name: str, mismatched: Iterable[tuple]) -> None:
    """Raises TrainingError if weights have other shapes than the model: they would be random numbers."""
    found = sorted(mismatched)
    if found:
        key, stored, expected = found[0]
        raise TrainingError(
            f"'{name}' cannot be loaded: {few([key for key, *_ in found])} have other shapes than the model "
            f"that was asked for ({key} is {[*stored]}, expected {[*expected]}); expected options and "
            "classes that fit its weights"
        )


def _check_layers(name: str, model: PreTrainedModel, missing: Iterable[str]) -> None:
    """Raises TrainingError if parameters of the base model's layers are missing; those of a head may be."""
    learnt = {f".{key}" for key, parameter in model.base_model.named_parameters() if parameter.requires_grad}
    of_base = (key for key in missing if any(f".{key}".endswith(each) for each in learnt))
    inside = sorted(key for key in of_base if re.search(r"\.\d+\.", key) and not key.endswith(_MADE_NEW))
    if inside:
        raise TrainingError(
            f"'{name}' lacks {few(inside)}, which would be random numbers; expected a whole model, with the "
            "names of tensors that transformers gives them"
        )


def shapes_of(
    auto: Any,
    name: str,
    config: PretrainedConfig,
    token: str | None,
    *,
    trust_remote_code: bool = False,
    **options: Any,
) -> dict[str, tuple[int, ...]]:
    """{name below the base model: shape} of the parameters that a config's model loads.

    Nothing is loaded. What options may add to a mixture that has none of it is left out.
    """
    trusted = trust_remote_code or has_our_code(name, None, token)
    with torch.device("meta"):
        model = auto.from_config(config, trust_remote_code=trusted, **options)
    parameters = model.base_model.named_parameters()
    return {key: tuple(each.shape) for key, each in parameters if not key.endswith(_MADE_NEW)}


def load_artifact(source: Artifact, **options: Any) -> PreTrainedModel:
    """Load the whole model of an opened artifact in evaluation mode, with the code that the artifact holds.

    Args:
        options: of `from_pretrained`, such as `dtype`.

    Raises:
        TrainingError: it does not load.
    """
    import transformers

    auto = getattr(transformers, main_auto_class(source.config, source.model_type))
    # The folder of a Hub id in the cache has the weights and no code.
    name = source.checkpoint.source if source.checkpoint.revision else str(source.checkpoint.folder)
    revision = source.checkpoint.revision or "main"
    trust = {"trust_remote_code": True}  # asked when it was opened
    return from_pretrained(auto, name, revision=revision, token=source.token, **trust, **options).eval()


def load_config(name: str, token: str | None = None, **trust: bool) -> PretrainedConfig:
    """Load the config of a model.

    Raises:
        CheckpointError: it is that of an artifact in a folder, and damaged, or does not fit the tensors.
        TrainingError: it does not load.
    """
    from transformers import AutoConfig

    if Path(name).is_dir() and (trust.get("trust_remote_code") or has_our_code(name, None, token)):
        check_folder(name)  # code that is not trusted is told first
    return from_pretrained(AutoConfig, name, token=token, **trust)


def task_of(config: PretrainedConfig, model: str, **trust: bool) -> str:
    """The task that a model's head is made for.

    Raises:
        TrainingError: it is made for none of `TASKS`.
    """
    values = config.to_dict()
    if values.get("mpoe"):
        values = base_config(values)
    elif not trust.get("trust_remote_code"):
        values.pop("auto_map", None)
    auto_class = main_auto_class(values, values["model_type"])
    for task, name in AUTO_CLASSES.items():
        if name == auto_class:
            return task
    raise TrainingError(
        f"the head of '{model}' ({values['architectures']}) is for none of {', '.join(TASKS)}; name a task"
    )


def load_tokenizer(name: str, token: str | None = None, **trust: bool) -> PreTrainedTokenizerBase:
    """Load a tokenizer.

    Raises:
        TrainingError: it does not load.
    """
    from transformers import AutoTokenizer

    return from_pretrained(AutoTokenizer, name, token=token, **trust)
