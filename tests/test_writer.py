"""The writer: files that the safetensors library and transformers read, whole or not at all, by one run at a time."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_models import ARCHITECTURES, Family, digests, load_weights, random_state, save_weights

import hf_fuse
from hf_fuse.checkpoint import writer
from hf_fuse.checkpoint.reader import DTYPE_BYTES, TORCH_NAMES, open_checkpoint, read_header
from hf_fuse.checkpoint.writer import Layout, PartialFolder, exclusive_output, lay_out
from hf_fuse.errors import OutputError

INDEX = "model.safetensors.index.json"
Table = list[tuple[str, str, tuple[int, ...]]]


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="hf_fuse_writer_") as folder:
        yield Path(folder)


def nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return DTYPE_BYTES[dtype] * math.prod(shape)


def content(table: Table) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randint(0, 2, shape, generator=generator).to(getattr(torch, TORCH_NAMES[dtype]))
        for name, dtype, shape in table
    }


def write(layout: Layout, state: dict[str, torch.Tensor], output: Path, *, piece: int = 7, threads: int = 1) -> None:
    """Writes tensors in pieces of a few elements, in random order, from several threads."""
    pieces = []
    for name, value in state.items():
        raw = value.contiguous().view(-1).view(torch.uint8).numpy()
        width = DTYPE_BYTES[layout.places[name].dtype]
        for first in range(0, value.numel(), piece):
            pieces.append((name, first, raw[first * width : (first + piece) * width]))
    random.Random(0).shuffle(pieces)
    with exclusive_output(output, overwrite=True) as partial:
        partial.create(layout)

        def work(mine: list) -> None:
            for name, first, data in mine:
                partial.write(layout.places[name], first, memoryview(data))

        started = [threading.Thread(target=work, args=(pieces[k::threads],)) for k in range(threads)]
        for thread in started:
            thread.start()
        for thread in started:
            thread.join()
        partial.sync()
        partial.publish()


# -- layout -----------------------------------------------------------------------------------------------------------

tables = st.lists(
    st.tuples(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=5),
        st.sampled_from(list(DTYPE_BYTES)),
        st.lists(st.integers(0, 5), max_size=3).map(tuple),
    ),
    min_size=1, max_size=8, unique_by=lambda entry: entry[0],
).filter(lambda table: all(name != "__metadata__" for name, _, _ in table))  # fmt: skip


@settings(max_examples=80, deadline=2000, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(tables, st.integers(1, 400))
@example([("a", "F32", ())], 1)
def test_any_table_is_written_so_that_the_library_reads_it(place: Path, table: Table, limit: int) -> None:
    layout, state, output = lay_out(table, limit), content(table), place / "any"
    write(layout, state, output)
    files = sorted(output.glob("*.safetensors"))
    assert {path.name: path.stat().st_size for path in files} == layout.sizes
    assert layout.nbytes >= sum(layout.sizes.values())
    found = load_weights(output)
    assert found.keys() == state.keys()
    for name, value in state.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8))
    check_shards(output, table, limit)


def check_shards(output: Path, table: Table, limit: int) -> None:
    files = sorted(output.glob("*.safetensors"))
    sizes = {name: nbytes(dtype, shape) for name, dtype, shape in table}
    order = []
    for path in files:
        tensors, metadata = read_header(path)
        assert metadata == {"format": "pt"}
        held = sum(sizes[name] for name in tensors)
        assert held <= limit or len([name for name in tensors if sizes[name]]) == 1
        filled = sorted((info for info in tensors.values() if info.nbytes), key=lambda info: info.start)
        widths = [DTYPE_BYTES[info.dtype] for info in filled]
        assert widths == sorted(widths, reverse=True), "wide dtypes first"
        assert all(info.start % width == 0 for info, width in zip(filled, widths)), "aligned"
        order.append([name for name, _, _ in table if name in tensors])
    assert [name for shard in order for name in shard] == [name for name, _, _ in table], "in the order of the table"
    if len(files) == 1:
        assert files[0].name == "model.safetensors"
        assert not (output / INDEX).exists()
        return
    count = len(files)
    assert [path.name for path in files] == [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    index = json.loads((output / INDEX).read_text())
    assert index["metadata"] == {
        "total_size": sum(sizes.values()), "total_parameters": sum(math.prod(shape) for _, _, shape in table),
    }  # fmt: skip
    assert index["weight_map"] == {name: path.name for path in files for name in read_header(path)[0]}


def test_a_shard_is_closed_before_it_is_too_large() -> None:
    table: Table = [(name, "F32", (25,)) for name in "abcde"]  # 100 bytes each
    assert len(lay_out(table, 500).sizes) == 1
    assert len(lay_out(table, 499).sizes) == 2
    layout = lay_out(table, 250)
    assert [sum(place.file == file for place in layout.places.values()) for file in layout.sizes] == [2, 2, 1]
    big: Table = [("small", "F32", (1,)), ("big", "F32", (1000,)), ("last", "F32", (1,))]
    assert len(lay_out(big, 100).sizes) == 3, "what exceeds the limit alone has a shard of its own"


def test_headers_are_padded_to_eight_bytes() -> None:
    for length in range(1, 10):
        (header,) = lay_out([("n" * length, "BF16", (2,))], 100).headers.values()
        assert len(header) % 8 == 0
        assert int.from_bytes(header[:8], "little") == len(header) - 8


def test_pieces_from_many_threads(tmp_path: Path) -> None:
    table: Table = [("a", "F32", (301, 7)), ("b", "BF16", (1000,)), ("c", "U8", (77,)), ("d", "F64", (5, 5, 5))]
    layout, state = lay_out(table, 6000), content(table)
    write(layout, state, tmp_path / "out", piece=13, threads=4)
    found = load_weights(tmp_path / "out")
    assert all(torch.equal(found[name], value) for name, value in state.items())


# -- transformers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_transformers_loads_what_was_merged(kind: str, tiny_family: Callable[[str], Family], tmp_path: Path) -> None:
    """Nothing missing, nothing left over, the numbers of a merge by hand; in one file and in shards."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    family = tiny_family(kind)
    kept = getattr(transformers, json.loads((family.base / "config.json").read_text())["architectures"][0])
    base, *tuned = (kept.from_pretrained(path).state_dict() for path in family.all)
    for limit in ("5GB", "15KB"):
        recipe = {"method": "task_arithmetic", "base_model": str(family.base), "models": [str(p) for p in family.tuned],
                  "parameters": {"lambda": 0.5}, "max_shard_size": limit}  # fmt: skip
        output = hf_fuse.merge(recipe, tmp_path / limit)
        assert (len(list(output.glob("*.safetensors"))) > 1) == (limit == "15KB")
        model, found = kept.from_pretrained(output, output_loading_info=True)
        assert not any(found.values())
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                expected = base[name] + 0.5 * sum(state[name] - base[name] for state in tuned)
                torch.testing.assert_close(value, expected, msg=name)
        ours = {path.name for path in output.iterdir()} - {"fuse_recipe.yaml", "README.md"}
        model.save_pretrained(tmp_path / f"again-{limit}", max_shard_size=limit)
        theirs = {path.name for path in (tmp_path / f"again-{limit}").iterdir()}
        assert {name for name in ours ^ theirs if "-of-" not in name} == set(), "the files that save_pretrained makes"
        if limit == "15KB":
            indexes = [json.loads((path / INDEX).read_text()) for path in (output, tmp_path / f"again-{limit}")]
            assert indexes[0]["metadata"] == indexes[1]["metadata"]
            assert indexes[0]["weight_map"].keys() == indexes[1]["weight_map"].keys()


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_output_dtype(dtype: str, tiny_family: Callable[[str], Family], tmp_path: Path) -> None:
    family = tiny_family("plain")
    recipe = {"method": "linear", "models": [str(path) for path in family.tuned], "out_dtype": dtype}
    output = hf_fuse.merge(recipe, tmp_path / "merged")
    states = [load_weights(path) for path in family.tuned]
    with safe_open(output / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    for name, value in load_file(output / "model.safetensors").items():
        assert value.dtype == getattr(torch, dtype)
        expected = sum(state[name] for state in states) / 3
        torch.testing.assert_close(value.float(), expected.to(value.dtype).float(), rtol=1e-2, atol=1e-3)
    assert json.loads((output / "config.json").read_text())["dtype"] == dtype


# -- all or nothing ---------------------------------------------------------------------------------------------------


@pytest.fixture
def small() -> tuple[Layout, dict[str, torch.Tensor]]:
    table: Table = [("a", "F32", (10,)), ("b", "F32", (10,))]
    return lay_out(table, 50), content(table)


def old_model(folder: Path) -> Path:
    save_weights(folder, random_state({"old": (3,)}))
    (folder / "notes.txt").write_text("old")
    return folder


def test_everything_is_on_disk_before_the_name_changes(
    tmp_path: Path, small: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, Any]] = []
    fsync, rename = os.fsync, Path.rename

    def recording_fsync(handle: int) -> None:
        events.append(("fsync", os.fstat(handle).st_ino))
        fsync(handle)

    def recording_rename(self: Path, target: Path) -> Path:
        events.append(("rename", {path.stat().st_ino for path in (self, *self.rglob("*"))}))
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(Path, "rename", recording_rename)
    write(*small, tmp_path / "out")
    kinds = [kind for kind, _ in events]
    position = kinds.index("rename")
    assert kinds.count("rename") == 1
    assert {number for _, number in events[:position]} == events[position][1], "every file and the folder itself"
    assert events[position + 1 :] == [("fsync", tmp_path.stat().st_ino)], "then the name"


