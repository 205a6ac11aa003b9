"""Compare an artifact with its dense model. Both are loaded in a fresh process without this package."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field, fields, replace
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, FamilyError, HubError, RequestError, VerifyError, few
from ..options import called, switched, switched_off
from ..request import as_path, as_text, check_token
from ..source.architecture import custom_heads, main_auto_class
from ..source.hub import check_available, variables_for
from ..source.json_files import read_json_object
from ..source.paths import exists, is_dir, is_path, suggest_path
from ..source.repository import suggesting
from .auto_classes import has_own_tokenizer, has_tokenizer
from .block import checked_artifact
from .fingerprint import is_about, weights_of
from .folder import TemporaryFolder
from .layout import REPORT_FILE, TRAINING_REPORT_FILE, base_config, base_of

# An exact decomposition multiplies in another order than the dense matrix: float32 outputs then differ by
# a few of its units in the last place (1.2e-7 each), grown by the layers above. Leave that ample room.
ROUNDING = 1e-4
# Rounding of the stored cores and the clones' noise change the weights; the layers above amplify that in the
# logits. Five times the weights' error is allowed, but never more than a tenth.
AMPLIFICATION = 5.0
MAX_TOLERANCE = 0.1
# A compressed model is meant to differ. At 0.5 a quarter of the outputs' squared size is lost; outputs that
# have nothing to do with the source's, of the same size, differ by the square root of 2.
MAX_COMPRESSED_TOLERANCE = 0.5


@dataclass(frozen=True)
class Verification:
    """The result of `verify`.

    Attributes:
        artifact: its folder.
        against: the dense model, as it was loaded.
        auto_class: the Auto class that loaded both.
        model_class: the artifact's class.
        inputs: what both were run on, in words.
        relative_difference: Frobenius norm of (converted - dense output) over that of the dense one; the
            largest of all floating-point outputs, so that none hides another. None: see `reference_error`
            and `damaged_outputs`.
        max_difference: largest absolute difference of two outputs.
        tolerance: largest relative_difference that was allowed; None: any, because the artifact was trained,
            or leaves out parts of the dense FFNs.
        top1_agreement: share of positions with the same largest logit; None for a model without logits.
        greedy_agreement: share of greedily generated tokens that are equal; None without generation.
        tokenizer_agreement: share of a few hundred texts that both tokenizers encode alike; None where there
            is no tokenizer, or where that of the dense model does not load.
        tokenizer_difference: the shortest of the texts that they do not.
        trained: the artifact was trained since, as a training report beside it says. Then the difference from
            the dense model is information.
        generates: it was seen to generate; None: it is not made for that.
        damaged_weights: names of its parameters that hold NaN or infinities.
        damaged_outputs: name of an output -> share of it that is NaN, or infinite where the dense model's is
            not.
        contradictions: where its config, its reports and its weights disagree, as sentences.
        reference_error: why a trained artifact was not compared with the dense model.
    """

    artifact: str
    against: str
    auto_class: str
    model_class: str
    inputs: str
    relative_difference: float | None
    max_difference: float | None
    tolerance: float | None
    top1_agreement: float | None
    greedy_agreement: float | None
    tokenizer_agreement: float | None = None
    tokenizer_difference: str | None = None
    trained: bool = False
    generates: bool | None = None
    damaged_weights: tuple[str, ...] = ()
    damaged_outputs: Mapping[str, float] = field(default_factory=dict)
    contradictions: tuple[str, ...] = ()
    reference_error: str | None = None

    @property
    def same_tokens(self) -> bool:
        """Whether the tokenizers agree, or there is none."""
        return self.tokenizer_agreement in (None, 1)

    @property
    def is_sound(self) -> bool:
        """Whether weights and outputs are finite, and the config, the reports and the weights agree."""
        return not (self.damaged_weights or self.damaged_outputs or self.contradictions)

    @property
    def is_near(self) -> bool:
        """Whether the outputs' difference is within the tolerance, if there is one."""
        found, allowed = self.relative_difference, self.tolerance
        return allowed is None or (found is not None and found <= allowed)

    @property
    def ok(self) -> bool:
        """Whether it is sound and near, and the tokenizers agree; training may bring another tokenizer."""
        return self.is_sound and self.is_near and (self.same_tokens or self.trained)

    def problems(self) -> list[str]:
        """Why it is not `ok`, as sentences; what the most follows from comes first."""
        found = []
        if self.damaged_weights:
            found.append(f"{few(self.damaged_weights)} hold NaN or infinities.")
        if self.damaged_outputs:
            shares = ", ".join(f"{share:.1%} of {name}" for name, share in self.damaged_outputs.items())
            found.append(f"it computes NaN or infinities: {shares}.")
        found += self.contradictions
        if not (self.same_tokens or self.trained):
            found.append(
                f"the tokenizers do not agree, for example on {self.tokenizer_difference!r}: convert again, "
                "or compare with the model that was converted."
            )
        if not self.damaged_outputs and not self.is_near:
            found.append(
                "the outputs do not agree."
                if self.reference_error is None
                else f"it could not be compared with {self.against}: {self.reference_error}"
            )
        return found

    def rows(self) -> dict[str, str]:
        """What was measured, for a table."""
        found = {"inputs": self.inputs}
        if self.relative_difference is not None and self.max_difference is not None:
            found["relative difference"] = f"{self.relative_difference:.2e}"
            allowed = self.tolerance
            why = "was trained" if self.trained else "leaves out parts of the FFNs"
            found["  allowed"] = f"any, for it {why}" if allowed is None else f"{allowed:.2e}"
            found["largest absolute difference"] = f"{self.max_difference:.2e}"
        if self.trained:
            finite = not (self.damaged_weights or self.damaged_outputs)
            found["weights and outputs"] = "finite" if finite else "see below"
        if self.trained and self.generates is not None:
            found["generates"] = "yes"
        for name, share in (
            ("same largest output", self.top1_agreement),
            ("same greedily generated tokens", self.greedy_agreement),
            ("texts with the same token ids", self.tokenizer_agreement),
        ):
            if share is not None:
                found[name] = f"{share:.1%}"
        return found


