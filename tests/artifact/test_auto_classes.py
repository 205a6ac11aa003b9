"""Artifacts load as the tokenizer and processors that transformers chooses for their source's model type."""

import json
from pathlib import Path

import pytest
import transformers
from helpers.vocabularies import KINDS, save_vocabulary
from transformers.models.auto import tokenization_auto

from mpoe_convert.artifact import auto_classes
from mpoe_convert.artifact.auto_classes import keep_tokenizer, name_classes
from mpoe_convert.artifact.verify_child import encode, make_texts
from mpoe_convert.exports.moe_architectures import TARGET_OF
from mpoe_convert.source.checkpoint import Checkpoint
from mpoe_convert.source.families import FAMILY_OF

NAMED = (
    *(None, "GPT2Tokenizer", "LlamaTokenizer", "LlamaTokenizerFast", "Qwen2Tokenizer", "BertTokenizerFast"),
    *("PreTrainedTokenizerFast", "TokenizersBackend", "OurTokenizer"),
)
TEXTS = make_texts([])[-20:]


def looked_at(model_type: str) -> tuple:
    """What AutoTokenizer looks at of a model type: its class, and whether that of the files is doubted."""
    doubted = tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS
    return tokenization_auto.TOKENIZER_MAPPING_NAMES.get(model_type), model_type in doubted


# One type of the table for each of them.
MODEL_TYPES = list({looked_at(model_type): model_type for model_type in reversed(FAMILY_OF)}.values())


def copied(source: Path, name: str, model_type: str, **config: object) -> Path:
    folder = source.with_name(name)
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "config.json").write_text(json.dumps({"model_type": model_type} | config))
    return folder


def named_artifact(source: Path, model_type: str, **config: object) -> Path:
    """A folder with the source's files as a conversion names their classes, of a type that is in no table."""
    (source / "config.json").write_text(json.dumps({"model_type": model_type} | config))
    folder = copied(source, f"{source.name}-artifact", "mpoe_of_something", **config)
    checkpoint = Checkpoint(str(source), source, None, {"model_type": model_type} | config, {})
    name_classes(folder, checkpoint, checkpoint.architecture)
    return folder


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def load(auto: str, folder: Path):
    return getattr(transformers, auto).from_pretrained(folder)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_type_encodes_as_its_source_whatever_class_is_named(model_type, kind, tmp_path):
    loads = 0
    for named in NAMED:
        source = tmp_path / str(named)
        save_vocabulary(source, named, kind)
        artifact = named_artifact(source, model_type)
        try:
            expected = load("AutoTokenizer", source)
        except Exception:  # classes for other kinds of vocabularies
            continue
        found = load("AutoTokenizer", artifact)
        loads += 1
        if type(found) is not type(expected):  # by model type alone, so that it is written as a plain backend
            assert (model_type, kind, named) == ("idefics2", "byte-level", None)
        assert found.backend_tokenizer.to_str() == expected.backend_tokenizer.to_str()
        assert found.special_tokens_map == expected.special_tokens_map
        differing = [text for text in TEXTS if encode(found, text) != encode(expected, text)]
        assert not differing, (named, differing[:3])
    assert loads > 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_tokenizer_that_does_not_load_gets_the_class_that_it_would_load_as(
    model_type, kind, tmp_path, monkeypatch
):
    monkeypatch.setattr(auto_classes, "_load", lambda *_, **__: None)
    for named in (name for name in NAMED if name != "OurTokenizer"):
        if (model_type, kind, named) == ("idefics2", "byte-level", None):
            continue  # transformers takes its class by model type alone
        source = tmp_path / str(named)
        save_vocabulary(source, named, kind)
        artifact = named_artifact(source, model_type)
        try:
            expected = load("AutoTokenizer", source)
        except Exception:
            continue
        assert type(load("AutoTokenizer", artifact)) is type(expected), named


def test_a_class_of_nobody_is_replaced_where_the_tokenizer_does_not_load(tmp_path, monkeypatch):
    monkeypatch.setattr(auto_classes, "_load", lambda *_, **__: None)
    save_vocabulary(tmp_path / "a", "OurTokenizer")
    artifact = named_artifact(tmp_path / "a", "gpt2")
    assert read(artifact / "tokenizer_config.json")["tokenizer_class"] == "GPT2Tokenizer"


def test_a_repository_that_is_known_for_a_wrong_class_loads_as_there(tmp_path):
    source = tmp_path / "a"
    save_vocabulary(source, "LlamaTokenizerFast", "metaspace")
    (source / "config.json").write_text('{"model_type": "llama"}')
    names = {}
    for repo in ("deepseek-ai/deepseek-coder-1.3b-base", "me/mine"):
        checkpoint = Checkpoint(repo, source, "0" * 40, {"model_type": "llama"}, {})
        save_vocabulary(tmp_path / "b", "LlamaTokenizerFast", "metaspace")
        name_classes(tmp_path / "b", checkpoint, checkpoint.architecture)
        names[repo] = read(tmp_path / "b/tokenizer_config.json")["tokenizer_class"]
    assert list(names.values()) == ["PreTrainedTokenizerFast", "LlamaTokenizerFast"]


