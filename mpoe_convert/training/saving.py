"""Write what training made: rehearsed before the first step, and made whole before it is moved into place."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from ..artifact.card_file import forget_evaluations, remove_section
from ..artifact.fingerprint import weights_of
from ..artifact.layout import (
    CARD_FILE,
    EVALUATION_REPORT_FILE,
    MODELING_FILE,
    TRAINING_REPORT_FILE,
    file_names,
    files_in_folders,
    is_artifact,
    is_weights,
    move_base_path,
    register_files,
)
from ..errors import OutputError, one_line
from ..options import switched
from ..source.hub import CHAT_TEMPLATES, asked_once, download_except_weights
from ..source.json_files import write_json
from .card import describe_training
from .checkpoints import SCRATCH, checkpoint_folders, find_checkpoint

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from .trainer import MpoeTrainer

GENERATION_FILE = "generation_config.json"


@dataclass(frozen=True)
class Result:
    """What a run writes.

    Attributes:
        folder: the output; it holds the checkpoints until the result is there.
        companions: folder with the files beside an artifact's weights; None: the model is no artifact.
        preexisting: names of the files that were in the output before.
        generation: a generation_config.json that is kept as it is; None: the model writes its own.
    """

    folder: Path
    companions: Path | None
    preexisting: frozenset[str]
    generation: bytes | None

    def rehearse(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, report: dict) -> None:
        """Write all but the weights, and remove it again.

        Args:
            model, tokenizer: what is to be trained.
            report: as of a training of no steps.

        Raises:
            OutputError: it could not be written.
        """
        try:
            with self._scratch() as folder:
                if model.can_generate() and model.generation_config is not None:
                    # As it is written after training, in which transformers may change it.
                    model.generation_config.validate(strict=True)
                model.save_pretrained(folder, state_dict={})
                tokenizer.save_pretrained(folder)
                self._complete(folder, report)
        except Exception as error:  # custom code, and every library that writes, may raise anything
            raise OutputError(
                f"'{self.folder}' could not be written after training ({one_line(error)}): repair this "
                "first; nothing was trained"
            ) from error

    def write(self, trainer: MpoeTrainer, report: dict) -> None:
        """Write the trained model and its report, and remove the checkpoints. Every process calls this.

        Raises:
            OutputError: it cannot be written. The checkpoints are left.
        """
        wait, is_main = trainer.accelerator.wait_for_everyone, trainer.accelerator.is_main_process
        try:
            with self._scratch() if is_main else nullcontext(self.folder / SCRATCH) as folder:
                wait()
                trainer.save_model(str(folder))
                wait()
                if is_main:
                    self._complete(folder, report)
                    self._publish(folder)
        except Exception as error:  # as in a rehearsal
            raise OutputError(
                f"the trained model cannot be written to '{self.folder}' ({one_line(error)}): "
                f"{self._remedy()}"
            ) from error
        if is_main:
            for path in checkpoint_folders(self.folder):
                shutil.rmtree(path)
        wait()

    def _remedy(self) -> str:
        if (last := find_checkpoint(self.folder)) is None:
            return "no checkpoint holds it, because none was to be saved"
        return f"{last} holds it, so repair this and go on with {switched('resume')}"

    @contextmanager
    def _scratch(self) -> Iterator[Path]:
        """An empty folder inside the output, removed when the block ends."""
        folder = self.folder / SCRATCH
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _complete(self, folder: Path, report: dict) -> None:
        """Add to the model that was saved in a folder what belongs beside it."""
        report |= weights_of(folder)
        write_json(folder / TRAINING_REPORT_FILE, report)
        (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle, and all in the report
        if self.generation is not None:
            (folder / GENERATION_FILE).write_bytes(self.generation)
        if self.companions is not None:
            self._complete_artifact(self.companions, folder, report)

    def _complete_artifact(self, companions: Path, folder: Path, report: dict) -> None:
        """Copy the files beside an artifact's weights, and write the training into its card and report."""
        written = {path.name for path in folder.iterdir()} | {EVALUATION_REPORT_FILE}
        for path in companions.iterdir():
            if path.is_file() and path.name not in written and not is_weights(path.name):
                shutil.copyfile(path, folder / path.name)
        in_folders = files_in_folders(companions)
        for name in in_folders:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(companions / name, folder / name)
        shutil.copyfile(companions / MODELING_FILE, folder / MODELING_FILE)
        card = folder / CARD_FILE
        remove_section(card, "Pictures")  # they show the model that was trained, as do the results
        forget_evaluations(card)
        describe_training(card, report)
        names = file_names(folder)
        made = {name for name in names if "/" not in name or fnmatchcase(name, CHAT_TEMPLATES)}
        move_base_path(folder, companions, self.folder)
        register_files(folder, made - self.preexisting | {TRAINING_REPORT_FILE, *in_folders})

    def _publish(self, folder: Path) -> None:
        for name in file_names(folder):
            target = self.folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(folder / name, target)


def companions_of(name: str, config: PretrainedConfig, token: str | None) -> Path | None:
    """The folder with the files beside an artifact's weights; None: the model is no artifact."""
    source = Path(name)
    if not source.is_dir():
        if getattr(config, "mpoe", None) is None:
            return None
        source = download_except_weights(name, token)
    return source if is_artifact(source) else None


def set_generation_aside(model: PreTrainedModel, name: str, token: str | None) -> bytes | None:
    """Take from a model a generation config that transformers reads and refuses to write.

    Such files are common: `do_sample: false` with a temperature, for example. Training goes on with what the
    model's config says.

    Args:
        model: the model.
        name: folder or Hub id that it was loaded from.
        token: for the Hub.

    Returns:
        The contents of the file, to be written beside the result; None if the model can write its own.
    """
    from transformers import GenerationConfig
    from transformers.utils.hub import cached_file

    if not model.can_generate() or model.generation_config is None:
        return None
    try:
        model.generation_config.validate(strict=True)
    except ValueError:
        with asked_once(name):
            path = cached_file(
                name, GENERATION_FILE, token=token, _raise_exceptions_for_missing_entries=False
            )
        if path is not None:
            model.generation_config = GenerationConfig.from_model_config(model.config)
            return Path(path).read_bytes()
    return None
