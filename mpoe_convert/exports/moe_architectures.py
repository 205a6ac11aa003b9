"""Mixtures of experts in transformers that can hold a converted model exactly: one row each.

From the modelling files of transformers 5.23. Names are those of the architectures' own checkpoints, which
serving engines read; transformers fuses the experts' tensors when it loads them. How llama.cpp computes each
was tested with the copy in llama-cpp-python 0.3.36.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class MoeTarget:
    """One architecture.

    Attributes:
        model_type: of the mixture.
        sources: dense model types that are equal to it outside the FFNs, with the same tensor names.
        slot: path of the mixture in a layer.
        router: name of the router's weight (E, H) below the slot.
        experts: role -> name of expert {}'s weight (out, in) below the slot.
        stacked: the same for weights that hold all experts (E, out, in); one for "gate" and "up" has both.
        num_experts / inner_size / top_k: how its config calls these; a top_k of None: one expert per token.
        weighing: {router_combine: settings of its config}, for "renormalised" (softmax over the chosen
            experts) and "raw" (their probabilities among all); it cannot compute one that is missing.
        dense_layers: its config's key for the list of the layers without mixtures; None: all layers have one.
        depths: {key of its config for a number of layers with mixtures: key that holds the number}.
        fixed: {setting of the sources that it has not: (values without effect, what other values mean)}.
        constants: further settings of its config.
        idle_shared_expert: it also has an expert for all tokens, which is written as zeros.
        llama_cpp: combine weights as llama.cpp computes them, whatever the config says; None: llama.cpp lacks
            this architecture.
    """

    model_type: str
    sources: tuple[str, ...]
    slot: str = "mlp"
    router: str = "gate.weight"
    experts: Mapping[str, str] = field(default_factory=dict)
    stacked: Mapping[str, str] = field(default_factory=dict)
    num_experts: str = "num_experts"
    inner_size: str = "intermediate_size"
    top_k: str | None = "num_experts_per_tok"
    weighing: Mapping[str, Mapping] = field(default_factory=lambda: {"renormalised": {}})
    dense_layers: str | None = None
    depths: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, tuple[tuple, str]] = field(default_factory=dict)
    constants: Mapping[str, object] = field(default_factory=dict)
    idle_shared_expert: bool = False
    llama_cpp: str | None = None


_ANY = ((), "")  # a setting without effect on what is computed
_NO_ATTENTION_BIAS = ((None, False), "biases in its attention")
_NO_FFN_BIAS = ((None, False), "biases in its experts")
_NO_WINDOW = ((None, False), "layers with and without a sliding window as this model's")
_LIKE_LLAMA = {role: f"experts.{{}}.{role}_proj.weight" for role in ("gate", "up", "down")}
_BY_NORM = {"renormalised": {"norm_topk_prob": True}, "raw": {"norm_topk_prob": False}}

MOE_TARGETS: tuple[MoeTarget, ...] = (
    MoeTarget(
        model_type="mixtral",
        sources=("llama", "mistral"),
        slot="block_sparse_moe",
        experts={
            "gate": "experts.{}.w1.weight",
            "up": "experts.{}.w3.weight",
            "down": "experts.{}.w2.weight",
        },
        num_experts="num_local_experts",
        fixed={"attention_bias": _NO_ATTENTION_BIAS, "mlp_bias": _NO_FFN_BIAS, "pretraining_tp": _ANY},
        llama_cpp="renormalised",
    ),
    MoeTarget(
        model_type="qwen2_moe",
        sources=("qwen2",),
        experts=_LIKE_LLAMA,
        inner_size="moe_intermediate_size",
        weighing=_BY_NORM,
        dense_layers="mlp_only_layers",
        fixed={"use_sliding_window": _NO_WINDOW},
        constants={"qkv_bias": True, "decoder_sparse_step": 1},
        idle_shared_expert=True,
        llama_cpp="raw",
    ),
    MoeTarget(
        model_type="qwen3_moe",
        sources=("qwen3",),
        experts=_LIKE_LLAMA,
        inner_size="moe_intermediate_size",
        weighing=_BY_NORM,
        dense_layers="mlp_only_layers",
        fixed={"use_sliding_window": _NO_WINDOW, "max_window_layers": _ANY, "layer_types": _ANY},
        constants={"decoder_sparse_step": 1},
        llama_cpp="renormalised",
    ),
    MoeTarget(model_type="flex_olmo", sources=("olmo2",), experts=_LIKE_LLAMA, weighing=_BY_NORM),
    MoeTarget(
        model_type="granitemoe",
        sources=("granite",),
        slot="block_sparse_moe",
        router="router.layer.weight",
        stacked={"gate": "input_linear.weight", "up": "input_linear.weight", "down": "output_linear.weight"},
        num_experts="num_local_experts",
        fixed={"mlp_bias": _NO_FFN_BIAS},
        llama_cpp="renormalised",
    ),
    MoeTarget(
        model_type="switch_transformers",
        sources=("t5",),
        router="router.classifier.weight",
        experts={"up": "experts.expert_{}.wi.weight", "down": "experts.expert_{}.wo.weight"},
        inner_size="d_ff",
        top_k=None,
        weighing={"raw": {}},
        depths={"num_sparse_encoder_layers": "num_layers", "num_sparse_decoder_layers": "num_decoder_layers"},
        fixed={
            "is_gated_act": ((None, False), "experts with a gate"),
            "scale_decoder_outputs": ((None, True), "unscaled decoder outputs"),
            "feed_forward_proj": _ANY,
            "classifier_dropout": _ANY,
        },
        # Of tokens of a sequence per expert: it drops the others, we do not.
        constants={"expert_capacity": 2**31 - 1, "router_dtype": "float32", "router_bias": False},
    ),
)

TARGET_OF: Mapping[str, MoeTarget] = {source: row for row in MOE_TARGETS for source in row.sources}

# Why other families have no exact mixture: how they differ from the nearest one.
NEAR_MISSES: Mapping[str, str] = {
    "phi3": "phimoe has LayerNorms with biases where phi3 has RMSNorms, and weighs experts by SparseMixer",
    "olmo": "olmoe normalises queries and keys, and has RMSNorms where olmo has LayerNorms without weights",
    "olmo3": "flex_olmo has no sliding windows, and olmoe other norms",
    "glm": "glm4_moe routes by sigmoids and has a shared expert",
    "exaone4": "exaone_moe routes by sigmoids and has a shared expert",
    "mt5": "switch_transformers has no gated experts",
    "umt5": "switch_transformers shares its position biases between layers, and has no gated experts",
}
