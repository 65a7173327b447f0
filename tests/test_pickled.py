"""Pickled weights: same numbers as torch.load, bytes left where they are, and nothing in the file is ever executed."""

from __future__ import annotations

import collections
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from hf_fuse.checkpoint import pickled
from hf_fuse.checkpoint.pickled import INDEX, SINGLE, convert_pickled, pickled_tensors
from hf_fuse.checkpoint.reader import TORCH_NAMES, FilePool, TensorInfo, open_checkpoint
from hf_fuse.errors import CheckpointError


def read(info: TensorInfo) -> torch.Tensor:
    raw = torch.empty(info.nbytes, dtype=torch.uint8)
    pool = FilePool()
    pool.read(info, 0, memoryview(raw.numpy()))
    pool.close()
    return raw.view(getattr(torch, TORCH_NAMES[info.dtype])).reshape(info.shape)


def assert_same(infos: dict[str, TensorInfo], state: dict[str, torch.Tensor]) -> None:
    assert list(infos) == list(state)
    for name, tensor in state.items():
        found = read(infos[name])
        assert found.dtype == tensor.dtype and found.shape == tensor.shape, name
        expected = tensor.detach().resolve_conj().contiguous().reshape(-1).view(torch.uint8)
        assert torch.equal(found.reshape(-1).view(torch.uint8), expected), name


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    embedding = torch.randn(24, 16)
    return {
        "embed.weight": embedding,
        "lm_head.weight": embedding,  # tied: one storage, two names
        "rows.weight": embedding[3:7],  # contiguous, but not from the storage's start
        "turned.weight": embedding.t(),
        "strided.weight": embedding[:, ::2],
        "half.weight": torch.randn(7, 3).bfloat16(),
        "float8.weight": torch.randn(5).to(torch.float8_e4m3fn),
        "count": torch.tensor(41),
        "mask": torch.tensor([True, False, True]),
        "none": torch.empty(0, 4),
        "spectrum": torch.randn(3, dtype=torch.complex64).conj(),
        "parameter": torch.nn.Parameter(torch.randn(2, 2)),
    }


def test_every_tensor_is_the_one_torch_loads(state: dict[str, torch.Tensor], tmp_path: Path):
    torch.save(collections.OrderedDict(state), tmp_path / SINGLE)
    infos = convert_pickled(tmp_path)
    assert_same(infos, state)
    in_place = {name for name, info in infos.items() if info.file == tmp_path / SINGLE}
    assert set(state) - in_place == {"turned.weight", "strided.weight", "spectrum"}, "only these need a copy"
    assert infos["embed.weight"].start == infos["lm_head.weight"].start


def test_old_format_is_copied_out_once_and_removed_at_exit(state: dict[str, torch.Tensor], tmp_path: Path):
    del state["float8.weight"], state["spectrum"]  # younger than the format
    torch.save(state, tmp_path / SINGLE, _use_new_zipfile_serialization=False)
    infos = convert_pickled(tmp_path)
    assert_same(infos, state)
    assert infos["embed.weight"].start == infos["lm_head.weight"].start
    script = f"""
from pathlib import Path
from hf_fuse.checkpoint.pickled import convert_pickled
infos = convert_pickled(Path({str(tmp_path)!r}))
assert infos["count"].file.exists()
print(infos["count"].file.parent)
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert out.stdout.strip() and not Path(out.stdout.strip()).exists()


def repack(path: Path, change, compression: int = zipfile.ZIP_STORED, order=lambda names: names) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name in order(list(entries)):
            archive.writestr(name, change(name, entries[name]))


def test_entries_in_another_order_are_found_where_they_are(tmp_path: Path):
    """Some releases of torch compute a storage's place instead of looking it up: equal sizes would be swapped."""
    state = {f"layer.{i}": torch.full((4, 4), float(i)) for i in range(6)}
    torch.save(state, tmp_path / SINGLE)
    repack(tmp_path / SINGLE, lambda name, data: data, order=lambda names: names[::-1])
    infos = convert_pickled(tmp_path)
    assert_same(infos, state)
    assert {info.file for info in infos.values()} == {tmp_path / SINGLE}


def test_ambiguous_places_fall_back_to_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    state = {"a": torch.arange(6.0), "b": torch.arange(6.0, 12)}
    torch.save(state, tmp_path / SINGLE)
    monkeypatch.setattr(pickled, "_origin", lambda *_: None)
    infos = convert_pickled(tmp_path)
    assert_same(infos, state)
    assert tmp_path / SINGLE not in {info.file for info in infos.values()}


def test_origin_needs_exactly_one_fit():
    a = torch.zeros(4)
    address = a.untyped_storage().data_ptr()
    assert pickled._origin({"a": a}, {64: 16, 200: 8}) == address - 64
    assert pickled._origin({"a": a}, {64: 16, 200: 16}) is None
    assert pickled._origin({"a": a}, {64: 8}) is None


