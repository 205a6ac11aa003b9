"""The end of a text is learned: it stands there once, it has a label, and a trained model predicts it."""

import json

import pytest
import torch
import transformers
from datasets import Dataset
from helpers.data import words, write
from helpers.selection import quick
from helpers.tiny import save_tiny
from helpers.word_tokenizers import ENDINGS, word_tokenizer

from mpoe_convert import Finetuning, Recipe, convert, finetune
from mpoe_convert.source import texts
from mpoe_convert.source.padding import pad_rows
from mpoe_convert.training.tasks import TASKS

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")

TEXTS = [words(n, seed=n) for n in (3, 5, 1, 4)]
COLUMNS = texts.Columns()


def ids_of(text: str) -> list[int]:
    return [int(word[1:]) for word in text.split()]


@pytest.mark.parametrize("how", ENDINGS)
def test_every_text_of_a_block_ends_once(how):
    make, (before, behind) = ENDINGS[how]
    stream = [token for text in TEXTS for token in [*before, *ids_of(text), *behind]]
    rows = Dataset.from_dict({"text": TEXTS})
    blocks = texts.language_blocks(rows, make(), "text", 1)["input_ids"][:]
    assert [ids[0] for ids in blocks] == stream


def test_a_text_that_holds_its_end_ends_once():
    rows = Dataset.from_dict({"text": ["w3 w4 </s>", "w5 </s>", "w6"]})
    for template in ("$A", "$A </s>"):
        tokenizer = word_tokenizer(template, eos_token="</s>")
        blocks = texts.language_blocks(rows, tokenizer, "text", 1)["input_ids"][:]
        assert [ids[0] for ids in blocks] == [3, 4, 2, 5, 2, 6, 2]


@pytest.mark.parametrize("how", ENDINGS)
def test_every_end_has_a_label(how):
    """All tokens of blocks have one, and all of targets but the padding, even if padding is an end."""
    make, (before, behind) = ENDINGS[how]
    tokenizer = make()
    rows = Dataset.from_dict({"text": TEXTS, "target": TEXTS[::-1]})
    task = TASKS["causal"](tokenizer, COLUMNS, 4)
    batch = task.collator(None)(list(task.training_examples(rows, (), None)))
    assert torch.equal(batch["labels"], batch["input_ids"]) and batch["attention_mask"].all()
    assert batch["labels"].numel() > 10

    task = TASKS["seq2seq"](tokenizer, COLUMNS, 32)
    batch = task.collator(None)(list(task.training_examples(rows, (), None)))
    for row, text in enumerate(TEXTS[::-1]):
        expected = [*before, *ids_of(text), *behind]
        assert batch["labels"][row].tolist()[: len(expected)] == expected
        assert set(batch["labels"][row].tolist()[len(expected) :]) <= {-100}
    lengths = [len(tokenizer(text)["input_ids"]) for text in TEXTS]
    assert batch["attention_mask"].sum(1).tolist() == lengths
    cut = TASKS["seq2seq"](tokenizer, COLUMNS, 4).training_examples(rows, (), None)["labels"][:]
    assert all(len(labels) <= 4 and labels[len(labels) - len(behind) :] == behind for labels in cut)

    prompts = Dataset.from_dict({"text": [f"{text} " for text in TEXTS], "target": TEXTS[::-1]})
    found = texts.answers(prompts, tokenizer, COLUMNS, 32)
    for labels, text in zip(found["labels"][:], TEXTS[::-1], strict=True):
        assert [label for label in labels if label != -100] == [*ids_of(text), *behind]


