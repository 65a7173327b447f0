"""Two real processes share a merge over gloo: the same bytes as one, and one error when one of them fails."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from tiny_models import Family, digests, llama_family, load_weights, save_weights

import hf_fuse
from hf_fuse.errors import FuseError
from hf_fuse.merge.workers import World

UP = "model.layers.1.mlp.up_proj.weight"

# Found by every Python process of a run: at its end, a rank says how large its world was and how much it wrote.
WITNESS = """
import atexit, json, os
if "RANK" in os.environ and "WITNESS" in os.environ:
    genuine, written = os.pwrite, [0]
    def pwrite(handle, data, offset):
        count = genuine(handle, data, offset)
        written[0] += count
        return count
    os.pwrite = pwrite
    def tell():
        from hf_fuse.merge import workers
        path = os.path.join(os.environ["WITNESS"], os.environ["RANK"] + ".json")
        with open(path, "w") as file:
            json.dump({"size": int(os.environ["WORLD_SIZE"]), "written": written[0], "met": workers.World.met}, file)
    def watch():
        from hf_fuse.merge.workers import World
        World.met, enter = 0, World.__enter__
        def entering(self):
            entered = enter(self)
            World.met = len(set(self.gather(os.getpid())))
            return entered
        World.__enter__ = entering
    import sys
    if os.path.basename(sys.argv[0]) != "torchrun":
        class Finder:
            def find_spec(self, name, path=None, target=None):
                if name == "hf_fuse.merge.engine":
                    sys.meta_path.remove(self)
                    watch()
                    atexit.register(tell)
        sys.meta_path.insert(0, Finder())
"""


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return llama_family(tmp_path_factory.mktemp("ranks"), width=32, vocabulary=4500, layers=2)


def recipe_of(method: str, family: Family) -> dict:
    recipe = {"method": method, "models": [str(path) for path in family.tuned]}
    if method == "fisher":  # numbers of the right shapes will do, and one model's weights are such
        file = family.base.parent / "fisher.safetensors"
        save_file(load_weights(family.base), file)
        return recipe | {"models": [{"path": path, "statistics": str(file)} for path in recipe["models"]]}
    return recipe if method == "linear" else recipe | {"base_model": str(family.base)}


def environment(witness: Path) -> dict[str, str]:
    witness.mkdir(exist_ok=True)
    (witness / "sitecustomize.py").write_text(WITNESS)
    inherited = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    paths = [str(witness), *filter(None, [os.environ.get("PYTHONPATH")])]
    return inherited | {"PYTHONPATH": os.pathsep.join(paths), "WITNESS": str(witness), "OMP_NUM_THREADS": "1"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def torchrun(witness: Path, *command: str, processes: int = 2) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    launcher += ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    return subprocess.run([*launcher, *command], capture_output=True, text=True, env=environment(witness), timeout=120)


def check_witnesses(witness: Path, output: Path, processes: int = 2) -> None:
    """As many processes as asked for met, and each wrote a part of the output."""
    told = [json.loads((witness / f"{rank}.json").read_text()) for rank in range(processes)]
    assert [entry["size"] for entry in told] == [entry["met"] for entry in told] == [processes] * processes
    written = [entry["written"] for entry in told]
    tensors = sum(value.numel() * value.element_size() for value in load_weights(output).values())
    assert tensors <= sum(written) < tensors + 1000  # the lead also writes its process id
    assert min(written) > 0.25 * tensors


def test_torchrun_of_the_command(family: Family, tmp_path: Path) -> None:
    recipe = recipe_of("dare_ties", family)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    alone = hf_fuse.merge(recipe, tmp_path / "alone" / "merged")
    output = tmp_path / "together" / "merged"
    done = torchrun(tmp_path / "w", "-m", "hf_fuse", "merge", str(tmp_path / "recipe.yaml"), "--output", str(output))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("merged: ") == 1
    check_witnesses(tmp_path / "w", output)
    assert digests(output) == digests(alone)
    assert [path.name for path in output.parent.iterdir()] == ["merged"]


def test_accelerate_launch_of_the_command(family: Family, tmp_path: Path) -> None:
    """``accelerate launch`` without a GPU starts one process, so each rank is launched with its place in the world."""
    recipe = recipe_of("ties", family)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    alone = hf_fuse.merge(recipe, tmp_path / "alone" / "merged")
    output = tmp_path / "together" / "merged"
    started = []
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for rank in ("0", "1"):
        command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "-m", "hf_fuse",
                   "merge", str(tmp_path / "recipe.yaml"), "--output", str(output)]  # fmt: skip
        place = environment(tmp_path / "w") | world | {"RANK": rank, "LOCAL_RANK": rank}
        started.append(subprocess.Popen(command, env=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    said = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    check_witnesses(tmp_path / "w", output)
    assert digests(output) == digests(alone)


SEVERAL = """
import json, sys
from pathlib import Path
import hf_fuse
from hf_fuse.errors import FuseError
from hf_fuse.merge.engine import merge
from hf_fuse.merge.workers import World
folder, recipes = Path(sys.argv[1]), json.loads(sys.argv[2])
for name, recipe in recipes.items():
    try:
        merge(recipe, folder / name / "merged")
    except FuseError as error:
        (folder / f"{name}-{World().rank}.txt").write_text(str(error))
