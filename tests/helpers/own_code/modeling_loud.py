"""A Llama of the usual config whose logits are doubled."""

from transformers import LlamaForCausalLM, LlamaModel


class LoudModel(LlamaModel):
    pass


class LoudForCausalLM(LlamaForCausalLM):
    def forward(self, input_ids=None, **kwargs):
        output = super().forward(input_ids, **kwargs)
        output.logits = 2 * output.logits
        return output
