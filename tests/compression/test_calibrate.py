"""Moments from the model that walks in step, against hooks on the stock model in memory."""

import gc
import json
import math
import re
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from helpers.calibration import ONE_OF_EACH, batches_for
from helpers.models import generative
from helpers.tiny import HIDDEN, save_tiny, save_tokenizer
from torch import nn
from transformers.pytorch_utils import Conv1D

from mpoe_convert import Recipe, convert, plan
from mpoe_convert.compression.calibrate import _Walk, calibrate
from mpoe_convert.errors import CheckpointError, DataError, RecipeError
from mpoe_convert.planning.plan import plan_checkpoint
from mpoe_convert.source.checkpoint import open_checkpoint

CPU = torch.device("cpu")


def expected_moments(folder, auto_class, checkpoint, batches):
    """(the plan, (inputs, outputs without bias) of every projection on the batches, by the weight's name)."""
    model = getattr(transformers, auto_class).from_pretrained(folder, dtype="auto").eval()
    planned = plan_checkpoint(Recipe(str(folder), bond_dim=4), checkpoint)
    seen, batch = {}, {}
    with_weight = [module for module in model.modules() if isinstance(module, (nn.Linear, Conv1D))]

    def hook(source, path):
        def note(module, args, output):
            x, y = args[0].reshape(-1, args[0].shape[-1]), output.reshape(-1, output.shape[-1])
            if module.bias is not None:
                y = y - module.bias
            mask = batch.get("attention_mask")
            decoder = model.config.is_encoder_decoder and path.startswith("decoder")
            if mask is not None and not decoder:
                x, y = x[mask.reshape(-1) > 0], y[mask.reshape(-1) > 0]
            if source.part is not None:
                y = y.chunk(2, -1)[source.part]
            seen.setdefault((source.weight, source.part), []).append((x.detach(), y.detach()))

        return note

    for ffn in planned.ffns:
        for source in ffn.ffn.projections.values():
            weight = checkpoint.read(source.weight)
            module = next(m for m in with_weight if torch.equal(m.weight, weight))
            module.register_forward_hook(hook(source, ffn.ffn.path))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    return planned, {key: [torch.cat(part) for part in zip(*rows, strict=True)] for key, rows in seen.items()}


def moment(rows):
    return rows.mT @ rows / len(rows)


@pytest.mark.parametrize("model_type", ONE_OF_EACH)
def test_moments_are_those_of_the_stock_model(model_type, tmp_path):
    auto_class = generative(model_type)
    folder = save_tiny(model_type, auto_class, tmp_path / "dense")
    checkpoint = open_checkpoint(str(folder))
    model = getattr(transformers, auto_class).from_pretrained(folder)
    batches = batches_for(model, auto_class)
    planned, expected = expected_moments(folder, auto_class, checkpoint, batches[:-1])
    _, held_out = expected_moments(folder, auto_class, checkpoint, batches[-1:])
    found = calibrate(planned, checkpoint, CPU, batches)
    for ffn in planned.ffns:
        moments = found.load(ffn.ffn.path)
        for matrix in ffn.matrices:
            key = (matrix.source.weight, matrix.source.part)
            inputs, outputs = expected[key]
            place = "inner" if matrix.role == "down" else "inputs"
            ours, theirs = (
                (moments.tensors[place], moment(inputs))
                if matrix.rows <= matrix.cols
                else (moments.tensors[f"{matrix.role}.outputs"], moment(outputs))
            )
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))
            scale = moments.tensors[f"{place}.scale"]
            torch.testing.assert_close(scale, inputs.square().mean(0), rtol=1e-4, atol=1e-6)
            weight = torch.randn(matrix.rows, matrix.cols, generator=torch.Generator().manual_seed(0))
            kept = held_out[key][0]
            error = (kept @ weight * 0.5).norm() / (kept @ weight).norm()
            assert abs(moments.output_error(matrix, weight, weight / 2) - error) < 1e-3