@pytest.mark.parametrize("in_one_step", [True, False])
def test_overwrite(tmp_path: Path, small: tuple, monkeypatch: pytest.MonkeyPatch, in_one_step: bool) -> None:
    output = old_model(tmp_path / "out")
    if not in_one_step:
        monkeypatch.setattr(writer.ctypes, "CDLL", lambda *arguments, **named: None)
    with exclusive_output(output, overwrite=True) as partial:
        partial.create(small[0])
        before = digests(output)
        partial.publish()
    assert digests(output) != before
    assert not (output / "notes.txt").exists(), "replaced, not mixed"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.skipif(sys.platform != "linux", reason="folders are exchanged in one step on Linux")
def test_the_exchange_is_one_step_here(tmp_path: Path) -> None:
    new, old = old_model(tmp_path / "new"), tmp_path / "old"
    old.mkdir()
    numbers = new.stat().st_ino, old.stat().st_ino
    writer._exchange(new, old)
    assert (old.stat().st_ino, new.stat().st_ino) == numbers


def test_a_failure_leaves_nothing(tmp_path: Path, small: tuple) -> None:
    for overwrite in (False, True):
        before = digests(tmp_path)
        with pytest.raises(ZeroDivisionError), exclusive_output(tmp_path / "out", overwrite=overwrite) as partial:
            partial.create(small[0])
            assert (tmp_path / "out.partial").is_dir()
            raise ZeroDivisionError
        assert digests(tmp_path) == before
        old_model(tmp_path / "out")


