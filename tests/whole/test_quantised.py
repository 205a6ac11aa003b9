"""Quantising a converted model, cores or the rest of it, by libraries in a folder named by MPOE_QUANTISERS.

pip install --no-deps --target quantisers torchao bitsandbytes compressed-tensors loguru
MPOE_QUANTISERS=quantisers python -m pytest -m slow tests/whole/test_quantised.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from mpoe_convert import Export, Recipe, convert, export

# The dense model quantised in the same way, its FFN left as it is, must compute the same.
CODE = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

dense, out = sys.argv[1:]
ids = torch.arange(3, 15)[None]
head, ffn = ["lm_head"], ["gate_proj", "up_proj", "down_proj"]

def load(folder, config=None):
    options = {} if config is None else {"quantization_config": config}
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()

def logits(model):
    with torch.no_grad():
        return model(ids).logits.float()

def by_torchao():  # on the module itself: transformers' config does not spare the FFN
    model = load(dense)
    quantize_(model, Int8WeightOnlyConfig(), lambda module, name: name.endswith("_proj") and "attn" in name)
    return model

exact = logits(load(dense))
for name, stock, config in (
    ("torchao", by_torchao(), TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=head)),
    *(
        (
            f"bitsandbytes {bits}",
            load(dense, BitsAndBytesConfig(**{f"load_in_{bits}": True}, llm_int8_skip_modules=head + ffn)),
            BitsAndBytesConfig(**{f"load_in_{bits}": True}, llm_int8_skip_modules=head),
        )
        for bits in ("8bit", "4bit")
    ),
):
    expected, found = logits(stock), logits(load(out, config))
    print(json.dumps({
        "name": name,
        "effect": ((expected - exact).norm() / exact.norm()).item(),
        "difference": ((found - expected).norm() / expected.norm()).item(),
    }))
"""


# One expert whose cores are the dense matrices: rounded like the dense model, it must compute the same.
CORES = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
from torchao.quantization.granularity import PerGroup
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

dense, out = sys.argv[1:]
ids = torch.arange(3, 35)[None]

def logits(folder, config=None):
    options = {} if config is None else {"quantization_config": config}
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()
    with torch.no_grad():
        return model(ids).logits.float()

int4 = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
exact = logits(dense)
for name, config in (
    ("torchao int8", TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=["lm_head"])),
    ("torchao int4", TorchAoConfig(int4, modules_to_not_convert=["lm_head"])),
    ("bitsandbytes 8bit", BitsAndBytesConfig(load_in_8bit=True)),
    ("bitsandbytes 4bit", BitsAndBytesConfig(load_in_4bit=True)),
):
    expected, found = logits(dense, config), logits(out, config)
    print(json.dumps({
        "name": name,
        "effect": ((expected - exact).norm() / exact.norm()).item(),
        "difference": ((found - expected).norm() / expected.norm()).item(),
    }))
"""


@pytest.mark.slow
def test_large_cores_are_quantised_as_dense_matrices(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=48, initializer_range=0.2)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    convert(Recipe(str(tmp_path / "dense"), experts=2, kind="dense", noise=0.0), tmp_path / "out")
    results = run(CORES, tmp_path / "dense", tmp_path / "out")
    assert len(results) == 4
    for result in results:
        assert result["effect"] > 1e-3 and result["difference"] < 0.02 * result["effect"], result


# What the library makes of integers and scales against stock models of the matrices that we make of them.
STORED = """
import json, sys
import torch, transformers
transformers.logging.set_verbosity_error()
auto = transformers.AutoModelForCausalLM
stock, out = (auto.from_pretrained(folder, trust_remote_code=True) for folder in sys.argv[1:])
ids = torch.arange(3, 35)[None]
with torch.no_grad():
    expected, found = stock.eval()(ids).logits, out.eval()(ids).logits
print(json.dumps({"difference": ((found - expected).norm() / expected.norm()).item()}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("target", ["dense", "moe"])
def test_rounded_cores_are_loaded_as_stored(target, bits, tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 48, "initializer_range": 0.2}
    if target == "dense":
        LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(tmp_path / "source")
        recipe = {"experts": 2, "bond_dim": 8, "noise": 0.0}
    else:
        MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=4)).save_pretrained(tmp_path / "source")
        recipe = {}
    convert(Recipe(str(tmp_path / "source"), **recipe, bits=bits), tmp_path / "out")
    export(tmp_path / "out", tmp_path / "stock", Export(to=target, check=False))
    [result] = run(STORED, tmp_path / "stock", tmp_path / "out")
    assert result["difference"] < 1e-5


@pytest.mark.slow
def test_the_rest_can_be_quantised(artifact):
    results = run(CODE, *artifact("llama"))
    assert [result["name"] for result in results] == ["torchao", "bitsandbytes 8bit", "bitsandbytes 4bit"]
    for result in results:
        assert result["difference"] < 0.02 * result["effect"], result  # rounding against quantisation


def run(code: str, dense: Path, out: Path) -> list[dict]:
    """What the code prints, in a process of its own with the libraries."""
    folder = os.environ.get("MPOE_QUANTISERS")
    if not folder:
        pytest.skip("MPOE_QUANTISERS is not set")
    environment = os.environ | {"PYTHONPATH": str(Path(folder).resolve())}
    command = [sys.executable, "-c", code, str(dense), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
