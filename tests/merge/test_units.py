"""What the engine hands to a method: blocks, whole rows or whole tensors, with base and place."""

from types import SimpleNamespace

import pytest
import torch
from tiny_models import llama_family

import hf_fuse
from hf_fuse import registry
from hf_fuse.errors import RecipeError
from hf_fuse.merge.methods._passes import Pass
from hf_fuse.merge.sources import BLOCK, MemorySource
from hf_fuse.merge.stream import Merger
from hf_fuse.merge.units import MERGE, Input, Unit
from hf_fuse.merge.workers import Workers, World
from hf_fuse.registry import Method

SHAPES = {"matrix": (700, 301), "wide": (3, 200_000), "vector": (257,), "conv": (8, 3, 5, 5), "empty": (0, 4)}


def row_method(seen):
    """Subtracts its row's mean, measured total of the base, and remembers what it was given."""

    def measure(count, numel, dtype):
        def add(block, total, piece):
            assert block.shape[1:] == piece.base.shape and piece.place.start % max(block.shape[-1], 1) == 0
            total += piece.base.double().sum()

        return (yield Pass(torch.zeros((), dtype=torch.float64), add))

    def rows(deltas_KN, *, state, base, place):
        seen.append((place.tensor, place.start, tuple(deltas_KN.shape), tuple(base.shape)))
        return (deltas_KN - deltas_KN.mean(-1, keepdim=True)).sum(0) - base + float(state)

    module = SimpleNamespace(UNIT="rows", MEASURE_SCOPE="tensor", measure=measure)
    return Method("rows", "merge", rows, module, "", None, {})


@pytest.mark.parametrize("chunk, workers", [(BLOCK, 1), (1024, 2)])
def test_rows_are_whole_and_cuts_do_not_matter(chunk, workers):
    generator = torch.Generator().manual_seed(0)
    base, *models = [{n: torch.randn(s, generator=generator) for n, s in SHAPES.items()} for _ in range(3)]
    sources = {"base": MemorySource(base), "0": MemorySource(models[0]), "1": MemorySource(models[1])}
    units = [Unit(n, "F32", s, MERGE, [Input("0", n), Input("1", n)], Input("base", n)) for n, s in SHAPES.items()]
    found, seen = {n: torch.full(s, torch.nan) for n, s in SHAPES.items()}, []

    def keep(unit, start, out):
        found[unit.name].view(-1).view(torch.uint8)[4 * start : 4 * start + out.numel()] = out

    merger = Merger(row_method(seen), sources, units, torch.float32, chunk=chunk)
    merger.run(keep, World(size=1, rank=0), Workers(torch.device("cpu"), torch.float32, workers))
    for name, theta in base.items():
        rows = theta.view(len(theta), -1) if theta.ndim > 1 and theta.numel() else theta.view(1, -1)
        tau = torch.stack([m[name] - theta for m in models]).view(2, *rows.shape)
        expected = (tau - tau.mean(-1, keepdim=True)).sum(0) + float(theta.double().sum())
        torch.testing.assert_close(found[name].view(rows.shape), expected, atol=2e-5, rtol=1e-5)
    lengths = {"matrix": 301, "wide": 200_000, "vector": 257, "conv": 75, "empty": 1}
    for name, start, shape, base_shape in seen:
        assert shape[1:] == base_shape and shape[-1] == lengths[name] and start % lengths[name] == 0


def test_supplied_arguments_are_no_options():
    assert not set(registry.SUPPLIED) & set(registry.get("merge", "ties").options)


@pytest.mark.parametrize(
    ("method", "weights", "parameters", "said"),
    [
        ("linear", [1, -1], {}, "weights sum to 0"),
        ("karcher", [0, 0], {}, "weights sum to 0"),
        ("multislerp", [1, -1], {}, "weights sum to 0"),
        ("della", [1, 1], {"density": 0.9, "epsilon": 0.15}, "Make epsilon smaller"),
        ("della_linear", [1, 1], {"density": [0.05, 0.5]}, "Make epsilon smaller"),
    ],
)
def test_options_that_do_not_go_together_stop_the_plan(tmp_path, method, weights, parameters, said):
    """Before weights are downloaded or read; the tensor is named."""
    family = llama_family(tmp_path, models=2)
    models = [{"path": str(path), "weight": weight} for path, weight in zip(family.tuned, weights)]
    base = {"base_model": str(family.base)} if method.startswith("della") else {}
    with pytest.raises(RecipeError, match=rf"{said}.*\(tensor "):
        hf_fuse.plan({"method": method, "models": models, "parameters": parameters} | base)
