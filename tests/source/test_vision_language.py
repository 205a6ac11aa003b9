"""Vision-language models: texts with images, and checkpoints whose tensors transformers renames on load."""

import json
import re

import numpy as np
import pytest
import torch
import transformers
from helpers.data import words
from helpers.models import assert_same_outputs, break_one_ffn, load_pair, stored
from helpers.tiny import outputs, save_tiny, save_tokenizer
from helpers.vision_language import CONFIGS, LAYERS, RENAMED, inputs_with_image
from safetensors.torch import load_file, save_file
from transformers import conversion_mapping
from transformers.core_model_loading import WeightRenaming

from mpoe_convert import Export, Recipe, convert, export, plan, verify
from mpoe_convert.artifact.verify_child import compare, make_inputs, run
from mpoe_convert.errors import FamilyError, RecipeError
from mpoe_convert.source.checkpoint import open_checkpoint
from mpoe_convert.source.families import FAMILY_OF
from mpoe_convert.source.locate import resolve
from mpoe_convert.source.renames import module_names

IMAGE_TO_TEXT = "AutoModelForImageTextToText"
SMALL = {"experts": 3, "bond_dim": 4, "noise": 0.0}


def save(model_type, folder, auto_class=IMAGE_TO_TEXT):
    return save_tiny(model_type, auto_class, folder)


def converted(model_type, tmp_path, **options):
    """(folder of the dense model, folder of the artifact)."""
    dense = save(model_type, tmp_path / "dense")
    convert(Recipe(str(dense), **SMALL | options), tmp_path / "out")
    return dense, tmp_path / "out"


def generated(model, inputs):
    limits = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    return model.generate(**inputs, **limits)


