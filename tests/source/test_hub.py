"""The Hub for real: huggingface_hub in a subprocess against a loopback server that counts."""

import errno
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.loopback_hub import LoopbackHub, environment
from safetensors.torch import load_file, save

import mpoe_convert
from mpoe_convert.errors import CheckpointError, HubError
from mpoe_convert.source.hub_errors import explain

PACKAGE = str(Path(mpoe_convert.__file__).parents[1])  # whichever copy is under test
CONFIG = json.dumps({"model_type": "gpt2"}).encode()
FIRST = {f"h.{i}.mlp.weight": torch.full((300, 500), float(i)) for i in range(2)}
SECOND = {f"h.{i}.mlp.weight": torch.full((300, 500), float(i)) for i in range(2, 4)}
WEIGHTS = save({**FIRST, **SECOND}, metadata={"format": "pt"})  # 2.4 MB
SHARDS = {"model-00001-of-00002.safetensors": FIRST, "model-00002-of-00002.safetensors": SECOND}
INDEX = json.dumps(
    {"metadata": {}, "weight_map": {name: file for file in SHARDS for name in SHARDS[file]}}
).encode()
NEVER = {
    "modeling.py": b"raise SystemExit",
    "tf_model.h5": b"h5",
    "flax_model.msgpack": b"flax",
    "model.gguf": b"gguf",
    "onnx/model.onnx": b"onnx",
    "onnx/config.json": b"{}",
    "onnx/chat.jinja": b"elsewhere",
    "additional_chat_templates/rag.py": b"raise SystemExit",
    "original/model.safetensors": b"other",
    "consolidated.safetensors": b"twice the size",
    "model.fp16.safetensors": b"variant",
    "optimizer.pt": b"state",
    "training_args.bin": b"pickle",
    "2_Dense/pytorch_model.bin": b"pickle",
    "3_Other/config.json": b"{}",
    ".gitattributes": b"lfs",
}
CARD = {"README.md": b"its front matter names the licence"}
NAMED = "additional_chat_templates/rag.jinja"
MODULES = [{"type": "a.B", "path": path} for path in ("", "1_Pooling", "2_Dense")]
BESIDE = {
    **{"tokenizer.json": b"{}", "merges.txt": b"a b", "LICENSE": b"MIT", NAMED: b"{{ rag }}"},
    **{"modules.json": json.dumps(MODULES).encode(), "sentence_bert_config.json": b"{}"},
    **{"1_Pooling/config.json": b"{}", "2_Dense/config.json": b"{}", "2_Dense/model.safetensors": WEIGHTS},
}
REFUSED = {
    "o/gated": (403, "GatedRepo", "Access to model o/gated is restricted"),
    "o/gated-files": (403, "GatedRepo", "Access to model o/gated-files is restricted"),
    "o/private": (401, "RepoNotFound", "Repository not found"),
    "o/bad-token": (401, None, "Invalid credentials in Authorization header"),
    "o/forbidden": (403, None, "Forbidden"),
    "o/busy": (429, None, "Too many requests"),
    "o/broken": (503, None, "Down"),
}

CLIENT = """
import json, sys
from mpoe_convert.source.checkpoint import open_checkpoint
from mpoe_convert.errors import MpoeError
outcomes = []
for request in json.loads(sys.argv[1]):
    want = request.pop("read", False)
    try:
        got = open_checkpoint(**request)
    except MpoeError as exc:
        outcomes.append({"kind": type(exc).__name__, "message": str(exc)})
        continue
    try:  # reading imports torch, which takes longer than all the rest
        read = tuple(got.read(next(iter(got.tensors))).shape) if want else None
    except MpoeError as exc:
        read = str(exc)
    outcomes.append({
        "folder": str(got.folder), "revision": got.revision, "source": got.source, "read": read,
        "tensors": {t.name: [t.dtype, t.shape, t.file] for t in got.tensors.values()},
        "companions": [str(path.relative_to(got.folder)) for path in got.companion_files()],
    })
print(json.dumps(outcomes))
"""


