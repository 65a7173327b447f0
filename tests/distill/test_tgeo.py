"""TGeo-KD: the derivative by the ratios is the one of the unrolled step, and the controller learns from it."""

import pytest
import torch
import torch.nn.functional as F
from attached_cases import images, make_trainer, vit
from cached_cases import write_cache
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from training_cases import language_data, llama, train

from hf_fuse.distill.fusion_ratio import SCALARS, Controller, gaps, scalar_features, slopes, vector_features
from hf_fuse.distill.top_k import TopK
from hf_fuse.errors import FuseError

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_gaps_are_the_two_losses():
    student, teacher, labels = draw(4, 5), draw(4, 5, seed=1), torch.tensor([0, 3, 1, 4])
    kl, entropy = gaps(student, teacher, labels, 1.5)
    expected = F.kl_div((student / 1.5).log_softmax(-1), (teacher / 1.5).softmax(-1), reduction="sum") * 1.5**2
    assert kl.sum().item() == pytest.approx(expected.item(), rel=1e-12) and kl.shape == (4,)
    assert entropy.mean().item() == pytest.approx(F.cross_entropy(student, labels).item(), rel=1e-12)
    assert gaps(student, student, labels, 1.5)[0].abs().max() < 1e-12


def test_hypergradient_is_that_of_the_unrolled_step():
    inputs, teacher, labels = draw(6, 4), draw(6, 3, seed=1), torch.tensor([0, 1, 2, 0, 1, 2])
    held_out, held_labels, rate = draw(5, 4, seed=2), torch.tensor([2, 1, 0, 1, 2]), 0.3
    weight = torch.nn.Parameter(draw(3, 4, seed=3))

    def differences():
        kl, entropy = gaps(inputs @ weight.T, teacher, labels, 1.5)
        return kl - entropy

    ratio = torch.full((6,), 0.5, dtype=torch.float64, requires_grad=True)
    kl, entropy = gaps(inputs @ weight.T, teacher, labels, 1.5)
    loss = (ratio * kl + (1 - ratio) * entropy).mean()
    after = weight - rate * torch.autograd.grad(loss, weight, create_graph=True)[0]
    (expected,) = torch.autograd.grad(F.cross_entropy(held_out @ after.T, held_labels), ratio)

    moved = after.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(held_out @ moved.T, held_labels), moved)
    before = weight.detach().clone()
    with torch.no_grad():
        weight.copy_(moved)  # the step has been made when the controller learns
    found = -rate / 6 * slopes([weight], [before], [gradient], differences, distance=1e-4)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-10)
    assert torch.equal(weight, moved) and expected.abs().max() > 1e-2
    assert slopes([weight], [before], [gradient * 0], differences).abs().max() == 0


@pytest.mark.parametrize("case", ["tgeo", "tgeo_language"])
def test_the_trainer_takes_that_gradient(case, tmp_path):
    """Of the controller's weights, through the step of the student as the trainer makes it."""
    trainer = make_trainer(case, tmp_path, 4, 2, max_steps=1)
    (objective,) = trainer._stateful
    loss = objective.loss
    # So that the ratios depend on the features.
    loss.controller.weights += 0.3 * draw(len(loss.controller.weights), seed=5).float()
    weights, taken, seen = loss.controller.weights.clone(), [], {}
    loss.controller.step = taken.append
    end, batches = loss._end, loss._validation_batches

    def kept():
        seen["validation"] = list(batches())
        return iter(seen["validation"])

    def ending():
        seen["step"] = loss._step
        return end()

    loss._validation_batches = kept
    for callback in trainer.callback_handler.callbacks:
        if hasattr(callback, "_end"):
            callback._end = ending
    start = {name: p.detach().clone().requires_grad_() for name, p in trainer.model.named_parameters()}
    # Other kernels have no second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        train(trainer)

    def logits_of(values, batch):
        given = {name: value for name, value in batch.items() if name != "labels"}
        return trainer.predictions(functional_call(trainer.model.eval(), values, kwargs=given), batch)

    weights.requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):
        count, total = sum(len(labels) for _, _, labels, _ in seen["step"].batches), 0
        for inputs, teacher, labels, features in seen["step"].batches:
            ratio = loss.controller(features, weights)
            kl, entropy = gaps(logits_of(start, inputs)[0], teacher, labels, loss.temperature)
            total = total + (ratio * kl + (1 - ratio) * entropy).sum() / count
        gradients = torch.autograd.grad(total, list(start.values()), create_graph=True, allow_unused=True)
        after = {n: p if g is None else p - 0.05 * g for (n, p), g in zip(start.items(), gradients)}
        pairs = [logits_of(after, batch) for batch in seen["validation"]]
        validation = F.cross_entropy(torch.cat([p[0] for p in pairs]), torch.cat([p[1] for p in pairs]))
        (expected,) = torch.autograd.grad(validation, weights)
    assert expected.abs().max() > 1e-6
    assert (taken[0] - expected).norm() < 0.01 * expected.norm()


