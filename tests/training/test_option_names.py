"""`--option` and `--set`: unknown names and values that do not fit are told in one line."""

import pytest
from helpers.models import generative
from helpers.tiny import make_config
from transformers import AutoConfig, AutoModelForCausalLM

from mpoe_convert import Finetuning
from mpoe_convert.errors import TrainingError
from mpoe_convert.options import named_by_flags
from mpoe_convert.training.finetune import own_arguments
from mpoe_convert.training.option_names import (
    check_arguments,
    check_options,
    check_schedule,
    check_trackers,
    check_weights_fit,
)


@pytest.fixture(autouse=True)
def command_line():
    with named_by_flags():
        yield


@pytest.fixture
def config(artifact):
    return AutoConfig.from_pretrained(artifact("gpt2", generative("gpt2"))[1], trust_remote_code=True)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("nonsense", 3, "--option nonsense: the config of 'out' has no such option$"),
        ("router_aux_loss_coeff", 1, "no such option; did you mean 'router_aux_loss_coef'\\?$"),
        ("resid_pdorp", 0.1, "did you mean 'resid_pdrop'\\?$"),
        ("to_dict", 3, "no such option"),
        ("mpoe", 3, "--option mpoe is fixed: with another value 'out' would be another model"),
        ("model_type", "llama", "is fixed"),
        ("n_layer", 2, "--option n_layer is fixed: "),
        ("num_hidden_layers", 2, "is fixed"),
        ("n_head", 1, "is fixed"),
        ("vocab_size", 7, "is fixed"),
        ("tie_word_embeddings", False, "is fixed"),
        ("return_dict", False, "is fixed"),
        ("num_experts", 3, "no such option"),
        ("token", "x", "no such option"),
        ("revision", "main", "no such option"),
        (3, 4, "--option 3: "),
        ("router_aux_loss_coef", "abc", "--option router_aux_loss_coef is 'abc'; expected a number$"),
        ("output_router_logits", 1, "is 1; expected true or false$"),
        ("router_tasks", "a", "is 'a'; expected a list of texts or null$"),
        ("resid_pdrop", "abc", "--option resid_pdrop is 'abc': "),
        ("dtype", "foo", "--option dtype is 'foo'; expected float32, bfloat16 or float16$"),
    ],
)
def test_an_option_that_the_model_does_not_have(name, value, message, config):
    with pytest.raises(TrainingError, match=message) as caught:
        check_options({name: value}, config, "out")
    assert "\n" not in str(caught.value)


def test_options_that_it_has(config):
    given = {"router_aux_loss_coef": "1e-3", "router_tasks": ["a"], "mpoe_cache_bytes": None}
    given |= {"attn_implementation": "eager", "resid_pdrop": 0.1, "dtype": "bfloat16", "num_labels": 3}
    assert check_options(given, config, "out") == given | {"router_aux_loss_coef": 1e-3}


def test_a_dense_model_has_no_router():
    with pytest.raises(TrainingError, match="no such option"):
        check_options({"router_aux_loss_coef": 0.1}, make_config("gpt2"), "dense")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("nonsense", 3, "^--set nonsense: transformers.TrainingArguments has no such field$"),
        ("adam_epsilo", 3, "did you mean 'adam_epsilon'\\?$"),
        ("adam_epsilon", "abc", "^--set adam_epsilon is 'abc'; expected a number$"),
        ("adam_epsilon", float("nan"), "is nan; expected a number$"),
        ("dataloader_num_workers", 1.5, "is 1.5; expected a whole number$"),
        ("save_total_limit", "1", "is '1'; expected (a whole number or null|null or a whole number)$"),
        (
            "optim",
            "adamw_torc",
            "is 'adamw_torc'; expected one of transformers' OptimizerNames; did you mean 'adamw_torch'",
        ),
        ("bf16_full_eval", 3, "expected true or false$"),
        ("output_dir", "x", "^--set output_dir: expected -o, the output$"),
    ],
)
def test_an_argument_that_transformers_does_not_have(name, value, message):
    with pytest.raises(TrainingError, match=message):
        check_arguments({name: value}, {"output_dir": "-o, the output"})


