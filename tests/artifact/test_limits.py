"""What a model can read: positions and token ids."""

import json

import pytest
import torch
import transformers
from helpers import vision_language
from helpers.data import QUICK, words, write
from helpers.tiny import make_config, save_tiny, save_tokenizer
from helpers.word_tokenizers import word_tokenizer

from mpoe_convert import Finetuning, Recipe, convert, evaluate, finetune
from mpoe_convert.artifact.limits import block_length, positions
from mpoe_convert.errors import DataError, TrainingError
from mpoe_convert.source.families import FAMILY_OF

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")

# Types beside the table's whose positions are embedded in another way.
OTHERS = (
    *("biogpt", "convbert", "data2vec-text", "deberta", "esm", "ibert", "longformer", "luke", "markuplm"),
    *("mpnet", "nystromformer", "roberta-prelayernorm", "roformer", "xlm", "xlm-roberta-xl", "yoso"),
)
# Types that compute positions (rotary, biases, sinusoids), so that a longer text raises nothing.
COMPUTED = {
    *("cohere", "cohere2", "exaone4", "falcon", "gemma", "gemma2", "gemma3_text", "glm", "gpt_neox"),
    *("granite", "helium", "llama", "m2m_100", "ministral", "mistral", "olmo", "olmo2", "olmo3", "phi"),
    *("modernbert", "phi3", "qwen2", "qwen3", "smollm3", "stablelm", "starcoder2", "xglm"),
    *vision_language.CONFIGS,
}
UNLIMITED = {"bloom", "mt5", "t5", "umt5", "vit"}


@pytest.mark.parametrize(("limit", "length"), [(None, 512), (0, 512), (48, 48), (512, 512), (4096, 512)])
def test_blocks_are_as_long_as_the_model_can_read_up_to_512_tokens(limit, length):
    assert block_length(limit) == length


@pytest.mark.parametrize("model_type", sorted({*FAMILY_OF, *OTHERS}))
def test_positions_are_what_the_model_takes(model_type):
    """The stock model reads as many tokens as it has positions, and fails with one more."""
    config = make_config(model_type)
    if model_type != "vit":
        config.pad_token_id = 1
    limit = positions(config)
    if model_type in UNLIMITED:
        assert limit is None
        return
    model = transformers.AutoModel.from_config(config).eval()

    def read(count: int) -> None:
        ids = torch.full((1, count), 5)
        decoder = {"decoder_input_ids": ids} if config.is_encoder_decoder else {}
        with torch.no_grad():
            model(input_ids=ids, **decoder)

    read(limit)
    if model_type in COMPUTED:
        assert limit == config.get_text_config().max_position_embeddings
    else:
        with pytest.raises((IndexError, RuntimeError)):
            read(limit + 1)


def test_a_number_that_the_model_does_not_read():
    """The files of the first T5 say n_positions, and XLNet's class says -1."""
    config = make_config("t5")
    config.n_positions = 512
    assert positions(config) is None
    assert positions(transformers.XLNetConfig()) is None
    parts = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(
        make_config("roberta"), transformers.GPT2Config(n_positions=48)
    )
    assert positions(parts) == 48


def test_a_number_that_custom_code_computes():
    class OwnConfig(transformers.PretrainedConfig):
        model_type = "own"

        @property
        def max_position_embeddings(self):
            return 24

    assert positions(OwnConfig()) == 24


def roberta(folder, model_type="roberta"):
    """A stock model with padding token 1, so that two of its 64 positions are never used."""
    torch.manual_seed(0)
    config = make_config(model_type)
    config.pad_token_id, config.bos_token_id = 1, 0
    transformers.AutoModelForMaskedLM.from_config(config).save_pretrained(folder)
    tokenizer = word_tokenizer(pad_token="<s>", eos_token="</s>", mask_token="w38")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("model_type", ["roberta", "xlm-roberta", "camembert"])
def test_commands_take_as_many_tokens_as_there_are_positions(model_type, tmp_path):
    folder = roberta(tmp_path / "dense", model_type)
    text = tmp_path / "text.txt"
    text.write_text(words(2000))
    recipe = Recipe(str(folder), experts=2, bond_dim=2, keep=1.0, calibrate=(str(text),))
    convert(recipe.replace(calibration_tokens=640), tmp_path / "out")
    for name in ("dense", "out"):
        model, data = str(tmp_path / name), str(text)
        report = finetune(Finetuning(model, data, steps=1, batch_size=2), tmp_path / f"tuned-{name}")
        assert report["steps"] == 1 and evaluate(model, data, limit=2).settings["length"] == 62
        with pytest.raises(TrainingError, match=f"^length is 63; '{model}' takes at most 62 tokens$"):
            finetune(Finetuning(model, data, length=63), tmp_path / "more")
        with pytest.raises(TrainingError, match="^length is 63; .* takes at most 62 tokens$"):
            evaluate(model, data, length=63)