def rename(folder, change):
    path = folder / "model.safetensors"
    tensors = {change(name): tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def test_every_text_tower_of_the_table_is_tested():
    towers = {
        name
        for name, row in FAMILY_OF.items()
        if row.layers[0].startswith(("language_model.", "text_model."))
    }
    assert towers == set(CONFIGS)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_with_an_image_it_computes_and_generates_what_the_source_does(model_type, tmp_path):
    dense, out = converted(model_type, tmp_path)
    stock, model = load_pair(dense, out, IMAGE_TO_TEXT)
    inputs = inputs_with_image(stock)
    assert_same_outputs(stock, model, inputs)
    assert torch.equal(generated(stock, inputs), generated(model, inputs))
    other = outputs(model, inputs | {"pixel_values": inputs["pixel_values"] + 1})["logits"]
    assert (other - outputs(model, inputs)["logits"]).abs().max() > 0.1  # else the image does not matter
    break_one_ffn(model)
    with pytest.raises(AssertionError):
        assert_same_outputs(stock, model, inputs)


@pytest.mark.parametrize("model_type", RENAMED)
def test_these_checkpoints_name_the_text_tower_otherwise(model_type, tmp_path):
    """Else the tests above would not show that names are translated."""
    checkpoint = open_checkpoint(str(save(model_type, tmp_path / "dense")))
    _, found = resolve(checkpoint.architecture, checkpoint.tensors)
    assert found and all(f"{ffn.path}." not in ffn.key for ffn in found)


@pytest.mark.parametrize("model_type", ["llava", "qwen2_vl", "gemma3", "mllama"])
def test_the_names_are_those_under_which_transformers_loads(model_type, tmp_path):
    """Every tensor is found in the stock model, with the numbers that the file has."""
    checkpoint = open_checkpoint(str(save(model_type, tmp_path / "dense")))
    model = checkpoint.architecture.model_class.from_pretrained(tmp_path / "dense")
    names = module_names(checkpoint.architecture, checkpoint.tensors)
    state = model.state_dict()
    assert any(name != module for name, module in names.items())
    for name, module in names.items():
        assert torch.equal(state[module], checkpoint.read(name)), name


@pytest.mark.parametrize("model_type", ["llava", "qwen2_5_vl", "idefics3"])
def test_the_model_without_its_head(model_type, tmp_path):
    dense, out = save(model_type, tmp_path / "dense", "AutoModel"), tmp_path / "out"
    convert(Recipe(str(dense), **SMALL), out)
    stock, model = load_pair(dense, out, "AutoModel")
    assert_same_outputs(stock, model, inputs_with_image(stock))


def test_a_head_of_its_own_loads_from_the_whole_model_too(tmp_path):
    dense, out = converted("gemma3", tmp_path)
    for auto in ("AutoModel", "AutoModelForCausalLM"):
        stock, model = load_pair(dense, out, auto)
        assert_same_outputs(stock, model, inputs_with_image(stock))
    dense, out = save("gemma3", tmp_path / "c", "AutoModelForSequenceClassification"), tmp_path / "c-out"
    convert(Recipe(str(dense), **SMALL), out)
    stock, model = load_pair(dense, out, "AutoModelForSequenceClassification")
    assert_same_outputs(stock, model, inputs_with_image(stock))


def test_names_of_the_current_modules_convert_too(tmp_path):
    """As releases between 4.52 and 5 wrote them."""
    dense = save("llava", tmp_path / "dense")
    names = module_names(open_checkpoint(str(dense)).architecture, load_file(dense / "model.safetensors"))
    rename(dense, names.get)
    convert(Recipe(str(dense), **SMALL), tmp_path / "out")
    assert "model.language_model.layers.0.mlp.router.weight" in stored(tmp_path / "out")
    stock, model = load_pair(dense, tmp_path / "out", IMAGE_TO_TEXT)
    assert_same_outputs(stock, model, inputs_with_image(stock))


def test_a_flat_config_of_the_first_qwen2_vl(tmp_path):
    """Its text tower's sizes stand at the top level."""
    dense = save("qwen2_vl", tmp_path / "dense")
    path = dense / "config.json"
    config = json.loads(path.read_text())
    tower = {k: v for k, v in config.pop("text_config").items() if k not in ("model_type", "dtype")}
    path.write_text(json.dumps(tower | config))
    convert(Recipe(str(dense), **SMALL), tmp_path / "out")
    stock, model = load_pair(dense, tmp_path / "out", IMAGE_TO_TEXT)
    assert_same_outputs(stock, model, inputs_with_image(stock))


def test_some_layers_only(tmp_path):
    dense, out = converted("llava", tmp_path, layers="1")
    config = json.loads((out / "config.json").read_text())
    assert list(config["mpoe"]["ffns"]) == ["language_model.layers.1"]
    names = set(stored(out))
    assert "language_model.model.layers.0.mlp.up_proj.weight" in names
    assert "language_model.model.layers.1.mlp.router.weight" in names
    stock, model = load_pair(dense, out, IMAGE_TO_TEXT)
    assert_same_outputs(stock, model, inputs_with_image(stock))


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """(folder of the dense model, folder of the artifact), which nobody changes."""
    return converted("llava", tmp_path_factory.mktemp("llava"))


def test_everything_beside_the_ffns_keeps_its_name(llava):
    dense, out = llava
    before, after = stored(dense), stored(out)
    rest = {name for name in before if ".mlp.up_proj" not in name and ".mlp.down_proj" not in name}
    rest = {name for name in rest if "mlp.gate_proj" not in name}
    assert rest < set(after) and all(torch.equal(before[name], after[name]) for name in rest)


def test_what_is_saved_loads_and_exports_to_the_source_again(tmp_path):
    dense, out = converted("llava", tmp_path, gauge="identity")
    model = getattr(transformers, IMAGE_TO_TEXT).from_pretrained(out, trust_remote_code=True)
    model.save_pretrained(tmp_path / "saved")
    stock, again = load_pair(dense, tmp_path / "saved", IMAGE_TO_TEXT)
    assert_same_outputs(stock, again, inputs_with_image(stock))
    export(tmp_path / "saved", tmp_path / "back", Export(expert=1, check=False))
    before, after = stored(dense), stored(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_artifact_in_bfloat16(tmp_path):
    dense = save_tiny("gemma3", IMAGE_TO_TEXT, tmp_path / "dense", dtype=torch.bfloat16)
    convert(Recipe(str(dense), **SMALL), tmp_path / "out")
    stock, model = load_pair(dense, tmp_path / "out", IMAGE_TO_TEXT, dtype=torch.bfloat16)
    inputs = inputs_with_image(stock)
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    found, expected = (outputs(each, inputs)["logits"].float() for each in (model, stock))
    assert (found - expected).norm() < 0.05 * expected.norm()


def test_verify_shows_both_an_image(llava):
    dense, out = llava
    found = verify(out)
    assert found.ok and found.greedy_agreement == 1 and found.auto_class == IMAGE_TO_TEXT
    assert "in place of an image" in found.inputs
    stock, model = load_pair(dense, out, IMAGE_TO_TEXT)
    inputs, _ = make_inputs(stock)
    with torch.no_grad():
        model.get_parameter("model.multi_modal_projector.linear_2.weight").mul_(2)
    (ours, tokens), (theirs, expected) = run(model, inputs), run(stock, inputs)
    difference = compare(ours, theirs, tokens, expected)["relative_difference"]
    assert difference > found.tolerance  # text alone would not show it


def test_gradients_reach_every_expert_tensor(llava):
    _, model = load_pair(*llava, IMAGE_TO_TEXT)
    inputs = inputs_with_image(model)
    model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    experts = [p for n, p in model.named_parameters() if ".aux_" in n or ".central_" in n or "router" in n]
    assert len(experts) == LAYERS * (3 * 3 + 1) and all(p.grad is not None for p in experts)


def test_the_processor_comes_along(tmp_path):
    """AutoProcessor gives both models the same inputs, of which they make the same tokens."""
    image = pytest.importorskip("PIL.Image")
    dense, out = save("llava", tmp_path / "dense"), tmp_path / "out"
    save_tokenizer(dense)
    tokenizer = transformers.AutoTokenizer.from_pretrained(dense)
    tokenizer.add_special_tokens({"additional_special_tokens": ["w3"]})
    size = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
    transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessorPil(**size),
        tokenizer=tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="w3",
    ).save_pretrained(dense)
    convert(Recipe(str(dense), **SMALL), out)
    pixels = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    found = []
    for folder in (dense, out):
        processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        model = transformers.AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
        inputs = processor(images=image.fromarray(pixels), text="w5 w3 w6 w7", return_tensors="pt")
        assert (inputs["input_ids"] == 3).sum() == 4
        found.append((inputs["input_ids"], inputs["pixel_values"], generated(model.eval(), inputs)))
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("model_type", ["llava", "llava_next", "video_llava", "mllama"])
def test_a_head_that_is_not_tied(model_type, tmp_path, monkeypatch):
    """It is `language_model.lm_head` on disk, which transformers renames by the model's type."""
    monkeypatch.setitem(CONFIGS[model_type], "tie_word_embeddings", False)
    dense, out = converted(model_type, tmp_path)
    assert "language_model.lm_head.weight" in stored(out)
    stock, model = load_pair(dense, out, IMAGE_TO_TEXT)
    assert_same_outputs(stock, model, inputs_with_image(stock))
    model.save_pretrained(tmp_path / "saved")
    assert stored(tmp_path / "saved").keys() == stored(out).keys()


# ------------------------------------------------------------------------------------------------ --ffn


def test_ffns_named_by_hand_are_found_under_their_names_on_disk(tmp_path):
    """Without the row of the table the result is the same."""
    by_hand = "language_model.layers.{}.mlp:gate_proj,up_proj,down_proj"
    dense, out = converted("llava", tmp_path, ffn=by_hand)
    assert "language_model.model.layers.0.mlp.router.weight" in stored(out)
    stock, model = load_pair(dense, out, IMAGE_TO_TEXT)
    assert_same_outputs(stock, model, inputs_with_image(stock))
    export(out, tmp_path / "back", Export(check=False))
    assert stored(tmp_path / "back").keys() == stored(dense).keys()


def test_a_type_outside_the_table(tmp_path):
    """Fuyu's text tower is a Persimmon."""
    config = transformers.FuyuConfig(
        text_config={"model_type": "persimmon", "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24}
        | {"num_hidden_layers": 2, "num_attention_heads": 2},
        patch_size=4,
        image_size=8,
        image_token_id=3,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    dense, out = tmp_path / "dense", tmp_path / "out"
    transformers.FuyuForCausalLM(config).save_pretrained(dense)
    assert "language_model.model.layers.0.mlp.dense_h_to_4h.weight" in stored(dense)
    by_hand = "language_model.layers.{}.mlp:dense_h_to_4h,dense_4h_to_h"
    convert(Recipe(str(dense), ffn=by_hand, **SMALL), out)
    stock, model = load_pair(dense, out, IMAGE_TO_TEXT)
    ids = torch.tensor([[5, 3, 3, 3, 3, 6, 7, 8, 9]])
    patches = torch.randn(1, 4, 3 * 4 * 4, generator=torch.Generator().manual_seed(0))
    places = torch.tensor([[-1, 0, 1, 2, 3, -1, -1, -1, -1]])
    inputs = {"input_ids": ids, "image_patches": patches, "image_patches_indices": places}
    assert_same_outputs(stock, model, inputs)


def test_projections_that_are_renamed_one_by_one(tmp_path, monkeypatch):
    """Where names on disk share no layer with the model's, mixtures are named as in the model."""
    checkpoint = open_checkpoint(str(save("llava", tmp_path / "dense")))
    mapping = conversion_mapping.get_checkpoint_conversion_mapping("llava")
    mapping.append(WeightRenaming(r"^blocks\.(\d+)\.w_", r"model.language_model.layers.\1.mlp."))
    monkeypatch.setitem(conversion_mapping._checkpoint_conversion_mapping_cache, "llava", mapping)
    layers = re.compile(r"language_model\.model\.layers\.(\d+)\.mlp\.")
    _, found = resolve(checkpoint.architecture, [layers.sub(r"blocks.\1.w_", n) for n in checkpoint.tensors])
    assert [ffn.key for ffn in found] == [f"model.language_model.layers.{i}.mlp" for i in range(LAYERS)]
    assert found[1].projections["up"].weight == "blocks.1.w_up_proj.weight"


def test_names_that_would_not_load_are_refused(tmp_path, monkeypatch):
    checkpoint = open_checkpoint(str(save("llava", tmp_path / "dense")))
    mapping = conversion_mapping.get_checkpoint_conversion_mapping("llava")
    mapping.append(WeightRenaming(r"\.mlp\.router", ".mlp.gate"))
    monkeypatch.setitem(conversion_mapping._checkpoint_conversion_mapping_cache, "llava", mapping)
    told = r"load a mixture's language_model\.model\.layers\.0\.mlp\.router\.weight as model\..*\.mlp\.gate"
    with pytest.raises(FamilyError, match=told):
        resolve(checkpoint.architecture, checkpoint.tensors)


# --------------------------------------------------------------------------------- layers without an FFN


def test_a_missing_ffn_is_named(tmp_path):
    dense = save("llava", tmp_path / "dense")
    path = dense / "model.safetensors"
    tensors = {k: v for k, v in load_file(path).items() if "layers.1.mlp.up_proj" not in k}
    save_file(tensors, path, metadata={"format": "pt"})
    told = r"model\.language_model\.layers\.1\.mlp\.up_proj\.weight missing; found 1 FFN, expected 2"
    with pytest.raises(FamilyError, match=told):
        plan(Recipe(str(dense), **SMALL))


def test_layers_without_an_ffn_stay_as_they_are(tmp_path):
    """Nemotron-H has an attention or an FFN in a layer, the former first; its config holds an infinity."""
    config = transformers.NemotronHConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        layers_block_type=["attention", "mlp", "attention", "mlp"],
        n_routed_experts=1,
    )
    torch.manual_seed(0)
    dense, out = tmp_path / "dense", tmp_path / "out"
    transformers.NemotronHForCausalLM(config).save_pretrained(dense)
    recipe = Recipe(str(dense), ffn="layers.{}.mixer:up_proj,down_proj", **SMALL)
    with pytest.raises(RecipeError, match=r"2 matches no FFN; this model has 2 FFNs: layers\.1, layers\.3"):
        plan(recipe.replace(layers="2"))
    convert(recipe, out)
    ffns = json.loads((out / "config.json").read_text())["mpoe"]["ffns"]
    assert list(ffns) == ["layers.1", "layers.3"]
    stock, model = load_pair(dense, out, "AutoModelForCausalLM")
    inputs = {"input_ids": torch.arange(3, 15)[None]}
    assert_same_outputs(stock, model, inputs)
    break_one_ffn(model)
    with pytest.raises(AssertionError):
        assert_same_outputs(stock, model, inputs)


def test_an_ffn_that_only_the_checkpoint_lacks_is_missing_there(tmp_path):
    """Of two layers that have none on disk, the model has one: that one is named."""
    dense = save("mllama", tmp_path / "dense")
    path = dense / "model.safetensors"
    tensors = {k: v for k, v in load_file(path).items() if "layers.2.mlp" not in k}
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(
        FamilyError, match=r"layers\.2\.mlp\.up_proj\.weight missing; found 2 FFNs, expected 3"
    ):
        plan(Recipe(str(dense), **SMALL))


# ------------------------------------------------------------------------------------------ calibration


@pytest.mark.parametrize("model_type", ["llava", "qwen2_vl"])
def test_calibration_on_texts_with_images(model_type, tmp_path):
    """At full rank the held-out outputs are those of the source; below it, fitting to the data pays."""
    dense = save(model_type, tmp_path / "dense")
    stock = getattr(transformers, IMAGE_TO_TEXT).from_pretrained(dense).eval()
    batches = [inputs_with_image(stock, seed) for seed in range(6)]
    recipe = Recipe(str(dense), experts=2, bond_dim=2, noise=0.0)
    report = convert(recipe.replace(max_error=1e-6), tmp_path / "out", calibration=batches)
    assert report.divergence.tokens == batches[-1]["input_ids"].numel()
    assert report.divergence.perplexity is None  # places of images are no text to predict
    assert report.divergence.nats < 1e-6
    small = convert(recipe.replace(keep=0.9), tmp_path / "small", calibration=batches)
    blind = convert(recipe.replace(keep=0.9, metric="weights"), tmp_path / "blind", calibration=batches)
    assert 1e-3 < small.divergence.nats < blind.divergence.nats


def test_calibration_on_text_alone(tmp_path):
    dense = save("llava", tmp_path / "dense")
    save_tokenizer(dense)
    (tmp_path / "text.txt").write_text(words(2000))
    text = {"calibrate": (str(tmp_path / "text.txt"),), "calibration_tokens": 512}
    recipe = Recipe(str(dense), experts=2, bond_dim=2, noise=0.0, max_error=1e-6, **text)
    found = convert(recipe, tmp_path / "out").divergence
    assert found.nats < 1e-6 and found.perplexity == pytest.approx(found.dense_perplexity, rel=1e-3)


@pytest.mark.parametrize("model_type", ["llava", "qwen2_vl"])
def test_in_training_the_routers_count_as_in_a_model_of_text(model_type, tmp_path):
    """Their loss is weighed by a pass's labels, and tasks are counted by texts, not by pieces of images."""
    _, out = converted(model_type, tmp_path, noise=0.1)
    auto = transformers.AutoModelForImageTextToText
    model = auto.from_pretrained(out, trust_remote_code=True, router_aux_loss_coef=0.5).train()
    inputs = inputs_with_image(model)
    labels = inputs["input_ids"].clone()
    labels[:, -2:] = -100
    own = int((labels[:, 1:] != -100).sum())
    whole = model(**inputs, labels=labels).loss
    found = model(**inputs, labels=labels, num_items_in_batch=4 * own).loss
    torch.testing.assert_close(found, whole / 4)
    model.config.router_aux_loss_coef = 0.0
    assert whole - model(**inputs, labels=labels).loss > 0.9  # 2 of 3 experts, times the coefficient
    model = auto.from_pretrained(out, trust_remote_code=True, router_tasks=["a", "b"]).eval()
    tasks = ["a", "b"][: len(labels)]
    logits = [model(**inputs, task_ids=each).logits for each in (tasks, "a")]
    torch.testing.assert_close(logits[0][0], logits[1][0])
    with pytest.raises(ValueError, match="3 tasks were given"):
        model(**inputs, task_ids=["a", "b", "a"])
