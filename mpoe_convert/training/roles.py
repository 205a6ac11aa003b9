"""The roles of parameters in training: all experts share the central cores, each owns its auxiliary cores.

MPOE's gradient mask, learning rates by role, freezing. The functions go by the names of the parameters, so
that they work on wrapped models too (DDP, FSDP2, PEFT) and in any training loop.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from numbers import Real
from typing import TYPE_CHECKING

from ..errors import TrainingError, one_line
from ..options import assigned

if TYPE_CHECKING:
    from torch import nn


ROLES = ("central", "auxiliary", "router", "other")
UNITS = ("step", "layer", "matrix")
FROZEN = ("centre", "all-but-experts")

_CORE = re.compile(
    r"(?P<ffn>.+)\.(?:(?:up|down|gate)\.terms\.\d+|adapter)\.(?:\w+\.)*(?P<kind>central|aux)_\d+(?:\.|$)"
)
_BIAS = re.compile(r"(?P<ffn>.+)\.(?:up|down|gate)\.bias$")
_ROUTER = re.compile(r"(?P<ffn>.+)\.router\.")


def role_of(name: str) -> str:
    """The role of a parameter in a converted model, by its name.

    "central": cores shared by the experts; "auxiliary": cores (and copies, for `--kind dense`) of one expert
    each; "router"; "other": everything else, such as attention, embeddings and the biases of the FFNs.

    >>> role_of("transformer.h.0.mlp.up.terms.0.central_1")
    'central'
    """
    core = _CORE.match(name)
    if core:
        return "central" if core["kind"] == "central" else "auxiliary"
    return "router" if _ROUTER.match(name) else "other"


def _ffn_of(name: str) -> str:
    """The module path of the FFN that a core belongs to."""
    core = _CORE.match(name)
    assert core is not None, name
    return core["ffn"]


def _central(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    found = [(name, p) for name, p in model.named_parameters() if role_of(name) == "central"]
    if not found:
        raise TrainingError(
            f"{type(model).__name__} has no central tensors to mask or freeze; expected a converted model of "
            f"{assigned('kind', 'mpo')}"
        )
    return found


# ---------------------------------------------------------------------------------------------------
# Gradient mask


def mask_centre(
    model: nn.Module, step: int, probability: float, *, seed: int = 0, per: str = "step"
) -> list[str]:
    """MPOE's gradient mask: with some probability the optimizer skips the central cores in this step.

    Call it between `backward` and `optimizer.step`, after clipping. The gradients become None, so that
    neither an optimizer's moments nor its weight decay move the masked cores. Draws depend only on `seed`,
    `step` and the unit's place: every rank draws the same, and so does a run that is resumed.

    >>> import torch
    >>> from transformers import AutoModelForCausalLM
    >>> from mpoe_convert import mask_centre
    >>> model = AutoModelForCausalLM.from_pretrained("out", trust_remote_code=True)
    >>> optimizer = torch.optim.AdamW(model.parameters())
    >>> batches = [torch.tensor([[1, 2, 3]]), torch.tensor([[4, 5, 6]])]
    >>> for step, ids in enumerate(batches):
    ...     model(ids, labels=ids).loss.backward()
    ...     masked = mask_centre(model, step, probability=1.0)
    ...     optimizer.step()
    ...     optimizer.zero_grad()
    >>> "central" in masked[0]
    True

    Args:
        step: number of the optimizer's step.
        probability: of skipping, p_b of the paper (figure of the official repository); 0: never, 1: always.
            The paper does not give its value. At 1 - k/n the central cores learn from as many tokens as an
            expert's own cores do on average.
        seed: of the draws.
        per: how often is drawn: once for all central cores ("step"), once per FFN ("layer"), or once per
            core ("matrix").

    Returns:
        Names of the parameters whose gradient was dropped.

    Raises:
        TrainingError: it is no model, a value is out of range, or the model has no central cores.
    """
    check_model(model)
    check_mask(probability, per)
    units: dict[str, int] = {}
    masked = []
    for name, parameter in _central(model):
        unit = {"step": "", "layer": _ffn_of(name), "matrix": name}[per]
        place = units.setdefault(unit, len(units))  # not the name: wrappers change it
        if random.Random(f"{seed}/{step}/{place}").random() < probability:
            parameter.grad = None
            masked.append(name)
    return masked


def check_mask(probability: float, per: str) -> None:
    """Raises TrainingError if a value of the gradient mask is out of range."""
    if not (_is_number(probability) and 0 <= probability <= 1):
        raise TrainingError(f"the probability of skipping the centre is {probability!r}; expected 0 to 1")
    if per not in UNITS:
        raise TrainingError(f"the mask's unit is {per!r}; expected one of {', '.join(UNITS)}")


def check_model(model: object) -> None:
    """Raises TrainingError if it is no model in memory."""
    from torch import nn

    if not isinstance(model, nn.Module):
        raise TrainingError(
            f"the model is {one_line(repr(model), 60)}; expected one in memory, as from_pretrained loads it"
        )


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


# ---------------------------------------------------------------------------------------------------
# Learning rates and freezing


def has_centre(model: nn.Module) -> bool:
    """Whether the experts share central cores; whole copies (`--kind dense`) do not."""
    return any(role_of(name) == "central" for name, _ in model.named_parameters())


def param_groups(
    model: nn.Module,
    lr: float,
    *,
    central: float = 1.0,
    auxiliary: float = 1.0,
    router: float = 1.0,
    weight_decay: float = 0.0,
    no_decay: Iterable[str] = (),
) -> list[dict]:
    """Parameter groups for an optimizer, one per role and weight decay; frozen parameters are left out.

    >>> import torch
    >>> from transformers import AutoModelForCausalLM
    >>> from mpoe_convert import param_groups
    >>> model = AutoModelForCausalLM.from_pretrained("out", trust_remote_code=True)
    >>> groups = param_groups(model, lr=1e-3, auxiliary=3.0, weight_decay=0.01)
    >>> {group["lr"] for group in groups if group["role"] == "auxiliary"}
    {0.003}
    >>> optimizer = torch.optim.AdamW(groups)

    Args:
        lr: learning rate of all other parameters; `central`, `auxiliary` and `router` are factors on it.
        weight_decay: of matrices. Vectors (biases, norms, scales of features), the names in `no_decay` and
            routers have none: weight decay would pull the router towards uniform choices.

    Returns:
        [{"params": [...], "lr": ..., "weight_decay": ..., "role": ...}, ...]

    Raises:
        TrainingError: it is no model, or the learning rate or a factor is no number or negative.
    """
    check_model(model)
    if not (_is_number(lr) and lr >= 0):
        raise TrainingError(f"the learning rate is {lr!r}; expected a number of at least 0")
    factors = {"central": central, "auxiliary": auxiliary, "router": router, "other": 1.0}
    wrong = {name: factor for name, factor in factors.items() if not (_is_number(factor) and factor >= 0)}
    if wrong:
        raise TrainingError(f"learning rate factors are {wrong}; expected at least 0")
    no_decay = set(no_decay)
    groups: dict[tuple[str, float], list] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        role = role_of(name)
        is_vector = (
            parameter.dim() <= 1 or _BIAS.match(name) or (role == "auxiliary" and parameter.shape[-1] == 1)
        )
        decays = not is_vector and role != "router" and name not in no_decay
        groups.setdefault((role, weight_decay if decays else 0.0), []).append(parameter)
    return [
        {"params": parameters, "lr": lr * factors[role], "weight_decay": decay, "role": role}
        for (role, decay), parameters in groups.items()
    ]


def freeze(model: nn.Module, what: str) -> int:
    """Stop training a part of a converted model.

    >>> from transformers import AutoModelForCausalLM
    >>> from mpoe_convert import freeze
    >>> model = AutoModelForCausalLM.from_pretrained("out", trust_remote_code=True)
    >>> freeze(model, "centre") < sum(parameter.numel() for parameter in model.parameters())
    True

    Args:
        what: "centre", the central cores; or "all-but-experts", everything but the cores, the FFNs' biases
            and the routers.

    Returns:
        How many parameters are still trained.

    Raises:
        TrainingError: it is no model, `what` is unknown, or nothing would be left to train.
    """
    check_model(model)
    if what not in FROZEN:
        raise TrainingError(f"asked to freeze {what!r}; expected one of {', '.join(FROZEN)}")
    if what == "centre":
        frozen: Iterable = [p for _, p in _central(model)]
    else:
        frozen = [p for name, p in model.named_parameters() if not _is_of_experts(name)]
    for parameter in frozen:
        parameter.requires_grad_(False)
    left = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if not left:
        raise TrainingError("nothing is left to train; expected a converted model")
    return left


def _is_of_experts(name: str) -> bool:
    return role_of(name) != "other" or _BIAS.match(name) is not None
