"""What a name can mean: a path of this machine, or an id of the Hub; and what may have been meant."""

from pathlib import Path

import pytest
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from mpoe_convert.source.paths import is_path, is_written_like_a_path, suggest_path

IDS = ["gpt2", "owner/name", "o/name-v1.5", "openai/whisper-tiny.en", "Qwen/Qwen2.5-0.5B", "a_b/c.d_e-f"]
LIKE_PATHS = ["", "  ", "./x", "../x", "/x/y", "~/x", "x/", "topics.tx", "data.jsonl"]
NO_IDS = ["a/b/c", "no spaces", "a..b", "a--b", "-a", "a.git", "x" * 97, "a?", "a/b.", "a@b"]


@pytest.mark.parametrize("name", IDS)
def test_an_id_of_the_hub_is_no_path(name):
    validate_repo_id(name)
    assert not is_path(name)


@pytest.mark.parametrize("name", LIKE_PATHS)
def test_what_begins_or_ends_like_a_path_is_one(name):
    assert is_path(name) and is_written_like_a_path(name)


@pytest.mark.parametrize("name", NO_IDS)
def test_what_the_hub_refuses_is_a_path(name):
    with pytest.raises(HFValidationError):
        validate_repo_id(name)
    assert is_path(name)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("topics.tx", "topics.txt"),
        ("TOPICS.TXT", "topics.txt"),
        ("topic", "topics.txt"),
        ("./topics", "topics.txt"),
        ("dtaa/rows.csv", "data"),  # the first part that is not there
        ("data/row.csv", "data/rows.csv"),
        ("data/nothing-like-it", None),
        ("hidden", None),
        ("", None),
    ],
)
def test_the_nearest_name_in_that_folder(name, near, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("topics.txt").touch()
    Path(".hidden").touch()
    Path("data").mkdir()
    Path("data/rows.csv").touch()
    assert suggest_path(name) == ("" if near is None else f"; did you mean {near!r}?")