def test_a_correction_by_model_type_is_written_out(tmp_path):
    source = tmp_path / "a"
    save_vocabulary(source, "PreTrainedTokenizerFast")
    values = read(source / "tokenizer.json")
    values["model"]["vocab"] |= {f"token{number}": 1000 + number for number in range(100_001)}
    (source / "tokenizer.json").write_text(json.dumps(values))
    named = read(source / "tokenizer_config.json") | {"fix_mistral_regex": True}
    (source / "tokenizer_config.json").write_text(json.dumps(named))
    artifact = named_artifact(source, "mistral", transformers_version="4.57.0")
    assert read(artifact / "tokenizer.json")["pre_tokenizer"] != values["pre_tokenizer"]
    expected, found = load("AutoTokenizer", source), load("AutoTokenizer", artifact)
    assert [found(text)["input_ids"] for text in TEXTS] == [expected(text)["input_ids"] for text in TEXTS]


EXPORTS = [(model_type, model_type) for model_type in MODEL_TYPES]
EXPORTS += {
    (looked_at(source), looked_at(target.model_type)): (source, target.model_type)
    for source, target in TARGET_OF.items()
}.values()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("model_type", "target"), EXPORTS)
def test_every_export_encodes_as_the_artifact(model_type, target, kind, tmp_path):
    for named in NAMED:
        source = tmp_path / str(named)
        save_vocabulary(source, named, kind)
        artifact = named_artifact(source, model_type)
        try:
            expected = load("AutoTokenizer", artifact)
        except Exception:
            continue
        export = copied(artifact, f"{named}-export", target)
        keep_tokenizer(export, artifact, False)
        found = load("AutoTokenizer", export)
        differing = [text for text in TEXTS if encode(found, text) != encode(expected, text)]
        assert not differing, (named, differing[:3])
        assert found.special_tokens_map == expected.special_tokens_map
        assert found.padding_side == expected.padding_side


# ---------------------------------------------------------------------------------------------------
# Processors


def processors(source: Path, artifact: Path, auto: str) -> None:
    """Both load as the same class with the same values."""
    expected, found = load(auto, source), load(auto, artifact)
    assert type(found) is type(expected)
    values = found.to_dict()
    assert {key: value for key, value in expected.to_dict().items() if values[key] != value} == {}


@pytest.mark.parametrize("part", [None, "image_processor"])
@pytest.mark.parametrize("model_type", ["vit", "clip", "dinov2", "beit"])
def test_an_image_processor_without_a_type_loads_as_its_source(model_type, part, tmp_path):
    values = {"size": {"height": 8, "width": 8}, "do_rescale": False}
    (tmp_path / "a").mkdir()
    file = "processor_config.json" if part else "preprocessor_config.json"
    (tmp_path / "a" / file).write_text(json.dumps({part: values} if part else values))
    artifact = named_artifact(tmp_path / "a", model_type)
    processors(tmp_path / "a", artifact, "AutoImageProcessor")


@pytest.mark.parametrize("model_type", ["wav2vec2", "hubert", "whisper"])
def test_a_feature_extractor_without_a_type_loads_as_its_source(model_type, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/preprocessor_config.json").write_text('{"feature_size": 1, "sampling_rate": 8000}')
    artifact = named_artifact(tmp_path / "a", model_type)
    processors(tmp_path / "a", artifact, "AutoFeatureExtractor")


def test_a_processor_without_a_class_loads_as_its_source(tmp_path):
    source = tmp_path / "a"
    save_vocabulary(source, "TokenizersBackend")
    (source / "preprocessor_config.json").write_text('{"feature_size": 1}')
    artifact = named_artifact(source, "wav2vec2")
    expected, found = load("AutoProcessor", source), load("AutoProcessor", artifact)
    assert type(found) is type(expected) is transformers.Wav2Vec2Processor
    assert type(found.tokenizer) is type(expected.tokenizer)
    assert type(found.feature_extractor) is type(expected.feature_extractor)


@pytest.mark.parametrize(
    "values",
    [
        {"image_processor_type": "CLIPImageProcessor"},
        {"feature_extractor_type": "CLIPFeatureExtractor"},
        {"auto_map": {"AutoImageProcessor": "ours.Ours"}},
    ],
)
def test_a_processor_that_is_named_stays(values, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/preprocessor_config.json").write_text(json.dumps(values))
    artifact = named_artifact(tmp_path / "a", "vit")
    assert read(artifact / "preprocessor_config.json") == values


def test_a_type_in_config_json_is_found_there(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/preprocessor_config.json").write_text("{}")
    artifact = named_artifact(tmp_path / "a", "vit", image_processor_type="CLIPImageProcessor")
    assert read(artifact / "preprocessor_config.json") == {}


def test_weights_that_are_there_already_are_not_read(tmp_path, monkeypatch):
    """As of a run that resumes: they are large, and say nothing of tokenizers."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    folder = copied(source, "artifact", "mpoe_gpt2")
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"weights")
    checkpoint = Checkpoint(str(source), source, None, {"model_type": "gpt2"}, {})
    names, read_bytes = [], Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: names.append(path.name) or read_bytes(path))
    name_classes(folder, checkpoint, checkpoint.architecture)
    assert "config.json" in names and not any(name.endswith(".safetensors") for name in names)
