"""Models run in a process that cannot import this package."""

import os
import subprocess
import sys
from pathlib import Path

import torch

CHILD = """
import json, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("mpoe_convert", "tensorly"):
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Absent())
import torch, transformers

for name in ("mpoe_convert", "tensorly"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{name} is not hidden")

results = {}
for name, case in torch.load(sys.argv[1]).items():
    auto = getattr(transformers, case["auto_class"])
    config = transformers.AutoConfig.from_pretrained(case["folder"], trust_remote_code=True)
    model = auto.from_pretrained(case["folder"], trust_remote_code=True).eval()
    assert type(config) is type(model.config) is type(model).config_class, (type(config), type(model))
    with torch.no_grad():
        results[name] = {"logits": model(**case["inputs"]).logits, "class": type(model).__name__}
    if case["text"]:
        tokenizer = transformers.AutoTokenizer.from_pretrained(case["folder"], trust_remote_code=True)
        results[name]["ids"] = tokenizer(case["text"])["input_ids"]
        results[name]["eos"] = tokenizer.eos_token
torch.save(results, sys.argv[2])
"""


def run_child(cases: dict, tmp_path: Path) -> dict:
    """What CHILD makes of the cases, in a process without this package."""
    torch.save(cases, tmp_path / "cases.pt")
    (tmp_path / "child.py").write_text(CHILD)
    subprocess.run(
        [sys.executable, "-P", tmp_path / "child.py", tmp_path / "cases.pt", tmp_path / "out.pt"],
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")},
        cwd=tmp_path,
        check=True,
    )
    return torch.load(tmp_path / "out.pt")
