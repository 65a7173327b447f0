"""A store of TALL-masks, made and read back."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hf_fuse.errors import CheckpointError, FuseError, OutputError, RecipeError
from hf_fuse.merge.tall_store import compress_tall, extract_tall


def write(folder, state, config=None):
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    return str(folder)


@pytest.fixture
def family(tmp_path):
    """Base and three fine-tunes that change mostly different elements, in bf16; sizes that are no multiple of 8."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"layers.0.w": (300, 1003), "layers.1.w": (7, 11), "norm": (13,), "scale": ()}
    base = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    tuned = []
    for _ in range(3):
        state = {"ids": torch.arange(5)}
        for name, t in base.items():
            change = 0.1 * torch.randn(t.shape, generator=generator)
            if t.ndim:
                change *= torch.rand(t.shape, generator=generator) < 0.3
            state[name] = (t.float() + change).bfloat16()
        tuned.append(state)
    base["ids"] = torch.arange(5)
    states = [base, *tuned]
    paths = [write(tmp_path / name, state) for name, state in zip(("base", "math", "code", "chat"), states)]
    return paths, states


def recipe(paths, **parameters):
    return {"base_model": paths[0], "models": paths[1:], "parameters": parameters}


def expected(states, task, scale=0.4, weights=(1.0, 1.0, 1.0)):
    base, *tuned = states
    result = {"ids": base["ids"], "scale": tuned[task]["scale"]}
    for name in base.keys() - result.keys():
        deltas = [w * (t[name].float() - base[name].float()) for w, t in zip(weights, tuned)]
        total = deltas[0] + deltas[1] + deltas[2]
        mask = deltas[task].abs() > scale * (total - deltas[task]).abs()
        result[name] = (base[name].float() + total.bfloat16().float() * mask).bfloat16()
    return result


def test_restored_models_follow_the_formula(family, tmp_path):
    paths, states = family
    store = compress_tall(recipe(paths), tmp_path / "store")
    for k, task in enumerate(("math", "code", "chat")):
        restored = load_file(extract_tall(store, task, tmp_path / f"out-{task}") / "model.safetensors")
        for name, tensor in expected(states, k).items():
            assert torch.equal(restored[name], tensor), (task, name)
        for name in ("layers.0.w", "layers.1.w"):
            far = (states[0][name].float() - states[k + 1][name].float()).norm()
            near = (restored[name].float() - states[k + 1][name].float()).norm()
            assert near < 0.6 * far


def test_size_and_content_of_the_store(family, tmp_path):
    paths, states = family
    store = compress_tall(recipe(paths), tmp_path / "store")
    count = sum(t.numel() for name, t in states[0].items() if name not in ("ids", "scale"))
    mask = store / "mask-code.safetensors"
    assert count / 8 <= mask.stat().st_size < count / 8 + 600
    assert sum(path.stat().st_size for path in store.iterdir()) < 2 * count + 3 * count / 8 + 5000
    bits = load_file(mask)["layers.1.w"]
    deltas = [s["layers.1.w"].float() - states[0]["layers.1.w"].float() for s in states[1:]]
    total = deltas[0] + deltas[1] + deltas[2]
    assert np.array_equal(
        np.unpackbits(bits.numpy(), bitorder="little")[:77].astype(bool),
        (deltas[1].abs() > 0.4 * (total - deltas[1]).abs()).flatten().numpy(),
    )
    facts = json.loads((store / "store.json").read_text())
    assert facts["kind"] == "tall-masks" and list(facts["tasks"]) == ["math", "code", "chat"]


