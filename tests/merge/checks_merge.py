"""What every merge method promises, run over the registry: adding a method adds it here.

A method that rightly breaks a promise says so in :data:`EXEMPT`, with the reason; an exemption that has become
unnecessary fails.
"""

from __future__ import annotations

import torch

from hf_fuse import merge_state_dicts, registry
from hf_fuse.merge.units import takes_base

# Parameters that make a check meaningful where defaults would not.
PARAMETERS: dict[str, dict] = {
    "slerp": {"t": 0.3},
    "passthrough": {"scale": 0.75},
    "wise_ft": {"alpha": 0.75},
    "nearswap": {"t": 0.03},
    "ram": {"epsilon": 0.01},
    "ramplus_tl": {"epsilon": 0.01},
}

EXEMPT = {
    "order": {
        "slerp": "t counts from the first model",
        "opcm": "adds one model after the other, each beside those before",
    },
    "scale": {
        "nearswap": "t is a step in the unit of the weights",
        "ram": "epsilon is in the unit of the weights",
        "ramplus_tl": "epsilon is in the unit of the weights",
        "arcee_fusion": "softmaxes of the weights themselves",
        "widen": "the scores of vectors are softmaxes of |tau|",
    },
    "idempotent": {
        "task_arithmetic": "adds the task vectors up",
        "ties": "trims",
        "ties_task_arithmetic": "trims and adds up",
        "masked_task_arithmetic": "adds up",
        "magnitude": "trims and adds up",
        "breadcrumbs": "trims and adds up",
        "breadcrumbs_ties": "trims and adds up",
        "dare_linear": "adds up, and drops at random",
        "dare_ties": "adds up, and drops at random",
        "della": "drops at random",
        "pcb": "keeps the most important elements only",
        "consensus": "adds the task vectors up",
        "sce": "merges where models differ only, below density 1",
        "della_linear": "adds up, and drops at random",
        "nearswap": "steps no further than t",
        "arcee_fusion": "takes over important changes only",
        "ram": "drops changes up to epsilon",
        "ramplus_tl": "drops changes up to epsilon",
        "widen": "coefficients do not sum to 1 over models",
        "iso_c": "adds up and makes all singular values equal",
        "iso_cts": "makes all singular values equal",
        "opcm": "matrices yes, but vectors add up and set the common scale",
        "passthrough": "scales here",
        "wise_ft": "stops short of the fine-tuned model by intent",
    },
}
SHAPES = {"matrix": (24, 40), "vector": (67,), "cube": (3, 5, 8), "scalar": (), "single": (1,), "row": (1, 33)}


def method_names() -> list[str]:
    return registry.names("merge")


def count_of(name: str) -> int:
    low, high = getattr(registry.get("merge", name).module, "MODELS", (1, None))
    return 3 if high is None else high


def needs_base(name: str) -> bool:
    return takes_base(registry.get("merge", name)) is True


def family(count: int, *, dtype: torch.dtype = torch.float32, spread: float = 0.05, seed: int = 0):
    """A base and ``count`` fine-tunes of it, of every shape, with an integer buffer."""
    generator = torch.Generator().manual_seed(seed)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    models = [
        {name: t + spread * torch.randn(t.shape, generator=generator) for name, t in base.items()} for _ in range(count)
    ]
    cast = [{name: t.to(dtype) for name, t in state.items()} for state in (base, *models)]
    for state in cast:
        state["position_ids"] = torch.arange(7)
    return cast[0], cast[1:]


def statistics_of(name: str, models) -> list[dict] | None:
    """Statistics that follow from the models' own weights, for methods that use some."""
    kind = getattr(registry.get("merge", name).module, "STATISTICS", None)
    if kind is None:
        return None
    floats = [
        {key: t.float().nan_to_num(0, 0, 0) for key, t in state.items() if t.is_floating_point()} for state in models
    ]
    if kind == "fisher":
        return [{key: t.square() for key, t in state.items()} for state in floats]
    if kind == "mask":  # one that changes nothing, as the common checks are about what all merges do
        return [{key: torch.ones_like(t) for key, t in state.items()} for state in floats]
    return [{key: t.T @ t / len(t) for key, t in state.items() if t.ndim == 2} for state in floats]


def run(name: str, base, models, **options):
    parameters = PARAMETERS.get(name, {}) | options.pop("parameters", {})
    options["statistics"] = statistics_of(name, models)
    return merge_state_dicts(models, name, base=base if needs_base(name) else None, parameters=parameters, **options)


def assert_same(one, other, *, exact: bool = True, tolerance: float = 0.0) -> None:
    assert one.keys() == other.keys()
    for key in one:
        assert one[key].dtype == other[key].dtype and one[key].shape == other[key].shape, key
        if exact:
            assert torch.equal(one[key], other[key]), key
        else:
            torch.testing.assert_close(one[key], other[key], atol=tolerance, rtol=tolerance, msg=f"{key} differs")
