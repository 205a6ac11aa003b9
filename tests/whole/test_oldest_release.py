"""Artifacts and this package with the oldest releases that are declared, in the folder MPOE_OLDEST_RELEASES.

python tests/helpers/bounds.py > oldest.txt && pip install --no-deps --target oldest -r oldest.txt
MPOE_OLDEST_RELEASES=oldest python -m pytest tests/whole/test_oldest_release.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from helpers.artifacts import converted
from helpers.bounds import declared, tried
from helpers.models import generative
from helpers.tiny import outputs
from packaging.version import Version

from mpoe_convert import Export, export
from mpoe_convert.exports.moe_architectures import MOE_TARGETS

# Nothing of this package: it loads as a user would who has this release and no converter.
CODE = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch, transformers
sys.path.append(sys.argv[1])
from remote_code import read_once
sys.path.pop()
transformers.logging.set_verbosity_error()

def examine(dense, out, auto):
    stock = auto.from_pretrained(dense).eval()
    model = auto.from_pretrained(out, trust_remote_code=True).eval()
    ids = torch.arange(3, 15).reshape(2, 6)
    inputs = {"input_ids": ids}
    if stock.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids.flip(1)
    with torch.no_grad():
        expected, found = (m(**inputs).logits for m in (stock, model))
    result = {
        "version": transformers.__version__,
        "converter": "mpoe_convert" in sys.modules,
        "difference": ((found - expected).norm() / expected.norm()).item(),
    }
    inputs.pop("decoder_input_ids", None)
    loss = model.train()(**inputs, labels=ids).loss
    loss.backward()
    parameters = [p for name, p in model.named_parameters() if ".aux_" in name or "router" in name]
    result["trainable"] = len(parameters)
    result["trained"] = sum(p.grad is not None for p in parameters)
    if model.can_generate():
        result["generated"] = model.eval().generate(ids, max_new_tokens=4, do_sample=False).shape[1]
    model.save_pretrained(out + "-again")
    again = auto.from_pretrained(out + "-again", trust_remote_code=True).eval()
    with torch.no_grad():
        inputs = inputs | ({"decoder_input_ids": ids.flip(1)} if stock.config.is_encoder_decoder else {})
        result["reloaded"] = torch.equal(again(**inputs).logits, found)
    return result

with read_once():
    for dense, out, auto in json.load(sys.stdin):
        print(json.dumps(examine(dense, out, getattr(transformers, auto))))
"""


HELPERS = Path(__file__).parents[1] / "helpers"
FAMILIES = ("gpt2", "llama", "gpt_neox", "bloom", "opt", "t5", "bart", "bert")


@pytest.fixture
def oldest() -> Path:
    """The folder with the oldest release."""
    folder = os.environ.get("MPOE_OLDEST_RELEASES")
    if not folder:
        pytest.skip("MPOE_OLDEST_RELEASES is not set")
    return Path(folder)


def run_in(folder: Path, code: str, cases: list) -> list[dict]:
    """What code prints, as JSON lines, in a process that has the oldest release and no converter."""
    environment = os.environ | {"PYTHONPATH": str(folder.resolve())}
    done = subprocess.run(
        [sys.executable, "-c", code, str(HELPERS)],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        env=environment,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(results) == len(cases)
    for result in results:
        assert Version(result["version"]) == Version(declared()["transformers"]) and not result["converter"]
    return results


def test_artifacts_load_train_and_generate(artifact, oldest):
    cases = [[*map(str, artifact(name)), generative(name)] for name in FAMILIES]
    for name, result in zip(FAMILIES, run_in(oldest, CODE, cases), strict=True):
        assert result["difference"] < 1e-5 and result["reloaded"], name
        assert result["trained"] == result["trainable"] > 0, name
        assert result.get("generated", 10) in (5, 10), name


EXPORTS = """
import json, sys
import torch, transformers
transformers.logging.set_verbosity_error()

for folder, auto, logits in json.load(sys.stdin):
    model, info = getattr(transformers, auto).from_pretrained(folder, output_loading_info=True)
    ids = torch.arange(3, 15).reshape(2, 6)
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})
    with torch.no_grad():
        difference = (model.eval()(**inputs).logits - torch.tensor(logits)).abs().max().item()
    print(json.dumps({
        "version": transformers.__version__,
        "converter": "mpoe_convert" in sys.modules,
        "difference": difference,
        "amiss": {name: list(names) for name, names in info.items() if names},
    }))
"""


def test_exports_compute_what_they_do_in_this_release(oldest, tmp_path):
    cases = []
    for row in MOE_TARGETS:
        name = row.sources[0]
        out = converted(name, tmp_path / name, next(iter(row.weighing)))
        for to in ("dense", "moe"):
            folder = tmp_path / name / f"as-{to}"
            export(out, folder, Export(to=to, check=False))
            model = getattr(transformers, generative(name)).from_pretrained(folder).eval()
            ids = torch.arange(3, 15).reshape(2, 6)
            inputs = {"input_ids": ids}
            inputs |= {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
            logits = outputs(model, inputs)["logits"].tolist()
            cases.append([str(folder), generative(name), logits])
    for case, result in zip(cases, run_in(oldest, EXPORTS, cases), strict=True):
        assert not result["amiss"] and result["difference"] < 1e-4, case[0]


def test_every_dependency_has_a_lower_bound():
    assert {"numpy", "pyyaml", "torch", "transformers", "accelerate", "onnx"} <= declared().keys()


# The whole way: convert with calibration, verify, train, score, draw.
WHOLE = """
import json, sys, warnings
from importlib.metadata import version
from pathlib import Path
warnings.simplefilter("ignore")
from mpoe_convert import Finetuning, Recipe, convert, evaluate, finetune, verify
from mpoe_convert.artifact.pictures import draw_pictures
from mpoe_convert.cli.tables import console, print_evaluation, print_report
from transformers import AutoModelForCausalLM

names, dense = json.load(sys.stdin)
text = Path("text.txt")
text.write_text("One word and another word, and then the word that was the first one. " * 40)
calibration = {"keep": 0.8, "calibrate": ("text.txt",), "calibration_tokens": 512}
report = convert(Recipe(dense, experts=2, bond_dim=8, **calibration), "out")
print_report(report, "out", console(stderr=True), per_matrix=True)
AutoModelForCausalLM.from_pretrained("out", trust_remote_code=True)
run = Finetuning("out", "text.txt", eval_data="text.txt", steps=2, save_every=1, batch_size=2, length=16)
steps = finetune(run, "tuned")["steps"]
found = evaluate("tuned", "text.txt", length=16, limit=4)
print_evaluation(found, console(stderr=True))
for name in ("sklearn.metrics", "sacrebleu.metrics", "rouge_score.rouge_scorer", "peft"):
    __import__(name)
print(json.dumps({
    "versions": {name: version(name) for name in names},
    "ok": verify("out").ok,
    "steps": steps,
    "perplexity": found.metrics["perplexity"].value,
    "pictures": len(draw_pictures("tuned")),
}))
"""


def test_this_package_runs_with_the_oldest_releases_of_all(oldest, tmp_path):
    dense = Path(__file__).parents[2] / "examples/tiny-gpt2"
    package = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", WHOLE],
        input=json.dumps([list(tried()), str(dense)]),
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join((str(oldest.resolve()), package))},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    found = {name: Version(version) for name, version in result["versions"].items()}
    assert found == {name: Version(bound) for name, bound in tried().items()}
    assert result["ok"] and result["steps"] == 2 and result["pictures"] > 0
    assert 1 < result["perplexity"] < float("inf")
