"""Task-level routing: routers that look at the task of a sequence, not at its tokens."""

import pytest
import torch
import transformers
from datasets import Dataset
from helpers.data import QUICK, rows, write
from helpers.models import generative
from helpers.models import stored as weights
from helpers.tiny import make_inputs

from mpoe_convert import Finetuning, evaluate, finetune, router_stats
from mpoe_convert.errors import DataError, TrainingError
from mpoe_convert.source.texts import Columns, Tasks, language_blocks

TASKS = ["sums", "rhymes", "maps"]


@pytest.fixture
def load(artifact):
    def load(model_type: str, **options):
        _, out = artifact(model_type, noise=0.5)
        auto = getattr(transformers, generative(model_type))
        options = {"router_tasks": TASKS} | options
        torch.manual_seed(0)
        return auto.from_pretrained(out, trust_remote_code=True, **options).eval()

    return load


def choices(mixture, tokens, task) -> list[list[int]]:
    with torch.no_grad():
        return mixture.router(tokens, task=task).choices.experts.unflatten(0, (-1, 2)).tolist()


def test_a_task_decides_whatever_the_token(load):
    _, mixture = load("gpt2").mixtures()[0]
    router = mixture.router
    tokens = torch.randn(12, router.weight.shape[1])
    for task in range(3):
        expected = (router.weight @ router.tasks[task]).topk(2).indices.tolist()
        assert choices(mixture, tokens, torch.tensor([task])) == [expected] * 12
    mixed = choices(mixture, tokens, torch.tensor([2, 0, 1]))  # three sequences of four tokens
    assert mixed == [
        choices(mixture, tokens, torch.tensor([t]))[0] for t in (2, 2, 2, 2, 0, 0, 0, 0, 1, 1, 1, 1)
    ]
    own = torch.randn(3, router.weight.shape[1])
    expected = (own @ router.weight.T).topk(2).indices
    assert choices(mixture, tokens, own) == expected.repeat_interleave(4, 0).tolist()


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "bert", "t5", "bart"])
def test_a_mixed_batch_is_its_sequences_apart(model_type, load):
    model = load(model_type)
    inputs = make_inputs(model, generative(model_type))
    batch = len(next(iter(inputs.values())))
    tasks = [t % 3 for t in range(2, 2 + batch)]
    with torch.no_grad():
        together = model(**inputs, task_ids=torch.tensor(tasks)).logits
        for row, task in enumerate(tasks):
            model.route_by(TASKS[task])
            alone = model(**{name: tensor[row : row + 1] for name, tensor in inputs.items()}).logits
            torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-5)
        model.route_by("sums")
        first = model(**inputs).logits
        model.route_by(2)
        assert not torch.allclose(first, model(**inputs).logits, atol=1e-3)


@pytest.mark.parametrize("model_type", ["gpt2", "t5"])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_generation_by_task(model_type, num_beams, load):
    model = load(model_type)
    ids = torch.arange(3, 15).reshape(2, 6)
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": num_beams, "attention_mask": ids > 0}
    both = model.generate(ids, task_ids=["maps", "sums"], **options)
    for row, task in enumerate(("maps", "sums")):
        model.route_by(task)
        alone = model.generate(ids[row : row + 1], **options | {"attention_mask": ids[:1] > 0})
        width = min(both.shape[1], alone.shape[1])
        assert both[row, :width].tolist() == alone[0, :width].tolist()
    model.route_by(None)
    with pytest.raises(ValueError, match="choose by task"):
        model.generate(ids, **options)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("coef", [0.0, 0.5])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_checkpointing_repeats_the_tasks_of_the_pass(reentrant, coef, load):
    """The backward pass comes when the pass with its tasks is over."""
    model = load("gpt2", router_aux_loss_coef=coef).train()
    ids = torch.arange(3, 27).reshape(3, 8)
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.zero_grad()
        torch.manual_seed(0)
        model(ids, labels=ids, task_ids=torch.tensor([0, 2, 1])).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    tables = [name for name in gradients[0] if name.endswith("router.tasks")]
    assert tables and all(gradients[0][name].any() for name in tables)
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_checkpointing_repeats_the_task_that_was_set(reentrant, load):
    """Whatever is set when the backward pass comes."""
    model = load("llama", router_aux_loss_coef=0.0).train()
    ids, gradients = torch.arange(3, 27).reshape(3, 8), []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.zero_grad()
        losses = []
        for task in ("maps", "sums"):
            model.route_by(task)
            losses.append(model(ids, labels=ids).loss)
        sum(losses).backward()
        gradients.append(model.model.layers[0].mlp.router.tasks.grad.clone())
    assert gradients[0][0].any() and not gradients[0][1].any() and gradients[0][2].any()
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