def test_missing_parents_are_made(tmp_path: Path, small: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(*small, Path("deep/er/out"))
    assert open_checkpoint(str(tmp_path / "deep" / "er" / "out")).tensors.keys() == {"a", "b"}


@pytest.mark.parametrize("names", [["config.json"], ["main.py", "config.json"], ["README.md"], [".git"]])
def test_only_a_model_or_nothing_is_replaced(tmp_path: Path, small: tuple, names: list[str]) -> None:
    (tmp_path / "out").mkdir()
    for name in names:
        (tmp_path / "out" / name).write_text("precious")
    before = digests(tmp_path)
    with pytest.raises(OutputError, match="does not look like a model folder"):
        write(*small, tmp_path / "out")
    assert digests(tmp_path) == before


def test_an_empty_folder_is_replaced(tmp_path: Path, small: tuple) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="exists.*--overwrite"), exclusive_output(tmp_path / "out"):
        pass
    write(*small, tmp_path / "out")
    assert set(load_weights(tmp_path / "out")) == {"a", "b"}


@pytest.mark.parametrize("output", ["/", "..", "nowhere/.."])
def test_outputs_without_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str) -> None:
    (tmp_path / "here").mkdir()
    save_weights(tmp_path, random_state({"a": (2,)}))
    monkeypatch.chdir(tmp_path / "here")
    before = digests(tmp_path)
    with pytest.raises(OutputError), exclusive_output(Path(output), overwrite=True):
        pass
    assert digests(tmp_path) == before


