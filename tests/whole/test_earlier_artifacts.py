"""Artifacts of earlier versions of this package run the `modeling_mpoe.py` that lies beside them.

`helpers/earlier/modeling_mpoe.py` is the shipped file as it was before routers returned `Choices`.
"""

import shutil
from pathlib import Path

import pytest
import torch
import transformers
from helpers.artifacts import perturb
from helpers.data import QUICK, words
from helpers.models import generative
from helpers.tiny import make_inputs

from mpoe_convert import Export, Finetuning, export, finetune, router_stats, verify

EARLIER = Path(__file__).parents[1] / "helpers" / "earlier" / "modeling_mpoe.py"


@pytest.fixture
def earlier(artifact, tmp_path):
    def make(model_type: str = "gpt2", trained: bool = True, **recipe) -> tuple[Path, Path]:
        """The same artifact, with chains that the earlier code knows, with that code and with today's."""
        if "kind" not in recipe:
            recipe = {"layout": "one-sided"} | recipe
        _, out = artifact(model_type, **recipe)
        folders = [Path(shutil.copytree(out, tmp_path / name)) for name in ("earlier", "today")]
        shutil.copyfile(EARLIER, folders[0] / EARLIER.name)
        for folder in folders if trained else ():
            perturb(folder)
        return tuple(folders)

    return make


def load(folder: Path, model_type: str = "gpt2", **options):
    auto = getattr(transformers, generative(model_type))
    return auto.from_pretrained(folder, trust_remote_code=True, **options).eval()


@pytest.mark.parametrize(
    "recipe", [{}, {"kind": "dense"}, {"kind": "low-rank"}, {"kind": "adapter"}], ids=str
)
@pytest.mark.parametrize("model_type", ["gpt2", "llama", "t5"])
def test_both_compute_the_same(model_type, recipe, earlier):
    coefficient = {"router_aux_loss_coef": 0.01}  # whose default is another today
    models = [load(folder, model_type, **coefficient) for folder in earlier(model_type, **recipe)]
    inputs = make_inputs(models[0], generative(model_type))
    found = []
    for model in models:
        model.train()
        torch.manual_seed(0)
        outputs = model(**inputs, labels=inputs["input_ids"], output_router_logits=True)
        outputs.loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append((outputs.loss, outputs.aux_loss, outputs.logits, gradients))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_router_stats_are_the_same(earlier):
    found = []
    for folder in earlier():
        model = load(folder, router_capacity_factor=0.5).train(False)
        for module in model.modules():
            module.training = type(module).__name__.endswith("Router")  # the capacity, without dropout
        with router_stats(model, similarity_tokens=4) as stats, torch.no_grad():
            model(**make_inputs(model, generative("gpt2")))
        found.append(stats)
    for path, before in found[0].items():
        now = found[1][path]
        for name in ("num_tokens", "load", "probability", "entropy", "dropped", "similarity"):
            torch.testing.assert_close(getattr(now, name), getattr(before, name), msg=name)
        assert now.dropped > 0.1


def test_it_verifies_and_finetunes(earlier, tmp_path):
    folder, _ = earlier(trained=False)
    assert verify(folder).ok
    (tmp_path / "text.txt").write_text(words(300))
    finetune(
        Finetuning(str(folder), str(tmp_path / "text.txt"), **QUICK, trust_remote_code=True),
        tmp_path / "tuned",
    )
    assert (tmp_path / "tuned" / EARLIER.name).read_bytes() == EARLIER.read_bytes()


def test_its_experts_are_exported_one_by_one(earlier, tmp_path):
    """The check sends every token to one expert, in a process that cannot import this package."""
    for number, folder in enumerate(earlier(kind="low-rank")):
        report = export(folder, tmp_path / f"lora-{number}", Export(to="lora", trust_remote_code=True))
        assert report.comparison.relative_difference < 1e-5


def test_its_experts_average_to_the_same(earlier, tmp_path):
    (tmp_path / "text.txt").write_text(words(600))
    text = {"calibrate": (str(tmp_path / "text.txt"),), "calibration_tokens": 400}
    request = Export(**text, check=False, trust_remote_code=True)
    shares = [
        export(folder, tmp_path / f"average-{number}", request).expert_shares
        for number, folder in enumerate(earlier("llama"))
    ]
    assert shares[0].keys() == shares[1].keys()
    for path, expected in shares[0].items():
        assert shares[1][path] == pytest.approx(expected) and max(expected.values()) > 0.4