def test_in_bfloat16(load):
    model, ids = load("llama"), torch.arange(3, 15).reshape(2, 6)
    model.route_by("maps")
    expected = model(ids).logits
    found = model.to(torch.bfloat16)(ids).logits
    assert (found - expected).norm() < 0.1 * expected.norm()


def test_what_cannot_be(load):
    model, ids = load("gpt2"), torch.arange(3, 15).reshape(2, 6)
    with pytest.raises(ValueError, match="choose by task"):
        model(ids)
    with pytest.raises(ValueError, match=r"no such task: \['verse'\]; this model knows"):
        model.route_by("verse")
    for strange in (-1, 7, True, [0, True], torch.tensor([0, -1]), torch.tensor(7), torch.tensor([True])):
        with pytest.raises(ValueError, match=r"no such task: \[(-1|7|True)\]; this model knows"):
            model(ids, task_ids=strange)
    for none in ([], torch.tensor([], dtype=torch.long)):
        with pytest.raises(ValueError, match="no task was given; this model knows"):
            model(ids, task_ids=none)
    with pytest.raises(ValueError, match=r"3 tasks were given for 2 sequences"):
        model(ids, task_ids=[0, 1, 2])
    model.route_by([0, 1, 2])  # left from a larger batch
    with pytest.raises(ValueError, match=r"3 tasks were given for 2 sequences"):
        model(ids)
    with pytest.raises(ValueError, match="choose by token"):
        load("gpt2", router_tasks=None).route_by("sums")
    own = load("gpt2", router_tasks=[])  # embeddings from elsewhere
    assert own.transformer.h[0].mlp.router.tasks is None
    own.route_by(torch.randn(own.config.hidden_size))
    assert own(ids).logits.isfinite().all()


def test_tasks_are_saved(load, tmp_path):
    model, ids = load("llama"), torch.arange(3, 15).reshape(2, 6)
    model.route_by("maps")
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True).eval()
    again.route_by("maps")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert again.config.router_tasks == TASKS


# ---------------------------------------------------------------------------------------------------
# finetune and evaluate


