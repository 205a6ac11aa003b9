"""Fine-tune or heal a model with transformers' Trainer: from a checkpoint and texts to a checkpoint."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from ..artifact.layout import file_names
from ..artifact.limits import block_length, check_length, check_token_ids, counts_from_padding, positions
from ..artifact.loading import AUTO_CLASSES, from_pretrained, load_config, load_tokenizer, task_of
from ..errors import TrainingError, few
from ..extras import need
from ..options import by_name, called, default_of
from ..request import as_path, check_function, check_token
from ..source import texts
from ..source.text_options import check_data
from ..tensors import broken_weights
from .checkpoints import Record, check_place, check_same_run, remove_leftovers, what_is_left, writing_into
from .fingerprints import hash_of_examples, hash_of_model
from .held_out import HeldOut
from .interrupts import StopOnSignal
from .library import (
    PartialState,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
    set_seed,
    unset_hf_deepspeed_config,
)
from .option_names import check_arguments, check_options, check_schedule, check_trackers, check_weights_fit
from .request import Finetuning
from .roles import freeze, has_centre, role_of
from .room import check_room
from .router_stats import router_stats
from .saving import Result, companions_of, set_generation_aside
from .tasks import TASKS, Task, class_names
from .trainer import (
    CentreMask,
    FindBest,
    FollowStep,
    MpoeTrainer,
    OnLog,
    RouterLog,
    ShowSteps,
    StopAtNonFinite,
    TellLogs,
    Watch,
    check_weights,
    refusals_told,
)

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_STOPPING = "stops after this step, whose checkpoint is saved; once more ends at once"


def finetune(
    run: Finetuning,
    output: str | Path,
    *,
    resume: bool = False,
    token: str | None = None,
    progress: OnLog | None = None,
    watch: Watch | None = None,
) -> dict:
    """Train a model and write it to `output`, with `training_report.json` beside it.

    Checkpoints lie in `output` while training goes on; `resume` continues from the newest whole one, to the
    same model as a run that was not interrupted. Ctrl-C, SIGTERM and SIGHUP end a run after its step, whose
    checkpoint is saved; the second signal ends it at once. `accelerate launch` or `torchrun` start it on
    several devices.

    >>> from mpoe_convert import Finetuning, finetune
    >>> run = Finetuning(model="out", data="text.txt", steps=1, batch_size=1, length=16, learning_rate=1e-4)
    >>> report = finetune(run, "out-tuned")
    >>> report["task"], report["steps"]
    ('causal', 1)

    Args:
        run: the request.
        output: folder to write.
        resume: continue from the newest whole checkpoint in `output`; it has to be one of the same request.
        token: for models and data of the Hub, in no report; by default the stored login.
        progress: called as progress(step, steps, logged values) whenever something is logged.
        watch: called as watch("training", step, steps) after every step, watch("evaluating", batches, of how
            many) after every batch of an evaluation, and watch(note, 0, 0) before what takes time.

    Returns:
        The contents of training_report.json: settings, the log, seconds, and of the weights that were written
        their step, evaluation, experts' load on the held-out data, and change of perplexity since before the
        first step.

    Raises:
        TrainingError: model and options do not fit.
        DataError: the data cannot be read or do not fit the task.
        OutputError: `output` is not empty, has no checkpoint to resume from or one of another request, or
            cannot be written; this is tried before the first step.
        Interrupted: a signal ended the run, and its checkpoint is saved; a KeyboardInterrupt.
    """
    need("finetune", "accelerate", "datasets", extra="train")
    run, output = Finetuning.of(run), as_path("output", output)
    check_token(token)
    check_function("progress", progress, "step, steps, logs")
    check_function("watch", watch, "what, done, total")
    check_data(run, (*run.data, *run.eval_data))
    with writing_into(output):
        return _finetune(run, output, resume, token, progress, watch or _silent)


def _silent(what: str, done: int, total: int) -> None:
    pass


def _check_whole(model: str, config: PretrainedConfig) -> None:
    """Raises TrainingError if the weights are rounded."""
    if found := getattr(config, "quantization_config", None):
        method = found.get("quant_method") if isinstance(found, dict) else found.quant_method
        raise TrainingError(
            f"'{model}' has rounded weights ({getattr(method, 'value', method)}), which cannot be trained: "
            f"fine-tune the model first, or convert without {called('bits')}"
        )


def _finetune(
    run: Finetuning, output: Path, resume: bool, token: str | None, progress: OnLog | None, watch: Watch
) -> dict:
    checkpoint = check_place(output, resume)
    state = PartialState()
    watch = watch if state.is_main_process else _silent
    if state.is_main_process:
        _clear(run, output, checkpoint, state, watch)
    preexisting = frozenset(file_names(output))
    _check_precision(run, state)
    arguments = _arguments(run, output)
    config, kind = _config_and_task(run, token)
    options = _options(run, config, kind, token)
    tokenizer = load_tokenizer(run.tokenizer or run.model, token, **run.trust)
    watch("reading the data", 0, 0)
    with state.main_process_first():  # the others find the mapped rows in the cache
        data = _read(run, kind, config, tokenizer, token)
        companions = companions_of(run.model, config, token)
    watch("loading the model", 0, 0)
    models = _load_models(run, options, data, token)
    model, stored = models.model, models.stored
    record = Record.of(run, models.contents, state.num_processes)
    if checkpoint is not None and state.is_main_process:
        check_same_run(checkpoint, record)
    result = Result(output, companions, preexisting, set_generation_aside(model, run.model, token))
    if state.is_main_process:
        result.rehearse(model, tokenizer, _report(run, data))
    stop = StopOnSignal(lambda number: watch(f"{signal.Signals(number).name}: {_STOPPING}", 0, 0))
    with refusals_told("the training cannot be set up"):
        trainer = MpoeTrainer(
            model=model,
            args=arguments,
            train_dataset=data.train,
            eval_dataset=data.evaluation,
            data_collator=data.task.collator(model),
            processing_class=tokenizer,
            callbacks=[*_callbacks(run, model), FindBest(), ShowSteps(watch), stop],
            run=run,
            teacher=models.teacher,
            record=record,
        )
        if state.is_main_process:
            check_room(trainer, output, stored.num_bytes(model), watch)
    with _failing_into(output), stop.listening():
        report = _train(trainer, data, checkpoint and str(checkpoint), progress)
        check_weights(cast("nn.Module", trainer.model), trainer.state.global_step)
        if not trainer.is_fsdp_enabled:  # shards stay float32, for the optimizer
            stored.restore(cast("PreTrainedModel", trainer.model))
    result.write(trainer, report)
    return report


def _clear(run: Finetuning, output: Path, checkpoint: Path | None, state: PartialState, watch: Watch) -> None:
    """Remove what a run that ended left unfinished in the output.

    Raises:
        OutputError: the checkpoint to continue from is of another request.
    """
    if checkpoint is not None:
        check_same_run(checkpoint, Record.of(run, None, state.num_processes))
    for name in remove_leftovers(output):
        watch(f"removed '{output / name}', which a run that ended had not finished", 0, 0)


def _config_and_task(run: Finetuning, token: str | None) -> tuple[PretrainedConfig, type[Task]]:
    """The model's config and the task to train it for.

    Raises:
        ColumnError: a data file lacks a column that the task needs.
        TrainingError: the model's weights are rounded, or its head is for no task.
    """
    config = load_config(run.model, token, **run.trust)
    _check_whole(run.model, config)
    kind = TASKS[run.task or task_of(config, run.model, **run.trust)]
    texts.check_columns((*run.data, *run.eval_data), run.columns.needed(kind.name), f"task {kind.name}")
    return config, kind


@contextmanager
def _failing_into(output: Path) -> Iterator[None]:
    """Tell what a run that fails leaves: its checkpoints.

    Raises:
        TrainingError: the run failed.
    """
    try:
        yield
    except TrainingError as error:
        raise TrainingError(f"{error}; {what_is_left(output, may_be_spoilt=True)}") from error


def _contents(model: PreTrainedModel, teacher: PreTrainedModel | None, data: _Data) -> dict[str, str]:
    """Hashes of what the run reads, by the fields of the request that name it; of the main process."""
    if not PartialState().is_main_process:  # others may not have the weights
        return {}
    found = {"model": hash_of_model(model), "data": hash_of_examples(data.train)}
    if teacher is not None:
        found["teacher"] = hash_of_model(teacher)
    if data.evaluation is not None:
        found["eval_data"] = hash_of_examples(data.evaluation)
    return found


def _check_precision(run: Finetuning, state: PartialState) -> None:
    if run.precision == "float16" and _is_on_cpu(state):
        raise TrainingError("precision float16 needs an accelerator; expected bfloat16 or float32 on a CPU")


def _is_on_cpu(state: PartialState) -> bool:
    return state.device is not None and state.device.type == "cpu"


class _Stored:
    """The dtypes that a model is stored in; weights are float32 while they are trained."""

    def __init__(self, model: PreTrainedModel):
        self.dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        self.of_config = model.config.dtype

    def num_bytes(self, model: PreTrainedModel) -> int:
        return sum(p.numel() * self.dtypes[name].itemsize for name, p in model.named_parameters())

    def restore(self, model: PreTrainedModel) -> None:
        """Raises TrainingError if finite weights are beyond the range of their dtype."""
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(self.dtypes[name])
        model.config.dtype = self.of_config
        if broken := broken_weights(model):
            dtype = str(self.dtypes[broken[0]]).removeprefix("torch.")
            raise TrainingError(
                f"{few(broken)} grew beyond the range of {dtype}, in which the model is stored; lower the "
                f"learning rate, or set dtype=float32 by {called(by_name(Finetuning)['options'])}"
            )


def _train(trainer: MpoeTrainer, data: _Data, checkpoint: str | None, progress: OnLog | None) -> dict:
    """Train, evaluate what is to be written if there are data for it, and report."""
    held_out = HeldOut(data.task)
    if data.evaluation is not None:
        held_out.attach(trainer, at_start=checkpoint is None)
    trainer.remove_callback(PrinterCallback)
    shown = TellLogs(progress)
    trainer.add_callback(shown)
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.remove_callback(shown)
    log = list(trainer.state.log_history)  # before the last evaluation, which adds to it
    report = _report(trainer.run, data) | {
        "steps": trainer.state.global_step,
        "written_step": _written_step(trainer),
        "seconds": round(time.perf_counter() - start, 1),
        "resumed": checkpoint is not None,
        "log": log,
    }
    if data.evaluation is not None:
        report["evaluation"], report["expert_load"] = _evaluate(trainer)
        report["change"] = held_out.change(log, trainer.run.seed)
    return report


def _written_step(trainer: MpoeTrainer) -> int:
    """The step whose weights the model has after training: of the best checkpoint, or the last one."""
    best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    return int(Path(best).name.rpartition("-")[2]) if best else trainer.state.global_step


def _evaluate(trainer: MpoeTrainer) -> tuple[dict, dict[str, list[float]] | None]:
    """(metrics, {path of a mixture: fraction of the choices that each expert got}) on the held-out data."""
    model = cast("PreTrainedModel", trainer.model)
    watching = nullcontext({}) if trainer.router_log is None else router_stats(model)
    with watching as stats:
        metrics = trainer.evaluate()
    loads = {path: [round(part, 4) for part in found.load.tolist()] for path, found in stats.items()}
    return metrics, loads or None


def _report(run: Finetuning, data: _Data) -> dict:
    """The report of a training that has done nothing yet."""
    done = {"steps": 0, "written_step": 0, "seconds": 0.0, "resumed": False, "log": []}
    measured = {"evaluation": None, "change": None, "expert_load": None}
    return {"run": asdict(run), "task": data.task.name, **done, **measured}


# ---------------------------------------------------------------------------------------------------
# Data and models


@dataclass(frozen=True)
class _Data:
    """What a run trains on.

    Attributes:
        labels: names of the classes; empty for models without.
        routes: the tasks that routers choose by; None: they choose by token.
    """

    task: Task
    train: Dataset
    evaluation: Dataset | None
    labels: tuple[str, ...]
    routes: texts.Tasks | None


def _read(
    run: Finetuning,
    kind: type[Task],
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    token: str | None,
) -> _Data:
    """Raises DataError or TrainingError if data, model and options do not fit each other."""
    train = texts.read(run.data, run.columns, kind.name, run.split, token)
    evaluation = None
    if run.eval_data:
        evaluation = texts.read(run.eval_data, run.columns, kind.name, run.eval_split, token)
    labels = _labels(run, train, config) if kind.has_labels else ()
    routes = _routes(run, train, config)
    task = kind(tokenizer, run.columns, _length(run, config, token))
    train = task.training_examples(train, labels, routes)
    if evaluation is not None:
        evaluation = task.held_out_examples(evaluation, labels, routes)
    return _Data(task, train, evaluation, labels, routes)


def _length(run: Finetuning, config: PretrainedConfig, token: str | None) -> int:
    """Tokens per example. Raises TrainingError if the model or its teacher takes fewer."""
    limits = {run.model: positions(config)}
    if run.teacher:
        limits[run.teacher] = positions(load_config(run.teacher, token, **run.trust))
    length = run.length or min(map(block_length, limits.values()))
    check_length(length, limits)
    return length


def _labels(run: Finetuning, rows: Dataset, config: PretrainedConfig) -> tuple[str, ...]:
    """The classes: the model's own if it knows all that the rows have, else those of the rows."""
    found = texts.label_names(rows, run.label_column)
    names = class_names(config)
    return names if set(found) <= set(names) else tuple(found)


