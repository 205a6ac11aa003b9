"""`evaluate` against plain arithmetic, transformers and the metric libraries themselves."""

import json
import math

import numpy as np
import pytest
import sacrebleu
import torch
import transformers
from click.testing import CliRunner
from helpers.data import rows, words, write
from sklearn.metrics import f1_score

from mpoe_convert import evaluate
from mpoe_convert.cli import main
from mpoe_convert.errors import CheckpointError, DataError, RunError, TrainingError
from mpoe_convert.training.tasks import Causal, windows

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(words(101))
    return str(path)


def load(folder, auto="AutoModelForCausalLM"):
    return getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True).eval()


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 7, 8, 9, 40, 41])
@pytest.mark.parametrize(("length", "stride"), [(8, 8), (8, 4), (8, 3), (2, 1)])
def test_windows_score_every_token_once_with_its_context(num_tokens, length, stride):
    if stride == length == 8:
        stride = 7  # a window's first token has nothing before it in the window
    scored = []
    for start, end, first in windows(num_tokens, length, stride):
        assert 0 <= start < first < end <= num_tokens and end - start <= length
        assert first - start >= min(length - stride, first)
        scored += range(first, end)
    assert scored == list(range(1, num_tokens))


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_perplexity_of_one_window_is_the_models_loss(model_type, artifact, tmp_path):
    _, out = artifact(model_type)
    path = tmp_path / "short.txt"
    path.write_text(words(20))
    found = evaluate(str(out), str(path), length=32)
    ids = transformers.AutoTokenizer.from_pretrained(out, trust_remote_code=True)(words(20))["input_ids"]
    with torch.no_grad():
        loss = load(out)(torch.tensor([ids]), labels=torch.tensor([ids])).loss
    assert found.metrics["perplexity"].value == pytest.approx(math.exp(loss), rel=1e-5)
    assert found.count == len(ids) - 1


def test_strided_perplexity_by_hand(artifact, text):
    _, out = artifact("gpt2", noise=0.3)
    found = evaluate(str(out), text, length=16, stride=5, batch_size=3)
    model, ids = load(out), torch.tensor([[int(w[1:]) for w in words(101).split()]])
    losses = []
    for place in range(1, 101):
        # The first window that reaches the place, whose start is a multiple of the stride.
        start = max(0, math.ceil((place + 1 - 16) / 5) * 5)
        with torch.no_grad():
            logits = model(ids[:, start:place]).logits[0, -1]
        losses.append(-logits.log_softmax(-1)[ids[0, place]].item())
    assert found.count == 100
    assert found.metrics["perplexity"].value == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)


def test_against_another_model_on_the_same_examples(artifact, text):
    dense, out = artifact("gpt2")
    equal = evaluate(str(out), text, against=str(dense), length=16)
    ratio = equal.differences["perplexity ratio"]
    assert ratio.value == pytest.approx(1, abs=1e-5) and ratio.high - ratio.low < 1e-5
    interval = equal.metrics["perplexity"]
    assert interval.low < interval.value < interval.high
    _, broken = artifact("gpt2", layout="balanced", bond_dim=2)
    worse = evaluate(str(broken), text, against=str(dense), length=16)
    assert worse.differences["perplexity ratio"].value == pytest.approx(
        worse.metrics["perplexity"].value / worse.against["perplexity"].value
    )
    assert worse.against == equal.against


def test_interval_is_that_of_the_mean(artifact, tmp_path):
    """For a mean over many equal windows the bootstrap is the normal interval."""
    _, out = artifact("gpt2")
    path = tmp_path / "long.txt"
    path.write_text(words(3200))
    found = evaluate(str(out), str(path), length=9, stride=8).metrics["perplexity"]
    model, ids = load(out), torch.tensor([int(w[1:]) for w in words(3200).split()])
    means = []
    with torch.no_grad():
        for start in range(0, 3199, 8):
            part = ids[start : start + 9][None]
            means.append(model(part, labels=part).loss.item())
    error = np.std(means) / math.sqrt(len(means))
    low, high = (math.exp(np.mean(means) + sign * 1.96 * error) for sign in (-1, 1))
    assert (found.low, found.high) == pytest.approx((low, high), rel=0.005)


def test_classification(artifact, tmp_path):
    _, out = artifact("bert", "AutoModelForSequenceClassification", noise=0.1)
    model = load(out, "AutoModelForSequenceClassification")
    model.config.id2label, model.config.label2id = {0: "even", 1: "odd"}, {"even": 0, "odd": 1}
    model.save_pretrained(tmp_path / "named")
    transformers.AutoTokenizer.from_pretrained(out, trust_remote_code=True).save_pretrained(
        tmp_path / "named"
    )
    values = rows("classification", 30)
    found = evaluate(str(tmp_path / "named"), write(tmp_path / "data.csv", values), task="classification")
    expected, chosen = [], []
    tokenizer = transformers.AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    for row in values:
        with torch.no_grad():
            chosen.append(int(model(**tokenizer(row["text"], return_tensors="pt")).logits.argmax()))
        expected.append(("even", "odd").index(row["label"]))
    assert found.metrics["accuracy"].value == pytest.approx(np.mean(np.equal(chosen, expected)))
    assert found.metrics["f1"].value == pytest.approx(f1_score(expected, chosen, average="macro"))
    assert found.count == 30


