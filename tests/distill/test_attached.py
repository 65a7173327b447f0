"""Objectives with heads, peers, views, histories and earlier selves: numbers, layouts, checkpoints and refusals."""

import pytest
import torch
import torch.nn.functional as F
from attached_cases import CASES, images, make_trainer, vit
from safetensors.torch import load_file
from training_cases import bert, classes_data, llama, train
from transformers import ViTForImageClassification

from hf_fuse import DistillConfig, FuseConfig, registry
from hf_fuse.distill.attached._views import aggregated, further_views, joint_labels
from hf_fuse.distill.attached.mdcs import mdcs_loss
from hf_fuse.distill.attached.mutual import mutual_loss
from hf_fuse.distill.methods.forward_kl import forward_kl
from hf_fuse.errors import FuseError, RecipeError

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def loss_of(trainer):
    return trainer._stateful[0].loss


def same(one, other, *, to=1e-6):
    for left, right in zip(one[0], other[0], strict=True):
        assert right == pytest.approx(left, rel=2e-5, abs=2e-5)
    for name, value in one[1].items():
        assert (value - other[1][name]).abs().max() < to, name


# ---- layouts and checkpoints


@pytest.mark.parametrize("case", CASES)
def test_accumulation_changes_nothing(case, tmp_path):
    whole = train(make_trainer(case, tmp_path, 8, 1, max_steps=4))
    same(whole, train(make_trainer(case, tmp_path, 2, 4, max_steps=4)))
    term = case.split("_")[0]
    assert whole[0][3][term] > 0 and f"eval_{term}" not in whole[0][-1]


@pytest.mark.parametrize("case", ["saf", "mesa", "mutual", "lsskd", "tgeo"])
def test_resuming_goes_on_and_only_the_student_is_saved(case, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 3}
    whole = train(make_trainer(case, tmp_path, 8, 1, **settings))
    saved = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    assert len(saved) == len(vit().state_dict())
    resumed = make_trainer(case, tmp_path, 8, 1, **settings)
    same(train(resumed, resume_from_checkpoint=str(tmp_path / "checkpoint-3")), whole)
    last = ViTForImageClassification.from_pretrained(tmp_path / "checkpoint-5").state_dict()
    assert all(torch.equal(last[name], value) for name, value in whole[1].items())


# ---- SAF and MESA


def test_the_trajectory_loss_of_the_specification():
    then, now = torch.tensor([[1.0, 0.5, 0]]), torch.tensor([[2.0, 0, 0]])
    assert forward_kl(now, then, temperature=5.0).item() == pytest.approx(0.2068, abs=5e-5)


def test_a_student_that_stands_still_is_where_it_was(tmp_path):
    for case in ("saf", "mesa", "lsskd"):
        logs, _ = train(make_trainer(case, tmp_path, 8, 1, learning_rate=0.0, max_steps=4))
        # With LSSKD, what is left is the cross-entropy of the heads.
        assert logs[2][case] == pytest.approx(0 if case != "lsskd" else logs[0][case], abs=1e-5)


def test_saf_compares_with_the_epoch_that_it_names(tmp_path):
    """Two batches per epoch; the history of three epochs ago, and nothing before."""
    settings = {"objectives": {"saf": {"gap": 2, "start_epoch": 0, "temperature": 2.0}}, "max_steps": 8}
    trainer = make_trainer("saf", tmp_path, 8, 1, **settings)
    seen, forward = [], trainer._forward

    def recorded(model, inputs):
        answer = forward(model, inputs)
        if model.training:
            seen.append(answer[2].logits.detach().clone())
        return answer

    trainer._forward = recorded
    logs, _ = train(trainer)
    assert [entry["saf"] for entry in logs[:4]] == [0, 0, 0, 0]
    for step in range(4, 8):
        expected = forward_kl(seen[step], seen[step - 4].half().float(), temperature=2.0) / 8
        assert logs[step]["saf"] == pytest.approx(expected.item(), rel=1e-4)
    late = make_trainer("saf", tmp_path, 8, 1, objectives={"saf": {"gap": 1, "start_epoch": 3}}, max_steps=8)
    values = [entry["saf"] for entry in train(late)[0][:8]]
    assert values[:6] == [0] * 6 and values[6] > 0