def _routes(run: Finetuning, rows: Dataset, config: PretrainedConfig) -> texts.Tasks | None:
    """The tasks that routers choose by: the model's own if it has some, else those that the rows name."""
    known = getattr(config, "router_tasks", None)
    if run.routed_by is None:
        if known is not None:
            raise TrainingError(
                f"the routers of '{run.model}' choose by task; expected {called('routed_by')}, the column"
            )
        return None
    if getattr(config, "mpoe", None) is None:
        raise TrainingError(f"'{run.model}' is not a converted model: it has no routers that choose by task")
    found = texts.task_names(rows, run.routed_by)
    if known and not set(found) <= set(known):
        raise TrainingError(f"the rows name the tasks {found}, the routers of '{run.model}' know {known}")
    return texts.Tasks(run.routed_by, tuple(known or found))


def _options(
    run: Finetuning, config: PretrainedConfig, kind: type[Task], token: str | None
) -> dict[str, Any]:
    """The options of the model's config. Raises TrainingError: the model cannot have them."""
    import transformers

    options = check_options(run.options, config, run.model)
    auto_class = getattr(transformers, AUTO_CLASSES[kind.name])
    check_weights_fit(options, config, run.model, auto_class, token, **run.trust)
    return options


@dataclass(frozen=True)
class _Models:
    """What a run trains, and what it reads for that.

    Attributes:
        model: with float32 weights, frozen as the request says.
        stored: the dtypes that it was stored in.
        contents: hashes of what the run reads, see `_contents`.
    """

    model: PreTrainedModel
    teacher: PreTrainedModel | None
    stored: _Stored
    contents: dict[str, str]