def test_the_controller_starts_undecided_and_follows_its_gradient():
    controller = Controller(SCALARS, learning_rate=0.1)
    features = draw(6, SCALARS).float()
    assert (controller(features) == 0.5).all()
    for _ in range(30):
        # The first three samples should count less, the others more.
        controller.step(controller.gradient(features, torch.tensor([1.0, 1, 1, -1, -1, -1])))
    ratio = controller(features)
    assert ratio[:3].max() < 0.35 and ratio[3:].min() > 0.65
    assert ratio.min() >= 0.05 and ratio.max() <= 0.95
    alike = controller(features[:1].expand(4, -1))
    assert (alike == alike[0]).all()


def test_features_tell_where_the_three_stand():
    certain = 50 * F.one_hot(torch.tensor([1]), 4).double()
    unknowing = torch.zeros(1, 4, dtype=torch.float64)
    found = scalar_features(unknowing, certain, torch.tensor([1]))[0]
    #         S-T   S-G   T-G  JSD     p_S   p_T  H_S  H_T
    jsd = (-(0.625 * torch.tensor(0.625).log2() + 0.375 * torch.tensor(0.125).log2()) - 1).item()
    torch.testing.assert_close(found, torch.tensor([0.75, 0.75, 0.0, jsd, 0.25, 1.0, 1.0, 0.0], dtype=torch.float64))
    same = scalar_features(certain, certain, torch.tensor([0]))[0]
    torch.testing.assert_close(same, torch.tensor([0, 2.0, 2, 0, 0, 0, 0, 0], dtype=torch.float64))
    vectors = vector_features(unknowing, certain, torch.tensor([2]), torch.full((1, 4), 0.25))[0].view(9, 4)
    rows = [unknowing[0] + 0.25, F.one_hot(torch.tensor(1), 4), F.one_hot(torch.tensor(2), 4), unknowing[0] + 0.25]
    s, t, g, m = (row.double() for row in rows)
    expected = [s, t, g, m, *((a - b) ** 2 for a, b in ((m, s), (g, s), (t, s), (t, g), (m, g)))]
    torch.testing.assert_close(vectors, torch.stack(expected))


def test_a_teachers_top_k_is_as_good_where_it_holds_everything():
    student, teacher, labels = draw(4, 5).float(), draw(4, 5, seed=1).float(), torch.tensor([0, 3, 1, 4])
    whole = TopK.of(teacher, 5, labels)
    for found, expected in zip(gaps(student, whole, labels, 1.0), gaps(student, teacher, labels, 1.0)):
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(scalar_features(student, whole, labels), scalar_features(student, teacher, labels))
    part = TopK.of(teacher, 2, labels, temperature=1.5)
    assert (gaps(student, part, labels, 1.5)[0] < gaps(student, teacher, labels, 1.5)[0]).all()
    found = scalar_features(student, part, labels)
    torch.testing.assert_close(found, scalar_features(student / 1.5, TopK.of(teacher / 1.5, 2, labels), labels))
    torch.testing.assert_close(found[:, 5], (teacher / 1.5).softmax(-1).gather(-1, labels[:, None])[:, 0])
    with pytest.raises(FuseError, match="lacks the labels"):
        scalar_features(student, TopK.of(teacher, 2), labels)


