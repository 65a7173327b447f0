"""RegMean on real tasks: digits upright and on their side, an expert for each."""

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

import hf_fuse

TRAINED = 1200


def views(pixels):
    return {"upright": pixels, "turned": pixels.transpose(2, 3)}


def train(model, images, classes, steps, seed):
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    random = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(steps):
        chosen = torch.randint(len(images), (64,), generator=random)
        model(pixel_values=images[chosen], labels=classes[chosen]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """Folders of the experts and of their training images, and held-out images and classes by task."""
    root = tmp_path_factory.mktemp("digits")
    pixels, classes = load_digits(return_X_y=True)
    pixels, classes = torch.tensor(pixels.reshape(-1, 1, 8, 8) / 16, dtype=torch.float32), torch.tensor(classes)
    names = {"id2label": {k: str(k) for k in range(10)}, "label2id": {str(k): k for k in range(10)}}
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = ViTForImageClassification(
        ViTConfig(**size, **names, image_size=8, patch_size=4, num_channels=1, hidden_dropout_prob=0.0)
    )
    seen, labels = views(pixels[:TRAINED]), classes[:TRAINED]
    base = {name: value.clone() for name, value in model.state_dict().items()}
    for number, (task, images) in enumerate(seen.items()):
        model.load_state_dict(base)
        train(model, images, labels, 200, seed=number)
        model.save_pretrained(root / task)
        for k in range(128):
            file = root / f"{task}-images" / "train" / str(int(labels[k])) / f"{k}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((images[k, 0] * 255).round().to(torch.uint8).numpy()).save(file)
    held_out = {task: (images, classes[TRAINED:]) for task, images in views(pixels[TRAINED:]).items()}
    return root, held_out


@torch.no_grad()
def accuracy(folder, held_out):
    """The mean over both tasks."""
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    right = [(model(pixel_values=x).logits.argmax(-1) == y).float().mean().item() for x, y in held_out.values()]
    return sum(right) / len(right)


def test_regmean_keeps_more_of_both_tasks_than_the_mean(experts, tmp_path):
    root, held_out = experts
    models = []
    for task in held_out:
        recipe = {"estimator": "gram", "model": str(root / task), "data": str(root / f"{task}-images")}
        folder = hf_fuse.learn(recipe | {"examples": 128}, tmp_path / f"gram-{task}")
        models.append({"path": str(root / task), "statistics": str(folder)})
    plain = [model["path"] for model in models]
    mean = accuracy(hf_fuse.merge({"method": "linear", "models": plain}, tmp_path / "mean"), held_out)
    regmean = accuracy(hf_fuse.merge({"method": "regmean", "models": models}, tmp_path / "regmean"), held_out)
    assert regmean > mean + 0.05
