"""Llama under another name, with a head of transformers that builds its backbone by AutoModel."""

from transformers import (
    AutoModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
)


class WrenConfig(LlamaConfig):
    model_type = "wren"


class WrenModel(LlamaModel):
    config_class = WrenConfig


class WrenForCausalLM(LlamaForCausalLM):
    config_class = WrenConfig


AutoModel.register(WrenConfig, WrenModel, exist_ok=True)


class WrenForSequenceClassification(LlamaForSequenceClassification):
    config_class = WrenConfig