def test_chains_with_cut_bonds_take_moments_of_wide_inputs_too(tmp_path):
    folder = save_tiny("gpt2", "AutoModelForCausalLM", tmp_path / "dense")
    checkpoint = open_checkpoint(str(folder))
    batches = batches_for(transformers.AutoModelForCausalLM.from_pretrained(folder), "AutoModelForCausalLM")
    _, expected = expected_moments(folder, "AutoModelForCausalLM", checkpoint, batches[:-1])
    planned = plan_checkpoint(Recipe(str(folder), layout="balanced", bond_dim=2), checkpoint)
    found = calibrate(planned, checkpoint, CPU, batches)
    for ffn in planned.ffns:
        for matrix in ffn.matrices:
            theirs = moment(expected[matrix.source.weight, None][0])
            ours = found.load(ffn.ffn.path).of_inputs(matrix, "outputs")
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


@pytest.fixture
def llama(tmp_path):
    """(folder, checkpoint, plan, batches) of a tiny Llama."""
    folder = save_tiny("llama", "AutoModelForCausalLM", tmp_path / "dense")
    save_tokenizer(folder)
    checkpoint = open_checkpoint(str(folder))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    planned = plan_checkpoint(Recipe(str(folder), bond_dim=4), checkpoint)
    return folder, checkpoint, planned, batches_for(model, "AutoModelForCausalLM")


def test_a_second_run_reads_what_the_first_found(llama, monkeypatch):
    _, checkpoint, planned, batches = llama
    first = calibrate(planned, checkpoint, CPU, batches)
    monkeypatch.setattr(_Walk, "run", lambda *_: pytest.fail("the model ran again"))
    assert calibrate(planned, checkpoint, CPU, batches).folder == first.folder


def test_other_weights_and_other_text_are_other_moments(llama, tmp_path):
    folder, checkpoint, planned, batches = llama
    first = calibrate(planned, checkpoint, CPU, batches).folder
    assert calibrate(planned, checkpoint, CPU, batches[::-1]).folder != first
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    model.save_pretrained(folder)
    assert calibrate(planned, open_checkpoint(str(folder)), CPU, batches).folder != first


def test_an_interrupted_run_goes_on(llama, tmp_path, monkeypatch):
    _, checkpoint, planned, batches = llama
    whole = calibrate(planned, checkpoint, CPU, batches)
    expected = [whole.load(path).tensors for path in whole.paths]
    whole.file(whole.paths[1]).unlink()
    kept = whole.file(whole.paths[0]).stat().st_mtime_ns

    def stop(path, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(planned, checkpoint, CPU, batches, progress=stop)
    assert whole.file(whole.paths[1]).is_file()  # this FFN was done when the run was stopped
    whole.file(whole.paths[1]).unlink()
    again = calibrate(planned, checkpoint, CPU, batches)
    assert whole.file(whole.paths[0]).stat().st_mtime_ns == kept
    for path, tensors in zip(again.paths, expected, strict=True):
        assert again.load(path).tensors.keys() == tensors.keys()
        for name, tensor in again.load(path).tensors.items():
            torch.testing.assert_close(tensor, tensors[name])


def test_only_one_ffn_is_summed_at_a_time(llama, monkeypatch):
    _, checkpoint, planned, batches = llama
    counts = []
    original = _Walk._leave

    def leave(self, path, on_done):
        counts.append(sum(bool(sums.sums) for sums in self.sums.values()))
        original(self, path, on_done)

    monkeypatch.setattr(_Walk, "_leave", leave)
    calibrate(planned, checkpoint, CPU, batches[1:])
    assert counts == [1, 1]


def test_a_model_that_computes_nan_is_told_with_the_place(llama):
    folder, _, planned, batches = llama
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(3e38)
    model.save_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"layers\.0 \(inner\) hold NaN or Inf"):
        calibrate(planned, open_checkpoint(str(folder)), CPU, batches)
    gc.collect()


def test_too_little_text(llama, tmp_path):
    folder, checkpoint, planned, batches = llama
    with pytest.raises(DataError, match="has 1 batch; expected two or more"):
        calibrate(planned, checkpoint, CPU, batches[:1])
    small = [{name: part[:1, :3] for name, part in batch.items()} for batch in batches]
    with pytest.raises(DataError, match=f"the {HIDDEN} that moments of {HIDDEN} features need"):
        calibrate(planned, checkpoint, CPU, small)
    text = tmp_path / "short.txt"
    text.write_text("w3 w4 w5 " * 100)
    with pytest.raises(DataError, match="has 256 tokens in blocks of 64; expected the 65,536"):
        plan(Recipe(str(folder), bond_dim=4, keep=2.5, calibrate=(str(text),)))