@dataclass(frozen=True)
class ChildRequest:
    """What verify_child.py compares: two models, by the folders (absolute) or Hub ids that it loads.

    Attributes:
        against / revision: the reference: a dense model, or the artifact that was exported.
        artifact / artifact_revision: the model to compare with it: an artifact, or an export.
        auto_class: the Auto class that loads both.
        trust_remote_code: whether the code of the reference is run, and that of the other.
        token: of the Hub.
        experts: the reference is run once per expert, with all tokens sent to it; None: once, as it routes.
        adapters: folders of PEFT adapters, with each of which the other is run once; None: once, without.
        is_export: the reference is an artifact; for messages.
        key_mapping: of the reference's names of tensors, where a trainer's wrapper changed them.
        has_tokenizer: the artifact, a folder then, has a tokenizer to compare with that of the reference.
        is_trained: the artifact was trained since; then it is checked without a reference that does not load.
        absent: why the reference cannot be loaded; None: it is loaded.
        kept: by the paths of layers, the numbers of the experts that a mixture has left: the reference is cut
            to these; empty: it has all.
        small: config.json of the reference with so many experts.
    """

    against: str
    revision: str | None
    artifact: str
    auto_class: str
    trust_remote_code: tuple[bool, bool]
    token: str | None = field(repr=False)
    artifact_revision: str | None = None
    experts: tuple[int, ...] | None = None
    adapters: tuple[str, ...] | None = None
    is_export: bool = False
    key_mapping: dict[str, str] = field(default_factory=dict)
    has_tokenizer: bool = False
    is_trained: bool = False
    absent: str | None = None
    kept: dict[str, list[int]] = field(default_factory=dict)
    small: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def verify(
    artifact: str | Path,
    *,
    against: str | PathLike[str] | None = None,
    tolerance: float | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
) -> Verification:
    """Compare an artifact with its dense source on random inputs, both computing in float32.

    Their tokenizers, if there are some, are compared on a few hundred texts. Of an artifact that `finetune`
    wrote the difference is information: what is checked is that it loads, is finite, generates, and that its
    config, its reports and its weights agree. The dense source may then be gone. A mixture with fewer experts
    is compared with its source without the others.

    Args:
        artifact: folder that a conversion wrote.
        against: Hub id or folder of the dense model; by default the one it was converted from.
        tolerance: allowed relative difference; by default rounding plus what the report's errors explain, and
            any of a trained artifact.
        token: Hub token for the dense model.
        trust_remote_code: run the dense model's custom code, if the artifact has it too or `against` is
            given. The artifact's code is always run.

    Raises:
        VerifyError: one of the two cannot be loaded or run, or weights are missing. A difference above the
            tolerance, or of the tokenizers, raises nothing: see `Verification.ok`.
        CheckpointError: the folder is no artifact, or its config.json is damaged or does not fit the
            tensors.

    >>> from mpoe_convert import verify
    >>> verify("out").ok
    True
    """
    folder = as_path("artifact", artifact)
    against = None if against is None else as_text("against", against)
    check_token(token)
    check_tolerance(tolerance)
    config, report = checked_artifact(folder)
    training = _training_report(folder)
    reference = _find_reference(folder, report, against, is_trained=training is not None)
    result = _run_child(_request(folder, config, report, reference, token, trust_remote_code))
    if reference.is_named and (reason := result.get("reference_error")):
        raise VerifyError(f"'{folder}' cannot be compared with '{reference.name}': {reason}")
    if tolerance is None and training is None and not _leaves_out(report):
        tolerance = _tolerance(report)
    return Verification(
        artifact=str(folder),
        against=reference.name,
        auto_class=main_auto_class(base_config(config), report["model_type"]),
        tolerance=tolerance,
        trained=training is not None,
        contradictions=tuple(_contradictions(folder, config, report, training)),
        **_NOT_COMPARED | result,
    )


