"""Scores of every task: their rows, their bootstrap samples, and a new one."""

import json

import numpy as np
import pytest
import sacrebleu
from helpers.data import rows, write

from mpoe_convert import evaluate
from mpoe_convert.artifact.loading import AUTO_CLASSES
from mpoe_convert.source import texts
from mpoe_convert.training.tasks import TASKS, Score, Seq2Seq

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")

# By task, what a model may have done with a few examples.
OUTCOMES = {
    "causal": [(3.5, 2), (8.25, 7), (0.5, 1), (6.0, 5)],
    "masked": [(3.5, 2, 1), (8.25, 7, 3), (0.5, 1, 1), (6.0, 5, 0)],
    "seq2seq": [
        ("the old mill stands here", "the old mill stands here"),
        ("the old mill fell down", "the old mill stands by the river"),
        ("a dog barks at night .", "a dog barks"),
        ("nothing at all of that", "something else is said"),
    ],
    "classification": [(0, 0), (1, 0), (2, 2), (1, 1)],
}
SCORES = [(task.name, score) for task in TASKS.values() for score in task.scores]


def test_every_task_is_known_by_one_name():
    assert TASKS.keys() == set(texts.TASKS) == AUTO_CLASSES.keys() == OUTCOMES.keys()
    for task in TASKS.values():
        assert len({score.name for score in task.scores}) == len(task.scores)


@pytest.mark.parametrize(("task", "score"), SCORES, ids=lambda value: getattr(value, "name", value))
def test_a_sample_is_scored_as_its_examples_are(task, score):
    """Rows of the statistics stand for the examples themselves, however often a sample has them."""
    outcomes = OUTCOMES[task]
    statistics = score.statistics(outcomes)
    assert len(statistics) == len(outcomes)
    values = set()
    for sample in ([0, 1, 2, 3], [3, 3, 1, 0], [2, 2, 2, 2]):
        expected = score.function(score.statistics([outcomes[i] for i in sample]))
        assert score.function(statistics[sample]) == pytest.approx(expected, rel=1e-12)
        values.add(expected)
    assert len(values) > 1


def test_scores_by_hand():
    found = {name: {} for name in TASKS}
    for task, score in SCORES:
        found[task][score.name] = score.function(score.statistics(OUTCOMES[task]))
    assert found["causal"]["perplexity"] == pytest.approx(np.exp(18.25 / 15))
    assert found["masked"] == pytest.approx({"perplexity": np.exp(18.25 / 15), "accuracy": 5 / 15})
    predictions, targets = zip(*OUTCOMES["seq2seq"], strict=True)
    assert found["seq2seq"]["exact_match"] == 0.25
    assert found["seq2seq"]["bleu"] == pytest.approx(sacrebleu.corpus_bleu(predictions, [targets]).score)
    assert found["seq2seq"]["chrf"] == pytest.approx(sacrebleu.corpus_chrf(predictions, [targets]).score)
    # Longest common subsequences have 5, 3, 3 and 0 words; the texts 5, 5, 5, 5 and 5, 7, 3, 4.
    measures = [1, 2 * 3 / (5 + 7), 2 * 3 / (5 + 3), 0]
    assert found["seq2seq"]["rouge_l"] == pytest.approx(100 * np.mean(measures))
    # F1 of the classes: 2 * 1 / (2 + 1) for 0 and 1, and 1 for 2.
    assert found["classification"] == pytest.approx({"accuracy": 0.75, "f1": (2 / 3 + 2 / 3 + 1) / 3})


def test_a_score_is_one_row(artifact, tmp_path, monkeypatch):
    """A row is all that evaluation, report and card need."""

    def words(outcomes) -> np.ndarray:
        return np.array([len(target.split()) for _, target in outcomes], dtype=float)

    row = Score("target_words", lambda found: float(found.mean()), words, hub="wc", label="Words in a target")
    monkeypatch.setattr(Seq2Seq, "scores", (*Seq2Seq.scores, row))
    _, out = artifact("t5", noise=0.1)
    data = write(tmp_path / "data.jsonl", rows("seq2seq", 10))
    found = evaluate(str(out), data, against=str(out), length=8, record=True)
    assert found.metrics["target_words"].value == 5 and found.differences["target_words"].value == 0
    recorded = json.loads((out / "evaluation_report.json").read_text())["evaluations"][-1]
    alike = "no interval: it does not vary over the 10 examples"
    assert recorded["metrics"]["target_words"] == {"value": 5.0, "low": None, "high": None, "note": alike}
    card = (out / "README.md").read_text()
    assert "| Words in a target | 5 (no interval) |" in card and "type: wc" in card
    [told] = [line for line in card.splitlines() if line.endswith(f"{alike}.")]
    assert "target_words" in told
