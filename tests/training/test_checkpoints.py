"""Checkpoints: what is whole, which run one belongs to, and what a folder may hold."""

import errno
import os
from dataclasses import fields, replace

import pytest
import torch
from datasets import Dataset, concatenate_datasets

from mpoe_convert import Finetuning
from mpoe_convert.errors import OutputError
from mpoe_convert.options import named_by_flags
from mpoe_convert.training.checkpoints import (
    FREE,
    PARTIAL,
    RECORD_FILE,
    SCRATCH,
    Record,
    check_place,
    check_same_run,
    find_checkpoint,
    remove_leftovers,
    write_record,
    writing_into,
)
from mpoe_convert.training.fingerprints import hash_of_examples, hash_of_model

RUN = Finetuning("out", "a.txt")
CONTENTS = {"model": "a" * 64, "data": "b" * 64}
RECORD = Record.of(RUN, CONTENTS, 1)
# Another value of every field that is no number.
OTHERS = {
    "model": "other",
    "data": "b.txt",
    "eval_data": "b.txt",
    "task": "causal",
    "schedule": "linear",
    "skip_unit": "layer",
    "freeze": "centre",
    "precision": "bfloat16",
    "options": {"router_jitter_noise": 0.1},
    "arguments": {"adam_beta2": 0.9},
    "report_to": "wandb",
    "trust_remote_code": True,
}


def changed(name: str) -> Finetuning:
    value = getattr(RUN, name)
    if name in OTHERS:
        return RUN.replace(**{name: OTHERS[name]})
    if isinstance(value, str) or (
        value is None and name not in ("length", "steps", "auxiliary_lr", "eval_every")
    ):
        return RUN.replace(**{name: "other"})
    return RUN.replace(**{name: value / 2 if isinstance(value, float) and value else (value or 0) + 1})


@pytest.fixture
def checkpoint(tmp_path):
    """A function that makes a checkpoint of a step."""

    def make(step: int):
        folder = tmp_path / "tuned" / f"checkpoint-{step}"
        (folder / "deeper").mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"weights")
        (folder / "deeper" / "state.json").write_text("{}")
        write_record(folder, RECORD)
        return folder

    return make


@pytest.mark.parametrize("name", [each.name for each in fields(Finetuning)])
def test_whatever_differs_is_told_with_both_values(name, checkpoint):
    """The option's name, what it is and what it was; hashes tell files apart, whatever their names."""
    made = checkpoint(1)
    now = Record.of(changed(name), CONTENTS, 1)
    if name in FREE or name in CONTENTS:
        check_same_run(made, now)
    if name in CONTENTS:
        now = replace(now, contents=CONTENTS | {name: "c" * 64})
    if name in FREE:
        return
    flag = {"model": "MODEL", "options": "--option", "arguments": "--set"}.get(
        name, f"--{name.replace('_', '-')}"
    )
    with pytest.raises(OutputError, match=f"belongs to another run: {name} is .*, was "):
        check_same_run(made, now)
    with named_by_flags(), pytest.raises(OutputError, match=f"another run: {flag} is .*, was ") as told:
        check_same_run(made, now)
    assert str(told.value).count(", was ") == 1 and "go on with the values from before" in str(told.value)
    if name in CONTENTS:
        assert "(sha256 cccccccc), was" in str(told.value)


def test_options_are_compared_before_anything_is_read(checkpoint):
    made = checkpoint(1)
    check_same_run(made, Record.of(RUN.replace(data="moved.txt"), None, 1))
    with pytest.raises(OutputError, match="another run: seed is 3, was 0; go on"):
        check_same_run(made, Record.of(RUN.replace(data="moved.txt", seed=3), None, 1))


def test_the_number_of_processes_and_weights_alone(checkpoint):
    with pytest.raises(OutputError, match="the number of processes is 2, was 1"):
        check_same_run(checkpoint(1), replace(RECORD, processes=2))
    alone = Record.of(RUN.replace(arguments={"save_only_model": True}), CONTENTS, 1)
    write_record(folder := checkpoint(2), alone)
    with pytest.raises(OutputError, match="holds weights alone"):
        check_same_run(folder, alone)


def test_a_field_that_the_record_lacks_had_its_default(checkpoint):
    fewer = {name: value for name, value in RECORD.request.items() if name != "seed"}
    write_record(folder := checkpoint(1), replace(RECORD, request=fewer))
    check_same_run(folder, RECORD)
    with pytest.raises(OutputError, match="seed is 3, was 0"):
        check_same_run(folder, Record.of(RUN.replace(seed=3), CONTENTS, 1))


def shorten(folder):
    (folder / "model.safetensors").write_bytes(b"weight")


def drop(folder):
    (folder / "deeper" / "state.json").unlink()


def cut_record(folder):
    path = folder / RECORD_FILE
    path.write_text(path.read_text()[:-20])


