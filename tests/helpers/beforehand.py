"""What a process does once before it forks for each run of the command.

A run imports up to two thousand modules of torch, transformers and datasets, and reads the modelling file:
seconds, of which little is left to do in a fork of a process that has done it.
"""

from contextlib import ExitStack
from importlib import import_module
from importlib.machinery import SourceFileLoader

from remote_code import read_once  # the scripts that import this have its folder on their path

MODULES = (
    "accelerate",
    "datasets",
    "huggingface_hub.serialization",
    "mpoe_convert.cli",
    "mpoe_convert.compression.mixtures",
    "mpoe_convert.conversion.convert",
    "torch._dynamo",
    "torch.onnx",
)
READING = ExitStack()  # never left
CLASSES = ("AutoModelForCausalLM", "AutoTokenizer", "GPT2LMHeadModel", "LlamaForCausalLM", "Trainer")


def prepare() -> None:
    """Import what commands import, and parse and compile the file that comes with artifacts."""
    import transformers

    import mpoe_convert

    for name in MODULES:
        import_module(name)
    for name in mpoe_convert.__all__:
        getattr(mpoe_convert, name)
    for name in CLASSES:
        getattr(transformers, name)
    read_modelling_file()


def read_modelling_file() -> None:
    """As transformers reads it beside an artifact; this process and its forks then know the answer."""
    from transformers import dynamic_module_utils as utils

    from mpoe_convert.runtime import MODELING_PATH

    READING.enter_context(read_once())
    utils.get_imports(MODELING_PATH)
    content, copy = MODELING_PATH.read_bytes(), f"{utils.HF_MODULES_CACHE}/modeling_mpoe.py"
    SourceFileLoader("modeling_mpoe", copy).source_to_code(content, copy)
