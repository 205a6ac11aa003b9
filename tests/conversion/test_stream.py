"""Conversions whose source stays on the Hub: requests are counted; the artifact is that of a folder."""

import json
import re
import struct
from contextlib import contextmanager

import huggingface_hub
import pytest
import torch
from helpers.commands import driven, tree
from helpers.loopback_hub import LoopbackHub, environment
from helpers.ranks import run_all
from helpers.stock_mixtures import make_model as make_mixture
from helpers.tiny import make_model
from safetensors.torch import save_file

from mpoe_convert import Recipe, convert
from mpoe_convert.errors import HubError
from mpoe_convert.source import ranges
from mpoe_convert.source.safetensors_file import read_header

SMALL = ["--experts", "2", "--bond-dim", "4"]
HEADER = 100_001  # what huggingface_hub asks for to read a header
TOKEN = "hf_for_the_hub_alone"
SENT_ON = ["o/several", "--stream", "-q", "--max-shard-size", "1MB", *SMALL]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders: one file, several, and a pickle. Weights are many times as large as what headers take."""
    folder = tmp_path_factory.mktemp("models")
    model = make_model("gpt2", "AutoModelForCausalLM", seed=0)
    model.resize_token_embeddings(40_000)
    model.save_pretrained(folder / "one")
    model.save_pretrained(folder / "several", max_shard_size="1MB")
    (folder / "bin").mkdir()
    (folder / "bin/config.json").write_bytes((folder / "one/config.json").read_bytes())
    torch.save({"x": torch.ones(3)}, folder / "bin/pytorch_model.bin")
    for name in ("mixtral", "gpt_oss"):
        make_mixture(name).save_pretrained(folder / name)
    make_model("phi3", "AutoModelForCausalLM", seed=0).save_pretrained(folder / "phi3")
    return folder


@pytest.fixture(scope="module")
def session(models, tmp_path_factory):
    """(hub, ask, folder): the command in one process that can see the loopback Hub and nothing else."""
    folder = tmp_path_factory.mktemp("client")
    with LoopbackHub() as hub:
        for path in models.iterdir():
            hub.add(f"o/{path.name}", {each.name: each.read_bytes() for each in path.iterdir()})
        with driven(folder, client(folder, hub)) as (ask, _):
            yield hub, ask, folder


def client(folder, hub) -> dict[str, str]:
    return environment(folder / "home", hub.endpoint, HF_HUB_VERBOSITY="error", HF_TOKEN=TOKEN)


@pytest.fixture(scope="module")
def storage(session):
    """Another server, to which the Hub sends requests for weights on while the test runs."""
    with LoopbackHub() as other:
        other.repos = session[0].repos
        yield other


@pytest.fixture(scope="module")
def sent_on(session, storage):
    """(requests to the Hub, requests to the other server) of a run that writes "sent-on"."""
    hub, ask, _ = session
    hub.requests.clear()
    hub.storage = storage
    assert ask(*SENT_ON, "-o", "sent-on") == [0, "", ""]
    found = [*hub.requests], [*storage.requests]
    hub.storage = None
    return found


@pytest.fixture(scope="module")
def local(models, tmp_path_factory):
    """What a run that has the files writes, by the name of the model."""
    folder = tmp_path_factory.mktemp("local")
    for name in ("one", "several"):
        convert(Recipe(str(models / name), experts=2, bond_dim=4), folder / name)
    return folder


@pytest.fixture(autouse=True)
def as_before(session):
    yield
    session[0].faults.clear()
    session[0].storage = None


def weight_requests(hub) -> list:
    return hub.fetched(".safetensors")


def header_bytes(data: bytes) -> int:
    return 8 + struct.unpack("<Q", data[:8])[0]


@pytest.mark.parametrize("name", ["one", "several"])
def test_what_is_needed_is_requested_and_no_file_is_downloaded(name, session, models, local):
    hub, ask, folder = session
    hub.requests.clear()
    assert ask(f"o/{name}", "-o", f"out-{name}", "--stream", "-q", *SMALL) == [0, "", ""]
    files = {path.name: path.read_bytes() for path in (models / name).glob("*.safetensors")}
    needed = sum(len(data) - header_bytes(data) for data in files.values())
    requests = weight_requests(hub)
    assert {request.status for request in requests} == {206}
    assert needed <= sum(request.sent for request in requests) <= needed + len(files) * (HEADER + 16)
    assert needed > 10 * HEADER * len(files)
    assert not list((folder / "home").rglob("*.safetensors"))
    ours, expected = tree(folder / f"out-{name}"), tree(local / name)
    differ = {"README.md", "conversion_report.json", "mpoe_recipe.yaml"}  # they name the source
    assert ours.keys() == expected.keys()
    assert all(ours[file] == expected[file] for file in ours.keys() - differ)


def test_requests_that_are_sent_on_leave_the_token_behind(sent_on, models):
    """Large files of the Hub lie on servers of others, to which its token must not go."""
    at_hub, at_storage = sent_on
    weights = [request for request in at_hub if "-of-" in request.path]
    assert {(request.status, request.token) for request in weights} == {(302, TOKEN)}
    assert {(request.status, request.token) for request in at_storage} == {(206, "")}
    assert len(weights) == len(at_storage)
    assert_sent_once(at_storage, models, readers=1)


def assert_sent_once(requests, models, readers):
    """Every byte of the data; the headers to each of the readers."""
    files = [path.read_bytes() for path in (models / "several").glob("*.safetensors")]
    needed, sent = sum(len(data) - header_bytes(data) for data in files), sum(each.sent for each in requests)
    assert needed <= sent <= needed + readers * len(files) * (HEADER + 16)
    assert needed > 10 * HEADER * len(files)


def test_several_processes_share_what_is_requested(session, sent_on, storage, models):
    """They write what one writes, and each reads what it writes; requests are sent on here, too."""
    hub, _, folder = session
    hub.storage = storage
    storage.requests.clear()
    run = {"args": [*SENT_ON, "-o", "shared"], "count": 2}
    [done] = run_all([run], folder, client(folder, hub))
    assert (done["codes"], done["stderr"], len(done["made"])) == ([0, 0], "", 2)
    assert tree(folder / "shared") == tree(folder / "sent-on")
    assert len(list((folder / "shared").glob("*.safetensors"))) == 2
    assert {request.token for request in storage.requests} == {""}
    assert_sent_once(storage.requests, models, readers=2)


@pytest.mark.parametrize(
    ("name", "options"), [("mixtral", []), ("gpt_oss", ["--keep", "0.6", "--dry-run"]), ("phi3", SMALL)]
)
def test_a_tensor_that_holds_gate_and_up_is_requested_once(name, options, session, models):
    """Every byte of the data comes once: experts one by one, all of a layer in one tensor, dense."""
    hub, ask, folder = session
    hub.requests.clear()
    code, _, said = ask(f"o/{name}", "-o", f"halves-{name}", "--stream", "-q", *options)
    assert (code, said) == (0, "")
    data = (models / name / "model.safetensors").read_bytes()
    header, *others = [request.sent for request in weight_requests(hub)]
    assert header == len(data) < HEADER  # as the library asks for it
    expected = 0 if "--dry-run" in options else 16 + len(data) - header_bytes(data)
    assert sum(others) == expected


def test_a_plan_streams_too(session, models):
    """Its weights are read for the ranks: those of the FFNs come, and no file."""
    hub, ask, folder = session
    hub.requests.clear()
    code, out, err = ask("o/phi3", "--stream", "--dry-run", "--max-error", "0.9", "--experts", "2", "--json")
    assert code == 0 and json.loads(out)["budget"], err
    data = (models / "phi3/model.safetensors").read_bytes()
    start = header_bytes(data)
    infos = {k: v for k, v in json.loads(data[8:start]).items() if ".mlp." in k}
    ffns = sum(end - begin for begin, end in (info["data_offsets"] for info in infos.values()))
    _, *others = [request.sent for request in weight_requests(hub)]
    assert sum(others) == 16 + ffns
    assert not list((folder / "home").rglob("*.safetensors"))


def test_a_connection_that_drops_is_tried_again(session, local):
    hub, ask, folder = session
    hub.fault("GET", "/model.safetensors", lambda: None)  # the header, which the library asks for once
    for what in ("short", "cut", 503):
        hub.fault("GET", "/model.safetensors", what)
    assert ask("o/one", "-o", "dropped", "--stream", "-q", *SMALL)[0] == 0
    assert all(not fault.times for fault in hub.faults)
    assert (folder / "dropped/model.safetensors").read_bytes() == (
        local / "one/model.safetensors"
    ).read_bytes()


def test_a_branch_that_moves_meanwhile_changes_nothing(session, local):
    """The weights are read from the commit that the branch was at when the run began."""
    hub, ask, folder = session
    repo = hub.repos["o/one"]
    before = repo.commit("main")
    moved = dict(repo.revisions["main"])
    moved["model.safetensors"] = b"something else"
    repo.revisions["old"], repo.commits["old"] = repo.revisions["main"], before
    hub.fault("GET", "/model.safetensors", lambda: repo.write("main", moved))
    assert ask("o/one", "-o", "moved", "--stream", "-q", *SMALL) == [0, "", ""]
    assert repo.commit("main") != before
    assert (folder / "moved/model.safetensors").read_bytes() == (local / "one/model.safetensors").read_bytes()
    repo.write("main", repo.revisions["old"])


def broken(hub, models, what):
    """A repository that changes, is closed or disappears once its headers were read."""
    files = {path.name: path.read_bytes() for path in (models / "one").iterdir()}
    repo = hub.add("o/changing", files)

    def change():
        if what == "changed":
            other = files["model.safetensors"][:-4] + b"\0\0\0\0"
            repo.revisions["main"] = files | {"model.safetensors": other}
        elif what == "gated":
            repo.refuse = (403, "GatedRepo", "Access to model o/changing is restricted")
        elif what == "refused":
            repo.refuse = (401, None, "Invalid credentials in Authorization header")
        else:
            repo.commits["main"] = "0" * 40

    for what_now in (None, None, None, None, change):  # the header, the start of the data twice, a tensor
        hub.fault("GET", "/model.safetensors", what_now or (lambda: None))


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("changed", r"'model.safetensors' of 'o/changing' has changed while it was read \(\d+ bytes, ETag "),
        ("gated", "'o/changing' is gated: accept its conditions on its Hub page"),
        ("refused", "the Hub refused the token for 'o/changing': run `hf auth login`"),
        ("gone", "'o/changing' has no revision '"),
    ],
)
def test_a_repository_that_changes_meanwhile_is_refused(what, said, session, models):
    hub, ask, folder = session
    broken(hub, models, what)
    code, out, err = ask("o/changing", "-o", f"broken-{what}", "--stream", *SMALL)
    assert (code, out) == (1, "") and err.startswith("Error: ") and err.count("\n") == 1, err
    assert re.search(said, err), err
    assert not (folder / f"broken-{what}").exists()


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["o/bin"], 1, "'o/bin' has no safetensors files, whose tensors can be read one by one: leave out "),
        (["here"], 2, "--stream was given, but 'here' is a local folder: leave it out, or pass a Hub id"),
        (
            ["o/one", "--calibrate", "text.txt"],
            2,
            "--stream was given with a calibration, which runs the whole model; expected one of them",
        ),
        (
            ["o/one", "--calibrate", "text.txt", "--keep", "0.5", "--dry-run"],
            2,
            "--stream was given with a calibration, which runs the whole model; expected one of them",
        ),
        (["here", "--dry-run"], 2, "--stream was given, but 'here' is a local folder: leave it out, or pass"),
        (["o/absent"], 1, "'o/absent' is neither a folder here nor a repository on the Hub that you can see"),
    ],
)
def test_what_cannot_be_streamed_is_told(args, code, said, session, models):
    _, ask, folder = session
    (folder / "text.txt").write_text("some words\n" * 10)
    if not (folder / "here").exists():
        (folder / "here").symlink_to(models / "one")
    found, out, err = ask(*args, "-o", "never", "--stream", *SMALL)
    assert (found, out) == (code, "") and said in err, err
    assert not (folder / "never").exists()


def test_it_goes_on_after_an_interruption(session):
    """What the interrupted run has finished is not requested again."""
    hub, ask, folder = session
    sizes = ["--max-shard-size", "1MB", "--resume", "--stream"]
    hub.fault("GET", "/model.safetensors", lambda: None, 6)
    hub.fault("GET", "/model.safetensors", 404)
    assert ask("o/one", "-o", "resumed", *sizes, *SMALL)[0] == 1
    hub.requests.clear()
    assert ask("o/one", "-o", "resumed", *sizes, *SMALL, "-q")[0] == 0
    sent = sum(request.sent for request in weight_requests(hub))
    whole = len(hub.repos["o/one"].revisions["main"]["model.safetensors"])
    assert sent < whole


def test_a_server_that_sends_whole_files_is_told_before_a_body_is_read(monkeypatch):
    class Whole:
        status_code, headers = 200, {}

        def raise_for_status(self):
            pass

        def __getattr__(self, name):
            raise AssertionError(f"{name} was asked for")

    asked = []

    @contextmanager
    def answer(method, **request):
        asked.append(request["headers"])
        yield Whole()

    monkeypatch.setattr(huggingface_hub.utils, "http_stream_backoff", answer)
    monkeypatch.setattr(huggingface_hub.utils, "hf_raise_for_status", Whole.raise_for_status)
    remote = ranges.RemoteWeights("o/m", "commit", {"a": (0, 4)})
    info = ranges.TensorInfo("a", "float32", (1,), "x.safetensors")
    with pytest.raises(HubError, match=r"sends 'x\.safetensors' of 'o/m' as a whole only, expected a range"):
        remote.read(info, "a")
    assert [(each["Range"], each["Accept-Encoding"]) for each in asked] == [("bytes=0-7", "identity")]


def test_large_tensors_come_in_parts(monkeypatch, tmp_path):
    """Of any size, scalars and empty ones among them; every byte once."""
    tensors = {
        "a": torch.arange(1000.0),
        "b": torch.tensor(3.5),
        "c": torch.zeros(0, 4),
        "d": torch.ones(7) > 0,
    }
    save_file(tensors, tmp_path / "x.safetensors")
    data = (tmp_path / "x.safetensors").read_bytes()
    start = header_bytes(data)
    header = json.loads(data[8:start])
    remote = ranges.RemoteWeights("o/m", "commit", {name: header[name]["data_offsets"] for name in tensors})
    asked = []

    def answer(file, first, count):
        asked.append((first, count))
        return data[first : first + count]

    monkeypatch.setattr(ranges, "PART", 1000)
    monkeypatch.setattr(remote, "_range", answer)
    monkeypatch.setattr(remote, "_check_ranges", lambda file: None)
    infos = read_header(tmp_path / "x.safetensors", "x.safetensors")
    for name, tensor in tensors.items():
        found = remote.read(infos[name], name)
        assert found.dtype == tensor.dtype and torch.equal(found, tensor)
    assert asked[0] == (0, 8) and max(count for _, count in asked) == 1000
    assert sum(count for _, count in asked[1:]) == len(data) - start
