"""Tiny vision-language models: configs of every supported type, and texts with an image in them."""

import inspect

import torch
import transformers

from mpoe_convert.artifact.verify_child import make_inputs_with_image

LAYERS = 2
TEXT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "sliding_window": 8,
    "query_pre_attn_scalar": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PATCHES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
QWEN_PATCHES = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "out_hidden_size": 16,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
QWEN = {
    "image_token_id": 3,
    "video_token_id": 4,
    "vision_start_token_id": 5,
    "vision_end_token_id": 6,
    "tie_word_embeddings": True,
}
CLIP = PATCHES | {"model_type": "clip_vision_model", "projection_dim": 16}
SIGLIP = PATCHES | {"model_type": "siglip_vision_model"}
PIXTRAL = PATCHES | {"model_type": "pixtral", "head_dim": 8}


def text(model_type: str, **changes) -> dict:
    """A text_config; keys that the type does not have are left out."""
    cls = transformers.CONFIG_MAPPING[model_type]
    known = inspect.signature(cls.__init__).parameters
    return {"model_type": model_type} | {k: v for k, v in TEXT.items() if k in known} | changes


def llava(text_type: str, vision: dict = CLIP, **rest) -> dict:
    """The text tower of LLaVA and its relatives, with the head tied to its embeddings."""
    rest = {"image_token_index": 3, "vision_feature_layer": -1, "tie_word_embeddings": True} | rest
    return {"text_config": text(text_type), "vision_config": vision} | rest


def idefics(name: str, **rest) -> dict:
    vision = PATCHES | {"model_type": f"{name}_vision"}
    return {"vision_config": vision, "image_token_id": 3, "tie_word_embeddings": True} | rest


TILES = {"image_grid_pinpoints": [[8, 8], [8, 16]]}
VIDEO = {"video_token_index": 4}
# By model type.
CONFIGS = {
    "llava": llava("llama"),
    "llava_next": llava("mistral", **TILES),
    "llava_next_video": llava("llama", **TILES, **VIDEO),
    "llava_onevision": llava("qwen2", SIGLIP, vision_feature_select_strategy="full", **TILES, **VIDEO),
    "vipllava": llava("llama", vision_feature_layers=[0, 1]),
    "video_llava": llava("llama", **VIDEO),
    "paligemma": llava("gemma", SIGLIP | {"projection_dim": 16}, projection_dim=16, hidden_size=16),
    "gemma3": llava("gemma3_text", SIGLIP, boi_token_index=4, eoi_token_index=5, mm_tokens_per_image=4),
    "internvl": llava(
        "qwen2",
        PATCHES | {"model_type": "internvl_vision", "image_size": [8, 8], "patch_size": [4, 4]},
        image_token_id=3,
        downsample_ratio=0.5,
    ),
    "mistral3": llava("mistral", PIXTRAL, spatial_merge_size=2),
    "lighton_ocr": llava("qwen3", PIXTRAL, image_token_id=3, spatial_merge_size=2),
    "aya_vision": llava(
        "cohere2",
        SIGLIP,
        downsample_factor=2,
        alignment_intermediate_size=16,
        vision_feature_select_strategy="full",
    ),
    "cohere2_vision": llava(
        "cohere2", SIGLIP, image_token_id=3, downsample_factor=2, alignment_intermediate_size=16
    ),
    "got_ocr2": llava(
        "qwen2",
        {
            "hidden_size": 16,
            "output_channels": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 64,
            "patch_size": 4,
            "mlp_dim": 24,
            "window_size": 4,
            "global_attn_indexes": [1],
        },
    ),
    "mllama": {
        "text_config": text("mllama_text_model", num_hidden_layers=3, cross_attention_layers=[1]),
        "vision_config": {
            "model_type": "mllama_vision_model",
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 2,
            "image_size": 8,
            "patch_size": 4,
            "vision_output_dim": 32,
            "intermediate_layers_indices": [0],
            "supported_aspect_ratios": [[1, 1], [1, 2]],
            "max_num_tiles": 2,
        },
        "image_token_index": 3,
        "tie_word_embeddings": True,
    },
    "qwen2_vl": {
        "text_config": text("qwen2_vl_text", rope_parameters=MROPE),
        "vision_config": {
            "model_type": "qwen2_vl",
            "depth": 2,
            "embed_dim": 16,
            "hidden_size": 16,
            "mlp_ratio": 2,
            "num_heads": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
    }
    | QWEN,
    "qwen2_5_vl": {
        "text_config": text("qwen2_5_vl_text", rope_parameters=MROPE),
        "vision_config": QWEN_PATCHES
        | {"model_type": "qwen2_5_vl", "fullatt_block_indexes": [1], "window_size": 16},
    }
    | QWEN,
    "qwen3_vl": {
        "text_config": text("qwen3_vl_text", rope_parameters=MROPE | {"mrope_interleaved": True}),
        "vision_config": QWEN_PATCHES
        | {"model_type": "qwen3_vl", "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    }
    | QWEN,
    "glm4v": {
        "text_config": text("glm4v_text", rope_parameters=MROPE | {"partial_rotary_factor": 1.0}),
        "vision_config": QWEN_PATCHES | {"model_type": "glm4v_vision", "image_size": 8},
        "image_token_id": 3,
        "video_token_id": 4,
        "image_start_token_id": 5,
        "image_end_token_id": 6,
        "video_start_token_id": 7,
        "video_end_token_id": 8,
        "tie_word_embeddings": True,
    },
    "idefics2": idefics(
        "idefics2",
        text_config=text("mistral"),
        perceiver_config={
            "model_type": "idefics2_perceiver",
            "resampler_n_latents": 4,
            "resampler_depth": 1,
            "resampler_n_heads": 2,
            "resampler_head_dim": 8,
            "num_key_value_heads": 1,
            "hidden_size": 16,
        },
    ),
    "idefics3": idefics("idefics3", text_config=text("llama"), scale_factor=2),
    "smolvlm": idefics("smolvlm", text_config=text("llama"), scale_factor=2),
}
# Those whose checkpoints name the tensors of the text tower otherwise than the model does.
RENAMED = [name for name in CONFIGS if name not in ("qwen3_vl", "glm4v", "cohere2_vision", "lighton_ocr")]
RENAMED = [name for name in RENAMED if not name.startswith(("idefics", "smolvlm"))]


def inputs_with_image(model, seed: int = 1) -> dict[str, torch.Tensor]:
    """One text with an image in it."""
    return make_inputs_with_image(model, torch.Generator().manual_seed(seed))[0]