def test_tensors_saved_on_a_gpu_and_in_the_other_byte_order(tmp_path: Path):
    state = {"w": torch.arange(8.0), "n": torch.arange(3)}
    torch.save(state, tmp_path / SINGLE)
    # The pickle names the device by a length-prefixed string.
    moved = {"/data.pkl": lambda data: data.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")}
    repack(tmp_path / SINGLE, lambda name, data: moved.get(name[name.index("/") :], lambda d: d)(data))
    assert_same(convert_pickled(tmp_path), state)

    other = {"little": "big", "big": "little"}[sys.byteorder]

    def swap(name: str, data: bytes) -> bytes:
        if name.endswith("/byteorder"):
            return other.encode()
        width = {"/data/0": 4, "/data/1": 8}.get(name[name.index("/") :])
        return b"".join(data[i : i + width][::-1] for i in range(0, len(data), width)) if width else data

    repack(tmp_path / SINGLE, swap)
    assert_same(convert_pickled(tmp_path), state)


def test_a_model_saved_in_shards_opens_as_a_checkpoint(tmp_path: Path):
    shards = {
        "pytorch_model-00001-of-00002.bin": {"a.weight": torch.randn(3, 4), "a.bias": torch.randn(3)},
        "pytorch_model-00002-of-00002.bin": {"b.weight": torch.randn(2, 3)},
    }
    for file, state in shards.items():
        torch.save(state, tmp_path / file)
    weight_map = {name: file for file, state in shards.items() for name in state}
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="--allow-pickle"):
        open_checkpoint(str(tmp_path))
    checkpoint = open_checkpoint(str(tmp_path), allow_pickle=True)
    assert_same(checkpoint.tensors, {name: t for state in shards.values() for name, t in state.items()})

    (tmp_path / "pytorch_model-00002-of-00002.bin").rename(tmp_path / "away")
    with pytest.raises(CheckpointError, match="1 missing shard.*00002-of-00002"):
        convert_pickled(tmp_path)
    (tmp_path / "away").rename(tmp_path / "pytorch_model-00002-of-00002.bin")
    torch.save(shards["pytorch_model-00001-of-00002.bin"], tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match="both"):
        convert_pickled(tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "../outside.bin"}, "outside.bin.*not trusted"),
        ({"a": "/etc/hostname.bin"}, "not trusted"),
        ({"a": "..bin"}, "not trusted"),
        ({"a": "weights.pkl"}, "weights.pkl.*not trusted"),
        ({"a": 3}, "not trusted"),
        ({}, "weight_map"),
        (["a"], "weight_map"),
        ({"a": "one.bin"}, "holds tensor 'b'.*nowhere"),
        ({"a": "one.bin", "b": "one.bin", "c": "one.bin"}, "1 tensor.*'c'"),
    ],
)
def test_an_index_that_is_wrong_or_leaves_its_folder_is_refused(weight_map, message: str, tmp_path: Path):
    torch.save({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "one.bin")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        convert_pickled(tmp_path)


class Attack:
    """Would create a file when unpickled the ordinary way."""

    def __init__(self, marker: Path):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("through_environment", [False, True])
def test_a_malicious_pickle_is_refused_and_not_run(zipped, through_environment, tmp_path: Path, monkeypatch):
    marker = tmp_path / "owned"
    payload = {"a": torch.ones(2), "b": Attack(marker)}
    torch.save(payload, tmp_path / SINGLE, _use_new_zipfile_serialization=zipped)
    if through_environment:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(CheckpointError) as caught:
        convert_pickled(tmp_path)
    assert "mkdir" in str(caught.value) and "nothing in it was executed" in str(caught.value)
    assert str(tmp_path / SINGLE) in str(caught.value) and "weights_only" not in str(caught.value)
    assert not marker.exists()
    torch.load(tmp_path / SINGLE, weights_only=False)
    assert marker.exists(), "the file is a working attack, so the refusal above means something"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": torch.ones(1), "step": 3}, "'step' is a int"),
        ({"state_dict": {"a": torch.ones(1)}}, "'state_dict' is a dict.*state dict"),
        ({0: torch.ones(1)}, "entry 0"),
        ([torch.ones(1)], "holds a list"),
        ({}, "holds a dict"),
        ({"a": torch.eye(3).to_sparse()}, "'a'.*sparse"),
        ({"a": torch.ones(1, dtype=torch.complex128)}, "'a'.*complex128"),
    ],
)
def test_anything_but_named_dense_tensors_is_an_error(content, message: str, tmp_path: Path):
    torch.save(content, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        convert_pickled(tmp_path)


def test_damaged_files_are_named(tmp_path: Path):
    path = tmp_path / SINGLE
    torch.save({"a": torch.ones(1000)}, path)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"PK\x03\x04", b"", b"version https://git-lfs.github.com/spec/v1\n"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=SINGLE):
            pickled_tensors(path)
    path.write_bytes(whole)
    repack(path, lambda name, data: data, zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="compressed"):
        pickled_tensors(path)
    path.unlink()
    with pytest.raises(CheckpointError, match="no pytorch_model.bin"):
        convert_pickled(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        pickled_tensors(path)


def test_no_room_for_the_copy_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    torch.save({"a": torch.ones(4, 3).t()}, tmp_path / SINGLE)

    class Full:
        name = str(tmp_path / "gone")

    monkeypatch.setattr(pickled.tempfile, "TemporaryDirectory", lambda prefix: Full)
    with pytest.raises(CheckpointError, match="could not be written.*TMPDIR"):
        convert_pickled(tmp_path)
