"""What training writes: tried before the first step, and never the end of the run's work."""

import errno
import json
import shutil

import pytest
import torch
import transformers
from helpers.data import QUICK, words
from safetensors.torch import load_file

from mpoe_convert import Finetuning, finetune, verify
from mpoe_convert.artifact.layout import file_names, own_files
from mpoe_convert.errors import OutputError
from mpoe_convert.training.room import num_saves
from mpoe_convert.training.saving import SCRATCH
from mpoe_convert.training.trainer import MpoeTrainer

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")

REFUSED = {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [2, 5]}


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(words(600))
    return str(path)


@pytest.fixture
def source(artifact, tmp_path):
    """A copy of an artifact that may be changed."""
    shutil.copytree(artifact("gpt2")[1], tmp_path / "source")
    return tmp_path / "source"


def refuse(*args, **kwargs):
    raise AssertionError("a step was taken")


@pytest.mark.parametrize("which", [0, 1], ids=["dense", "artifact"])
def test_a_generation_config_that_transformers_refuses_to_write(which, artifact, text, tmp_path):
    folder = tmp_path / "source"
    shutil.copytree(artifact("gpt2")[which], folder)
    kept = json.dumps(REFUSED)  # not as transformers would write it
    (folder / "generation_config.json").write_text(kept)
    with pytest.raises(ValueError, match="temperature"):
        transformers.GenerationConfig.from_pretrained(folder).validate(strict=True)
    report = finetune(Finetuning(str(folder), text, **QUICK, learning_rate=1e-9), tmp_path / "tuned")
    assert report["steps"] == 4
    assert (tmp_path / "tuned" / "generation_config.json").read_text() == kept
    if which:
        assert verify(tmp_path / "tuned").ok and own_files(tmp_path / "tuned") == file_names(
            tmp_path / "tuned"
        )
    auto = transformers.AutoModelForCausalLM
    model = auto.from_pretrained(tmp_path / "tuned", trust_remote_code=True)
    assert model.generation_config.temperature == 0.6 and model.generation_config.eos_token_id == [2, 5]


def break_report(source):
    (source / "conversion_report.json").write_text("{}")


def break_card(source):
    (source / "README.md").write_bytes(b"\xff\xfe")


@pytest.mark.parametrize("how", [break_report, break_card])
def test_what_cannot_be_written_is_told_before_the_first_step(how, source, text, tmp_path, monkeypatch):
    how(source)
    monkeypatch.setattr(MpoeTrainer, "training_step", refuse)
    with pytest.raises(
        OutputError, match=r"^.*tuned' could not be written after training \(.*\): repair this"
    ):
        finetune(Finetuning(str(source), text, **QUICK), tmp_path / "tuned")
    assert not (tmp_path / "tuned").exists()


