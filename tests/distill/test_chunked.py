"""Chunks give the value and the gradients of the whole, and no tensor as long as the tokens times the vocabulary."""

import pytest
import torch
import torch.nn.functional as F
from distill_cases import ONE_TEACHER
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from hf_fuse import registry
from hf_fuse.distill.chunked import chunked_sum
from hf_fuse.distill.top_k import TopK

ROWS, WIDTH, TOKENS = 22, 6, 40


def layers_and_rows():
    torch.manual_seed(0)
    student, teacher = torch.nn.Linear(WIDTH, TOKENS), torch.nn.Linear(WIDTH + 2, TOKENS)
    rows = torch.randn(ROWS, WIDTH, requires_grad=True), torch.randn(ROWS, WIDTH + 2), torch.arange(ROWS)
    return student, teacher, rows


def loss_of(name, student, teacher, top_k=0):
    method = registry.get("distill", name).function

    def loss(hidden, teacher_hidden, labels):
        with torch.no_grad():
            theirs = teacher(teacher_hidden) * 3
            theirs = TopK.of(theirs, top_k, labels) if top_k else theirs
        return method(student(hidden), theirs, *([labels] if name == "pld" else []))

    return loss


CASES = [(name, 0) for name in ONE_TEACHER] + [("forward_kl", 5), ("pld", 5)]


@pytest.mark.parametrize(("name", "top_k"), CASES)
@pytest.mark.parametrize("chunk_size", [1, 7, 100])
def test_value_and_gradients_of_the_whole(name, top_k, chunk_size):
    student, teacher, rows = layers_and_rows()
    loss = loss_of(name, student, teacher, top_k)
    sources = [rows[0], student.weight, student.bias]
    whole = loss(*rows)
    expected = torch.autograd.grad(whole, sources)
    value = chunked_sum(loss, *rows, chunk_size=chunk_size)
    assert value.item() == pytest.approx(whole.item(), rel=1e-5)
    for found, wanted in zip(torch.autograd.grad(value, sources), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    assert teacher.weight.grad is None


def test_several_losses_at_once():
    student, teacher, rows = layers_and_rows()
    kl = loss_of("forward_kl", student, teacher)

    def both(hidden, teacher_hidden, labels):
        task = F.cross_entropy(student(hidden), labels, reduction="sum")
        return torch.stack([task, kl(hidden, teacher_hidden, labels)])

    found = chunked_sum(both, *rows, chunk_size=5)
    torch.testing.assert_close(found, both(*rows))
    weights = torch.tensor([0.25, 2.0])
    expected = torch.autograd.grad((both(*rows) * weights).sum(), student.weight)[0]
    torch.testing.assert_close(torch.autograd.grad((found * weights).sum(), student.weight)[0], expected)


def test_no_rows_give_zero_tied_to_the_graph():
    student, teacher, rows = layers_and_rows()
    value = chunked_sum(loss_of("forward_kl", student, teacher), *(r[:0] for r in rows), chunk_size=4)
    value.backward()
    assert value.item() == 0 and student.weight.grad.abs().max() == 0


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returned."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [value.numel() for value in tree_flatten(result)[0] if isinstance(value, torch.Tensor)]
        self.size = max([self.size, *sizes])
        return result


@pytest.mark.parametrize("name", ONE_TEACHER)
def test_no_tensor_is_tokens_times_vocabulary(name):
    student, teacher, rows = layers_and_rows()
    loss = loss_of(name, student, teacher)
    with Largest() as largest:
        chunked_sum(loss, *rows, chunk_size=2).backward()
    assert largest.size == teacher.weight.numel() < ROWS * TOKENS
    with Largest() as largest:
        loss(*rows).backward()
    assert largest.size >= ROWS * TOKENS


@pytest.mark.parametrize("name", ONE_TEACHER)
def test_no_logits_are_held_until_the_backward_pass(name):
    student, teacher, rows = layers_and_rows()
    loss = loss_of(name, student, teacher)
    held = []

    def kept(value):
        held.append(value.numel())
        return value

    with torch.autograd.graph.saved_tensors_hooks(kept, lambda value: value):
        chunked_sum(loss, *rows, chunk_size=2)
    assert sum(held) == sum(row.numel() for row in rows)  # views of what came in
    with torch.autograd.graph.saved_tensors_hooks(kept, lambda value: value):
        loss(*rows)
    assert sum(held) > ROWS * TOKENS
