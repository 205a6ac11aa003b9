"""`finetune`: real runs of transformers' Trainer on tiny models, on files of every kind."""

import json
import random
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from click.testing import CliRunner
from helpers.data import QUICK, rows, words, write
from helpers.loopback_hub import LoopbackHub, environment
from helpers.models import token_ids
from safetensors.torch import load_file

from mpoe_convert import Finetuning, evaluate, finetune, verify
from mpoe_convert.artifact.layout import file_names, is_artifact, own_files
from mpoe_convert.cli import main
from mpoe_convert.errors import CheckpointError, DataError, OutputError, RunError, TrainingError
from mpoe_convert.training.interrupts import Interrupted
from mpoe_convert.training.roles import role_of
from mpoe_convert.training.trainer import MpoeTrainer

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(words(600))
    return str(path)


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def changed(before: dict, after: dict) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


# ---------------------------------------------------------------------------------------------------
# Tasks and files


@pytest.mark.parametrize(
    ("model_type", "auto_class", "task", "suffix"),
    [
        ("gpt2", "AutoModelForCausalLM", "causal", ".jsonl"),
        ("bert", "AutoModelForMaskedLM", "masked", ".parquet"),
        ("t5", "AutoModelForSeq2SeqLM", "seq2seq", ".csv"),
        ("llama", "AutoModelForSequenceClassification", "classification", ".tsv"),
    ],
)
def test_a_task(model_type, auto_class, task, suffix, artifact, tmp_path):
    _, out = artifact(model_type, auto_class)
    data = write(tmp_path / f"data{suffix}", rows(task))
    target = tmp_path / "tuned"
    options = QUICK | {"length": 8}
    if task == "masked":
        with pytest.raises(TrainingError, match="no mask token"):
            finetune(Finetuning(str(out), data, **options), target)
        tokenizer = transformers.AutoTokenizer.from_pretrained(out, mask_token="w3", trust_remote_code=True)
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        options["tokenizer"] = str(tmp_path / "tokenizer")
    run = Finetuning(str(out), data, data, **options)
    report = finetune(run, target)
    assert report["task"] == task and report["steps"] == 4
    assert report == json.loads((target / "training_report.json").read_text()) | {"run": report["run"]}
    assert not list(target.glob("checkpoint-*")) and not (target / "training_args.bin").exists()
    losses = [entry["loss"] for entry in report["log"] if "loss" in entry]
    assert len(losses) == 2 and report["evaluation"]["eval_loss"] > 0
    assert ("eval_accuracy" in report["evaluation"]) == (task == "classification")
    moved = {role_of(name) for name in changed(weights(out), weights(target))}
    assert moved == {"central", "auxiliary", "router", "other"}
    model = getattr(transformers, auto_class).from_pretrained(target, trust_remote_code=True)
    assert type(model).__name__.startswith("MPOE")
    transformers.AutoTokenizer.from_pretrained(target, trust_remote_code=True)
    if task == "classification":
        assert model.config.label2id == {"even": 0, "odd": 1}
        data = write(tmp_path / "more.csv", [row for row in rows(task) if row["label"] == "odd"])
        finetune(Finetuning(str(target), data, **options), tmp_path / "more")  # the classes are kept
        assert weights(tmp_path / "more")["score.weight"].shape[0] == 2


def test_the_result_is_an_artifact(artifact, text, tmp_path):
    _, out = artifact("gpt2")
    target = tmp_path / "tuned"
    finetune(Finetuning(str(out), text, **QUICK, learning_rate=1e-9), target)
    assert {path.name for path in out.iterdir()} <= {path.name for path in target.iterdir()}
    assert own_files(target) == file_names(target)
    assert verify(target).ok
    finetune(Finetuning(str(target), text, **QUICK), tmp_path / "again")  # and can be trained on


