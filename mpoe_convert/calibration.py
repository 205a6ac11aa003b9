"""What passes through the FFNs of a dense model: second moments of every matrix's inputs or outputs.

The stock model runs as it is, with the weights of one block after the other read from the checkpoint's
files (accelerate's disk offload). Its batches walk in step: each is a greenlet that waits where the next FFN
begins until all the others are there, so that only one FFN's moments are in memory at a time and those of
finished FFNs are on disk. They stay there, under a hash of the weights and the tokens: an interrupted run
goes on where it was, and a second one reads what the first has found.
"""

from __future__ import annotations

import hashlib
import json
import os
import pydoc_data.topics
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from . import corpus, source_code
from .building import read_bias, read_matrix
from .card import main_auto_class
from .checkpoint import Checkpoint
from .errors import CheckpointError, DataError, RecipeError
from .families import Family, Source, projection_names
from .loading import from_pretrained, load_tokenizer, positions
from .moments import FFNMoments, observed_side
from .planning import FFNPlan, Plan
from .recipe import BUILTIN_TEXT
from .text_options import TextSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT = 4
# Tokens per forward pass: enough that reading a block's weights takes little of the time.
TOKENS_PER_BATCH = 4096
MAX_LENGTH = 512
# One batch in so many is kept out of the moments; inputs of so many of its tokens measure the result.
HELD_OUT = 16
SAMPLE = 256
# Gradients are taken on at most so many tokens, and so many at once.
ANSWER_TOKENS = 32768
GRAPH_TOKENS = 2048
# Odds are softened before gradients are taken: where the model is sure there are none to speak of, until a
# cut is so deep that it is sure no more.
TEMPERATURE = 2.0

NOTHING_COUNTS = (
    "the labels of the calibration batches {} leave out every place (-100); expected some that count"
)

Batch = Mapping[str, Tensor]


Progress = Callable[[str, int, int], None]


# ---------------------------------------------------------------------------------------------------
# Text into batches