def test_samples_that_were_never_seen_count_nothing(tmp_path):
    trainer = make_trainer("saf", tmp_path, 8, 1)
    loss, logits, ids = loss_of(trainer), draw(4, 3), torch.arange(4)
    assert loss(logits[:2], None, ids[:2], 0.0) == 0
    expected = forward_kl(2 * logits[:2], logits[:2].half().float(), temperature=5.0) / 4
    assert loss(2 * logits, None, ids, 1.0).item() == pytest.approx(expected.item(), rel=1e-5)
    # Samples 2 and 3 were seen in epoch 1, but not 0 and 1 in epoch 2.
    assert loss(logits, None, ids, 3.5) == 0


def test_mesa_follows_the_average(tmp_path):
    trainer = make_trainer("mesa", tmp_path, 8, 1, max_steps=1)
    _, trained = train(trainer)
    average = loss_of(trainer).average
    for name, value in zip(average._names, average._values()):
        torch.testing.assert_close(value, 0.5 * vit().state_dict()[name] + 0.5 * trained[name])
    pixels = {"pixel_values": draw(2, 3, 4, 4)}
    moved = vit().eval()
    moved.load_state_dict(dict(zip(average._names, average._values())))
    torch.testing.assert_close(average(trainer.model.train(), pixels).logits, moved(**pixels).logits)
    assert trainer.model.training and all(torch.equal(p, trained[n]) for n, p in trainer.model.named_parameters())


# ---- mutual learning


def test_mutual_loss_in_numbers():
    first, second, labels = draw(5, 4), draw(5, 4, seed=1), torch.tensor([0, 1, 2, 3, 0])
    log_p, log_q = first.log_softmax(-1), second.log_softmax(-1)
    both = (log_p.exp() * (log_p - log_q) + log_q.exp() * (log_q - log_p)).sum(-1).mean()
    expected = F.cross_entropy(second, labels) + both
    assert mutual_loss([first, second], labels).item() == pytest.approx(expected.item(), rel=1e-6)
    equal = first.clone().requires_grad_()
    value = mutual_loss([equal, first, first], labels)
    assert value.item() == pytest.approx(2 * F.cross_entropy(first, labels).item(), rel=1e-6)
    assert torch.autograd.grad(value, equal)[0].abs().max() < 1e-7


def test_peers_learn_too_and_start_from_elsewhere(tmp_path):
    trainer = make_trainer("mutual", tmp_path, 8, 1, seed=0)
    peer = loss_of(trainer).peers[0]
    before = {name: value.clone() for name, value in peer.state_dict().items()}
    weight = "vit.embeddings.patch_embeddings.projection.weight"
    assert (before[weight] - vit().state_dict()[weight]).abs().max() > 0.1
    train(trainer)
    assert (before[weight] - peer.state_dict()[weight]).abs().max() > 1e-3
    other = vit(3, hidden_size=8)
    trainer = make_trainer("mutual", tmp_path, 8, 1, peers=[other], max_steps=1)
    train(trainer)
    assert loss_of(trainer).peers[0] is other and other.vit.layernorm.weight.grad is not None
    with pytest.raises(FuseError, match=r"shapes \[8, 3\], \[8, 5\]"):
        train(make_trainer("mutual", tmp_path, 8, 1, peers=[vit(num_labels=5)]))


# ---- views


def test_joint_answers_of_two_views():
    # Rows: the views; columns: class 0 in view 0, class 0 in view 1, class 1 in view 0, class 1 in view 1.
    joint = torch.tensor([[2.0, 9, 1, 9], [9, 0, 9, 3]])
    torch.testing.assert_close(aggregated(joint, 2), torch.tensor([[1.0, 2.0]]))
    torch.testing.assert_close(aggregated(joint[:1, ::2], 1), torch.tensor([[2.0, 1.0]]))
    assert joint_labels(torch.tensor([0, 1]), 2).tolist() == [0, 2, 1, 3]


