"""The command line. A command parses, makes one library call and prints."""

from . import convert, export, inspect, prune, push, train
from .app import main

# In the order of --help.
for command in (
    convert.convert,
    convert.plan,
    inspect.verify,
    inspect.inspect,
    train.finetune,
    train.evaluate,
    prune.prune,
    export.export,
    push.push,
    inspect.report,
    inspect.families,
    inspect.completion,
):
    main.add_command(command)

__all__ = ["main"]
