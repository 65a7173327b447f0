"""A merge that is killed leaves the old output or none, never a mixture, and the next run clears up after it.

Two kinds of killing: SIGKILL from outside at moments spread over the run, and from inside just before each single step
that changes the file system, so that every gap between two steps is met.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from tiny_models import Family, digests, llama_family

from hf_fuse import plan
from hf_fuse.errors import OutputError

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

# One process imports everything once and forks a child per run: a run starts in milliseconds instead of seconds.
RUNNER = r"""
import json, os, signal, sys, time
import hf_fuse.merge.engine, hf_fuse.merge.finish, hf_fuse.merge.methods.ties, hf_fuse.merge.methods.linear
import hf_fuse.checkpoint.adapter, hf_fuse.checkpoint.tokenizer_comparison, hf_fuse.checkpoint.vocabulary
from hf_fuse import cli
from hf_fuse.checkpoint import writer

class Steps:
    # Counts what changes the file system below a folder, and sends the process a signal before number `last`.
    def __init__(self, folder, last, log, signal):
        self.folder, self.last, self.log, self.signal, self.count = folder, last, log, signal, 0
        for name in ("pwrite", "fsync"):
            setattr(os, name, self.stepping(name, getattr(os, name)))
        writer._exchange = self.stepping("exchange", writer._exchange)
        sys.addaudithook(self.seen)

    def seen(self, event, arguments):
        changes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate")
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (changes or writes) and self.folder in str(arguments[0]):
            self.step(event)

    def stepping(self, name, function):
        def stepped(*arguments):
            self.step(name)
            return function(*arguments)
        return stepped

    def step(self, name):
        self.count += 1
        if self.count - 1 == self.last:
            os.kill(os.getpid(), self.signal)
            time.sleep(0.1)  # this may be a thread, while the main one handles the signal
        if self.log:
            print(name, file=self.log, flush=True)

signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start background jobs with Ctrl-C ignored
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if not child:
        os.dup2(os.open(job["errors"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        os.dup2(2, 1)
        sys.argv = ["hf-fuse", *job["arguments"]]
        if job["no_exchange"]:
            writer.ctypes.CDLL = lambda *a, **k: None
        if job["last_step"] is not None or job["step_log"]:
            log = open(job["step_log"], "w") if job["step_log"] else None
            Steps(job["folder"], job["last_step"], log, job["signal"])
        code = 1
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        finally:
            os._exit(code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Runner:
    """Runs the command line in forked children; ``folder`` is where outputs go."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.output = folder / "merged"
        self.errors = folder.parent / "errors.txt"
        command = [sys.executable, "-c", RUNNER]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def start(
        self,
        recipe: Path,
        *,
        overwrite: bool = True,
        last_step: int | None = None,
        number: signal.Signals = signal.SIGKILL,
        step_log: Path | None = None,
        no_exchange: bool = False,
    ) -> int:
        """Process id of a new run."""
        job = {
            "arguments": ["merge", str(recipe), "--output", str(self.output), *(["--overwrite"] if overwrite else []),
                          *(["--workers", "1"] if last_step is not None or step_log else [])],
            "errors": str(self.errors), "folder": str(self.folder), "last_step": last_step,
            "signal": number, "step_log": str(step_log or ""), "no_exchange": no_exchange,
        }  # fmt: skip
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def wait(self) -> int:
        """Exit status of the run, negative if it was killed."""
        return int(self.process.stdout.readline())

    def run(self, recipe: Path, **options: object) -> int:
        self.start(recipe, **options)
        return self.wait()

    def clear(self) -> None:
        shutil.rmtree(self.folder)
        self.folder.mkdir()


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    with tempfile.TemporaryDirectory(prefix="hf_fuse_kill_", dir=memory_disk()) as folder:
        (Path(folder) / "work").mkdir()
        runner = Runner(Path(folder) / "work")
        yield runner
        runner.process.stdin.close()
        runner.process.wait()


def memory_disk() -> Path | None:
    """Where fsync costs nothing, if there is such a place: what is tested does not depend on it."""
    place = Path("/dev/shm")
    fits = place.is_dir() and os.access(place, os.W_OK) and shutil.disk_usage(place).free > 1e9
    return place if fits else None


def recipes(folder: Path, family: Family) -> tuple[Path, Path]:
    """Two merges of one family whose outputs differ: of the old output and of the new one."""
    models = [str(path) for path in family.tuned]
    old = {"method": "linear", "models": models, "max_shard_size": 10**9}
    new = {"method": "ties", "base_model": str(family.base), "models": models}
    paths = folder / "old.yaml", folder / "new.yaml"
    for path, recipe in zip(paths, (old, new)):
        path.write_text(yaml.safe_dump(recipe))
    return paths


def outputs(runner: Runner, old: Path, new: Path) -> tuple[dict, dict, Path]:
    """Digests of the complete old and new output, and a copy of the old one."""
    found = []
    for recipe in (new, old):
        runner.clear()
        assert runner.run(recipe) == 0, runner.errors.read_text()
        found.append(digests(runner.output))
    kept = runner.folder.parent / "old_output"
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(runner.output, kept)
    assert found[0].keys() >= {"model.safetensors", "config.json", "fuse_recipe.yaml", "README.md", "tokenizer.json"}
    assert found[0]["model.safetensors"] != found[1]["model.safetensors"]
    return found[1], found[0], kept


def check_after_kill(runner: Runner, old: dict, new: dict, recipe: Path, over_old: bool) -> bool:
    """Old or new and nothing else; then the next run succeeds and leaves only the output. True: it was the new one."""
    found = digests(runner.output)
    assert found in ([old, new] if over_old else [{}, new])
    if not over_old and not found:
        assert not runner.output.exists()
    assert runner.run(recipe) == 0, runner.errors.read_text()
    assert digests(runner.output) == new
    assert [path.name for path in runner.folder.iterdir()] == ["merged"]
    return found == new


@pytest.mark.parametrize("over_old", [False, True], ids=["new", "over_old"])
def test_killed_at_ten_moments(runner: Runner, tmp_path: Path, over_old: bool) -> None:
    family = llama_family(tmp_path / "models", width=128, vocabulary=3000, layers=3, models=2)
    old_recipe, recipe = recipes(tmp_path, family)
    old, new, kept = outputs(runner, old_recipe, recipe)

    def prepare() -> None:
        runner.clear()
        if over_old:
            shutil.copytree(kept, runner.output)

    durations = []
    for _ in range(2):
        prepare()
        begin = time.perf_counter()
        assert runner.run(recipe) == 0
        durations.append(time.perf_counter() - begin)
    killed = 0
    for moment in range(10):
        prepare()
        pid = runner.start(recipe)
        time.sleep(min(durations) * (moment + 0.5) / 10)
        with contextlib.suppress(ProcessLookupError):  # faster this time
            os.kill(pid, signal.SIGKILL)
        killed += runner.wait() == -signal.SIGKILL
        check_after_kill(runner, old, new, recipe, over_old)
    assert killed >= 5


@pytest.mark.parametrize("mode", ["new", "over_old", "over_old_in_two_renames"])
def test_killed_before_every_step(runner: Runner, tmp_path: Path, mode: str) -> None:
    family = llama_family(tmp_path / "models", layers=1, models=2)
    old_recipe, recipe = recipes(tmp_path, family)
    old, new, kept = outputs(runner, old_recipe, recipe)
    over_old, no_exchange = mode != "new", mode.endswith("renames")

    def prepare() -> None:
        runner.clear()
        if over_old:
            shutil.copytree(kept, runner.output)

    prepare()
    log = tmp_path / "steps.txt"
    assert runner.run(recipe, step_log=log, no_exchange=no_exchange) == 0
    steps = log.read_text().split()
    assert {"os.mkdir", "pwrite", "open", "fsync", "os.remove"} <= set(steps)
    assert steps.count("os.rename") == {"new": 1, "over_old": 0, "over_old_in_two_renames": 2}[mode]
    between, results = 0, []
    for step in range(len(steps)):
        if steps[step - 1 : step + 2] == [steps[step]] * 3 and step % 4:
            continue  # inside a row of equal steps: one tensor or file more or less
        prepare()
        assert runner.run(recipe, last_step=step, no_exchange=no_exchange) == -signal.SIGKILL
        if no_exchange and not runner.output.exists():
            # Where folders can't be exchanged there is a moment without any: the next run puts the old one back.
            between += 1
            assert digests(runner.folder / "merged.replaced") == old
            assert runner.run(recipe, overwrite=False) == 1
            assert "merged: exists" in runner.errors.read_text()
            assert digests(runner.output) == old
        results.append(check_after_kill(runner, old, new, recipe, over_old))
    assert between == (1 if no_exchange else 0)
    assert results == sorted(results), "once the new output is there, it stays"
    assert {False, True} == set(results)


def test_leftovers_are_cleared_without_overwrite(runner: Runner, tmp_path: Path) -> None:
    family = llama_family(tmp_path / "models", layers=1, models=2)
    _, recipe = recipes(tmp_path, family)
    runner.clear()
    assert runner.run(recipe, last_step=12) == -signal.SIGKILL
    assert {path.name for path in runner.folder.iterdir()} == {"merged.partial", ".merged.lock"}
    plan(recipe, output=runner.output)  # does not mind
    assert runner.run(recipe, overwrite=False) == 0
    assert [path.name for path in runner.folder.iterdir()] == ["merged"]
    with pytest.raises(OutputError, match="exists"):
        plan(recipe, output=runner.output)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_polite_end_cleans_up_at_once(runner: Runner, tmp_path: Path, number: signal.Signals) -> None:
    family = llama_family(tmp_path / "models", layers=1, models=2)
    _, recipe = recipes(tmp_path, family)
    runner.clear()
    assert runner.run(recipe, last_step=12, number=number) == 130
    assert runner.errors.read_text().splitlines()[-1] == "error: stopped; no output was left behind"
    assert list(runner.folder.iterdir()) == []
