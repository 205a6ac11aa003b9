"""The columns that a part of a file tells are those that the library finds in the whole file."""

import json

import pytest
from datasets import load_dataset

from mpoe_convert.source.file_columns import column_names
from mpoe_convert.source.texts import BUILDERS

ROWS = [{"text": "a", "target": "b"}, {"text": "c", "target": 'd "e", f', "label": "1"}]
LINES = "\n".join(map(json.dumps, ROWS))
FILES = {
    "text": ("of.txt", "text,target\n"),
    "csv": ("of.csv", 'text,"a, b",target\na,b,c\n'),
    "csv after blank lines and a byte order mark": ("of.csv", "\ufeff\r\n\r\ntext,target\r\na,b\r\n"),
    "a name over two lines": ("of.csv", '"te\nxt",target\na,b\n'),
    "tsv": ("of.tsv", "text\ttar,get\na\tb\n"),
    "lines of JSON": ("of.jsonl", LINES),
    "the same under the other name": ("of.json", f"\n{LINES}\n"),
    "one list": ("of.json", json.dumps(ROWS, indent=1)),
    "one list in one line": ("of.jsonl", json.dumps(ROWS)),
}


@pytest.mark.parametrize("case", FILES)
def test_columns_are_those_of_the_library(case, tmp_path):
    name, content = FILES[case]
    path = tmp_path / name
    path.write_bytes(content.encode())
    assert path.suffix in BUILDERS
    kind, options = BUILDERS[path.suffix]
    expected = load_dataset(kind, data_files=[str(path)], split="train", cache_dir=tmp_path, **options)
    assert column_names(path, ["no such column"]) == expected.column_names


def test_the_footer_of_parquet_has_them(tmp_path):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": ["a"], "target": ["b"]}), tmp_path / "of.parquet")
    assert column_names(tmp_path / "of.parquet", ["text"]) == ["text", "target"]


def test_rows_are_read_until_all_columns_are_found(tmp_path):
    path = tmp_path / "of.jsonl"
    path.write_text(f"{LINES}\nno JSON")
    assert column_names(path, ["text", "target"]) == ["text", "target"]
    assert column_names(path, ["label"]) == ["text", "target", "label"]
    assert column_names(path, ["topic"]) is None


UNCLEAR = {
    "nothing": ("of.csv", b""),
    "no rows": ("of.jsonl", b"\n"),
    "another encoding": ("of.csv", "t\u00e9xt\n".encode("latin-1")),
    "rows that are no objects": ("of.json", b"[1, 2]"),
    "an object over several lines": ("of.json", b'{\n"text": ["a"]}'),
    "no parquet": ("of.parquet", b"text"),
}


@pytest.mark.parametrize("case", UNCLEAR)
def test_what_is_unclear_is_left_to_the_library(case, tmp_path):
    name, content = UNCLEAR[case]
    (tmp_path / name).write_bytes(content)
    assert column_names(tmp_path / name, ["text"]) is None
