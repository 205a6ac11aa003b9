"""A converted checkpoint is a transformers model: it loads, saves, trains, generates and compiles as one."""

import ast
import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from helpers.child import run_child
from helpers.loopback_hub import LoopbackHub, environment
from helpers.models import (
    assert_same_outputs,
    break_one_ffn,
    generative,
    load_pair,
    router_name,
    stored,
    token_ids,
)
from helpers.selection import quick
from helpers.tiny import LAYERS, VOCAB, make_inputs, outputs
from safetensors import safe_open

from mpoe_convert.artifact.layout import MODELING_FILE, REPORT_FILE
from mpoe_convert.runtime import MODELING_PATH
from mpoe_convert.source.architecture import heads

FAMILIES = ("gpt2", "llama", "gpt_neox", "bloom", "opt", "t5", "bart", "bert", "vit")
GENERATIVE = ("gpt2", "llama", "gpt_neox", "bloom", "t5", "bart")
# One way of applying the experts each: on the activations, by built matrices, and by stored ones.
RECIPES = {
    "one-sided": {"layout": "one-sided", "bond_dim": 4},
    "two-sided": {"layout": "two-sided", "bond_dim": 4},
    "balanced": {"layout": "balanced", "bond_dim": 64},
    "dense": {"kind": "dense"},
    "low-rank": {"kind": "low-rank", "bond_dim": 3},
    "adapter": {"kind": "adapter", "bond_dim": 3},
}
NEW_TOKENS = 8
slow = pytest.mark.slow


def load(folder: Path, auto_class: str = "AutoModelForCausalLM", **options):
    auto = getattr(transformers, auto_class)
    return auto.from_pretrained(folder, trust_remote_code=True, **options).eval()


