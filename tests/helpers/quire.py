"""A mixture with custom code, whose experts are a list or tensors of all."""

import json
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM

from .tiny import save_tokenizer

CODE = Path(__file__).parent / "own_code" / "modeling_quire.py"
AT = "leaves.{}.block.sheets"
OWN = {"trust_remote_code": True, "experts_at": AT}


def save_quire(folder: Path, bound: bool, edits=(), **config) -> Path:
    """A random model of that code, in which texts were replaced."""
    folder.mkdir(parents=True)
    text = CODE.read_text()
    for old, new in edits:
        assert old in text, old
        text = text.replace(old, new)
    (folder / "modeling_quire.py").write_text(text)
    heads = {"AutoConfig": "Config", "AutoModel": "Model", "AutoModelForCausalLM": "ForCausalLM"}
    auto_map = {auto: f"modeling_quire.Quire{name}" for auto, name in heads.items()}
    values = {"model_type": "quire", "auto_map": auto_map, "bound": bound} | config
    (folder / "config.json").write_text(json.dumps(values))
    made = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_config(made, trust_remote_code=True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder
