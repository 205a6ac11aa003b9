"""Pushing, and what needs a token: the command for real in a process that sees the loopback Hub only."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers.commands import driven, tree
from helpers.data import words
from helpers.loopback_hub import LoopbackHub, User, environment
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mpoe_convert import Export, evaluate, export
from mpoe_convert.artifact.layout import file_names, is_artifact, own_files, register_files
from mpoe_convert.cli.push import resumable_push
from mpoe_convert.errors import CheckpointError
from mpoe_convert.source.hub_errors import explain_writing
from mpoe_convert.source.json_files import write_json

ME = {"hf_me": User("me", orgs=("lab",)), "hf_reader": User("me", role="read"), "hf_other": User("other")}
# What names the repository on the Hub, or no folders of this machine.
REWRITTEN = {"README.md", "conversion_report.json", "mpoe_recipe.yaml"}
OTHER_MODEL = {"config.json": b'{"model_type": "gpt2"}', "model.gguf": b"gguf", "README.md": b"# Other"}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(hub, ask): the command in one process, shared, since it takes seconds to start."""
    folder = tmp_path_factory.mktemp("client")
    with LoopbackHub() as hub:
        variables = environment(folder / "home", hub.endpoint, HF_HUB_OFFLINE="0")
        with driven(folder, variables, stderr=subprocess.DEVNULL) as (ask, _):
            yield hub, ask


@pytest.fixture
def hub(server):
    """The Hub as new, with an account "me"."""
    hub, _ = server
    hub.repos, hub.objects, hub.users, hub.faults = {}, {}, dict(ME), []
    hub.requests.clear()
    return hub


@pytest.fixture
def ask(server):
    """Run the command: [exit code, stdout, stderr]."""
    return server[1]


@pytest.fixture
def push(ask):
    """Push as "me": the document that is printed."""

    def run(folder: Path, repo_id: str, *options: str) -> dict:
        code, out, err = ask("push", folder, repo_id, "--token", "hf_me", "--json", *options)
        assert (code, err) == (0, ""), err
        return json.loads(out)

    return run


@pytest.fixture
def refused(ask):
    """The line on stderr of a command that fails and prints nothing."""

    def run(*args: object) -> str:
        code, out, err = ask(*args)
        assert (code, out) == (1, ""), (code, out, err)
        assert re.fullmatch(r"Error: [^\n]+\n", err), err
        return err

    return run


@pytest.fixture
def out(artifact, tmp_path) -> Path:
    """An artifact in four shards, to be changed."""
    _, made = artifact("gpt2", max_shard_size="10KB")
    return Path(shutil.copytree(made, tmp_path / "out"))


def contents(folder: Path, names) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names}