def test_padding_is_told_by_length():
    rows = [
        {"input_ids": [5, 2], "labels": [2, 2, 2], "kind": 1},
        {"input_ids": [2], "labels": [2], "kind": 0},
    ]
    batch = pad_rows(rows, pad=2)
    assert batch["input_ids"].tolist() == [[5, 2], [2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert batch["labels"].tolist() == [[2, 2, 2], [2, -100, -100]] and batch["kind"].tolist() == [1, 0]


def test_batches_for_calibration_count_every_end(llama_without_padding, tmp_path):
    from mpoe_convert.compression.batches import make_batches
    from mpoe_convert.source.checkpoint import open_checkpoint

    folder = llama_without_padding
    pairs = [{"text": words(2 + n % 3, seed=n), "target": words(1 + n % 5, seed=n)} for n in range(60)]
    data = write(tmp_path / "pairs.jsonl", pairs)
    recipe = Recipe(str(folder), keep=1.0, bond_dim=2, calibrate=(data,), calibration_tokens=200)
    batches = make_batches(recipe, open_checkpoint(str(folder)))
    assert len(batches) > 1
    for batch in batches:
        assert ((batch["labels"] == 2).sum(1) == 1).all()
        assert (batch["attention_mask"].sum(1) - 1 == (batch["labels"] == 2).int().argmax(1)).all()


@pytest.fixture
def llama_without_padding(tmp_path):
    folder = save_tiny("llama", "AutoModelForCausalLM", tmp_path / "llama")
    word_tokenizer(eos_token="</s>").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("how", ["no padding token", "padding is the end", "ends itself"])
@pytest.mark.parametrize("kind", quick(["dense", "converted"], lambda kind: kind == "dense"))
def test_the_end_is_predicted(kind, how, tmp_path):
    """After a few short texts, over and over, a model says with near certainty where each of them ends."""
    make, (before, _) = ENDINGS[how]
    folder = save_tiny("gpt2", "AutoModelForCausalLM", tmp_path / "dense")
    config = json.loads((folder / "config.json").read_text())
    config |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "pad_token_id": None}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = make()
    tokenizer.save_pretrained(folder)
    if kind == "converted":
        convert(Recipe(str(folder), experts=2, bond_dim=8), tmp_path / "out")
        folder = tmp_path / "out"
    said = ["w4 w5 w6", "w7 w8", "w9 w10 w11 w12"]
    data = write(tmp_path / "texts.jsonl", [{"text": text} for text in said * 20])
    options = {"length": 16, "batch_size": 8, "steps": 200, "learning_rate": 1e-2, "save_every": 500}
    finetune(Finetuning(str(folder), data, **options), tmp_path / "tuned")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "tuned", trust_remote_code=True)
    for text in said:
        with torch.no_grad():
            logits = model.eval()(torch.tensor([[*before, *ids_of(text)]])).logits[0, -1]
        assert logits.softmax(-1)[2] > 0.95, text
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "tuned", trust_remote_code=True)
    assert saved.pad_token == tokenizer.pad_token  # the tokenizer is the source's


# A classifier reads the last token that is not its config's padding token.
@pytest.mark.parametrize("model_type", ["gpt2", "llama", "bert"])
def test_a_classifier_without_a_padding_token(model_type, tmp_path):
    """Scores of padded batches are those of single texts; config and tokenizer agree on the padding."""
    folder = save_tiny(model_type, "AutoModelForSequenceClassification", tmp_path / "dense")
    config = json.loads((folder / "config.json").read_text()) | {"pad_token_id": None}
    (folder / "config.json").write_text(json.dumps(config))
    word_tokenizer(eos_token="</s>").save_pretrained(folder)
    values = [{"text": text, "label": ("a", "b")[n % 2]} for n, text in enumerate(TEXTS * 6)]
    data = write(tmp_path / "data.jsonl", values)
    options = {"length": 16, "batch_size": 4, "steps": 2, "log_every": 1, "teacher": str(folder)}
    finetune(Finetuning(str(folder), data, task="classification", **options), tmp_path / "tuned")
    auto = transformers.AutoModelForSequenceClassification
    model = auto.from_pretrained(tmp_path / "tuned").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "tuned")
    assert model.config.pad_token_id == tokenizer.pad_token_id == 2
    with torch.no_grad():
        together = model(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits
        for logits, text in zip(together, TEXTS, strict=True):
            alone = model(**tokenizer(text, return_tensors="pt")).logits[0]
            torch.testing.assert_close(logits, alone, rtol=0, atol=1e-5)
    task = TASKS["classification"](word_tokenizer(eos_token="</s>"), COLUMNS, 16)
    examples = task.examples(Dataset.from_dict({"text": TEXTS, "label": ["a", "b", "a", "b"]}), ("a", "b"))
    untouched = auto.from_pretrained(folder, num_labels=2)
    task.prepare(untouched)
    with torch.no_grad():
        found = task.outcomes(untouched.eval(), examples)
        alone = [task.outcomes(untouched, [example])[0] for example in examples]
    assert found == alone


def test_ends_are_not_masked():
    """Of a block with many ends only words are masked, without a padding token."""
    tokenizer = word_tokenizer("<s> $A </s>", cls_token="<s>", sep_token="</s>", mask_token="w38")
    task = TASKS["masked"](tokenizer, COLUMNS, 16)
    rows = Dataset.from_dict({"text": TEXTS * 30})
    batch = task.collator(None)(list(task.training_examples(rows, (), None)))
    masked = batch["labels"] != -100
    assert 0.05 < masked.float().mean() < 0.2 and (batch["labels"][masked] > 2).all()
    assert (batch["input_ids"] == 2).sum() >= 80 and batch["attention_mask"].all()
