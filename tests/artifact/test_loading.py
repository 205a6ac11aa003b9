"""Models that are loaded to be trained or scored: a random one is no model."""

import pytest
import transformers
from helpers.data import words, write
from helpers.tiny import save_tiny, save_tokenizer
from safetensors.torch import load_file, save_file

from mpoe_convert import Finetuning, evaluate, finetune
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
