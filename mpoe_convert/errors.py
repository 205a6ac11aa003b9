"""The errors a user can cause. Every message says what was found, what was expected and what to do next.

The classes name the cause. Bad requests (`RequestError`) end the command line with exit code 2, all others
with 1.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class MpoeError(Exception):
    """The input, the request or the machine is wrong; the message is one line.

    Attributes:
        is_told: another process of the same run raises it too, and tells it.
    """

    is_told = False


class RequestError(MpoeError):
    """An argument contradicts another one or names something that does not exist."""


class RecipeError(RequestError):
    """The recipe of a conversion contradicts itself or does not fit the model."""


class RunError(RequestError):
    """The request for a training run contradicts itself or names something that does not exist."""


class SitesError(RequestError):
    """A matrix cannot be split into the requested sites, bonds or parts."""


class CheckpointError(MpoeError):
    """The source checkpoint is missing, damaged, or not one that can be converted."""


class HubError(MpoeError):
    """The Hugging Face Hub refused or could not be reached."""


class FamilyError(MpoeError):
    """The architecture is not one whose feed-forward blocks can be located."""


class OutputError(MpoeError):
    """The artifact cannot be written where it was asked for."""


class MachineError(MpoeError):
    """This machine has too little memory, or a process of the run has ended or cannot be reached."""


class LibraryError(MpoeError):
    """An optional library is not installed."""


class VerifyError(MpoeError):
    """An artifact could not be loaded or compared."""


class ExportError(MpoeError):
    """A converted model has no exact form in the architecture or format that was asked for."""


class TrainingError(MpoeError):
    """A model, its teacher or its options do not fit a training run."""


class DataError(MpoeError):
    """Training or evaluation data are missing, unreadable, or not what the task needs."""


class ColumnError(DataError, RequestError):
    """The data have no column of a name that was asked for."""


AnyError = TypeVar("AnyError", bound=MpoeError)


def reworded(error: AnyError, text: str) -> AnyError:
    """The same error, of the same class, with another message.

    >>> reworded(DataError("the file is empty"), "process 1: the file is empty")
    DataError('process 1: the file is empty')
    """
    made = type(error)(text)
    made.is_told = error.is_told
    return made


def one_line(exc: BaseException | str, limit: int = 200) -> str:
    """The message of an error as one line of at most `limit` characters.

    Line breaks and repeated blanks become one blank; an error without a message gives its class name; a
    longer text ends in "...".

    >>> one_line("first line\\nsecond  line")
    'first line second line'
    """
    text = " ".join(str(exc).split()) or type(exc).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


def few(names: Sequence[str], limit: int = 3) -> str:
    """The first names of a list in quotes, and how many more there are.

    >>> few(["a", "b", "c"], 2)
    "'a', 'b' and 1 more"
    """
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(repr(name) for name in names[:limit]) + rest


def counted(number: int, noun: str) -> str:
    """A number and what is counted, in the singular or the plural.

    >>> counted(1, "FFN"), counted(2000, "expert"), counted(2, "class")
    ('1 FFN', '2,000 experts', '2 classes')
    """
    plural = "es" if noun.endswith(("s", "ch")) else "s"
    return f"{number:,} {noun}{'' if number == 1 else plural}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a message about a word that is not known: the one that is most like it, if one is like it.

    >>> did_you_mean("expert", ["experts", "seed"])
    "; did you mean 'experts'?"
    """
    near = nearest(word, known)
    return f"; did you mean {near!r}?" if near else ""


def nearest(word: str, known: Iterable[str], alike: float = 0.6) -> str | None:
    """The known word that is most like a word, if they are alike (1: equal)."""
    return next(iter(get_close_matches(word, list(known), n=1, cutoff=alike)), None)
