"""Local checkpoints: real files of every kind, damaged in every way that was thought of."""

import argparse
import json
import os
import pickle
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mpoe_convert
from mpoe_convert.errors import CheckpointError, RequestError
from mpoe_convert.source.checkpoint import open_checkpoint
from mpoe_convert.source.families import FAMILY_OF
from mpoe_convert.source.safetensors_file import TensorInfo

PACKAGE = str(Path(mpoe_convert.__file__).parents[1])  # whichever copy is under test
CONFIG = {"model_type": "gpt2", "n_layer": 12}


def tiny_tensors() -> dict[str, torch.Tensor]:
    gen = torch.Generator().manual_seed(0)
    tensors = {f"h.{layer}.mlp.weight": torch.randn(4, 6, generator=gen) for layer in (0, 2, 10)}
    tensors["wte.weight"] = torch.randn(8, 4, generator=gen).to(torch.bfloat16)
    tensors["h.2.attn.bias"] = torch.ones(3, 3, dtype=torch.uint8)
    tensors["scale"] = torch.tensor(2.5, dtype=torch.float64)
    tensors["empty"] = torch.zeros(0, 4, dtype=torch.float16)
    return tensors


def write_config(folder: Path, config=CONFIG) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return folder


def halves(tensors: dict) -> tuple[dict, dict]:
    names = list(tensors)
    return {n: tensors[n] for n in names[:3]}, {n: tensors[n] for n in names[3:]}


def write_index(folder: Path, stem: str, parts: dict[str, dict], **more) -> None:
    weight_map = {name: file for file, part in parts.items() for name in part}
    index = {"metadata": {"total_size": 0}, "weight_map": {**weight_map, **more}}
    (folder / f"{stem}.index.json").write_text(json.dumps(index))


def save_single(folder, tensors):
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def save_sharded(folder, tensors):
    first, second = halves(tensors)
    parts = {"model-1-of-2.safetensors": first, "model-2-of-2.safetensors": second}
    for file, part in parts.items():
        save_file(part, folder / file)
    write_index(folder, "model.safetensors", parts)


def save_bin(folder, tensors):
    torch.save(tensors, folder / "pytorch_model.bin")


def save_legacy_bin(folder, tensors):
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def save_sharded_bin(folder, tensors):
    first, second = halves(tensors)
    parts = {"pytorch_model-1.bin": first, "pytorch_model-2.bin": second}
    for file, part in parts.items():
        torch.save(part, folder / file)
    write_index(folder, "pytorch_model.bin", parts)


WRITERS = [save_single, save_sharded, save_bin, save_legacy_bin, save_sharded_bin]


@pytest.fixture
def folder(tmp_path):
    return write_config(tmp_path / "model")


