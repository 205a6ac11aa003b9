"""Tiny random models of every supported type, and inputs that their heads take."""

import inspect
from pathlib import Path

import tokenizers
import torch
import transformers

from helpers import vision_language

VOCAB, HIDDEN, INNER, LAYERS = 40, 16, 24, 2

COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ENCODER_DECODER = {
    "d_model": HIDDEN,
    "encoder_ffn_dim": INNER,
    "decoder_ffn_dim": INNER + 8,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": 2,
}
T5 = {
    "d_model": HIDDEN,
    "d_kv": 8,
    "d_ff": INNER,
    "num_layers": LAYERS,
    "num_decoder_layers": LAYERS,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
# What a type needs beside or instead of COMMON; a list has one entry per variant worth its own test.
VARIANTS = {
    "gpt2": [{"n_inner": INNER, "activation_function": "gelu_new"}, {"add_cross_attention": True}],
    "openai-gpt": [{"n_positions": 64, "afn": "gelu"}],
    "gpt_neo": [{"attention_types": [[["global", "local"], 1]], "window_size": 4}],
    "gpt_bigcode": [{"n_inner": INNER, "multi_query": True}],
    "gptj": [{"n_inner": INNER, "rotary_dim": 4}],
    "codegen": [{"n_inner": INNER, "rotary_dim": 4, "num_attention_heads": 4}],
    "gpt_neox": [{}, {"use_parallel_residual": False, "tie_word_embeddings": True}],
    "falcon": [
        {
            "ffn_hidden_size": INNER,
            "bias": True,
            "new_decoder_architecture": False,
            "parallel_attn": True,
        },
        {"ffn_hidden_size": INNER, "new_decoder_architecture": True, "num_kv_heads": 1},
        {"ffn_hidden_size": INNER, "parallel_attn": False, "alibi": True},
    ],
    "phi": [{"partial_rotary_factor": 0.5}],
    "phi3": [{}],
    "glm": [{"partial_rotary_factor": 0.5}],
    "llama": [{}, {"mlp_bias": True, "attention_bias": True}],
    "gemma3_text": [{"sliding_window": 8, "query_pre_attn_scalar": 8}],
    "gemma2": [{"sliding_window": 8, "query_pre_attn_scalar": 8}],
    "stablelm": [{"use_parallel_residual": True}],
    "opt": [
        {"ffn_dim": INNER, "word_embed_proj_dim": HIDDEN},
        {
            "ffn_dim": INNER,
            "word_embed_proj_dim": 8,
            "do_layer_norm_before": False,
            "enable_bias": False,
        },
    ],
    "electra": [{"embedding_size": 8}],
    "deberta-v2": [
        {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8},
        {"conv_kernel_size": 3, "conv_act": "gelu"},
    ],
    "xglm": [{"ffn_dim": INNER}],
    "modernbert": [{"local_attention": 8, "global_attn_every_n_layers": 2}, {"mlp_bias": True}],
    "albert": [
        {"embedding_size": 8, "num_hidden_groups": 1},
        {"embedding_size": 8, "num_hidden_groups": 2},
    ],
    "distilbert": [{"dim": HIDDEN, "hidden_dim": INNER, "n_layers": LAYERS, "n_heads": 2}],
    "t5": [
        T5 | {"feed_forward_proj": "relu"},
        T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ],
    "mt5": [T5],
    "umt5": [T5],
    "vit": [{"image_size": 8, "patch_size": 4, "num_channels": 3, "encoder_stride": 4}],
}
for _type in (
    "bart",
    "mbart",
    "pegasus",
    "marian",
    "blenderbot",
    "blenderbot-small",
    "m2m_100",
    "plbart",
):
    VARIANTS[_type] = [ENCODER_DECODER]
VARIANTS |= {name: [config] for name, config in vision_language.CONFIGS.items()}


def make_config(model_type: str, variant: int = 0):
    """A tiny config; keys that the type does not have are left out."""
    cls = transformers.CONFIG_MAPPING[model_type]
    known = set(inspect.signature(cls.__init__).parameters) | set(getattr(cls, "attribute_map", {}))
    extra = VARIANTS.get(model_type, [{}])[variant]
    values = {key: value for key, value in COMMON.items() if key in known} | extra
    return cls(**values)


def make_model(model_type: str, auto_class: str, variant: int = 0, seed: int = 0):
    """A tiny stock model whose weights are large enough that every part shows in the outputs."""
    from mpoe_convert.source.architecture import heads

    stock = getattr(transformers, heads(model_type)[auto_class])
    torch.manual_seed(seed)
    config = make_config(model_type, variant)
    if stock.__name__.endswith(("LMHeadModel", "ForCausalLM")) and hasattr(config, "is_decoder"):
        config.is_decoder = model_type in ("bert", "roberta", "xlm-roberta", "camembert", "electra")
    model = stock(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
            elif (parameter == 0).all():
                parameter.normal_(std=0.1)
        model.tie_weights()
    return model


def save_tiny(model_type: str, auto_class: str, folder: Path, variant: int = 0, dtype=None) -> Path:
    make_model(model_type, auto_class, variant).to(dtype or torch.float32).save_pretrained(folder)
    return folder


def make_inputs(model, auto_class: str) -> dict:
    """Seeded inputs for a head."""
    generator = torch.Generator().manual_seed(1)
    accepted = inspect.signature(model.forward).parameters
    if {"pixel_values", "input_ids"} <= set(accepted):
        return vision_language.inputs_with_image(model)
    if "pixel_values" in accepted:
        inputs = {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator)}
        if auto_class == "AutoModelForMaskedImageModeling":
            inputs["bool_masked_pos"] = torch.tensor([[True, False, True, False]] * 2)
        return inputs
    shape = (2, 3, 9) if auto_class == "AutoModelForMultipleChoice" else (2, 9)
    ids = torch.randint(3, VOCAB, shape, generator=generator)
    ids[..., -1] = 2  # BART's sequence classifier reads the state at the end-of-sequence token
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "decoder_input_ids" in accepted and not getattr(model.config, "is_decoder", False):
        inputs["decoder_input_ids"] = ids.clone()
    return inputs


def outputs(model, inputs) -> dict[str, torch.Tensor]:
    """All floating-point tensors of the output but the cache, by name."""
    with torch.no_grad():
        out = model(**inputs)
    return {k: v for k, v in out.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}


def save_tokenizer(folder: Path) -> None:
    """One token per word: <pad> <s> </s> w3 w4 ..."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCAB)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="</s>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