def test_a_cache_of_all_tokens_is_the_teacher(tmp_path):
    rows, objectives = (
        language_data(20),
        {"task": 0.0, "tgeo": {"temperature": 1.0, "update_every": 1, "held_out": 0.2}},
    )
    whole = write_cache(tmp_path / "whole", rows, llama(initializer_range=0.3), k=32)
    settings = {"objectives": objectives, "max_steps": 4}
    cached, live = (
        train(make_trainer("tgeo_language", tmp_path, 8, 1, **settings, **teacher))
        for teacher in ({"teacher": lambda: str(whole)}, {})
    )
    for one, other in zip(cached[0], live[0], strict=True):
        assert one == pytest.approx(other, rel=2e-3)  # fp16


def test_class_means_are_the_teachers(tmp_path):
    trainer = make_trainer(
        "tgeo", tmp_path, 6, 2, max_steps=2, objectives={"task": 0, "tgeo": {"held_out": 0.25}}, data=images()
    )
    (objective,) = trainer._stateful
    assert len(trainer.train_dataset) == 12
    # Each step sees the whole training set, so that the average doesn't move.
    train(trainer)
    rows = [trainer.train_dataset[index] for index in range(12)]
    with torch.no_grad():
        theirs = vit(7).eval()(torch.stack([row["pixel_values"] for row in rows])).logits.softmax(-1)
    labels = torch.tensor([row["labels"] for row in rows])
    expected = torch.stack([theirs[labels == label].mean(0) for label in range(3)])
    torch.testing.assert_close(objective.loss.class_means_CC, expected)


def test_it_may_begin_later(tmp_path):
    later = {"weight": {"start": 0.0, "end": 1.0, "after": 2, "until": 2}, "update_every": 1, "held_out": 0.2}
    trainer = make_trainer("tgeo", tmp_path, 8, 1, objectives={"task": 1.0, "tgeo": later}, max_steps=3)
    weights = trainer._stateful[0].loss.controller.weights.clone()
    logs, _ = train(trainer)
    assert ["tgeo" in entry for entry in logs[:3]] == [False, False, True]
    assert not torch.equal(weights, trainer._stateful[0].loss.controller.weights)


def test_ratios_go_to_whoever_is_right(tmp_path):
    """The teacher takes class 0 for class 1, half of the labels of the others are wrong."""
    random = torch.Generator().manual_seed(0)
    truth = torch.randint(3, (96,), generator=random)
    pixels = 0.3 * torch.randn(96, 3, 4, 4, generator=random)
    pixels[torch.arange(96), truth] += 1.0
    wrong = (torch.rand(96, generator=random) < 0.5) & (truth > 0)
    given = torch.where(wrong, 3 - truth, truth)
    rows = [{"pixel_values": pixel, "labels": int(label)} for pixel, label in zip(pixels, given)]
    teacher = vit(7)
    optimizer = torch.optim.Adam(teacher.parameters(), 1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        teacher(pixels, labels=truth.clamp(min=1)).loss.backward()
        optimizer.step()
    settings = {"update_every": 1, "held_out": 0.2, "learning_rate": 0.05}
    trainer = make_trainer(
        "tgeo", tmp_path, 24, 1, data=rows, teacher=lambda: teacher, max_steps=30, logging_steps=30,
        objectives={"task": 0.0, "tgeo": settings},
    )  # fmt: skip
    loss = trainer._stateful[0].loss
    loss._validation = [{"pixel_values": pixel, "labels": int(label)} for pixel, label in zip(pixels[:24], truth)]
    train(trainer)
    with torch.no_grad():
        ratio = loss.controller(loss._features(trainer.model.eval()(pixels).logits, teacher(pixels).logits, given))
    assert ratio[truth == 0].mean() < 0.3 and ratio[wrong].mean() > 0.7
