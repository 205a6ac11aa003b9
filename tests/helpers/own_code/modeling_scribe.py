"""An encoder in one file, config included, whose FFN is plain and drops out in the middle."""

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput


class ScribeConfig(PreTrainedConfig):
    model_type = "scribe"

    vocab_size: int = 40
    hidden_size: int = 16
    intermediate_size: int = 24
    num_hidden_layers: int = 2
    num_attention_heads: int = 2
    max_position_embeddings: int = 64
    ffn_dropout: float = 0.1


class Notes(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation_fn = nn.GELU()
        self.dropout = nn.Dropout(config.ffn_dropout)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return self.fc2(self.dropout(self.activation_fn(self.fc1(x))))


class Page(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention = nn.MultiheadAttention(
            config.hidden_size, config.num_attention_heads, batch_first=True
        )
        self.norm_1, self.norm_2 = nn.LayerNorm(config.hidden_size), nn.LayerNorm(config.hidden_size)
        self.mlp = Notes(config)

    def forward(self, x):
        x = self.norm_1(x + self.attention(x, x, x, need_weights=False)[0])
        return self.norm_2(x + self.mlp(x))


class ScribeModel(PreTrainedModel):
    config_class = ScribeConfig
    base_model_prefix = "scribe"

    def __init__(self, config):
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Page(config) for _ in range(config.num_hidden_layers))
        self.post_init()

    def get_input_embeddings(self):
        return self.words

    def forward(self, input_ids=None, attention_mask=None, return_dict=None):
        x = self.words(input_ids)
        for layer in self.layers:
            x = layer(x)
        return BaseModelOutput(last_hidden_state=x)


class ScribeForMaskedLM(PreTrainedModel):
    config_class = ScribeConfig
    base_model_prefix = "scribe"

    def __init__(self, config):
        super().__init__(config)
        self.scribe = ScribeModel(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.scribe.words

    def forward(self, input_ids=None, attention_mask=None, labels=None, return_dict=None):
        logits = self.decoder(self.scribe(input_ids, attention_mask).last_hidden_state)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return MaskedLMOutput(loss=loss, logits=logits)
