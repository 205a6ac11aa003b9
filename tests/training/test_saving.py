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
        OutputError, match=r"^.*tuned could not be written after training \(.*\): repair this"
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
    with pytest.raises(OutputError, match="file/tuned could not be written after training"):
        finetune(Finetuning(str(artifact("gpt2")[1]), text, **QUICK), tmp_path / "file" / "tuned")


def test_a_disk_without_room(artifact, text, tmp_path, monkeypatch):
    """Room is needed for the result and for one checkpoint in float32."""
    out = artifact("gpt2", dtype="bfloat16")[1]
    model = transformers.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    needed = sum(p.numel() * (p.element_size() + 4) for p in model.parameters())
    usage = shutil.disk_usage(tmp_path)
    run = Finetuning(str(out), text, **QUICK)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    with pytest.raises(OutputError, match=r"needs 0\.\d MB and .* has 0\.\d MB free"):
        finetune(run, tmp_path / "tuned")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
    finetune(run, tmp_path / "tuned")


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
    message = r"^the trained model cannot be written to .*tuned \(.*No space left"
    message += r".*\): .*checkpoint-3 holds it, so repair this and go on with --resume$"
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
