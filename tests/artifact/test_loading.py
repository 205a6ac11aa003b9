"""Models that are loaded to be trained or scored: a random one is no model."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import transformers
from helpers.data import words, write
from helpers.tiny import save_tiny, save_tokenizer
from safetensors.torch import load_file, save_file

from mpoe_convert import Finetuning, evaluate, finetune
from mpoe_convert.artifact import loading
from mpoe_convert.artifact.loading import from_pretrained
from mpoe_convert.errors import TrainingError


def wrapped(folder):
    """Names as torch.compile leaves them, of which transformers fills every tensor with random numbers."""
    path = folder / "model.safetensors"
    tensors = {f"_orig_mod.{name}": tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def test_a_model_whose_names_are_wrapped_is_refused(tmp_path):
    folder = wrapped(save_tiny("llama", "AutoModelForCausalLM", tmp_path / "dense"))
    save_tokenizer(folder)
    data = write(tmp_path / "text.jsonl", [{"text": words(40)}])
    told = r"lacks 'model.layers.0.*' and \d+ more, which would be random numbers"
    with pytest.raises(TrainingError, match=told):
        finetune(Finetuning(str(folder), data, steps=1, length=8), tmp_path / "tuned")
    with pytest.raises(TrainingError, match=told):
        evaluate(str(folder), data, length=8)


@pytest.mark.parametrize("model_type", ["llama", "bert", "t5", "gpt2"])
def test_a_new_head_is_none_of_that(model_type, tmp_path):
    folder = save_tiny(model_type, "AutoModel", tmp_path / "dense")
    model = from_pretrained(transformers.AutoModelForSequenceClassification, str(folder), num_labels=3)
    assert model.config.num_labels == 3


def test_nor_are_the_tasks_of_routers(artifact):
    _, out = artifact("llama")
    options = {"router_tasks": ["a", "b"], "router_bias_update_rate": 0.1}
    model = from_pretrained(transformers.AutoModelForCausalLM, str(out), **options)
    assert model.mixtures()[0][1].router.tasks.shape[0] == 2


@pytest.mark.parametrize("fails", [False, True])
def test_one_of_several_processes_loads_and_unpacks_alone(monkeypatch, fails):
    """compressed-tensors asks torch.distributed whether there are others, for which it would wait."""
    seen = []

    def load(auto, name, **options):
        seen.append(dist.is_initialized())
        if fails:
            raise TrainingError("it does not load")
        model = torch.nn.Linear(2, 2)
        model.hf_quantizer = SimpleNamespace(compressor=SimpleNamespace(decompress_model=unpack))
        return model

    def unpack(model):
        seen.append(dist.is_initialized())

    monkeypatch.setattr(loading, "from_pretrained", load)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    if fails:
        with pytest.raises(TrainingError):
            loading.load_alone(None, "m", torch.device("cpu"))
    else:
        assert not loading.load_alone(None, "m", torch.device("cpu")).training
    assert seen == [False] * (1 if fails else 2) and dist.is_initialized()
    monkeypatch.undo()
    assert not dist.is_initialized()
