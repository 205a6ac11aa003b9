"""Fine-tune or heal a model by transformers' Trainer: from a checkpoint and texts to a checkpoint."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from . import card, corpus, experts, recording
from .artifact import (
    CARD_FILE,
    EVALUATION_REPORT_FILE,
    MODELING_FILE,
    TRAINING_REPORT_FILE,
    file_names,
    is_artifact,
    is_weights,
    register_files,
    write_json,
)
from .errors import OutputError, TrainingError
from .hub import CHAT_TEMPLATES, download_papers
from .libraries import need
from .loading import AUTO_CLASSES, from_pretrained, load_tokenizer, max_length, task_of
from .routing import router_stats
from .runs import Finetuning
from .training import freeze, has_centre, mask_centre, param_groups

try:
    from accelerate import PartialState
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed
except ImportError:
    need("finetune", "accelerate", "datasets", extra="train")
    raise

if TYPE_CHECKING:
    from torch import nn

Progress = Callable[[int, int, Mapping[str, float]], None]


# ---------------------------------------------------------------------------------------------------
# Trainer, with what is special to shared cores


class CentreMask(TrainerCallback):
    """MPOE's gradient mask for transformers' Trainer; see `mask_centre`."""

    def __init__(self, probability: float, *, seed: int = 0, per: str = "step"):
        self.probability, self.seed, self.per = probability, seed, per

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        mask_centre(model, state.global_step, self.probability, seed=self.seed, per=self.per)


class RouterLog(TrainerCallback):
    """Watches the routers in the steps that are logged.

    `latest` holds numbers for the log, `loads` the experts' shares of the choices by mixture.
    """

    def __init__(self):
        self.latest: dict[str, float] = {}
        self.loads: dict[str, list[float]] = {}
        self._watching = ExitStack()
        self._stats: dict = {}

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if (state.global_step + 1) % args.logging_steps == 0:
            self._stats = self._watching.enter_context(router_stats(model))

    def on_step_end(self, args, state, control, **kwargs):
        if not self._stats:
            return
        self._watching.close()
        self.latest, self.loads = {}, {}
        for path, stats in self._stats.items():
            load = stats.load
            self.loads[path] = [round(share, 4) for share in load.tolist()]
            entropy = torch.special.entr(load).sum() / math.log(len(load))
            self.latest[f"load_entropy/{path}"] = round(float(entropy), 4)
            self.latest[f"load_max/{path}"] = round(float(load.max()), 4)
        self._stats = {}


class FollowStep(TrainerCallback):
    """Moves the routers' balancing biases before a checkpoint is written, not after it."""

    def __init__(self, model: nn.Module):
        self.model = model

    def on_step_end(self, args, state, control, **kwargs):
        self.model.update_router_bias()


class _Progress(TrainerCallback):
    def __init__(self, progress: Progress | None):
        self.progress = progress

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.progress is not None and state.is_world_process_zero:
            self.progress(state.global_step, state.max_steps, logs)


