"""The request for an artifact with fewer experts."""

from __future__ import annotations

from ..devices import DEVICES, is_device
from ..options import LARGEST_COUNT, Texts, described, in_home, option
from ..planning.recipe import CodeOfArtifacts, WeightFiles
from ..request import Request
from ..source.text_options import TextSource

# Which experts stay.
WAYS = {
    "output": "those whose outputs differ most from the average expert's, times their combine weights, "
    "summed over the tokens that they get",
    "load": "those with the largest sum of combine weights, which takes no more than a forward pass",
}


@described
class Pruning(TextSource, CodeOfArtifacts, WeightFiles, Request):
    """How many experts an artifact has left, and which.

    Raises:
        RecipeError: a value is out of range, or no text is given.
    """

    NOUN = "pruning"

    calibrate: Texts = option(
        help="Text on which experts are observed, and whose held-out part measures the loss: "
        "files or Hub datasets, as for `finetune --data`, or builtin (the language reference of Python). "
        "Repeatable.",
        group="Calibration",
        metavar="FILE|ID",
        item="source",
        read=in_home,
        kw_only=False,
    )
    experts: int = option(
        help="Experts that are left in every mixture. Those that every token passes stay and are not "
        "counted.",
        group="Experts",
        at_least=2,
        at_most=LARGEST_COUNT,
        kw_only=False,
    )
    by: str = option(
        default="output",
        help=f"Which experts stay. {'; '.join(f'{way}: {text}' for way, text in WAYS.items())}.",
        group="Experts",
        choices=tuple(WAYS),
    )
    device: str = option(
        default="auto",
        help=f"Where the model runs: {DEVICES}.",
        group="Calibration",
        valid=is_device,
        expected=DEVICES,
    )
