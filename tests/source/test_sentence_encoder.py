"""Which files belong to a sentence encoder's modules, and which never do."""

import json
from pathlib import Path

import pytest

from mpoe_convert.errors import CheckpointError
from mpoe_convert.source.sentence_encoder import (
    local_module_files,
    module_code,
    module_files,
    module_folders,
    notes,
)

TAKEN = [
    *("1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors", "3_Old/pytorch_model.bin"),
    *("4_Router/query/config.json", "4_Router/query/model.safetensors", "4_Router/query/vocab.txt"),
]
LEFT = [
    *("2_Dense/pytorch_model.bin", "2_Dense/optimizer.pt", "2_Dense/code.py", "2_Dense/head.pkl"),
    *("5_Elsewhere/config.json", "1_Pooling/.hidden.json", "12_Dense/config.json", "eval/scores.json"),
]


def save_modules(folder: Path, *paths: str) -> Path:
    entries = [{"type": "sentence_transformers.models.Pooling", "path": path} for path in paths]
    (folder / "modules.json").write_text(json.dumps(entries))
    return folder


def test_files_of_modules_are_taken_and_pickles_only_where_there_is_nothing_else(tmp_path):
    save_modules(tmp_path, "", "1_Pooling", "2_Dense", "3_Old/", "4_Router")
    assert module_folders(tmp_path) == ["1_Pooling", "2_Dense", "3_Old", "4_Router"]
    assert module_files(tmp_path, [*TAKEN, *LEFT]) == sorted(TAKEN)
    small = [name for name in TAKEN if name.endswith((".json", ".txt"))]
    assert module_files(tmp_path, [*TAKEN, *LEFT], weights=False) == sorted(small)
    for name in [*TAKEN, *LEFT]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    assert local_module_files(tmp_path) == [tmp_path / name for name in sorted(TAKEN)]


def test_a_model_without_modules_has_no_such_files(tmp_path):
    assert module_files(tmp_path, [*TAKEN, *LEFT]) == [] == local_module_files(tmp_path)


@pytest.mark.parametrize("path", ["../secret", "/etc", "a/../../b", "C:\\x", "a\\b"])
def test_a_folder_outside_is_refused(path, tmp_path):
    save_modules(tmp_path, "", path)
    with pytest.raises(CheckpointError, match="expected one inside the model's: do not trust"):
        local_module_files(tmp_path)


@pytest.mark.parametrize("text", ["{", "{}x", '[{"type": "a"}]', '[{"type": 1, "path": ""}]', "[1]", "7"])
def test_a_damaged_list_is_told_in_one_line(text, tmp_path):
    (tmp_path / "modules.json").write_text(text)
    with pytest.raises(CheckpointError, match="is not a list of modules .*: fetch it again, or remove it"):
        module_folders(tmp_path)


def test_code_is_what_lies_beside_the_weights(tmp_path):
    types = ["sentence_transformers.models.Pooling", "own.Layer", "installed.Layer", "pylate.models.Dense"]
    (tmp_path / "modules.json").write_text(json.dumps([{"type": each, "path": ""} for each in types]))
    (tmp_path / "own.py").write_text("")
    assert module_code(tmp_path) == ["own"] == module_code(tmp_path, ["own.py", "other.py"])
    assert list(notes(tmp_path, ["own.py"], trusted=True)) == []
    (said,) = notes(tmp_path, ["own.py"], trusted=False)
    assert said.startswith("modules.json names classes of custom code (own.py), which does not come along")


def test_pickles_of_other_libraries_are_told(tmp_path):
    (said,) = notes(tmp_path, ["model_head.pkl", "model.safetensors"], trusted=True)
    assert said.startswith("model_head.pkl does not come along: pickles may run code.")


def test_a_transformer_that_is_one_of_the_modules_is_told(tmp_path):
    save_modules(tmp_path, "0_Transformer", "1_Pooling")
    (said,) = notes(tmp_path / "0_Transformer", [], trusted=True)
    assert "lists this folder as a module of a sentence encoder, whose other modules do not come" in said
    assert list(notes(tmp_path / "2_Other", [], trusted=True)) == []
    (tmp_path / "modules.json").write_text('{"of": "another program"}')
    assert list(notes(tmp_path / "0_Transformer", [], trusted=True)) == []
