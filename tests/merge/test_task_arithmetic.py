import pytest
import torch

from hf_fuse import merge_state_dicts

BASE = {"w": torch.tensor([1.0, 1.0])}
MODELS = [{"w": torch.tensor([2.0, 1.0])}, {"w": torch.tensor([1.0, 3.0])}]


def test_worked_example():
    merged = merge_state_dicts(MODELS, "task_arithmetic", base=BASE, parameters={"lambda": 0.3})["w"]
    assert merged.tolist() == pytest.approx([1.3, 1.6])


def test_negation_forgets():
    merged = merge_state_dicts(MODELS[:1], "task_arithmetic", base=BASE, weights=[-1])["w"]
    assert merged.tolist() == [0.0, 1.0]


def test_normalize_divides_by_the_weights_unless_they_cancel():
    def run(weights):
        return merge_state_dicts(MODELS, "task_arithmetic", base=BASE, weights=weights, parameters={"normalize": True})[
            "w"
        ].tolist()

    assert run([2, 2]) == [1.5, 2.0]
    assert run([1, -1]) == [2.0, -1.0]
