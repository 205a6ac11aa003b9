"""Calibration text as batches, and which of their tokens are scored."""

import json
import re
from pathlib import Path

import pytest
import torch
from helpers.calibration import calibrated
from helpers.tiny import save_tiny, save_tokenizer

from mpoe_convert import Recipe, convert, plan
from mpoe_convert.compression.batches import check_batches, is_causal, make_batches, split
from mpoe_convert.errors import DataError, RecipeError
from mpoe_convert.source.checkpoint import Checkpoint, open_checkpoint


def test_text_becomes_blocks_spread_over_all_files(llama, tmp_path):
    folder, _, _, _ = llama
    paths = []
    for number in (3, 4):
        paths.append(tmp_path / f"{number}.txt")
        paths[-1].write_text(f"w{number} " * 6400)
    recipe = Recipe(str(folder), keep=1.2, calibrate=tuple(map(str, paths)), calibration_tokens=640)
    batches = make_batches(recipe, open_checkpoint(str(folder)))
    ids = torch.cat([batch["input_ids"] for batch in batches])
    assert ids.shape == (10, 64)
    assert (ids == 3).all(1).sum() == 5 and (ids == 4).any(1).sum() == 5


def test_as_many_tokens_are_read_as_asked_or_the_smallest_number_is_told(llama, tmp_path):
    folder, checkpoint, _, _ = llama
    (tmp_path / "text.txt").write_text("w3 " * 640)
    recipe = Recipe(str(folder), keep=1.0, calibrate=tmp_path / "text.txt", calibration_tokens=128)
    assert sum(batch["input_ids"].numel() for batch in make_batches(recipe, checkpoint)) == 128
    said = "calibration_tokens is 127; expected at least 128: 2 blocks of 64, of which one is held out"
    with pytest.raises(RecipeError, match=said):
        make_batches(recipe.replace(calibration_tokens=127), checkpoint)


def test_pairs_for_an_encoder_decoder(tmp_path):
    folder = save_tiny("t5", "AutoModelForSeq2SeqLM", tmp_path / "dense")
    save_tokenizer(folder)
    path = tmp_path / "pairs.tsv"
    rows = [f"{'w3 ' * (1 + n % 5)}\t{'w4 ' * (1 + n % 7)}" for n in range(400)]
    path.write_text("text\ttarget\n" + "\n".join(rows) + "\n")
    recipe = Recipe(
        str(folder),
        experts=2,
        bond_dim=2,
        noise=0.0,
        keep=1.0,
        calibrate=(str(path),),
        calibration_tokens=900,
    )
    checkpoint = open_checkpoint(str(folder))
    batches = make_batches(recipe, checkpoint)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert 900 <= tokens < 950 and all((batch["labels"] != -100).any() for batch in batches)
    report = convert(recipe, tmp_path / "out")
    assert all(matrix.output_error is not None for matrix in report.matrices)


def test_only_the_targets_of_prompts_are_scored(llama, tmp_path):
    folder, checkpoint, _, _ = llama
    path = tmp_path / "pairs.jsonl"
    rows = [("w3 " * (1 + n % 5), "w4 " * (1 + n % 7)) for n in range(400)] + [("w5 " * 99, "w4")] * 9
    path.write_text("\n".join(json.dumps({"said": a, "target": b}) for a, b in rows))
    options = {"bond_dim": 2, "keep": 1.0, "calibrate": (str(path),), "text_column": "said"}
    recipe = Recipe(str(folder), **options, calibration_tokens=900)
    batches = make_batches(recipe, checkpoint)
    assert 850 <= sum(int(batch["attention_mask"].sum()) for batch in batches) < 950
    for batch in batches:
        ids, labels = batch["input_ids"], batch["labels"]
        assert torch.equal(labels, ids.masked_fill((ids != 4) & (ids != 2), -100))
        assert not (ids == 5).any()  # no room for what was said to that
        assert ((labels == 2).sum(1) == 1).all()  # the end belongs to the target
    report = convert(recipe, tmp_path / "out")
    assert report.divergence.tokens == sum(int((b["labels"] != -100).sum()) for b in split(batches)[1])
    with pytest.raises(DataError, match="expected the 65,536 of calibration_tokens"):
        make_batches(Recipe(str(folder), **options), checkpoint)


