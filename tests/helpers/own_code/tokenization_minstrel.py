"""A tokenizer that sings: every text ends in the same word."""

from transformers import PreTrainedTokenizerFast


class MinstrelTokenizer(PreTrainedTokenizerFast):
    def __call__(self, text, *args, **kwargs):
        texts = [f"{each} w39" for each in ([text] if isinstance(text, str) else text)]
        return super().__call__(texts[0] if isinstance(text, str) else texts, *args, **kwargs)
