"""The classes of errors: each names a cause, and a bad request can be told from all others."""

import doctest
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

import mpoe_convert
from mpoe_convert import (
    CentreMask,
    Export,
    Finetuning,
    Pruning,
    Recipe,
    convert,
    draw_pictures,
    errors,
    evaluate,
    export,
    finetune,
    freeze,
    mask_centre,
    param_groups,
    plan,
    prune,
    push,
    router_stats,
    verify,
)
from mpoe_convert.artifact.destination import Destination
from mpoe_convert.devices import pick_device
from mpoe_convert.errors import (
    HubError,
    LibraryError,
    MpoeError,
    RecipeError,
    RequestError,
    RunError,
    TrainingError,
    one_line,
)
from mpoe_convert.extras import need

BAD_REQUESTS = {
    "recipe": lambda: Recipe("model", experts=0),
    "fine-tuning": lambda: Finetuning("model", data=("text.txt",), steps=0),
    "export": lambda: Export(to="gguf"),
    "push": lambda: Destination("no-owner"),
    "device": lambda: pick_device("banana"),
}


@pytest.mark.parametrize("request_", BAD_REQUESTS)
def test_a_bad_request_is_a_request_error(request_):
    with pytest.raises(RequestError):
        BAD_REQUESTS[request_]()


NO_PATHS = [3, "", None, "a\0b", ["out"]]
NO_TOKENS = [3, True, "", "hf_a b", "hf_\n"]
GOOD = Recipe("model", keep=0.5)
GOOD_RUN = Finetuning("none", "t.txt")
GOOD_PRUNING = Pruning("t.txt", 4)
# What is wrong, and how each function is called with it. No model is there: none is reached.
FROM_PYTHON = {
    "recipe": (convert, [3, None, ["gpt2"], ""], lambda wrong: convert(wrong, "out")),
    "plan's recipe": (plan, [3, None, ["gpt2"], ""], plan),
    "output": (convert, NO_PATHS, lambda wrong: convert(GOOD, wrong)),
    "token": (convert, NO_TOKENS, lambda wrong: convert(GOOD, "out", token=wrong)),
    "plan's token": (plan, NO_TOKENS, lambda wrong: plan(GOOD, token=wrong)),
    "export's target": (export, [3, "gguf", Recipe("m")], lambda wrong: export("none", "out", wrong)),
    "export's model": (export, NO_PATHS, lambda wrong: export(wrong, "out")),
    "export's output": (export, NO_PATHS, lambda wrong: export("none", wrong)),
    "export's token": (export, NO_TOKENS, lambda wrong: export("none", "out", token=wrong)),
    "data": (evaluate, [3, "", None, [], [3], {"t.txt": 1}], lambda wrong: evaluate("none", wrong)),
    "evaluate's token": (evaluate, NO_TOKENS, lambda wrong: evaluate("none", "t.txt", token=wrong)),
    "run": (finetune, [3, "none", "art", None, GOOD], lambda wrong: finetune(wrong, "out")),
    "finetune's output": (finetune, NO_PATHS, lambda wrong: finetune(Finetuning("m", "t.txt"), wrong)),
    "finetune's progress": (finetune, [3], lambda wrong: finetune(GOOD_RUN, "out", progress=wrong)),
    "finetune's watch": (finetune, [3, "a"], lambda wrong: finetune(GOOD_RUN, "out", watch=wrong)),
    "convert's progress": (convert, [3], lambda wrong: convert(GOOD, "out", progress=wrong)),
    "plan's progress": (plan, [3], lambda wrong: plan(GOOD, progress=wrong)),
    "export's progress": (export, [3], lambda wrong: export("none", "out", progress=wrong)),
    "pruning": (prune, [3, "none", None, GOOD], lambda wrong: prune("none", "out", wrong)),
    "prune's model": (prune, NO_PATHS, lambda wrong: prune(wrong, "out", GOOD_PRUNING)),
    "prune's output": (prune, NO_PATHS, lambda wrong: prune("none", wrong, GOOD_PRUNING)),
    "prune's token": (prune, NO_TOKENS, lambda wrong: prune("none", "out", GOOD_PRUNING, token=wrong)),
    "prune's progress": (prune, [3], lambda wrong: prune("none", "out", GOOD_PRUNING, progress=wrong)),
    "evaluate's progress": (evaluate, [3], lambda wrong: evaluate("none", "t.txt", progress=wrong)),
    "columns": (evaluate, [3, "text"], lambda wrong: evaluate("none", "t.txt", columns=wrong)),
    "artifact": (verify, NO_PATHS, verify),
    "against": (verify, [3, "", ["m"]], lambda wrong: verify("none", against=wrong)),
    "verify's token": (verify, NO_TOKENS, lambda wrong: verify("none", token=wrong)),
    "pushed folder": (push, NO_PATHS, lambda wrong: push(wrong, "me/moe")),
    "repository": (push, [3, "", None, "moe", "a/b/c"], lambda wrong: push("none", wrong)),
    "branch": (push, [3, "", " "], lambda wrong: push("none", "me/moe", branch=wrong)),
    "push's token": (push, NO_TOKENS, lambda wrong: push("none", "me/moe", token=wrong)),
    "drawn folder": (draw_pictures, NO_PATHS, draw_pictures),
}


