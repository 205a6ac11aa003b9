"""The model: swapping FFNs in a stock model, its forward pass, and classes made on demand."""

import ast
import copy
import functools
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoModel, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import (
    CONFIG_MAPPING_NAMES,  # pyright: ignore[reportPrivateImportUsage]  (the module declares no exports)
)

from .chains import Chain
from .choices import EXPERT_CHOICE, TOP_ANY
from .config import CLASS_PREFIX, CONFIG_OPTIONS, FORMAT_VERSION, MODEL_TYPE_PREFIX, OPTIONS
from .contrast import check_mode, contrasting, strength_of, strong_half
from .experts import MIXTURE, block_class, replace_experts
from .header import (
    get_checkpoint_conversion_mapping,
    init,
    register_checkpoint_conversion_mapping,
)
from .linears import LoadLinears
from .mixing import Mixing
from .mixture import FeedForward
from .parts import PARTS, Part, inner_size_of
from .passes import RouterPass, add_losses, show_routers

# What `MixtureMixin` is mixed into.
_Stock = PreTrainedModel if TYPE_CHECKING else object
# What routers that choose by task are told, see `MixtureMixin.route_by`.
_Task = str | int | Sequence[str | int] | Tensor


def _take(layer: nn.Module, path: str) -> Any:
    """The attribute at a dotted path."""
    return functools.reduce(getattr, path.split("."), layer)


def _put(layer: nn.Module, path: str, value: Any) -> None:
    """Set the attribute at a dotted path."""
    parent, _, name = path.rpartition(".")
    setattr(layer.get_submodule(parent), name, value)


def _take_dropout(layer: nn.Module, path: str | None, slot: str) -> nn.Module:
    """The stock dropout as a module.

    A rate that stands outside the slot is set to zero: the stock layer would apply it a second time.
    """
    if path is None or (dropout := _take(layer, path)) is None:
        return nn.Identity()
    if isinstance(dropout, nn.Module):
        return dropout
    if not path.startswith(slot + "."):
        _put(layer, path, 0.0)
    return nn.Dropout(dropout)


def _initial_scales(
    modules: Sequence[nn.Module], initialise: Callable[[nn.Module], None]
) -> dict[str, float]:
    """{projection: standard deviation of a dense FFN's matrix in a new model}, also on the meta device.

    Empty if the stock code draws them by other functions than those of `transformers.initialization`.

    Args:
        modules: whose matrices are those of the FFN, `down` last.
        initialise: the stock model's `_init_weights`.
    """
    drawn: dict[int, float] = {}

    def note(tensor: Tensor, mean: float = 0.0, std: float = 1.0, *args: Any, **kwargs: Any) -> Tensor:
        drawn[id(tensor)] = std
        return tensor

    names = ("normal_", "trunc_normal_")
    stock = {name: getattr(init, name) for name in names}
    try:
        for name in names:
            setattr(init, name, note)
        for module in modules:
            for part in reversed(list(module.modules())):  # as `initialize_weights` does, a parent last
                initialise(part)
    finally:
        for name, function in stock.items():
            setattr(init, name, function)
    matrices = [p for module in modules for p in module.parameters() if p.ndim == 2]
    scales = [drawn[id(matrix)] for matrix in matrices if id(matrix) in drawn]
    if len(scales) < max(len(matrices), 2):
        return {}
    return {"gate": scales[0], "up": scales[-2], "down": scales[-1]}


def swap_ffn(
    layer: nn.Module, form: dict, block: dict, initialise: Callable[[nn.Module], None] | None = None
) -> None:
    """Replace the dense FFN of a stock layer by a mixture of this form; nothing to do if it has one.

    Args:
        form: one of `config.mpoe["forms"]`.
        block: `config.mpoe`.
        initialise: the stock model's `_init_weights`, from which the mixture takes its scales.
    """
    family = block["family"]
    if isinstance(_take(layer, family["slot"]), FeedForward):
        return
    dense = [_take(layer, path) for path in (family["slot"], *family["absorbed"])]
    ffn = FeedForward.from_block(form, block)
    ffn.act = _take(layer, family["activation"])
    ffn.inner_dropout = _take_dropout(layer, family["inner_dropout"], family["slot"])
    ffn.outer_dropout = _take_dropout(layer, family["outer_dropout"], family["slot"])
    ffn.adds_residual = family["adds_residual"]
    if initialise is not None:
        for name, scale in _initial_scales(dense, initialise).items():
            if (part := getattr(ffn, name)) is not None:
                part.initial_scale = scale
    _put(layer, family["slot"], ffn)
    for path in family["absorbed"]:
        _put(layer, path, nn.Identity())


def _keeps_routers(config: PretrainedConfig) -> bool:
    """Whether the source was a mixture: its blocks and their routers stay, only experts are replaced."""
    return bool(config.mpoe) and bool(config.mpoe["family"].get("experts"))


