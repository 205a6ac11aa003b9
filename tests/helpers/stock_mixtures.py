"""Small mixtures of transformers' own classes, and their experts one at a time."""

import copy

import torch
from transformers import AutoModelForCausalLM, GptOssConfig, MixtralConfig, Qwen3MoeConfig

from mpoe_convert.compression.stream import keep_no_cache

SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "experts_implementation": "eager",
}
CONFIGS = {
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    "gpt_oss": lambda: GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, norm_topk_prob=False
    ),
}


def fill(module):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def make_model(name):
    model = fill(AutoModelForCausalLM.from_config(CONFIGS[name]()))
    keep_no_cache(model)
    return model


def run_alone(module, expert, x):
    """The stock module's answer to rows that all go to one expert with weight 1."""
    with torch.no_grad():
        return module(x, torch.full((len(x), 1), expert), torch.ones(len(x), 1))


def neurons_alone(module, expert, x):
    """Its hidden neurons: the answer of a copy whose second projection is the identity."""
    module = copy.deepcopy(module)
    module.down_proj.data[:] = torch.eye(module.down_proj.shape[-1])
    if module.has_bias:
        module.down_proj_bias.data.zero_()
    return run_alone(module, expert, x)