def test_text_becomes_blocks_spread_over_all_files(llama, tmp_path):
    folder, _, _, _ = llama
    paths = []
    for number in (3, 4):
        paths.append(tmp_path / f"{number}.txt")
        paths[-1].write_text(f"w{number} " * 6400)
    from mpoe_convert.compression.batches import make_batches

    recipe = Recipe(str(folder), keep=2.5, calibrate=tuple(map(str, paths)), calibration_tokens=640)
    batches = make_batches(recipe, open_checkpoint(str(folder)))
    ids = torch.cat([batch["input_ids"] for batch in batches])
    assert ids.shape == (10, 64)
    assert (ids == 3).all(1).sum() == 5 and (ids == 4).any(1).sum() == 5


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
    from mpoe_convert.compression.batches import make_batches

    checkpoint = open_checkpoint(str(folder))
    batches = make_batches(recipe, checkpoint)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert 900 <= tokens < 950 and all((batch["labels"] != -100).any() for batch in batches)
    report = convert(recipe, tmp_path / "out")
    assert all(matrix.output_error is not None for matrix in report.matrices)


def test_of_answers_to_prompts_only_the_answers_count(llama, tmp_path):
    from mpoe_convert.compression.batches import make_batches, split

    folder, checkpoint, _, _ = llama
    path = tmp_path / "answers.jsonl"
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
        assert ((labels == 2).sum(1) == 1).all()  # the end is a part of the answer
    report = convert(recipe, tmp_path / "out")
    assert report.divergence.tokens == sum(int((b["labels"] != -100).sum()) for b in split(batches)[1])
    with pytest.raises(DataError, match="expected the 65,536 of --calibration-tokens"):
        make_batches(Recipe(str(folder), **options), checkpoint)


TEXTS = [{"text": "w3 " * 40, "target": "w4"}] * 40
WITHOUT_TARGETS = {
    "numbers": ([row | {"target": 4} for row in TEXTS], {}),
    "objects": ([row | {"target": {"a": "w4"}} for row in TEXTS], {}),
    "one column for both": (TEXTS, {"target_column": "text"}),
}


@pytest.mark.parametrize("case", WITHOUT_TARGETS)
def test_without_targets_texts_are_read(case, llama, tmp_path):
    from mpoe_convert.compression.batches import make_batches

    rows, options = WITHOUT_TARGETS[case]
    recipe = answers_recipe(llama[0], tmp_path, [rows], **options)
    assert {tuple(batch) for batch in make_batches(recipe, llama[1])} == {("input_ids",)}


BROKEN_TARGETS = {
    "a misspelt column": ([TEXTS], {"target_column": "targte"}, "calibration needs ['targte'] as well"),
    "one is missing": ([[*TEXTS, {"text": "w3", "target": None}]], {}, "has 1 rows without target"),
    "a file has none": ([TEXTS, [{"text": "w3"}]], {}, "needs ['target'] as well"),
    "no room": ([[row | {"text": "w3 " * 99} for row in TEXTS]], {}, "every text alone fills 64 tokens"),
}


@pytest.mark.parametrize("case", BROKEN_TARGETS)
def test_answers_do_not_vanish(case, llama, tmp_path):
    from mpoe_convert.compression.batches import make_batches

    files, options, message = BROKEN_TARGETS[case]
    with pytest.raises(DataError, match=re.escape(message)):
        make_batches(answers_recipe(llama[0], tmp_path, files, **options), llama[1])


def answers_recipe(folder, tmp_path, files, **options):
    paths = [tmp_path / f"{number}.jsonl" for number in range(len(files))]
    for path, rows in zip(paths, files, strict=True):
        path.write_text("\n".join(map(json.dumps, rows)))
    given = {"bond_dim": 2, "keep": 1.0, "calibrate": tuple(map(str, paths)), "calibration_tokens": 900}
    return Recipe(str(folder), **given | options)


