"""Data as they are read."""

import json
import subprocess
import sys

import pytest
from loopback_hub import LoopbackHub, environment

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


@pytest.mark.parametrize("cells", [["1", "2"], [[1], [2]]])
def test_columns_that_hold_no_text(cells, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "\n".join(json.dumps({"text": "a", "target": cell}) for cell in map(json.loads, map(str, cells)))
    )
    with pytest.raises(DataError, match=r"column target of .*rows.jsonl holds (int64|list); expected text"):
        corpus.read([str(path)], Columns(), "seq2seq")
    assert corpus.read([str(path)], Columns(), "causal")["text"][:] == ["a", "a"]


def test_a_class_or_task_without_a_name(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text,label,about\na,x,\nb,,sums\n")
    with pytest.raises(DataError, match="rows with an empty label"):
        corpus.read([str(path)], Columns(), "classification")
    with pytest.raises(DataError, match="rows with an empty about"):
        corpus.read([str(path)], Columns(routed_by="about"), "causal")


CLIENT = """
import sys
from mpoe_convert import corpus, errors
for task, name, split in [("causal", "me/texts", "train"), ("causal", "me/texts", "validation"),
                          ("causal", "me/texts", "dev"), ("causal", "me/absent", "train")]:
    try:
        print(corpus.read([name], corpus.Columns(), task, split)["text"][:])
    except errors.DataError as error:
        print("DataError:", error)
"""


def test_a_dataset_on_the_hub(tmp_path):
    files = {
        f"{split}.jsonl": json.dumps({"text": f"{split} text", "more": 1}).encode()
        for split in ("train", "validation")
    }
    with LoopbackHub() as hub:
        hub.add("datasets/me/texts", {"README.md": b"# Texts\n"} | files)
        variables = environment(tmp_path, hub.endpoint, HF_HUB_OFFLINE="0", HF_DATASETS_OFFLINE="0")
        command = [sys.executable, "-c", CLIENT]
        done = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=tmp_path)
    lines = done.stdout.splitlines()
    assert lines[:2] == ["['train text']", "['validation text']"], done.stderr[-3000:]
    assert lines[2].startswith("DataError: me/texts cannot be read: Unknown split") and "dev" in lines[2]
    assert lines[3].startswith("DataError: me/absent is neither a file nor a dataset that can be reached")
    assert hub.fetched("train.jsonl")
