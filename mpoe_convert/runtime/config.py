"""Config: options at its top level, and the version of its `mpoe` block."""

import math
import os
from types import UnionType
from typing import Any, NamedTuple

from transformers import PretrainedConfig

FORMAT_VERSION = 1
CLASS_PREFIX = "MPOE"
MODEL_TYPE_PREFIX = "mpoe_"


class Option(NamedTuple):
    """An option at the top level of the config; `from_pretrained(..., name=value)` sets it."""

    name: str
    type: type | UnionType
    default: object
    meaning: str
    values: tuple[str, ...] | None = None  # all that it may be; None: any value of its type
    least: float | None = None  # that a number may be

    def check(self, value: Any) -> None:
        """Raises ValueError if the option cannot have this value."""
        if self.values is not None and value not in self.values:
            raise ValueError(f"{self.name} is {value!r}: choose one of {', '.join(self.values)}")
        kinds = self.type.__args__ if isinstance(self.type, UnionType) else (self.type,)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not any(_fits(value, kind) for kind in kinds) or (
            is_number and self.least is not None and value < self.least
        ):
            bound = "" if self.least is None else f" of at least {self.least:g}"
            words = " or ".join(_IN_WORDS[kind] for kind in kinds)
            raise ValueError(
                f"{self.name} is {value!r}: expected {words.replace('number', f'number{bound}')}"
            )


_IN_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list[str]: "a list of texts",
    type(None): "none",
}


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a type; a number has to be finite, and truth is none."""
    if kind == list[str]:
        return isinstance(value, list | tuple) and all(isinstance(each, str) for each in value)
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    if kind is float:
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, kind)


# In the order in which config.json lists them.
CONFIG_OPTIONS = (
    Option(
        "router_aux_loss_coef",
        float,
        0.005,
        "coefficient of Switch's load-balancing loss in training: the mean over the mixtures; if the load is "
        "balanced, that is the number of experts per token",
        least=0,
    ),
    Option(
        "router_size_penalty",
        bool,
        True,
        "where experts differ in size: in the load-balancing loss a choice counts by the size of its expert, "
        "the mean being 1, so that small experts are preferred (HMoE's parameter penalty); false: all alike",
    ),
    Option("router_z_loss_coef", float, 0.0, "coefficient of ST-MoE's router z-loss in training", least=0),
    Option(
        "router_likeness_loss_coef",
        float,
        0.01,
        "of rule `top-any`: coefficient of DynMoE's loss of the routers' rows in training, which makes them "
        "differ (diversity) and keeps them short (simplicity)",
        least=0,
    ),
    Option(
        "router_efficiency_loss_coef",
        float,
        0.01,
        "of rule `top-any`: coefficient in training of the share of the experts that a token goes to: fewer "
        "experts per token",
        least=0,
    ),
    Option(
        "output_router_logits",
        bool,
        False,
        "outputs carry `router_logits` and `aux_loss`. A loss that is computed outside of the model then has "
        "to add `router_aux_loss_coef * outputs.aux_loss`, or the load is not balanced. Tuples "
        "(`return_dict=False`) carry neither. Also an argument of a call, of which tuples are an error",
    ),
    Option(
        "router_combine",
        str,
        "renormalised",
        "combine weights: `renormalised`: softmax over the chosen logits, for one expert per token the "
        "straight-through 1; `raw`: probabilities, which change what the model computes until it is trained "
        "(not with rule `top-any`)",
        ("renormalised", "raw"),
    ),
    Option(
        "router_jitter_noise",
        float,
        0.0,
        "in training a router's inputs are multiplied by uniform random numbers from 1 +- this (Switch)",
        least=0,
    ),
    Option(
        "router_capacity_factor",
        float | None,
        None,
        "in training an expert takes at most this times its equal share of the choices, and the others are "
        "dropped; none: no limit",
        least=0,
    ),
    Option(
        "router_bias_update_rate",
        float,
        0.0,
        "balancing without a loss (DeepSeek-V3): a bias on the selection moves by this after each optimizer "
        "step, in compiled code after each pass; 0: it stays as it is. Not with rule `top-any`, whose "
        "thresholds are learned",
        least=0,
    ),
    Option(
        "router_balance_bias",
        bool,
        False,
        "there are such biases, which are loaded; a rate above 0 sets it",
    ),
    Option(
        "router_tasks",
        list[str] | None,
        None,
        "names of tasks: routers choose by the task of a sequence, see `route_by`; none: by token",
    ),
    Option(
        "mpoe_schedule",
        str,
        "auto",
        "`apply`: the cores act on the activations; `rebuild`: the matrices of the experts that are hit are "
        "contracted; `cached`: and kept, in inference; `auto`: the cheapest. The environment variable "
        "MPOE_SCHEDULE overrules it",
        ("auto", "apply", "rebuild", "cached"),
    ),
    Option(
        "mpoe_cache",
        str,
        "off",
        "whose contracted matrices are kept in inference: nobody's (`off`), the `hit` experts', or `all`. "
        "MPOE_CACHE overrules it",
        ("off", "hit", "all"),
    ),
    Option(
        "mpoe_cache_bytes",
        int | None,
        None,
        "limit in bytes of the kept matrices of the whole model; none: no limit. MPOE_CACHE_BYTES overrules "
        "it",
        least=0,
    ),
)
OPTIONS = {option.name: option.default for option in CONFIG_OPTIONS}


def read_option(config: PretrainedConfig, name: str) -> Any:
    """The value of an option; for `mpoe_...` the environment variable of that name comes first.

    Raises:
        ValueError: the option cannot have that value.
    """
    option = next(option for option in CONFIG_OPTIONS if option.name == name)
    value = getattr(config, name)
    text = os.environ.get(name.upper()) if name.startswith("mpoe_") else None
    if text is not None:
        value = text if option.values is not None else _whole_number(text)
    option.check(value)
    return value


def _whole_number(text: str) -> int | str:
    """The whole number that a text says, also as 1e9; the text if it says none."""
    try:
        return int(float(text))
    except (ValueError, OverflowError):
        return text