def test_views_are_turned_images_of_the_labelled():
    pixels = draw(3, 3, 4, 4)
    inputs = {"pixel_values": pixels, "labels": torch.tensor([0, -100, 1])}
    turned = further_views(inputs, "rotation")
    assert turned.shape == (6, 3, 4, 4)
    torch.testing.assert_close(turned[2:4].rot90(-2, (-2, -1)), pixels[[0, 2]])
    torch.testing.assert_close(turned[5, :, 0], pixels[2, :, :, 0].flip(-1))
    recoloured = further_views(inputs, "colors")
    assert recoloured.shape == (10, 3, 4, 4)
    assert len({tuple(image.flatten().tolist()) for image in recoloured[::2]} | {tuple(pixels[0].flatten())}) == 6
    with pytest.raises(FuseError, match="square"):
        further_views(inputs | {"pixel_values": pixels[..., :3]}, "rotation")
    with pytest.raises(FuseError, match="three channels"):
        further_views(inputs | {"pixel_values": pixels[:, :1]}, "colors")


@pytest.mark.parametrize("transform", ["rotation", "colors"])
def test_sla_with_self_distillation(transform, tmp_path):
    objectives = {"sla": {"transform": transform, "temperature": 2.0}}
    trainer = make_trainer("sla", tmp_path, 16, 1, objectives=objectives, max_steps=1)
    head, model = loss_of(trainer).head, vit()
    rows, views = images(), 4 if transform == "rotation" else 6
    inputs = {"pixel_values": torch.stack([row["pixel_values"] for row in rows])}
    labels = torch.tensor([row["labels"] for row in rows])
    with torch.no_grad():
        every = [inputs["pixel_values"], *further_views(inputs | {"labels": labels}, transform).split(16)]
        answers = [model(view, output_hidden_states=True) for view in every]
        joint = [head(model.vit.layernorm(answer.hidden_states[-1])[:, 0]) for answer in answers]
    entropy = sum(F.cross_entropy(j, labels * views + number) for number, j in enumerate(joint)) / views
    mean = torch.stack([j[:, number::views] for number, j in enumerate(joint)]).mean(0)
    expected = entropy + forward_kl(answers[0].logits, mean, temperature=2.0) / 16
    logs, _ = train(trainer)
    assert logs[0]["sla"] == pytest.approx(expected.item(), rel=1e-4)


def test_lsskd_compares_with_the_last_epoch(tmp_path):
    """Two batches per epoch: the third step stands where the past stands, the fourth doesn't."""
    objectives = {"lsskd": {"stages": 2, "stage_weight": 2}}
    trainer = make_trainer("lsskd", tmp_path, 8, 1, max_steps=4, objectives=objectives)
    loss, labels = loss_of(trainer), torch.tensor([row["labels"] for row in images()])
    inputs = {"pixel_values": torch.stack([row["pixel_values"] for row in images()]), "labels": labels}
    pixels = torch.cat([inputs["pixel_values"], further_views(inputs, "rotation")])
    kept, forward = [], loss.forward

    def recorded(**given):
        answers = trainer.model(pixels, output_hidden_states=True)
        pooled = [answers.hidden_states[layer].mean(1) for layer in (1, 2)]
        kept.append([head(p).detach() for head, p in zip(loss.heads.heads, pooled)] + [answers.logits.detach()])
        return forward(**given)

    loss.forward = recorded
    logs, _ = train(trainer)
    halves = torch.arange(64).view(4, 2, 8).transpose(0, 1).flatten(1)
    targets = torch.cat([labels * 4 + view for view in range(4)])

    def entropy(step):
        rows = halves[step % 2]
        return sum(F.cross_entropy(stage[rows], targets[rows]) for stage in kept[step][:2]).item()

    for step in (0, 1, 2):
        assert logs[step]["lsskd"] == pytest.approx(entropy(step), rel=1e-4)
    rows = halves[1]
    apart = [forward_kl(now[rows], then[rows], temperature=3.0).item() / 32 for now, then in zip(kept[3], kept[2])]
    assert logs[3]["lsskd"] == pytest.approx(entropy(3) + 2 * (apart[0] + apart[1]) + apart[2], rel=1e-4)
    assert apart[2] > 1e-3


# ---- MDCS