def test_a_token_across_prompt_and_answer_belongs_to_the_answer():
    """And one that the tokenizer adds behind a text ends the answer, not the prompt."""
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
        plan(Recipe(str(folder), bond_dim=4, keep=2.0, calibrate=("builtin",)))


def test_a_model_that_reads_no_text(tmp_path):
    folder = save_tiny("vit", "AutoModelForImageClassification", tmp_path / "dense")
    with pytest.raises(RecipeError, match="reads pixel_values"):
        plan(Recipe(str(folder), bond_dim=4, keep=2.0, calibrate=("builtin",)))


@pytest.mark.parametrize("kind", ["bin", "bfloat16"])
def test_other_files_and_dtypes(kind, llama, tmp_path):
    folder, _, _, batches = llama
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    if kind == "bin":
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    else:
        model.bfloat16().save_pretrained(folder)
    checkpoint = open_checkpoint(str(folder))
    planned, expected = expected_moments(folder, "AutoModelForCausalLM", checkpoint, batches[:-1])
    found = calibrate(planned, checkpoint, CPU, batches)
    for ffn in planned.ffns:
        up = next(m for m in ffn.matrices if m.role == "up")
        theirs = moment(expected[up.source.weight, None][0].float())
        ours = found.load(ffn.ffn.path).tensors["inputs"]
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))


# ---------------------------------------------------------------------------------------------------
# Gradients


@pytest.mark.parametrize("model_type", ["gpt2", "bert", "t5", "bart", "vit", "llama", "phi3"])
def test_answers_are_gradients_on_the_thin_side(model_type, tmp_path):
    """Of a plain FFN that of up's inputs is what autograd itself gives; of down that of its outputs."""
    from mpoe_convert.compression.batches import says_next
    from mpoe_convert.compression.fisher import _own_loss, _pieces
    from mpoe_convert.compression.stream import projection_modules

    auto_class = generative(model_type)
    folder = save_tiny(model_type, auto_class, tmp_path / "dense")
    checkpoint = open_checkpoint(str(folder))
    model = getattr(transformers, auto_class).from_pretrained(folder).eval()
    batches = batches_for(model, auto_class)
    planned = plan_checkpoint(Recipe(str(folder), bond_dim=4), checkpoint)
    found = calibrate(planned, checkpoint, CPU, batches, gradients=True)
    gradients, kept = {}, []
    for ffn in planned.ffns:
        modules = projection_modules(model, planned.family, ffn)

        def note(module, args, output, key):
            for name, tensor in (("in", args[0]), ("out", output)):
                tensor.retain_grad()
                kept.append(((*key, name), tensor))

        for role in ("up", "down"):
            hook = partial(note, key=(ffn.ffn.path, role))
            modules[role].register_forward_hook(hook)
    generator, tokens = torch.Generator().manual_seed(0), 0
    for piece in _pieces(batches):
        kept.clear()
        loss, count = _own_loss(model, piece, generator, says_next(checkpoint))
        loss.backward()
        tokens += count
        for key, tensor in kept:
            gradients.setdefault(key, []).append(tensor.grad.reshape(-1, tensor.shape[-1]))
    for ffn in planned.ffns:
        tensors = found.load(ffn.ffn.path).tensors
        rows = torch.cat(gradients[ffn.ffn.path, "down", "out"])
        theirs = rows.mT @ rows / tokens
        torch.testing.assert_close(tensors["down.answer"], theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max())
        mean = rows.square().mean(1).sum() / tokens
        torch.testing.assert_close(tensors["down.answer_mean"], mean, rtol=1e-3, atol=1e-12)
        if "gate" in ffn.ffn.projections:
            assert tensors["up.answer"].shape == tensors["gate.answer"].shape
            assert not torch.equal(tensors["up.answer"], tensors["gate.answer"])
            continue
        if model_type in ("bert", "bart"):  # what goes into up goes past it, too
            continue
        rows = torch.cat(gradients[ffn.ffn.path, "up", "in"])
        theirs = rows.mT @ rows / tokens
        torch.testing.assert_close(tensors["up.answer"], theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max())