def test_a_dense_model_is_trained_alike(artifact, text, tmp_path):
    dense, _ = artifact("gpt2")
    report = finetune(Finetuning(str(dense), text, **QUICK), tmp_path / "tuned")
    assert not [name for entry in report["log"] for name in entry if name.startswith("load_")]
    with pytest.raises(TrainingError, match="no centre to skip"):
        finetune(Finetuning(str(dense), text, **QUICK, skip_centre=0.5), tmp_path / "masked")
    copies = artifact("gpt2", kind="dense")[1]
    with pytest.raises(TrainingError, match="share no centre"):
        finetune(Finetuning(str(copies), text, **QUICK, skip_centre=0.5), tmp_path / "masked")


# ---------------------------------------------------------------------------------------------------
# Options


def test_mask_freezing_and_rates(artifact, text, tmp_path):
    _, out = artifact("gpt2", noise=0.1)
    cases = {
        "masked": ({"skip_centre": 1.0}, {"auxiliary", "router", "other"}),
        "centre": ({"freeze": "centre"}, {"auxiliary", "router", "other"}),
        "all-but": ({"freeze": "all-but-experts"}, {"central", "auxiliary", "router"}),
        "router": ({"router_lr": 0.0}, {"central", "auxiliary", "other"}),
    }
    for name, (options, expected) in cases.items():
        finetune(Finetuning(str(out), text, **QUICK, **options), tmp_path / name)
        after = weights(tmp_path / name)
        moved = {n for n in changed(weights(out), after) if not n.endswith(("up.bias", "down.bias"))}
        assert {role_of(n) for n in moved} == expected, name


@pytest.mark.parametrize(
    ("kind", "factor"), [("mpo", 1), ("dense", 1), ("low-rank", 3), ("adapter", 3), ("core-space", 1)]
)
def test_the_rate_of_what_experts_own(kind, factor, artifact, text, tmp_path):
    """Adam's first step moves every number by its rate, whatever its gradient."""
    _, out = artifact("gpt2", kind=kind, noise=0.1)
    quiet = {"steps": 1, "warmup": 0, "weight_decay": 0.0, "schedule": "constant", "learning_rate": 1e-3}
    finetune(Finetuning(str(out), text, **QUICK | quiet), tmp_path / "tuned")
    before, after = weights(out), weights(tmp_path / "tuned")
    steps = {role: 0.0 for role in ("auxiliary", "other")}
    for name in before:
        if role_of(name) in steps:
            largest = float((after[name] - before[name]).abs().max())
            steps[role_of(name)] = max(steps[role_of(name)], largest)
    assert steps == pytest.approx({"auxiliary": factor * 1e-3, "other": 1e-3}, rel=1e-2)


def test_steps_that_are_masked_are_those_of_the_seed(artifact, text, tmp_path):
    _, out = artifact("gpt2")
    moved, expected = [], []
    for seed in range(3):
        run = Finetuning(str(out), text, **QUICK | {"steps": 2, "warmup": 0}, skip_centre=0.75, seed=seed)
        finetune(run, tmp_path / str(seed))
        roles = {role_of(n) for n in changed(weights(out), weights(tmp_path / str(seed)))}
        moved.append("central" in roles)
        expected.append(any(random.Random(f"{seed}/{step}/0").random() >= 0.75 for step in range(2)))
    assert moved == expected and set(moved) == {True, False}


def test_precision_and_dtype(artifact, text, tmp_path):
    _, out = artifact("gpt2", dtype="bfloat16")
    finetune(Finetuning(str(out), text, **QUICK, precision="bfloat16"), tmp_path / "tuned")
    before, after = weights(out), weights(tmp_path / "tuned")
    assert {n: t.dtype for n, t in before.items()} == {n: t.dtype for n, t in after.items()}
    assert len(changed(before, after)) > 10


