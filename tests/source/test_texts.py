"""Data as they are read."""

import json
import subprocess
import sys

import pytest
from helpers.loopback_hub import LoopbackHub, environment

from mpoe_convert.errors import DataError
from mpoe_convert.source import texts as corpus
from mpoe_convert.source.texts import Columns

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
    with pytest.raises(
        DataError, match=r"rows.jsonl' has 2 rows without text \(line 2 has no text\); expected one"
    ):
        corpus.read([str(path)], Columns(), "causal")


GOOD = '{"text": "a"}\n\n{"text": "b"}\n'
BAD_LINES = {
    "cut off": (
        GOOD + '{"text": "c"\n{"text": "d"}\n',
        r"line 4 is not JSON \(Expecting ',' delimiter, character 13\)",
    ),
    "a list": (GOOD + '["c"]\n', "line 4 holds a list, expected an object such as"),
    "a text": ('"c"\n', "line 1 holds a str, expected an object such as"),
    "nothing": ("", "it is empty"),
    "blanks": ("\n\n", "it is empty"),
    "no text": (GOOD + '{"txt": "c"}\n', r"1 row without text \(line 4 has no text\)"),
    "a number": ('{"text": "a"}\n{"text": 7}\n', r"line 2 holds 7 as text\); expected text"),
    "another encoding": (GOOD + '{"text": "\udce9"}\n', r"line 4 is not in UTF-8 \(byte 11\)"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_told_by_its_number(case, tmp_path):
    content, said = BAD_LINES[case]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=said) as error:
        corpus.read([str(path)], Columns(), "causal")
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("cell", "kind"), [(1, "int64"), ([2], "List"), ({"a": "b"}, "dict")])
def test_columns_that_hold_no_text(cell, kind, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": "a", "target": cell}) for _ in range(2)))
    with pytest.raises(
        DataError, match=f"column target of .*rows.jsonl' holds {kind} .line 1 holds .*; expected text"
    ):
        corpus.read([str(path)], Columns(), "seq2seq")
    assert corpus.read([str(path)], Columns(), "causal")["text"][:] == ["a", "a"]


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view"])
def test_every_kind_of_text(kind, tmp_path):
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "rows.parquet"
    cells = pyarrow.array(["a", "b"]).cast(getattr(pyarrow, kind)())
    parquet.write_table(pyarrow.table({"text": cells}), path)
    assert corpus.read([str(path)], Columns(), "causal")["text"][:] == ["a", "b"]


def test_a_class_or_task_without_a_name(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text,label,about\na,x,\nb,,sums\n")
    with pytest.raises(DataError, match="rows with an empty label"):
        corpus.read([str(path)], Columns(), "classification")
    with pytest.raises(DataError, match="rows with an empty about"):
        corpus.read([str(path)], Columns(routed_by="about"), "causal")


NO_NAMES = {
    "numbers with a point": ([0.0, 1.5], "double|float64"),
    "lists": ([[0], [1]], "List"),
    "objects": ([{"a": 1}, {"a": 2}], "dict"),
}


@pytest.mark.parametrize("what", NO_NAMES)
def test_columns_that_name_no_class_or_task(what, tmp_path):
    values, kind = NO_NAMES[what]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": "a", "label": value}) for value in values))
    message = f"^column label of .*rows.jsonl' holds ({kind}); expected one name in every row: text, a whole"
    with pytest.raises(DataError, match=message):
        corpus.read([str(path)], Columns(), "classification")
    with pytest.raises(DataError, match=message):
        corpus.read([str(path)], Columns(routed_by="label"), "causal")
    assert len(corpus.read([str(path)], Columns(), "causal")) == 2


@pytest.mark.parametrize(
    ("values", "names"),
    [
        (["b", "a", "b"], ["a", "b"]),
        ([10, 2, 2], ["2", "10"]),
        ([True, False, True], ["False", "True"]),
    ],
)
def test_names_of_classes(values, names, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": "a", "label": value}) for value in values))
    rows = corpus.read([str(path)], Columns(), "classification")
    assert corpus.label_names(rows, "label") == names


@pytest.mark.parametrize("named", [True, False])
def test_a_split_without_labels(named, tmp_path):
    """Parquet of the Hub: -1 everywhere, of a column whose classes have names or not."""
    from datasets import ClassLabel, Dataset, Features, Value

    kind = ClassLabel(names=["x", "y"]) if named else Value("int64")
    features = Features({"text": Value("string"), "label": kind})
    path = str(tmp_path / "test.parquet")
    Dataset.from_dict({"text": ["a", "b"], "label": [1, 1]}, features=features).to_parquet(path)
    rows = corpus.read([path], Columns(), "classification")
    assert corpus.label_names(rows, "label") == (["x", "y"] if named else ["1"])
    Dataset.from_dict({"text": ["a", "b"], "label": [-1, -1]}, features=features).to_parquet(path)
    with pytest.raises(DataError, match=r"^.*test.parquet' has rows whose label is -1, which stands for an"):
        corpus.read([path], Columns(), "classification")
    assert len(corpus.read([path], Columns(), "causal")) == 2


CLIENT = """
import sys
from mpoe_convert.source import texts as corpus
from mpoe_convert import errors
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
    assert lines[2].startswith("DataError: 'me/texts' cannot be read: Unknown split") and "dev" in lines[2]
    assert lines[3].startswith("DataError: 'me/absent' is neither a file nor a dataset that can be reached")
    assert hub.fetched("train.jsonl")


def test_a_tokenizer_without_the_probe_ends_texts_with_its_end():
    """It drops unknown letters, so that a probe of one letter does not show where a text is."""
    import tokenizers
    import transformers
    from datasets import Dataset

    vocabulary = {"<s>": 0, "</s>": 1, "w": 2, "3": 3}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = [("<s>", 0), ("</s>", 1)]
    frame = tokenizers.processors.TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    backend.post_processor = frame
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    rows = Dataset.from_dict({"text": ["w3", "ww"]})
    blocks = corpus.language_blocks(rows, tokenizer, "text", 1)["input_ids"][:]
    assert [ids[0] for ids in blocks] == [0, 2, 3, 1, 0, 2, 2, 1]


def test_what_a_library_says_of_a_file_is_one_line(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text\na\nb,c,d\n")  # pandas ends its message with a line break
    with pytest.raises(DataError, match=r"rows.csv' cannot be read: Error tokenizing data") as error:
        corpus.read([str(path)], Columns(), "causal")
    assert "\n" not in str(error.value)