def test_seq2seq(artifact, tmp_path):
    _, out = artifact("t5", noise=0.1)
    values = rows("seq2seq", 6)
    model = load(out, "AutoModelForSeq2SeqLM")
    tokenizer = transformers.AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    texts = []
    for row in values:
        made = model.generate(
            **tokenizer(row["text"], return_tensors="pt"), max_new_tokens=12, do_sample=False
        )
        texts.append(tokenizer.decode(made[0], skip_special_tokens=True).strip())
    values[2]["target"] = texts[2]  # one that is exactly right
    found = evaluate(str(out), write(tmp_path / "data.jsonl", values), length=12, batch_size=1)
    targets = [row["target"] for row in values]
    right = np.mean([text == target for text, target in zip(texts, targets, strict=True)])
    assert found.metrics["exact_match"].value == pytest.approx(right) and right > 0
    assert found.metrics["bleu"].value == pytest.approx(sacrebleu.corpus_bleu(texts, [targets]).score)
    assert found.metrics["chrf"].value == pytest.approx(sacrebleu.corpus_chrf(texts, [targets]).score)
    assert 0 < found.metrics["rouge_l"].value < 100


def test_targets_of_one_word_have_no_bleu(artifact, tmp_path):
    """sacrebleu gives 0 even if every text is right."""
    assert sacrebleu.corpus_bleu(["w5"] * 12, [["w5"] * 12]).score == 0
    _, out = artifact("t5", noise=0.1)
    values = [row | {"target": "w5"} for row in rows("seq2seq", 12)]
    found = evaluate(str(out), write(tmp_path / "data.jsonl", values), length=12, record=True)
    assert found.metrics["bleu"].value is None and found.metrics["chrf"].value is not None
    assert found.metrics["exact_match"].value == 0 and found.metrics["exact_match"].high > 0.2
    [told] = [note for note in found.notes if note.startswith("bleu: ")]
    assert told == "bleu: BLEU matches 4 words in a row, and the longest target has 1."
    card = (out / "README.md").read_text()
    assert "| BLEU | undefined |" in card and told in card and "type: sacrebleu" not in card


def test_a_damaged_model_has_no_scores(artifact, text, tmp_path):
    dense, _ = artifact("gpt2")
    model = load(dense)
    with torch.no_grad():
        model.transformer.h[1].ln_1.bias[0] = torch.inf
    model.save_pretrained(tmp_path / "broken")
    (tmp_path / "broken/tokenizer.json").write_bytes((dense / "tokenizer.json").read_bytes())
    with pytest.raises(TrainingError, match=r"holds NaN or infinities in 'transformer\.h\.1\.ln_1\.bias'"):
        evaluate(str(tmp_path / "broken"), text, length=16)


def test_a_loss_that_overflows_is_told(artifact, text, monkeypatch):
    _, out = artifact("gpt2")
    broken = [[torch.nan, 1.0]]
    monkeypatch.setattr(Causal, "losses", lambda self, _, labels: torch.tensor(broken * len(labels)))
    with pytest.raises(TrainingError, match="the loss of .* is nan in 12 of 12 windows, so it has no scores"):
        evaluate(str(out), text, length=16)


def test_masked(artifact, tmp_path):
    _, out = artifact("bert", "AutoModelForMaskedLM", noise=0.1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out, mask_token="w3", trust_remote_code=True)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    path = tmp_path / "text.txt"
    path.write_text(words(320))
    options = {"task": "masked", "tokenizer": str(tmp_path / "tokenizer"), "length": 16}
    found = evaluate(str(out), str(path), **options)
    again = evaluate(str(out), str(path), **options, batch_size=3)
    assert again.count == found.count
    assert again.metrics["perplexity"].value == pytest.approx(found.metrics["perplexity"].value)
    assert 20 < found.count < 80 and 0 <= found.metrics["accuracy"].value < 0.5
    assert 10 < found.metrics["perplexity"].value < 100  # of 40 words, untrained
    other = evaluate(str(out), str(path), **options, seed=1).metrics["perplexity"].value
    assert other != pytest.approx(found.metrics["perplexity"].value, rel=1e-3)


def test_command_line(artifact, text):
    dense, out = artifact("gpt2")
    command = ["evaluate", str(out), "--against", str(dense), "--data", text, "--length", "16"]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    assert "100 tokens" in done.stdout and "perplexity" in done.stdout and done.stderr == ""
    document = json.loads(CliRunner().invoke(main, [*command, "--json", "--limit", "10"]).stdout)
    assert document["task"] == "causal" and document["count"] < 100 and document["units"] == 10
    assert document["metrics"]["perplexity"]["low"] <= document["metrics"]["perplexity"]["value"]
    few = CliRunner().invoke(main, [*command, "--limit", "9"])
    assert "(no interval)" in few.stdout and "it takes at least 10 windows, the data give 9." in few.stdout


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"length": 16, "stride": 17}, RunError, "stride is 17 with length 16; expected at most the length"),
        ({"stride": 10_000}, RunError, r"stride is 10000 with length \d+; expected at most the length"),
        ({"length": 10_000}, TrainingError, "length is 10000"),
        ({"data": "missing.txt"}, DataError, "is no file"),
        ({"data": "empty"}, DataError, "no example to score"),
        ({"against": "./missing"}, CheckpointError, "there is no folder './missing'"),
        ({"task": "masked"}, TrainingError, "no mask token"),
    ],
)
def test_a_mistake_is_told(options, error, message, artifact, text, tmp_path):
    _, out = artifact("bert", "AutoModelForMaskedLM") if "task" in options else artifact("gpt2")
    if options.get("data") == "empty":
        (tmp_path / "empty.txt").write_text("w3")
        options = options | {"data": str(tmp_path / "empty.txt")}
    with pytest.raises(error, match=message):
        evaluate(str(out), **({"data": text} | options))