def test_parameters_dtype_and_names(family, tmp_path):
    paths, states = family
    entries = [{"path": path, "weight": w} for path, w in zip(paths[1:], (0.5, 2.0, 1.0))]
    asked = {"base_model": paths[0], "models": entries, "parameters": {"mask_scale": 0.5}, "out_dtype": "float32"}
    store = compress_tall(asked, tmp_path / "store", tasks=["a", "b", "c"])
    restored = load_file(extract_tall(store, "b", tmp_path / "out") / "model.safetensors")
    base, *tuned = [s["layers.0.w"].float() for s in states]
    deltas = [w * (t - base) for w, t in zip((0.5, 2.0, 1.0), tuned)]
    total = deltas[0] + deltas[1] + deltas[2]
    mask = deltas[1].abs() > 0.5 * (total - deltas[1]).abs()
    assert torch.equal(restored["layers.0.w"], (base + total * mask).bfloat16())


@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_elected_and_trimmed(family, tmp_path, scope):
    from hf_fuse import merge_state_dicts

    paths, states = family
    options = {"density": 0.2, "election": True, "scope": scope}
    store = compress_tall(recipe(paths, **options), tmp_path / "store", workers=2)
    vector = load_file(store / "multitask.safetensors")["layers.0.w"]
    zero = {name: torch.zeros_like(t) for name, t in states[0].items() if name.startswith("layers") or name == "norm"}
    deltas = [{name: s[name].float() - states[0][name].float() for name in zero} for s in states[1:]]
    zero = {name: t.float() for name, t in zero.items()}
    total = merge_state_dicts(deltas, "consensus", base=zero, parameters=options | {"agreement": 0})
    assert torch.equal(vector, total["layers.0.w"].bfloat16())


def test_runs_repeat_to_the_byte(family, tmp_path):
    paths, _ = family
    one = compress_tall(recipe(paths), tmp_path / "one", workers=1)
    two = compress_tall(recipe(paths), tmp_path / "two", workers=3)
    for path in one.iterdir():
        assert path.read_bytes() == (two / path.name).read_bytes()


def test_tied_and_stored_twice(tmp_path):
    generator = torch.Generator().manual_seed(1)

    def state(shift):
        embedding = torch.randn(32, 4, generator=generator)
        if shift is not None:
            embedding = shift + 0.1 * embedding
        return {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding.clone()}

    base = state(None)
    states = [base, *(state(base["lm_head.weight"]) for _ in range(2))]
    config = {"model_type": "llama", "tie_word_embeddings": True}
    paths = [write(tmp_path / f"m{k}", s, config) for k, s in enumerate(states)]
    store = compress_tall(recipe(paths), tmp_path / "store")
    assert list(load_file(store / "multitask.safetensors")) == ["model.embed_tokens.weight"]
    restored = load_file(extract_tall(store, "m1", tmp_path / "out") / "model.safetensors")
    assert torch.equal(restored["lm_head.weight"], restored["model.embed_tokens.weight"])
    assert not torch.equal(restored["lm_head.weight"], base["lm_head.weight"])


def test_what_is_refused(family, tmp_path):
    paths, states = family
    store = compress_tall(recipe(paths), tmp_path / "store")
    with pytest.raises(OutputError, match="exists"):
        compress_tall(recipe(paths), tmp_path / "store")
    with pytest.raises(RecipeError, match="no task 'maths'. Its tasks: chat, code, math"):
        extract_tall(store, "maths", tmp_path / "out")
    with pytest.raises(RecipeError, match="agreement has no meaning"):
        compress_tall(recipe(paths, agreement=1), tmp_path / "other")
    with pytest.raises(RecipeError, match="method: TALL-masks"):
        compress_tall({"method": "ties", **recipe(paths)}, tmp_path / "other")
    with pytest.raises(RecipeError, match="tasks: 'a/b'"):
        compress_tall(recipe(paths), tmp_path / "other", tasks=["a/b", "c", "d"])
    with pytest.raises(RecipeError, match="tokenizer"):
        compress_tall(recipe(paths) | {"tokenizer": "base"}, tmp_path / "other")
    with pytest.raises(CheckpointError, match="no store.json"):
        extract_tall(paths[0], "math", tmp_path / "out")
    with pytest.raises(CheckpointError, match="not the base"):
        extract_tall(store, "math", tmp_path / "out", base=paths[1])
    assert not (tmp_path / "out").exists() and not (tmp_path / "other").exists()