def torch_bytes(state: dict, path: Path) -> bytes:
    torch.save(state, path)
    return path.read_bytes()


@pytest.fixture
def hub():
    with LoopbackHub() as server:
        yield server


@pytest.fixture
def ask(hub, tmp_path):
    """Open checkpoints in one fresh process that can see `hub` only; one outcome per request."""

    def run(*requests: dict, endpoint: str = hub.endpoint, **variables: str) -> list[dict]:
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", CLIENT, json.dumps(requests)],
            env=environment(tmp_path / "home", endpoint, PYTHONPATH=PACKAGE, **variables),
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def local_files(outcome: dict) -> list[str]:
    folder = Path(outcome["folder"])
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_download_takes_the_weights_and_their_companions_and_nothing_else(hub, ask):
    files = {"config.json": CONFIG, "model.safetensors": WEIGHTS, **BESIDE}
    repo = hub.add("o/m", {**files, **CARD, **NEVER, "pytorch_model.bin": b"not read"})
    (got,) = ask({"model": "o/m", "read": True})
    assert local_files(got) == sorted(files | CARD)
    assert (got["source"], got["revision"]) == ("o/m", repo.commit("main"))
    assert got["companions"] == sorted(BESIDE)
    assert got["read"] == [300, 500]
    torch.testing.assert_close(load_file(Path(got["folder"]) / "model.safetensors"), {**FIRST, **SECOND})


def test_all_of_an_artifact_but_its_weights(hub, tmp_path):
    files = {
        "config.json": CONFIG,
        "conversion_report.json": b"{}",
        "modeling_mpoe.py": b"",
        **BESIDE,
        **CARD,
    }
    hub.add("o/m", {**files, "model.safetensors": WEIGHTS, "3_Other/config.json": b"{}", "notes.bin": b""})
    code = "from mpoe_convert.source.hub import *; print(download_except_weights('o/m'))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=environment(tmp_path / "home", hub.endpoint, PYTHONPATH=PACKAGE),
        capture_output=True,
        text=True,
        check=True,
    )
    assert local_files({"folder": done.stdout.strip()}) == sorted(files)


def test_shards_are_those_of_the_index(hub, ask):
    shards = {file: save(part) for file, part in SHARDS.items()}
    files = {"config.json": CONFIG, "model.safetensors.index.json": INDEX, **shards}
    hub.add("o/m", {**files, **NEVER, "model-00003-of-00003.safetensors": b"stray"})
    headers, whole = ask({"model": "o/m", "headers_only": True}, {"model": "o/m"})
    assert local_files(whole) == sorted(files)
    assert headers["tensors"] == whole["tensors"]
    assert headers["tensors"]["h.3.mlp.weight"] == [
        "float32", [300, 500], "model-00002-of-00002.safetensors",
    ]  # fmt: skip


def test_bin_is_taken_only_where_there_is_no_safetensors(hub, ask, tmp_path):
    weights = torch_bytes({"w": torch.ones(3)}, tmp_path / "w.bin")
    hub.add("only-bin", {"config.json": CONFIG, "pytorch_model.bin": weights, **NEVER})
    index = json.dumps({"metadata": {}, "weight_map": {"w": "pytorch_model-1.bin"}}).encode()
    sharded = {"pytorch_model.bin.index.json": index, "pytorch_model-1.bin": weights}
    hub.add("o/shards", {"config.json": CONFIG, **sharded})
    # Headers of .bin files need the file: the fallback downloads it rather than refuse to plan.
    one, two = ask(
        {"model": "only-bin", "headers_only": True, "read": True},
        {"model": "o/shards", "read": True},
    )
    assert local_files(one) == ["config.json", "pytorch_model.bin"]
    assert one["tensors"] == {"w": ["float32", [3], "pytorch_model.bin"]}
    assert two["tensors"] == {"w": ["float32", [3], "pytorch_model-1.bin"]}
    assert one["read"] == two["read"] == [3]