def assert_equal_tensors(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype, name


def logits_of(model, **inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


# ---------------------------------------------------------------------------------------------------
# Alone


def test_modelling_file_imports_torch_and_transformers_only():
    """Anywhere in the file, so that `transformers` finds nothing to complain about either."""
    roots = set()
    for node in ast.walk(ast.parse(MODELING_PATH.read_text())):
        if isinstance(node, ast.Import):
            roots |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            roots.add(node.module.partition(".")[0])
    assert roots - set(sys.stdlib_module_names) == {"torch", "transformers"}


def test_a_process_without_this_package_computes_what_the_dense_model_computes(artifact, tmp_path):
    cases, expected = {}, {}
    # Llama's classifier builds its backbone by AutoModel, which must know ours without a loader's help.
    others = [("llama", "AutoModelForSequenceClassification")]
    for model_type, auto_class in others + [(name, generative(name)) for name in FAMILIES]:
        folder, out = artifact(model_type, auto_class)
        assert (out / MODELING_FILE).read_bytes() == MODELING_PATH.read_bytes()
        dense = getattr(transformers, auto_class).from_pretrained(folder).eval()
        inputs = make_inputs(dense, auto_class)
        name = f"{model_type} {auto_class}"
        expected[name] = logits_of(dense, **inputs), type(dense).__name__
        text = None if model_type == "vit" else "w7 w3 w39"
        case = {"folder": str(out), "auto_class": auto_class, "inputs": inputs, "text": text}
        cases[name] = case
    results = run_child(cases, tmp_path)
    for name, (logits, stock) in expected.items():
        assert results[name]["class"] == f"MPOE{stock}"
        tolerance = 2e-5 * logits.abs().max().item()
        found = results[name]["logits"]
        torch.testing.assert_close(found, logits, rtol=0, atol=tolerance, msg=name)
        if cases[name]["text"]:
            assert results[name]["ids"] == [7, 3, 39] and results[name]["eos"] == "</s>"


# ---------------------------------------------------------------------------------------------------
# Saving


@pytest.mark.parametrize("model_type", FAMILIES)
def test_saved_and_loaded_again_it_is_the_same_checkpoint(model_type, artifact, tmp_path):
    auto_class = generative(model_type)
    folder, out = artifact(model_type)
    dense, model = load_pair(folder, out, auto_class)
    model.save_pretrained(tmp_path / "once")
    again, info = getattr(transformers, auto_class).from_pretrained(
        tmp_path / "once", trust_remote_code=True, output_loading_info=True
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    again.save_pretrained(tmp_path / "twice")
    config = json.loads((out / "config.json").read_text())
    for saved in (tmp_path / "once", tmp_path / "twice"):
        assert_equal_tensors(stored(saved), stored(out))
        assert (saved / MODELING_FILE).read_bytes() == MODELING_PATH.read_bytes()
        found = json.loads((saved / "config.json").read_text())
        for key in ("auto_map", "mpoe", "model_type", "architectures"):
            assert found[key] == config[key], key
    assert set(config["auto_map"]) == {"AutoConfig", *heads(model_type)}
    assert_same_outputs(dense, again.eval(), make_inputs(dense, auto_class))
    assert_equal_tensors(again.state_dict(), model.state_dict())
    with torch.no_grad():  # what is compared must be what was trained
        again.get_parameter(router_name(again)).add_(1)
    again.save_pretrained(tmp_path / "changed")
    with pytest.raises(AssertionError):
        assert_equal_tensors(stored(tmp_path / "changed"), stored(out))


PUSH = """
import sys, torch, transformers
artifact, repo = sys.argv[1:]
auto = transformers.AutoModelForCausalLM
model = auto.from_pretrained(artifact, trust_remote_code=True).eval()
model.push_to_hub(repo)
transformers.AutoTokenizer.from_pretrained(artifact, trust_remote_code=True).push_to_hub(repo)
ids = torch.arange(3, 15)[None]
pulled = auto.from_pretrained(repo, trust_remote_code=True).eval()
tokenizer = transformers.AutoTokenizer.from_pretrained(repo, trust_remote_code=True)
assert pulled.config._name_or_path == repo and tokenizer("w7 w3")["input_ids"] == [7, 3]
with torch.no_grad():
    assert torch.equal(pulled(ids).logits, model(ids).logits)
"""


def test_a_loaded_model_can_be_pushed_and_pulled(artifact, tmp_path):
    _, out = artifact("gpt2")
    with LoopbackHub() as hub:
        variables = environment(tmp_path / "home", hub.endpoint, HF_TOKEN="hf_any", HF_HUB_OFFLINE="0")
        variables["HF_MODULES_CACHE"] = str(tmp_path / "modules")
        command = [sys.executable, "-P", "-c", PUSH, str(out), "me/pushed"]
        done = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        files = hub.repos["me/pushed"].revisions["main"]
    assert files[MODELING_FILE] == MODELING_PATH.read_bytes()
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= files.keys()


def test_shards(artifact, tmp_path):
    _, out = artifact("llama")
    model = load(out)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_equal_tensors(stored(tmp_path), stored(out))
    assert_equal_tensors(load(tmp_path).state_dict(), model.state_dict())


@pytest.mark.parametrize(
    ("model_type", "old", "new"),
    [
        ("gpt_neox", "embed_out.weight", "lm_head.weight"),
        ("vit", "vit.encoder.layer.0.attention.attention.query.weight", ".attention.q_proj.weight"),
    ],
)
def test_old_names_load_and_are_saved_as_they_were(model_type, old, new, artifact, tmp_path):
    """The names that the Hub's checkpoints have differ from those of the modules."""
    folder, out = artifact(model_type)
    auto_class = generative(model_type)
    assert old in stored(folder) and old in stored(out)
    _, model = load_pair(folder, out, auto_class)
    names = [name for name in model.state_dict() if name.endswith(new)]
    assert old not in model.state_dict() and names
    assert torch.equal(model.state_dict()[names[0]], stored(folder)[old])
    model.save_pretrained(tmp_path / "saved")
    assert_equal_tensors(stored(tmp_path / "saved"), stored(out))


BASE_AND_HEAD = [
    ("gpt2", "AutoModelForCausalLM", set()),  # tied to the embeddings
    ("llama", "AutoModelForSequenceClassification", {"score.weight"}),
    ("gpt_neox", "AutoModelForCausalLM", {"lm_head.weight"}),
    ("bloom", "AutoModelForTokenClassification", {"classifier.weight", "classifier.bias"}),
    ("opt", "AutoModelForSequenceClassification", {"score.weight"}),
    ("bert", "AutoModelForTokenClassification", {"classifier.weight", "classifier.bias"}),
    ("vit", "AutoModelForImageClassification", {"classifier.weight", "classifier.bias"}),
]


@pytest.mark.parametrize(("model_type", "auto_class", "head"), BASE_AND_HEAD)
def test_heads_come_and_go(model_type, auto_class, head, artifact):
    """A head's checkpoint loads as the base model, and a base checkpoint lacks a head's weights only."""
    folder, out = artifact(model_type, auto_class)
    base, info = transformers.AutoModel.from_pretrained(out, trust_remote_code=True, output_loading_info=True)
    # BERT's base class has a pooler that most of its heads lack.
    assert {name for name in info["missing_keys"] if "pooler" not in name} == set()
    assert type(base).__name__.startswith("MPOE")
    dense = transformers.AutoModel.from_pretrained(folder).eval()
    inputs = make_inputs(dense, "AutoModel")
    with torch.no_grad():
        expected, found = (m.eval()(**inputs).last_hidden_state for m in (dense, base))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * expected.abs().max().item())

    folder, out = artifact(model_type, "AutoModel")
    model, info = getattr(transformers, auto_class).from_pretrained(
        out, trust_remote_code=True, output_loading_info=True
    )
    assert set(info["missing_keys"]) == head
    dense = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        expected, found = (m.eval()(**inputs)[0] for m in (dense, model.base_model))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * expected.abs().max().item())


@pytest.mark.parametrize("model_type", FAMILIES)
def test_state_dict_loads_strictly_into_a_fresh_model(model_type, artifact):
    folder, out = artifact(model_type)
    dense, model = load_pair(folder, out, generative(model_type))
    config = transformers.AutoConfig.from_pretrained(out, trust_remote_code=True)
    auto = getattr(transformers, generative(model_type))
    fresh = auto.from_config(config, trust_remote_code=True).eval()
    assert type(fresh) is type(model)
    inputs = make_inputs(dense, generative(model_type))
    with pytest.raises(AssertionError):
        assert_same_outputs(dense, fresh, inputs)
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert_same_outputs(dense, fresh, inputs)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_from_config_initialises_everything(model_type, artifact):
    """Memory that was never written would show: every new tensor is NaN until something fills it."""
    folder, out = artifact(model_type)
    config = transformers.AutoConfig.from_pretrained(out, trust_remote_code=True)
    auto = getattr(transformers, generative(model_type))
    try:
        torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
        assert torch.empty(3).isnan().all()
        model = auto.from_config(config, trust_remote_code=True).eval()
        stock = auto.from_config(transformers.AutoConfig.from_pretrained(folder)).eval()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(p.isfinite().all() for p in model.parameters())
    inputs = make_inputs(model, generative(model_type))
    found, expected = (logits_of(m, **inputs).std() for m in (model, stock))
    assert 1 / 3 < found / expected < 3


# ---------------------------------------------------------------------------------------------------
# Generation


def generation_pair(artifact, model_type):
    """Dense and converted; BART's rule that the last token ends the text is switched off."""
    pair = load_pair(*artifact(model_type), generative(model_type))
    for model in pair:
        model.generation_config.forced_eos_token_id = None
    return pair


def generate(model, ids, mask=None, **options):
    """What `generate` returns, with NEW_TOKENS `sequences` columns and stacked raw `logits`."""
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS} | options
    options = {"do_sample": False, "num_beams": 1, "pad_token_id": 0} | options
    options |= {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}
    mask = torch.ones_like(ids) if mask is None else mask
    with torch.no_grad():
        out = model.generate(input_ids=ids, attention_mask=mask, **options)
    out.sequences = out.sequences[:, -NEW_TOKENS:]
    out.logits = torch.stack(out.logits, 1)
    return out


