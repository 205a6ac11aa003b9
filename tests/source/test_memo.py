"""What is kept of a stock model: only the same question is answered by it."""

import json

import pytest
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from mpoe_convert import Recipe, plan
from mpoe_convert.errors import CheckpointError
from mpoe_convert.source import memo
from mpoe_convert.source.json_files import write_whole


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """Questions that were not answered from the disk; as in a process that has not imported transformers."""
    found = []
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "home"))
    monkeypatch.setattr(memo, "_is_used", lambda: True)
    keep = memo._keep
    monkeypatch.setattr(
        memo, "_keep", lambda path, value: (found.append(value["question"]), keep(path, value))
    )
    return found


def test_an_answer_is_found_again_until_anything_it_depends_on_changes(asked, monkeypatch):
    learnt = iter(range(100))

    def answer(what="what", of=("of",)):
        return memo.remembered(what, of, lambda: {"number": next(learnt)})

    assert answer() == answer() == {"number": 0}
    assert answer(of=("other",)) == {"number": 1}
    assert answer(what="other") == {"number": 2}
    before = memo._installed()
    monkeypatch.setattr(memo, "_installed", lambda: [*before, "another release"])
    assert answer() == {"number": 3}
    assert len(asked) == 4


def test_a_damaged_file_and_a_place_that_cannot_be_written_are_as_nothing(asked, monkeypatch):
    assert memo.remembered("what", 1, lambda: "first") == "first"
    [file] = memo.folder().iterdir()
    for text in ("", "{", "[]", '{"question": "what"}'):
        file.write_text(text, encoding="utf-8")
        assert memo.remembered("what", 1, lambda: "again") == "again"
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(file))  # a file is no folder
    assert memo.remembered("what", 1, lambda: "third") == "third"


def test_errors_and_large_answers_are_not_kept(asked, monkeypatch):
    with pytest.raises(ZeroDivisionError):
        memo.remembered("what", 1, lambda: 1 / 0)
    monkeypatch.setattr(memo, "MOST_CHARACTERS", 10)
    assert memo.remembered("what", 2, lambda: "x" * 11) == "x" * 11
    assert asked == [] and not memo.folder().exists()


def test_a_process_that_has_transformers_asks_it(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "home"))
    memo._is_used.cache_clear()
    answers = iter((1, 2))
    assert [memo.remembered("what", 1, lambda: next(answers)) for _ in range(2)] == [1, 2]
    assert not (tmp_path / "home").exists()


def test_a_checkpoint_that_has_changed_is_looked_at_again(asked, tiny_gpt2):
    recipe = Recipe(str(tiny_gpt2), experts=2, bond_dim=4)
    first = plan(recipe).to_json()
    count = len(asked)
    assert plan(recipe).to_json() == first and len(asked) == count
    weights = load_file(tiny_gpt2 / "model.safetensors")
    whole = dict(weights)
    del weights["transformer.h.1.ln_1.weight"]
    save_file(weights, tiny_gpt2 / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"the checkpoint lacks 'transformer.h.1.ln_1.weight'"):
        plan(recipe)
    more = whole | {"more.weight": whole["transformer.h.1.ln_1.weight"].clone()}
    save_file(more, tiny_gpt2 / "model.safetensors", metadata={"format": "pt"})
    assert any("'more.weight'" in warning for warning in plan(recipe).to_json()["warnings"])
    config = json.loads((tiny_gpt2 / "config.json").read_text(encoding="utf-8"))
    (tiny_gpt2 / "config.json").write_text(json.dumps(config | {"n_positions": 1}), encoding="utf-8")
    with pytest.raises(CheckpointError, match="has the shape"):
        plan(recipe)


def test_a_file_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    write_whole(tmp_path / "file", b"before")
    monkeypatch.setattr("os.replace", lambda *_: pytest.fail("full"))
    with pytest.raises(BaseException, match="full"):
        write_whole(tmp_path / "file", b"after")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"before"