def _innermost_model(model: nn.Module, path: str) -> PreTrainedModel:
    """The innermost of the models that hold the module at this path: it initialises the module."""
    names = path.split(".")
    inside = [model.get_submodule(".".join(names[:n])) for n in range(len(names) + 1)]
    return [module for module in inside if isinstance(module, PreTrainedModel)][-1]


def _is_in(part: str, name: str) -> bool:
    """Whether a name of transformers' lists, a part of a dotted name, is in a module's or tensor's name."""
    return re.search(rf"(?:^|\.){part}(?:\.|$)", name) is not None


def _has_submodule(model: nn.Module, path: str) -> bool:
    found: nn.Module | None = model
    for name in path.split("."):
        found = getattr(found, name, None)
        if found is None:
            return False
    return True


def _check_tasks(task: Tensor | None, arguments: dict) -> None:
    """Raises ValueError if there are tasks for another number of sequences than the pass has."""
    if task is None:
        return
    # The first that is given: the rows of `pixel_values` beside text are pieces of images.
    names = ("input_ids", "inputs_embeds", "decoder_input_ids", "pixel_values")
    tensor = next((arguments[name] for name in names if arguments.get(name) is not None), None)
    if tensor is not None and tensor.shape[0] % task.shape[0]:  # beams are sequences of one task
        raise ValueError(
            f"{task.shape[0]} tasks were given for {tensor.shape[0]} sequences; expected one, or one each"
        )


# Coefficients of the losses of all routers, and of those that have thresholds, as `RouterPass` takes them.
LOSS_COEFS = ("router_aux_loss_coef", "router_z_loss_coef")
THRESHOLD_LOSS_COEFS = ("router_likeness_loss_coef", "router_efficiency_loss_coef")
# What `_recording` adds to the parameters of a stock forward.
_OUR_ARGUMENTS = ("task_ids", "output_router_logits")


