"""Encoder-decoders that are pairs of two models of one row, such as bert2bert."""

import re

import pytest
import torch
import transformers
from helpers.models import assert_same_outputs, break_one_ffn, load_pair
from helpers.tiny import LAYERS, make_config, make_inputs

from mpoe_convert import Export, Recipe, convert, export, plan, verify
from mpoe_convert.errors import FamilyError

AUTO = "AutoModelForSeq2SeqLM"
SMALL = {"experts": 3, "bond_dim": 4, "noise": 0.0}


def save_pair(encoder: str, decoder: str, folder):
    parts = [make_config(encoder), make_config(decoder)]
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(
        *parts, decoder_start_token_id=1, pad_token_id=0, eos_token_id=2
    )
    torch.manual_seed(0)
    model = transformers.EncoderDecoderModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
        model.tie_weights()
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("pair", ["bert bert", "roberta roberta", "bert roberta"])
def test_a_pair_computes_what_the_stock_pair_computes(pair, tmp_path):
    encoder, decoder = pair.split()
    folder = save_pair(encoder, decoder, tmp_path / "dense")
    report = convert(Recipe(str(folder), **SMALL), tmp_path / "out")
    paths = [f"encoder.encoder.layer.{i}" for i in range(LAYERS)]
    assert [ffn.ffn.path for ffn in report.plan.ffns] == [
        *paths,
        *(f"decoder.{decoder}.encoder.layer.{i}" for i in range(LAYERS)),
    ]
    dense, model = load_pair(folder, tmp_path / "out", AUTO)
    inputs = make_inputs(dense, AUTO)
    assert_same_outputs(dense, model, inputs)
    assert verify(tmp_path / "out").greedy_agreement == 1
    break_one_ffn(model)
    with pytest.raises(AssertionError):
        assert_same_outputs(dense, model, inputs)


def test_a_pair_trains_with_the_router_losses_of_both_stacks(tmp_path):
    folder = save_pair("bert", "bert", tmp_path / "dense")
    convert(Recipe(str(folder), **SMALL), tmp_path / "out")
    _, model = load_pair(folder, tmp_path / "out", AUTO)
    ids = make_inputs(model, AUTO)["input_ids"]
    model.train()(input_ids=ids, decoder_input_ids=ids).logits.square().mean().backward()
    routers = [(name, p) for name, p in model.named_parameters() if name.endswith("router.weight")]
    assert len(routers) == 2 * LAYERS
    assert all(parameter.grad.norm() > 0 for _, parameter in routers)


def test_a_pair_comes_back_by_export(tmp_path):
    folder = save_pair("bert", "bert", tmp_path / "dense")
    convert(Recipe(str(folder), **SMALL), tmp_path / "out")
    export(tmp_path / "out", tmp_path / "back", Export(to="dense"))
    auto = getattr(transformers, AUTO)
    dense, back = (auto.from_pretrained(path).eval() for path in (folder, tmp_path / "back"))
    assert_same_outputs(dense, back, make_inputs(dense, AUTO))


def test_a_pair_of_two_wirings_is_told(tmp_path):
    """GPT-2's FFN is a module of its own, BERT's is not: one of the two can be named, and that works."""
    folder = save_pair("bert", "gpt2", tmp_path / "dense")
    hint = "decoder.transformer.h.{}.mlp:c_fc,c_proj"
    with pytest.raises(FamilyError, match=f'by hand: ffn "{re.escape(hint)}"$'):
        plan(Recipe(str(folder), **SMALL))
    convert(Recipe(str(folder), ffn=hint, **SMALL), tmp_path / "out")
    dense, model = load_pair(folder, tmp_path / "out", AUTO)
    assert_same_outputs(dense, model, make_inputs(dense, AUTO))