def add_strays(folder: Path) -> None:
    for name in ("checkpoint-5/optimizer.pt", "checkpoint-5/model.safetensors", "runs/events", ".git/config"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("not the artifact's")
    for name in ("optimizer.pt", "model-of-last-week.safetensors", "notes.txt", "tokenizer_old.json", ".env"):
        (folder / name).write_text("mine")


def puts(hub) -> list[str]:
    return [request.path for request in hub.requests if request.method == "PUT"]


# ------------------------------------------------------------------------------------- what goes there


def test_only_the_artifacts_own_files_go(hub, push, out):
    files = contents(out, file_names(out))
    add_strays(out)
    before = tree(out)
    done = push(out, "me/moe", "--private", "--commit-message", "The first")
    assert tree(out) == before
    repo = hub.repos["me/moe"]
    found = dict(repo.revisions["main"])
    card = found.pop("README.md").decode()
    unchanged = files.keys() - REWRITTEN
    assert {name: found[name] for name in unchanged} == {name: files[name] for name in unchanged}
    assert found.keys() == {*files, ".gitattributes"} - {"README.md"}
    assert len([name for name in files if name.endswith(".safetensors")]) > 2
    assert repo.private
    assert repo.messages[repo.commit("main")] == "The first"
    assert done["url"] == f"{hub.endpoint}/me/moe/commit/{repo.commit('main')}"
    assert done["commit"] == repo.commit("main")
    assert (done["files"], done["deleted"], done["changed"]) == (sorted(files), [], True)
    strays = (
        "checkpoint-5 runs .git optimizer.pt model-of-last-week.safetensors notes.txt tokenizer_old.json .env"
    )
    assert done["left_out"] == sorted(strays.split())
    assert done["num_bytes"] == sum(map(len, files.values()))
    local = files["README.md"].decode()
    assert local.replace("path/to/this", "me/moe") == card != local


def test_folders_of_this_machine_stay_here(hub, push, out):
    """Where the dense model lies, and what it was calibrated on; names of the Hub go along."""
    report, recipe = out / "conversion_report.json", out / "mpoe_recipe.yaml"
    base = json.loads(report.read_text(encoding="utf-8"))["base_model"]
    assert Path(base).is_absolute() and base in recipe.read_text(encoding="utf-8")
    training = {
        "data": [f"{base}/../my data/a.txt", "org/data", "clients/acme/b.txt", "../acme/notes"],
        "run": {"teacher": base, "model": "a-folder/moe", "tokenizer": "acme/small/tokenizer"},
        "log": [1.5],
    }
    write_json(out / "training_report.json", training)
    register_files(out, ["training_report.json"])
    push(out, "me/moe")
    found = hub.repos["me/moe"].revisions["main"]
    assert not [name for name, data in found.items() if str(Path(base).parent).encode() in data]
    there = json.loads(found["conversion_report.json"])
    local = json.loads(report.read_text(encoding="utf-8"))
    assert (there["base_model"], there["recipe"]["model"]) == (Path(base).name,) * 2
    assert there["base_path"] is None and local["base_path"] is not None
    same = local.keys() - {"base_model", "base_path", "recipe"}
    assert {key: there[key] for key in same} == {key: local[key] for key in same}
    assert json.loads(found["training_report.json"]) == {
        "data": ["a.txt", "org/data", "b.txt", "notes"],
        "run": {"teacher": Path(base).name, "model": "moe", "tokenizer": "tokenizer"},
        "log": [1.5],
    }
    first, *_ = recipe.read_text(encoding="utf-8").splitlines()
    assert found["mpoe_recipe.yaml"].decode().splitlines()[0] == first
    expected = yaml.safe_load(recipe.read_text(encoding="utf-8")) | {"model": Path(base).name}
    assert yaml.safe_load(found["mpoe_recipe.yaml"]) == expected


def test_pushed_again_nothing_is_sent(hub, push, ask, out):
    first = push(out, "me/moe")
    sent = puts(hub)
    again = push(out, "me/moe")
    assert puts(hub) == sent and len(sent) == len(set(sent)) == len(list(out.glob("*.safetensors")))
    assert (again["changed"], again["commit"]) == (False, first["commit"])
    code, printed, _ = ask("push", out, "me/moe", "--token", "hf_me")
    assert code == 0 and "holds exactly this already" in printed and first["url"] in printed


def test_what_an_earlier_artifact_left_goes_and_what_is_somebody_elses_stays(hub, push, out, artifact):
    (out / "pictures").mkdir()
    (out / "pictures/error.png").write_bytes(b"picture")
    report = json.loads((out / "conversion_report.json").read_text())
    report["files"].append("pictures/error.png")
    (out / "conversion_report.json").write_text(json.dumps(report))
    push(out, "me/moe")
    main = hub.repos["me/moe"].revisions["main"]
    theirs = {"moe.gguf": b"gguf", "onnx/model.onnx": b"onnx", "NOTES.md": b"notes"}
    assert "pictures/error.png" in main
    hub.repos["me/moe"].write("main", main | theirs)
    _, whole = artifact("gpt2")
    done = push(whole, "me/moe")
    gone = {
        "pictures/error.png",
        "model.safetensors.index.json",
        *(path.name for path in out.glob("model-*")),
    }
    assert set(done["deleted"]) == gone and len(gone) > 4
    left = set(hub.repos["me/moe"].revisions["main"])
    assert left == {*file_names(whole), *theirs, ".gitattributes"}


def test_shards_of_a_model_that_was_pushed_without_its_report_go_too(hub, push, out, artifact):
    names = [name for name in file_names(out) if name != "conversion_report.json"]
    hub.add("me/moe", contents(out, names) | {"notes.txt": b"mine"})
    _, whole = artifact("gpt2")
    done = push(whole, "me/moe")
    assert {name for name in done["deleted"] if name.endswith(".safetensors")}
    assert set(hub.repos["me/moe"].revisions["main"]) == {*file_names(whole), "notes.txt"}


def test_weights_that_were_written_anew_are_those_that_go(out, artifact):
    """As `model.save_pretrained(out)` leaves them: in one file, beside a note and an old index."""
    listed = set(file_names(out))
    _, whole = artifact("gpt2")
    shutil.copyfile(whole / "model.safetensors", out / "model.safetensors")
    add_strays(out)
    index = "model.safetensors.index.json"
    shards = {path.name for path in out.glob("model-0*.safetensors")}
    assert set(own_files(out)) == listed - shards - {index} | {"model.safetensors"}


def test_a_report_and_an_index_there_that_are_damaged_delete_nothing(hub, push, out):
    config = (out / "config.json").read_bytes()
    damaged = {
        "conversion_report.json": b'{"files": 3}',
        "model.safetensors.index.json": b'{"weight_map": [1]}',
    }
    hub.add("me/moe", {"config.json": config, "theirs": b"theirs", **damaged})
    assert push(out, "me/moe")["deleted"] == []
    hub.add("me/moe", {"config.json": b"{{", "theirs": b"theirs"})
    push(out, "me/moe", "--overwrite")


def test_a_branch_is_made_and_the_main_one_is_left(hub, push, refused, out):
    push(out, "lab/moe")
    before = hub.repos["lab/moe"].commit("main")
    (out / "mpoe_recipe.yaml").write_text("# changed\n")
    push(out, "lab/moe", "--branch", "trial")
    push(out, "lab/moe", "--branch", "trial")
    repo = hub.repos["lab/moe"]
    assert repo.commit("main") == before
    assert repo.revisions["trial"]["mpoe_recipe.yaml"] == b"# changed\n"
    hub.add("me/gpt", OTHER_MODEL)
    said = refused("push", out, "me/gpt", "--token", "hf_me", "--branch", "trial")
    assert "holds something else" in said and "trial" not in hub.repos["me/gpt"].revisions
    push(out, "me/new", "--branch", "trial")
    assert set(hub.repos["me/new"].revisions["main"]) == {".gitattributes"}
    assert set(hub.repos["me/new"].revisions["trial"]) == {*file_names(out), ".gitattributes"}


def test_a_pull_request_changes_nothing_there(hub, push, ask, out):
    hub.add("other/model", OTHER_MODEL)
    before = hub.repos["other/model"].commit("main")
    code, printed, err = ask("push", out, "other/model", "--token", "hf_me", "--create-pr")
    assert (code, err) == (0, "")
    assert printed.splitlines()[-1] == f"{hub.endpoint}/other/model/discussions/1"
    repo = hub.repos["other/model"]
    assert repo.commit("main") == before
    assert set(repo.revisions["refs/pr/1"]) == {*file_names(out), *OTHER_MODEL}
    done = push(out, "other/model", "--create-pr", "--json")
    assert done["pull_request"].endswith("/discussions/2")


# ------------------------------------------------------------------------------------ what is refused


def test_something_else_is_only_committed_over_when_asked(hub, push, refused, out, artifact):
    hub.add("me/gpt", OTHER_MODEL)
    before = dict(hub.repos["me/gpt"].revisions["main"])
    said = refused("push", out, "me/gpt", "--token", "hf_me")
    assert "'me/gpt' holds something else ('config.json', 'model.gguf'): choose another name, or pass" in said
    assert hub.repos["me/gpt"].revisions["main"] == before and not puts(hub)
    push(out, "me/gpt", "--overwrite")
    found = hub.repos["me/gpt"].revisions["main"]
    assert set(found) == {*file_names(out), "model.gguf"} and found["model.gguf"] == b"gguf"

    for name in ("model.safetensors", "adapter_config.json"):
        hub.add("me/hides", {"config.json": b"{}", name: b"other"})
        said = refused("push", out, "me/hides", "--token", "hf_me", "--overwrite")
        assert f"'me/hides' holds {name}, which transformers would load instead" in said
    hub.add("me/gpt", {"config.json": b"{}", "model.safetensors": b"other"})
    _, whole = artifact("gpt2")
    push(whole, "me/gpt", "--overwrite")  # replaced, so nothing is hidden
    hub.add("me/empty", {"README.md": b"# To come", ".gitattributes": b""})
    push(out, "me/empty")


REFUSALS = {
    "wrong token": (
        ["me/moe", "--token", "hf_wrong"],
        "the Hub refused the token for 'me/moe': run `hf auth",
    ),
    "no token": (["me/moe"], "nobody is logged in to write to 'me/moe': run `hf auth login`, set HF_TOKEN"),
    "may only read": (["me/moe", "--token", "hf_reader"], "the token of me may only read"),
    "wrong owner": (["you/moe", "--token", "hf_me"], "me cannot make it: expected an owner out of me, lab"),
    "somebody else's": (
        ["other/there", "--token", "hf_me"],
        "does not let this token write to 'other/there'",
    ),
    "is public": (["me/there", "--token", "hf_me", "--private"], "'me/there' is there already and public"),
    "hidden": (["other/hidden", "--token", "hf_me"], "'other/hidden' is not there and me cannot make it"),
    "no place for a pull request": (
        ["me/moe", "--token", "hf_me", "--create-pr"],
        "there is no repository 'me/moe' to propose anything to: leave out --create-pr",
    ),
    "no such pull request": (
        ["me/there", "--token", "hf_me", "--branch", "refs/pr/7"],
        "'me/there' has no such branch",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_push_that_would_fail_is_refused_before_the_conversion(name, hub, refused, artifact, tmp_path):
    """Both by `push` and by a conversion, which has not begun then."""
    dense, out = artifact("gpt2")
    hub.add("me/there", {})
    hub.add("other/there", {})
    hub.add("other/hidden", {}, private=True)
    hub.add("me/source", contents(dense, file_names(dense)))
    before = {repo_id: dict(repo.revisions) for repo_id, repo in hub.repos.items()}
    args, said = REFUSALS[name]
    assert said in refused("push", out, *args)
    convert = ["me/source", "-o", tmp_path / "new", "--push-to-hub", *args]
    assert said in refused(*convert)
    assert said in refused(*convert, "--dry-run")
    assert {repo_id: dict(repo.revisions) for repo_id, repo in hub.repos.items()} == before
    assert not hub.fetched("model.safetensors") and not (tmp_path / "new").exists()


BAD_REQUESTS = {
    "no owner": (["moe"], "'moe' names no owner: expected USER/NAME"),
    "bad name": (["me/a b"], "'me/a b' cannot be a repository; expected USER/NAME of letters"),
    "two slashes": (["a/b/c"], "'a/b/c' cannot be a repository"),
    "pull request against a branch": (
        ["me/there", "--create-pr", "--branch", "b"],
        "a pull request is opened against the main branch: leave out --branch or --create-pr",
    ),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_a_bad_request_is_told_as_one_before_the_hub_is_asked(name, hub, ask, artifact, tmp_path):
    """Exit code 2, as of every command."""
    dense, out = artifact("gpt2")
    args, said = BAD_REQUESTS[name]
    for command in (["push", out], [dense, "-o", tmp_path / "new", "--push-to-hub"]):
        code, printed, err = ask(*command, *args, "--token", "hf_me")
        assert (code, printed) == (2, "") and said in err and err.count("\n") == 1, err
    assert not hub.requests and not (tmp_path / "new").exists()


FAULTS = {
    403: "does not let this token write to 'me/moe' (HTTP 403: This is a fault): use one with",
    404: "there is no repository 'me/moe' that this token may see: check the name, and the account by",
    409: "'me/moe' was changed meanwhile (HTTP 409: This is a fault): look at it, then run again",
    413: "refused a file for 'me/moe' as too large (HTTP 413): convert again with a smaller --max-shard-size",
    429: "rate limit is reached (HTTP 429) for 'me/moe': wait some minutes and run again; weight files that",
    503: "the Hub failed with HTTP 503 for 'me/moe': run again later; weight files that have arrived are",
    418: "the Hub answered HTTP 418 for 'me/moe': This is a fault",
    "cut": "the connection to the Hub failed for 'me/moe' (",
}


def test_every_refusal_of_the_hub_is_one_line_and_the_push_goes_on_when_repeated(hub, push, refused, out):
    for what, said in FAULTS.items():
        hub.fault("POST", "/commit/main", what)
        assert said in refused("push", out, "me/moe", "--token", "hf_me")
    assert set(hub.repos["me/moe"].revisions["main"]) == {".gitattributes"}
    sent = puts(hub)
    push(out, "me/moe")
    assert puts(hub) == sent and len(sent) == len(list(out.glob("*.safetensors")))
    hub.fault("POST", "/repos/create", 403)
    assert "does not let this token write to 'me/new'" in refused("push", out, "me/new", "--token", "hf_me")
    hub.fault("GET", "/whoami-v2", "cut")
    assert "the connection to the Hub failed" in refused("push", out, "me/new", "--token", "hf_me")


def test_a_commit_that_came_between_is_not_committed_over(hub, refused, out):
    hub.add("me/moe", {})
    hub.fault("POST", "/commit/main", lambda: hub.repos["me/moe"].write("main", {"theirs": b"theirs"}))
    said = refused("push", out, "me/moe", "--token", "hf_me")
    assert "'me/moe' was changed meanwhile (HTTP 412: A commit has happened since" in said
    assert hub.repos["me/moe"].revisions["main"] == {"theirs": b"theirs"}


def test_what_passes_is_tried_again(hub, push, out):
    """As huggingface_hub does; each takes a second."""
    hub.fault("POST", "/preupload/main", 500)
    hub.fault("POST", "/objects/batch", 429)
    hub.fault("PUT", "", "cut")
    push(out, "me/moe")
    stored = hub.repos["me/moe"].revisions["main"]
    assert all(stored[path.name] == path.read_bytes() for path in out.glob("*.safetensors"))
    assert not any(fault.times for fault in hub.faults)


def test_a_file_that_arrived_in_part_is_sent_again(hub, push, refused, out):
    hub.fault("PUT", "", "half")
    said = refused("push", out, "me/moe", "--token", "hf_me")
    assert "the Hub answered HTTP 400 for 'me/moe': The object has another size" in said
    assert set(hub.repos["me/moe"].revisions["main"]) == {".gitattributes"}
    sent = puts(hub)
    push(out, "me/moe")
    again = puts(hub)[len(sent) :]
    assert again and len(set(again) & set(sent)) == 1  # the others were there, or had not been tried
    stored = hub.repos["me/moe"].revisions["main"]
    assert all(stored[path.name] == path.read_bytes() for path in out.glob("*.safetensors"))


def edit_report(folder: Path, **values) -> None:
    path = folder / "conversion_report.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


SPOILED = {
    "is not an artifact": lambda folder: (folder / "conversion_report.json").unlink(),
    "lacks 'modeling_mpoe.py'": lambda folder: (folder / "modeling_mpoe.py").unlink(),
    "lacks 1 of the": lambda folder: next(folder.glob("model-00002*")).unlink(),
    "lists as files ['../dense/config.json']; expected names of": lambda folder: edit_report(
        folder, files=["../dense/config.json"]
    ),
    "lists as files [3]; expected names of": lambda folder: edit_report(folder, files=[3]),
    "lists as files 3; expected names of": lambda folder: edit_report(folder, files=3),
    "expected": lambda folder: next(folder.glob("model-00002*")).write_bytes(b"cut off"),
}


@pytest.mark.parametrize("said", SPOILED)
def test_what_is_no_whole_artifact_is_not_pushed(said, hub, out):
    from mpoe_convert import push

    SPOILED[said](out)
    with pytest.raises(CheckpointError, match=re.escape(said)):
        push(out, "me/moe", token="hf_me")
    assert not hub.requests


def test_the_reason_is_found_below_and_told_in_one_line():
    inside = RuntimeError("Error while uploading 'a.safetensors' to the Hub.")
    inside.__cause__ = ConnectionError("gone\naway")
    late = str(explain_writing(TimeoutError("The write operation timed out"), "me/moe"))
    assert late.startswith(
        "the connection to the Hub failed for 'me/moe' (The write operation timed out): check"
    )
    assert str(explain_writing(inside, "me/moe")).startswith(
        "the connection to the Hub failed for 'me/moe' (gone"
    )
    from huggingface_hub.errors import OfflineModeIsEnabled

    said = str(explain_writing(OfflineModeIsEnabled("offline"), "me/moe"))
    assert said == "offline mode is on, nothing can be pushed to 'me/moe': unset HF_HUB_OFFLINE"
    said = str(explain_writing(ValueError("Invalid metadata in README.md.\n- bad"), "me/moe"))
    assert said == "pushing to 'me/moe' failed: ValueError: Invalid metadata in README.md. - bad"


# ----------------------------------------------------------------------------------- from end to end


CHILD = """
import re, sys
from pathlib import Path
from huggingface_hub import hf_hub_download
card = Path(hf_hub_download(sys.argv[1], "README.md")).read_text()
exec(re.search("```python\\n(.*?)```", card, re.S)[1])  # makes model and tokenizer
assert "mpoe_convert" not in sys.modules
torch.save(model(torch.arange(3, 15)[None]).logits, sys.argv[2] + "/logits.pt")
"""


def test_converted_from_the_hub_pushed_to_it_and_loaded_from_it(hub, ask, artifact, tmp_path):
    dense, _ = artifact("gpt2")
    files = contents(dense, file_names(dense))
    hub.add("lab/dense", {}, revisions={"v1": files})
    small = ["--experts", "3", "--bond-dim", "4", "--noise", "0", "--revision", "v1"]
    convert = ["lab/dense", *small, "-o", tmp_path / "out", "--push-to-hub", "me/moe", "--private"]
    hub.fault("POST", "/commit/main", 503)
    code, printed, err = ask(*convert, "--token", "hf_me", "--json")
    assert (code, printed) == (1, "") and is_artifact(tmp_path / "out")
    said, _, command = err.partition(" go on with: ")
    assert "HTTP 503" in said and f"the artifact is in '{tmp_path / 'out'}'," in said
    words = shlex.split(command)
    assert words == ["mpoe-convert", "push", str(tmp_path / "out"), "me/moe", "--private"]
    assert ask(*words[1:], "--token", "hf_me", "-q") == [0, "", ""]
    shutil.rmtree(tmp_path / "out")
    code, printed, err = ask(*convert, "--token", "hf_me", "--json")
    document = json.loads(printed)
    assert (code, err) == (0, "") and document["base_model"] == "lab/dense"
    assert document["pushed"]["changed"] is False  # the same recipe makes the same bytes
    assert hub.repos["me/moe"].private
    card = hub.repos["me/moe"].revisions["main"]["README.md"].decode()
    assert ModelCard(card).data.base_model == "lab/dense"
    assert "networks of [lab/dense](https://huggingface.co/lab/dense), revision" in card

    variables = environment(tmp_path / "home", hub.endpoint, HF_TOKEN="hf_me", HF_HUB_OFFLINE="0")
    variables["HF_MODULES_CACHE"] = str(tmp_path / "modules")
    command = [sys.executable, "-P", "-c", CHILD, "me/moe", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    expected = AutoModelForCausalLM.from_pretrained(dense).eval()(torch.arange(3, 15)[None]).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=0, atol=1e-4)

    hf = str(Path(sys.executable).with_name("hf"))
    command = [hf, "download", "me/moe", "--local-dir", str(tmp_path / "again")]
    subprocess.run(command, check=True, capture_output=True, env=variables, cwd=tmp_path)
    assert own_files(tmp_path / "again") == own_files(tmp_path / "out")


def test_results_that_were_recorded_go_along_under_the_repositorys_name(hub, push, out, tmp_path):
    (tmp_path / "text.txt").write_text(words(101))
    evaluate(str(out), str(tmp_path / "text.txt"), length=16, record=True)
    before = tree(out)
    push(out, "me/moe")
    assert tree(out) == before
    front = ModelCard(hub.repos["me/moe"].revisions["main"]["README.md"].decode()).data.to_dict()
    name, (result,) = model_index_to_eval_results(front["model-index"])
    assert (name, result.dataset_name) == ("moe", "text.txt")
    assert "evaluation_report.json" in hub.repos["me/moe"].revisions["main"]
    card = ModelCard.load(out / "README.md")
    card.data.tags = [1]
    card.save(out / "README.md")
    with pytest.raises(AssertionError, match="Invalid metadata in README.md. - tags is not allowed"):
        push(out, "me/moe")


def test_a_push_that_is_stopped_says_how_to_go_on():
    with (
        pytest.raises(
            KeyboardInterrupt, match="the artifact is in 'o u t', go on with: mpoe-convert push 'o u t' me/m"
        ),
        resumable_push("o u t", "me/m", {"private": False}, overwrite=False),
    ):
        raise KeyboardInterrupt


def test_options_of_a_push_need_one(hub, ask, tmp_path):
    code, _, err = ask("me/source", "-o", tmp_path / "x", "--private")
    assert code == 2 and "--private belongs to --push-to-hub USER/NAME, which is not given." in err


# ------------------------------------------------------------------------------- what is not public


@pytest.mark.parametrize(
    ("to", "options"), [("dense", ["--expert", "2"]), ("moe", ["--no-check"])], ids=["dense", "moe"]
)
def test_exports_of_a_revision_of_a_private_repository(to, options, hub, ask, refused, artifact, tmp_path):
    """The same weights as of the folder; the main branch holds another model."""
    _, out = artifact("llama", noise=0.5)
    _, other = artifact("llama", noise=0.5, seed=1)
    trial = contents(out, file_names(out))
    repo = hub.add(f"me/{to}", contents(other, file_names(other)), revisions={"trial": trial}, private=True)
    command = [
        "export",
        f"me/{to}",
        "--revision",
        "trial",
        "--to",
        to,
        *options,
        "-o",
        tmp_path / "back",
        "-q",
    ]
    said = refused(*command)
    assert f"'me/{to}'" in said and "token" in said and not (tmp_path / "back").exists()
    assert ask(*command, "--token", "hf_me") == [0, "", ""]
    request = Export(to=to, expert=2 if to == "dense" else None, check=False)
    export(out, tmp_path / "expected", request)
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("back", "expected"))
    assert found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in found)
    report = json.loads((tmp_path / "back/export_report.json").read_text())
    assert (report["artifact"], report["revision"]) == (f"me/{to}", repo.commit("trial"))
    assert to == "moe" or report["comparison"]["relative_difference"] < 1e-4
    assert "hf_me" not in "".join(path.read_text() for path in (tmp_path / "back").glob("*.[jm][sd]*"))


def test_the_token_reaches_models_and_data_of_every_command(hub, ask, artifact, tmp_path):
    dense, out = artifact("gpt2")
    rows = "\n".join(json.dumps({"text": words(200, seed)}) for seed in range(40)).encode()
    for name in ("one", "two", "three"):  # what one command has read is in the cache then
        hub.add(f"datasets/me/{name}", {"train.jsonl": rows, "test.jsonl": rows}, private=True)
    hub.add("me/moe", contents(out, file_names(out)), private=True)
    convert = f"{dense} --keep 0.9 --calibrate me/one --calibration-tokens 4000 --experts 2 --bond-dim 4"
    finetune = "finetune me/moe --data me/two --steps 1 --length 16"
    commands = {
        "compressed": f"{convert} -o {tmp_path / 'compressed'}",
        "tuned": f"{finetune} -o {tmp_path / 'tuned'}",
        "": "evaluate me/moe --data me/three --limit 2 --length 16",
    }
    for made, command in commands.items():
        code, _, err = ask(*command.split(), "-q")
        assert code == 1 and err.startswith("Error: ") and err.count("\n") == 1, err
        assert ask(*command.split(), "-q", "--token", "hf_me") == [0, "", ""]
        assert is_artifact(tmp_path / made) or not made
    assert "hf_me" not in "".join(path.read_text() for path in tmp_path.glob("*/*.json"))
