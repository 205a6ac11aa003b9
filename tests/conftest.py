"""Shared fixtures. Nothing is read from or written to the user's own caches, and no network is used."""

import hashlib
import json
import os
import signal
import tempfile
from pathlib import Path

# Read by huggingface_hub and transformers when they are imported, so set before any test imports them.
_HOME = tempfile.mkdtemp(prefix="mpoe-tests-")
os.environ["HF_HOME"] = _HOME
os.environ["HF_MODULES_CACHE"] = f"{_HOME}/modules"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# A shell that starts a job in the background lets it ignore Ctrl-C, and the children inherit that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# One thread each: tests run side by side, and threads of several processes slow each other down.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def quiet_transformers():
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture(scope="session", autouse=True)
def remote_code_is_read_once():
    from helpers.remote_code import read_once

    with read_once():
        yield


@pytest.fixture(scope="session", autouse=True)
def verification_in_process():
    """Exports and verification compare in this process, not in one of their own, which takes seconds."""
    from helpers.verification import in_process

    from mpoe_convert.artifact import verify

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "_run_child", in_process)
        yield


@pytest.fixture
def own_process(monkeypatch):
    """Verification in a process of its own, as users run it."""
    from helpers.verification import in_a_process

    from mpoe_convert.artifact import verify

    monkeypatch.setattr(verify, "_run_child", in_a_process)


@pytest.fixture
def test_data() -> Path:
    """The folder with real checkpoints and text; tests that need it are skipped without it."""
    folder = os.environ.get("MPOE_TEST_DATA")
    if not folder:
        pytest.skip("MPOE_TEST_DATA is not set")
    return Path(folder)


@pytest.fixture
def tiny_gpt2(tmp_path) -> Path:
    """A folder with a random two-layer GPT-2."""
    from helpers.tiny import save_tiny

    return save_tiny("gpt2", "AutoModelForCausalLM", tmp_path / "tiny-gpt2")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    """(dense folder, artifact folder) of a type and recipe, made once."""
    from helpers.models import generative
    from helpers.tiny import save_tiny, save_tokenizer

    from mpoe_convert import Recipe, convert

    made = {}

    def make(model_type: str, auto_class: str | None = None, **recipe) -> tuple[Path, Path]:
        auto_class = auto_class or generative(model_type)
        recipe = {"experts": 3, "bond_dim": 4, "noise": 0.0} | recipe
        key = json.dumps([model_type, auto_class, recipe], sort_keys=True)
        if key not in made:
            name = hashlib.sha256(key.encode()).hexdigest()[:12]
            root = tmp_path_factory.mktemp(f"{model_type}-{name}")
            folder = save_tiny(model_type, auto_class, root / "dense")
            if model_type != "vit":
                save_tokenizer(folder)
            convert(Recipe(str(folder), **recipe), root / "out")
            made[key] = folder, root / "out"
        return made[key]

    return make


def pytest_sessionfinish():
    import shutil

    shutil.rmtree(_HOME, ignore_errors=True)