def make_batches(recipe: TextSource, checkpoint: Checkpoint, token: str | None = None) -> list[Batch]:
    """Batches of the model's inputs from calibration text.

    Data with a target column are read as pairs: by encoder-decoders text and target on a side each, by
    models that say the next token one after the other, and then only what is said of the target counts.
    Else texts are read as blocks of tokens, by encoder-decoders on both sides.

    Raises:
        DataError: the data cannot be read, or are shorter than what was asked for.
        RecipeError: the model does not read text.
    """
    _check_reads_text(checkpoint)
    tokenizer = load_tokenizer(str(checkpoint.folder), trust_remote_code=checkpoint.code is not None)
    length = min(MAX_LENGTH, positions(checkpoint.architecture.make_config()) or MAX_LENGTH)
    encode = _pairing(checkpoint) if recipe.target_column != recipe.text_column else None
    rows = _read(recipe, "seq2seq" if encode else "causal", token)
    if encode and recipe.target_column in rows.column_names:
        return _pair_batches(rows, encode, tokenizer, recipe, length)
    blocks = corpus.language_blocks(rows, tokenizer, recipe.text_column, length)
    wanted = max(recipe.calibration_tokens // length, 2)
    if len(blocks) < wanted:
        raise DataError(
            f"the calibration text has {len(blocks) * length:,} tokens in blocks of {length}; expected the "
            f"{wanted * length:,} of --calibration-tokens: give more text or ask for fewer"
        )
    chosen = blocks.select(_spread(len(blocks), wanted))
    ids = torch.tensor(chosen["input_ids"])
    second = ()
    if checkpoint.config.get("is_encoder_decoder"):
        second = ("labels",) if _writes_text(checkpoint) else ("decoder_input_ids",)
    return [
        {"input_ids": part} | dict.fromkeys(second, part) for part in ids.split(_per_batch(wanted, length))
    ]


def _check_reads_text(checkpoint: Checkpoint) -> None:
    cls = checkpoint.architecture.model_class
    main = getattr(cls, "main_input_name", "input_ids")
    if main != "input_ids":
        raise RecipeError(
            f"calibration data are text, and {cls.__name__} reads {main}; expected batches of your own, as "
            "convert(..., calibration=batches)"
        )
    if checkpoint.config.get("is_encoder_decoder") and cls and cls.__name__.endswith("Classification"):
        raise RecipeError(
            f"calibration data are blocks of text, and {cls.__name__} reads texts as a whole; expected "
            "batches of your own, as convert(..., calibration=batches)"
        )


def _writes_text(checkpoint: Checkpoint) -> bool:
    cls = checkpoint.architecture.model_class
    return cls is not None and cls.__name__.endswith("ForConditionalGeneration")


def _pairing(checkpoint: Checkpoint) -> Callable | None:
    """What makes examples of rows with text and target, if the model can answer."""
    if _writes_text(checkpoint) and checkpoint.config.get("is_encoder_decoder"):
        return corpus.pairs
    return corpus.answers if says_next(checkpoint) else None


def says_next(checkpoint: Checkpoint) -> bool:
    """Whether what stands at a place of the model's outputs is about the next token."""
    if checkpoint.config.get("is_encoder_decoder"):
        return False
    cls = checkpoint.architecture.model_class
    causal = main_auto_class(checkpoint.config, checkpoint.config.get("model_type", ""))
    return causal == "AutoModelForCausalLM" or (cls is not None and cls.can_generate())


def _read(recipe: TextSource, task: str, token: str | None):
    """Rows with the columns of the task, or with texts alone where there are no targets."""
    from datasets import Dataset, concatenate_datasets

    columns = corpus.Columns(text=recipe.text_column, target=recipe.target_column)
    sources = [source for source in recipe.calibrate if source != BUILTIN_TEXT]
    parts = []
    if len(sources) < len(recipe.calibrate):
        topics = pydoc_data.topics.topics
        parts.append(Dataset.from_dict({columns.text: [topics[name] for name in sorted(topics)]}))
    if sources:
        task = "causal" if parts else task
        rows = corpus.read(sources, columns, task, recipe.calibration_split, token, targets_needed=False)
        parts.append(rows)
    return concatenate_datasets(parts)


def _spread(count: int, wanted: int) -> list[int]:
    """So many numbers below `count`, evenly spread."""
    return [k * count // wanted for k in range(wanted)]


def _per_batch(count: int, length: int) -> int:
    """Examples per batch: at most `TOKENS_PER_BATCH` tokens, and at least `HELD_OUT` batches."""
    return max(min(TOKENS_PER_BATCH // length, count // HELD_OUT), 1)


def _pair_batches(rows, encode: Callable, tokenizer, recipe: TextSource, length: int) -> list[Batch]:
    columns = corpus.Columns(text=recipe.text_column, target=recipe.target_column)
    encoded = encode(rows, tokenizer, columns, length)
    sizes = [len(ids) for ids in encoded["input_ids"]]
    wanted = min(recipe.calibration_tokens * len(sizes) // max(sum(sizes), 1) + 1, len(sizes))
    if sum(sizes) < recipe.calibration_tokens:
        raise DataError(
            f"the calibration pairs have {sum(sizes):,} tokens that the model reads; expected the "
            f"{recipe.calibration_tokens:,} of --calibration-tokens: give more text or ask for fewer"
        )
    chosen = sorted(_spread(len(sizes), wanted), key=lambda i: (sizes[i], i))  # little padding
    per_batch = _per_batch(wanted, max(sizes[i] for i in chosen))
    order = [chosen[start : start + per_batch] for start in range(0, len(chosen), per_batch)]
    return [_pad(encoded.select(part), tokenizer.pad_token_id or 0) for part in order]


def _pad(rows, pad: int) -> Batch:
    def padded(values: list[list[int]], fill: int) -> Tensor:
        return nn.utils.rnn.pad_sequence([torch.tensor(v) for v in values], True, fill)

    ids = rows["input_ids"]
    mask = [[1] * len(row) for row in ids]
    return {
        "input_ids": padded(ids, pad),
        "attention_mask": padded(mask, 0),
        "labels": padded(rows["labels"], -100),
    }


# ---------------------------------------------------------------------------------------------------
# The moments of one FFN


class _Sums:
    """Accumulates `FFNMoments` over batches."""

    def __init__(self):
        self.sums: dict[str, Tensor] = {}
        self.samples: dict[str, list[Tensor]] = {}
        self.counts: dict[str, int] = {}

    def add(self, name: str, rows: Tensor, squares_only: bool, where: str) -> None:
        """Rows (tokens, n): their products, in float32 per batch and float64 over batches, or squares."""
        if squares_only:
            squares = rows.square().sum(0)
        else:
            gram = rows.mT @ rows
            squares = gram.diagonal()
            self._sum(name, gram.double())
        check_activations(squares, where)
        self._sum(f"{name}.scale", squares.double())
        self.counts[name] = self.counts.get(name, 0) + len(rows)

    def _sum(self, name: str, value: Tensor) -> None:
        if name in self.sums:
            self.sums[name] += value
        else:
            self.sums[name] = value

    def finish(self, path: str) -> FFNMoments:
        """Raises DataError if there were fewer rows than a moment needs."""
        for name, count in self.counts.items():
            if name in self.sums and count < len(self.sums[name]):
                needed = len(self.sums[name])
                raise DataError(
                    f"{path} saw {count:,} tokens of calibration data beside those held out; expected the "
                    f"{needed:,} that moments of {needed:,} features need"
                )
        tensors = {
            name: (total / self.counts[name.removesuffix(".scale")]).float().cpu()
            for name, total in self.sums.items()
            if not name.endswith("outputs.scale")
        }
        for name, parts in self.samples.items():
            rows = torch.cat(parts)
            tensors[f"{name}.sample"] = rows[_spread(len(rows), min(SAMPLE, len(rows)))].contiguous().cpu()
        return FFNMoments(tensors)


# ---------------------------------------------------------------------------------------------------
# Batches in step


class InStep:
    """Runs functions side by side; whichever calls `wait` goes on when all the others wait too, or are over.

    Attributes:
        current: number of the function that runs.
    """

    def __init__(self):
        self.current = 0

    def run(self, functions: Sequence[Callable[[], None]], all_wait: Callable[[], None]) -> None:
        """`all_wait` is called whenever none of those that are left can go on by itself.

        Raises whatever a function raises; then, too, nothing keeps running.
        """
        from greenlet import getcurrent, greenlet

        self.main = getcurrent()
        walkers = [greenlet(function) for function in functions]
        try:
            while not all(walker.dead for walker in walkers):
                for self.current, walker in enumerate(walkers):
                    if not walker.dead:
                        walker.switch()
                all_wait()
        finally:
            for walker in walkers:
                if not walker.dead:
                    walker.throw()

    def wait(self) -> None:
        self.main.switch()

    @staticmethod
    def stop() -> None:
        """End the function that calls."""
        from greenlet import GreenletExit

        raise GreenletExit


def is_held_out(number: int, batches: Sequence[Batch]) -> bool:
    """Whether a batch is kept out of what matrices are fitted to."""
    return number % HELD_OUT == HELD_OUT - 1 or number == len(batches) - 1


def split(batches: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """(what matrices are fitted to, what is held out)."""
    parts: tuple[list[Batch], list[Batch]] = [], []
    for number, batch in enumerate(batches):
        parts[is_held_out(number, batches)].append(batch)
    return parts


def token_mask(model: PreTrainedModel, batch: Batch, *, decoder: bool) -> Tensor | None:
    """Which tokens of the decoder's (or only), or of the encoder's sequences are no padding; None: all."""
    if model.config.is_encoder_decoder and decoder:
        return batch["labels"] != -100 if "labels" in batch else None
    return batch.get("attention_mask")


def prediction_mask(model: PreTrainedModel, batch: Batch, says_next: bool) -> Tensor | None:
    """Which places of the (decoder's or only) outputs count; None: all.

    Neither padding nor what `labels` leave out with -100: of a model that says the next token, those places
    whose next label is left out.
    """
    mask, labels, ids = token_mask(model, batch, decoder=True), batch.get("labels"), batch.get("input_ids")
    if model.config.is_encoder_decoder or labels is None or ids is None or labels.shape != ids.shape:
        return mask
    kept = torch.ones_like(labels, dtype=torch.bool) if mask is None else mask.bool()
    counted = (labels != -100) & kept
    if says_next:
        counted = nn.functional.pad(counted[:, 1:], (0, 1))
    return counted & kept


def run_batch(model: PreTrainedModel, batch: Batch):
    """The model's outputs; labels are inputs of decoders, else they only say what counts."""
    unread = () if model.config.is_encoder_decoder else ("labels",)
    return model(**{name: tensor.to(model.device) for name, tensor in batch.items() if name not in unread})


def token_rows(model: PreTrainedModel, batch: Batch, path: str, x: Tensor) -> Tensor:
    """What an FFN at that path reads or writes, (tokens, features) in float32, without padding."""
    rows = x.detach().reshape(-1, x.shape[-1]).float()
    mask = token_mask(model, batch, decoder=path.startswith("decoder"))
    if mask is None or mask.numel() != len(rows):
        return rows
    return rows[mask.reshape(-1).bool().to(rows.device)]


class _Walk:
    """All batches through the model, FFN by FFN."""

    def __init__(
        self,
        model: PreTrainedModel,
        plans: Sequence[FFNPlan],
        family: Family,
        batches: Sequence[Batch],
        read_bias: Callable[[Source], Tensor],
    ):
        self.model, self.batches, self.read_bias = model, batches, read_bias
        self.plans = {plan.ffn.path: plan for plan in plans}
        self.sums: dict[str, _Sums] = {}
        self.done: set[str] = set()
        self.passes = dict.fromkeys(self.plans, 0)
        self.entered: set[str] = set()
        self.left = [sum(plan.runs_per_token for plan in plans)] * len(batches)  # FFN calls to come
        self.steps = InStep()
        self.handles = []
        for plan in plans:
            self._watch(plan, family)

    def run(self, on_done: Callable[[str, FFNMoments], None]) -> None:
        """Raises whatever the model raises; nothing keeps running."""
        inside: set[str] = set()

        def all_wait() -> None:
            for path in inside:
                self._leave(path, on_done)
            inside.clear()
            inside.update(self.entered)
            self.entered.clear()

        try:
            with torch.no_grad():
                passes = [partial(run_batch, self.model, batch) for batch in self.batches]
                self.steps.run(passes, all_wait)
        finally:
            for handle in self.handles:
                handle.remove()

    def _watch(self, plan: FFNPlan, family: Family) -> None:
        modules = projection_modules(self.model, family, plan)
        sides = {matrix.role: observed_side(matrix) for matrix in plan.matrices}
        path = plan.ffn.path

        def enter(module, args):
            self.entered.add(path)
            self.steps.wait()
            if path not in self.done:
                self._see(path, "inputs", args[0], "in" not in (sides["up"], sides.get("gate")))

        def middle(module, args):
            if path not in self.done:
                self._see(path, "inner", args[0], sides["down"] != "in")

        def leave(module, args, output):
            self.left[self.steps.current] -= 1
            if not self.left[self.steps.current]:
                self.steps.stop()  # nothing to see behind the last FFN

        def outputs(role: str):
            def hook(module, args, output):
                if path not in self.done:
                    self._see_outputs(path, role, output)

            return hook

        first = modules.get("gate", modules["up"])
        self.handles.append(first.register_forward_pre_hook(enter))
        self.handles.append(modules["down"].register_forward_pre_hook(middle))
        for role, side in sides.items():
            if side == "out":
                self.handles.append(modules[role].register_forward_hook(outputs(role)))
        self.handles.append(modules["down"].register_forward_hook(leave))

    def _rows(self, path: str, x: Tensor) -> Tensor:
        return token_rows(self.model, self.batches[self.steps.current], path, x)

    @property
    def _holds_out(self) -> bool:
        return is_held_out(self.steps.current, self.batches)

    def _see(self, path: str, place: str, x: Tensor, squares_only: bool) -> None:
        rows = self._rows(path, x)
        sums = self.sums.setdefault(path, _Sums())
        if self._holds_out:
            sums.samples.setdefault(place, []).append(rows)
        else:
            sums.add(place, rows, squares_only, f"{path} ({place})")

    def _see_outputs(self, path: str, role: str, y: Tensor) -> None:
        if self._holds_out:
            return
        source = next(m.source for m in self.plans[path].matrices if m.role == role)
        if source.part is not None:
            y = y.chunk(2, dim=-1)[source.part]
        rows = self._rows(path, y)
        if source.bias:  # from the checkpoint: the offloaded module has given its own away
            rows = rows - self.read_bias(source).to(rows)
        self.sums[path].add(f"{role}.outputs", rows, False, f"{path} (outputs of {role})")

    def _leave(self, path: str, on_done: Callable[[str, FFNMoments], None]) -> None:
        self.passes[path] += 1
        if self.passes[path] == self.plans[path].runs_per_token and path not in self.done:
            on_done(path, self.sums.pop(path).finish(path))


def check_activations(values: Tensor, where: str) -> None:
    """Raises CheckpointError for NaN or Inf in activations or in their squares."""
    if not torch.isfinite(values.sum()):
        raise CheckpointError(
            f"the dense model's activations at {where} hold NaN or Inf; expected a model that computes "
            "numbers on the calibration text (try --dtype of its training, or leave out that text)"
        )


def projection_modules(model: PreTrainedModel, family: Family, plan: FFNPlan) -> dict[str, nn.Module]:
    """The stock modules of an FFN's projections by role; a fused one stands for both of its parts."""
    layer = model.base_model.get_submodule(plan.ffn.path)
    names = projection_names(layer, family.spellings, plan.ffn.projections)
    return {role: layer.get_submodule(name) for role, name in names.items()}


# ---------------------------------------------------------------------------------------------------
# What the loss answers


def _answers(
    model: PreTrainedModel,
    plans: Sequence[FFNPlan],
    family: Family,
    batches: Sequence[Batch],
    read: Callable[[Source], Tensor],
    progress: Callable[[int, int], None],
    says_next: bool,
) -> dict[str, dict[str, Tensor]]:
    """Per FFN and matrix, second moments of the gradients on its thin side.

    The loss is the negative log-likelihood of what the model itself would say at `TEMPERATURE` (drawn by a
    fixed seed), times the temperature, so that they are those of the Fisher information: half of what they
    give is the expected divergence from the dense model at that temperature, times its square as in
    distillation, in nats per token. For models without logits it is the product of the last hidden states
    with normal numbers, and half of it their squared difference.

    Returns:
        "up.answer" (n, n) and so on, and "up.answer_mean", the mean square of the outputs' gradients: sums
        over what an FFN sees, per prediction.
    """
    sums: dict[str, dict[str, Tensor]] = {plan.ffn.path: {} for plan in plans}
    state = {"batch": {}}
    handles = []

    def watch(path: str, role: str, source: Source, module: nn.Module, side: str) -> None:
        def forward(module, args, output):
            output.register_hook(backward)

        def backward(gradient: Tensor) -> None:
            if source.part is not None:
                gradient = gradient.chunk(2, dim=-1)[source.part]
            rows = token_rows(model, state["batch"], path, gradient)
            found = sums[path]
            mean = rows.square().mean(1).sum().double()
            if side == "in":
                rows = rows @ read(source).mT.to(rows)
            products = (rows.mT @ rows).double()
            for name, value in ((f"{role}.answer", products), (f"{role}.answer_mean", mean)):
                found[name] = found[name] + value if name in found else value

        handles.append(module.register_forward_hook(forward))

    for plan in plans:
        modules = projection_modules(model, family, plan)
        for matrix in plan.matrices:
            side = observed_side(matrix)
            watch(plan.ffn.path, matrix.role, matrix.source, modules[matrix.role], side)
    model.requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)
    generator, said = torch.Generator().manual_seed(0), 0
    pieces = list(_pieces(batches))
    for done, piece in enumerate(pieces):
        state["batch"] = piece
        with torch.enable_grad():
            loss, count = _own_loss(model, piece, generator, says_next)
            loss.backward()
        said += count
        model.get_input_embeddings().zero_grad(set_to_none=True)
        progress(done + 1, len(pieces))
    for handle in handles:
        handle.remove()
    if not said:
        raise DataError(NOTHING_COUNTS.format("that gradients are taken of"))
    for path, found in sums.items():
        for name, value in found.items():
            check_activations(value, f"{path} (gradients, {name})")
    return {
        path: {name: (value / said).float().cpu() for name, value in found.items()}
        for path, found in sums.items()
    }


def _pieces(batches: Sequence[Batch]) -> Iterator[Batch]:
    """Those that are not held out, at most `ANSWER_TOKENS` evenly spread, in pieces that a graph can hold."""
    used = split(batches)[0]
    # Inputs that are no tokens: as many as would make a graph if each were of an image's length.
    sizes = [b["input_ids"].numel() if "input_ids" in b else 256 * _count(b) for b in used]
    wanted = min(len(used), -(-ANSWER_TOKENS * len(used) // sum(sizes)))
    for number in _spread(len(used), wanted):
        batch = used[number]
        rows = max(GRAPH_TOKENS * _count(batch) // sizes[number], 1)
        parts = {name: tensor.split(rows) for name, tensor in batch.items()}
        for values in zip(*parts.values(), strict=True):
            yield dict(zip(parts, values, strict=True))


def _count(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def _own_loss(
    model: PreTrainedModel, batch: Batch, generator: torch.Generator, says_next: bool
) -> tuple[Tensor, int]:
    """(sum over predictions, their number); see `_answers`."""
    output = run_batch(model, batch)
    logits = output.get("logits")
    values = (output[0] if logits is None else logits).float()
    mask = prediction_mask(model, batch, says_next)
    if mask is not None and mask.shape == values.shape[:-1]:
        values = values[mask.bool().to(values.device)]
    values = values.flatten(0, -2)
    if logits is None or logits.shape[-1] == 1:
        probe = torch.randn(values.shape, generator=generator).to(values.device)
        return (values * probe).sum(), len(values)
    values = values / TEMPERATURE
    odds = values.detach().softmax(-1).cpu()
    said = odds.multinomial(1, generator=generator)[:, 0].to(values.device)
    return TEMPERATURE * nn.functional.cross_entropy(values, said, reduction="sum"), len(values)


# ---------------------------------------------------------------------------------------------------
# The whole calibration


@dataclass(frozen=True)
class Calibration:
    """The moments of every FFN, on disk.

    Attributes:
        folder: one safetensors file per FFN, by the number of its place in the plan.
        paths: of the FFNs, in the plan's order.
        tokens: of text that the moments come from, held-out tokens included; 0 for other inputs.
    """

    folder: Path
    paths: tuple[str, ...]
    tokens: int

    def file(self, path: str, what: str = "moments") -> Path:
        return self.folder / f"{self.paths.index(path)}-{what}.safetensors"

    def load(self, path: str) -> FFNMoments:
        """Of the FFN in the layer at that path."""
        from safetensors.torch import load_file

        tensors = load_file(self.file(path))
        answers = self.file(path, "answers")
        return FFNMoments(tensors | (load_file(answers) if answers.is_file() else {}))


def calibrate(
    plan: Plan,
    checkpoint: Checkpoint,
    device: torch.device,
    batches: Sequence[Batch],
    *,
    gradients: bool = False,
    progress: Progress | None = None,
) -> Calibration:
    """Run the dense model over calibration text, or find what an earlier run over the same has left.

    Args:
        plan: what is converted.
        batches: inputs of the model; `attention_mask` and decoders' `labels` say what is padding, other
            `labels` which predictions count (see `prediction_mask`).
        gradients: also what the model's loss answers, with the whole model in memory and a backward pass.
        progress: called with (what is worked on, steps done, steps in all).

    Raises:
        DataError: too little text, or labels by which none of it counts.
        CheckpointError: the model computes NaN or Inf.
    """
    tokens = sum(batch["input_ids"].numel() for batch in batches if "input_ids" in batch)
    _check_enough(plan, batches)
    found = Calibration(_folder(plan, checkpoint, batches), tuple(f.ffn.path for f in plan.ffns), tokens)
    missing = [ffn.ffn.path for ffn in plan.ffns if not found.file(ffn.ffn.path).is_file()]
    report = progress or (lambda *_: None)

    def save(path: str, moments: FFNMoments) -> None:
        _save(moments.tensors, found.file(path))
        missing.remove(path)
        report(path, len(plan.ffns) - len(missing), len(plan.ffns))

    if missing:
        with streamed_model(plan, checkpoint, device) as model:
            walk = _Walk(model, plan.ffns, plan.family, batches, lambda source: read_bias(checkpoint, source))
            walk.done = {ffn.ffn.path for ffn in plan.ffns} - set(missing)
            walk.run(save)
    if gradients and not all(found.file(path, "answers").is_file() for path in found.paths):
        model = _load(checkpoint, dtype=_gradient_dtype(plan)).to(device)
        answers = _answers(
            model,
            plan.ffns,
            plan.family,
            batches,
            lambda source: read_matrix(checkpoint, source, device),
            lambda *n: report("gradients", *n),
            says_next(checkpoint),
        )
        for path, tensors in answers.items():
            _save(tensors, found.file(path, "answers"))
    return found


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    save_file(tensors, unfinished)
    unfinished.replace(path)


def _check_enough(plan: Plan, batches: Sequence[Batch]) -> None:
    """A moment of n features needs n tokens, and something has to be held out."""
    if len(batches) < 2:
        raise DataError(f"calibration has {len(batches)} batch; expected two or more: one is held out")
    for part, what in zip(split(batches), ("beside those held out", "that are held out"), strict=True):
        labels = [batch.get("labels") for batch in part]
        if all(each is not None and each.dim() == 2 and not (each != -100).any() for each in labels):
            raise DataError(NOTHING_COUNTS.format(what))
    needed = max(m.rows if observed_side(m) == "in" else m.cols for m in plan.matrices)
    seen = used_tokens(batches)
    if seen is not None and seen < needed:
        raise DataError(
            f"calibration has {seen:,} tokens beside those held out; expected the {needed:,} that moments of "
            f"{needed:,} features need"
        )


def used_tokens(batches: Sequence[Batch]) -> int | None:
    """Tokens that are not held out; None for inputs that are no tokens."""
    used = split(batches)[0]
    if any("input_ids" not in batch for batch in used):
        return None
    return sum(batch["input_ids"].shape.numel() for batch in used)


def _folder(plan: Plan, checkpoint: Checkpoint, batches: Sequence[Batch]) -> Path:
    """Where the moments of these weights, run by this code, on these batches are kept."""
    from huggingface_hub import cached_assets_path

    key = hashlib.sha256(json.dumps([FORMAT, checkpoint.config], sort_keys=True).encode())
    key.update(repr([(ffn.ffn, [observed_side(m) for m in ffn.matrices]) for ffn in plan.ffns]).encode())
    for name in sorted({info.file for info in checkpoint.tensors.values()}):
        with (checkpoint.folder / name).open("rb") as file:
            key.update(hashlib.file_digest(file, "sha256").digest())
    for path in source_code.files(checkpoint.folder, checkpoint.architecture):
        key.update(hashlib.sha256(path.read_bytes()).digest())
    for batch in batches:
        for name, tensor in sorted(batch.items()):
            key.update(name.encode() + str((tensor.dtype, tuple(tensor.shape))).encode())
            key.update(tensor.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return cached_assets_path("mpoe-convert", namespace="calibration", subfolder=key.hexdigest()[:32])


def _gradient_dtype(plan: Plan) -> str | torch.dtype:
    """Gradients leave the range of float16."""
    halves = any(tensor.dtype == "float16" for tensor in plan.tensors)
    return torch.float32 if halves else "auto"


def keep_no_cache(model: PreTrainedModel) -> None:
    """No keys and values for a generation that will not come; T5's stacks have configs of their own."""
    for module in model.modules():
        if (config := getattr(module, "config", None)) is not None:
            config.use_cache = False


def _load(checkpoint: Checkpoint, **options) -> PreTrainedModel:
    """The dense model; no code of the source runs that is not trusted, and generation has no cache."""
    from transformers import AutoModel

    cls, trusted = checkpoint.architecture.model_class or AutoModel, checkpoint.code is not None
    model = from_pretrained(cls, str(checkpoint.folder), trust_remote_code=trusted, **options).eval()
    keep_no_cache(model)
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = -1  # classifiers want one to find the last token; blocks have none
    return model


@contextmanager
def streamed_model(plan: Plan, checkpoint: Checkpoint, device: torch.device) -> Iterator[PreTrainedModel]:
    """The dense model, its layers read from disk when they are called."""
    blocks = {_block_of(path) for path in (*(ffn.ffn.path for ffn in plan.ffns), *plan.kept_dense)}
    skeleton = checkpoint.architecture.build(checkpoint.architecture.model_class)
    base = f"{skeleton.base_model_prefix}." if skeleton.base_model is not skeleton else ""
    placement = dict(_placement(skeleton, {base + block for block in blocks}, str(device)))
    with TemporaryDirectory() as offloaded:
        options = {"device_map": placement, "offload_folder": offloaded, "dtype": "auto"}
        with warnings.catch_warnings():  # tensors of their own count as no submodules, and have to be there
            warnings.filterwarnings("ignore", "The following device_map keys do not match")
            model = _load(checkpoint, **options)
        yield model


def _block_of(path: str) -> str:
    """ "encoder.block.0.layer.1" -> "encoder.block.0": the layer that is read as a whole."""
    parts = path.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    return ".".join(parts[: number + 1])


def _placement(
    module: nn.Module, blocks: set[str], device: str, prefix: str = ""
) -> Iterator[tuple[str, str]]:
    """(module or tensor, "disk" for a block, else the device), the largest modules that lie in one place."""
    own = [name for name, _ in module.named_parameters(recurse=False)]
    own += [name for name, _ in module.named_buffers(recurse=False)]
    yield from ((prefix + name, device) for name in own if name not in module._non_persistent_buffers_set)
    for name, child in module.named_children():
        name = prefix + name
        if name in blocks:
            yield name, "disk"
        elif any(block.startswith(f"{name}.") for block in blocks):
            yield from _placement(child, blocks, device, f"{name}.")
        else:
            yield name, device