@pytest.mark.parametrize("field", own_arguments(Finetuning("m", "t.txt")))
def test_an_argument_that_an_own_option_sets(field):
    option = own_arguments(Finetuning("m", "t.txt"))[field][0]
    flag = f"--{option.replace('_', '-')}"
    with pytest.raises(TrainingError, match=f"^--set {field}: expected {flag}$"):
        check_arguments({field: 1}, {field: flag})
    assert option in Finetuning.__dataclass_fields__


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ({"arguments": {"learning_rate": 0.1}}, "--set learning_rate: expected --learning-rate$"),
        ({"arguments": {"bf16": True}}, "--set bf16: expected --precision$"),
        ({"arguments": {"max_steps": -5}}, "--set max_steps: expected --steps$"),
        ({"arguments": {"output_dir": "x"}}, "--set output_dir: expected -o, the output$"),
        (
            {"arguments": {"hub_token": "hf_x"}},
            "--set hub_token: expected the token of the run, which no report keeps$",
        ),
        ({"arguments": {"eval_strategy": "epoch", "save_strategy": "no"}, "eval_data": "t.txt"}, "refuses"),
        ({"arguments": {"deepspeed": "nofile.json"}}, "refuses these training arguments: "),
        ({"schedule": "cosin"}, "--schedule is 'cosin'; .*; did you mean 'cosine'\\?$"),
        ({"report_to": "wandbb"}, "--report-to is 'wandbb'; .*; did you mean 'wandb'\\?$"),
        ({"options": {"n_layer": 1}}, "--option n_layer is fixed"),
    ],
)
def test_a_run_tells_before_it_reads_data_and_model(run, message, artifact, tmp_path, monkeypatch):
    from mpoe_convert.training import finetune as module

    monkeypatch.setattr(module, "_read", None)
    monkeypatch.setattr(module, "_load_model", None)
    (tmp_path / "t.txt").write_text("w3 w4")
    monkeypatch.chdir(tmp_path)
    model = artifact("gpt2", generative("gpt2"))[1]
    with pytest.raises(TrainingError, match=message) as told:
        module.finetune(Finetuning(model, "t.txt", **run), "tuned")
    assert "\n" not in str(told.value) and len(str(told.value)) < 400


def test_names_of_transformers():
    check_schedule("linear")
    check_trackers(["tensorboard", "all"])
    with pytest.raises(TrainingError, match="--schedule is 'xyz'; .*, such as linear$"):
        check_schedule("xyz")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("n_positions", 7, "--option n_positions is 7: that model has no place for 'wpe.weight' of 'out'"),
        ("n_inner", 60, "no place for 'h.0.mlp.c_fc.weight'"),
        ("add_cross_attention", True, "'out' lacks 'h.0.crossattention"),
        ("num_labels", "a", "--option num_labels is 'a', and transformers makes no model of it: "),
        ("activation_function", "geluu", "is 'geluu', and transformers makes no model of it: .*geluu"),
        ("attn_implementation", "foo", "is 'foo', and transformers makes no model of it: "),
        ("resid_pdrop", 0.3, None),
        ("attn_implementation", "eager", None),
        ("num_labels", 7, None),
    ],
)
def test_options_that_leave_no_place_for_the_weights(name, value, message):
    config = make_config("gpt2")
    if message is None:
        check_weights_fit({name: value}, config, "out", AutoModelForCausalLM, None)
        return
    with pytest.raises(TrainingError, match=message):
        check_weights_fit({name: value}, config, "out", AutoModelForCausalLM, None)


def test_options_may_add_routers_by_task(config, artifact):
    model = str(artifact("gpt2", generative("gpt2"))[1])
    options = {"router_tasks": ["a", "b"], "router_aux_loss_coef": 0.1}
    check_weights_fit(options, config, model, AutoModelForCausalLM, None)


def test_arguments_that_it_has():
    given = {"adam_epsilon": "1e-6", "gradient_checkpointing": True, "optim": "sgd"}
    assert check_arguments(given, {}) == given | {"adam_epsilon": 1e-6}
