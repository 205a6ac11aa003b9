"""A mixture of experts in one file. Its experts are a list, or tensors of all, as config.json says."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput


class QuireConfig(PretrainedConfig):
    model_type = "quire"

    def __init__(
        self, vocab_size=48, hidden_size=16, inner=24, num_hidden_layers=3, sheets=4, bound=True, **kwargs
    ):
        self.vocab_size, self.hidden_size, self.inner = vocab_size, hidden_size, inner
        self.num_hidden_layers, self.sheets, self.bound = num_hidden_layers, sheets, bound
        super().__init__(**kwargs)


class Sheet(nn.Module):
    """A gated FFN."""

    def __init__(self, config):
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.inner, bias=False)
        self.w2 = nn.Linear(config.inner, config.hidden_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.inner, bias=False)
        self.act_fn = ACT2FN["silu"]

    def forward(self, x):
        return self.w2(self.act_fn(self.w1(x)) * self.w3(x))


class Bundle(nn.Module):
    """All experts in tensors: (experts, in, out), up before gate in turns, with biases."""

    def __init__(self, config):
        super().__init__()
        count, hidden, inner = config.sheets, config.hidden_size, config.inner
        self.num_sheets = count
        self.opening = nn.Parameter(torch.empty(count, hidden, 2 * inner))
        self.opening_bias = nn.Parameter(torch.empty(count, 2 * inner))
        self.closing = nn.Parameter(torch.empty(count, inner, hidden))

    def forward(self, states, chosen, weights):
        output = torch.zeros_like(states)
        for sheet in range(self.num_sheets):
            rows, places = torch.where(chosen == sheet)
            both = states[rows] @ self.opening[sheet] + self.opening_bias[sheet]
            inner = F.gelu(both[..., 1::2]) * both[..., ::2]
            output.index_add_(0, rows, (inner @ self.closing[sheet]) * weights[rows, places, None])
        return output


class Quire(nn.Module):
    """Calls the sheets of a list one by one, as blocks did before transformers 5, or hands a bundle all."""

    def __init__(self, config):
        super().__init__()
        self.top_k = 2
        self.choice = nn.Linear(config.hidden_size, config.sheets, bias=False)
        self.is_bound = config.bound
        if config.bound:
            self.sheets = Bundle(config)
        else:
            self.sheets = nn.ModuleList(Sheet(config) for _ in range(config.sheets))

    def forward(self, x):
        states = x.reshape(-1, x.shape[-1])
        weights, chosen = self.choice(states).softmax(-1).topk(self.top_k, dim=-1)
        found = self.sheets(states, chosen, weights) if self.is_bound else self.each(states, weights, chosen)
        return found.reshape(x.shape)

    def each(self, states, weights, chosen):
        output = torch.zeros_like(states)
        for number, sheet in enumerate(self.sheets):
            rows, places = torch.where(chosen == number)
            output.index_add_(0, rows, sheet(states[rows]) * weights[rows, places, None])
        return output


class Leaf(nn.Module):
    def __init__(self, config, number):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size)
        self.mix = nn.Linear(config.hidden_size, config.hidden_size)
        self.block = Quire(config) if number else Sheet(config)

    def forward(self, x):
        past = self.mix(x).cumsum(1) / torch.arange(1, 1 + x.shape[1], device=x.device)[:, None]
        return x + self.block(self.norm(x + past))


class QuirePreTrainedModel(PreTrainedModel):
    config_class = QuireConfig
    base_model_prefix = "model"
    _no_split_modules = ["Leaf"]


class QuireModel(QuirePreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.leaves = nn.ModuleList(Leaf(config, number) for number in range(config.num_hidden_layers))
        self.post_init()

    def get_input_embeddings(self):
        return self.words

    def forward(self, input_ids=None, attention_mask=None, return_dict=None):
        x = self.words(input_ids)
        for leaf in self.leaves:
            x = leaf(x)
        return BaseModelOutput(last_hidden_state=x)


class QuireForCausalLM(QuirePreTrainedModel, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.model = QuireModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.words

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        return {"input_ids": input_ids}

    def forward(self, input_ids=None, attention_mask=None, labels=None, return_dict=None, **kwargs):
        logits = self.lm_head(self.model(input_ids, attention_mask).last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutput(loss=loss, logits=logits)