def _load_models(run: Finetuning, options: dict, data: _Data, token: str | None) -> _Models:
    """The model and its teacher. Raises TrainingError, as `_load_model` and `_load_teacher`."""
    set_seed(run.seed)  # for what the checkpoint lacks: a new head, embeddings of tasks
    model = _load_model(run, options, data, token)
    teacher = _load_teacher(run, data, token) if run.teacher else None
    contents, stored = _contents(model, teacher, data), _Stored(model)
    model = model.float()
    for what in run.freeze:
        freeze(model, what)
    return _Models(model, teacher, stored, contents)


def _load_model(run: Finetuning, options: dict[str, Any], data: _Data, token: str | None) -> PreTrainedModel:
    if data.routes is not None:
        options = options | {"router_tasks": list(data.routes.names)}
    model = _load(run.model, data, token, run.trust | options)
    found, own = data.task.tokenizer.pad_token_id, getattr(model.config, "pad_token_id", None)
    if counts_from_padding(model) and found not in (None, own):  # the config would be given the tokenizer's
        raise TrainingError(
            f"the tokenizer's padding token is {found}, and '{run.model}' counts positions from its own, "
            f"{own}; expected a tokenizer with the same"
        )
    return model


def _load_teacher(run: Finetuning, data: _Data, token: str | None) -> PreTrainedModel:
    """The model to distil from, with the same head."""
    assert run.teacher is not None
    return _load(run.teacher, data, token, run.trust)