@pytest.mark.parametrize(
    ("model_type", "auto_class", "task"),
    [
        ("gpt2", "AutoModelForCausalLM", "causal"),
        pytest.param("t5", "AutoModelForSeq2SeqLM", "seq2seq", marks=pytest.mark.slow),
        pytest.param("llama", "AutoModelForSequenceClassification", "classification", marks=pytest.mark.slow),
    ],
)
def test_finetune_and_evaluate(model_type, auto_class, task, artifact, tmp_path):
    dense, out = artifact(model_type, auto_class)
    values = [row | {"about": TASKS[i % 2]} for i, row in enumerate(rows(task))]
    data = write(tmp_path / "data.jsonl", values)
    run = Finetuning(str(out), data, data, **QUICK | {"length": 8, "routed_by": "about"})
    finetune(run, tmp_path / "tuned")
    names = ["rhymes", "sums"]
    tables = {n: t for n, t in weights(tmp_path / "tuned").items() if n.endswith("router.tasks")}
    assert tables and all(len(t) == 2 for t in tables.values())
    columns = Columns(routed_by="about")
    options = {"length": 8, "columns": columns}
    against = None if task == "classification" else str(dense)  # which does not know the classes
    found = evaluate(str(tmp_path / "tuned"), data, against=against, **options)
    model = getattr(transformers, auto_class).from_pretrained(tmp_path / "tuned", trust_remote_code=True)
    assert model.config.router_tasks == names
    with router_stats(model) as stats:
        model.route_by("sums")
        model.eval()(**make_inputs(model, auto_class))
    assert all(sorted(s.load.tolist())[-2:] == [0.5, 0.5] for s in stats.values())
    if task == "causal":  # a model that chooses by token, on the same examples
        evaluate(str(tmp_path / "tuned"), data, against=str(out), **options)
    with pytest.raises(TrainingError, match="choose by task; expected routed_by"):
        finetune(Finetuning(str(tmp_path / "tuned"), data, **QUICK), tmp_path / "no")
    counts = [
        evaluate(str(tmp_path / "tuned"), write(tmp_path / f"{n}.jsonl", part), **options)
        for n, part in ((n, [row for row in values if row["about"] == n]) for n in names)
    ]
    assert found.count == sum(part.count for part in counts)
    with pytest.raises(TrainingError, match="choose by task"):
        evaluate(str(tmp_path / "tuned"), data, length=8)
    strange = write(tmp_path / "strange.jsonl", [row | {"about": "verse"} for row in values])
    with pytest.raises(TrainingError, match="no such task"):
        evaluate(str(tmp_path / "tuned"), strange, **options)
    with pytest.raises(TrainingError, match=r"name the tasks \['verse'\], the routers of .* know"):
        finetune(
            Finetuning(str(tmp_path / "tuned"), strange, **QUICK | {"routed_by": "about"}), tmp_path / "no"
        )
    with pytest.raises(TrainingError, match="no routers that choose by task"):
        finetune(Finetuning(str(dense), data, **QUICK | {"routed_by": "about"}), tmp_path / "no")
    with pytest.raises(DataError, match="needs about"):
        plain = write(tmp_path / "plain.jsonl", rows(task))
        finetune(Finetuning(str(out), plain, **QUICK | {"routed_by": "about"}), tmp_path / "no")


def test_blocks_hold_one_task_and_none_is_lost(artifact):
    """Texts of many tasks, mixed: leftovers are one per task, not one per task and thousand rows."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(artifact("gpt2")[1], trust_remote_code=True)
    names = [f"t{i}" for i in range(20)]
    values = [{"text": f"w{3 + i % 20} " * 10, "about": names[i % 20]} for i in range(2000)]
    data = Dataset.from_list(values)
    tasks = Tasks("about", tuple(names))
    blocks = language_blocks(data, tokenizer, "text", 128, tasks)
    for block in blocks:
        assert set(block["input_ids"]) <= {3 + block["task_ids"], tokenizer.eos_token_id}
    tokens = 2000 * (10 + (tokenizer.eos_token_id is not None))
    assert len(blocks) * 128 > tokens - 22 * 128
    short = Dataset.from_list([*values, {"text": "w3 w3", "about": "t20"}])
    with pytest.raises(DataError, match=r"texts of \['t20'\] give no whole block"):
        language_blocks(short, tokenizer, "text", 128, Tasks("about", (*names, "t20")))


def test_the_seed_makes_the_embeddings(artifact, tmp_path):
    _, out = artifact("gpt2")
    data = write(tmp_path / "data.jsonl", [row | {"about": "sums"} for row in rows("causal")])
    run = Finetuning(
        str(out), data, **QUICK | {"length": 8, "steps": 1, "routed_by": "about", "learning_rate": 1e-9}
    )
    found = []
    for name in ("one", "two"):
        torch.manual_seed(len(found))  # whatever ran before
        finetune(run, tmp_path / name)
        found.append(weights(tmp_path / name)["transformer.h.0.mlp.router.tasks"])
    torch.testing.assert_close(*found, rtol=0, atol=1e-6)