class MpoeTrainer(Trainer):
    """Trainer with learning rates by role, distillation, and routers in the log."""

    def __init__(self, *args, run: Finetuning, teacher: nn.Module | None, **kwargs):
        super().__init__(*args, **kwargs)
        self.run, self.teacher = run, teacher
        self.router_log = next((c for c in kwargs["callbacks"] if isinstance(c, RouterLog)), None)
        if teacher is not None:
            teacher.to(self.args.device).eval().requires_grad_(False)

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            model = self.model if model is None else model
            cls, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            decays = set(self.get_decay_parameter_names(model))
            auxiliary = self.run.auxiliary_lr
            if auxiliary is None:
                block = getattr(self.model.config, "mpoe", None)
                auxiliary = experts.load(block["kind"]).AUXILIARY_LR if block else 1.0
            groups = param_groups(
                model,
                self.args.learning_rate,
                central=self.run.central_lr,
                auxiliary=auxiliary,
                router=self.run.router_lr,
                weight_decay=self.args.weight_decay,
                no_decay={name for name, _ in model.named_parameters()} - decays,
            )
            self.optimizer = cls(groups, **options)
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.teacher is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        hidden = {"output_hidden_states": True} if self.run.hidden_weight else {}
        loss, outputs = super().compute_loss(model, inputs | hidden, True, num_items_in_batch)
        with torch.no_grad():
            taught = self.teacher(**{k: v for k, v in inputs.items() if k != "task_ids"}, **hidden)
        extra = self.distillation(outputs, taught, inputs["labels"])
        if num_items_in_batch is not None and self.model_accepts_loss_kwargs:  # a part of the step's mean
            labels = inputs["labels"][..., int(self._loss_shifts_labels) :]
            extra = extra * (labels != -100).sum() / num_items_in_batch * self.accelerator.num_processes
        loss = (1 - self.run.teacher_weight) * loss + extra
        return (loss, outputs) if return_outputs else loss

    def distillation(self, outputs, taught, labels: torch.Tensor) -> torch.Tensor:
        """KL(teacher || student) per counted token at the temperature, times its square (Hinton 2015)."""
        student, teacher = outputs.logits, taught.logits
        if student.shape != teacher.shape:
            raise TrainingError(
                f"the teacher's logits are {tuple(teacher.shape)}, the model's {tuple(student.shape)}; "
                "expected the dense model that was converted, with the same head"
            )
        if labels.dim() == 2:  # per token, where a label counts
            if self._loss_shifts_labels:
                student, teacher, labels = student[:, :-1], teacher[:, :-1], labels[:, 1:]
            student, teacher = student[labels != -100], teacher[labels != -100]
        temperature = self.run.temperature
        divergence = F.kl_div(
            (student.float() / temperature).log_softmax(-1),
            (teacher.float() / temperature).log_softmax(-1),
            reduction="batchmean",
            log_target=True,
        )
        loss = self.run.teacher_weight * temperature**2 * divergence
        if self.run.hidden_weight:
            loss = loss + self.run.hidden_weight * _hidden_difference(outputs, taught)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "eval_loss" in logs:  # the training loss holds the routers' as well
            logs["eval_perplexity"] = math.exp(min(logs["eval_loss"], 80.0))
        if self.router_log is not None and "loss" in logs:
            logs |= self.router_log.latest
        super().log(logs, start_time)
        if self.router_log is not None and "loss" in logs and self.router_log.loads:  # no tracker takes lists
            self.state.log_history[-1]["expert_load"] = self.router_log.loads


def _hidden_difference(outputs, taught) -> torch.Tensor:
    names = ("hidden_states", "encoder_hidden_states", "decoder_hidden_states")
    pairs = [
        pair
        for name in names
        if getattr(taught, name, None)
        for pair in zip(getattr(outputs, name), getattr(taught, name), strict=True)
    ]
    return sum(F.mse_loss(s.float(), t.float()) / t.float().square().mean() for s, t in pairs) / len(pairs)


# ---------------------------------------------------------------------------------------------------
# The run


def finetune(
    run: Finetuning,
    output: str | Path,
    *,
    resume: bool = False,
    token: str | None = None,
    progress: Progress | None = None,
) -> dict:
    """Train a model and write it to `output`, with `training_report.json` beside it.

    Checkpoints lie in `output` while training goes on; `resume` continues from the last one, to the same
    model as a run that was not interrupted. `accelerate launch` or `torchrun` start it on several devices.

    Args:
        token: for models and data of the Hub, in no report; by default the stored login.
        progress: called as progress(step, steps, logged values) whenever something is logged.

    Returns:
        What training_report.json holds: settings, the log, seconds, and the last evaluation.

    Raises:
        TrainingError: model and options do not fit.
        DataError: the data cannot be read or do not fit the task.
        OutputError: `output` holds something already.
    """
    need("finetune", "datasets", extra="train")
    output = Path(output)
    checkpoint = _last_checkpoint(output, resume)
    strangers = file_names(output)
    state = PartialState()
    if run.precision == "float16" and state.device.type == "cpu":
        raise TrainingError("precision float16 needs an accelerator; expected bfloat16 or float32 on a CPU")
    task, auto_class = task_of(run.model, run.task, token, **run.trust)
    tokenizer = load_tokenizer(run.tokenizer or run.model, token, **run.trust)
    with state.main_process_first():  # the others find what it has mapped in the cache
        train, evaluation, labels, tasks = _examples(run, task, tokenizer, token)
        papers = _papers(run, token)
    set_seed(run.seed)  # of what the checkpoint does not have: a new head, embeddings of tasks
    model = _load(run, task, auto_class, token, labels, tasks)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    config_dtype = model.config.dtype
    model = model.float()
    for what in run.freeze:
        freeze(model, what)
    trainer = MpoeTrainer(
        model=model,
        args=_arguments(run, output, has_eval=evaluation is not None),
        train_dataset=train,
        eval_dataset=evaluation,
        data_collator=_collator(task, tokenizer, model),
        processing_class=tokenizer,
        compute_metrics=_accuracy if task == "classification" else None,
        callbacks=_callbacks(run, model),
        run=run,
        teacher=_load_teacher(run, task, token, labels),
    )
    trainer.remove_callback(PrinterCallback)
    shown = _Progress(progress)
    trainer.add_callback(shown)
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.remove_callback(shown)
    log = list(trainer.state.log_history)
    report = {
        "run": asdict(run),
        "task": task,
        "steps": trainer.state.global_step,
        "seconds": round(time.perf_counter() - start, 1),
        "resumed": checkpoint is not None,
        "evaluation": trainer.evaluate() if evaluation is not None else None,
        "log": log,
    }
    if not trainer.is_fsdp_enabled:  # whose shards keep the optimizer's float32
        for name, parameter in trainer.model.named_parameters():
            parameter.data = parameter.data.to(dtypes[name])
        trainer.model.config.dtype = config_dtype
    trainer.save_model(str(output))
    if state.is_main_process:
        _finish(papers, output, report, strangers)
    state.wait_for_everyone()
    return report