def refusal(model, **options) -> str:
    """The one-line message of the refusal."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(model), **options)
    message = str(caught.value)
    assert "\n" not in message and "weights_only" not in message
    return message


# ------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("write", WRITERS)
def test_every_format_gives_the_same_headers_and_tensors(folder, write):
    tensors = tiny_tensors()
    write(folder, tensors)
    checkpoint = open_checkpoint(str(folder))
    assert (checkpoint.source, checkpoint.folder) == (str(folder), folder)
    assert (checkpoint.config, checkpoint.revision) == (CONFIG, None)
    assert set(checkpoint.tensors) == set(tensors)
    for name, tensor in tensors.items():
        info = checkpoint.tensors[name]
        assert (info.name, info.shape) == (name, tuple(tensor.shape))
        assert getattr(torch, info.dtype) is tensor.dtype
        assert info.num_bytes == tensor.nbytes
        assert (folder / info.file).is_file()
        torch.testing.assert_close(checkpoint.read(name), tensor, rtol=0, atol=0)
    assert checkpoint.shared_storage == {}


def test_names_are_in_natural_order(folder):
    save_single(folder, tiny_tensors())
    layers = [name for name in open_checkpoint(str(folder)).tensors if name.endswith("mlp.weight")]
    assert layers == ["h.0.mlp.weight", "h.2.mlp.weight", "h.10.mlp.weight"]


def test_safetensors_come_before_bin_and_single_before_shards(folder):
    save_bin(folder, {"from_bin": torch.ones(1)})
    save_sharded(folder, {f"shard.{i}": torch.ones(1) for i in range(4)})
    assert "shard.0" in open_checkpoint(str(folder)).tensors
    save_single(folder, {"single": torch.ones(1)})
    assert list(open_checkpoint(str(folder)).tensors) == ["single"]


@pytest.mark.parametrize("write", WRITERS)
def test_what_is_read_is_memory_of_its_own(folder, write):
    write(folder, tiny_tensors())
    checkpoint = open_checkpoint(str(folder))
    checkpoint.read("wte.weight").zero_()
    torch.testing.assert_close(checkpoint.read("wte.weight"), tiny_tensors()["wte.weight"])


def test_tied_bin_tensors_are_named_and_views_are_not_ties(folder):
    table = torch.randn(6, 4)
    square = torch.randn(4, 4)
    tied = {"wte": table, "lm_head": table, "half": table[:3], "sq": square, "sq_t": square.T}
    torch.save({**tied, "copy": table.clone()}, folder / "pytorch_model.bin")
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.shared_storage == {"lm_head": "wte"}
    torch.testing.assert_close(checkpoint.read("sq_t"), square.T)
    assert checkpoint.read("sq_t").is_contiguous()


def test_a_parameter_is_read_without_its_gradient_flag(folder):
    torch.save({"w": torch.nn.Parameter(torch.ones(2))}, folder / "pytorch_model.bin")
    assert not open_checkpoint(str(folder)).read("w").requires_grad


def test_tensors_that_the_index_forgot_are_kept_as_transformers_does(folder):
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, folder / "model-1.safetensors")
    write_index(folder, "model.safetensors", {"model-1.safetensors": {"a": None}})
    assert list(open_checkpoint(str(folder)).tensors) == ["a", "b"]


def test_links_to_blobs_are_followed(folder, tmp_path):
    blob = tmp_path / "blob"
    save_single(folder, {"a": torch.ones(2)})
    (folder / "model.safetensors").rename(blob)
    (folder / "model.safetensors").symlink_to(blob)
    assert open_checkpoint(str(folder)).read("a").tolist() == [1, 1]


def test_num_bytes_counts_the_numbers():
    assert TensorInfo("w", "bfloat16", (3, 5), "f").num_bytes == 30
    assert TensorInfo("s", "float64", (), "f").num_bytes == 8


def test_an_unknown_name_is_refused(folder):
    save_single(folder, {"a": torch.ones(1)})
    with pytest.raises(CheckpointError, match="has no tensor 'b', expected one of its 1 names"):
        open_checkpoint(str(folder)).read("b")


@pytest.mark.parametrize("write", [save_single, save_bin])
def test_a_file_that_changes_after_opening_is_noticed(folder, write):
    write(folder, {"a": torch.ones(4)})
    checkpoint = open_checkpoint(str(folder))
    write(folder, {"a": torch.ones(5)})
    with pytest.raises(CheckpointError, match=r"now float32 \[5\], expected float32 \[4\]"):
        checkpoint.read("a")
    write(folder, {"b": torch.ones(4)})
    with pytest.raises(CheckpointError, match="run again"):
        checkpoint.read("a")


def run(*arguments: str, **variables: str) -> str:
    """What a fresh interpreter prints for `-c arguments`."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PACKAGE, **variables},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_and_opening_safetensors_needs_no_torch_and_no_hub(folder):
    save_single(folder, tiny_tensors())
    code = (
        "import sys; from mpoe_convert.source.checkpoint import open_checkpoint; "
        f"open_checkpoint({str(folder)!r}); "
        "print(sorted({'torch', 'huggingface_hub', 'transformers'} & set(sys.modules)))"
    )
    assert run(code).strip() == "[]"