def test_a_shorter_teacher_or_other_model(tmp_path):
    """The default length is one that both take."""
    text = tmp_path / "text.txt"
    text.write_text(words(500))
    for name, number in (("long", 64), ("short", 24)):
        config = make_config("gpt2")
        config.n_positions = number
        transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / name)
        save_tokenizer(tmp_path / name)
    long, short, data = str(tmp_path / "long"), str(tmp_path / "short"), str(text)
    assert evaluate(long, data, against=short, limit=2).settings["length"] == 24
    with pytest.raises(TrainingError, match="length is 25; .*short' takes at most 24 tokens"):
        evaluate(long, data, against=short, length=25)
    with pytest.raises(TrainingError, match="length is 25; .*short' takes at most 24 tokens"):
        finetune(Finetuning(long, data, teacher=short, length=25), tmp_path / "tuned")
    finetune(Finetuning(long, data, teacher=short, steps=1), tmp_path / "tuned")


MESSAGE = r"^token 40 \('new' of the tokenizer, whose largest is 40\) is to be read, and {} embeds 40 tokens"


@pytest.fixture
def outgrown(tmp_path):
    """A model, and beside it a tokenizer to which a word was added."""
    folder = save_tiny("gpt2", "AutoModelForCausalLM", tmp_path / "dense")
    word_tokenizer(extra=("new",), eos_token="</s>").save_pretrained(folder)
    text = tmp_path / "text.txt"
    text.write_text(f"{words(100)} new {words(900)}")
    return str(folder), str(text)


def test_tokens_that_the_model_does_not_embed(outgrown, tmp_path):
    folder, text = outgrown
    message = MESSAGE.format(folder)
    with pytest.raises(DataError, match=message + r" \(0 to 39\); expected the model's own tokenizer, or an"):
        finetune(Finetuning(folder, text, **QUICK), tmp_path / "tuned")
    with pytest.raises(DataError, match=message):
        evaluate(folder, text)
    recipe = Recipe(folder, experts=2, bond_dim=2, keep=1.0, calibrate=(text,), calibration_tokens=960)
    with pytest.raises(DataError, match=message):
        convert(recipe, tmp_path / "out")
    ids = torch.full((2, 64), 40)
    with pytest.raises(DataError, match="^token 40 is to be read, and .* embeds 40 tokens"):
        convert(recipe.replace(calibrate=()), tmp_path / "out", calibration=[{"input_ids": ids}] * 4)
    assert not (tmp_path / "out").exists()


def test_other_models_that_do_not_embed_them(outgrown, tmp_path):
    folder, text = outgrown
    config = make_config("gpt2")
    config.vocab_size = 41
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "resized")
    word_tokenizer(extra=("new",), eos_token="</s>").save_pretrained(tmp_path / "resized")
    resized = str(tmp_path / "resized")
    with pytest.raises(DataError, match=MESSAGE.format(folder)):
        evaluate(resized, text, against=folder)
    with pytest.raises(DataError, match=MESSAGE.format(folder)):
        finetune(Finetuning(resized, text, teacher=folder, **QUICK), tmp_path / "tuned")
    finetune(Finetuning(resized, text, **QUICK), tmp_path / "tuned")


@pytest.mark.parametrize("task", ["causal", "masked", "seq2seq", "classification"])
def test_an_added_padding_or_mask_token(task, tmp_path):
    """It would stand in batches, in the config that is written, or for a masked word."""
    model_type = {"causal": "llama", "masked": "bert", "seq2seq": "t5", "classification": "llama"}[task]
    auto = {"masked": "AutoModelForMaskedLM", "seq2seq": "AutoModelForSeq2SeqLM"}
    folder = save_tiny(model_type, auto.get(task, "AutoModelForCausalLM"), tmp_path / "dense")
    special = {"mask_token": "new"} if task == "masked" else {"pad_token": "new"}
    word_tokenizer(extra=("new",), eos_token="</s>", **special).save_pretrained(folder)
    rows = [{"text": words(9, seed=n), "target": words(4, seed=n), "label": n % 2} for n in range(20)]
    data = write(tmp_path / "data.jsonl", rows)
    run = Finetuning(str(folder), data, **QUICK, task=task)
    with pytest.raises(DataError, match=MESSAGE.format(folder)):
        finetune(run, tmp_path / "tuned")
    if task == "causal":  # nothing is padded with it
        assert evaluate(str(folder), data, length=16).count > 0


def test_positions_counted_from_another_padding_token(tmp_path):
    """The config that training writes would name the tokenizer's, and move all positions."""
    folder = roberta(tmp_path / "dense")
    word_tokenizer(pad_token="<pad>", eos_token="</s>", mask_token="w38").save_pretrained(folder)
    text = tmp_path / "text.txt"
    text.write_text(words(400))
    message = "the tokenizer's padding token is 0, and .* counts positions from its own, 1; expected"
    with pytest.raises(TrainingError, match=message):
        finetune(Finetuning(str(folder), str(text), **QUICK), tmp_path / "tuned")
    assert evaluate(str(folder), str(text), length=16).count > 0
    assert json.loads((folder / "config.json").read_text())["pad_token_id"] == 1
