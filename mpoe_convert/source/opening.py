"""Open a source: a dense model under the names on disk, a mixture under those of the model."""

from __future__ import annotations

from ..errors import RequestError
from ..options import switched
from .checkpoint import Checkpoint, open_checkpoint
from .custom_code import naming_files
from .in_memory import in_memory
from .json_files import read_json_object
from .mixtures import is_mixture, locate_experts, refuse
from .named_experts import parse


def check_stream(stream: bool, is_calibrated: bool) -> None:
    """Raises RequestError: a source that is calibrated cannot stay on the Hub."""
    if stream and is_calibrated:
        raise RequestError(
            f"{switched('stream')} was given with a calibration, which runs the whole model; expected one of "
            "them"
        )


def open_source(
    model: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    headers_only: bool = False,
    stream: bool = False,
    trust_remote_code: bool = False,
    experts_at: str | None = None,
) -> Checkpoint:
    """Open the source of a conversion. Other arguments and errors as for `open_checkpoint`.

    Args:
        experts_at: where the experts are; then it is a mixture.

    Raises:
        CheckpointError: also if a config of its tokenizer or processor is damaged.
        FamilyError: also if it is a mixture whose experts cannot be replaced.
    """
    if experts_at is not None:
        parse(experts_at)  # told before anything is fetched
    checkpoint = open_checkpoint(
        model,
        revision=revision,
        token=token,
        headers_only=headers_only,
        stream=stream,
        trust_remote_code=trust_remote_code,
    )
    for path in naming_files(checkpoint.folder):
        read_json_object(path)  # a damaged one is told now, not when it is copied
    if experts_at is None:
        if not is_mixture(checkpoint):
            return checkpoint
        refuse(checkpoint)
    memory = in_memory(checkpoint)
    if experts_at is not None:
        locate_experts(memory, experts_at)  # what is read of lists is noted in the checkpoint
    return memory
