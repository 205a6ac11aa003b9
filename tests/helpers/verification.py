"""Verification in the test's own process: a process of its own takes seconds to import torch."""

import io
import json
import sys
import warnings

import pytest
import torch

from mpoe_convert.artifact import verify
from mpoe_convert.artifact.verify_child import main
from mpoe_convert.errors import VerifyError

in_a_process = verify._run_child


def in_process(request: verify.ChildRequest) -> dict:
    """What `verify_child.main` answers, with the state of this process left as it was."""
    hooks = list(sys.meta_path)
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(sys, "stdin", io.StringIO(request.to_json()))
        if verify._is_shadowed(request.against):
            return in_a_process(request)
        try:
            result = json.loads(json.dumps(main()))
        finally:
            sys.meta_path[:] = hooks
    if "error" in result:
        raise VerifyError(result["error"])
    return result
