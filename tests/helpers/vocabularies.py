"""Small trained tokenizers, whose tokenizer.json does what no class of transformers would do by itself."""

import json
from functools import cache
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

SENTENCES = [
    "The quick brown fox jumps over the lazy dog in 1984 and 12345 times.",
    "def f(x):\n    return x[0]\n\n\treturn 42",
    "naïve café, Straße, привет, Ελληνικά, 日本語, 한국어 and 3.14",
] * 3
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
NAMES = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


@cache
def _byte_level() -> str:
    """Byte pairs with whole numbers as tokens; then split at every digit and at spaces alone."""
    made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": SPECIAL, "initial_alphabet": alphabet, "show_progress": False}
    made.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=450, **options))
    digits = pre_tokenizers.Digits(individual_digits=True)
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return made.to_str()


@cache
def _metaspace() -> str:
    """Byte pairs of characters, as of SentencePiece, for lower-case texts."""
    made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    options = {"special_tokens": SPECIAL, "show_progress": False}
    made.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=300, **options))
    return made.to_str()


KINDS = {"byte-level": _byte_level, "metaspace": _metaspace}


def save_vocabulary(folder: Path, tokenizer_class: str | None, kind: str = "byte-level") -> None:
    """Write tokenizer.json, and a tokenizer_config.json that names that class, if any."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(KINDS[kind](), encoding="utf-8")
    named = {"tokenizer_class": tokenizer_class} if tokenizer_class else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(NAMES | named))
