"""transformers' own tests of models and generation: what the stock class passes, the artifact's class passes.

pip install parameterized
pip download --no-deps --no-binary :all: transformers==VERSION    # the installed version
tar xf transformers-VERSION.tar.gz
export MPOE_TRANSFORMERS_TESTS=transformers-VERSION/tests
python -m pytest -m slow tests/whole/test_transformers_suite.py

A source distribution has the tests of models (ModelTesterMixin). A checkout of transformers' repository at
the tag of the version has those of generation and export as well (GenerationTesterMixin, ExportTesterMixin).
It takes about a minute per family and kind; `tests/helpers/transformers_suite.py` runs one of them, or one
test, by hand.
"""

import functools
import json
import os
import re
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import transformers
from helpers.transformers_suite import STOCK

from mpoe_convert.experts import KINDS

FAMILIES = ("gpt2", "llama", "qwen3", "gpt_neox", "opt", "bert", "bart", "t5", "vit")
# Tests that the stock class passes and ours does not, and why that is right.
STATED = {
    "ViTModel.test_reverse_loading_mapping": (
        "every old name that transformers knows has to occur: those of dense FFNs are for layers that stay "
        "dense, and this model has none"
    ),
}
# Tests that may end differently.
ROUNDING = {
    "*.test_eager_matches_sdpa_inference_*_bf16_*": (
        "the two ways to compute attention differ by rounding, by which a router chooses another expert, and "
        "experts with random weights differ; with all experts for every token they pass"
    ),
}
SUITE = Path(__file__).parents[1] / "helpers" / "transformers_suite.py"


def outcomes(tests: Path, family: str, kind: str, scratch: Path) -> dict[str, str]:
    """{name of a test: how it ended}, in a process of its own."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(SUITE.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "TMPDIR": str(scratch),
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / "compiled"),
    }
    done = subprocess.run(
        [sys.executable, SUITE, tests, family, kind],
        capture_output=True,
        text=True,
        env=environment,
        cwd=scratch,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def differences(stock: dict[str, str], ours: dict[str, str]) -> dict[str, str]:
    """{test that passes on stock classes alone: how it ends on ours}."""
    passed = [name for name, outcome in stock.items() if outcome == "passed"]
    return {name: ours.get(name, "not run") for name in passed if ours.get(name) != "passed"}


@pytest.fixture(scope="module")
def release() -> Path:
    """The tests of the installed release of transformers."""
    folder = os.environ.get("MPOE_TRANSFORMERS_TESTS")
    if not folder:
        pytest.skip("MPOE_TRANSFORMERS_TESTS is not set")
    pytest.importorskip("parameterized")
    code = Path(folder, "../src/transformers/__init__.py").resolve().read_text(encoding="utf-8")
    assert re.findall(r'^__version__ = "(.*)"$', code, re.M) == [transformers.__version__]
    return Path(folder).resolve()


@pytest.fixture(scope="module")
def stock(release, tmp_path_factory):
    """The outcomes of a family's stock classes, made once."""
    return functools.cache(lambda family: outcomes(release, family, STOCK, tmp_path_factory.mktemp(family)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_no_difference_but_those_stated(family, kind, release, stock, tmp_path):
    expected = stock(family)
    assert list(expected.values()).count("passed") > 50
    found = differences(expected, outcomes(release, family, kind, tmp_path))
    found = {n: how for n, how in found.items() if not any(fnmatchcase(n, pattern) for pattern in ROUNDING)}
    assert found.keys() == {name for name in STATED if name in expected}, found


# A release that has two tests of models, one of which only stock classes pass.
RELEASE = """
def get_values(mapping):
    return []

class ModelTesterMixin:
    def test_makes_a_model(self):
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            model_class(config)(**inputs)

    def test_is_stock(self):
        assert all(not cls.__name__.startswith("MPOE") for cls in self.all_model_classes), "ours"

    def test_is_skipped(self):
        self.skipTest("never runs")

from .generation.test_utils import GenerationTesterMixin
"""


@pytest.mark.slow
def test_a_difference_is_found(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_modeling_common.py").write_text(RELEASE)
    expected, found = (outcomes(tmp_path / "tests", "gpt2", kind, tmp_path) for kind in (STOCK, "mpo"))
    assert set(expected.values()) == {"passed", "skipped"} and "GPT2Model.test_makes_a_model" in expected
    heads = {name.partition(".")[0] for name in expected}
    assert differences(expected, found) == {f"{head}.test_is_stock": "AssertionError: ours" for head in heads}
