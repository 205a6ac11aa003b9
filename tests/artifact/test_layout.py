"""Tokenizer, processor and chat template files of an artifact."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from helpers.tiny import save_tiny, save_tokenizer
from safetensors.torch import save_file

from mpoe_convert import Recipe, convert
from mpoe_convert.artifact.folder import check_output
from mpoe_convert.artifact.inspect import inspect
from mpoe_convert.artifact.layout import file_names
from mpoe_convert.errors import CheckpointError, OutputError

SMALL = {"experts": 2, "bond_dim": 4}
RAG = "additional_chat_templates/rag.jinja"


@pytest.fixture
def source(tmp_path) -> Path:
    folder = save_tiny("gpt2", "AutoModelForCausalLM", tmp_path / "dense")
    save_tokenizer(folder)
    return folder


def change(path: Path, **values: object) -> bytes:
    """Set keys of a JSON file, or remove them if None is given; its new bytes."""
    config = json.loads(path.read_text()) if path.exists() else {}
    kept = {key: value for key, value in config.items() if key not in values}
    path.write_text(json.dumps(kept | {k: v for k, v in values.items() if v is not None}))
    return path.read_bytes()


def converted(source: Path) -> Path:
    out = source.with_name("out")
    convert(Recipe(str(source), **SMALL), out)
    return out


def tokenizer_class(out: Path) -> str:
    return json.loads((out / "tokenizer_config.json").read_text())["tokenizer_class"]


@pytest.mark.parametrize(
    ("in_file", "in_config", "expected"),
    [
        ("PreTrainedTokenizerFast", None, "PreTrainedTokenizerFast"),
        ("BertTokenizerFast", "GPT2Tokenizer", "BertTokenizerFast"),
        (None, "BertTokenizer", "BertTokenizer"),
        (None, None, "GPT2Tokenizer"),
        ("OurTokenizer", None, "PreTrainedTokenizerFast"),
        ("OurTokenizer", "BertTokenizer", "PreTrainedTokenizerFast"),
        (None, "OurTokenizer", "PreTrainedTokenizerFast"),
    ],
)
def test_the_tokenizer_class_is_what_the_source_loads_as(in_file, in_config, expected, source):
    change(source / "config.json", tokenizer_class=in_config)
    change(source / "tokenizer_config.json", tokenizer_class=in_file)
    out = converted(source)
    assert tokenizer_class(out) == expected
    loaded = transformers.AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    assert type(loaded) is type(transformers.AutoTokenizer.from_pretrained(source))


def test_pictures_are_processed_as_for_the_source_whose_file_names_no_class(tmp_path):
    source = save_tiny("vit", "AutoModelForImageClassification", tmp_path / "dense")
    change(source / "preprocessor_config.json", size={"height": 8, "width": 8}, image_std=[0.5, 0.4, 0.3])
    out = converted(source)
    picture = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    found, expected = (
        transformers.AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)(picture)
        for folder in (out, source)
    )
    np.testing.assert_array_equal(found["pixel_values"], expected["pixel_values"])
    classify = transformers.pipeline("image-classification", str(out), trust_remote_code=True)
    assert tuple(classify.image_processor.image_std) == (0.5, 0.4, 0.3)


def test_files_with_nothing_to_change_are_copied_to_the_byte(source):
    names = ("tokenizer_config.json", "preprocessor_config.json", "processor_config.json")
    before = {name: change(source / name, a=1) for name in names}
    out = converted(source)
    assert {name: (out / name).read_bytes() for name in names} == before


def test_code_that_is_not_copied_is_not_referred_to(source):
    names = ("tokenizer_config.json", "preprocessor_config.json", "processor_config.json")
    for name in names:
        change(source / name, a=1, auto_map={"AutoTokenizer": ["tokenization_ours.Ours", None]})
    out = converted(source)
    for name in names:
        kept = json.loads((source / name).read_text())
        del kept["auto_map"]
        assert json.loads((out / name).read_text()) == kept
    loaded = transformers.AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    stock = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    assert loaded.backend_tokenizer.to_str() == stock.backend_tokenizer.to_str()


@pytest.mark.parametrize(("text", "said"), [('{"a":', "is not JSON"), ("[]", "holds a JSON list")])
@pytest.mark.parametrize("name", ["tokenizer_config.json", "preprocessor_config.json"])
def test_a_damaged_file_is_told_in_one_line(name, text, said, source):
    (source / name).write_text(text)
    with pytest.raises(CheckpointError, match=f"{name}' {said}") as caught:
        converted(source)
    assert "\n" not in str(caught.value)
    assert os.listdir(source.parent) == ["dense"]


def add_templates(source: Path) -> None:
    (source / "chat_template.jinja").write_text("plain")
    (source / RAG).parent.mkdir()
    (source / RAG).write_text("with documents")
    (source / RAG).with_name("code.py").write_text("raise SystemExit")


def test_named_chat_templates_come_along(source):
    add_templates(source)
    out = converted(source)
    assert os.listdir(out / "additional_chat_templates") == ["rag.jinja"]
    loaded = transformers.AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    assert loaded.chat_template == {"default": "plain", "rag": "with documents"}
    mask = os.umask(0)
    os.umask(mask)
    assert (out / RAG).parent.stat().st_mode & 0o777 == 0o777 & ~mask
    assert (out / RAG).stat().st_mode & 0o777 == 0o666 & ~mask
    assert inspect(out).files[RAG] == len("with documents")


def test_an_artifact_with_a_folder_is_replaced_only_where_it_is_ours(source):
    add_templates(source)
    out = converted(source)
    change(out / "conversion_report.json", files=file_names(out))
    check_output(out, overwrite=True)
    (out / RAG).with_name("mine.jinja").write_text("precious")
    with pytest.raises(OutputError, match="also holds 'additional_chat_templates/mine.jinja', which"):
        check_output(out, overwrite=True)


def test_the_report_names_the_files_in_folders(source):
    add_templates(source)
    out = converted(source)
    assert json.loads((out / "conversion_report.json").read_text())["files"] == file_names(out)


def test_weights_of_something_else_in_the_folder_are_not_counted(source):
    out = converted(source)
    before = inspect(out).parts
    save_file({"adapter": torch.ones(3)}, out / "adapter_model.safetensors")
    assert inspect(out).parts == before
