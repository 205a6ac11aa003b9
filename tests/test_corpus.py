"""Data as they are read."""

import json

import pytest

from mpoe_convert import corpus
from mpoe_convert.corpus import Columns
from mpoe_convert.errors import DataError

WORDS = ["null", "NA", "nan", "None", "word", "12"]


@pytest.mark.parametrize(("suffix", "separator"), [(".csv", ","), (".tsv", "\t")])
def test_words_that_look_like_nothing(suffix, separator, tmp_path):
    path = tmp_path / f"words{suffix}"
    path.write_text(
        "\n".join(separator.join(row) for row in [("text", "target"), *zip(WORDS, WORDS, strict=True)])
    )
    rows = corpus.read([str(path)], Columns(), "seq2seq")
    assert rows["text"][:] == rows["target"][:] == WORDS


def test_what_is_missing_is_told(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": word}) for word in ["a", None, "b", None]))
    with pytest.raises(DataError, match=r"rows.jsonl has 2 rows without text"):
        corpus.read([str(path)], Columns(), "causal")