STREAM = """
import sys
import torch  # its own size does not count
from mpoe_convert.source.checkpoint import open_checkpoint

def resident(field="VmRSS"):
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith(field))
    return int(line.split()[1]) * 1024

torch.ones(1).sum()
start = resident()
checkpoint = open_checkpoint(sys.argv[1])
peak = 0
for name in checkpoint.tensors:
    tensor = checkpoint.read(name)
    assert tensor.sum().item() == tensor.numel()
    peak = max(peak, resident() - start)
    del tensor
print(peak)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory from /proc")
@pytest.mark.parametrize("write", [save_single, save_bin])
def test_streaming_does_not_keep_the_file_resident(folder, write):
    # 256 MiB in 8 MiB tensors. The bound is half the file: one memory map kept open reaches all of
    # it; pread needs about a tensor, remapped .bin files 64 MiB and a few tensors. The threshold
    # makes glibc return what is freed: the reader is measured, not the allocator's reserve.
    total = 256 * 2**20
    write(folder, {f"h.{i}.w": torch.ones(2 * 2**20) for i in range(32)})
    peak = run(STREAM, str(folder), MALLOC_MMAP_THRESHOLD_="1000000")
    assert int(peak) < total / 2


def test_published_checkpoints_read_as_safetensors_reads_them():
    data = os.environ.get("MPOE_TEST_DATA")
    if not data:
        pytest.skip("MPOE_TEST_DATA is not set")
    folders = sorted(path.parent for path in Path(data).glob("checkpoints/*/model.safetensors"))
    types = {path: json.loads((path / "config.json").read_text())["model_type"] for path in folders}
    folders = [path for path in folders if types[path] in FAMILY_OF]  # not the mixtures
    assert len(folders) >= 5
    for path in folders:
        checkpoint = open_checkpoint(str(path))
        expected = load_file(path / "model.safetensors")
        assert set(checkpoint.tensors) == set(expected)
        for name, tensor in expected.items():
            torch.testing.assert_close(checkpoint.read(name), tensor, rtol=0, atol=0)


# -------------------------------------------------------------------- weights that the config names


def named(folder: Path, value) -> Path:
    return write_config(folder, CONFIG | {"transformers_weights": value})


def test_the_file_that_the_config_names_is_read(folder):
    save_single(folder, {"wrong": torch.ones(1)})
    (folder / "new").mkdir()
    for file in ("b.safetensors", "new/b.safetensors"):
        save_file({"right": torch.ones(2)}, folder / file)
        assert list(open_checkpoint(str(named(folder, file))).tensors) == ["right"]
        torch.testing.assert_close(open_checkpoint(str(folder)).read("right"), torch.ones(2))


def test_the_index_that_the_config_names_is_read(folder):
    save_single(folder, {"wrong": torch.ones(1)})
    save_sharded(folder, tiny_tensors())
    (folder / "model.safetensors.index.json").rename(folder / "b.safetensors.index.json")
    checkpoint = open_checkpoint(str(named(folder, "b.safetensors.index.json")))
    assert set(checkpoint.tensors) == set(tiny_tensors())


@pytest.mark.parametrize(
    "value", ["b.bin", "../b.safetensors", "/b.safetensors", "b.safetensors/", 3, "b.json"]
)
def test_a_name_that_transformers_would_not_read_is_refused(folder, value):
    save_single(folder, tiny_tensors())
    said = refusal(named(folder, value))
    assert f"names the weights {value!r} (transformers_weights), expected a .safetensors file" in said


def test_a_named_file_that_is_not_there_is_told(folder):
    save_single(folder, tiny_tensors())
    said = refusal(named(folder, "b.safetensors"))
    assert "lacks b.safetensors, the weights that its config.json names (transformers_weights)" in said


# ------------------------------------------------------------------------------- links to nothing


@pytest.mark.parametrize(
    "file",
    ["config.json", "model.safetensors", "tokenizer.json", "additional_chat_templates/rag.jinja"],
)
def test_a_link_to_nothing_is_told(folder, file):
    """As in a snapshot of the cache whose blobs were deleted."""
    save_single(folder, tiny_tensors())
    (folder / file).unlink(missing_ok=True)
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).symlink_to(folder / "blobs" / "0123")
    said = refusal(folder)
    assert f"'{folder / file}' is a link to '{folder / 'blobs' / '0123'}', which is not there" in said
    assert "download the model again, or copy it with what its links point to" in said


def test_a_link_to_nothing_beside_what_is_read_is_no_matter(folder):
    save_single(folder, tiny_tensors())
    for file in ("pytorch_model.bin", "optimizer.pt", "README.md"):
        (folder / file).symlink_to(folder / "nothing")
    assert open_checkpoint(str(folder)).tensors


# ----------------------------------------------------------------------------- damaged safetensors


@pytest.fixture
def whole(folder) -> bytes:
    save_single(folder, tiny_tensors())
    return (folder / "model.safetensors").read_bytes()


def write_raw(folder: Path, header: object, data: bytes = b"", length: int | None = None) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(raw) if length is None else length
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", size) + raw + data)


def entry(begin: int, end: int, shape=None, dtype="F32") -> dict:
    shape = [(end - begin) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize("cut", [0, 3, 8, 9, 100, -200, -9, -1])
def test_truncated_safetensors_say_expected_and_actual_sizes(folder, whole, cut):
    kept = whole[: cut if cut >= 0 else len(whole) + cut]
    (folder / "model.safetensors").write_bytes(kept)
    (header,) = struct.unpack("<Q", whole[:8])
    data = len(whole) - 8 - header
    if len(kept) < 8:
        found = f"has {len(kept)} bytes, expected at least 8"
    elif len(kept) < 8 + header:
        found = f"a header of {header} bytes, expected at most {len(kept) - 8} in a file of"
    else:
        found = f"holds {data + cut} bytes of tensor data, expected {data} by its header (truncated"
    message = refusal(folder)
    assert found in message
    assert message.endswith("the file is damaged or incomplete, fetch it again")


DAMAGED = {
    "overlap": (
        {"a": entry(0, 8), "b": entry(4, 12)},
        b"\0" * 12,
        "'b' starts at data byte 4, expected 8",
    ),
    "gap": ({"a": entry(0, 8), "b": entry(12, 16)}, b"\0" * 16, "expected 8 (it leaves a gap"),
    "late start": ({"a": entry(4, 8)}, b"\0" * 8, "'a' starts at data byte 4, expected 0"),
    "outside": ({"a": entry(0, 400)}, b"\0" * 8, "8 bytes of tensor data, expected 400"),
    "trailing": ({"a": entry(0, 8)}, b"\0" * 9, "(trailing bytes)"),
    "backwards": ({"a": entry(8, 0, [2])}, b"\0" * 8, "spans -8 bytes, expected 8"),
    "wrong size": (
        {"a": entry(0, 8, [3])},
        b"\0" * 8,
        "spans 8 bytes, expected 12 for float32 [3]",
    ),
    "size overflow": ({"a": entry(0, 8, [2**62, 2**62])}, b"\0" * 8, "spans 8 bytes, expected"),
    "negative": ({"a": entry(0, 8, [-2])}, b"\0" * 8, "not a natural number"),
    "huge offset": ({"a": entry(0, 2**64)}, b"\0" * 8, "not a natural number"),
    "float shape": ({"a": entry(0, 8, [2.0])}, b"\0" * 8, "not a natural number"),
    "bool shape": ({"a": entry(0, 4, [True])}, b"\0" * 4, "not a natural number"),
    "no dtype": ({"a": {"shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4, "KeyError: 'dtype'"),
    "entry is a list": ({"a": [1, 2]}, b"", "entry for tensor 'a' is not valid"),
    "three offsets": ({"a": {**entry(0, 4), "data_offsets": [0, 4, 8]}}, b"\0" * 4, "is not valid"),
    "new dtype": (
        {"a": entry(0, 4, [8], "F4")},
        b"\0" * 4,
        "has the dtype 'F4', expected one that",
    ),
    "dtype is a list": ({"a": entry(0, 4, [1], ["F32"])}, b"\0" * 4, "has the dtype ['F32']"),
    "metadata": ({"__metadata__": {"x": 1}, "a": entry(0, 4)}, b"\0" * 4, "refused by safetensors"),
    "not an object": ([], b"", "header that is not valid (a list, not an object)"),
    "not JSON": (b"{'a': 1}", b"", "header that is not valid (Expecting property name"),
    "not UTF-8": (b'{"\xff": 1}', b"", "header that is not valid ('utf-8' codec"),
    "lone surrogate": (b'{"\\ud800": {}}', b"", "surrogates not allowed"),
    "deep": (b'{"a":' * 100_000, b"", "header that is not valid"),
    "twice": (
        b'{"a":%s,"a":%s}' % ((json.dumps(entry(0, 4)).encode(),) * 2),
        b"\0" * 4,
        "header that is not valid (the name 'a' occurs twice)",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_header_is_refused_with_its_fault(folder, case):
    header, data, expected = DAMAGED[case]
    write_raw(folder, header, data)
    message = refusal(folder)
    assert expected in message
    assert str(folder / "model.safetensors") in message


@pytest.mark.parametrize("length", [101, 2**40, 2**63, 2**64 - 1])
def test_a_header_length_bomb_allocates_nothing(folder, length):
    write_raw(folder, b"{}" + b" " * 98, length=length)
    assert f"announces a header of {length} bytes, expected at most 100" in refusal(folder)


def test_a_sound_handmade_file_is_read(folder):
    # The control for the damaged ones: the same writer, nothing wrong.
    write_raw(folder, {"a": entry(0, 8), "b": entry(8, 12, [])}, struct.pack("<3f", 1, 2, 3))
    checkpoint = open_checkpoint(str(folder))
    assert (checkpoint.read("a").tolist(), checkpoint.read("b").item()) == ([1, 2], 3)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_git_lfs_pointer_says_how_to_get_the_file(folder, name):
    (folder / name).write_text("version https://example.invalid/spec/v1\noid sha256:0\nsize 9\n")
    assert "is a Git LFS pointer, expected the file itself: run `git lfs pull`" in refusal(folder)


# ------------------------------------------------------------------------------------------ indexes


@pytest.mark.parametrize(
    "file", ["../x.safetensors", "/etc/passwd", "a/../../x.safetensors", "C:\\x.safetensors", "",
             "..\\x.safetensors", "x\0.safetensors", "config.json", "pytorch_model-1.bin", "."],
)  # fmt: skip
def test_an_index_may_not_name_files_outside_the_folder_or_of_another_kind(folder, file):
    save_file({"a": torch.ones(1)}, folder.parent / "x.safetensors")
    write_index(folder, "model.safetensors", {}, a=file)
    expected = f"names the file {file!r}, expected a .safetensors file inside the folder"
    assert expected in refusal(folder)


def test_missing_shards_are_listed(folder):
    save_sharded(folder, tiny_tensors())
    (folder / "model-2-of-2.safetensors").unlink()
    message = refusal(folder)
    assert "lacks 1 of the 2 shards that 'model.safetensors.index.json' names" in message
    assert "'model-2-of-2.safetensors': finish the download" in message


def test_tensors_that_a_shard_lacks_are_named(folder):
    tensors = tiny_tensors()
    save_sharded(folder, tensors)
    first, second = halves(tensors)
    write_index(
        folder, "model.safetensors",
        {"model-1-of-2.safetensors": first, "model-2-of-2.safetensors": {**second, "lost": None}},
    )  # fmt: skip
    message = refusal(folder)
    assert "model-2-of-2.safetensors' lacks 1 tensors that 'model.safetensors.index.json'" in message
    assert "'lost'" in message


def test_a_tensor_in_two_shards_is_refused(folder):
    save_sharded(folder, tiny_tensors())
    save_file(tiny_tensors(), folder / "model-2-of-2.safetensors")
    assert "is in both 'model-1-of-2.safetensors' and 'model-2-of-2.safetensors'" in refusal(folder)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "[" * 100_000]
)
def test_a_broken_index_is_refused(folder, text):
    (folder / "model.safetensors.index.json").write_text(text)
    assert "is not an index of shards" in refusal(folder)


# ------------------------------------------------------------------------------------ hostile .bin


class Touch:
    """Unpickled carelessly, it creates a file."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return (os.system, (f"touch {self.marker}",))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_code_is_refused_and_runs_nothing(folder, tmp_path, zipped):
    marker = tmp_path / "marker"
    torch.save(
        {"a": torch.ones(1), "b": Touch(marker)}, folder / "pytorch_model.bin",
        _use_new_zipfile_serialization=zipped,
    )  # fmt: skip
    message = refusal(folder)
    assert not marker.exists()
    assert re.search(r"holds more than tensors \(it asks for \w+\.system\)", message)
    assert "convert it to safetensors with a transformers version you trust" in message
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert marker.exists(), "the trap itself must work, or its silence proves nothing"


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_bare_pickle_is_refused(folder, tmp_path, protocol):
    marker = tmp_path / "marker"
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Touch(marker), protocol))
    assert "pytorch_model.bin" in refusal(folder)
    assert not marker.exists()


