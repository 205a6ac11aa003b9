"""Without a connection to the Hub, what a cache has is loaded, and all else is told at once."""

import json
import socket
import time
from pathlib import Path

import datasets
import pytest
from helpers.loopback_hub import LoopbackHub
from huggingface_hub import constants
from huggingface_hub.errors import OfflineModeIsEnabled

from mpoe_convert.artifact.loading import load_config
from mpoe_convert.errors import CheckpointError, DataError, HubError
from mpoe_convert.source import hub, texts
from mpoe_convert.source.repository import check_model

NOBODY = "http://127.0.0.1:9"  # discard: nobody listens
NO_CONNECTION = r"no connection to the Hub for '{}' \(\[Errno 111\] .*\): check the network and HF_ENDPOINT"


@pytest.fixture
def online(monkeypatch):
    """Offline mode is off, the Hub is at an address, and nobody waits before he tries again."""

    def at(endpoint: str) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        for home in (constants, datasets.config):
            monkeypatch.setattr(home, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"waited for {seconds} s"))

    return at


@pytest.fixture
def cached(tmp_path, monkeypatch) -> str:
    """The id of a model that is in the cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    home = tmp_path / "models--o--cached"
    (home / "snapshots" / ("a" * 40)).mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("a" * 40)
    config = json.dumps({"model_type": "gpt2", "n_embd": 12, "n_head": 2})
    (home / "snapshots" / ("a" * 40) / "config.json").write_text(config)
    return "o/cached"


def test_a_model_that_nobody_can_be_asked_for_is_told_at_once(online):
    online(NOBODY)
    for ask in (load_config, check_model):
        with pytest.raises(HubError, match=NO_CONNECTION.format("o/absent")):
            ask("o/absent")
    assert constants.HF_HUB_OFFLINE is False and datasets.config.HF_HUB_OFFLINE is False


def test_data_that_nobody_can_be_asked_for_are_told_at_once(online, tmp_path, monkeypatch):
    online(NOBODY)
    monkeypatch.chdir(tmp_path)
    Path("topics.txt").touch()
    told = NO_CONNECTION.format("topics") + ".*; did you mean 'topics.txt'"
    with pytest.raises(DataError, match=rf"^'topics' is no file here; {told}"):
        texts.check_sources(["builtin", "topics.txt", "topics"])
    with pytest.raises(DataError, match="^'o/absent:part' is no file here; no connection to the Hub"):
        texts.read(["o/absent:part"], texts.Columns(), "causal")


def test_data_that_are_prepared_need_no_connection(online, tmp_path, monkeypatch):
    online(NOBODY)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "datasets" / "o___some_name").mkdir(parents=True)
    (tmp_path / "hub" / "datasets--o--other").mkdir(parents=True)
    texts.check_sources(["o/SomeName:part", "o/other"])
    with pytest.raises(DataError, match="^'o/some' is no file here; no connection"):
        texts.check_sources(["o/some"])


def test_what_is_in_the_cache_needs_no_connection(online, cached):
    online(NOBODY)
    check_model(cached)
    assert load_config(cached).n_embd == 12
    assert constants.HF_HUB_OFFLINE is False


def test_offline_mode_is_told_as_that(monkeypatch):
    assert constants.HF_HUB_OFFLINE
    for ask in (load_config, check_model, hub.check_dataset_available):
        with pytest.raises(HubError, match="'o/absent' is not complete in the local cache and offline mode"):
            ask("o/absent")
    with pytest.raises(CheckpointError, match=r"there is no folder './absent'"):
        check_model("./absent")


def test_a_hub_that_answers_is_asked(online, tmp_path):
    with LoopbackHub() as server:
        online(server.endpoint)
        assert hub.unreachable() is None
        check_model("o/absent")  # whether it is there is for the download to say
        with pytest.raises(ConnectionError, match="of another kind"), hub.asked_once("o/absent"):
            assert constants.HF_HUB_OFFLINE is False
            raise ConnectionError("of another kind")
        assert hub.variables_for("o/absent") == {}
    assert len(server.requests) == 1  # once is enough


def test_a_hub_that_is_slow_is_no_missing_one(online, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.1)
        online(f"http://127.0.0.1:{server.getsockname()[1]}")
        assert hub.unreachable() is None


def test_a_process_that_loads_a_model_goes_by_the_cache_too(online, tmp_path):
    online(NOBODY)
    assert hub.variables_for("o/absent") == {"HF_HUB_OFFLINE": "1"}
    assert hub.variables_for(str(tmp_path)) == {}


def test_other_errors_pass_and_offline_mode_ends_with_the_block(online):
    online(NOBODY)
    with pytest.raises(ZeroDivisionError), hub.asked_once("o/absent"):
        assert constants.HF_HUB_OFFLINE and datasets.config.HF_HUB_OFFLINE
        1 / 0  # noqa: B018
    with pytest.raises(HubError, match=NO_CONNECTION.format("o/absent")), hub.asked_once("o/absent"):
        raise ValueError from OfflineModeIsEnabled()
    assert constants.HF_HUB_OFFLINE is False and datasets.config.HF_HUB_OFFLINE is False
