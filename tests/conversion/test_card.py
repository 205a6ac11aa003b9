"""The model card: its code runs, its metadata are the Hub's, what is recorded in it is what was measured."""

import hashlib
import json
import re
import shutil

import pytest
import transformers
from click.testing import CliRunner
from helpers.data import QUICK, rows, words, write
from helpers.tiny import save_tiny, save_tokenizer
from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from safetensors.torch import load_file

from mpoe_convert import Finetuning, Recipe, convert, evaluate, finetune
from mpoe_convert.artifact.card_file import for_repository, source_front_matter
from mpoe_convert.artifact.layout import file_names, own_files
from mpoe_convert.artifact.snippets import PIPELINE_TAGS
from mpoe_convert.cli import main
from mpoe_convert.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
HEADS = [
    ("gpt2", "AutoModelForCausalLM"),
    ("llama", "AutoModelForCausalLM"),
    ("qwen2_vl", "AutoModelForImageTextToText"),
    ("t5", "AutoModelForSeq2SeqLM"),
    ("bart", "AutoModelForSeq2SeqLM"),
    ("bert", "AutoModelForMaskedLM"),
    ("bert", "AutoModelForSequenceClassification"),
]


def code_of(card: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", card, re.M | re.S)


def test_every_head_that_has_code_is_tested():
    assert {auto for _, auto in HEADS} == set(PIPELINE_TAGS)


@pytest.mark.parametrize(("model_type", "auto"), HEADS)
def test_the_code_of_the_card_runs(model_type, auto, tmp_path, monkeypatch, capsys):
    """As it stands there, but for the place of the model; it trains and saves what loads again."""
    dense = save_tiny(model_type, auto, tmp_path / "dense")
    save_tokenizer(dense)
    if auto == "AutoModelForMaskedLM":
        transformers.AutoTokenizer.from_pretrained(dense, mask_token="w3").save_pretrained(dense)
    convert(Recipe(str(dense), experts=2, bond_dim=4), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert ModelCard(card).data.pipeline_tag == PIPELINE_TAGS[auto]
    use, train = code_of(card.replace("path/to/this", "out"))
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(use, names)
    assert len(capsys.readouterr().out.splitlines()) == 1
    exec(train, names)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "tuned"))
    assert before.keys() == after.keys()
    assert all(
        (before[name] != after[name]).any() for name in before if name.endswith(("central_1", "aux_0"))
    )
    getattr(transformers, auto).from_pretrained("tuned", trust_remote_code=True)


def test_other_heads_and_models_without_a_tokenizer_get_what_is_known(tmp_path):
    for model_type, auto in (("vit", "AutoModelForImageClassification"), ("gpt2", "AutoModelForCausalLM")):
        dense = save_tiny(model_type, auto, tmp_path / model_type)
        convert(Recipe(str(dense), experts=2, bond_dim=4), tmp_path / f"{model_type}-out")
        (code,) = code_of((tmp_path / f"{model_type}-out" / "README.md").read_text())
        assert f"{auto}.from_pretrained(model_id, trust_remote_code=True)" in code and "tokenizer" not in code