@pytest.mark.parametrize("case", FROM_PYTHON)
def test_a_wrong_argument_from_python_is_told(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, values, call = FROM_PYTHON[case]
    for wrong in values:
        with pytest.raises(RequestError) as told:
            call(wrong)
        message = str(told.value)
        assert "expected" in message and "\n" not in message and "--" not in message
        assert "token" not in case or "hf_a" not in message
    assert not list(tmp_path.iterdir())


def test_every_public_function_that_takes_paths_is_called_wrongly():
    """Those that are left out take models in memory."""
    of_models = {"freeze", "mask_centre", "param_groups", "router_stats"}
    functions = {name for name in mpoe_convert.__all__ if inspect.isfunction(getattr(mpoe_convert, name))}
    assert {function.__name__ for function, _, _ in FROM_PYTHON.values()} == functions - of_models


@pytest.mark.parametrize(
    "call",
    [
        lambda: freeze("art", "centre"),
        lambda: param_groups("art", 1e-3),
        lambda: param_groups(nn.Linear(2, 2), "fast"),
        lambda: param_groups(nn.Linear(2, 2), 1e-3, router=None),
        lambda: mask_centre("art", 1, 0.5),
        lambda: mask_centre(nn.Linear(2, 2), 1, "a"),
        lambda: router_stats("art"),
        lambda: router_stats(nn.Linear(2, 2)),
        lambda: CentreMask("a"),
        lambda: CentreMask(2.0),
        lambda: CentreMask(0.5, per="x"),
    ],
)
def test_a_wrong_model_or_rate_from_python_is_told(call):
    with pytest.raises(TrainingError, match=r"; expected ") as told:
        call()
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("wrong", ["art", None])
def test_finetune_needs_data(wrong):
    with pytest.raises(RunError, match=r"expected Finetuning\(model=..., data=...\)$"):
        finetune(wrong, "o")


@pytest.mark.parametrize(
    "call", [lambda: finetune(Finetuning("artt", "t.txt"), "o"), lambda: evaluate("artt", "t.txt")]
)
def test_a_model_that_was_meant_is_named_in_python_too(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "art").mkdir()
    (tmp_path / "t.txt").write_text("w3 w4")
    with pytest.raises(HubError, match="did you mean 'art'"):
        call()


def test_short_forms_stand_for_requests():
    path = Path("gpt2")
    assert Recipe.of("gpt2") == Recipe.of(path) == Recipe("gpt2") and Recipe.of(GOOD) is GOOD
    assert Export.of("moe") == Export("moe") and Export.of(None) == Export()
    with pytest.raises(RecipeError, match=r"the recipe is 3; expected Recipe\(model=...\)"):
        Recipe.of(3)
    with pytest.raises(
        RunError, match=r"the fine-tuning request is 'x'; expected Finetuning\(model=..., data"
    ):
        Finetuning.of("x")


def test_a_model_alone_is_converted_by_the_defaults(tiny_gpt2, tmp_path):
    from safetensors.torch import load_file

    found = [convert(each, tmp_path / name) for name, each in (("a", str(tiny_gpt2)), ("b", tiny_gpt2))]
    expected = plan(Recipe(tiny_gpt2))
    assert all(report.plan.recipe == expected.recipe for report in found)
    assert set(load_file(tmp_path / "a/model.safetensors")) == {tensor.name for tensor in expected.tensors}


def test_evaluate_takes_one_path(monkeypatch):
    monkeypatch.setattr("mpoe_convert.training.evaluate.score_models", lambda request, **_: request)
    request = evaluate(Path("out"), Path("t.txt"))
    assert (request.model, request.data) == ("out", ("t.txt",))
    assert evaluate("out", [Path("a.txt"), "b.txt"]).data == ("a.txt", "b.txt")


def test_tab_finds_the_public_names():
    found = {name for name in dir(mpoe_convert) if not name.startswith("_")}
    assert found == {name for name in mpoe_convert.__all__ if not name.startswith("_")}
    assert {"__version__", "__doc__"} <= set(dir(mpoe_convert))


EXTRAS = """
import sys
sys.modules |= dict.fromkeys(("accelerate", "datasets", "greenlet", "matplotlib"))  # as if not installed
from mpoe_convert import Finetuning, MpoeError, Recipe, draw_pictures, evaluate, plan
import mpoe_convert
model, text = sys.argv[1:]
calls = {
    "finetune": lambda: mpoe_convert.finetune(Finetuning(model, text, steps=1), "out"),
    "callback": lambda: mpoe_convert.CentreMask,
    "evaluate": lambda: evaluate(model, text),
    "calibrate": lambda: plan(Recipe(model, bond_dim=2, experts=2, keep=0.9, calibrate=text)),
    "report": lambda: draw_pictures("out"),
}
for name, call in calls.items():
    try:
        call()
    except MpoeError as error:
        print(f"{name}: {type(error).__name__} {error}")
"""


def test_commands_without_their_extras_say_what_to_install(tiny_gpt2, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("w3 w4")
    command = [sys.executable, "-c", EXTRAS, str(tiny_gpt2), str(text)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    told = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    extras = {"finetune": "train", "callback": "train", "evaluate": "train"}
    for name, extra in (extras | {"calibrate": "calibrate", "report": "report"}).items():
        assert re.match(rf"LibraryError .* needs .*pip install 'mpoe-convert\[{extra}\]'", told[name]), done


def test_every_error_is_an_mpoe_error_with_a_cause_of_its_own():
    own = (value for value in vars(errors).values() if isinstance(value, type))
    classes = [value for value in own if value.__module__ == errors.__name__]
    assert all(issubclass(each, MpoeError) and each.__doc__ for each in classes)
    assert len({each.__doc__ for each in classes}) == len(classes)


def test_a_missing_library_is_told_with_the_extra_that_has_it():
    need("report", "json", extra="report")
    with pytest.raises(LibraryError) as told:
        need("report", "json", "no_such_library", extra="report")
    assert str(told.value) == (
        "report needs no_such_library: install them with pip install 'mpoe-convert[report]'"
    )


def test_one_line():
    assert doctest.testmod(errors).failed == 0
    assert one_line(ValueError()) == "ValueError"
    assert one_line("x" * 300, 10) == "xxxxxxx..."
