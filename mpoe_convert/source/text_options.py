"""Options that say which texts are read: for calibration, and for training and scoring."""

from __future__ import annotations

from collections.abc import Sequence

from ..options import LARGEST_COUNT, OptionalText, OptionGroup, Texts, described, in_home, option
from .texts import BUILTIN, TASKS, Columns, check_sources


@described
class TextSource(OptionGroup):
    """Calibration text: which, and how much of it."""

    calibrate: Texts = option(
        default=(),
        help="Calibration text: files or Hub datasets, as for `finetune --data`, or builtin (the language "
        "reference of Python). Repeatable.",
        group="Calibration",
        metavar="FILE|ID",
        item="source",
        read=in_home,
    )
    calibration_tokens: int = option(
        default=65536,
        help="Tokens to take from the calibration text, evenly spread over it.",
        group="Calibration",
        at_least=1,
        at_most=LARGEST_COUNT,
    )
    calibration_split: str = option(
        default="train", help="Split of Hub datasets to calibrate on.", group="Calibration"
    )
    text_column: str = option(default=Columns.text, help="Column with the text.", group="Calibration")
    target_column: str = option(
        default=Columns.target,
        help="Column with the expected output: the target of an encoder-decoder, or the reply that follows "
        "the text in a causal model. Where the data have it, only its tokens are scored.",
        group="Calibration",
    )


@described
class TaskData(OptionGroup):
    """What the rows of training or evaluation data hold, and who reads them."""

    text_column: str = option(default=Columns.text, help="Column with the text.", group="Data")
    target_column: str = option(
        default=Columns.target, help="Column with the expected output, for task seq2seq.", group="Data"
    )
    label_column: str = option(
        default=Columns.label, help="Column with the class, for task classification.", group="Data"
    )
    routed_by: str | None = option(
        default=None,
        help="Column that names the task of a row: the routers then choose experts by task, not by token.",
        group="Data",
        metavar="COLUMN",
    )
    task: str | None = option(
        default=None,
        help="What the data are for.",
        group="Data",
        choices=TASKS,
        default_text="what the model's head is for",
    )
    tokenizer: OptionalText = option(
        default=None,
        help="Folder or Hub id of the tokenizer.",
        group="Data",
        metavar="MODEL",
        default_text="the model's own",
        read=in_home,
    )
    trust_remote_code: bool = option(
        default=False,
        help="Run custom code that a model or its tokenizer brings along. The `modeling_mpoe.py` of this "
        "release is run without it.",
        group="Data",
    )

    @property
    def columns(self) -> Columns:
        return Columns(self.text_column, self.target_column, self.label_column, self.routed_by)

    @property
    def trust(self) -> dict[str, bool]:
        """For `loading`."""
        return {"trust_remote_code": self.trust_remote_code}


def check_calibration(source: TextSource) -> None:
    """Check that the calibration texts are there, and have the columns that are read.

    The target's column may be missing under its default name.

    Raises:
        ColumnError: a file lacks a column.
        DataError: a source is no file, or of no known kind.
    """
    reads_targets = source.target_column != Columns.target and BUILTIN not in source.calibrate
    needed = (source.text_column, source.target_column) if reads_targets else (source.text_column,)
    check_sources(source.calibrate, tuple(dict.fromkeys(needed)), "calibration")


def check_data(request: TaskData, sources: Sequence[str]) -> None:
    """Check that data are there, and have the columns of the task; if none is named, those of every task.

    Raises:
        ColumnError: a file lacks a column.
        DataError: a source is no file, or of no known kind.
    """
    who = f"task {request.task}" if request.task else "every task"
    check_sources(sources, request.columns.needed(request.task or "causal"), who)