def _last_checkpoint(output: Path, resume: bool) -> str | None:
    from transformers.trainer_utils import get_last_checkpoint

    found = get_last_checkpoint(str(output)) if output.is_dir() else None
    if resume and found is None:
        raise OutputError(f"{output} holds no checkpoint to resume from; expected one that a run has left")
    if not resume and output.exists() and any(output.iterdir()):
        what = (
            "checkpoints of a run: continue it with --resume" if found else "something: choose another folder"
        )
        raise OutputError(f"{output} already holds {what}")
    return found


def _load(run: Finetuning, task: str, auto_class: str, token, labels, tasks=None, name: str | None = None):
    """The model of a run, or another one with the same head."""
    import transformers

    options = run.trust | (dict(run.options) if name is None else {})
    if tasks is not None:
        options["router_tasks"] = list(tasks.names)
    if task == "classification":
        numbers = {label: i for i, label in enumerate(labels)}
        options |= {"num_labels": len(labels), "id2label": dict(enumerate(labels)), "label2id": numbers}
    return from_pretrained(getattr(transformers, auto_class), name or run.model, token=token, **options)


def _load_teacher(run: Finetuning, task: str, token: str | None, labels: list[str] | None):
    return _load(run, task, AUTO_CLASSES[task], token, labels, name=run.teacher) if run.teacher else None


def _examples(run: Finetuning, task: str, tokenizer, token: str | None) -> tuple:
    """(training examples, evaluation examples or None, names of the classes or None, tasks or None)."""
    train = corpus.read(run.data, run.columns, task, run.split, token)
    evaluation = None
    if run.eval_data:
        evaluation = corpus.read(run.eval_data, run.columns, task, run.eval_split, token)
    labels = _labels(run, train, token) if task == "classification" else None
    tasks = _tasks(run, train, token)
    limit = max_length(run.model, token, **run.trust)
    length = run.length or min(512, limit or 512)
    if limit and length > limit:
        raise TrainingError(f"length is {length}; {run.model} takes at most {limit} tokens")

    def encode(rows):
        if rows is None:
            return None
        if task == "seq2seq":
            return corpus.pairs(rows, tokenizer, run.columns, length, tasks)
        if task == "classification":
            return corpus.labelled(rows, tokenizer, run.columns, length, labels, tasks)
        return corpus.language_blocks(rows, tokenizer, run.text_column, length, tasks)

    return encode(train), encode(evaluation), labels, tasks


def _labels(run: Finetuning, rows, token: str | None) -> list[str]:
    """The classes: the model's own if it knows all that the rows have, else those of the rows."""
    from transformers import AutoConfig

    found = corpus.label_names(rows, run.label_column)
    known = from_pretrained(AutoConfig, run.model, token=token, **run.trust).id2label
    names = [str(known[number]) for number in sorted(known)]
    return names if set(found) <= set(names) else found


def _tasks(run: Finetuning, rows, token: str | None) -> corpus.Tasks | None:
    """The tasks that routers choose by: the model's own if it has some, else those that the rows name."""
    from transformers import AutoConfig

    config = from_pretrained(AutoConfig, run.model, token=token, **run.trust)
    known = getattr(config, "router_tasks", None)
    if run.routed_by is None:
        if known is not None:
            raise TrainingError(
                f"the routers of {run.model} choose by task; expected --routed-by, the column"
            )
        return None
    if getattr(config, "mpoe", None) is None:
        raise TrainingError(f"{run.model} is not a converted model: it has no routers that choose by task")
    found = corpus.task_names(rows, run.routed_by)
    if known and not set(found) <= set(known):
        raise TrainingError(f"the rows name the tasks {found}, the routers of {run.model} know {known}")
    return corpus.Tasks(run.routed_by, tuple(known or found))


