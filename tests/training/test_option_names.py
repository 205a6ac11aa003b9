"""`--option` and `--set`: unknown names and values that do not fit are told in one line."""

import pytest
from helpers.models import generative
from helpers.tiny import make_config
from transformers import AutoConfig

from mpoe_convert.errors import TrainingError
from mpoe_convert.training.option_names import check_arguments, check_options


@pytest.fixture
def config(artifact):
    return AutoConfig.from_pretrained(artifact("gpt2", generative("gpt2"))[1], trust_remote_code=True)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("nonsense", 3, "options nonsense: the config of out has no such option; nearest is "),
        ("router_aux_loss_coeff", 1, "no such option; nearest is router_aux_loss_coef$"),
        ("resid_pdorp", 0.1, "nearest is resid_pdrop$"),
        ("to_dict", 3, "no such option"),
        ("mpoe", 3, "no such option"),
        ("model_type", "llama", "no such option"),
        ("num_experts", 3, "no such option"),
        ("token", "x", "no such option"),
        ("revision", "main", "no such option"),
        (3, 4, "options 3: "),
        ("router_aux_loss_coef", "abc", "options router_aux_loss_coef is 'abc'; expected a number$"),
        ("output_router_logits", 1, "is 1; expected true or false$"),
        ("router_tasks", "a", "is 'a'; expected a list or null$"),
        ("resid_pdrop", "abc", "options resid_pdrop is 'abc': "),
        ("dtype", "foo", "options dtype is 'foo'; expected float32, bfloat16 or float16$"),
    ],
)
def test_an_option_that_the_model_does_not_have(name, value, message, config):
    with pytest.raises(TrainingError, match=message) as caught:
        check_options({name: value}, config, "out")
    assert "\n" not in str(caught.value)


def test_options_that_it_has(config):
    given = {"router_aux_loss_coef": "1e-3", "router_tasks": ["a"], "mpoe_cache_bytes": None, "n_layer": 2}
    given |= {"attn_implementation": "eager", "resid_pdrop": 0.1, "dtype": "bfloat16", "num_labels": 3}
    assert check_options(given, config, "out") == given | {"router_aux_loss_coef": 1e-3}


def test_a_dense_model_has_no_router():
    with pytest.raises(TrainingError, match="no such option"):
        check_options({"router_aux_loss_coef": 0.1}, make_config("gpt2"), "dense")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("nonsense", 3, "^arguments nonsense: transformers.TrainingArguments has no such field; nearest is "),
        ("learning_rat", 3, "nearest is learning_rate$"),
        ("max_grad_norm", "abc", "^arguments max_grad_norm is 'abc'; expected a number$"),
        ("bf16_full_eval", 3, "expected true or false$"),
        ("output_dir", "x", "^arguments output_dir: expected output$"),
    ],
)
def test_an_argument_that_transformers_does_not_have(name, value, message):
    with pytest.raises(TrainingError, match=message):
        check_arguments({name: value})


def test_arguments_that_it_has():
    given = {"adam_epsilon": "1e-6", "gradient_checkpointing": True, "optim": "sgd"}
    assert check_arguments(given) == given | {"adam_epsilon": 1e-6}