def test_revisions_by_branch_and_by_commit(hub, ask):
    older = {"config.json": CONFIG, "model.safetensors": save({"old": torch.ones(1)})}
    newer = {"config.json": CONFIG, "model.safetensors": save({"new": torch.ones(1)})}
    repo = hub.add("o/m", newer, revisions={"v1": older})
    main, branch, commit = ask(
        {"model": "o/m"},
        {"model": "o/m", "revision": "v1"},
        {"model": "o/m", "revision": repo.commit("v1")},
    )
    assert list(main["tensors"]) == ["new"]
    assert list(branch["tensors"]) == list(commit["tensors"]) == ["old"]
    assert branch["revision"] == commit["revision"] == repo.commit("v1") != main["revision"]


def test_headers_only_leaves_the_weights_where_they_are(hub, ask):
    hub.add("o/m", {"config.json": CONFIG, "model.safetensors": WEIGHTS})
    (got,) = ask({"model": "o/m", "headers_only": True, "read": True})
    # The client asks for the first 100 kB of a file, whatever the header's length.
    assert hub.bytes_sent() < 110_000 < len(WEIGHTS) / 20
    assert local_files(got) == ["config.json"]
    assert got["tensors"]["h.0.mlp.weight"] == ["float32", [300, 500], "model.safetensors"]
    assert "only the headers of 'o/m' were fetched" in got["read"]
    (whole,) = ask({"model": "o/m"})
    assert whole["tensors"] == got["tensors"]
    assert hub.bytes_sent() > len(WEIGHTS)


def test_what_is_cached_needs_no_network(hub, ask):
    hub.add("o/m", {"config.json": CONFIG, "model.safetensors": WEIGHTS})
    hub.add("o/half", {"config.json": CONFIG, "model.safetensors": WEIGHTS})
    ask({"model": "o/m"}, {"model": "o/half", "headers_only": True})
    before = len(hub.requests)
    whole, headers, half, absent = ask(
        {"model": "o/m"},
        {"model": "o/m", "headers_only": True},
        {"model": "o/half"},
        {"model": "o/absent"},
        HF_HUB_OFFLINE="1",
    )
    assert len(hub.requests) == before
    assert whole["tensors"] == headers["tensors"]
    for outcome in (half, absent):
        assert outcome["kind"] == "HubError"
        assert "is not complete in the local cache and offline mode is on: unset" in outcome["message"]


def test_a_cache_with_a_config_alone_is_not_a_model_without_weights(ask, tmp_path):
    """As another program leaves it: no listing says what else there is."""
    commit, cache = "a" * 40, tmp_path / "home" / "hub" / "models--o--m"
    snapshot = cache / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    (snapshot / "config.json").write_bytes(CONFIG)
    for outcome in ask({"model": "o/m"}, {"model": "o/m", "headers_only": True}, HF_HUB_OFFLINE="1"):
        assert outcome["kind"] == "HubError"
        assert "is not complete in the local cache and offline mode is on: unset" in outcome["message"]


NAMED_WEIGHTS = json.dumps({"model_type": "gpt2", "transformers_weights": "b.safetensors"}).encode()


def test_the_weights_that_the_config_names_are_fetched_and_no_others(hub, ask):
    other = save({"other": torch.ones(3)})
    shards = {"b-1.safetensors": save(FIRST), "b-2.safetensors": save(SECOND)}
    index = json.dumps(
        {"weight_map": {n: f for f, part in zip(shards, (FIRST, SECOND), strict=True) for n in part}}
    ).encode()
    hub.add("o/one", {"config.json": NAMED_WEIGHTS, "model.safetensors": other, "b.safetensors": WEIGHTS})
    named = NAMED_WEIGHTS.replace(b"b.safetensors", b"b.safetensors.index.json")
    beside = {"b.safetensors.index.json": index, "model.safetensors": other}
    hub.add("o/shards", {"config.json": named, **beside, **shards})
    names = ["o/one", "o/shards"]
    headers = ask(*({"model": name, "headers_only": True} for name in names))
    assert [local_files(got) for got in headers] == [
        ["config.json"],
        ["b.safetensors.index.json", "config.json"],
    ]
    whole = ask(*({"model": name, "read": True} for name in names))
    for got, planned in zip(whole, headers, strict=True):
        assert got["tensors"] == planned["tensors"] and list(got["tensors"]) == [*FIRST, *SECOND]
        assert got["read"] == [300, 500] and "model.safetensors" not in local_files(got)


