"""Quantising the rest of a converted model, by libraries in a folder named by MPOE_QUANTISERS.

pip install --no-deps --target quantisers torchao bitsandbytes
MPOE_QUANTISERS=quantisers python -m pytest -m slow tests/whole/test_quantised.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.slow
def test_the_rest_can_be_quantised(artifact):
    folder = os.environ.get("MPOE_QUANTISERS")
    if not folder:
        pytest.skip("MPOE_QUANTISERS is not set")
    dense, out = artifact("llama")
    environment = os.environ | {"PYTHONPATH": str(Path(folder).resolve())}
    command = [sys.executable, "-c", CODE, str(dense), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [result["name"] for result in results] == ["torchao", "bitsandbytes 8bit", "bitsandbytes 4bit"]
    for result in results:
        assert result["difference"] < 0.02 * result["effect"], result  # rounding against quantisation