def test_a_teacher_heals(artifact, tmp_path):
    """A chain cut short comes closer to the dense model's outputs than by its own labels alone."""
    dense, out = artifact("gpt2", layout="balanced", bond_dim=2)
    path = tmp_path / "text.txt"
    path.write_text(words(4000))
    ids = token_ids(8, 16, seed=5)

    def logits(folder) -> torch.Tensor:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
        with torch.no_grad():
            return model(ids).logits.log_softmax(-1)

    goal = logits(dense)
    distances = {"before": (logits(out) - goal).norm()}
    options = QUICK | {"steps": 30, "batch_size": 8, "save_every": 100, "learning_rate": 3e-3}
    for name, weight in (("labels", None), ("logits", 0.0), ("hidden", 1.0)):
        teacher = {} if weight is None else {"teacher": str(dense), "hidden_weight": weight}
        run = Finetuning(str(out), str(path), **options, **teacher, teacher_weight=0.9)
        finetune(run, tmp_path / name)
        distances[name] = (logits(tmp_path / name) - goal).norm()
    assert distances["logits"] < 0.8 * distances["before"], distances
    assert distances["logits"] < distances["labels"] and distances["hidden"] < distances["labels"], distances


def test_accumulated_passes_make_the_same_step(artifact, text, tmp_path):
    """4 at once or 2 and 2; without the balancing loss, which is no sum over examples."""
    _, out = artifact("llama", noise=0.1)
    options = {"options": {"router_aux_loss_coef": 0.0}, "skip_centre": 0.5}
    for name, sizes in (("whole", {"batch_size": 4}), ("parts", {"batch_size": 2, "accumulate": 2})):
        finetune(Finetuning(str(out), text, **QUICK | sizes, **options), tmp_path / name)
    whole, parts, before = weights(tmp_path / "whole"), weights(tmp_path / "parts"), weights(out)
    for name in changed(before, whole):
        step = (whole[name] - before[name]).norm()
        assert (whole[name] - parts[name]).norm() < 0.02 * step, name


@pytest.mark.parametrize("converted", [True, False])
def test_accumulated_passes_of_a_head_that_counts_nothing_are_averaged(converted, artifact, tmp_path):
    """Llama's heads take `num_items_in_batch` and ignore it; every example has one label."""
    out = artifact("llama", "AutoModelForSequenceClassification", noise=0.1)[converted]
    data = write(tmp_path / "data.csv", rows("classification"))
    logged = []
    for name, sizes in (("whole", {"batch_size": 8}), ("parts", {"batch_size": 2, "accumulate": 4})):
        options = QUICK | sizes | {"steps": 1, "log_every": 1, "task": "classification"}
        options |= {"options": {"router_aux_loss_coef": 0.0}} if converted else {}
        report = finetune(Finetuning(str(out), data, **options), tmp_path / name)
        logged.append(next((e["loss"], e["grad_norm"]) for e in report["log"] if "loss" in e))
    assert logged[1] == pytest.approx(logged[0], rel=1e-2)