def test_what_a_person_wants_to_know(tmp_path, tiny_gpt2):
    report = convert(Recipe(str(tiny_gpt2), experts=2, bond_dim=4, layers="0"), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    totals = report.plan.totals
    for said in (
        "The card of its base names no licence",
        f"It stores {totals.stored_params / totals.dense_params:.2f} times the parameters of tiny-gpt2",
        f"takes {totals.flops_per_token / totals.dense_flops_per_token:.2f} times its FLOPs",
        "1 feed-forward network was left dense",
        "@inproceedings{gao2022mpoe,",
    ):
        assert said in card
    titles = re.findall("^## (.*)$", card, re.M)
    assert titles == ["How to use it", "Parameters", "Reconstruction error", "Limits", "Citation"]


# ------------------------------------------------------------------------------ recorded evaluations


@pytest.fixture
def out(artifact, tmp_path):
    """An artifact with a card of its own."""
    return shutil.copytree(artifact("gpt2")[1], tmp_path / "out")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "secret" / "text.txt"
    path.parent.mkdir()
    path.write_text(words(101))
    return path


def results(folder) -> tuple[str, list[EvalResult]]:
    """As the Hub reads them."""
    front = ModelCard.load(folder / "README.md").data.to_dict()
    return model_index_to_eval_results(front["model-index"])


def test_a_recorded_evaluation_is_in_report_card_and_metadata(out, text, artifact, tmp_path):
    before = (out / "README.md").read_text()
    evaluate(str(out), str(text), length=16)
    assert (out / "README.md").read_text() == before  # only when asked
    dense, _ = artifact("gpt2")
    found = evaluate(str(out), str(text), against=str(dense), length=16, record=True)
    name, (result,) = results(out)
    assert (name, result.task_type, result.metric_type) == ("out", "text-generation", "perplexity")
    assert result.metric_value == found.metrics["perplexity"].value
    assert (result.dataset_type, result.dataset_name) == ("text", "text.txt")
    assert result.metric_args == {"length": 16, "stride": 8}
    (recorded,) = json.loads((out / "evaluation_report.json").read_text())["evaluations"]
    expected = json.loads(json.dumps(found.to_json())) | {"data": ["text.txt"], "other": "dense"}
    expected |= {"sha256": hashlib.sha256(text.read_bytes()).hexdigest()}
    expected["weights_sha256"] = hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()
    assert recorded == {key: value for key, value in expected.items() if key != "model"}
    card = (out / "README.md").read_text()
    assert f"| Perplexity | {found.metrics['perplexity'].value:.4g} (" in card
    assert card.index("## Evaluation") < card.index("## Limits") and "secret" not in card
    assert own_files(out) == file_names(out)

    other = tmp_path / "other.txt"
    other.write_text(words(60, seed=1))
    evaluate(str(out), str(other), length=16, record=True)
    again = evaluate(str(out), str(text), length=12, record=True)  # replaces the first
    _, both = results(out)
    assert {result.dataset_name for result in both} == {"text.txt", "other.txt"} and len(both) == 2
    assert again.metrics["perplexity"].value in [result.metric_value for result in both]
    assert (out / "README.md").read_text().count("| Perplexity |") == 2


def test_files_of_the_same_name_are_told_apart_by_their_contents(out, text, tmp_path):
    (tmp_path / "text.txt").write_text(words(101, seed=1))
    (tmp_path / "copy").mkdir()
    shutil.copyfile(text, tmp_path / "copy" / "text.txt")
    for path in (text, tmp_path / "text.txt", tmp_path / "copy" / "text.txt"):
        found = evaluate(str(out), str(path), length=16, record=True)
    _, both = results(out)
    assert [result.dataset_name for result in both] == ["text.txt", "text.txt"]
    assert both[1].metric_value == found.metrics["perplexity"].value != both[0].metric_value
    prefixes = [hashlib.sha256(path.read_bytes()).hexdigest()[:12] for path in (tmp_path / "text.txt", text)]
    assert [result.dataset_revision for result in both] == prefixes
    card = (out / "README.md").read_text()
    assert all(f"on text.txt (SHA-256 {prefix}…)" in card for prefix in prefixes)


def test_results_of_others_stay_and_all_of_them_go_when_the_model_changes(out, text, tmp_path):
    theirs = EvalResult("text-generation", "wikitext", "WikiText", "perplexity", 30.0)
    card = ModelCard.load(out / "README.md")
    card.data.eval_results, card.data.model_name = [theirs], "theirs"
    card.save(out / "README.md")
    evaluate(str(out), str(text), length=16, record=True)
    name, found = results(out)
    assert name == "theirs" and found[0] == theirs and len(found) == 2
    pushed = ModelCard(for_repository((out / "README.md").read_text(), "me/moe"))
    assert pushed.data.model_name == "moe" and pushed.data.eval_results == found
    (out / "README.md").write_text(str(pushed))  # as it is when it comes from the Hub

    tuned = tmp_path / "tuned"
    finetune(Finetuning(str(out), str(text), **QUICK), tuned)
    card = ModelCard.load(tuned / "README.md")
    assert card.data.eval_results is None and "## Evaluation" not in card.text
    assert 'model_id = "path/to/this"' in card.text and "me/moe" not in card.text
    assert not (tuned / "evaluation_report.json").exists()


def test_all_metrics_of_a_task_are_recorded(artifact, tmp_path):
    _, made = artifact("t5")
    out = shutil.copytree(made, tmp_path / "out")
    found = evaluate(str(out), write(tmp_path / "data.jsonl", rows("seq2seq", 4)), length=8, record=True)
    _, recorded = results(out)
    assert [result.metric_value for result in recorded] == [each.value for each in found.metrics.values()]
    assert {result.task_type for result in recorded} == {"text2text-generation"}
    assert len({result.metric_type for result in recorded}) == len(found.metrics) == 4


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "README.md",
            "---\na: [\n---\n# Mine\n",
            "README.md' is no model card with front matter (while parsing",
        ),
        ("README.md", "---\n- a\n---\n# Mine\n", "README.md' is no model card with front matter (repo card"),
        (
            "evaluation_report.json",
            "[]",
            "evaluation_report.json' holds a JSON list, expected evaluations: delete",
        ),
        (
            "evaluation_report.json",
            '{"evaluations": [{}]}',
            "holds no evaluations as this tool writes them: delete",
        ),
    ],
)
def test_what_is_damaged_is_told_before_anything_is_scored(name, content, said, out, text):
    (out / name).write_text(content)
    with pytest.raises(CheckpointError, match=re.escape(said)):
        evaluate(str(out), str(text) + "-is-not-there", record=True)
    assert (out / name).read_text() == content


def test_only_an_artifact_takes_a_record(artifact, text):
    dense, _ = artifact("gpt2")
    done = CliRunner().invoke(main, ["evaluate", str(dense), "--data", str(text), "--record"])
    assert done.exit_code == 1 and "is not an artifact of mpoe-convert" in done.stderr
    done = CliRunner().invoke(main, ["evaluate", "me/moe", "--data", str(text), "--record"])
    assert (
        done.exit_code == 1 and "'me/moe' is not a folder: expected a folder that a conversion" in done.stderr
    )


@pytest.mark.parametrize(
    ("card", "front"),
    [
        ("---\nwidget: a---b\nlicense: mit\n---\n# Title\n", {"widget": "a---b", "license": "mit"}),
        ("\ufeff---\r\nlicense: mit\r\n---\r\n# Title\r\n", {"license": "mit"}),
        ("---\nlicense: mit\n---", {"license": "mit"}),
        ("# Title\n\n---\nlicense: mit\n---\n", {}),
        ("---\n- mit\n---\n", {}),
        ("---\nlicense: [mit\n---\n", {}),
    ],
    ids=["dashes in a value", "from Windows", "nothing behind", "not in front", "a list", "no YAML"],
)
def test_the_front_matter_of_a_source(card, front, tmp_path):
    (tmp_path / "README.md").write_bytes(card.encode())
    assert source_front_matter(tmp_path) == front