@dataclass(frozen=True)
class _Reference:
    """The dense model that an artifact is compared with.

    Attributes:
        name / revision: folder or Hub id, and the commit of the latter that was converted.
        is_local: it is a folder.
        is_named: the user named it.
        is_trained: the artifact was trained since; then it may be absent.
        absent: why it cannot be loaded; None: it is looked for.
    """

    name: str
    revision: str | None
    is_local: bool
    is_named: bool
    is_trained: bool
    absent: str | None = None


def _find_reference(folder: Path, report: dict, against: str | None, *, is_trained: bool) -> _Reference:
    """The model that was named, or the one that was converted.

    Raises:
        VerifyError, HubError: it is not there, and was named or is needed.
    """
    is_named = against is not None
    revision = None if is_named else report["revision"]
    was_local = not is_named and revision is None
    name = against or base_of(folder, report)
    # An artifact converted from the Hub is compared with the Hub's model, even if a folder has that name.
    is_local = revision is None and is_dir(name)
    found = _Reference(name, revision, is_local, is_named, is_trained)
    if is_local:
        return found
    may_be_absent = is_trained and not is_named
    if was_local or is_path(name):
        absent = (
            f"the dense model '{name}' is not a folder here{_nor_there(folder, report, name)}; expected "
            f"{'the one that was converted' if was_local else 'a folder or a Hub id'}: name it with "
            f"{called('against')}{suggest_path(name)}"
        )
        if not may_be_absent:
            raise VerifyError(absent)
        return replace(found, absent=absent)
    try:
        with suggesting(name):
            check_available(name, revision)
    except HubError as error:
        if not may_be_absent:
            raise
        return replace(found, absent=str(error))
    return found