"""


def test_every_kind_of_method_and_failures(family: Family, tmp_path: Path) -> None:
    """Element by element, two kinds of statistics, random; and in between, merges that fail in one of the processes."""
    methods = ["linear", "ties", "dare_ties", "model_stock", "tsv_m", "opcm", "fisher"]
    recipes = {method: recipe_of(method, family) for method in methods}
    spoilt = tmp_path / "spoilt"
    shutil.copytree(family.tuned[0], spoilt)
    state = load_weights(spoilt)
    state[UP].view(-1)[-1] = float("nan")
    for path in spoilt.glob("*.safetensors*"):
        path.unlink()
    save_weights(spoilt, state)
    failing = {}
    for method in ("linear", "ties"):
        failing[f"failing_{method}"] = recipes[method] | {"models": [str(spoilt), str(family.tuned[1])]}
    order = {"linear": recipes["linear"], **failing, **recipes}  # failures come between merges that succeed
    (tmp_path / "several.py").write_text(SEVERAL)
    done = torchrun(tmp_path / "w", str(tmp_path / "several.py"), str(tmp_path / "together"), json.dumps(order))
    assert done.returncode == 0, done.stderr
    for method in methods:
        alone = hf_fuse.merge(recipes[method], tmp_path / "alone" / method / "merged")
        assert digests(tmp_path / "together" / method / "merged") == digests(alone), method
    for name in failing:
        said = [(tmp_path / "together" / f"{name}-{rank}.txt").read_text() for rank in (0, 1)]
        assert all(f"{spoilt}: tensor {UP} holds at least 1 NaN" in text for text in said)
        assert sum(text.startswith("process ") for text in said) == 1, "one met it, the other was told"
        assert list((tmp_path / "together" / name).iterdir()) == []


def test_one_error_on_the_command_line(family: Family, tmp_path: Path) -> None:
    """Whichever process meets it, the lead says it, once, and nothing is left."""
    overflowing = recipe_of("linear", family) | {"parameters": {"weight": 3e38, "normalize": False}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(overflowing))
    output = tmp_path / "together" / "merged"
    done = torchrun(tmp_path / "w", "-m", "hf_fuse", "merge", str(tmp_path / "recipe.yaml"), "--output", str(output))
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if "error: " in line and "not finite" in line]
    assert len(said) == 1, done.stderr
    assert done.stderr.count("Traceback (most recent call last)") <= 1, "the launcher's own"
    assert list(output.parent.iterdir()) == []


def test_shares_are_disjoint_complete_and_even() -> None:
    sizes = [7, 1, 1, 9, 3, 3, 2, 8, 1]
    parts = [World(size=3, rank=rank).share(list(enumerate(sizes)), lambda unit: unit[1]) for rank in range(3)]
    assert sorted(unit for part in parts for unit in part) == list(enumerate(sizes))
    loads = [sum(size for _, size in part) for part in parts]
    assert max(loads) - min(loads) <= 2


def test_a_world_that_cannot_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(FuseError, match="WORLD_SIZE is 2.*torchrun, or unset WORLD_SIZE"), World():
        pass
    assert not torch.distributed.is_initialized()
