"""Weight files hold finite weights, or are not written."""

import io
import shutil
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mpoe_convert import Export, export
from mpoe_convert.artifact import weight_files
from mpoe_convert.artifact.weight_files import PlannedTensor, Spec, save_shard, stream_shard, write_planned
from mpoe_convert.errors import CheckpointError
from mpoe_convert.source.safetensors_file import CODE2DTYPE


def tensors_of_all_dtypes():
    """Sizes that are no multiples of 8 among them."""
    return {
        f"{at}.é.{dtype}": torch.full(size, 1).to(getattr(torch, dtype))
        for at, size in enumerate([(3, 5), (7,), (), (0, 4)])
        for dtype, _ in CODE2DTYPE.values()
    }


@pytest.mark.parametrize("in_flight", [0, 100, 1 << 27])
def test_files_are_those_of_safetensors_in_whatever_order_tensors_come(in_flight, tmp_path, monkeypatch):
    monkeypatch.setattr(weight_files, "IN_FLIGHT", in_flight)
    tensors = tensors_of_all_dtypes()
    save_file(tensors, tmp_path / "stock.safetensors", metadata={"format": "pt"})
    save_shard(dict(reversed(tensors.items())), tmp_path / "ours.safetensors")
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "stock.safetensors").read_bytes()


def test_a_write_may_take_some_bytes_at_a_time(tmp_path, monkeypatch):
    class Short(io.FileIO):
        def write(self, data):
            return super().write(data[:7])

    tensors = {"a": torch.arange(9.0), "b": torch.tensor(3)}
    save_file(tensors, tmp_path / "stock.safetensors", metadata={"format": "pt"})
    expected = (tmp_path / "stock.safetensors").read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", lambda self, mode, **_: Short(self, mode))
        save_shard(tensors, tmp_path / "ours.safetensors")
    assert (tmp_path / "ours.safetensors").read_bytes() == expected


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_weights_of_one_byte_are_checked_too(dtype, tmp_path):
    tensors = {"a.weight": torch.tensor([1.0, float("nan")]).to(dtype)}
    with pytest.raises(CheckpointError, match=r"a\.weight holds NaN or Inf in 1 of 2 places"):
        save_shard(tensors, tmp_path / "x.safetensors")


def by_stream(make, path):
    """One file of tensors that are made one after the other, by `stream_shard`."""
    stream_shard([Spec(name, (20,), "float32") for name in NAMES], ((n, make(n)) for n in NAMES), path)


def by_plan(make, path):
    """The same by `write_planned`, which says of each that it is made."""
    tensors = [PlannedTensor(name, (20,), "float32", partial(make, name)) for name in NAMES]
    done = []
    write_planned(path.parent, {path.name: tuple(NAMES)}, tensors, done.append)
    assert done == tensors


NAMES = "abcdefgh"


@pytest.mark.parametrize("write_file", [by_stream, by_plan])
def test_few_bytes_wait_to_be_written_while_the_next_tensor_is_made(write_file, tmp_path, monkeypatch):
    """A disk that is slower than what is made: never more than two tensors are done but not written."""
    monkeypatch.setattr(weight_files, "IN_FLIGHT", 100)
    made, written, most = [], [], []
    write = weight_files._write_at

    def slowly(*args):
        time.sleep(0.01)
        write(*args)
        written.append(1)

    def make(name):
        most.append(len(made) - len(written))
        made.append(name)
        return torch.full((20,), 1.0)  # 80 bytes: one may wait, not two

    monkeypatch.setattr(weight_files, "_write_at", slowly)
    write_file(make, tmp_path / "x.safetensors")
    assert len(made) == 8 == len(load_file(tmp_path / "x.safetensors")) and max(most) == 1


@pytest.mark.parametrize("where", ["write", "make"])
def test_a_file_that_cannot_be_finished_is_removed(where, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    def making():
        yield "a", torch.ones(3)
        if where == "make":
            raise KeyboardInterrupt
        yield "b", torch.ones(3)

    if where == "write":
        monkeypatch.setattr(weight_files, "_write_at", fail)
    with pytest.raises(OSError if where == "write" else KeyboardInterrupt):
        stream_shard([Spec(name, (3,), "float32") for name in "ab"], making(), tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_not_finite_are_refused(value, dtype, tmp_path):
    tensors = {"h.0.attn.c_attn.weight": torch.ones(3, 2, dtype=dtype), "count": torch.tensor([1])}
    tensors["h.0.attn.masked_bias"] = torch.tensor(value)  # a mask, of a buffer's name
    save_shard(tensors, tmp_path / "file.safetensors")
    assert load_file(tmp_path / "file.safetensors").keys() == tensors.keys()
    tensors["h.0.attn.c_attn.weight"][1, 1] = value
    with pytest.raises(CheckpointError, match=r"c_attn\.weight holds NaN or Inf in 1 of 6 places"):
        save_shard(tensors, tmp_path / "other.safetensors")
    assert not (tmp_path / "other.safetensors").exists()


@pytest.mark.parametrize("to", ["dense", "moe"])
def test_no_export_of_them_is_left(to, artifact, tmp_path):
    """Of an artifact with a norm that somebody destroyed."""
    _, out = artifact("llama")
    shutil.copytree(out, tmp_path / "source")
    path = tmp_path / "source" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight holds NaN or Inf"):
        export(tmp_path / "source", tmp_path / "exported", Export(to=to, check=False))
    assert not (tmp_path / "exported").exists()
