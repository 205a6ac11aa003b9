"""Config: options at its top level, and the version of its `mpoe` block."""

import os
from types import UnionType
from typing import NamedTuple

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
    values: tuple[str, ...] | None = None  # all that it may be; None: anything of its type


# In the order in which config.json lists them.
CONFIG_OPTIONS = (
    Option(
        "router_aux_loss_coef",
        float,
        0.01,
        "coefficient of the load-balancing loss, which is added in training; 0: off",
    ),
    Option(
        "router_z_loss_coef",
        float,
        0.0,
        "coefficient of the router z-loss, which is added in training; 0: off",
    ),
    Option(
        "output_router_logits",
        bool,
        False,
        "outputs carry `router_logits` and `aux_loss`",
    ),
    Option(
        "router_combine",
        str,
        "renormalised",
        "combine weights: `renormalised`, which sum to one per token, or `raw`, the probabilities (Switch)",
        ("renormalised", "raw"),
    ),
    Option(
        "router_jitter_noise",
        float,
        0.0,
        "in training the router's inputs are multiplied by uniform random numbers from 1 +- this (Switch)",
    ),
    Option(
        "router_capacity_factor",
        float | None,
        None,
        "in training an expert takes at most this times its equal share of the choices; null: no limit",
    ),
    Option(
        "router_bias_update_rate",
        float,
        0.0,
        "step of DeepSeek-V3's balancing bias, which balances without a loss; 0: the bias stays as it is",
    ),
    Option(
        "router_balance_bias",
        bool,
        False,
        "the checkpoint has balancing biases; a rate above 0 sets it",
    ),
    Option(
        "router_tasks",
        list[str] | None,
        None,
        "names of tasks: routers choose by the task of a sequence (see `route_by`); null: by token",
    ),
    Option(
        "mpoe_schedule",
        str,
        "auto",
        "how experts are computed: `apply`, `rebuild`, `cached`, or `auto`, the cheapest; "
        "the environment variable MPOE_SCHEDULE overrules it",
        ("auto", "apply", "rebuild", "cached"),
    ),
    Option(
        "mpoe_cache",
        str,
        "off",
        "which experts' matrices are kept in inference: `off`, `hit` (of experts that were chosen) or `all`; "
        "MPOE_CACHE overrules it",
        ("off", "hit", "all"),
    ),
    Option(
        "mpoe_cache_bytes",
        int | None,
        None,
        "limit of all kept matrices of the model, in bytes; null: none; MPOE_CACHE_BYTES overrules it",
    ),
)
OPTIONS = {option.name: option.default for option in CONFIG_OPTIONS}


def read_option(config: PretrainedConfig, name: str) -> object:
    """The value of an option; for `mpoe_...` the environment variable of that name comes first.

    Raises:
        ValueError: it is none of the values that the option may have.
    """
    value = getattr(config, name)
    if name.startswith("mpoe_"):
        value = os.environ.get(name.upper(), value)
    values = next(option.values for option in CONFIG_OPTIONS if option.name == name)
    if values is not None and value not in values:
        raise ValueError(f"{name} is {value!r}: choose one of {', '.join(values)}")
    return value
