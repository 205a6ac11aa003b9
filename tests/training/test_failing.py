"""Runs that fail: they say at which step, write nothing, and leave what was good before."""

import errno
import json
from types import SimpleNamespace

import pytest
import torch
from helpers.data import words, write
from helpers.tiny import save_tiny, save_tokenizer
from transformers import AutoModelForCausalLM

from mpoe_convert import Finetuning, evaluate, finetune
from mpoe_convert.artifact.loading import from_pretrained
from mpoe_convert.errors import OutputError, TrainingError
from mpoe_convert.training.finetune import _Stored
from mpoe_convert.training.trainer import refusals_told


@pytest.fixture
def data(tmp_path) -> str:
    return write(tmp_path / "text.jsonl", [{"text": words(200, seed)} for seed in range(4)])


@pytest.fixture
def dense(tmp_path) -> str:
    folder = save_tiny("gpt2", "AutoModelForCausalLM", tmp_path / "dense")
    save_tokenizer(folder)
    return str(folder)


def run(model, data, **options) -> Finetuning:
    return Finetuning(model, data, **{"length": 8, "batch_size": 2, "warmup": 0, "seed": 1} | options)


@pytest.mark.parametrize("converted", [False, True])
def test_a_rate_that_destroys_the_model_is_no_success(converted, dense, data, artifact, tmp_path):
    model = str(artifact("gpt2")[1]) if converted else dense
    told = (
        r"the (loss|gradient norm) is (nan|inf) at step \d+, so training has failed; lower the learning rate"
    )
    with pytest.raises(TrainingError, match=rf"{told}.*; no checkpoint was saved before, so nothing is left"):
        finetune(run(model, data, steps=20, learning_rate=1e30), tmp_path / "tuned")
    assert not (tmp_path / "tuned").exists()


def test_the_last_good_checkpoint_stays(dense, data, tmp_path, monkeypatch):
    """The gradient of the fourth step is NaN; the third left a checkpoint."""
    steps = []

    def spoil(model):
        def hook(gradient):
            steps.append(len(steps))
            return gradient * float("nan") if len(steps) == 4 else gradient

        model.transformer.h[0].mlp.c_fc.bias.register_hook(hook)
        return model

    from mpoe_convert.training import finetune as module

    load = module._load_model
    monkeypatch.setattr(module, "_load_model", lambda *given: spoil(load(*given)))
    with pytest.raises(
        TrainingError, match=r"gradient norm is nan at step 4.*checkpoint-3 is the newest; it may"
    ):
        finetune(run(dense, data, steps=8, save_every=1), tmp_path / "tuned")
    left = sorted(path.name for path in (tmp_path / "tuned").iterdir())
    assert left == ["checkpoint-2", "checkpoint-3"]
    state = json.loads((tmp_path / "tuned/checkpoint-3/trainer_state.json").read_text())
    assert state["global_step"] == 3


@pytest.mark.parametrize("steps", [1, 3])
def test_a_step_that_destroys_the_weights_is_no_checkpoint(steps, dense, data, tmp_path, monkeypatch):
    """Its own loss and gradient are finite, and nobody sees another one of those weights."""
    step, taken = torch.optim.AdamW.step, []

    def overflow(self, *args, **kwargs):
        found = step(self, *args, **kwargs)
        taken.append(1)
        if len(taken) == steps:
            self.param_groups[0]["params"][0].data.fill_(float("inf"))
        return found

    monkeypatch.setattr(torch.optim.AdamW, "step", overflow)
    with pytest.raises(TrainingError, match=rf"NaN or infinities in '.*' after step {steps}; lower"):
        finetune(run(dense, data, steps=steps, save_every=1), tmp_path / "tuned")
    left = sorted(path.name for path in tmp_path.glob("tuned/*"))
    assert left == [f"checkpoint-{number}" for number in range(1, steps)]
    assert (tmp_path / "tuned").exists() == (steps > 1)


@pytest.mark.parametrize(
    "arguments",
    [
        {"save_strategy": "best"},
        {"eval_strategy": "epoch"},
        {"fsdp": "full_shard"},
        {"adam_beta1": 3.0},
        {"dataloader_num_workers": -1},
    ],
)
def test_what_a_library_refuses_is_told_in_one_line(arguments, dense, data, tmp_path):
    with pytest.raises(TrainingError, match=r"cannot be (set up|made|batched): ") as told:
        finetune(run(dense, data, steps=1, arguments=arguments), tmp_path / "tuned")
    assert "\n" not in str(told.value) and not (tmp_path / "tuned").exists()


def test_weights_that_their_stored_dtype_cannot_hold_are_no_success():
    model = torch.nn.Linear(2, 2).half()
    model.config = SimpleNamespace(dtype=torch.float16)
    stored = _Stored(model)
    stored.restore(model.float())
    assert model.weight.dtype == torch.float16
    model.float().weight.data[0, 0] = 70_000.0
    with pytest.raises(
        TrainingError, match=r"'weight' grew beyond the range of float16, .* set dtype=float32"
    ):
        stored.restore(model)


def test_refusals_are_told():
    for error in (KeyError("geluu"), AttributeError("no loss"), ConnectionError("offline\nnow")):
        with pytest.raises(TrainingError, match=r"^it fails: ['\w ]+$"), refusals_told("it fails"):
            raise error
    for passes in (OSError(errno.ENOSPC, "full"), OutputError("told"), KeyboardInterrupt()):
        with pytest.raises(type(passes)) as told, refusals_told("it fails"):
            raise passes
        assert told.value is passes


def test_tensors_of_another_shape_are_named(dense):
    with pytest.raises(TrainingError, match=r"'transformer.wte.weight' have other shapes.*expected \[7, "):
        from_pretrained(AutoModelForCausalLM, dense, vocab_size=7)


def test_a_block_of_one_token_teaches_nothing(dense, data, tmp_path):
    told = "length is 1; task causal needs at least 2"
    with pytest.raises(TrainingError, match=told):
        finetune(run(dense, data, steps=1, length=1), tmp_path / "tuned")
    with pytest.raises(TrainingError, match=told):
        evaluate(dense, data, length=1)