@pytest.mark.parametrize("model_type", ["gpt2", "bert", "distilbert"])
def test_gradients_of_what_the_labels_count(model_type, tmp_path):
    """The loss is a sum over those places; behind the last attention other places have no gradient."""
    from mpoe_convert.compression.fisher import _own_loss

    auto_class = generative(model_type) if model_type == "gpt2" else "AutoModelForMaskedLM"
    folder = save_tiny(model_type, auto_class, tmp_path / "dense")
    model = getattr(transformers, auto_class).from_pretrained(folder).eval()
    batch = batches_for(model, auto_class, 1)[0]
    batch["attention_mask"][1, :3] = 0  # labels of padding do not count, nor is it told what follows padding
    batch["labels"] = torch.full_like(batch["input_ids"], 7)
    batch["labels"][1:, 5:] = -100
    seen = []
    plan_of = plan_checkpoint(Recipe(str(folder), bond_dim=4), open_checkpoint(str(folder)))
    last = model.base_model.get_submodule(plan_of.ffns[-1].ffn.path)
    last.register_forward_hook(lambda m, a, out: seen.append(out[0] if isinstance(out, tuple) else out))
    model.base_model.register_forward_hook(lambda m, a, out: seen[0].retain_grad())
    loss, count = _own_loss(model, batch, torch.Generator().manual_seed(0), model_type == "gpt2")
    loss.backward()
    length, shift = batch["labels"].shape[1], int(model_type == "gpt2")
    places = [
        range(length - 3 - shift),
        range(3, 5 - shift),
        *[range(5 - shift)] * (len(batch["labels"]) - 2),
    ]
    expected = torch.zeros_like(batch["labels"], dtype=torch.bool)
    for row, counted in enumerate(places):
        expected[row, list(counted)] = True
    assert count == int(expected.sum())
    assert torch.equal(seen[0].grad.abs().sum(-1) > 0, expected)