STATES = {
    "arguments": ({"args": argparse.Namespace(a=1)}, "(it asks for argparse.Namespace)"),
    "nested": ({"state_dict": {"a": torch.ones(1)}}, "holds a dict under 'state_dict'"),
    "number": ({"a": torch.ones(1), "epoch": 3}, "holds a int under 'epoch'"),
    "list": ([torch.ones(1)], "holds a list, expected a flat dict of tensors"),
    "number as name": ({0: torch.ones(1)}, "holds a Tensor under 0"),
    "sparse": ({"a": torch.eye(2).to_sparse()}, "expected plain tensors with string names"),
    "complex": ({"a": torch.ones(1, dtype=torch.complex128)}, "complex128"),
    "nothing": ({}, "holds weight files without a single tensor"),
}


@pytest.mark.parametrize("case", STATES)
def test_only_flat_dicts_of_tensors_are_loaded(folder, case):
    state, expected = STATES[case]
    torch.save(state, folder / "pytorch_model.bin")
    assert expected in refusal(folder)


@pytest.mark.parametrize("write", [save_bin, save_legacy_bin])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.95])
def test_a_truncated_bin_is_refused(folder, write, share):
    write(folder, {"a": torch.ones(2000)})
    path = folder / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    message = refusal(folder)
    assert "damaged or incomplete, fetch it again" in message or "holds more than" in message