def test_label_smoothing_leaves_the_weight_of_the_routers_losses(artifact, tmp_path):
    """Of blocks of one text again and again, whose routers' losses are nearly the same."""
    _, out = artifact("llama", noise=0.1)
    data = write(tmp_path / "data.jsonl", rows("causal", 1) * 24)
    logged = {}
    for coef in (0.0, 10.0):
        for accumulate in (1, 4):
            options = {"length": 8, "steps": 1, "log_every": 1, "arguments": {"label_smoothing_factor": 0.1}}
            options |= {"options": {"router_aux_loss_coef": coef, "output_router_logits": coef > 0}}
            options |= {"batch_size": 8 // accumulate, "accumulate": accumulate}
            report = finetune(Finetuning(str(out), data, **options), tmp_path / f"{coef}-{accumulate}")
            found = next((e["loss"], e["grad_norm"]) for e in report["log"] if "loss" in e)
            logged[coef, accumulate] = found
    assert logged[10.0, 4] == pytest.approx(logged[10.0, 1], rel=1e-2)
    assert logged[0.0, 4] == pytest.approx(logged[0.0, 1], rel=1e-2)
    assert logged[10.0, 1][0] > logged[0.0, 1][0] + 10 and logged[10.0, 1][1] > 1.5 * logged[0.0, 1][1]
    compiled = {"label_smoothing_factor": 0.1, "torch_compile": True}
    with pytest.raises(TrainingError, match="leave one of them out"):
        finetune(Finetuning(str(out), data, **QUICK, arguments=compiled), tmp_path / "compiled")


@pytest.mark.parametrize(("averages", "factor"), [(True, 2), (False, 1)])
def test_a_teachers_part_is_scaled_as_the_loss_is(averages, factor):
    labels = torch.tensor([[1, 2, -100, 3], [-100, 2, 3, 1]])
    trainer = SimpleNamespace(model_accepts_loss_kwargs=True, _loss_shifts_labels=True, get_tp_size=lambda: 2)
    trainer.args = SimpleNamespace(average_tokens_across_devices=averages, n_gpu=1)
    trainer.accelerator = SimpleNamespace(num_processes=4)
    trainer._num_batches = lambda: MpoeTrainer._num_batches(trainer)
    assert MpoeTrainer._share_of_step(trainer, labels, torch.tensor(20)) == factor * 5 / 20
    assert MpoeTrainer._share_of_step(trainer, labels, None) == 1


# ---------------------------------------------------------------------------------------------------
# Interrupted runs


class Killed(BaseException):
    """Ends a process as SIGKILL does: nothing is cleaned up."""


def kill(step: int):
    def progress(done: int, steps: int, logs) -> None:
        if done == step:
            raise Killed

    return {"progress": progress}


def interrupt(step: int, number: int):
    def watch(what: str, done: int, total: int) -> None:
        if (what, done) == ("training", step):
            signal.raise_signal(number)

    return {"watch": watch}


def kill_while_saving(step: int, monkeypatch) -> dict:
    save = torch.save

    def half(value, path, *args, **kwargs):
        if str(path).endswith(f"checkpoint-{step}/scheduler.pt"):
            raise Killed
        save(value, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", half)
    return {}


@pytest.mark.parametrize(
    ("model_type", "how", "at"),
    [
        ("gpt2", kill(3), 2),
        pytest.param("gpt2", interrupt(3, signal.SIGINT), 3, marks=pytest.mark.slow),
        pytest.param("llama", interrupt(5, signal.SIGTERM), 5, marks=pytest.mark.slow),
        ("gpt2", kill_while_saving, 2),
    ],
)
def test_resumed_it_is_the_same_model(how, at, model_type, artifact, text, tmp_path, monkeypatch):
    """Dropout, data order, mask, schedule and the balancing bias go on alike from the newest checkpoint."""
    _, out = artifact(model_type, noise=0.1)
    options = {"options": {"router_bias_update_rate": 0.01, "router_jitter_noise": 0.1}}
    run = Finetuning(str(out), text, **QUICK | {"steps": 8, "log_every": 1}, skip_centre=0.5, **options)
    whole = finetune(run, tmp_path / "whole")
    with monkeypatch.context() as patched, pytest.raises((Killed, Interrupted)):
        finetune(run, tmp_path / "killed", **how(4, patched) if how is kill_while_saving else how)
    with pytest.raises(OutputError, match="continue it with resume=True"):
        finetune(run, tmp_path / "killed")
    seen = []
    resumed = finetune(run, tmp_path / "killed", resume=True, watch=lambda *given: seen.append(given))
    assert changed(weights(tmp_path / "whole"), weights(tmp_path / "killed")) == set()
    losses = [[entry["loss"] for entry in r["log"] if "loss" in entry] for r in (whole, resumed)]
    assert losses[0] == losses[1] and len(losses[0]) == 8
    assert [given for given in seen if given[2]] == [("training", step, 8) for step in range(at, 9)]
    assert any("removed" in given[0] for given in seen) == (how is kill_while_saving)
    assert {path.name for path in (tmp_path / "killed").iterdir()} == {
        path.name for path in (tmp_path / "whole").iterdir()
    }


def test_only_the_same_run_is_resumed(artifact, text, tmp_path):
    """Other values, data or weights are refused; the same under other names are not."""
    _, out = artifact("gpt2", noise=0.1)
    _, other = artifact("gpt2", noise=0.2)
    run = Finetuning(str(out), text, text, **QUICK)
    log = finetune(run, tmp_path / "probe")["log"]
    losses = {entry["step"]: entry["eval_loss"] for entry in log if "eval_loss" in entry}
    run = run.replace(arguments={"greater_is_better": losses[2] > losses[4]})  # the second step is the best
    with pytest.raises(Killed):
        finetune(run, tmp_path / "tuned", **kill(4))
    (tmp_path / "longer.txt").write_text(words(500) + " w3" * 100)
    (tmp_path / "same.txt").write_text(words(600))
    told = {
        "learning_rate is 0.1, was 0.0005; .*": {"learning_rate": 0.1},
        r"data is .*longer.txt.* \(sha256 .*\), was .*text.txt.* \(sha256 .*\); go": {
            "data": str(tmp_path / "longer.txt")
        },
        r"model is .*\(sha256 .*\), was .*\(sha256 .*\); go": {"model": str(other)},
        "length is 8, was 16; go": {"length": 8},
    }
    for message, options in told.items():
        with pytest.raises(OutputError, match=f"checkpoint-2' belongs to another run: .*{message}"):
            finetune(run.replace(**options), tmp_path / "tuned", resume=True)
    shutil.copytree(out, tmp_path / "copy")
    (tmp_path / "tuned").rename(tmp_path / "moved")
    moved = run.replace(model=str(tmp_path / "copy"), data=str(tmp_path / "same.txt"))
    finetune(run, tmp_path / "whole")
    finetune(moved, tmp_path / "moved", resume=True)
    assert changed(weights(tmp_path / "whole"), weights(tmp_path / "moved")) == set()


def test_two_processes_are_one(artifact, text, tmp_path):
    """torchrun with two of half the batch: the same losses and weights as one process."""
    _, out = artifact("gpt2", noise=0.1)
    arguments = ["--data", text, "--length", "16", "--steps", "4", "--log-every", "1", "--skip-centre", "0.5"]
    arguments += ["--option", "router_aux_loss_coef=0", "--option", "resid_pdrop=0", "--json"]
    arguments += ["--option", "embd_pdrop=0", "--option", "attn_pdrop=0", "--eval-data", text]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "mpoe_convert", "finetune", str(out), *arguments]
    command += ["--batch-size", "2", "--set", "use_cpu=true", "-o", str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    two = json.loads(done.stdout)
    one = CliRunner().invoke(
        main, ["finetune", str(out), *arguments, "--batch-size", "4", "-o", str(tmp_path / "one")]
    )
    assert one.exit_code == 0, one.output
    one = json.loads(one.stdout)
    losses = [[entry["loss"] for entry in report["log"] if "loss" in entry] for report in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 4
    for key in ("value", "low", "high"):  # of the examples of both
        assert one["change"][key] == pytest.approx(two["change"][key], rel=1e-4)
    before, one, two = (weights(folder) for folder in (out, tmp_path / "one", tmp_path / "two"))
    step = torch.cat([(one[name] - before[name]).flatten() for name in before])
    apart = torch.cat([(one[name] - two[name]).flatten() for name in before])
    assert apart.norm() < 0.02 * step.norm()  # Adam blows rounding up where a gradient is almost zero


# ---------------------------------------------------------------------------------------------------
# Command line and mistakes


def test_command_line_wins_over_the_file(artifact, text, tmp_path):
    _, out = artifact("gpt2")
    recipe = tmp_path / "run.yaml"
    recipe.write_text(
        f"model: {out}\ndata: [{text}]\nlength: 16\nbatch-size: 2\nsteps: 9\noutput: {tmp_path / 'tuned'}\n"
        "options: {router_aux_loss_coef: 0.5}\narguments: {adam_beta2: 0.9}\n"
    )
    done = CliRunner().invoke(main, ["finetune", "--config", str(recipe), "--steps", "2", "--log-every", "1"])
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "tuned" / "training_report.json").read_text())
    assert report["steps"] == 2 and report["run"]["arguments"] == {"adam_beta2": 0.9}
    config = json.loads((tmp_path / "tuned" / "config.json").read_text())
    assert config["router_aux_loss_coef"] == 0.5
    lines = [line for line in done.stderr.splitlines() if line.startswith("step ")]
    assert len(lines) >= 2 and "loss" in lines[0] and "load entropy" in lines[0]
    assert f"written to {tmp_path / 'tuned'}" in " ".join(done.stdout.split())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"task": "poetry"}, RunError, "one of causal, masked, seq2seq, classification"),
        ({"skip_centre": 1.5}, RunError, "a number from 0 to 1"),
        ({"teacher_weight": 1.0}, RunError, "and below 1"),
        ({"steps": 0}, RunError, "at least 1"),
        ({"freeze": "head"}, RunError, "some of centre, all-but-experts"),
        ({"data": ()}, RunError, "expected a source or a list of sources"),
        ({"data": "missing.txt"}, DataError, "is no file"),
        ({"task": "classification"}, DataError, r"needs label \(name the columns by"),
        ({"length": 1000}, TrainingError, "at most"),
        ({"data": "short"}, DataError, "no whole block of 16"),
        ({"arguments": {"nonsense": 1}}, TrainingError, "no such field"),
        ({"precision": "float16"}, TrainingError, "needs an accelerator"),
        ({"model": "./missing"}, CheckpointError, "there is no folder './missing'"),
        ({"teacher": "./missing"}, CheckpointError, "there is no folder './missing'"),
    ],
)
def test_a_mistake_is_told(options, error, message, artifact, text, tmp_path):
    _, out = artifact("gpt2")
    if options.get("data") == "short":
        (tmp_path / "short.txt").write_text(words(9))
        options = options | {"data": str(tmp_path / "short.txt")}
    with pytest.raises(error, match=message):
        finetune(Finetuning(**({"model": str(out), "data": text} | QUICK | options)), tmp_path / "tuned")
    assert not (tmp_path / "tuned" / "model.safetensors").exists()


