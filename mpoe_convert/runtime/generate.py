# Copyright the mpoe_convert contributors. Licensed under the Apache License, Version 2.0.
"""Custom generation of transformers: `generate(..., self_contrast=0.5)`, see modeling_mpoe.py.

It lies in `custom_generate/` of an artifact. `custom_generate="path/or/id"` in a call of `generate` runs it;
models that are loaded from there have the same method anyway.
"""

from typing import Any


def generate(*args: Any, model: Any, **kwargs: Any) -> Any:
    """The model's own `generate`. Raises ValueError for a model that has no mixtures of modeling_mpoe.py."""
    if not hasattr(model, "mixtures"):
        raise ValueError(
            f"{type(model).__name__} has no routers that can choose weak experts; load the model from the "
            "folder that has this custom_generate, with trust_remote_code=True"
        )
    return type(model).generate(model, *args, **kwargs)


vars(generate)["calls_method"] = True  # so that a model that is loaded keeps its method