def _recording(stock: Callable[..., Any]) -> Callable[..., Any]:
    """A forward with the stock parameters and `_OUR_ARGUMENTS`. It hands over what differs from the defaults.

    It is written out as code. Whoever compiles it, vLLM for one, binds arguments by `inspect.signature` and
    expects the code to have the same variables, so that `*args` behind a made up signature will not do.
    """
    parameters = list(inspect.signature(stock).parameters.values())[1:]
    rest = next((p.name for p in parameters if p.kind is inspect.Parameter.VAR_KEYWORD), None)
    more = next((p.name for p in parameters if p.kind is inspect.Parameter.VAR_POSITIONAL), None)
    positional = [p for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    keyword_only = [p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
    keyword_only += [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for name in _OUR_ARGUMENTS
        if all(p.name != name for p in parameters)
    ]
    written = [_written(p) for p in positional] + [f"*{more or ''}"] + [_written(p) for p in keyword_only]
    written += [f"**{rest}"] if rest else []
    named = [*positional, *keyword_only]
    given = ", ".join(f"{p.name}={p.name}" for p in named)
    called = f"functools.partial(stock, self, *{more})" if more else "functools.partial(stock, self)"
    body = f"return self._run_recording({called}, defaults, dict({given}), {rest or '{}'}, added)"
    defaults = {p.name: p.default for p in named}
    # A stock mixture takes `output_router_logits`, or hands it on.
    added = {name for name in _OUR_ARGUMENTS if all(p.name != name for p in parameters)}
    added -= {"output_router_logits"} if rest else set()
    namespace: dict[str, Any] = {"stock": stock, "defaults": defaults, "added": added, "functools": functools}
    exec(f"def forward(self, {', '.join(written)}):\n    {body}\n", namespace)
    made: Any = functools.update_wrapper(namespace["forward"], stock)
    del vars(made)["__wrapped__"]  # its signature is its own
    made.__defaults__ = tuple(p.default for p in positional if p.default is not p.empty) or None
    made.__kwdefaults__ = {p.name: p.default for p in keyword_only if p.default is not p.empty}
    return made


def _run_noting(
    stock: Callable[..., Any],
    arguments: dict,
    mixtures: Sequence[tuple[str, FeedForward]],
    running: RouterPass,
) -> Any:
    """A stock forward pass in which the mixtures note for this `RouterPass` how they route."""
    try:
        for _, ffn in mixtures:
            ffn.router_pass = running
        return stock(**arguments)
    finally:
        for _, ffn in mixtures:
            ffn.router_pass = None


def _written(parameter: inspect.Parameter) -> str:
    """As code, with a default to be replaced if there is one."""
    return parameter.name if parameter.default is parameter.empty else f"{parameter.name}=None"


def _constructing(stock: Callable[..., None]) -> Callable[..., None]:
    """A constructor with the stock signature, which tells what a model may be made with."""

    @functools.wraps(stock)
    def constructing(self: "MixtureMixin", *args: Any, **kwargs: Any) -> None:
        MixtureMixin.__init__(self, *args, **kwargs)

    return constructing


def _generating(generate: Callable[..., Any]) -> Callable[..., Any]:
    """A stock `generate` that takes `task_ids`, for encoders too, and `self_contrast`, see `contrasting`."""

    @functools.wraps(generate)
    def generating(
        self: "MixtureMixin",
        *args: Any,
        task_ids: _Task | None = None,
        self_contrast: float | None = None,
        **kwargs: Any,
    ) -> Any:
        self._unpack()  # an encoder runs first, on its own
        before = [ffn.task for _, ffn in self.mixtures()]
        try:
            if task_ids is not None:
                self.route_by(task_ids)
            if not (strength := strength_of(self, self_contrast, args, kwargs)):
                return generate(self, *args, **kwargs)
            with contrasting(self, strength, kwargs):
                return strong_half(generate(self, *args, **kwargs))
        finally:
            for (_, ffn), task in zip(self.mixtures(), before, strict=True):
                ffn.task = task

    return generating


class MixtureMixin(_Stock):
    """Turns a stock model class into one whose FFNs are mixtures, as `config.mpoe` says."""

    _base_class: type[PreTrainedModel]  # the stock class
    # The last pass in training, and the versions of the mixtures' parameters then.
    _last_pass: RouterPass | None = None
    _versions: Sequence[int] = ()
    _contrasts = False  # whether generation with `self_contrast` is running

    def __init__(self, config: PretrainedConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        block = config.mpoe
        if not block or block.get("format") != FORMAT_VERSION:
            found = block.get("format") if block else "no `mpoe` block"
            raise ValueError(
                f"{type(self).__name__} reads format {FORMAT_VERSION} of config.mpoe, found {found}; "
                "load the checkpoint with the modeling_mpoe.py that lies beside it"
            )
        present = self._layer_paths()
        if not present:
            raise ValueError(f"{type(self).__name__} has none of the layers {list(block['ffns'])}")
        self._replace_ffns(present)
        self._note_paths()
        self._configure_mixtures(len(present))
        if self.loss_type is None and type(self).__name__.endswith("LMHeadModel"):
            self.loss_type = "ForCausalLM"  # what transformers falls back to, with a warning per call
        # A backbone's one stack (OPT's decoder) stays as its constructor makes it: vLLM compiles its class.
        if self.base_model is not self or config.is_encoder_decoder:
            for module in self.modules():
                if module is not self and isinstance(module, PreTrainedModel):
                    self._adopt(module)
        self._register_renames()
        self.post_init()

    def _replace_ffns(self, present: dict[str, int]) -> None:
        """Put mixtures in the place of FFNs, or our experts in that of a mixture's.

        Args:
            present: path of a layer of this model -> index in the block's `forms`.
        """
        base, block = self.base_model, self.config.mpoe
        for path, form in present.items():
            if _keeps_routers(self.config):
                stock = base.get_submodule(".".join(filter(None, [path, block["family"]["slot"]])))
                replace_experts(stock, block["forms"][form], block, globals())
            else:
                initialise = _innermost_model(base, path)._init_weights
                swap_ffn(base.get_submodule(path), block["forms"][form], block, initialise)

    def _configure_mixtures(self, number: int) -> None:
        """Let all mixtures, of which there are so many, take the config's options."""
        config = self.config
        self._rounds = getattr(config, "quantization_config", None) is not None
        for path, ffn in self._mixings():
            for chain in ffn.modules() if self._rounds else ():
                if isinstance(chain, Chain):
                    chain.use_linears()
            if not isinstance(ffn, FeedForward):
                ffn.configure_schedule(config, number)
                continue
            ffn.configure(config, number)
            ffn.in_decoder = "decoder" in (self._stack, path.partition(".")[0])
            if ffn.rule == EXPERT_CHOICE and (ffn.in_decoder or getattr(config, "is_decoder", False)):
                raise ValueError(
                    f"config.mpoe has the rule 'expert-choice' for {path}, a layer of a decoder, whose "
                    "experts would choose a token by later ones; convert with another selection rule"
                )

    def _register_renames(self) -> None:
        """Take over the key renames of a mixture's type, for its dense FFNs; or none, for experts of ours.

        One class serves both, so that its renames are those for the model that was made last.
        """
        stock_type = self.config.model_type.removeprefix(MODEL_TYPE_PREFIX)
        names = {self._base_class.__name__: type(self).__name__, stock_type: self.config.model_type}
        for stock, name in names.items():
            renames = get_checkpoint_conversion_mapping(stock)
            if renames is not None and _renames_experts(renames):
                ours = [] if _keeps_routers(self.config) else renames
                register_checkpoint_conversion_mapping(name, ours, overwrite=True)
        name, stock_type = type(self).__name__, self.config.model_type
        before = get_checkpoint_conversion_mapping(name)
        renames = [rename for rename in before or [] if not isinstance(rename, LoadLinears)]
        if self._rounds:
            before = renames if before is not None else get_checkpoint_conversion_mapping(stock_type) or []
            register_checkpoint_conversion_mapping(
                name, [*before, *LoadLinears.of_model(self.base_model)], overwrite=True
            )
        elif before is not None:
            register_checkpoint_conversion_mapping(name, renames, overwrite=True)

    def _layer_paths(self) -> dict[str, int]:
        """{path of a layer with a mixture below the base model: index of its form}, of those that are here.

        A model may hold only one of the stacks, such as the encoder of T5, or be one: then it notes that, and
        paths lack the name of the stack.
        """
        ffns, base = self.config.mpoe["ffns"], self.base_model
        self._stack = None  # "encoder" or "decoder", of a model that is one
        if not any(_has_submodule(base, path) for path in ffns):
            # T5's two stacks have one class.
            decodes = "Decoder" in type(self).__name__ or getattr(self.config, "is_decoder", False)
            self._stack = "decoder" if decodes else "encoder"
            start = self._stack + "."
            ffns = {path.removeprefix(start): form for path, form in ffns.items() if path.startswith(start)}
        return {path: form for path, form in ffns.items() if _has_submodule(base, path)}

    def _note_paths(self) -> None:
        """Note the paths of the mixtures below the base model."""
        parts = [self.config.mpoe["family"]["slot"], MIXTURE if _keeps_routers(self.config) else ""]
        self.mixture_paths = [".".join(filter(None, [path, *parts])) for path in self._layer_paths()]

    def _adopt(self, module: PreTrainedModel) -> None:
        """Let a stock model inside this one, the backbone of a head or a stack, be one of ours.

        It is complete by itself then: its forward pass has the routers' losses, and it saves as what it is.
        """
        if isinstance(module, MixtureMixin) or getattr(module.config, "mpoe", None) is None:
            return
        if not any(isinstance(child, Mixing) for child in module.modules()):
            return
        kept = next(cls.__module__ for cls in type(self).__mro__ if MixtureMixin in cls.__bases__)
        adopted: Any = subclass(type(module), kept)
        # Transformers registers a class when an object of it is made: what `output_hidden_states` captures.
        PreTrainedModel.__init__(adopted.__new__(adopted), module.config)
        if type(self)._auto_class is not None:
            adopted._auto_class = "AutoModel"  # saved with its code, as this model is
        module.__class__ = adopted
        mixin: Any = module
        mixin._note_paths()
        mixin._prune_plans()

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """As of the stock class; the config that a stack shares with its model is not changed.

        Cores that `--bits` rounded are packed for it, if a forward pass has made whole matrices of them.
        """
        if self._pack():
            try:
                return self.save_pretrained(*args, **kwargs)
            finally:
                self._unpack()
        if self._stack is None:
            return super().save_pretrained(*args, **kwargs)
        config, self.config = self.config, copy.deepcopy(self.config)
        self.config.auto_map = {k: v for k, v in (config.auto_map or {}).items() if k == "AutoConfig"}
        try:
            return super().save_pretrained(*args, **kwargs)
        finally:
            self.config = config

    def _pack(self) -> bool:
        """Let compressed-tensors pack what it has unpacked, if there is anything.

        Scales are kept, so that no number changes.
        """
        compressor = getattr(getattr(self, "hf_quantizer", None), "compressor", None)
        unpacked = any(
            hasattr(module, "weight") and hasattr(module, "weight_scale") for module in self.modules()
        )
        if compressor is None or not unpacked:
            return False
        compressor.compress_model(self)
        return True

    def _unpack(self) -> None:
        """Let compressed-tensors make matrices of what is packed, as in the model's forward pass."""
        compressor = getattr(getattr(self, "hf_quantizer", None), "compressor", None)
        if compressor is not None and any(hasattr(module, "weight_packed") for module in self.modules()):
            compressor.decompress_model(self)

    def mixtures(self) -> list[tuple[str, FeedForward]]:
        """The mixtures and their paths below the base model; a layer used several times is listed once.

        None where the source was a mixture: its blocks are the stock ones, with our `Experts` in them.
        Where PEFT trains a copy of the whole FFN (`modules_to_save`), original and copies have one path.
        """
        return [(path, ffn) for path, ffn in self._mixings() if isinstance(ffn, FeedForward)]

    def _mixings(self) -> list[tuple[str, Mixing]]:
        found = [(path, self.base_model.get_submodule(path)) for path in self.mixture_paths]
        return [(path, ffn) for path, module in found for ffn in module.modules() if isinstance(ffn, Mixing)]

    def route_by(self, task: _Task | None) -> None:
        """Let the routers choose by this task from now on; for models with `config.router_tasks`.

        `forward` and `generate` take the same as `task_ids`, for one call.

        Args:
            task: name or number of a task, or one per sequence of the batch; or embeddings (H,) or (B, H),
                computed elsewhere, in place of the learned ones.

        Raises:
            ValueError: the routers choose by token, or there is no such task.
        """
        found = None if task is None else self._task_numbers(task)
        for _, ffn in self.mixtures():
            ffn.task = found

    def _task_numbers(self, task: _Task) -> Tensor:
        """(B,) numbers or (B, H) embeddings of tasks."""
        known = self.config.router_tasks
        if known is None:
            raise ValueError(
                "the routers of this model choose by token; load it with router_tasks=[...], names of tasks, "
                "and train it"
            )
        if isinstance(task, Tensor) and task.is_floating_point():
            return task.reshape(-1, task.shape[-1])
        if isinstance(task, Tensor) and torch.compiler.is_compiling():  # its values are not known
            return task.reshape(-1)
        tasks = task.reshape(-1).tolist() if isinstance(task, Tensor) else task
        tasks = [tasks] if isinstance(tasks, (str, int)) else list(tasks)
        if not tasks:
            raise ValueError(f"no task was given; this model knows {list(known)}")
        numbers = {name: i for i, name in enumerate(known)} | {i: i for i in range(len(known))}
        if strange := [t for t in tasks if type(t) not in (str, int) or t not in numbers]:
            raise ValueError(f"no such task: {strange}; this model knows {list(known)}")
        return task.reshape(-1) if isinstance(task, Tensor) else torch.tensor([numbers[t] for t in tasks])

    def _run_recording(
        self, stock: Callable[..., Any], defaults: dict, arguments: dict, more: dict, added: set[str]
    ) -> Any:
        """A forward pass whose outputs carry the router losses.

        Args:
            stock: the forward of the stock class, bound to this model.
            defaults: of `arguments`.
            arguments: by name, those of `_OUR_ARGUMENTS` among them.
            more: other keyword arguments.
            added: those of `_OUR_ARGUMENTS` that the stock forward does not take.
        """
        config = self.config
        given = {name: value for name, value in arguments.items() if value is not defaults[name]} | more
        if _keeps_routers(config):  # and their losses
            return stock(**{name: value for name, value in given.items() if name not in added})
        task, show = (given.pop(name, None) for name in _OUR_ARGUMENTS)
        returns_dict = given.get("return_dict")
        returns_dict = config.return_dict if returns_dict is None else returns_dict
        if show and not returns_dict:
            raise ValueError(
                "output_router_logits is set and return_dict is not: a tuple has no place for `aux_loss` and "
                "`router_logits`; expected return_dict=True"
            )
        show = config.output_router_logits if show is None else show
        in_sequences = config.mpoe.get("rule") == EXPERT_CHOICE  # and need their masks
        if not (self.training or show or config.router_tasks is not None or task is not None or in_sequences):
            return stock(**given)
        mixtures = self.mixtures()
        if any(ffn.router_pass is not None for _, ffn in mixtures):
            return stock(**given)  # part of a pass of the model around this one
        task = mixtures[0][1].task if task is None else self._task_numbers(task)
        _check_tasks(task, given)
        learns = self.training and torch.is_grad_enabled()
        coefs = self._loss_coefs(mixtures, learns)
        rate = config.router_bias_update_rate if learns else 0.0
        needed = show or rate or any(coefs) or (learns and config.router_capacity_factor is not None)
        needed = needed or in_sequences or task is not None or (learns and config.router_tasks is not None)
        # Checkpoints may repeat calls in training: each mixture notes which pass they belong to.
        if not (needed or (self.training and not torch.compiler.is_compiling())):
            return stock(**given)
        if rate:
            self._follow_step()
        shows = bool(show and returns_dict)
        mask_of = functools.partial(self.token_mask, arguments=given)
        aux, z, *of_thresholds = coefs
        running = RouterPass(learns, shows, aux, z, mask_of, *of_thresholds)
        running.share = self._share_of_step(given)
        running.task = task
        outputs = _run_noting(stock, given, mixtures, running)
        if rate:
            for call in running.calls:
                call.ffn.note_load(call.routing, call.mask)
        if rate or (learns and not torch.compiler.is_compiling()):
            self._last_pass = running
        if any(coefs):
            outputs = add_losses(outputs, running, given)
        if shows:
            outputs = show_routers(outputs, running)
        running.calls, running.mask_of = [], None
        return outputs

    def _loss_coefs(self, mixtures: Sequence[tuple[str, FeedForward]], learns: bool) -> list[float]:
        """The coefficients of the router losses in this pass, in the order of `RouterPass`."""
        rules = {ffn.rule for _, ffn in mixtures}
        names = (*LOSS_COEFS, *(THRESHOLD_LOSS_COEFS if TOP_ANY in rules else ()))
        coefs = [getattr(self.config, name) if learns else 0.0 for name in names]
        if EXPERT_CHOICE in rules:  # whose load is balanced
            coefs[0] = 0.0
        return coefs

    def _follow_step(self) -> None:
        """Move the balancing biases once per optimizer's step, at the first pass after it."""
        last, before = self._last_pass, self._versions
        parameters = [p for _, ffn in self.mixtures() for p in ffn.parameters() if p.requires_grad]
        self._versions = [p._version for p in parameters]
        if last is None or not last.went_back:
            return  # the backward pass is still to come, and repeats checkpointed calls with the same bias
        if self._versions != before or all(p.grad is None for p in parameters):
            self.update_router_bias()

    def update_router_bias(self) -> None:
        """Move the balancing biases now, by the load since their last move.

        The first pass after an optimizer's step calls it. A training loop that calls it right after the step
        writes checkpoints whose biases are up to date.
        """
        rate = self.config.router_bias_update_rate
        for _, ffn in self.mixtures():
            if rate:
                ffn.add_balance_bias()
                self.config.router_balance_bias = True
            ffn.update_bias(rate)

    def add_router_losses(self, loss: Tensor, share: float | Tensor = 1.0) -> Tensor:
        """A scalar: a loss that was made of the last pass's outputs in training, plus the routers' losses.

        The model's own loss has them. Any other optimises them too, but only so are they scaled as it is, by
        GradScaler or over accumulated passes. `aux_loss` of outputs that show it is not among them. Not for
        compiled code, which does not know what scales such a loss.

        Args:
            share: the pass's share of an optimizer's step, if the loss is only its part of a step's mean.

        Raises:
            ValueError: there was no pass in training.
        """
        if self._last_pass is None:
            raise ValueError("there was no forward pass in training whose routers' losses could be added")
        return self._last_pass.add_to(loss, share)

    def _share_of_step(self, arguments: dict) -> float | Tensor:
        """This pass's share of an optimizer's step: those of Trainer's accumulated passes add up to one."""
        labels, num_items = arguments.get("labels"), arguments.get("num_items_in_batch")
        if labels is None or num_items is None or not getattr(self, "accepts_loss_kwargs", True):
            return 1.0
        predicts_next = self.loss_type in ("ForCausalLM", "ForConditionalGeneration")
        shifted = predicts_next and not self.config.is_encoder_decoder
        return (labels[..., int(shifted) :] != -100).sum() / num_items

    def _validate_generation_mode(self, generation_mode: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        if self._contrasts:
            check_mode(generation_mode.value, config)
        super()._validate_generation_mode(generation_mode, config, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]  (of GenerationMixin)

    def adjust_generation_fn(self, *args: Any, **kwargs: Any) -> None:
        """As of the stock class. `generate` stays a method where `custom_generate/` only calls it."""
        super().adjust_generation_fn(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]  (of GenerationMixin)
        loaded = getattr(vars(self).get("generate"), "func", None)
        if getattr(loaded, "calls_method", False):
            del self.generate

    def token_mask(self, ffn: FeedForward, num_tokens: int, index: int, *, arguments: dict) -> Tensor | None:
        """(T,) which of the tokens of a mixture's call are no padding; None if the arguments do not tell.

        Args:
            index: number of the mixture's call in the pass: BERT may feed its FFNs chunk by chunk.
            arguments: of the model's forward pass, by name.
        """
        mask = arguments.get("attention_mask")
        if self.config.is_encoder_decoder and ffn.in_decoder and self._stack is None:
            mask, labels = arguments.get("decoder_attention_mask"), arguments.get("labels")
            if mask is None and labels is not None and labels.numel() == num_tokens:
                mask = labels != -100
        if not isinstance(mask, Tensor) or mask.ndim not in (2, 3):
            return None
        mask = mask.flatten(0, -2)  # multiple choice: (batch, choices, length)
        if num_tokens % mask.shape[0]:
            return None
        length, chunk = num_tokens // mask.shape[0], getattr(self.config, "chunk_size_feed_forward", 0)
        if chunk and length == chunk < mask.shape[1]:
            start = index * chunk % mask.shape[1]
            return mask[:, start : start + chunk].reshape(-1)
        # With a cache the mask covers the past as well.
        return mask[:, -length:].reshape(-1) if length <= mask.shape[1] else None

    def post_init(self) -> None:
        super().post_init()
        if "mixture_paths" in vars(self):  # the stock constructor comes here with the dense FFNs
            self._prune_plans()

    def _prune_plans(self) -> None:
        """Take names that match nothing, such as those of dense FFNs, out of the stock class's plans.

        Plans of parallelism have "*" for the number of a layer; what stays in float32 is part of a name.
        """
        names = [name for name, _ in self.named_modules()] + list(self.state_dict())
        patterns = {re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names}
        for attribute in ("_tp_plan", "_ep_plan", "_pp_plan", "_fsdp_plan"):
            plan = getattr(self, attribute, None) or {}
            setattr(self, attribute, {name: way for name, way in plan.items() if name in patterns})
        for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
            kept = set(getattr(self, attribute) or ())
            if _keeps_routers(self.config):  # in the dtype of the stock ones
                kept -= {"router"} - set(getattr(self._base_class, attribute, None) or ())
            setattr(self, attribute, {part for part in kept if any(_is_in(part, name) for name in names)})

    @classmethod
    def is_custom_code(cls) -> bool:
        """Whether the stock class is.

        In custom code transformers leaves out the initialisation of modules that have no parameter of their
        own, which is where GPT-2 scales its residual projections and T5 draws its attention.
        """
        return cls._base_class.is_custom_code()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """Whether the stock class can; layers that were not converted compute as it says."""
        return cls._base_class._can_set_experts_implementation()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Part):
            module.reset_parameters(
                module.initial_scale or getattr(self.config, "initializer_range", None) or 0.02
            )
        elif isinstance(module, FeedForward) and module.balance_bias is not None:
            init.zeros_(module.balance_bias)

    @torch.no_grad()
    def initialize_weights(self) -> None:
        for module in self.modules():
            # A stock model inside, such as LLaVA's text tower, would take them for initialised.
            if isinstance(module, (Part, FeedForward)):
                self._initialize_weights(module)
        super().initialize_weights()

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        is_ours = isinstance(module, (Part, FeedForward))
        super()._initialize_weights(module, is_custom_code and not is_ours)


# Numbers that trainers and servers read of a mixture's config, from `config.mpoe`.
_NUMBERS: dict[str, Callable[[Any], int]] = {
    "num_experts": lambda block: block["num_experts"],
    "num_experts_per_tok": lambda block: block["top_k"],
    "moe_intermediate_size": lambda block: inner_size_of(block["forms"][0]),
}


def _number(name: str) -> property:
    """A number of the block as an attribute of the config; there is none without a block."""

    def read(config: Any) -> int:
        if config.mpoe is None:
            raise AttributeError(f"{name!r}: this config has no `mpoe` block")
        return _NUMBERS[name](config.mpoe)

    return property(read, _ignore)


def _ignore(config: PretrainedConfig, value: object) -> None:
    """What the config.json of a dense model says of experts does not count."""


def _config_class(base: type, name: str, module: str) -> type:
    """The stock config class with `mpoe` and our options.

    It also has `_NUMBERS`, except those that the stock class has itself.
    """
    # What a stock mixture has of the same name has its own default.
    options = {"mpoe": None} | {name: value for name, value in OPTIONS.items() if not hasattr(base, name)}
    body = {
        "model_type": MODEL_TYPE_PREFIX + base.model_type,
        **options,
        "__annotations__": {"mpoe": dict | None}
        | {option.name: option.type for option in CONFIG_OPTIONS if option.name in options},
        "__module__": module,
    }
    body |= {name: _number(name) for name in _NUMBERS if not hasattr(base, name)}
    if module != __name__:  # custom code may have a constructor, which a generated one would bypass

        def __init__(self: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
            ours = {option: kwargs.pop(option, default) for option, default in options.items()}
            base.__init__(self, *args, **kwargs)
            for option, value in ours.items():
                setattr(self, option, value)

        body["__init__"] = __init__
    # Key renames of a whole model type (LLaVA's text tower and head) are looked up by that type.
    renames = get_checkpoint_conversion_mapping(base.model_type) if module == __name__ else None
    if renames is not None and not _renames_experts(renames):
        register_checkpoint_conversion_mapping(body["model_type"], renames, overwrite=True)
    return type(name, (base,), body)


# Their loss counts `num_items_in_batch` for single labels, not for several labels or in a regression.
_OF_WHOLE_SEQUENCES = re.compile("For(Sequence|Image|Video|Audio)Classification")


def counts_items(base: type) -> bool:
    """Whether the loss of a stock model class is the sum over items divided by `num_items_in_batch`.

    T5 and the heads that classify take that number and ignore it. False where the source cannot be read.
    """
    if _OF_WHOLE_SEQUENCES.search(base.__name__):
        return False
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(base.forward))))
    except (OSError, TypeError):
        return False
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    of_loss = [call for call in calls if getattr(call.func, "attr", None) == "loss_function"]
    return any(word.arg in (None, "num_items_in_batch") for call in of_loss for word in call.keywords)


def _model_class(base: type, name: str, module: str) -> type:
    """The stock model class with mixtures."""
    config_class = subclass(base.config_class, module)
    body = {
        "config_class": config_class,
        "__module__": module,
        "_base_class": base,
        "__init__": _constructing(base.__init__),
        "forward": _recording(base.forward),
    }
    bases = (MixtureMixin, base)
    # AutoModel adds it to a copy of a custom class that has no such base; others look for it among the bases.
    if GenerationMixin in base.__mro__ or (
        module != __name__ and hasattr(base, "prepare_inputs_for_generation")
    ):
        bases = (*bases, GenerationMixin)
    if GenerationMixin in bases or base.can_generate():
        body["generate"] = _generating(getattr(base, "generate", vars(GenerationMixin)["generate"]))
    if not counts_items(base):
        body["accepts_loss_kwargs"] = False  # Trainer then averages accumulated passes itself
    # T5 keeps its output projection `wo` in float32 when the rest is float16; ours is called `down`, and what
    # works on its output is in the same danger of overflowing.
    for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
        kept = getattr(base, attribute, None)
        if kept and "wo" in kept:
            behind = [key for key, part in PARTS.items() if part.behind]
            body[attribute] = type(kept)([*kept, "down", *behind])
    strict = body.get("_keep_in_fp32_modules_strict", getattr(base, "_keep_in_fp32_modules_strict", None))
    body["_keep_in_fp32_modules_strict"] = {*(strict or ()), "router"}
    cls = type(name, bases, body)
    # Key renames (GPT-NeoX's embed_out, ViT's old layer names) are looked up by class name.
    renames = get_checkpoint_conversion_mapping(base.__name__)
    if renames is not None and not _renames_experts(renames):
        register_checkpoint_conversion_mapping(name, renames, overwrite=True)
    _name_task(base.__name__, config_class.model_type, name)
    return cls


def _renames_experts(renames: list) -> bool:
    """Whether these are for a mixture, whose artifact has the names of the model itself."""
    return any("experts" in pattern for transform in renames for pattern in transform.target_patterns)


def _name_task(base: str, model_type: str, name: str) -> None:
    """Enter a class in transformers' tables of names for every task of its base.

    By them Trainer knows that labels are to be shifted for label smoothing, and pipelines which models they
    support.
    """
    for table, names in vars(modeling_auto).items():
        if table.startswith("MODEL_FOR_") and table.endswith("_MAPPING_NAMES") and base in names.values():
            names[model_type] = name


def subclass(base: type, module: str = __name__) -> type:
    """The subclass of a config or model class; made once and kept as an attribute of the module.

    Args:
        base: a class of transformers, or of the custom code of a checkpoint's source.
        module: name of the module that keeps it; for custom code one beside this file, so that saving a model
            copies all of its code.
    """
    namespace, name = vars(sys.modules[module]), CLASS_PREFIX + base.__name__
    if name in namespace:
        return namespace[name]
    if issubclass(base, PretrainedConfig):
        namespace[name] = _config_class(base, name, module)
        return namespace[name]
    namespace[name] = _model_class(base, name, module)
    # AutoModel loads stacks, which transformers does not export, as what they are.
    if module == __name__ and hasattr(transformers, base.__name__):
        # Heads such as LlamaForSequenceClassification build their backbone by AutoModel from the config.
        backbone = MODEL_MAPPING.get(base.config_class, None)
        if isinstance(backbone, type):
            subclass(backbone)
        if base is backbone:
            AutoModel.register(subclass(base.config_class), namespace[name], exist_ok=True)
    return namespace[name]


def _stock_class(name: str) -> Any:
    """The class of transformers with that name, or None; stacks are not in its namespace."""
    if hasattr(transformers, name):
        return getattr(transformers, name)
    for model_type, config in CONFIG_MAPPING_NAMES.items():
        if name.startswith(config.removesuffix("Config")):
            backbone = MODEL_MAPPING.get(transformers.CONFIG_MAPPING[model_type], None)
            found = isinstance(backbone, type) and getattr(sys.modules[backbone.__module__], name, None)
            if found:
                return found
    return None


def __getattr__(name: str) -> type:
    """`MPOE<Name>`: the subclass of `transformers.<Name>`, which `auto_map` of config.json asks for."""
    base = _stock_class(name.removeprefix(CLASS_PREFIX)) if name.startswith(CLASS_PREFIX) else None
    if not isinstance(base, type):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if issubclass(base, nn.Module) and not issubclass(base, PreTrainedModel):
        return block_class(base, globals())
    if not issubclass(base, PretrainedConfig | PreTrainedModel):
        raise AttributeError(f"{name!r}: transformers.{base.__name__} is neither config nor model")
    return subclass(base)
