"""The block `mpoe` of an artifact's config.json: whether it is whole, and whether the tensors fit it.

People edit config.json by hand. What is wrong there is told with its place, before anything is read or built
of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from ..errors import CheckpointError, one_line
from ..options import fits, type_in_words
from ..runtime.shapes import modeling
from ..source.checkpoint import weight_files
from ..source.json_files import read_json_object
from ..source.paths import is_dir
from ..source.repository import Folder
from ..source.safetensors_file import read_header
from .layout import is_weights, keeps_routers, read_artifact
from .rounding import Layers, bits_of, layers_of, stored_specs

_REMEDY = "take config.json as it came with these weights"
_DIMS = ("in_dims", "out_dims", "bonds")
_BIASES = (None, "shared", "per-expert", "once")
_TOP_P = "top-p"  # the rule that has a threshold
_MISSING = object()  # stands for the value of a key that is not there

Shape = tuple[int, ...]


class _Expected(NamedTuple):
    """What a value has to be, in words and as a test."""

    words: str
    holds: Callable[[Any], bool]


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _of_type(kind: Any) -> _Expected:
    return _Expected(type_in_words(kind), lambda value: fits(value, kind))


def _list_of(words: str, each: _Expected, number: int) -> _Expected:
    """A list of so many values."""

    def holds(value: Any) -> bool:
        return isinstance(value, list) and len(value) == number and all(map(each.holds, value))

    return _Expected(f"a list of {words}", holds)


def _counts(number: int) -> _Expected:
    return _list_of(f"{number} {_COUNTS}", _COUNT, number)


_COUNT = _Expected("a whole number of at least 1", lambda value: _is_whole(value, 1))
_NUMBER = _Expected("a whole number of at least 0", lambda value: _is_whole(value, 0))
_TRUTH, _TEXT, _TEXT_OR_NONE = _of_type(bool), _of_type(str), _of_type(str | None)
_TEXTS, _TEXTS_OR_NONE = _of_type(list[str]), _of_type(list[str] | None)
_OBJECT_OR_NONE = _Expected("an object", lambda value: value is None or isinstance(value, dict))
_OBJECT = _Expected("an object", lambda value: isinstance(value, dict))
_FULL_OBJECT = _Expected("an object that is not empty", lambda value: isinstance(value, dict) and bool(value))
_FULL_LIST = _Expected("a list that is not empty", lambda value: isinstance(value, list) and bool(value))
_COUNTS = "whole numbers of at least 1"
_SOME_COUNTS = _Expected(
    f"a list of {_COUNTS}", lambda value: _FULL_LIST.holds(value) and all(map(_COUNT.holds, value))
)
_BIAS = _Expected(
    'null, "shared", "per-expert" or "once"', lambda v: v is None or (isinstance(v, str) and v in _BIASES)
)
_FRACTION = _Expected(
    "a number above 0 and below 1", lambda v: isinstance(v, float | int) and v is not True and 0 < v < 1
)

# What readers take from the config; from the block; then what may be missing.
_AROUND = {"model_type": _TEXT, "architectures": _TEXTS_OR_NONE, "auto_map": _OBJECT_OR_NONE}
_NEEDED = {"num_experts": _COUNT, "top_k": _COUNT, "ffns": _FULL_OBJECT, "forms": _FULL_LIST}
_NEEDED |= {"family": _OBJECT}
_OPTIONAL = {"parts": _COUNT, "shared_experts": _NUMBER, "rule": _TEXT, "threshold": _FRACTION}
_OPTIONAL |= {"base_auto_map": _OBJECT_OR_NONE}
# How an FFN, or the experts of a mixture, are wired into their layer.
_OF_FFN = {"slot": _TEXT, "absorbed": _TEXTS, "activation": _TEXT, "inner_dropout": _TEXT_OR_NONE}
_OF_FFN |= {"outer_dropout": _TEXT_OR_NONE, "adds_residual": _TRUTH}
_OF_EXPERTS = {"slot": _TEXT, "experts": _TEXT}
_OF_EXPERTS_OPTIONAL = {"one_by_one": _TRUTH, "activation": _TEXT_OR_NONE, "experts_at": _TEXT_OR_NONE}


class _Reader:
    """Checks values of the block of one config.json, and names the place of one that is wrong."""

    def __init__(self, where: str) -> None:
        self.where = where

    def fail(self, place: str, found: Any, expected: str) -> NoReturn:
        shown = one_line("missing" if found is _MISSING else repr(found), 80)
        raise CheckpointError(f"'{self.where}': {place} is {shown}, expected {expected}: {_REMEDY}")

    def check(self, place: str, found: Any, expected: _Expected) -> Any:
        if not expected.holds(found):
            self.fail(place, found, expected.words)
        return found

    def fields(
        self, place: str, values: dict, needed: Mapping[str, _Expected], optional: Mapping[str, _Expected]
    ) -> None:
        for key, expected in needed.items():
            self.check(f"{place}.{key}", values.get(key, _MISSING), expected)
        for key in optional.keys() & values.keys():
            self.check(f"{place}.{key}", values[key], optional[key])


def refuse_unconverted(config: dict, where: str) -> None:
    """Raises CheckpointError if a config.json, read from `where`, is not that of a converted model."""
    if not isinstance(config.get("mpoe"), dict):
        raise CheckpointError(
            f"'{where}' describes no converted model (model type {config.get('model_type')!r}, no mpoe "
            "block): expected an artifact of mpoe-convert, as a conversion or finetune writes it"
        )


def check_block(config: dict, where: str) -> list[dict[str, Shape]]:
    """Check the block `mpoe` of a config.json, as examples/artifact-format.md describes it.

    The options of routers and runtime, at the top level, are checked too.

    Args:
        config: the whole config.
        where: what it was read from, for the message.

    Returns:
        By the number of the form, {name below a mixture's path: shape} of its tensors; for `check_tensors`.

    Raises:
        CheckpointError: another format, or a value that is missing or is none of those it may be.
    """
    reader, block, runtime = _Reader(where), config["mpoe"], modeling()
    for key, expected in _AROUND.items():
        reader.check(key, config.get(key, _MISSING if expected is _TEXT else None), expected)
    reader.check("mpoe", block, _OBJECT)
    if block.get("format") != runtime.FORMAT_VERSION:
        raise CheckpointError(
            f"'{where}' has format {one_line(str(block.get('format')), 80)} of the mpoe block, expected "
            f"{runtime.FORMAT_VERSION}: use the release of mpoe-convert that wrote it"
        )
    reader.fields("mpoe", block, _NEEDED, _OPTIONAL)
    _check_routing(reader, block)
    _check_options(reader, config)
    for path, number in block["ffns"].items():
        words = f"the place of a form, 0 to {len(block['forms']) - 1}"
        is_place = _Expected(words, lambda v: _is_whole(v, 0) and v < len(block["forms"]))
        reader.check(f"mpoe.ffns[{path!r}]", number, is_place)
    if keeps_routers(config):
        reader.fields("mpoe.family", block["family"], _OF_EXPERTS, _OF_EXPERTS_OPTIONAL)
    else:
        reader.fields("mpoe.family", block["family"], _OF_FFN, {})
    shapes = []
    for number, form in enumerate(block["forms"]):
        _check_form(reader, f"mpoe.forms[{number}]", form, block)
        shapes.append(mixture_shapes(form, block, where))
    return shapes


def _check_options(reader: _Reader, config: dict) -> None:
    """The options at the top level, of routers and of the runtime."""
    for option in modeling().CONFIG_OPTIONS:
        # Where an artifact keeps the source's routers, a name without `mpoe_` is an option of theirs.
        if option.name in config and (option.name.startswith("mpoe_") or not keeps_routers(config)):
            reader.check(option.name, config[option.name], _of_option(option))


def _of_option(option: Any) -> _Expected:
    """What the value of an `Option` of the runtime may be."""
    if option.values is not None:
        return _Expected(f"one of {', '.join(option.values)}", lambda value: value in option.values)
    return _of_type(option.type)


def _check_routing(reader: _Reader, block: dict) -> None:
    """How routers choose, in values that fit together."""
    runtime, num_experts = modeling(), block["num_experts"]
    rule, parts = block.get("rule", runtime.DEFAULT_RULE), block.get("parts", 1)
    if block["top_k"] > num_experts:
        reader.fail("mpoe.top_k", block["top_k"], f"at most num_experts, {num_experts}")
    if num_experts % parts:
        reader.fail("mpoe.parts", parts, f"a divisor of num_experts, {num_experts}")
    if rule not in runtime.RULES:
        reader.fail("mpoe.rule", rule, f"one of {', '.join(runtime.RULES)}")
    if rule == _TOP_P:
        reader.check("mpoe.threshold", block.get("threshold", _MISSING), _FRACTION)
    elif "threshold" in block:
        reader.fail("mpoe.threshold", block["threshold"], f"none beside the rule {rule}")


def _check_form(reader: _Reader, place: str, form: Any, block: dict) -> None:
    """An FFN, whose projections fit together."""
    reader.check(place, form, _OBJECT)
    runtime = modeling()
    num_experts = block["num_experts"] + block.get("shared_experts", 0)
    sizes = {}
    for role in [*dict.fromkeys(["up", "down", *form])]:
        if runtime.PARTS.get(role) is runtime.Projection:
            found = reader.check(f"{place}.{role}", form.get(role, _MISSING), _OBJECT)
            sizes[role] = _check_projection(reader, f"{place}.{role}", found, num_experts)
    hidden, inner = sizes["up"]
    for role, expected in {"gate": (hidden, inner), "down": (inner, hidden)}.items():
        if sizes.get(role, expected) != expected:
            reader.fail(f"the size of {place}.{role}", sizes[role], f"{expected} beside {place}.up")
    if "adapter" in form:
        width, widths = form["adapter"], _counts(num_experts)
        words = f"{_COUNT.words}, or {widths.words}"
        either = _Expected(words, lambda value: _COUNT.holds(value) or widths.holds(value))
        reader.check(f"{place}.adapter", width, either)


def _check_projection(reader: _Reader, place: str, spec: dict, num_experts: int) -> Shape:
    """(in, out), which is that of every term."""
    reader.fields(place, spec, {"terms": _FULL_LIST, "bias": _BIAS}, {})
    sizes = [
        _check_term(reader, f"{place}.terms[{number}]", term, num_experts)
        for number, term in enumerate(spec["terms"])
    ]
    for number, size in enumerate(sizes):
        if size != sizes[0]:
            reader.fail(f"the size of {place}.terms[{number}]", size, f"{sizes[0]}, that of the first term")
    return sizes[0]


def _check_term(reader: _Reader, place: str, term: Any, num_experts: int) -> Shape:
    """(in, out) of a chain, whose lists have one entry for each core."""
    reader.check(place, term, _OBJECT)
    length = len(reader.check(f"{place}.in_dims", term.get("in_dims", _MISSING), _SOME_COUNTS))
    expected = dict(zip(_DIMS, map(_counts, (length, length, length - 1)), strict=True))
    truths = _list_of(f"{length} times true or false", _TRUTH, length)
    untied = _Expected(f"null or {truths.words}", lambda value: value is None or truths.holds(value))
    reader.fields(place, term, expected | {"shared": truths}, {"untied": untied, "by_expert": _FULL_OBJECT})
    for key, lists in term.get("by_expert", {}).items():
        if key not in expected:
            reader.fail(f"a key of {place}.by_expert", key, f"one of {', '.join(_DIMS)}")
        each = expected[key]
        words = f"{num_experts} lists, each of them {each.words}"
        reader.check(f"{place}.by_expert.{key}", lists, _list_of(words, each, num_experts))
    return math.prod(term["in_dims"]), math.prod(term["out_dims"])


def mixture_shapes(form: dict, block: dict, where: str) -> dict[str, Shape]:
    """{name below a mixture's path: shape} of the tensors that a form has.

    Args:
        form: one of the block's.
        block: which `check_block` has checked, but for its forms as a whole.
        where: what it was read from, for the message.

    Raises:
        CheckpointError: cores that make no mixture together.
    """
    runtime = modeling()
    try:
        if block["family"].get("experts"):
            module = runtime.Experts(form, block["num_experts"], block["top_k"])
        else:
            module = runtime.FeedForward.from_block(form, block)
    except ValueError as error:
        raise CheckpointError(f"'{where}': {error}: {_REMEDY}") from error
    return {tail: tuple(tensor.shape) for tail, tensor in module.state_dict().items()}


def check_tensors(
    stored: Mapping[str, Shape],
    mixtures: Iterable[tuple[str, str]],
    config: dict,
    shapes: Sequence[Mapping[str, Shape]],
    where: str,
) -> None:
    """Check that the tensors of mixtures are there, with the shapes that the block says.

    Args:
        stored: {name: shape} of all tensors of the artifact.
        mixtures: (prefix of its tensors, path that `ffns` names): ("transformer.h.0.mlp", "h.0").
        config: which `check_block` has checked.
        shapes: what that returned.
        where: the artifact, for the message.

    Raises:
        CheckpointError: a tensor is missing or has another shape, which names it.
    """
    block, bits = config["mpoe"], bits_of(config)
    layers = [_layers(form, block) if bits else {} for form in block["forms"]]
    for key, path in mixtures:
        form = block["ffns"][path]
        for tail, shape in shapes[form].items():
            name = f"{key}.{tail}"
            if name not in stored and _is_rounded(stored, key, layers[form].get(tail, {}), bits):
                continue
            if (found := stored.get(name)) != shape:
                what = "is missing" if found is None else f"has the shape {[*found]}"
                raise CheckpointError(
                    f"'{where}': {name} {what}, expected {[*shape]} by config.json: fetch or save it again"
                )


def missing_mixtures(block: dict, found: Collection[str]) -> list[str]:
    """Paths that `ffns` names and that are not among those found, though others of their stack are.

    A model may hold only one of the stacks, such as the encoder of T5.
    """
    stacks = {path.split(".")[0] for path in found}
    return [path for path in block["ffns"] if path not in found and path.split(".")[0] in stacks]


def refuse_missing(paths: Sequence[str], where: str) -> NoReturn:
    """Raise the CheckpointError of mixtures without any tensor."""
    raise CheckpointError(
        f"'{where}' has no tensors of the mixtures that its config.json names ({', '.join(paths[:3])}): "
        "fetch or save it again"
    )


def _layers(form: dict, block: dict) -> dict[str, Layers]:
    """{name below a mixture's path: its linear layers} of the cores of a form."""
    found, runtime = {}, modeling()
    projections = [(role, spec) for role, spec in form.items() if runtime.PARTS[role] is runtime.Projection]
    for role, spec in projections:
        for number, term in enumerate(spec["terms"]):
            chain = runtime.Chain(term, block["num_experts"] + block.get("shared_experts", 0))
            for k, core in enumerate(chain.core_names):
                name = f"{role}.terms.{number}.{core}"
                found[name] = layers_of(name, chain, k)
    return found


def _is_rounded(stored: Mapping[str, Shape], key: str, layers: Layers, bits: int) -> bool:
    """Whether there is what stands for a rounded core of these layers, below this path."""
    specs = stored_specs(layers, "float32", bits)
    return bool(specs) and all(stored.get(f"{key}.{part}") == size for part, (size, _) in specs.items())


def checked_artifact(folder: Path) -> tuple[dict, dict]:
    """(config, conversion report) of an artifact whose config and tensors fit together.

    Raises:
        CheckpointError: as `layout.read_artifact`, `check_block` and `check_tensors`; or a weight file is
            missing or damaged.
    """
    config, report = read_artifact(folder)
    _check_whole(config, folder)
    return config, report


def _check_whole(config: dict, folder: Path) -> None:
    """The block, and the tensors of all mixtures that are stored.

    Other libraries store rounded tensors by names and shapes of their own, which loading is left to read.
    """
    shapes = check_block(config, str(folder / "config.json"))
    if config.get("quantization_config") and not bits_of(config):
        return
    stored: dict[str, Shape] = {}
    for name in filter(is_weights, weight_files(Folder(str(folder), folder))[0]):
        stored |= {tensor.name: tensor.shape for tensor in read_header(folder / name, name).values()}
    check_tensors(stored, _stored_mixtures(stored, config, str(folder)), config, shapes, str(folder))


def _stored_mixtures(stored: Mapping[str, Shape], config: dict, where: str) -> list[tuple[str, str]]:
    """(prefix of its tensors, path) of mixtures that are stored by the names of memory.

    Raises:
        CheckpointError: there is no tensor of any mixture, or none of one whose stack has others.
    """
    block, in_block = config["mpoe"], keeps_routers(config)
    tail = [block["family"]["slot"], *([modeling().MIXTURE] if in_block else [])]
    parts = ("up", "down") if in_block else ("up", "down", "router")
    owners = sorted({name.rpartition(f".{part}.")[0] for name in stored for part in parts} - {""})
    found: list[tuple[str, str]] = []
    for path in block["ffns"]:
        end = ".".join(filter(None, [path, *tail]))
        found += [(owner, path) for owner in owners if f".{owner}".endswith(f".{end}")]
    missing = missing_mixtures(block, {path for _, path in found})
    if missing or not owners:
        refuse_missing(missing or [*block["ffns"]], where)
    return found


def check_folder(name: str) -> None:
    """Check what a folder of this name holds, if it is an artifact; anything else is the caller's concern.

    Raises:
        CheckpointError: as `checked_artifact`.
    """
    path = Path(name) / "config.json"
    if not is_dir(name) or not path.is_file():
        return
    try:
        config = read_json_object(path)
    except (OSError, CheckpointError):  # loading will report the error
        return
    if config.get("mpoe"):
        _check_whole(config, path.parent)
