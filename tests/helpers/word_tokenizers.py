"""Tokenizers of one token per word (w3 is 3), which end texts and pad in all ways that are found."""

import tokenizers
import transformers

from helpers.tiny import VOCAB

SPECIAL = {"<pad>": 0, "<s>": 1, "</s>": 2}


def word_tokenizer(template: str = "$A", extra: tuple[str, ...] = (), **special: str):
    """A fast tokenizer of words.

    Args:
        template: of its post-processor, such as "<s> $A </s>".
        extra: words behind the vocabulary of the tiny models.
        special: names of its special tokens, such as eos_token.
    """
    words = SPECIAL | {f"w{i}": i for i in range(3, VOCAB)}
    words |= {word: VOCAB + i for i, word in enumerate(extra)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w39"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=template, special_tokens=[(name, number) for name, number in SPECIAL.items()]
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w39", **special)


# How texts end -> (tokenizer, what then stands around a text's own tokens).
ENDINGS = {
    "no padding token": (lambda: word_tokenizer(eos_token="</s>"), ([], [2])),
    "padding is the end": (lambda: word_tokenizer(eos_token="</s>", pad_token="</s>"), ([], [2])),
    "ends itself": (lambda: word_tokenizer("<s> $A </s>", bos_token="<s>", eos_token="</s>"), ([1], [2])),
    "begins with the end": (
        lambda: word_tokenizer("</s> $A", bos_token="</s>", eos_token="</s>"),
        ([2], [2]),
    ),
    "encoder": (lambda: word_tokenizer("<s> $A </s>", cls_token="<s>", sep_token="</s>"), ([1], [2])),
    "encoder with an end": (
        lambda: word_tokenizer("<s> $A </s>", cls_token="<s>", sep_token="</s>", eos_token="</s>"),
        ([1], [2]),
    ),
    "two tokens behind": (lambda: word_tokenizer("$A </s> <s>", eos_token="</s>"), ([], [2, 1])),
    "no end": (lambda: word_tokenizer(pad_token="<pad>"), ([], [])),
}