def _request(
    folder: Path, config: dict, report: dict, reference: _Reference, token: str | None, trusts_code: bool
) -> ChildRequest:
    """What is compared, and how. Raises VerifyError for custom code of the reference that is not trusted."""
    base, kept = base_config(config), _kept_experts(report)
    has_own_code = bool(custom_heads(base.get("auto_map") or {}))
    if has_own_code and not trusts_code:
        raise VerifyError(
            f"the dense model '{reference.name}' has custom code: read it, and pass "
            f"{switched('trust_remote_code')} to run it"
        )
    trusted = trusts_code and (has_own_code or has_own_tokenizer(folder) or reference.is_named)
    return ChildRequest(
        against=str(Path(reference.name).resolve()) if reference.is_local else reference.name,
        revision=reference.revision,
        artifact=str(folder.resolve()),
        auto_class=main_auto_class(base, report["model_type"]),
        trust_remote_code=(trusted, True),
        token=token,
        key_mapping=report.get("key_mapping", {}),
        has_tokenizer=has_tokenizer(folder) and (trusted or not has_own_tokenizer(folder)),
        is_trained=reference.is_trained,
        absent=reference.absent,
        kept=kept,
        small=base if kept else {},
    )


def _kept_experts(report: dict) -> dict[str, list[int]]:
    """By the paths of layers, the experts that an artifact of a mixture has left; {}: all."""
    fewer = report.get("fewer_experts") or {"layers": []}
    return {layer["path"]: layer["kept"] for layer in fewer["layers"]}


def _nor_there(folder: Path, report: dict, against: str) -> str:
    """Where else the dense model was looked for, for a message."""
    if against != report["base_model"] or not report.get("base_path"):
        return ""
    place = os.path.normpath(folder.resolve() / str(report["base_path"]))
    return "" if place == os.path.abspath(against) else f", nor is '{place}'"


# Of an artifact without a dense model to compare it with.
_NOT_COMPARED: dict[str, Any] = dict.fromkeys(
    ("relative_difference", "max_difference", "top1_agreement", "greedy_agreement"), None
)


def _training_report(folder: Path) -> dict | None:
    """The report of an artifact that `finetune` wrote. Raises CheckpointError if it is damaged."""
    path = folder / TRAINING_REPORT_FILE
    return read_json_object(path, "a training report", remedy="train again") if path.is_file() else None


def _contradictions(folder: Path, config: dict, report: dict, training: dict | None) -> Iterator[str]:
    """Where an artifact's config, its reports and its weights disagree."""
    block, recipe = config["mpoe"], report["recipe"]
    experts = recipe.get("experts", block["num_experts"])
    if experts != block["num_experts"]:
        yield f"config.json names {block['num_experts']} experts, {REPORT_FILE} {experts}."
    converted = report.get("ffns", [*block["ffns"]])
    if {*converted} != block["ffns"].keys():
        yield f"config.json names the FFNs {few([*block['ffns']])}, {REPORT_FILE} {few(converted)}."
    if lacking := _lacking(folder, config):
        yield f"{lacking}."
    if training is not None and not is_about(training, weights_of(folder)):
        yield f"{TRAINING_REPORT_FILE} is about other weights than those in the folder."


def _lacking(folder: Path, config: dict) -> str | None:
    """Which mixtures of the config have no tensors among those that are stored; None: all have them."""
    from .reader import open_artifact  # which needs torch

    if config["mpoe"].get("base_auto_map"):
        return None  # opening it would run that code here
    try:
        open_artifact(str(folder), trust_remote_code=True)
    except FamilyError:
        return None
    except CheckpointError as error:
        return str(error)
    return None


def check_tolerance(tolerance: float | None) -> None:
    """Raises RequestError unless it is None or a finite number of at least 0."""
    is_number = isinstance(tolerance, Real) and not isinstance(tolerance, bool)
    if tolerance is not None and not (is_number and 0 <= tolerance < math.inf):
        raise RequestError(
            f"{called('tolerance')} is {tolerance!r}; expected a relative difference of at least 0, such as "
            "0.01"
        )