def test_experts_see_the_classes_as_often_as_they_are_made_to():
    weak, strong, labels = draw(6, 3, 4), draw(6, 3, 4, seed=1), torch.tensor([0, 1, 2, 3, 0, 1])
    adjustments = (-0.5, 1.0, 2.5)
    balanced = mdcs_loss(weak, strong, labels, torch.full((4,), 7), adjustments, consistency=0.0)
    plain = sum(F.cross_entropy(view[:, k], labels) for view in (weak, strong) for k in range(3)) / 2
    assert balanced.item() == pytest.approx(plain.item(), rel=1e-5)
    counts = torch.tensor([100, 10, 1, 0])
    shift = torch.tensor([100.0, 10, 1, 1]).log()
    views = [[view[:, k] + weight * shift for k, weight in enumerate(adjustments)] for view in (weak, strong)]
    entropies = sum(F.cross_entropy(expert, labels) for view in views for expert in view) / 2
    consistent = 0.0
    for first, second in zip(*views):
        right = first.argmax(-1) == labels
        consistent += forward_kl(second[right], first[right]).item() / max(right.sum().item(), 1)
    value = mdcs_loss(weak, strong, labels, counts, adjustments, consistency=0.6)
    assert value.item() == pytest.approx(entropies.item() + 0.6 * consistent, rel=1e-5) and consistent > 0


def test_where_no_sample_is_right_nothing_is_consistent():
    weak = torch.zeros(2, 3, 4)
    weak[..., 1] = 5.0
    args = (torch.zeros(2, 3, 4), torch.tensor([0, 0]), torch.ones(4), (0.0, 0.0, 0.0))
    assert mdcs_loss(weak, *args, consistency=1.0) == mdcs_loss(weak, *args, consistency=0.0)


def test_the_student_is_the_mean_of_the_experts(tmp_path):
    trainer = make_trainer("mdcs", tmp_path, 8, 1)
    train(trainer)
    loss = loss_of(trainer)
    logits, features = draw(5, 3), draw(5, 16, seed=1)
    experts = loss._experts(logits, features)
    torch.testing.assert_close(experts.mean(1), logits)
    assert (experts[:, 0] - experts[:, 2]).abs().max() > 0.01


# ---- settings


def test_names_options_and_refusals(tmp_path):
    for name in ("saf", "mesa", "mutual", "sla", "lsskd", "mdcs", "tgeo"):
        assert name in registry.names("attached")
        found = DistillConfig(str(tmp_path), use_cpu=True, objectives={name: 1.0}).read_objectives()[1]
        assert [objective.mean_over for objective in found] == ["predictions"]
    with pytest.raises(RecipeError, match="no loss 'saf' in FuseConfig. Use DistillConfig and DistillTrainer"):
        FuseConfig(str(tmp_path), use_cpu=True, objectives={"saf": 1.0})
    with pytest.raises(RecipeError, match="no parameter 'decoy'. Did you mean 'decay'"):
        make_trainer("mesa", tmp_path, 8, 1, objectives={"mesa": {"decoy": 1}})

    def refused(match, case, **changes):
        with pytest.raises(FuseError, match=match):
            make_trainer(case, tmp_path, 8, 1, **changes)

    refused("too large. Use mesa", "saf", model=llama)
    refused("counts from epoch 5 on, but there are 3", "saf", objectives={"saf": 0.3}, max_steps=-1)
    refused("counts from epoch 3 on", "mesa", objectives={"mesa": {"start_epoch": 3}}, max_steps=-1)
    refused("needs a training set that has a length", "saf", data=iter(images()))
    for case in ("sla", "lsskd"):
        refused("turns images; BertForSequenceClassification", case, model=bert, data=classes_data())
    refused("tgeo: needs a teacher", "tgeo", teacher=lambda: None)
    refused("learns from one teacher, and 2", "tgeo", teacher=lambda: [vit(1), vit(2)])
    refused("a stream or too small", "tgeo", data=images(2))
    refused("A teacher is given, but no objective", "saf", teacher=vit)
    chunked = {"chunk_size": 4, "model": llama}
    refused("mesa: needs all logits", "mesa", **chunked)