@pytest.mark.parametrize("part", ["PreTrainedConfig", "GenerationConfig", "PreTrainedTokenizerBase"])
def test_whatever_refuses_to_be_written(part, source, text, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise ValueError("this\nis invalid")

    monkeypatch.setattr(getattr(transformers, part), "save_pretrained", fail)
    monkeypatch.setattr(MpoeTrainer, "training_step", refuse)
    with pytest.raises(OutputError, match=r"could not be written after training \(this is invalid\)"):
        finetune(Finetuning(str(source), text, **QUICK), tmp_path / "tuned")


def test_an_output_that_is_no_place(artifact, text, tmp_path, monkeypatch):
    monkeypatch.setattr(MpoeTrainer, "training_step", refuse)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write .*file/tuned': .*file' is a file"):
        finetune(Finetuning(str(artifact("gpt2")[1]), text, **QUICK), tmp_path / "file" / "tuned")


def num_bytes(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def fail_to_write(error: Exception, num_saves: int, monkeypatch) -> None:
    """The optimizer's state of the checkpoint after the first `num_saves` cannot be written."""
    save, saved = torch.save, []

    def fill(value, path, *args, **kwargs):
        if str(path).endswith("optimizer.pt"):
            saved.append(path)
            if len(saved) > num_saves:
                raise error
        save(value, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", fill)


@pytest.mark.parametrize("freeze", [(), ("all-but-experts",)])
def test_a_disk_without_room(freeze, artifact, text, tmp_path, monkeypatch):
    """Room is needed for what a run leaves that fails in the end, two checkpoints, and for the result."""
    out = artifact("gpt2", dtype="bfloat16")[1]
    run = Finetuning(str(out), text, **QUICK | {"steps": 3}, freeze=freeze)
    with monkeypatch.context() as patched, pytest.raises(OutputError):
        patched.setattr("mpoe_convert.training.saving.Result._complete", lambda *args: 1 / 0)
        patched.setattr("mpoe_convert.training.saving.Result.rehearse", lambda *args: None)
        finetune(run, tmp_path / "full")
    needed = num_bytes(load_file(out / "model.safetensors").values())
    for step in (2, 3):
        checkpoint = tmp_path / "full" / f"checkpoint-{step}"
        state = torch.load(checkpoint / "optimizer.pt")["state"].values()
        needed += num_bytes(load_file(checkpoint / "model.safetensors").values())
        needed += num_bytes(each[name] for each in state for name in ("exp_avg", "exp_avg_sq"))
    usage, told = shutil.disk_usage(tmp_path), []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    monkeypatch.setattr(MpoeTrainer, "training_step", refuse)
    with pytest.raises(OutputError, match=r"the run needs 0\.\d MB and .* has 0\.\d MB free"):
        finetune(run, tmp_path / "tuned")
    assert not (tmp_path / "tuned").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
    with pytest.raises(AssertionError, match="a step was taken"):
        finetune(run, tmp_path / "tuned", watch=lambda what, done, total: told.append(what))
    assert f"needs up to {needed / 1e6:.1f} MB in '{tmp_path / 'tuned'}'" in told


@pytest.mark.parametrize("options", [{"epochs": 1.5, "accumulate": 2, "save_every": 3}, {"steps": 4}])
def test_the_number_of_checkpoints_is_known(options, artifact, text, tmp_path, monkeypatch):
    saved, trainers = [], []

    def count(self, *args):
        saved.append(self.state.global_step)
        trainers.append(self)

    monkeypatch.setattr(MpoeTrainer, "_save_checkpoint", count)
    run = Finetuning(str(artifact("gpt2")[1]), text, length=16, batch_size=4, **options)
    finetune(run, tmp_path / "tuned")
    assert num_saves(trainers[0].args, len(trainers[0].train_dataset)) == len(saved) >= 1


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("PytorchStreamWriter failed")]
)
def test_a_disk_that_fills_up_while_a_checkpoint_is_written(error, artifact, text, tmp_path, monkeypatch):
    run = Finetuning(str(artifact("gpt2")[1]), text, **QUICK)
    fail_to_write(error, 1, monkeypatch)
    told = (
        r"^the checkpoint of step 4 cannot be written to '.*tuned' \(.*(No space|failed).*\); .*checkpoint-2 "
    )
    told += r"is the newest; free some space or repair this, then run again with resume=True$"
    with pytest.raises(OutputError, match=told):
        finetune(run, tmp_path / "tuned")
    assert [path.name for path in (tmp_path / "tuned").iterdir()] == ["checkpoint-2"]
    monkeypatch.undo()
    fail_to_write(error, 0, monkeypatch)
    with pytest.raises(OutputError, match=r"step 2 .*; no checkpoint was saved before, .* run again$"):
        finetune(run, tmp_path / "new" / "tuned")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("moment", ["weights", "card"])
def test_a_failed_save_loses_nothing(moment, artifact, text, tmp_path, monkeypatch):
    """The disk fills in the end: the checkpoint stays, and --resume writes the same model as a whole run."""
    _, out = artifact("gpt2", noise=0.1)
    run = Finetuning(str(out), text, **QUICK | {"steps": 3})
    finetune(run, tmp_path / "whole")
    save = MpoeTrainer.save_model

    def fill(self, output_dir=None, _internal_call=False):
        if str(output_dir).endswith(SCRATCH):
            if moment == "card":
                save(self, output_dir, _internal_call)
            raise OSError(errno.ENOSPC, "No space left on device")
        save(self, output_dir, _internal_call)

    monkeypatch.setattr(MpoeTrainer, "save_model", fill)
    message = r"^the trained model cannot be written to '.*tuned' \(.*No space left"
    message += r".*\): .*checkpoint-3 holds it, so repair this and go on with resume=True$"
    with pytest.raises(OutputError, match=message):
        finetune(run, tmp_path / "tuned")
    left = {path.name for path in (tmp_path / "tuned").iterdir()}
    assert left == {"checkpoint-2", "checkpoint-3"}
    monkeypatch.undo()
    report = finetune(run, tmp_path / "tuned", resume=True)
    assert report["steps"] == 3
    assert own_files(tmp_path / "tuned") == file_names(tmp_path / "tuned")
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "tuned"))
    assert whole.keys() == resumed.keys()
    for name in whole:
        assert torch.equal(whole[name], resumed[name]), name


def test_what_the_user_keeps_beside_the_checkpoints_stays(artifact, text, tmp_path):
    _, out = artifact("gpt2")
    tuned = tmp_path / "tuned"

    def keep(what: str, done: int, total: int) -> None:
        if (what, done) == ("training", 3):
            shutil.copytree(tuned / "checkpoint-2", tuned / "checkpoint-2-kept")
            (tuned / "checkpoint-notes.txt").write_text("the second one was good")

    finetune(Finetuning(str(out), text, **QUICK | {"steps": 3}), tuned, watch=keep)
    assert {path.name for path in tuned.glob("checkpoint-*")} == {"checkpoint-2-kept", "checkpoint-notes.txt"}