def _load(name: str, data: _Data, token: str | None, options: dict[str, Any]) -> PreTrainedModel:
    import transformers

    if data.task.has_labels:
        options = options | {
            "num_labels": len(data.labels),
            "id2label": dict(enumerate(data.labels)),
            "label2id": {label: i for i, label in enumerate(data.labels)},
        }
    auto_class = getattr(transformers, AUTO_CLASSES[data.task.name])
    model = from_pretrained(auto_class, name, token=token, **options)
    for examples in filter(None, (data.train, data.evaluation)):
        check_token_ids(model, name, data.task.largest_token(examples), data.task.tokenizer)
    data.task.prepare(model)
    return model


# ---------------------------------------------------------------------------------------------------
# The trainer's arguments


def _callbacks(run: Finetuning, model: nn.Module) -> list[TrainerCallback]:
    block = getattr(model.config, "mpoe", None)
    _check_rates(run, model)
    if block is None:
        if run.skip_centre:
            raise TrainingError(f"'{run.model}' is not a converted model: it has no centre to skip")
        return [StopAtNonFinite()]
    if run.skip_centre and not has_centre(model):
        raise TrainingError(f"the experts of '{run.model}' share no centre to skip")
    mask = [CentreMask(run.skip_centre, seed=run.seed, per=run.skip_unit)] if run.skip_centre else []
    return [StopAtNonFinite(), RouterLog(block.get("rule") is not None), FollowStep(model), *mask]