@pytest.mark.parametrize("damage", [shorten, drop, cut_record])
def test_the_newest_whole_one_is_taken(damage, checkpoint, tmp_path):
    older, newest = checkpoint(9), checkpoint(10)
    assert check_place(tmp_path / "tuned", resume=True) == newest
    damage(newest)
    half = tmp_path / "tuned" / PARTIAL / "checkpoint-11"
    half.mkdir(parents=True)
    assert find_checkpoint(tmp_path / "tuned") == check_place(tmp_path / "tuned", resume=True) == older
    assert remove_leftovers(tmp_path / "tuned") == [PARTIAL, "checkpoint-10"]
    assert [path.name for path in (tmp_path / "tuned").iterdir()] == ["checkpoint-9"]


def test_of_an_earlier_release(checkpoint, tmp_path):
    (checkpoint(4) / RECORD_FILE).unlink()
    told = r"checkpoint-4 has no record of the run that wrote it, because an earlier release did.*as MODEL"
    with pytest.raises(OutputError, match=told):
        check_place(tmp_path / "tuned", resume=True)
    assert remove_leftovers(tmp_path / "tuned") == [] and (tmp_path / "tuned" / "checkpoint-4").exists()


def test_places(checkpoint, tmp_path, monkeypatch):
    for name in (PARTIAL, SCRATCH):  # all that a run leaves which was killed early
        (tmp_path / "killed" / name).mkdir(parents=True)
    assert check_place(tmp_path / "killed", resume=False) is None
    with pytest.raises(OutputError, match="no checkpoint to resume from"):
        check_place(tmp_path / "killed", resume=True)
    checkpoint(1)
    with pytest.raises(OutputError, match="continue it with resume=True"):
        check_place(tmp_path / "tuned", resume=False)
    (tmp_path / "file").write_text("")
    for name in ("nothing", "loop"):
        (tmp_path / name).symlink_to(tmp_path / name.replace("nothing", "gone"))
    places = {
        "file": "file' exists and is not a folder; choose",
        "file/below/it": "cannot write .*file' is a file; choose",
        "nothing": "nothing' is a link to '.*gone', which is not there; make that folder",
        "loop": "loop' is a link to '.*loop', which is not there; make that folder",
    }
    for place, told in places.items():
        with pytest.raises(OutputError, match=told):
            check_place(tmp_path / place, resume=False)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    for place in (tmp_path / "killed", tmp_path / "new" / "tuned"):
        with pytest.raises(OutputError, match=r"cannot write .*is not writable; choose another"):
            check_place(place, resume=False)


def test_what_a_failed_run_leaves(tmp_path):
    full = OSError(errno.ENOSPC, "No space left on device", "events.log")
    with (
        pytest.raises(OutputError, match=r"^cannot write events.log \(No space.*\); no checkpoint was saved"),
        writing_into(tmp_path / "new" / "tuned"),
    ):
        (tmp_path / "new" / "tuned").mkdir(parents=True)
        raise full
    assert not (tmp_path / "new").exists()
    with pytest.raises(ConnectionResetError), writing_into(tmp_path / "tuned"):
        (tmp_path / "tuned" / "runs").mkdir(parents=True)
        raise ConnectionResetError(errno.ECONNRESET, "reset")
    assert (tmp_path / "tuned" / "runs").exists()


def test_a_model_is_known_again():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.BatchNorm1d(3))
    found = {hash_of_model(model)}
    assert hash_of_model(torch.nn.Sequential(*model)) in found
    model[0].weight.data[2, 4] = torch.nextafter(model[0].weight[2, 4], torch.tensor(9.0))
    found.add(hash_of_model(model))
    model[1].num_batches_tracked += 1
    found.add(hash_of_model(model))
    found.add(hash_of_model(torch.nn.Sequential(model[0], torch.nn.Identity(), model[1])))
    found.add(hash_of_model(model.bfloat16()))
    assert len(found) == 5


def test_a_model_with_its_values_in_another_order_is_another_one():
    """Also where rows change places, or pieces that are summed at once, or the bytes of a remainder."""
    torch.manual_seed(0)
    for rows, columns in ((6, 4), (2 * 2**17, 2), (7, 1), (1, 2)):
        model = torch.nn.Linear(columns, rows, bias=False)
        weight, before = model.weight.data.clone(), hash_of_model(model)
        for changed in (weight.flip(0), weight.flip(1), weight.roll(rows // 2, 0)):
            model.weight.data = changed.clone()
            assert (hash_of_model(model) == before) == changed.equal(weight), (rows, columns)


def test_examples_are_known_again():
    """However their rows are stored; other tokens, ends or classes are other examples."""
    rows = {"input_ids": [[1, 2], [3], [4, 5, 6]], "labels": [0, 1, 0]}
    whole = hash_of_examples(Dataset.from_dict(rows))
    parts = [Dataset.from_dict({name: rows[name][i : i + 1] for name in rows}) for i in range(3)]
    assert hash_of_examples(concatenate_datasets(parts)) == whole
    picked = Dataset.from_dict({name: rows[name][::-1] for name in rows}).select([2, 1, 0])
    assert hash_of_examples(picked) == whole
    others = [
        rows | {"input_ids": [[1, 2], [3], [4, 5, 7]]},
        rows | {"input_ids": [[1], [2, 3], [4, 5, 6]]},
        rows | {"labels": [0, 1, 1]},
        {name: values[::-1] for name, values in rows.items()},
    ]
    assert len({whole, *(hash_of_examples(Dataset.from_dict(other)) for other in others)}) == 5
