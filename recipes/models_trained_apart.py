"""Two small ViTs trained apart on digits: what their mean is worth as it is, and after an alignment.

    python recipes/models_trained_apart.py             # three pairs, a minute or two
    python recipes/models_trained_apart.py --pairs 1 --steps 20

Prints accuracy on held-out digits: of the models, of their mean after each alignment, and of merges by PLeaS.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import mean, stdev

import torch
import transformers
from sklearn.datasets import load_digits

import hf_fuse

HELD_OUT = 397
ROWS = {
    "mean after weight_matching": ("weight_matching", {}),
    "mean after activation_matching": ("activation_matching", {}),
    "optimal_transport, weights": ("optimal_transport", {}),
    "optimal_transport, activations": ("optimal_transport", {"metric": "activations"}),
    "pleas without least squares": ("pleas", {"least_squares": False}),
    "pleas": ("pleas", {}),
    "pleas, half of the neurons apart": ("pleas", {"width": 0.5}),
}


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Images ``[N, 1, 8, 8]`` in 0..1, as the library makes them of 8-bit images, and their labels, shuffled."""
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return torch.tensor(pixels).float().view(-1, 1, 8, 8)[order] * 15 / 255, torch.tensor(labels)[order]


def train(folder: Path, seed: int, steps: int) -> Path:
    pixels, labels = digits()
    torch.manual_seed(seed)
    config = transformers.ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4,
        num_channels=1, num_labels=10, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        rows = torch.randint(HELD_OUT, len(labels), (64,))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(pixels[rows]).logits, labels[rows]).backward()
        optimizer.step()
        schedule.step()
    model.save_pretrained(folder)
    return folder


def write_images(file: Path, count: int) -> None:
    """Training digits, as a dataset of images: what the models are watched on."""
    import datasets
    from PIL import Image

    pixels, labels = (values[HELD_OUT : HELD_OUT + count] for values in digits())
    images = [Image.fromarray((one[0] * 255).round().byte().numpy()) for one in pixels]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    datasets.Dataset.from_dict({"image": images, "label": labels.tolist()}, features=features).to_parquet(file)


@torch.no_grad()
def accuracy(folder: Path) -> float:
    pixels, labels = (values[:HELD_OUT] for values in digits())
    model = transformers.ViTForImageClassification.from_pretrained(folder).eval()
    return (model(pixels).logits.argmax(-1) == labels).float().mean().item()


def measure(folder: Path, seed: int, steps: int, examples: int) -> dict[str, float]:
    """All rows for one pair of models."""
    one, other = (train(folder / f"model-{number}", 2 * seed + number, steps) for number in (0, 1))
    write_images(folder / "digits.parquet", examples)

    def averaged(second: Path, name: str) -> float:
        recipe = {"method": "linear", "models": [str(one), str(second)]}
        return accuracy(hf_fuse.merge(recipe, folder / f"{name} mean"))

    found = {"models": (accuracy(one) + accuracy(other)) / 2, "mean": averaged(other, "plain")}
    for name, (method, parameters) in ROWS.items():
        recipe = {"method": method, "model": str(other), "reference": str(one), "parameters": parameters}
        if method in ("activation_matching", "pleas") or "metric" in parameters:
            recipe |= {"data": str(folder / "digits.parquet"), "examples": examples, "batch_size": 100}
        made = hf_fuse.align(recipe, folder / name).output
        found[name] = averaged(made, name) if method.endswith("matching") else accuracy(made)
    return found


def main(arguments: list[str] | None = None) -> dict[str, list[float]]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--examples", type=int, default=400)
    options = parser.parse_args(arguments)
    columns: dict[str, list[float]] = {}
    for seed in range(options.pairs):
        with tempfile.TemporaryDirectory() as folder:
            for name, value in measure(Path(folder), seed, options.steps, options.examples).items():
                columns.setdefault(name, []).append(value)
    print("| accuracy | mean | ± |\n|---|---|---|")
    for name, values in columns.items():
        print(f"| {name} | {mean(values):.3f} | {stdev(values) if len(values) > 1 else 0:.3f} |")
    return columns


if __name__ == "__main__":
    main()