def _collator(task: str, tokenizer, model):
    import transformers

    if task == "seq2seq":
        return transformers.DataCollatorForSeq2Seq(tokenizer, model=model)
    if task == "classification":
        model.config.pad_token_id = tokenizer.pad_token_id
        return transformers.DataCollatorWithPadding(tokenizer)
    if task == "masked" and tokenizer.mask_token is None:
        raise TrainingError("the tokenizer has no mask token; expected one that was made for task masked")
    return transformers.DataCollatorForLanguageModeling(tokenizer, mlm=task == "masked")


def _accuracy(prediction) -> dict[str, float]:
    logits = prediction.predictions
    logits = logits[0] if isinstance(logits, tuple) else logits
    return {"accuracy": float((logits.argmax(-1) == prediction.label_ids).mean())}


def _callbacks(run: Finetuning, model: nn.Module) -> list[TrainerCallback]:
    block = getattr(model.config, "mpoe", None)
    if block is None:
        if run.skip_centre:
            raise TrainingError(f"{run.model} is not a converted model: it has no centre to skip")
        return []
    if run.skip_centre and not has_centre(model):
        raise TrainingError(f"the experts of {run.model} share no centre to skip")
    mask = [CentreMask(run.skip_centre, seed=run.seed, per=run.skip_unit)] if run.skip_centre else []
    return [RouterLog(), FollowStep(model), *mask]


def _arguments(run: Finetuning, output: Path, has_eval: bool) -> TrainingArguments:
    values = {
        "output_dir": str(output),
        "max_steps": run.steps or -1,
        "num_train_epochs": run.epochs,
        "per_device_train_batch_size": run.batch_size,
        "per_device_eval_batch_size": run.batch_size,
        "gradient_accumulation_steps": run.accumulate,
        "learning_rate": run.learning_rate,
        "weight_decay": run.weight_decay,
        "lr_scheduler_type": run.schedule,
        "warmup_steps": run.warmup,
        "max_grad_norm": run.max_grad_norm,
        "bf16": run.precision == "bfloat16",
        "fp16": run.precision == "float16",
        "seed": run.seed,
        "logging_steps": run.log_every,
        "save_steps": run.save_every,
        "save_total_limit": 2,
        "report_to": list(run.report_to) or "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "use_cpu": PartialState().device.type == "cpu",
    }
    if has_eval:
        every = run.eval_every or run.save_every
        values |= {"eval_strategy": "steps", "eval_steps": every, "save_steps": every}
        values |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    try:
        return TrainingArguments(**(values | dict(run.arguments)))
    except (TypeError, ValueError) as error:
        raise TrainingError(f"transformers refuses these training arguments: {error}") from error


def _papers(run: Finetuning, token: str | None) -> Path | None:
    """The folder with what belongs to an artifact beside its weights; None: the model is no artifact."""
    from transformers import AutoConfig

    source = Path(run.model)
    if not source.is_dir():
        if getattr(from_pretrained(AutoConfig, run.model, token=token, **run.trust), "mpoe", None) is None:
            return None
        source = download_papers(run.model, token)
    return source if is_artifact(source) else None


def _finish(papers: Path | None, output: Path, report: dict, strangers: Iterable[str]) -> None:
    """The report, what else belongs to an artifact, and no more checkpoints; `strangers` lay there before."""
    write_json(output / TRAINING_REPORT_FILE, report)
    (output / "training_args.bin").unlink(missing_ok=True)  # a pickle, and all in the report
    if papers is not None:
        _complete_artifact(papers, output, report, strangers)
    for path in output.glob("checkpoint-*"):
        shutil.rmtree(path)


def _complete_artifact(papers: Path, output: Path, report: dict, strangers: Iterable[str]) -> None:
    """Beside the weights: what belongs to an artifact, and in its card and report what has changed."""
    written = {path.name for path in output.iterdir()} | {EVALUATION_REPORT_FILE}
    for path in papers.iterdir():
        if path.is_file() and path.name not in written and not is_weights(path.name):
            shutil.copyfile(path, output / path.name)
    shutil.copyfile(papers / MODELING_FILE, output / MODELING_FILE)
    card.remove_section(output / CARD_FILE, "Pictures")  # of the model that was trained, as are the results
    recording.forget(output / CARD_FILE)
    card.describe_training(output / CARD_FILE, report)
    made = {name for name in file_names(output) if "/" not in name or fnmatchcase(name, CHAT_TEMPLATES)}
    register_files(output, made - set(strangers) | {TRAINING_REPORT_FILE})
