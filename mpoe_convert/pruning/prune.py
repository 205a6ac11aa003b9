"""Write an artifact with fewer experts: observe, choose, write tensor by tensor, measure the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..artifact.folder import check_apart, check_output, check_space, staged
from ..artifact.layout import read_artifact
from ..artifact.loading import from_pretrained, load_artifact
from ..artifact.reader import Artifact, open_artifact
from ..artifact.weight_files import PlannedTensor, TensorSpec, num_bytes, split_into_shards, write_planned
from ..compression.batches import Batch, is_causal, make_batches
from ..compression.divergence import ComparedOutput, Divergence, DivergenceSums, compared_output
from ..compression.stream import keep_no_cache, run_batch
from ..devices import check_device, pick_device
from ..extras import need
from ..planning.fewer_experts import check_groups
from ..planning.recipe import parse_size
from ..request import as_path, as_text, check_function, check_token
from ..source.architecture import main_auto_class
from ..source.checkpoint import Checkpoint
from ..source.hub import download_except_weights
from ..source.in_memory import InMemory
from ..source.json_files import write_json
from ..source.mixtures import Located
from ..source.pruned import Cut, with_experts
from ..source.state_dict import is_buffer
from ..source.text_options import check_calibration
from .checks import check
from .choose import choose, pools
from .files import copy_companions, small_config, write_reports
from .held_out import hold_out
from .observe import Observed, observe
from .report import Smaller
from .request import Pruning
from .stock import stock_of
from .tensors import planned

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Called as progress(what, done, in all); 0 in all while the model runs.
Progress = Callable[[str, int, int], None]


def prune(
    model: str | Path,
    output: str | Path,
    request: Pruning,
    *,
    overwrite: bool = False,
    token: str | None = None,
    progress: Progress | None = None,
) -> Smaller:
    """Write an artifact with fewer experts, without any training.

    >>> from mpoe_convert import Pruning, Recipe, convert, prune
    >>> report = convert(Recipe("examples/tiny-gpt2", experts=3, bond_dim=8), "three")
    >>> smaller = prune("three", "two", Pruning("text.txt", 2, calibration_tokens=1024))
    >>> smaller.experts, smaller.params < smaller.params_before
    (2, True)

    Args:
        model: artifact, a folder or a Hub id; before or after training.
        output: the folder to write; appears whole or not at all.
        request: how many experts are left, and which.
        overwrite: replace an artifact or an export of this tool that is already there.
        token: for models and data of the Hub; by default the stored login.
        progress: called as progress(what, done, in all); 0 in all while the model runs.

    Returns:
        What became of which experts, and what it cost; it is also in conversion_report.json.

    Raises:
        RecipeError: so many experts cannot be left.
        CheckpointError: the model is no artifact, or one whose experts cannot be left out.
        DataError: the text cannot be read or is too short.
        MpoeError: something else is wrong with the model or the output.
    """
    request, output = Pruning.of(request), as_path("output", output)
    model = as_text("model", model)
    check_token(token)
    check_function("progress", progress, "what, done, in all")
    check_output(output, overwrite)
    check_calibration(request)
    check_device(request.device)
    need("prune", "datasets", extra="calibrate")
    source = open_artifact(model, token=token, trust_remote_code=request.trust_remote_code)
    check(source, request)
    return _Run(source, request, token, progress or (lambda *_: None)).write(output, overwrite)


@dataclass(frozen=True)
class _Run:
    """One artifact, and what is asked of it."""

    source: Artifact
    request: Pruning
    token: str | None
    progress: Progress

    def write(self, output: Path, overwrite: bool) -> Smaller:
        """The whole work, into a folder that appears whole or not at all."""
        source, checkpoint = self.source, self.source.checkpoint
        if checkpoint.revision is None:
            check_apart(output, checkpoint.folder)
        companions = self._companions()
        own = self._pools()
        self._shrink({mixture.path: range(self.request.experts) for mixture in source.mixtures})  # or refuse
        batches, held_out = hold_out(make_batches(self.request, self._base, self.token))
        observed, expected = self._observe(batches, held_out)
        asked = self.request
        kept = {path: choose(found.scores(asked.by), asked.experts, own) for path, found in observed.items()}
        config, cuts = self._shrink(kept)
        tensors = list(planned(source, kept, cuts, config["mpoe"]))
        check_space(output, sum(map(num_bytes, tensors)))
        with staged(output, overwrite) as folder:
            copy_companions(companions, folder)
            write_json(folder / "config.json", config)
            self._write_weights(folder, tensors)
            smaller = Smaller(
                artifact=checkpoint.source if checkpoint.revision else checkpoint.folder.resolve().name,
                by=asked.by,
                text=tuple(Path(each).name if Path(each).is_file() else each for each in asked.calibrate),
                experts_before=source.num_experts,
                experts=asked.experts,
                layers=tuple(found.layer(path, kept[path], asked.by) for path, found in observed.items()),
                divergence=self._measure(folder, held_out, expected),
                params_before=_params(checkpoint.tensors.values()),
                params=_params(tensors),
            )
            write_reports(folder, output, companions, smaller)
        return smaller

    @cached_property
    def _base(self) -> Checkpoint:
        """The checkpoint with the config of the source's model."""
        return replace(self.source.checkpoint, config=self.source.config)

    @cached_property
    def _auto_class(self) -> str:
        return main_auto_class(self.source.config, self.source.model_type)

    @cached_property
    def _stock(self) -> tuple[InMemory, Located] | None:
        """The source, where it was a mixture, and its experts."""
        return stock_of(self.source) if self.source.keeps_routers else None

    def _companions(self) -> Path:
        """The folder with the files beside the weights. Raises CheckpointError if they are no artifact's."""
        checkpoint = self.source.checkpoint
        folder = checkpoint.folder
        if checkpoint.revision is not None:
            folder = download_except_weights(checkpoint.source, self.token)
        read_artifact(folder)
        return folder

    def _pools(self) -> list[list[int]]:
        """Experts of which as many stay, each. Raises RecipeError if groups cannot have so many."""
        groups = 1
        if self._stock is not None:
            _, located = self._stock
            check_groups(self.request.experts, located)
            groups = located.groups
        return pools(self.source.num_experts, groups, self.source.parts)

    @torch.no_grad()
    def _observe(
        self, batches: Sequence[Batch], held_out: Sequence[Batch]
    ) -> tuple[dict[str, Observed], list[ComparedOutput]]:
        """What experts do on batches, and the outputs for those that are held out."""
        self.progress("observing experts", 0, 0)
        model = self._ready(load_artifact(self.source, dtype="auto"))
        observed = observe(model, self.source, batches, outputs=self.request.by != "load")
        return observed, [compared_output(run_batch(model, batch)) for batch in held_out]

    def _ready(self, model: PreTrainedModel) -> PreTrainedModel:
        keep_no_cache(model)
        nn.Module.to(model, pick_device(self.request.device))  # in place
        return model.eval()

    def _shrink(self, kept: Mapping[str, Sequence[int]]) -> tuple[dict[str, Any], Mapping[str, Cut]]:
        """config.json, and what is left of tensors outside of the mixtures."""
        base, cuts = self.source.config, {}
        if self._stock is not None:
            small = with_experts(*self._stock, kept)
            base, cuts = small.config, small.cuts
        return small_config(self.source, kept, self.request.experts, base), cuts

    def _write_weights(self, folder: Path, tensors: Sequence[PlannedTensor]) -> None:
        shards = split_into_shards(tensors, parse_size(self.request.max_shard_size))
        numbers = count(1)
        write_planned(
            folder, shards, tensors, lambda made: self.progress(made.name, next(numbers), len(tensors))
        )

    @torch.no_grad()
    def _measure(self, folder: Path, held_out: Sequence[Batch], expected: list[ComparedOutput]) -> Divergence:
        """How far the model in a folder is from what is expected of it."""
        import transformers

        self.progress("measuring the loss", 0, 0)
        auto = getattr(transformers, self._auto_class)
        model = self._ready(from_pretrained(auto, str(folder), dtype="auto", trust_remote_code=True))
        sums = DivergenceSums(self._auto_class, is_causal(self._base))
        for batch in held_out:
            sums.add(model, batch, expected.pop(0), compared_output(run_batch(model, batch)))
        return sums.result()


def _params(tensors: Iterable[TensorSpec]) -> int:
    return sum(prod(tensor.shape) for tensor in tensors if not is_buffer(tensor.name))