def test_a_refused_model_costs_no_weights(hub, ask):
    moe = json.dumps({"model_type": "switch_transformers", "num_experts": 8}).encode()
    hub.add("o/moe", {"config.json": moe, "model.safetensors": WEIGHTS})
    hub.add("o/adapter", {"adapter_config.json": b"{}", "adapter_model.safetensors": WEIGHTS})
    hub.add("o/gguf", {"config.json": CONFIG, "model.Q4.gguf": WEIGHTS})
    hub.add("o/parts", {"modules.json": b"[]", "0_Model/config.json": CONFIG})
    names = ["o/moe", "o/adapter", "o/gguf", "o/parts"]
    got = ask(*({"model": name} for name in names), {"model": "o/gguf", "headers_only": True})
    assert {outcome["kind"] for outcome in got[1:]} == {CheckpointError.__name__}
    messages = [outcome["message"] for outcome in got]
    assert "a mixture of type switch_transformers cannot be converted" in messages[0]
    assert "'o/adapter' is a PEFT adapter" in messages[1]
    assert "found only 'model.Q4.gguf' (GGUF)" in messages[2] == messages[4]
    assert "in its subfolder '0_Model': download the repository and pass that folder" in messages[3]
    assert hub.bytes_sent() < 10_000


def test_a_token_opens_a_private_repository(hub, ask):
    files = {"config.json": CONFIG, "model.safetensors": WEIGHTS}
    hub.add("o/private", files, refuse=REFUSED["o/private"], token="right")
    wrong, right, headers = ask(
        {"model": "o/private", "token": "wrong"},
        {"model": "o/private", "token": "right"},
        {"model": "o/private", "token": "right", "headers_only": True},
    )
    assert "if it is private, run `hf auth login` or pass token" in wrong["message"]
    assert right["tensors"] == headers["tensors"]


def test_a_hostile_remote_header_is_refused(hub, ask):
    def entry(shape: list, dtype: str = "F32") -> bytes:
        return json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, 4]}}).encode()

    cases = {
        "o/text": (entry(["x"]), "header is not valid (TypeError"),
        "o/negative": (entry([-2]), "tensor 'a' has the shape [-2]): the upload is damaged"),
        "o/dtype": (entry([8], "F4"), "tensor 'a' has the dtype 'F4', expected one that torch can"),
        "o/list": (b'{"a": [1]}', "header is not valid (TypeError"),
        "o/json": (b"{{{{", "header is not valid (Failed to parse safetensors header"),
    }
    for name, (raw, _) in cases.items():
        data = struct.pack("<Q", len(raw)) + raw + bytes(4)
        hub.add(name, {"config.json": CONFIG, "model.safetensors": data})
    got = ask(*({"model": name, "headers_only": True} for name in cases))
    for outcome, (_, expected) in zip(got, cases.values(), strict=True):
        assert expected in outcome["message"]
        assert "\n" not in outcome["message"]


def test_what_fails_once_on_the_way_is_fetched_again(hub, ask):
    hub.add("o/m", {"config.json": CONFIG, "model.safetensors": WEIGHTS})
    hub.fault("GET", "model.safetensors", "short")
    (got,) = ask({"model": "o/m"})
    assert (Path(got["folder"]) / "model.safetensors").read_bytes() == WEIGHTS
    assert len(hub.fetched("model.safetensors")) == 2


