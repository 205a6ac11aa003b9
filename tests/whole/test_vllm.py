"""vLLM on a CPU serves artifacts and exports with the tokens that transformers generates.

`MPOE_VLLM_PYTHON` names the Python of an environment with vLLM (see CONTRIBUTING). It is a child process,
because vLLM pins releases of its own.
"""

import json
import os
import subprocess

import pytest
import torch
import transformers
from helpers.tiny import save_tokenizer

from mpoe_convert import Export, Recipe, convert, export

PROMPTS = [[5, 9, 17, 33, 21], [7, 8, 9, 10, 11, 12, 13]]
NEW_TOKENS = 12
CHILD = f"""
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    model, eager, implementation = json.loads(sys.argv[1])
    options = {{"model_impl": implementation, "enforce_eager": eager, "skip_tokenizer_init": True}}
    options |= {{"dtype": "float32", "max_model_len": 64, "max_num_seqs": 2}}
    engine = LLM(model, trust_remote_code=True, **options)
    greedy = SamplingParams(temperature=0, max_tokens={NEW_TOKENS}, ignore_eos=True, detokenize=False)
    answers = engine.generate([{{"prompt_token_ids": prompt}} for prompt in {PROMPTS}], greedy)
    print("tokens", json.dumps([list(answer.outputs[0].token_ids) for answer in answers]))
"""
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 200,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OWN_SIZES = {
    "qwen3": {"head_dim": 32},
    "gemma": {"head_dim": 32},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64, "init_std": 0.1},
}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("MPOE_VLLM_PYTHON" not in os.environ, reason="MPOE_VLLM_PYTHON is not set"),
]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Folder of the artifact of a type, made once; vLLM's attention has heads of 32 and more."""
    made = {}

    def make(model_type: str):
        if model_type not in made:
            root = tmp_path_factory.mktemp(model_type)
            torch.manual_seed(0)
            sizes = SIZES | OWN_SIZES.get(model_type, {})
            config = transformers.AutoConfig.for_model(model_type, **sizes)
            transformers.AutoModelForCausalLM.from_config(config).save_pretrained(root / "dense")
            save_tokenizer(root / "dense")
            convert(Recipe(str(root / "dense"), experts=4, bond_dim=16, noise=0.05), root / "out")
            made[model_type] = root / "out"
        return made[model_type]

    return make


def by_vllm(folder, *, eager: bool, implementation: str, cache) -> list[list[int]]:
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CACHE_ROOT": str(cache),
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(cache / "modules"),
    }
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [os.environ["MPOE_VLLM_PYTHON"], "-c", CHILD, json.dumps([str(folder), eager, implementation])]
    done = subprocess.run(
        command, env=clean | settings, cwd=cache, capture_output=True, text=True, check=False
    )
    answers = [line for line in done.stdout.splitlines() if line.startswith("tokens ")]
    assert answers, done.stderr[-2000:]
    return json.loads(answers[-1].removeprefix("tokens "))


def by_transformers(folder) -> list[list[int]]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    model.generation_config.eos_token_id = None  # vLLM is told to go on behind it
    limits = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    return [model.generate(torch.tensor([prompt]), **limits)[0, len(prompt) :].tolist() for prompt in PROMPTS]


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_an_artifact(model_type, eager, served, tmp_path):
    expected = by_transformers(served(model_type))
    assert len({token for answer in expected for token in answer}) > 4  # it does not repeat one token
    found = by_vllm(served(model_type), eager=eager, implementation="transformers", cache=tmp_path)
    assert found == expected


@pytest.mark.parametrize(
    "model_type", ["mistral", "qwen2", "olmo2", "granite", "gemma", "phi3", "smollm3", "opt"]
)
def test_other_families_compiled(model_type, served, tmp_path):
    found = by_vllm(served(model_type), eager=False, implementation="transformers", cache=tmp_path)
    assert found == by_transformers(served(model_type))


@pytest.mark.parametrize(
    "model_type, to", [("llama", "dense"), ("llama", "moe"), ("qwen3", "dense"), ("qwen3", "moe")]
)
def test_an_export_in_vllms_own_classes(model_type, to, served, tmp_path):
    export(served(model_type), tmp_path / "export", Export(to=to))
    found = by_vllm(tmp_path / "export", eager=False, implementation="vllm", cache=tmp_path)
    assert found == by_transformers(tmp_path / "export")