def greedy_by_hand(model, ids) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, logits): argmax by argmax, the whole prefix again each time; no `generate`, no cache."""
    decoder, steps = ids, []
    if model.config.is_encoder_decoder:
        decoder = torch.full((len(ids), 1), model.generation_config.decoder_start_token_id)
    for _ in range(NEW_TOKENS):
        inputs = {"input_ids": decoder}
        if model.config.is_encoder_decoder:
            inputs = {"input_ids": ids, "decoder_input_ids": decoder}
        steps.append(logits_of(model, **inputs, use_cache=False)[:, -1])
        allowed = steps[-1].clone()
        allowed[:, 2] = -torch.inf  # as min_new_tokens asks
        decoder = torch.cat([decoder, allowed.argmax(-1, keepdim=True)], 1)
    return decoder[:, -NEW_TOKENS:], torch.stack(steps, 1)


def assert_close_to_scale(found, expected, tolerance=2e-5):
    scale = expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("model_type", GENERATIVE)
def test_greedy_generation(model_type, artifact):
    """With and without cache, and with a static one, it is what the dense model says."""
    dense, model = generation_pair(artifact, model_type)
    ids = token_ids(3, 7)
    expected, logits = greedy_by_hand(dense, ids)
    for options in (
        {"use_cache": True},
        {"use_cache": False},
        {"cache_implementation": "static", "disable_compile": True},
    ):
        found = generate(model, ids, **options)
        assert torch.equal(found.sequences, expected), options
        assert_close_to_scale(found.logits, logits)
    break_one_ffn(model)
    with pytest.raises(AssertionError):
        assert_close_to_scale(generate(model, ids).logits, logits)


@pytest.mark.parametrize("model_type", GENERATIVE)
def test_beam_search_and_sampling(model_type, artifact):
    dense, model = generation_pair(artifact, model_type)
    ids = token_ids(2, 7)
    options = {"num_beams": 3, "num_return_sequences": 2}
    expected, found = (generate(m, ids, **options) for m in (dense, model))
    assert len(found.sequences) == 4 and torch.equal(found.sequences, expected.sequences)
    assert_close_to_scale(found.sequences_scores, expected.sequences_scores)
    samples = []
    for seed, each in ((1, model), (1, dense), (2, model)):
        torch.manual_seed(seed)
        options = {"do_sample": True, "temperature": 2.0, "top_k": 0}
        samples.append(generate(each, ids, **options).sequences)
    assert torch.equal(samples[0], samples[1]) and not torch.equal(samples[0], samples[2])


@pytest.mark.parametrize("model_type", GENERATIVE)
def test_padding_changes_nothing(model_type, artifact):
    """A short prompt beside a long one gives what it gives alone: tokens do not meet in the experts."""
    model = load(artifact(model_type)[1], generative(model_type))
    long, short = token_ids(1, 9), token_ids(1, 5, seed=1)
    padding = torch.zeros(1, 4, dtype=torch.long)
    # BART's encoder counts positions from the left edge, padding or not.
    parts = [short, padding] if model_type == "bart" else [padding, short]
    ids = torch.cat([long, torch.cat(parts, 1)])
    alone = torch.cat([generate(model, long).logits, generate(model, short).logits])
    assert_close_to_scale(generate(model, ids, (ids != 0).long()).logits, alone)
    with pytest.raises(AssertionError):  # the mask is what does it
        assert_close_to_scale(generate(model, ids).logits, alone)


def test_text_generation_pipeline(artifact):
    dense, _ = generation_pair(artifact, "gpt2")
    options = {"trust_remote_code": True, "task": "text-generation", "device": "cpu"}
    pipe = transformers.pipeline(model=str(artifact("gpt2")[1]), **options)
    limits = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    (answer,) = pipe("w5 w6 w7", **limits, return_full_text=False)
    expected, _ = greedy_by_hand(dense, torch.tensor([[5, 6, 7]]))
    assert answer["generated_text"].split() == [f"w{i}" if i > 2 else "<pad>" for i in expected[0]]


# ---------------------------------------------------------------------------------------------------
# Loading options


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "t5", "bert"])
def test_bfloat16_leaves_the_router_in_float32(model_type, artifact, tmp_path):
    dense, model = load_pair(*artifact(model_type), generative(model_type), dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        router = name.endswith("router.weight")
        assert parameter.dtype == (torch.float32 if router else torch.bfloat16), name
    inputs = make_inputs(model, generative(model_type))
    exact = load(artifact(model_type)[0], generative(model_type), dtype=torch.float32)
    truth = logits_of(exact, **inputs)
    errors = [(logits_of(m, **inputs).float() - truth).norm() / truth.norm() for m in (model, dense)]
    assert errors[0] < 4 * errors[1]
    model.save_pretrained(tmp_path / "half")
    again = load(tmp_path / "half", generative(model_type))
    assert {p.dtype for p in again.parameters()} == {torch.float32, torch.bfloat16}
    assert_equal_tensors(again.state_dict(), model.state_dict())


# Where nothing is offloaded, one recipe stands for all.
PLACEMENTS = [(place, name) for place in ("disk", "layers on disk") for name in RECIPES]
PLACEMENTS += [(place, next(iter(RECIPES))) for place in ("cpu", "auto")]


@pytest.mark.parametrize(("placement", "name"), PLACEMENTS)
def test_device_maps(placement, name, artifact, tmp_path):
    """Offloaded weights are there only while the module that owns them runs."""
    folder, out = artifact("llama", **RECIPES[name])
    dense = load(folder)
    options = {"device_map": placement}
    if placement == "auto":
        options["max_memory"] = {"cpu": 10**9}
    elif placement == "layers on disk":
        others = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
        options["device_map"] = {"model.layers": "disk"} | dict.fromkeys(others, "cpu")
    if "disk" in placement:
        options["offload_folder"] = str(tmp_path / "offload")
    if placement == "disk":
        options["device_map"] = {"": "disk"}
    model = load(out, **options)
    offloaded = [p for p in model.parameters() if p.device.type == "meta"]
    assert bool(offloaded) == ("disk" in placement)
    assert_same_outputs(dense, model, make_inputs(dense, "AutoModelForCausalLM"))


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "t5"])
def test_disk_offload_of_other_wirings(model_type, artifact, tmp_path):
    folder, out = artifact(model_type)
    dense = load(folder, generative(model_type))
    model = load(out, generative(model_type), device_map={"": "disk"}, offload_folder=str(tmp_path / "disk"))
    assert all(p.device.type == "meta" for p in model.parameters())
    assert_same_outputs(dense, model, make_inputs(dense, generative(model_type)))


@pytest.mark.parametrize("name", RECIPES)
def test_number_of_parameters(name, artifact):
    _, out = artifact("gpt2", **RECIPES[name])
    model, totals = load(out), json.loads((out / REPORT_FILE).read_text())["totals"]
    assert model.num_parameters() == model.num_parameters(only_trainable=True) == totals["stored_params"]
    positions, words = model.transformer.wpe.weight.numel(), model.lm_head.weight.numel()
    assert model.num_parameters(exclude_embeddings=True) == totals["stored_params"] - positions - words


@pytest.mark.parametrize("model_type", FAMILIES)
def test_builds_without_memory(model_type, artifact):
    config = transformers.AutoConfig.from_pretrained(artifact(model_type)[1], trust_remote_code=True)
    auto = getattr(transformers, generative(model_type))
    with torch.device("meta"):
        model = auto.from_config(config, trust_remote_code=True)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    loaded = load(artifact(model_type)[1], generative(model_type))
    expected = {name: p.shape for name, p in loaded.named_parameters()}
    assert {name: p.shape for name, p in model.named_parameters()} == expected


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gpt_neox", "opt", "bert", "vit"])
def test_attention_implementation_is_honoured(model_type, artifact):
    folder, out = artifact(model_type)
    dense = load(folder, generative(model_type))
    for implementation in ("eager", "sdpa"):
        model = load(out, generative(model_type), attn_implementation=implementation)
        assert model.config._attn_implementation == implementation
        inputs = make_inputs(dense, generative(model_type))
        assert_same_outputs(dense, model, inputs)
        out_attentions = model(**inputs, output_attentions=implementation == "eager").attentions
        # Only the eager implementation has attention weights to return.
        assert bool(out_attentions) == (implementation == "eager")


# ---------------------------------------------------------------------------------------------------
# Training


def count_calls(model) -> list:
    calls = []
    for module in model.modules():
        if type(module).__name__ == "FeedForward":
            module.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def gradients(model, inputs) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(0)
    model(**inputs).logits.square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# The name that every release of transformers 5 has.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_gradient_checkpointing_changes_no_gradient(model_type, reentrant, artifact):
    """With dropout on; the experts run once more for every layer."""
    out = artifact(model_type, noise=0.1)[1]
    model = load(out, generative(model_type)).train()
    inputs = make_inputs(model, generative(model_type))
    if "input_ids" not in inputs:  # the reentrant kind needs an input with a gradient
        inputs["pixel_values"].requires_grad_()
    calls = count_calls(model)
    expected = gradients(model, inputs)
    ffns = len(calls)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    found = gradients(model, inputs)
    assert len(calls) == 3 * ffns
    assert found.keys() == expected.keys() and any(".aux_" in name for name in found)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    model.zero_grad()
    break_one_ffn(model)
    changed = gradients(model, inputs)
    assert any(not torch.allclose(changed[name], expected[name], rtol=1e-3) for name in expected)


def test_the_loss_is_the_stock_loss(artifact):
    for model_type in ("gpt2", "llama", "t5", "bert"):
        dense, model = load_pair(*artifact(model_type), generative(model_type))
        inputs = make_inputs(dense, generative(model_type))
        labels = inputs["input_ids"].clone()
        labels[:, 3] = -100
        inputs.pop("decoder_input_ids", None)
        expected, found = (m(**inputs, labels=labels).loss for m in (dense, model))
        assert expected > 0.1
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def counting_data(num: int = 16, length: int = 8) -> list[dict]:
    """Sequences that count upwards: learnt in a few steps."""
    rows = [torch.arange(length) + 3 + i for i in range(num)]
    return [{"input_ids": r, "attention_mask": torch.ones_like(r), "labels": r} for r in rows]


def trainer_for(model, folder: Path, data, **options):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        per_device_train_batch_size=4,
        learning_rate=0.02,
        logging_strategy="no",
        dataloader_pin_memory=False,
        seed=0,
        **options,
    )
    return transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data)


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "t5"])
def test_trainer(model_type, artifact, tmp_path):
    """Trains, evaluates, predicts; its checkpoints are artifacts that load alone and can be resumed."""
    auto_class = generative(model_type)
    model = load(artifact(model_type, noise=0.1)[1], auto_class)
    data = counting_data()
    trainer = trainer_for(model, tmp_path, data, max_steps=12, save_steps=6)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert after < 0.9 * before
    logits = trainer.predict(data).predictions
    logits = torch.tensor(logits[0] if isinstance(logits, tuple) else logits)
    batch = {key: torch.stack([row[key] for row in data]) for key in data[0]}
    again = load(tmp_path / "checkpoint-12", auto_class)
    torch.testing.assert_close(logits_of(again, **batch), logits, rtol=1e-4, atol=1e-4)
    assert (tmp_path / "checkpoint-12" / MODELING_FILE).read_bytes() == MODELING_PATH.read_bytes()

    resumed = load(tmp_path / "checkpoint-6", auto_class)
    trainer = trainer_for(resumed, tmp_path, data, max_steps=12, save_strategy="no")
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert trainer.state.global_step == 12
    for name, parameter in resumed.named_parameters():
        torch.testing.assert_close(parameter, again.get_parameter(name), msg=name)


def test_trainer_on_a_classification_head(artifact, tmp_path):
    auto_class = "AutoModelForSequenceClassification"
    model = load(artifact("bert", auto_class, noise=0.1)[1], auto_class)
    ids = token_ids(16, 6)
    data = [{"input_ids": row, "labels": int(row[0] > VOCAB // 2)} for row in ids]
    trainer = trainer_for(model, tmp_path, data, max_steps=20, save_strategy="no")
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.8 * before


def parameters_that_learn(model) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


PEFT = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "router": {"target_modules": [], "target_parameters": ["router.weight"]},
    "central cores": {"target_modules": [], "target_parameters": ["terms.0.central_2", "terms.0.central_0"]},
    "auxiliary cores": {"target_modules": [], "target_parameters": ["terms.0.aux_0", "terms.0.aux_2"]},
    "adapters": {"target_modules": [], "target_parameters": ["adapter.aux_0", "adapter.aux_1"]},
    "attention and mixture": {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]},
}


# PEFT itself asks transformers by the old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", PEFT)
def test_peft(name, artifact, tmp_path):
    """LoRA trains, saves, reloads, and merges into a checkpoint that loads alone."""
    import peft

    out = artifact("llama", noise=0.1, **({"kind": "adapter"} if name == "adapters" else {}))[1]
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=8, **PEFT[name])
    torch.manual_seed(0)
    model = peft.get_peft_model(load(out), config)
    batch = {k: torch.stack([row[k] for row in counting_data()]) for k in counting_data()[0]}
    frozen = {k: p.clone() for k, p in model.named_parameters() if not p.requires_grad}
    assert parameters_that_learn(model) and any(".aux_" in name for name in frozen)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(8):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.02
    assert all(torch.equal(p, model.get_parameter(k)) for k, p in frozen.items())

    model.eval()
    expected = logits_of(model, input_ids=batch["input_ids"])
    model.save_pretrained(tmp_path / "adapter")
    plain = load(out)
    assert not torch.allclose(logits_of(plain, input_ids=batch["input_ids"]), expected, atol=1e-3)
    again = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits_of(again, input_ids=batch["input_ids"]), expected)

    merged = again.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    alone = load(tmp_path / "merged")
    found = logits_of(alone, input_ids=batch["input_ids"])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert stored(tmp_path / "merged").keys() == stored(out).keys()


# ---------------------------------------------------------------------------------------------------
# Compiling


@pytest.fixture
def dynamo():
    from torch._dynamo import reset, testing

    reset()
    yield testing
    reset()


# Every way of applying experts is compiled in test_runtime.py; whole models take 10 seconds each.
COMPILED = [
    pytest.param(t, n, marks=() if (t, n) == ("llama", "one-sided") else slow)
    for t in ("gpt2", "llama", "t5", "bert")
    for n in RECIPES
]


@pytest.mark.parametrize(("model_type", "name"), COMPILED)
def test_compiles_whole_with_any_length(model_type, name, artifact, dynamo):
    """One graph for all lengths; forward and backward equal eager, however tokens fall on experts."""
    model = load(artifact(model_type, noise=0.1, **RECIPES[name])[1], generative(model_type))
    counter = dynamo.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    graphs = set()
    for length in (9, 5, 14):
        inputs = {"input_ids": token_ids(2, length, seed=length)}
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = inputs["input_ids"].clone()
        for ids in inputs.values():
            torch._dynamo.mark_dynamic(ids, 1)
        inputs |= {"use_cache": False} if model.can_generate() else {}
        found, expected = compiled(**inputs).logits, model(**inputs).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        both = []
        for logits in (found, expected):
            model.zero_grad()
            logits.square().mean().backward()
            both.append({k: p.grad for k, p in model.named_parameters() if p.grad is not None})
        for key, gradient in both[1].items():
            scale = max(gradient.abs().max().item(), 1e-3)
            close = {"rtol": 0, "atol": 1e-4 * scale, "msg": key}
            torch.testing.assert_close(both[0][key], gradient, **close)
        graphs.add(counter.frame_count)
    assert graphs == {1}


@slow
# Inductor imports torch modules that are written with it.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", RECIPES)
def test_compiles_with_inductor(name, artifact, dynamo):
    model = load(artifact("llama", noise=0.1, **RECIPES[name])[1])
    compiled = torch.compile(model, fullgraph=True)
    for length in (9, 5):
        ids = token_ids(2, length, seed=length)
        torch._dynamo.mark_dynamic(ids, 1)
        found, expected = (logits_of(m, input_ids=ids, use_cache=False) for m in (compiled, model))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_generates_compiled_with_a_static_cache(artifact, dynamo):
    dense, model = generation_pair(artifact, "llama")
    ids = token_ids(2, 7)
    expected, logits = greedy_by_hand(dense, ids)
    counter = dynamo.CompileCounterWithBackend("aot_eager")
    model.forward = torch.compile(model.forward, fullgraph=True, backend=counter)
    found = generate(model, ids, cache_implementation="static", disable_compile=True)
    assert torch.equal(found.sequences, expected) and counter.frame_count >= 1
    assert_close_to_scale(found.logits, logits)


@pytest.mark.parametrize("name", quick(RECIPES, lambda name: name in ("one-sided", "balanced", "dense")))
def test_exports_whole_for_any_length(name, artifact):
    _, out = artifact("llama", **RECIPES[name])
    model = load(out, use_cache=False)
    length = torch.export.Dim("length", min=2, max=32)
    program = torch.export.export(model, (token_ids(2, 9),), dynamic_shapes={"input_ids": {1: length}})
    for other in (token_ids(2, 5, seed=1), token_ids(2, 30, seed=2)):
        expected = logits_of(model, input_ids=other)
        torch.testing.assert_close(program.module()(other).logits, expected, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------
# As an object


def repickle(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("how", [copy.deepcopy, repickle])
def test_copies(how, model_type, artifact):
    folder, out = artifact(model_type)
    dense, model = load_pair(folder, out, generative(model_type))
    twin = how(model)
    assert type(twin) is type(model)
    inputs = make_inputs(dense, generative(model_type))
    break_one_ffn(model)
    assert_same_outputs(dense, twin, inputs)
    with pytest.raises(AssertionError):
        assert_same_outputs(dense, model, inputs)


TEXT = tuple(name for name in FAMILIES if name != "vit")


@pytest.mark.parametrize("model_type", TEXT)
def test_embeddings_can_be_resized(model_type, artifact, tmp_path):
    dense, model = load_pair(*artifact(model_type), generative(model_type))
    inputs = make_inputs(dense, generative(model_type))
    before = outputs(model, inputs)["logits"]
    model.resize_token_embeddings(VOCAB + 4, mean_resizing=False)
    after = outputs(model, inputs)["logits"]
    assert after.shape[-1] == VOCAB + 4
    torch.testing.assert_close(after[..., :VOCAB], before)
    model.save_pretrained(tmp_path / "resized")
    again = load(tmp_path / "resized", generative(model_type))
    torch.testing.assert_close(outputs(again, inputs)["logits"], after)
    assert again.config.vocab_size == VOCAB + 4


@pytest.mark.parametrize("model_type", TEXT)
def test_tied_embeddings_stay_tied_and_are_stored_once(model_type, artifact, tmp_path):
    folder, out = artifact(model_type)
    dense, model = load_pair(folder, out, generative(model_type))

    def tied(m):
        return m.get_input_embeddings().weight is m.get_output_embeddings().weight

    assert tied(model) == tied(dense) == (model_type not in ("llama", "gpt_neox"))
    model.save_pretrained(tmp_path / "saved")
    report = json.loads((out / REPORT_FILE).read_text())
    assert model.num_parameters() == report["totals"]["stored_params"]
    buffers = {name for name, _ in model.named_buffers()}
    for saved in (out, tmp_path / "saved"):
        sizes = {k: t.numel() for k, t in stored(saved).items() if k not in buffers}
        assert sum(sizes.values()) == model.num_parameters()
    assert tied(load(tmp_path / "saved", generative(model_type))) == tied(model)


def test_pieces_of_the_checkpoint_are_plain_safetensors(artifact):
    """One file, the format that transformers asks for, and core names as the module has them."""
    _, out = artifact("gpt2")
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        names = {name for name in file.keys() if ".mlp." in name}  # noqa: SIM118 (not a mapping)
    ffn = {f"up.terms.0.{core}" for core in ("aux_0", "aux_1", "central_2")}
    ffn |= {f"down.terms.0.{core}" for core in ("central_0", "aux_1", "aux_2")}
    ffn |= {"up.bias", "down.bias", "router.weight"}
    assert {name.partition(".mlp.")[2] for name in names} == ffn
    assert len(names) == LAYERS * len(ffn)