def test_an_output_that_holds_something_is_left_alone(artifact, text, tmp_path):
    _, out = artifact("gpt2")
    with pytest.raises(OutputError, match="already holds something"):
        finetune(Finetuning(str(out), text, **QUICK), out)
    with pytest.raises(OutputError, match="no checkpoint to resume"):
        finetune(Finetuning(str(out), text, **QUICK), tmp_path / "new", resume=True)


def test_from_an_artifact_on_the_hub(artifact, text, tmp_path):
    _, out = artifact("gpt2")
    files = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    with LoopbackHub() as hub:
        hub.add("me/moe", files)
        variables = environment(tmp_path / "home", hub.endpoint, HF_HUB_OFFLINE="0")
        variables["HF_MODULES_CACHE"] = str(tmp_path / "modules")
        options = ["--length", "16", "--steps", "1", "--batch-size", "2", "-q"]
        command = [sys.executable, "-m", "mpoe_convert", "finetune", "me/moe", "--data", text, *options]
        done = subprocess.run(
            [*command, "-o", "tuned"], capture_output=True, text=True, env=variables, cwd=tmp_path
        )
    assert done.returncode == 0, done.stderr[-3000:]
    assert is_artifact(tmp_path / "tuned") and set(files) <= {p.name for p in (tmp_path / "tuned").iterdir()}
    assert sum(request.path.endswith("model.safetensors") for request in hub.requests) == 2  # HEAD, GET
    card = (tmp_path / "tuned" / "README.md").read_text()
    assert "## Training" in card and "## Reconstruction error" in card
    evaluate(str(tmp_path / "tuned"), str(text), length=16, limit=2)  # its code is its own, and known
