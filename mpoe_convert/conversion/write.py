"""config.json of an artifact, and the files beside its weights."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..artifact.auto_classes import name_classes
from ..artifact.companions import copy_companions
from ..artifact.layout import MODELING_FILE
from ..experts.selection import LIMITED, THRESHOLD
from ..planning.plan import Plan
from ..planning.recipe import Recipe
from ..planning.resolve import FOR_MIXTURES
from ..planning.rounding import config_of
from ..planning.totals import routing
from ..runtime import GENERATE_PATH, MODELING_PATH
from ..runtime.shapes import modeling
from ..source.architecture import Architecture, main_auto_class
from ..source.checkpoint import Checkpoint
from ..source.custom_code import GLUE_FILE, glue
from ..source.hub import GENERATE_FILE
from ..source.json_files import write_json

# Whose models take `generate(self_contrast=...)`.
_GENERATING = {"AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForSeq2SeqLM"}


def write_recipe(path: Path, recipe: Recipe, is_mixture: bool) -> None:
    """Write a recipe as the YAML file that `--config` reads, without what its source would refuse."""
    import yaml

    values = recipe.to_mapping()
    if is_mixture:  # whose other options have no meaning, and are refused
        values = {name: value for name, value in values.items() if name in FOR_MIXTURES}
    if recipe.select in LIMITED and "top_k" not in recipe.given:  # no limit, whatever the number of experts
        values.pop("top_k")
    if recipe.threshold == THRESHOLD:  # what top-p takes anyway, and other selections refuse
        values.pop("threshold")
    # Whoever repeats it decides on that anew.
    trust = " --trust-remote-code" if values.pop("trust_remote_code") else ""
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    first = f"# mpoe-convert --config {path.name}{trust} -o OUT repeats this run"
    path.write_text(f"{first}\n{text}", encoding="utf-8")


def make_config(plan: Plan, architecture: Architecture) -> dict:
    """The base config plus our model type, the Auto classes' entries and the one `mpoe` block."""
    runtime, config = modeling(), architecture.config
    forms: list[dict] = []
    ffns = {}
    for ffn in plan.ffns:
        parts = ffn.form.parts
        if parts not in forms:
            forms.append(parts)
        ffns[ffn.ffn.path] = forms.index(parts)
    names = architecture.heads
    auto_map = _auto_map(architecture)
    architectures = config.get("architectures") or [names.get("AutoModel") or next(iter(names.values()))]
    changes = {
        "model_type": runtime.MODEL_TYPE_PREFIX + plan.model_type,
        "architectures": [runtime.CLASS_PREFIX + name for name in architectures],
        "auto_map": auto_map,
        "mpoe": {
            "format": runtime.FORMAT_VERSION,
            "base_model_type": plan.model_type,
            "kind": plan.kind,
            **routing(plan.recipe),
            "family": plan.family.runtime(),
            "forms": forms,
            "ffns": ffns,
        },
    }
    if plan.recipe.bits and (rounding := config_of(plan, plan.recipe.bits)):
        changes["quantization_config"] = rounding
    if architecture.auto_map:
        changes["mpoe"]["base_auto_map"] = architecture.auto_map
    if plan.recipe.dtype:
        config = {key: value for key, value in config.items() if key != "torch_dtype"}
        changes["dtype"] = plan.recipe.dtype
    # Where the source's weights are; the artifact's are where transformers looks first.
    return {key: value for key, value in config.items() if key != "transformers_weights"} | changes


def _auto_map(architecture: Architecture) -> dict:
    """Own classes are subclassed in a module of their own. Entries of tokenizers and processors stay."""
    module = Path(GLUE_FILE if architecture.is_custom else MODELING_FILE).stem
    classes = {"AutoConfig": architecture.config_class_name, **architecture.heads}
    return architecture.auto_map | {
        auto: f"{module}.{modeling().CLASS_PREFIX}{name}" for auto, name in classes.items()
    }


def write_companions(folder: Path, plan: Plan, checkpoint: Checkpoint) -> None:
    """config.json, the modelling file, and everything that belongs to the model but its weights."""
    architecture = checkpoint.architecture
    copy_companions(folder, checkpoint, architecture)
    name_classes(folder, checkpoint, architecture)
    write_json(folder / "config.json", make_config(plan, architecture))
    shutil.copyfile(MODELING_PATH, folder / MODELING_FILE)
    generates = main_auto_class(checkpoint.config, plan.model_type) in _GENERATING
    if generates and not plan.family.runtime().get("one_by_one"):  # whose weak pass is refused
        (folder / GENERATE_FILE).parent.mkdir(exist_ok=True)
        shutil.copyfile(GENERATE_PATH, folder / GENERATE_FILE)
    if architecture.is_custom:
        text = glue(architecture, Path(MODELING_FILE).stem, modeling().CLASS_PREFIX)
        (folder / GLUE_FILE).write_text(text, encoding="utf-8")
