"""Real trained checkpoints: what the dense model can do, the converted one can."""

import json
import pydoc_data.topics

import pytest
import torch
from helpers.real import load, perplexity, windows_of
from helpers.selection import quick
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from mpoe_convert import Recipe, convert

WAYS = {
    "one-sided": {"layout": "one-sided"},
    "blocks": {"layout": "blocks"},
    "two-sided": {"layout": "two-sided"},
    "balanced, full bonds": {"layout": "balanced", "bond_dim": 10_000},
    "dense": {"kind": "dense"},
}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Converts a checkpoint once per way of converting."""
    done = {}

    def make(source, **options):
        key = (source, *sorted(options.items()))
        if key not in done:
            done[key] = tmp_path_factory.mktemp("real") / "out"
            convert(Recipe(str(source), experts=4, **options), done[key])
        return done[key]

    return make


CAUSAL = {
    # checkpoint: (text, window length, windows, what its SOURCE.md says of the perplexity, at most)
    "gpt2-mix-2m": ("text/mix/heldout_tinystories_heldout.txt", 256, 16, 30.0),
    "llama-stories260k": ("text/tinystories/tinystories_train_head_944k.txt", 256, 16, 8.0),
}


@pytest.mark.parametrize("way", quick(WAYS, lambda way: way in ("blocks", "two-sided", "dense")))
@pytest.mark.parametrize("name", CAUSAL)
def test_perplexity_stays(name, way, test_data, folder_of):
    text, length, count, limit = CAUSAL[name]
    source = test_data / "checkpoints" / name
    windows = windows_of(source, (test_data / text).read_text(encoding="utf-8"), length, count)
    dense = perplexity(load(source), windows)
    assert dense < limit  # the model and the text belong together
    model = load(folder_of(source, noise=0.0, **WAYS[way]))
    assert perplexity(model, windows) == pytest.approx(dense, rel=1e-5)
    core = next(p for n, p in model.named_parameters() if ".central_" in n or ".aux_0" in n)
    with torch.no_grad():
        core.mul_(1.1)
    assert perplexity(model, windows) != pytest.approx(dense, rel=1e-4)


@pytest.mark.parametrize("name", CAUSAL)
def test_default_noise_costs_less_than_one_per_cent_of_perplexity(name, test_data, folder_of):
    text, length, count, _ = CAUSAL[name]
    source = test_data / "checkpoints" / name
    windows = windows_of(source, (test_data / text).read_text(encoding="utf-8"), length, count)
    dense = perplexity(load(source), windows)
    assert perplexity(load(folder_of(source)), windows) == pytest.approx(dense, rel=0.01)


@pytest.mark.slow
def test_a_language_model_of_135_million_parameters_stays_what_it_is(test_data, folder_of):
    """SmolLM2, as examples/benchmarks/make_smollm2.py makes it."""
    source = test_data / "checkpoints/smollm2-135m"
    if not source.exists():
        pytest.skip(f"{source.name} is not among the checkpoints")
    windows = windows_of(source, "\n\n".join(pydoc_data.topics.topics.values()), 256, 8)
    dense = perplexity(load(source), windows)
    assert dense < 25
    assert perplexity(load(folder_of(source, noise=0.0)), windows) == pytest.approx(dense, rel=1e-5)
    assert perplexity(load(folder_of(source)), windows) == pytest.approx(dense, rel=0.02)


def test_truncated_balanced_model_is_broken_and_the_report_says_so(test_data, folder_of):
    source = test_data / "checkpoints/gpt2-mix-2m"
    text = (test_data / CAUSAL["gpt2-mix-2m"][0]).read_text(encoding="utf-8")
    windows = windows_of(source, text, 256, 16)
    folder = folder_of(source, layout="balanced", bond_dim=16)
    report = json.loads((folder / "conversion_report.json").read_text())
    assert any("will not work before it is retrained" in warning for warning in report["warnings"])
    assert perplexity(load(folder), windows) > 3 * perplexity(load(source), windows)


def test_process_chains_stay_exactly_right(test_data, folder_of):
    source = test_data / "checkpoints/gpt2-capp-225k"
    tokenizer = AutoTokenizer.from_pretrained(source)
    lines = (test_data / "text/capp/greedy_teacher_7840.txt").read_text().splitlines()[::80]
    model = load(folder_of(source, noise=0.0))
    exact = 0
    for line in lines:
        tokens = tokenizer(line, return_tensors="pt").input_ids
        with torch.no_grad():
            predicted = model(tokens).logits.argmax(-1)
        # Six part features and <SOS> are the prompt; the rest is what the dense model says greedily.
        exact += torch.equal(predicted[:, 6:-1], tokens[:, 7:])
    assert exact == len(lines)


def g2p_pairs(test_data, name: str, count: int) -> list[tuple[str, str]]:
    lines = (test_data / "text/g2p" / name).read_text(encoding="utf-8").splitlines()
    return [tuple(line.split("\t")[:2]) for line in lines[:: len(lines) // count][:count]]


@pytest.mark.parametrize("way", ["one-sided", "two-sided", "dense"])
def test_t5_spells_the_same_phonemes(way, test_data, folder_of):
    source = test_data / "checkpoints/t5-g2p-en-us"
    tokenizer = AutoTokenizer.from_pretrained(source)
    pairs = g2p_pairs(test_data, "t5_test.tsv", 100)
    inputs = tokenizer([word for word, _ in pairs], return_tensors="pt", padding=True)

    def answers(folder) -> list[str]:
        model = load(folder, AutoModelForSeq2SeqLM)
        tokens = model.generate(**inputs, max_new_tokens=40, num_beams=1, do_sample=False)
        return [text.replace(" ", "") for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]

    dense = answers(source)
    right = sum(a == p.replace(" ", "") for a, (_, p) in zip(dense, pairs, strict=True))
    assert right > 35  # of 100; SOURCE.md has 50.9 % on all 3,000
    assert answers(folder_of(source, noise=0.0, **WAYS[way])) == dense


def test_bart_is_as_often_right(test_data, folder_of):
    source = test_data / "checkpoints/bart-misaki-g2p-us"
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    pairs = g2p_pairs(test_data, "us_silver_idx10.tsv", 200)

    def ids(text, characters):
        return torch.tensor([[1, *(characters.index(c) for c in text if c in characters), 2]])

    def whole_words_right(folder) -> tuple[int, float]:
        model, right, loss = load(folder, AutoModelForSeq2SeqLM), 0, 0.0
        for word, phonemes in pairs:
            source_ids = ids(word, config["grapheme_chars"])
            labels = ids(phonemes, config["phoneme_chars"])
            with torch.no_grad():
                out = model(input_ids=source_ids, labels=labels)
            right += torch.equal(out.logits.argmax(-1)[:, 1:], labels[:, 1:])
            loss += out.loss.item()
        return right, loss

    dense, converted = whole_words_right(source), whole_words_right(folder_of(source, noise=0.0))
    assert dense[0] > 140  # SOURCE.md: 79.8 %
    assert converted[0] == dense[0]
    assert converted[1] == pytest.approx(dense[1], rel=1e-4)
