"""A config as checkpoints with code of their own had it for years: a constructor by hand."""

from transformers import PretrainedConfig


class MinstrelConfig(PretrainedConfig):
    model_type = "minstrel"
    attribute_map = {"num_hidden_layers": "depth", "hidden_size": "width"}

    def __init__(self, vocab_size=40, width=16, depth=2, num_heads=2, context=64, **kwargs):
        self.vocab_size, self.width, self.depth = vocab_size, width, depth
        self.num_heads, self.context = num_heads, context
        self.inner = 3 * width // 2  # told by no file
        super().__init__(**kwargs)

    @property
    def max_position_embeddings(self):
        return self.context