TEXTS = [{"text": "w3 " * 40, "target": "w4"}] * 40


WITHOUT_TARGETS = {
    "numbers": ([row | {"target": 4} for row in TEXTS], {}),
    "objects": ([row | {"target": {"a": "w4"}} for row in TEXTS], {}),
    "one column for both": (TEXTS, {"target_column": "text"}),
}


@pytest.mark.parametrize("case", WITHOUT_TARGETS)
def test_without_targets_texts_are_read(case, llama, tmp_path):
    rows, options = WITHOUT_TARGETS[case]
    recipe = pairs_recipe(llama[0], tmp_path, [rows], **options)
    assert {tuple(batch) for batch in make_batches(recipe, llama[1])} == {("input_ids",)}


BROKEN_TARGETS = {
    "a misspelt column": (
        [TEXTS],
        {"target_column": "targte"},
        "calibration needs targte (name the columns by",
    ),
    "one is missing": ([[*TEXTS, {"text": "w3", "target": None}]], {}, "has 1 row without target"),
    "a file has none": ([TEXTS, [{"text": "w3"}]], {}, "calibration needs target (name the columns by"),
    "no room": ([[row | {"text": "w3 " * 99} for row in TEXTS]], {}, "every text alone fills 64 tokens"),
}


@pytest.mark.parametrize("case", BROKEN_TARGETS)
def test_missing_targets_are_errors(case, llama, tmp_path):
    files, options, message = BROKEN_TARGETS[case]
    with pytest.raises(DataError, match=re.escape(message)):
        make_batches(pairs_recipe(llama[0], tmp_path, files, **options), llama[1])


def pairs_recipe(folder, tmp_path, files, **options):
    paths = [tmp_path / f"{number}.jsonl" for number in range(len(files))]
    for path, rows in zip(paths, files, strict=True):
        path.write_text("\n".join(map(json.dumps, rows)))
    given = {"bond_dim": 2, "keep": 1.0, "calibrate": tuple(map(str, paths)), "calibration_tokens": 900}
    return Recipe(str(folder), **given | options)