def _check_rates(run: Finetuning, model: nn.Module) -> None:
    """Raises TrainingError for a learning rate of what the model does not have."""
    roles = {role_of(name) for name, _ in model.named_parameters()}
    for role, what in (
        ("central", "central tensors"),
        ("auxiliary", "experts' own tensors"),
        ("router", "routers"),
    ):
        name = f"{role}_lr"
        if role not in roles and getattr(run, name) != default_of(by_name(Finetuning)[name]):
            of_ours = " of a converted dense model" if role == "router" else ""
            raise TrainingError(
                f"{called(name)} is {getattr(run, name):g}, and '{run.model}' has no {what}{of_ours}; leave "
                "it out"
            )


def own_arguments(run: Finetuning) -> dict[str, tuple[str, Any]]:
    """{field of TrainingArguments: (the run's option that sets it, its value)}."""
    every = run.eval_every or run.save_every
    return {
        "max_steps": ("steps", run.steps or -1),
        "num_train_epochs": ("epochs", run.epochs),
        "per_device_train_batch_size": ("batch_size", run.batch_size),
        "gradient_accumulation_steps": ("accumulate", run.accumulate),
        "learning_rate": ("learning_rate", run.learning_rate),
        "weight_decay": ("weight_decay", run.weight_decay),
        "lr_scheduler_type": ("schedule", run.schedule),
        "warmup_steps": ("warmup", run.warmup),
        "max_grad_norm": ("max_grad_norm", run.max_grad_norm),
        "bf16": ("precision", run.precision == "bfloat16"),
        "fp16": ("precision", run.precision == "float16"),
        "seed": ("seed", run.seed),
        "logging_steps": ("log_every", run.log_every),
        "save_steps": ("save_every", every if run.eval_data else run.save_every),
        "eval_steps": ("eval_every", every),
        "report_to": ("report_to", list(run.report_to) or "none"),
    }


def _arguments(run: Finetuning, output: Path) -> TrainingArguments:
    """The trainer's arguments. Raises TrainingError: transformers has no such argument, or refuses it."""
    check_schedule(run.schedule)
    check_trackers(run.report_to)
    own, options = own_arguments(run), by_name(Finetuning)
    named = {field: called(options[option]) for field, (option, _) in own.items()}
    given = check_arguments(
        run.arguments,
        named | {"output_dir": "-o, the output", "hub_token": "the token of the run, which no report keeps"},
    )
    values = {field: value for field, (_, value) in own.items()} | {
        "output_dir": str(output),
        "per_device_eval_batch_size": run.batch_size,
        "save_total_limit": 2,
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "use_cpu": _is_on_cpu(PartialState()),
    }
    if run.eval_data:
        values |= {"eval_strategy": "steps", "load_best_model_at_end": True}
        values |= {"metric_for_best_model": "eval_loss"}
    with refusals_told("transformers refuses these training arguments"):
        try:
            return TrainingArguments(**(values | given))
        except Exception:
            unset_hf_deepspeed_config()  # a refused one stays set, and models could no longer be loaded
            raise