# --------------------------------------------------------------------------------- what to refuse


CONFIGS = {
    "not JSON": ("{", "is not JSON"),
    "a list": ("[1]", "holds a JSON list, expected an object with 'model_type'"),
    "no type": ({"n_layer": 1}, "has no 'model_type' (old checkpoints lack it): add"),
    "converted": ({"model_type": "mpoe_gpt2"}, "already converted model: convert its dense base"),
    "a name for a list": (
        {**CONFIG, "architectures": "GPT2LMHeadModel"},
        "has 'architectures' 'GPT2LMHeadModel'; expected a list of names",
    ),
    "no names": ({**CONFIG, "architectures": [None]}, "has 'architectures' [None]; expected a list of names"),
    "a pair of one": (
        {"model_type": "encoder-decoder", "encoder": CONFIG, "decoder": 5},
        "has 'decoder' 5; expected that model's own config",
    ),
    "converted key": ({"model_type": "x", "mpoe": {}}, "already converted model"),
    "gptq": (
        {**CONFIG, "quantization_config": {"quant_method": "gptq"}},
        "the weights are quantised (gptq): dequantise first",
    ),
    "mxfp4": (
        {**CONFIG, "quantization_config": {"quant_method": "mxfp4"}},
        "full-precision checkpoint (AutoModelForCausalLM.from_pretrained(MODEL, "
        "quantization_config=Mxfp4Config(dequantize=True)), then save_pretrained)",
    ),
    "nested": (
        {**CONFIG, "text_config": {"quantization_config": {"bits": 4}}},
        "quantised (unnamed method)",
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs_that_cannot_be_converted(folder, case):
    config, expected = CONFIGS[case]
    save_single(folder, tiny_tensors())
    message = refusal(write_config(folder, config))
    assert expected in message
    assert str(folder / "config.json") in message


@pytest.mark.parametrize("count", [0, 1, None, [1, 1]])
def test_a_dense_model_may_count_one_expert(folder, count):
    save_single(write_config(folder, {**CONFIG, "num_experts": count}), tiny_tensors())
    assert open_checkpoint(str(folder)).tensors


@pytest.mark.parametrize(
    ("name", "tensor", "expected"),
    [
        ("h.0.weight", torch.ones(2, 2, dtype=torch.int8), "quantised (tensor 'h.0.weight'"),
        ("h.0.weight", torch.ones(2, 2, dtype=torch.uint8), "dequantise first"),
        ("h.0.weight", torch.ones(2, 2).to(torch.float8_e4m3fn), "is float8_e4m3fn)"),
        ("h.0.qweight", torch.ones(2, 2, dtype=torch.int32), "expected floating-point weights"),
    ],
)
def test_tensors_that_cannot_be_converted(folder, name, tensor, expected):
    save_single(folder, {**tiny_tensors(), name: tensor})
    message = refusal(folder)
    assert expected in message
    assert "model.safetensors" in message


def test_a_folder_without_config_says_what_it_found(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    message = refusal(tmp_path)
    assert "has no config.json, expected a transformers checkpoint; found 'notes.txt'" in message


def test_a_model_in_a_subfolder_is_pointed_at(tmp_path):
    save_single(write_config(tmp_path / "0_Transformer"), tiny_tensors())
    (tmp_path / "modules.json").write_text("[]")
    expected = "found a config.json in its subfolder '0_Transformer': pass that folder"
    assert expected in refusal(tmp_path)
    assert expected in refusal(write_config(tmp_path))


def test_an_adapter_is_refused(folder):
    (folder / "adapter_config.json").write_text("{}")
    assert "is a PEFT adapter" in refusal(folder)


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        ("tf_model.h5", "TensorFlow"),
        ("flax_model.msgpack", "Flax"),
        ("model.Q4_K_M.gguf", "GGUF"),
        ("model.onnx", "ONNX"),
        ("other.safetensors", "safetensors of another name"),
    ],
)
def test_weights_of_other_kinds_are_named(folder, file, kind):
    (folder / file).write_bytes(b"")
    message = refusal(folder)
    assert "no weights that can be read, expected model.safetensors, pytorch_model.bin" in message
    assert f"found only '{file}' ({kind}): save the model with transformers" in message


def test_paths_that_are_not_folders(folder, tmp_path, monkeypatch):
    save_single(folder, tiny_tensors())
    file = folder / "model.safetensors"
    assert "is a file, expected a folder with config.json and weights" in refusal(file)
    assert f"pass its folder, '{folder}'" in refusal(file)
    assert "there is no folder" in refusal(tmp_path / "absent")
    monkeypatch.chdir(tmp_path)
    for model in ("./absent", "../absent", "~/absent-folder", "", "  "):
        assert f"there is no folder {model!r}: check the path" in refusal(model)
    assert open_checkpoint("model").folder == Path("model")
    with pytest.raises(RequestError, match="drop revision, or pass a Hub id"):
        open_checkpoint("model", revision="main")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads anything")
def test_an_unreadable_file_is_one_line(folder):
    save_single(folder, tiny_tensors())
    (folder / "model.safetensors").chmod(0)
    assert "cannot be read (Permission denied)" in refusal(folder)


# --------------------------------------------------------------------------------- companion files


COPIED = [
    "LICENSE", "LICENSE.txt", "NOTICE", "added_tokens.json", "chat_template.jinja",
    "g2p_vocab.json", "generation_config.json", "merges.txt", "preprocessor_config.json",
    "config_sentence_transformers.json", "sentence_bert_config.json",
    "processor_config.json", "source.spm", "special_tokens_map.json", "spiece.model",
    "tekken.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json",
    "vocab.txt",
]  # fmt: skip
LEFT = [
    "README.md", "config.json", "model.safetensors", "pytorch_model.bin", "tokenizer.bin",
    "eval.json", "model.safetensors.index.json", "tokenization_x.py", "tokenizer.py",
    ".gitattributes", ".tokenizer.json", "tf_model.h5", "model.onnx", "model.gguf",
    "optimizer.pt", "tokenizer.pkl", "training_args.bin", "vocab.pth",
    "adapter_model.safetensors",
]  # fmt: skip


def test_companions_are_everything_around_the_weights_and_nothing_else(folder):
    save_single(folder, tiny_tensors())
    checkpoint = open_checkpoint(str(folder))
    for name in [*COPIED, *LEFT]:
        if not (folder / name).exists():
            (folder / name).write_text("x")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.json").write_text("x")
    (folder / "additional_chat_templates").mkdir()
    for name in ("rag.jinja", "rag.py", "rag.json"):
        (folder / "additional_chat_templates" / name).write_text("x")
    expected = sorted(folder / name for name in [*COPIED, "additional_chat_templates/rag.jinja"])
    assert checkpoint.companion_files() == expected


@pytest.mark.parametrize("write", [save_single, save_sharded, save_bin])
def test_a_file_that_goes_while_tensors_are_read_is_told(folder, write):
    write(folder, tiny_tensors())
    checkpoint = open_checkpoint(str(folder))
    for file in checkpoint.stored_files:
        (folder / file).unlink()
    with pytest.raises(CheckpointError, match=r"tensor 'wte\.weight' cannot be read any more .*run again$"):
        checkpoint.read("wte.weight")