@dataclass(frozen=True)
class Comparison:
    """The difference between an export and its artifact, both computing in float32 on random inputs.

    Attributes:
        relative_difference / max_difference / top1_agreement / greedy_agreement: as of `Verification`; of
            several experts, the worst.
        inputs: what both were run on, in words.
        tolerance: largest relative_difference that was allowed; None: the export is meant to differ.
        tokenizer_agreement / tokenizer_difference: as of `Verification`.
    """

    relative_difference: float
    max_difference: float
    top1_agreement: float | None
    greedy_agreement: float | None
    inputs: str
    tolerance: float | None
    tokenizer_agreement: float | None = None
    tokenizer_difference: str | None = None

    def in_words(self) -> str:
        """The difference as a sentence for the export's card."""
        text = f"Relative difference of its outputs from the original's on {self.inputs}, in float32: "
        return f"{text}{self.relative_difference:.1e}."


def compare_export(request: ChildRequest, tolerance: float | None) -> Comparison:
    """Compare an export with its artifact in a fresh process.

    Args:
        request: names both, with the artifact as the reference.
        tolerance: largest relative difference that is allowed; None: any.

    Raises:
        VerifyError: one of the two cannot be loaded or run, they differ by more than the tolerance, or their
            tokenizers differ.
    """
    result = _run_child(request)
    if damaged := result["damaged_weights"]:
        raise VerifyError(f"{few(damaged)} of the export hold NaN or infinities, as those of the model do")
    if shares := result["damaged_outputs"]:
        raise VerifyError(f"the export computes NaN or infinities in {few([*shares])}; nothing was kept")
    found = Comparison(
        **{each.name: result[each.name] for each in fields(Comparison) if each.name in result},
        tolerance=tolerance,
    )
    if tolerance is not None and not found.relative_difference <= tolerance:
        raise VerifyError(
            "the export does not compute what the artifact does: the outputs differ by a relative "
            f"{found.relative_difference:.2g}, expected at most {tolerance:g}; {_unchecked()}"
        )
    if found.tokenizer_difference is not None:
        raise VerifyError(
            f"the export's tokenizer encodes {found.tokenizer_agreement:.1%} of the texts as the artifact's, "
            f"expected all, and not {found.tokenizer_difference!r}: transformers loads another class for its "
            f"model type; {_unchecked()}"
        )
    return found


def _unchecked() -> str:
    return f"nothing was kept ({switched_off('check')} keeps it all the same)"


def _is_shadowed(model: str) -> bool:
    """Whether a folder here has the name of this Hub id, so that transformers would load it instead."""
    return not Path(model).is_absolute() and exists(model)


def _leaves_out(report: dict) -> bool:
    """Whether a token passes some of the dense FFNs' neurons only: outputs are meant to differ."""
    return report["recipe"].get("kind") == "split" and not report.get("exact", True)


def _tolerance(report: dict) -> float:
    rounding = report.get("rounding") or {"errors": {}}
    explained = report["max_relative_error"] + report["max_clone_drift"]
    # Gate, up and down are all rounded, one behind the other: their errors' squares add up to three.
    explained += 3**0.5 * max(rounding["errors"].values(), default=0)
    compressed = (
        rounding["errors"] or report.get("budget") or report.get("divergence") or report["recipe"].get("keep")
    )
    largest = MAX_COMPRESSED_TOLERANCE if compressed else MAX_TOLERANCE
    return min(ROUNDING + AMPLIFICATION * explained, largest)


def _run_child(request: ChildRequest) -> dict:
    """Run verify_child.py by its path, with a fresh module cache; its last line of output is the result."""
    child = Path(__file__).with_name("verify_child.py")
    with closing(TemporaryFolder("mpoe-verify-")) as temporary:
        cache = str(temporary.path)
        environment = os.environ | {"HF_MODULES_CACHE": cache, "TOKENIZERS_PARALLELISM": "false"}
        environment |= variables_for(request.against)
        done = subprocess.run(
            [sys.executable, "-P", str(child)],
            input=request.to_json(),
            capture_output=True,
            text=True,
            env=environment,
            cwd=cache if _is_shadowed(request.against) else None,
            check=False,
        )
    lines = done.stdout.strip().splitlines()
    try:
        result = json.loads(lines[-1])
    except (IndexError, ValueError):
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise VerifyError(f"the verifying process failed: {reason}") from None
    if "error" in result:
        raise VerifyError(result["error"])
    return result
