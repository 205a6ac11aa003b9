"""transformers' own model tests on classes of a family: the stock ones, or those of an artifact.

python tests/helpers/transformers_suite.py TESTS FAMILY KIND [PATTERN]

TESTS is the folder `tests` of a release of transformers. KIND is a kind of experts, or `stock`. The last line
of the output is a JSON object: {name of a test: how it ended}.
"""

import importlib
import inspect
import json
import sys
import tempfile
import types
import unittest
import warnings
from copy import deepcopy
from fnmatch import fnmatchcase
from pathlib import Path
from unittest.mock import patch

import torch
import transformers

from helpers.models import generative
from helpers.tiny import HIDDEN, LAYERS, VOCAB, make_config, make_inputs, save_tiny
from mpoe_convert import Recipe, convert
from mpoe_convert.runtime.modeling_mpoe import CLASS_PREFIX, subclass
from mpoe_convert.source.architecture import heads

STOCK = "stock"
BATCH, LENGTH = 2, 9  # of `make_inputs`
# What a source distribution leaves out: files in folders below `tests`.
LEFT_OUT = {
    "tests.exporters.test_export": ("ExportTesterMixin", "ExportGenerateTesterMixin"),
    "tests.generation.test_utils": ("GenerationTesterMixin",),
}


def open_tests(folder: Path) -> types.ModuleType:
    """The release's test_modeling_common; what the folder lacks has no tests."""
    package = types.ModuleType("tests")
    package.__path__ = [str(folder)]
    sys.modules["tests"] = package
    for name, classes in LEFT_OUT.items():
        if not folder.joinpath(*name.split(".")[1:]).with_suffix(".py").exists():
            empty = {cls: type(cls, (), {}) for cls in classes}
            module = types.ModuleType(name)
            vars(module).update(empty)
            sys.modules[name.rpartition(".")[0]] = types.ModuleType(name.rpartition(".")[0])
            sys.modules[name] = module
    return importlib.import_module("tests.test_modeling_common")


def mpoe_block(family: str, kind: str) -> dict:
    """The block that converting a tiny model of the family writes."""
    with tempfile.TemporaryDirectory() as folder:
        source = save_tiny(family, generative(family), Path(folder) / "dense")
        convert(Recipe(str(source), kind=kind, experts=3, top_k=2, bond_dim=4), Path(folder) / "out")
        return json.loads((Path(folder) / "out" / "config.json").read_text())["mpoe"]


class ModelTester:
    """A tiny model and its inputs, as the tests ask for them."""

    is_training = True
    batch_size, seq_length, key_length, num_choices = BATCH, LENGTH, LENGTH, 2
    hidden_size, num_hidden_layers, num_attention_heads = HIDDEN, LAYERS, 2
    vocab_size = VOCAB

    def __init__(self, family: str, block: dict | None):
        self.family, self.block = family, block
        self.base = getattr(transformers, heads(family)["AutoModel"])
        self.config = make_config(family)
        self.image_size = getattr(self.config, "image_size", None)
        self.patch_size = getattr(self.config, "patch_size", None)
        if self.image_size:
            self.num_masks, self.mask_length = 2, (self.image_size // self.patch_size) ** 2
            self.seq_length = self.key_length = self.mask_length + 1

    def get_config(self) -> transformers.PretrainedConfig:
        config = make_config(self.family)
        if self.block is None:
            return config
        values = {key: value for key, value in config.to_diff_dict().items() if key != "model_type"}
        return subclass(type(config))(**values, mpoe=deepcopy(self.block))

    def prepare_config_and_inputs_for_common(self) -> tuple:
        config = self.get_config()
        model = types.SimpleNamespace(forward=self.base.forward, config=config)
        return config, make_inputs(model, "AutoModel")


def register(family: str) -> None:
    """Let the Auto classes find ours: the tests do not pass `trust_remote_code`."""
    config = subclass(transformers.CONFIG_MAPPING[family])
    transformers.AutoConfig.register(config.model_type, config)
    for auto, name in heads(family).items():
        getattr(transformers, auto).register(config, subclass(getattr(transformers, name)), exist_ok=True)


def make_cases(common: types.ModuleType, family: str, kind: str) -> list[type[unittest.TestCase]]:
    """A test case for every head of a family."""
    block = None if kind == STOCK else mpoe_block(family, kind)
    classes = [getattr(transformers, name) for name in dict.fromkeys(heads(family).values())]
    if block is not None:
        register(family)
        classes = [subclass(cls) for cls in classes]
    return [_make_case(common, family, block, cls) for cls in classes]


def _make_case(
    common: types.ModuleType, family: str, block: dict | None, cls: type
) -> type[unittest.TestCase]:
    mixins = [common.ModelTesterMixin, *[common.GenerationTesterMixin] * cls.can_generate()]

    def set_up(self) -> None:
        self.model_tester = ModelTester(family, block)

    body = {
        "all_model_classes": (cls,),
        "is_encoder_decoder": "decoder_input_ids" in inspect.signature(cls.forward).parameters,
        "setUp": set_up,
        # Without it the year in the head of a config's file decides whether the test runs.
        "test_can_init_all_missing_weights_before_2023": True,
    }
    return type(cls.__name__.removeprefix(CLASS_PREFIX), (*mixins, unittest.TestCase), body)


class Outcomes(unittest.TestResult):
    """How each test ended: passed, skipped, or the error."""

    def __init__(self):
        super().__init__()
        self.ended: dict[str, str] = {}

    def _note(self, test: unittest.TestCase, outcome: str) -> None:
        name = ".".join(test.id().split(".")[-2:])
        self.ended[name] = outcome
        print(name, outcome, file=sys.stderr, flush=True)

    def addSuccess(self, test):
        self._note(test, "passed")

    def addSkip(self, test, reason):
        if not isinstance(test, unittest.case._SubTest):
            self._note(test, "skipped")

    def addFailure(self, test, err):
        print(self._exc_info_to_string(err, test), file=sys.stderr)
        self._note(test, f"{err[0].__name__}: {err[1]}")

    addError = addFailure

    def addSubTest(self, test, subtest, err):
        if err is not None:
            self.addFailure(test, err)


def run(folder: Path, family: str, kind: str, pattern: str = "test_*") -> dict[str, str]:
    """Run the tests whose names match."""
    transformers.logging.disable_progress_bar()
    common = open_tests(folder)
    names = common.get_values

    def with_ours(mapping) -> list:
        return [prefix + name for name in names(mapping) for prefix in ("", CLASS_PREFIX)]

    outcomes = Outcomes()
    with warnings.catch_warnings(), patch.object(common, "get_values", with_ours):
        warnings.simplefilter("ignore")
        for case in make_cases(common, family, kind):
            for name in unittest.TestLoader().getTestCaseNames(case):
                if fnmatchcase(name, pattern):
                    torch.manual_seed(0)
                    case(name).run(outcomes)
    return outcomes.ended


if __name__ == "__main__":
    print(json.dumps(run(Path(sys.argv[1]).resolve(), *sys.argv[2:])))