def test_the_models_own_loss_is_of_odds_at_temperature_two(llama):
    """The gradient of the logits is those odds minus one for what was drawn."""
    from mpoe_convert.compression.fisher import _own_loss

    folder, _, _, batches = llama
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    model.lm_head.weight.data *= 10  # so that it is sure of something
    batch = {"input_ids": torch.full((5000, 1), 7)}
    seen = []
    model.lm_head.register_forward_hook(lambda m, a, out: (out.retain_grad(), seen.append(out))[0])
    loss, count = _own_loss(model, batch, torch.Generator().manual_seed(0), True)
    loss.backward()
    drawn = (seen[0] / 2).softmax(-1) - seen[0].grad
    assert count == batch["input_ids"].numel()
    torch.testing.assert_close(drawn.sum(-1), torch.ones(drawn.shape[:-1]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(drawn.amax(-1), torch.ones(drawn.shape[:-1]), rtol=1e-5, atol=1e-5)
    odds = (seen[0][0, 0] / 2).softmax(-1)
    assert 0.2 < odds.max() < 0.9
    errors = (odds * (1 - odds) / len(drawn)).sqrt()
    assert ((drawn.mean((0, 1)) - odds).abs() < 5 * errors + 1e-4).all()


def test_padding_of_a_model_without_a_head_answers_nothing(tmp_path):
    from mpoe_convert.compression.fisher import _own_loss

    folder = save_tiny("bert", "AutoModel", tmp_path / "dense")
    model = transformers.AutoModel.from_pretrained(folder).eval()
    batch = batches_for(model, "AutoModel", 1)[0]
    outputs = []
    model.encoder.register_forward_hook(lambda m, a, out: outputs.append(out[0]))
    model.encoder.register_forward_hook(lambda m, a, out: outputs[0].retain_grad())
    loss, count = _own_loss(model, batch, torch.Generator().manual_seed(0), False)
    loss.backward()
    assert count == int(batch["attention_mask"].sum()) < batch["attention_mask"].numel()
    assert torch.equal(outputs[0].grad.abs().sum(-1) > 0, batch["attention_mask"] > 0)


def test_labels_that_count_nothing(llama, tmp_path):
    folder, checkpoint, planned, batches = llama
    nothing = torch.full_like(batches[0]["input_ids"], -100)
    given = [batch | {"labels": batch["input_ids"]} for batch in batches]
    for blind, where in ((slice(0, -1), "beside those held out"), (slice(-1, None), "that are held out")):
        some = list(given)
        some[blind] = [batch | {"labels": nothing} for batch in some[blind]]
        with pytest.raises(DataError, match=f"the labels of the calibration batches {where} leave out every"):
            calibrate(planned, checkpoint, CPU, some)
    first = nothing.clone()
    first[:, 0] = 7  # of which nothing is said
    for number, (metric, where) in enumerate({"loss": "gradients are taken", "outputs": "compared"}.items()):
        recipe = Recipe(str(folder), bond_dim=2, keep=2.0, metric=metric)
        with pytest.raises(DataError, match=f"{where}.* leave out every place"):
            convert(recipe, tmp_path / str(number), calibration=[b | {"labels": first} for b in batches])
        assert not (tmp_path / str(number)).exists()
    calibrate(planned, checkpoint, CPU, [batches[0] | {"labels": nothing}, *batches[1:]], gradients=True)


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
def test_which_models_say_the_next_token(config, found):
    """Code of its own, which need not be run for it, or may lack what `generate` needs, included."""
    from mpoe_convert.compression.batches import says_next
    from mpoe_convert.source.checkpoint import Checkpoint

    assert says_next(Checkpoint("x", Path("x"), None, config, {})) is found


def test_gradients_that_are_no_numbers_are_not_kept(llama, monkeypatch):
    from mpoe_convert.compression import fisher

    _, checkpoint, planned, batches = llama
    original = fisher._own_loss
    monkeypatch.setattr(fisher, "_own_loss", lambda *a: (original(*a)[0] * math.nan, 1))
    with pytest.raises(CheckpointError, match=r"layers\.\d \(gradients, "):
        calibrate(planned, checkpoint, CPU, batches[:3], gradients=True)
    monkeypatch.undo()
    found = calibrate(planned, checkpoint, CPU, batches[:3], gradients=True)
    assert all(found.load(path).tensors["up.answer"].isfinite().all() for path in found.paths)


def test_no_code_of_the_source_runs_and_its_absence_is_no_trouble(llama, tmp_path):
    folder, _, planned, batches = llama
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"}
    (folder / "config.json").write_text(json.dumps(config))
    text = tmp_path / "text.txt"
    text.write_text("w3 w4 w5 " * 1000)
    recipe = Recipe(str(folder), experts=2, bond_dim=2, keep=0.8)
    planned = plan(recipe.replace(calibrate=(str(text),), calibration_tokens=1024))
    assert planned.budget.tokens == 1024
    marker = tmp_path / "ran"
    (folder / "configuration_x.py").write_text(f"open({str(marker)!r}, 'w')")
    plan(recipe.replace(calibrate=(str(text),), calibration_tokens=512))
    assert not marker.exists()


def test_layers_that_stay_dense_are_read_block_by_block_too(llama, monkeypatch):
    from mpoe_convert.compression.stream import streamed_model

    folder, checkpoint, _, _ = llama
    planned = plan_checkpoint(Recipe(str(folder), bond_dim=4, layers="0"), checkpoint)
    with streamed_model(planned, checkpoint, CPU) as model:
        layers = [all(p.is_meta for p in layer.parameters()) for layer in model.model.layers]
    assert layers == [True, True]


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


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "t5", "bart"])
def test_nothing_is_cached_for_generation(model_type, tmp_path):
    from mpoe_convert.compression.stream import run_batch, streamed_model

    auto_class = generative(model_type)
    folder = save_tiny(model_type, auto_class, tmp_path / "dense")
    checkpoint = open_checkpoint(str(folder))
    stock = getattr(transformers, auto_class).from_pretrained(folder)
    batch = batches_for(stock, auto_class)[0]
    assert stock(**batch).get("past_key_values") is not None
    planned = plan_checkpoint(Recipe(str(folder), bond_dim=4), checkpoint)
    with streamed_model(planned, checkpoint, CPU) as model, torch.no_grad():
        assert run_batch(model, batch).get("past_key_values") is None
