"""Shared fixtures. Nothing is read from or written to the user's own caches, and no network is used."""

import os
import tempfile
from pathlib import Path

# Read by huggingface_hub and transformers when they are imported, so set before any test imports them.
_HOME = tempfile.mkdtemp(prefix="mpoe-tests-")
os.environ["HF_HOME"] = _HOME
os.environ["HF_MODULES_CACHE"] = f"{_HOME}/modules"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# One thread each: tests run side by side, and threads of several processes slow each other down.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def quiet_transformers():
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


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
    from tiny import save_tiny

    return save_tiny("gpt2", "AutoModelForCausalLM", tmp_path / "tiny-gpt2")


def pytest_sessionfinish():
    import shutil

    shutil.rmtree(_HOME, ignore_errors=True)