# -- one run at a time ------------------------------------------------------------------------------------------------


def test_a_held_lock_is_refused_and_a_dead_one_is_not(tmp_path: Path, small: tuple) -> None:
    with exclusive_output(tmp_path / "out") as partial:
        partial.create(small[0])
        with pytest.raises(OutputError, match=rf"run \(process {os.getpid()}\)"), exclusive_output(tmp_path / "out"):
            pass
        assert (tmp_path / "out.partial" / INDEX).exists(), "the refused run has cleared nothing"
    (tmp_path / ".out.lock").write_text("1")  # as after a kill: the file is there, nobody holds it
    (tmp_path / "out.partial").mkdir(exist_ok=True)
    (tmp_path / "out.partial" / "half").write_text("half")
    write(*small, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_old_output_set_aside_comes_back(tmp_path: Path, small: tuple) -> None:
    old = digests(old_model(tmp_path / "out"))
    (tmp_path / "out").rename(tmp_path / "out.replaced")
    (tmp_path / ".out.lock").write_text("1")
    with pytest.raises(OutputError, match="exists"), exclusive_output(tmp_path / "out"):
        pass
    assert digests(tmp_path / "out") == old
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


CONTEND = """
import sys, time
from pathlib import Path
from hf_fuse.checkpoint.writer import exclusive_output, lay_out
from hf_fuse.errors import OutputError
output, me = Path(sys.argv[1]), sys.argv[2]
won = 0
for _ in range(60):
    try:
        with exclusive_output(output, overwrite=True) as partial:
            partial.create(lay_out([(f"from_{me}", "F32", (1,))], 100))
            (partial.folder / "owner").write_text(me)
            time.sleep(0.001)
            assert (partial.folder / "owner").read_text() == me
            partial.publish()
            won += 1
    except OutputError as error:
        assert "another run" in str(error), error
print(won)
"""


def test_many_runs_of_one_output(tmp_path: Path) -> None:
    """Whoever is inside is alone there, and whatever is at the output comes from one run."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", CONTEND, str(tmp_path / "out"), str(k)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for k in range(4)
    ]  # fmt: skip
    said = [process.communicate() for process in started]
    assert [process.returncode for process in started] == [0] * 4, said
    assert sum(int(out) for out, _ in said) > 10
    owner = (tmp_path / "out" / "owner").read_text()
    assert set(load_weights(tmp_path / "out")) == {f"from_{owner}"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_ranks_write_into_one_folder(tmp_path: Path, small: tuple) -> None:
    """The lead makes the folder; others write to it without holding its lock."""
    layout, state = small
    with exclusive_output(tmp_path / "out") as lead:
        lead.create(layout)
        other = PartialFolder(tmp_path / "out")
        for partial, name in ((lead, "a"), (other, "b")):
            partial.write(layout.places[name], 0, memoryview(state[name].numpy()).cast("B"))
            partial.sync()
        lead.publish()
        other.close()
    assert all(torch.equal(value, state[name]) for name, value in load_weights(tmp_path / "out").items())