def test_moved_base_and_overwriting(family, tmp_path):
    paths, states = family
    store = compress_tall(recipe(paths), tmp_path / "store")
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(FuseError, match="base"):
        extract_tall(store, "math", tmp_path / "out")
    extract_tall(store, "math", tmp_path / "out", base=str(tmp_path / "moved"))
    out = extract_tall(store, "chat", tmp_path / "out", True, base=str(tmp_path / "moved"))
    assert torch.equal(load_file(out / "model.safetensors")["norm"], expected(states, 2)["norm"])
    card = (out / "README.md").read_text()
    assert "TALL-masks" in card and str(tmp_path) not in card and not (out / "fuse_recipe.yaml").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"kind": "other"}, "kind 'other'"),
        ({"multitask": "../base/model.safetensors"}, "damaged"),
        ({"tasks": {"math": {"mask": "/etc/passwd"}}}, "damaged"),
        ({"base": 3}, "damaged"),
    ],
)
def test_damaged_store(family, tmp_path, change, message):
    paths, _ = family
    store = compress_tall(recipe(paths), tmp_path / "store")
    facts = json.loads((store / "store.json").read_text())
    (store / "store.json").write_text(json.dumps(facts | change))
    with pytest.raises(CheckpointError, match=message):
        extract_tall(store, "math", tmp_path / "out")


def test_masks_of_another_shape(family, tmp_path):
    paths, _ = family
    store = compress_tall(recipe(paths), tmp_path / "store")
    masks = load_file(store / "mask-math.safetensors")
    save_file(masks | {"norm": masks["norm"][:1].clone()}, store / "mask-math.safetensors")
    with pytest.raises(CheckpointError, match="tensor norm does not fit"):
        extract_tall(store, "math", tmp_path / "out")


def test_digits_experts_survive_the_store(tmp_path):
    """Three experts on digits, two of them with shuffled pixels. Restored, they do their tasks almost as before; the
    sum of their changes does none."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    pixels = torch.tensor(digits.images[order] / 16, dtype=torch.float32).flatten(1)
    labels = torch.tensor(digits.target[order])
    generator = torch.Generator().manual_seed(0)
    views = [torch.arange(64), torch.randperm(64, generator=generator), torch.randperm(64, generator=generator)]

    def model():
        return nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))

    def train(start, view, steps):
        torch.manual_seed(0)
        net = model()
        if start is not None:
            net.load_state_dict(start)
        optimizer = torch.optim.Adam(net.parameters(), 1e-3)
        for _ in range(steps):
            part = torch.randint(0, 1200, (64,))
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(pixels[part][:, view]), labels[part]).backward()
            optimizer.step()
        return {name: t.detach() for name, t in net.state_dict().items()}

    def accuracy(state, view):
        net = model()
        net.load_state_dict(state)
        return (net(pixels[1200:, view]).argmax(1) == labels[1200:]).float().mean().item()

    base = train(None, views[0], 150)
    experts = [train(base, view, 200) for view in views]
    paths = [write(tmp_path / f"m{k}", s, {"model_type": "mlp"}) for k, s in enumerate([base, *experts])]
    store = compress_tall(recipe(paths, mask_scale=0.6), tmp_path / "store")
    summed = {name: base[name] + sum(e[name] - base[name] for e in experts) for name in base}
    for k, view in enumerate(views):
        restored = load_file(extract_tall(store, f"m{k + 1}", tmp_path / f"out{k}") / "model.safetensors")
        assert accuracy(experts[k], view) > 0.93
        assert accuracy(restored, view) > accuracy(experts[k], view) - 0.12
        assert accuracy(restored, view) > accuracy(summed, view) + 0.15