def test_a_token_across_prompt_and_target_belongs_to_the_target():
    """A token that the tokenizer adds behind a text ends the target, not the prompt."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, processors
    from transformers import PreTrainedTokenizerFast

    from mpoe_convert.source import texts as corpus

    vocabulary = {"</s>": 0, "a": 1, "b": 2, "c": 3, "bc": 4}
    backend = Tokenizer(models.BPE(vocabulary, [("b", "c")]))
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    rows = Dataset.from_dict({"text": ["ab", "ab", "ab"], "target": ["cb", "ab", ""]})
    found = corpus.answers(rows, tokenizer, corpus.Columns(), 8)
    assert found["input_ids"][:] == [[1, 4, 2, 0], [1, 2, 1, 2, 0], [1, 2, 0]]
    assert found["labels"][:] == [[-100, 4, 2, 0], [-100, -100, 1, 2, 0], [-100, -100, 0]]


def test_an_encoder_decoder_that_classifies(tmp_path):
    folder = save_tiny("bart", "AutoModelForSequenceClassification", tmp_path / "dense")
    save_tokenizer(folder)
    with pytest.raises(RecipeError, match="BartForSequenceClassification reads texts as a whole"):
        plan(Recipe(str(folder), bond_dim=4, keep=1.2, calibrate=("builtin",)))


def test_a_model_that_reads_no_text(tmp_path):
    folder = save_tiny("vit", "AutoModelForImageClassification", tmp_path / "dense")
    with pytest.raises(RecipeError, match="reads pixel_values"):
        plan(Recipe(str(folder), bond_dim=4, keep=1.2, calibrate=("builtin",)))


def test_what_is_no_batch_is_told(llama):
    folder, _, _, batches = llama
    recipe = Recipe(str(folder), bond_dim=2, keep=1.0)
    for wrong in ("text.txt", batches[0]["input_ids"], ["text.txt"], [{}], [{"input_ids": [[1, 2]]}], [3]):
        with pytest.raises(DataError, match="calibration holds .*; expected batches of the model's inputs"):
            plan(recipe, calibration=wrong)
    for few, said in ((batches[0], "1 batch;"), ([], "0 batches;")):
        with pytest.raises(DataError, match=f"calibration has {said} expected two or more"):
            plan(recipe, calibration=few)
    assert plan(recipe, calibration=iter(batches)).budget


def test_labels_that_leave_nothing_to_score(llama, tmp_path):
    folder, checkpoint, planned, batches = llama
    nothing = torch.full_like(batches[0]["input_ids"], -100)
    given = [batch | {"labels": batch["input_ids"]} for batch in batches]
    for blind, where in ((slice(0, -1), "beside those held out"), (slice(-1, None), "that are held out")):
        some = list(given)
        some[blind] = [batch | {"labels": nothing} for batch in some[blind]]
        message = f"all labels in the calibration batches {where} are -100, so nothing can be scored"
        with pytest.raises(DataError, match=message):
            calibrated(planned, checkpoint, some)
    first = nothing.clone()
    first[:, 0] = 7  # no position predicts it
    found = {"loss": "that gradients are taken of", "outputs": "on which models are compared"}
    for number, (metric, where) in enumerate(found.items()):
        recipe = Recipe(str(folder), bond_dim=2, keep=1.2, metric=metric)
        with pytest.raises(DataError, match=f"{where} are -100"):
            convert(recipe, tmp_path / str(number), calibration=[b | {"labels": first} for b in batches])
        assert not (tmp_path / str(number)).exists()
    calibrated(planned, checkpoint, [batches[0] | {"labels": nothing}, *batches[1:]], gradients=True)


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}, "architectures": ["X"]}, True),
        ({"auto_map": {"AutoModelForMaskedLM": "modeling_x.X"}, "architectures": ["X"]}, False),
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, True),
        ({"model_type": "gpt2", "architectures": ["GPT2Model"]}, False),
        ({"model_type": "gpt2", "architectures": ["GPT2ForSequenceClassification"]}, False),
        (
            {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True},
            False,
        ),
    ],
)
def test_which_models_are_causal(config, found):
    """Code of its own, which need not be run for it, or may lack what `generate` needs, included."""
    assert is_causal(Checkpoint("x", Path("x"), None, config, {})) is found


OTHER_HEADS = [("gpt2", "AutoModelForSequenceClassification"), ("bart", "AutoModel"), ("t5", "AutoModel")]


@pytest.mark.parametrize(("model_type", "auto_class"), OTHER_HEADS)
def test_text_for_other_heads(model_type, auto_class, tmp_path):
    folder = save_tiny(model_type, auto_class, tmp_path / "dense")
    save_tokenizer(folder)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{3 + k * k % 30}" for k in range(2000)))
    recipe = Recipe(str(folder), experts=2, bond_dim=2, keep=0.9, calibrate=(str(text),))
    report = convert(recipe.replace(calibration_tokens=1024), tmp_path / "out")
    assert report.divergence.tokens > 0
    assert all(matrix.output_error is not None for matrix in report.matrices)


@pytest.mark.parametrize("batch", ["text", {}, {"input_ids": [1]}, {"ids": torch.tensor(3)}], ids=repr)
def test_what_is_no_batch_of_inputs_is_told(batch, llama):
    with pytest.raises(DataError, match="expected batches of the model's inputs"):
        check_batches([batch], llama[1])