def test_what_went_wrong_is_told_and_not_kept(hub, ask):
    hub.add("o/m", {"config.json": CONFIG, "model.safetensors": WEIGHTS})
    hub.fault("GET", "/revision/main", "cut")
    hub.fault("GET", "config.json", 500)
    hub.fault("GET", "model.safetensors", "half")
    cut, broken, half, whole = ask(*[{"model": "o/m"}] * 4)
    assert cut["kind"] == broken["kind"] == half["kind"] == "HubError"
    assert broken["message"].startswith("the Hub failed with HTTP 500 for 'o/m': try again later")
    assert cut["message"].startswith("no connection to the Hub for 'o/m' (")
    assert half["message"].startswith("downloading 'o/m' at revision") and "size" in half["message"]
    assert (Path(whole["folder"]) / "model.safetensors").read_bytes() == WEIGHTS


FAILURES = {
    ("o/absent", None): "check the spelling (a relative path counts from the current folder)",
    ("o/m", "v9"): "'o/m' has no revision 'v9': expected a branch, a tag or a full commit hash",
    ("o/m", "a" * 40): f"'o/m' has no revision '{'a' * 40}'",
    ("a/b/c", None): "check the path (a relative path counts from the current folder) or the id",
    ("no spaces", None): "'no spaces' is neither a folder here nor a Hub id",
    ("o/gated", None): "'o/gated' is gated: accept its conditions on its Hub page, then run `hf",
    ("o/gated-files", None): "is gated: accept its conditions on its Hub page",
    ("o/private", None): "current folder); if it is private, run `hf auth login` or pass",
    ("o/bad-token", None): "the Hub refused the token for 'o/bad-token': run `hf auth login`",
    ("o/forbidden", None): "the Hub refused access to 'o/forbidden' (HTTP 403): run `hf auth",
    ("o/busy", None): "the Hub's rate limit is reached (HTTP 429) for 'o/busy': log in, or wait",
    ("o/broken", None): "the Hub failed with HTTP 503 for 'o/broken': try again later",
}


def test_every_refusal_is_one_line_that_says_what_to_do(hub, ask):
    files = {"config.json": CONFIG, "model.safetensors": WEIGHTS}
    hub.add("o/m", files)
    for name, refuse in REFUSED.items():
        hub.add(name, files, refuse=refuse, listed=name == "o/gated-files")
    got = ask(*({"model": model, "revision": revision} for model, revision in FAILURES))
    for outcome, expected in zip(got, FAILURES.values(), strict=True):
        assert outcome["kind"] == HubError.__name__
        assert expected in outcome["message"]
        assert "\n" not in outcome["message"]


def test_no_server_is_no_connection(ask):
    (got,) = ask({"model": "o/m"}, endpoint="http://127.0.0.1:9")  # discard: nobody listens
    assert "no connection to the Hub for 'o/m' ([Errno 111]" in got["message"]
    assert "check the network and HF_ENDPOINT, or pass a local folder" in got["message"]
    assert got["message"].endswith("folder (a relative path counts from the current folder)")


def test_a_full_disk_is_told_wherever_it_is_noticed():
    xet = RuntimeError("Data processing error: I/O error: No space left on device (os error 28)")
    for exc in (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), xet):
        message = str(explain(exc, "o/m"))
        assert message.startswith("the disk filled up while downloading 'o/m': free some space")


def test_anything_else_keeps_its_name_and_becomes_one_line():
    message = str(explain(KeyError("a\nb"), "o/m", "v1"))
    assert message == "downloading 'o/m' at revision 'v1' failed: KeyError: 'a\\nb'"
    assert str(explain(ValueError("x\n\n  y " + "z" * 500))).endswith("z...")
    assert "\n" not in str(explain(ValueError("x\n\n  y")))
    known = HubError("already told")
    assert explain(known) is known
