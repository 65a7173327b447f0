"""The numbers of merges that mergekit files ask for, against each method's formula worked out here again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mergekit_family import State, along, check, depth, merged, write_family
from torch import Tensor


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, State]]:
    return write_family(tmp_path_factory.mktemp("family"))


def arc(v0: Tensor, v1: Tensor, t: float, threshold: float = 0.9995) -> Tensor:
    cosine = (v0 * v1).sum() / v0.norm() / v1.norm()
    if cosine.abs() > threshold:
        return (1 - t) * v0 + t * v1
    angle = torch.acos(cosine)
    return (torch.sin((1 - t) * angle) * v0 + torch.sin(t * angle) * v1) / torch.sin(angle)


def elect(deltas: list[Tensor], weights: list[float], normalize: bool) -> Tensor:
    weighted = torch.stack([delta * weight for delta, weight in zip(deltas, weights)])
    sign = torch.where(weighted.sum(0) >= 0, 1.0, -1.0)
    agree = weighted.sign() == sign
    total = (weighted * agree).sum(0)
    share = sum(mask * weight for mask, weight in zip(agree, weights))
    return total / torch.where(share == 0, 1.0, share) if normalize else total


def trim(delta: Tensor, density: float) -> Tensor:
    keep = max(1, int(density * delta.numel()))
    threshold = delta.abs().flatten().sort(descending=True).values[keep - 1]
    return delta * (delta.abs() >= threshold)


def test_linear_with_gradients_and_filters(tmp_path: Path, family: tuple[Path, dict[str, State]]):
    root, m = family
    result = merged(tmp_path, root, """
        merge_method: linear
        models:
          - {model: ROOT/a, parameters: {weight: [{filter: self_attn, value: [0.1, 0.9, 0.4]},
                                                  {filter: layers.2, value: 0}, {value: [1, 2]}]}}
          - {model: ROOT/b, parameters: {weight: [0.2, 0.6]}}
        dtype: float32
    """)  # fmt: skip
    expected = {}
    for name in m["a"]:
        t = depth(name)
        wa = along([0.1, 0.9, 0.4], t) if "self_attn" in name else 0 if "layers.2" in name else along([1, 2], t)
        wb = along([0.2, 0.6], t)
        expected[name] = (wa * m["a"][name] + wb * m["b"][name]) / (wa + wb)
    check(result, expected)


def test_linear_with_a_base_that_mergekit_adds(tmp_path: Path, family: tuple[Path, dict[str, State]]):
    root, m = family
    result = merged(
        tmp_path,
        root,
        """
        merge_method: linear
        base_model: ROOT/base
        models: [{model: ROOT/a, parameters: {weight: 1.5}}]
        parameters: {weight: -0.25, normalize: [{filter: norm, value: true}, {value: false}]}
    """,
    )
    check(result, {
        name: (1.5 * m["a"][name] - 0.25 * m["base"][name]) / (1.25 if "norm" in name else 1) for name in m["a"]
    })  # fmt: skip


def test_slerp_with_t_by_layer_and_part(tmp_path: Path, family: tuple[Path, dict[str, State]]):
    root, m = family
    result = merged(
        tmp_path,
        root,
        """
        merge_method: slerp
        base_model: ROOT/base
        slices:
          - sources: [{model: ROOT/far, layer_range: [0, 4]}, {model: ROOT/base, layer_range: [0, 4]}]
        parameters:
          t:
            - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
            - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
            - {value: 0.5}
        dtype: float32
    """,
    )
    expected = {}
    for name in m["base"]:
        t = 0.5
        if "self_attn" in name:
            t = along([0, 0.5, 0.3, 0.7, 1], depth(name))
        elif "mlp" in name:
            t = along([1, 0.5, 0.7, 0.3, 0], depth(name))
        expected[name] = arc(m["base"][name], m["far"][name], t)
    check(result, expected)


def test_task_arithmetic_with_lambda_and_a_negative_weight(tmp_path: Path, family: tuple[Path, dict[str, State]]):
    root, m = family
    result = merged(
        tmp_path,
        root,
        """
        merge_method: task_arithmetic
        base_model: ROOT/base
        models:
          - {model: ROOT/base}
          - {model: ROOT/a, parameters: {weight: 0.8}}
          - {model: ROOT/b, parameters: {weight: [-0.5, 0.5, 0.1]}}
        parameters: {lambda: [{filter: mlp, value: [0.5, 1.5]}, {value: 0.9}], int8_mask: true}
        dtype: float32
    """,
    )
    expected = {}
    for name, base in m["base"].items():
        t = depth(name)
        scale = along([0.5, 1.5], t) if "mlp" in name else 0.9
        wb = along([-0.5, 0.5, 0.1], t)
        expected[name] = base + scale * (0.8 * (m["a"][name] - base) + wb * (m["b"][name] - base))
    check(result, expected)


@pytest.mark.parametrize("normalize", [True, False])
def test_ties_trims_each_tensor(tmp_path: Path, family: tuple[Path, dict[str, State]], normalize: bool):
    root, m = family
    result = merged(
        tmp_path,
        root,
        f"""
        merge_method: ties
        base_model: ROOT/base
        models:
          - {{model: ROOT/a, parameters: {{density: [1, 0.7, 0.1], weight: 1.0}}}}
          - {{model: ROOT/b, parameters: {{density: 0.5, weight: [0, 0.3, 0.7, 1]}}}}
          - {{model: ROOT/c, parameters: {{weight: [{{filter: mlp, value: 0.5}}, {{value: 0.2}}]}}}}
        parameters: {{normalize: {str(normalize).lower()}, lambda: 0.8}}
        dtype: float32
    """,
    )
    expected = {}
    for name, base in m["base"].items():
        t = depth(name)
        deltas = [
            trim(m["a"][name] - base, along([1, 0.7, 0.1], t)), trim(m["b"][name] - base, 0.5), m["c"][name] - base,
        ]  # fmt: skip
        weights = [1.0, along([0, 0.3, 0.7, 1], t), 0.5 if "mlp" in name else 0.2]
        expected[name] = base + 0.8 * elect(deltas, weights, normalize)
    check(result, expected)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_at_density_one_drops_nothing(tmp_path: Path, family: tuple[Path, dict[str, State]], method: str):
    root, m = family
    result = merged(
        tmp_path,
        root,
        f"""
        merge_method: {method}
        base_model: ROOT/base
        models: [{{model: ROOT/a, parameters: {{weight: 0.3}}}}, {{model: ROOT/b, parameters: {{weight: 0.9}}}}]
    """,
    )
    expected = {}
    for name, base in m["base"].items():
        deltas = [m["a"][name] - base, m["b"][name] - base]
        total = elect(deltas, [0.3, 0.9], False) if "ties" in method else 0.3 * deltas[0] + 0.9 * deltas[1]
        expected[name] = base + total
    check(result, expected)


def test_dare_keeps_the_l1_norm_of_each_task_vector(tmp_path: Path, family: tuple[Path, dict[str, State]]):
    root, m = family
    result = merged(
        tmp_path,
        root,
        """
        merge_method: dare_linear
        base_model: ROOT/base
        models: [{model: ROOT/a, parameters: {weight: 1, density: 0.5}}]
    """,
    )
    dropped = 0
    for name, base in m["base"].items():
        got, delta = result[name].double() - base, m["a"][name] - base
        torch.testing.assert_close(got.abs().sum(), delta.abs().sum(), rtol=1e-5, atol=1e-5)
        dropped += (got.abs() < 1e-6).sum().item()
    assert 0.4 < dropped / sum(base.numel() for base in m["base"].values()) < 0.6


@pytest.mark.parametrize("rows", [False, True])
def test_model_stock_is_not_clamped(tmp_path: Path, family: tuple[Path, dict[str, State]], rows: bool):
    root, m = family
    result = merged(
        tmp_path,
        root,
        f"""
        merge_method: model_stock
        base_model: ROOT/base
        models: [{{model: ROOT/a}}, {{model: ROOT/b}}, {{model: ROOT/c}}]
        parameters: {{filter_wise: {str(rows).lower()}}}
    """,
    )
    expected, ratios = {}, []
    for name, base in m["base"].items():
        shape = base.shape if rows and base.ndim > 1 else (1, -1)
        d = [(m[key][name] - base).reshape(shape) for key in "abc"]
        cosines = [
            (x * y).sum(-1) / x.norm(dim=-1) / y.norm(dim=-1) for x, y in ((d[0], d[1]), (d[0], d[2]), (d[1], d[2]))
        ]
        cosine = sum(cosines) / 3
        t = (3 * cosine / (1 + 2 * cosine))[:, None]
        ratios.append(t.min().item())
        expected[name] = base + (t * sum(d) / 3).reshape(base.shape)
    assert min(ratios) < 0  # else the test could not tell
    check(result, expected)


@pytest.mark.parametrize(("flags", "axis"), [
    ("", None), ("nuslerp_flatten: false", -1), ("nuslerp_flatten: false, nuslerp_row_wise: true", 0),
])  # fmt: skip
def test_nuslerp(tmp_path: Path, family: tuple[Path, dict[str, State]], flags: str, axis: int | None):
    root, m = family
    text = """
        merge_method: nuslerp
        models: [{model: ROOT/a, parameters: {weight: 0.3}}, {model: ROOT/far, parameters: {weight: [1, 0.5]}}]
        parameters: {FLAGS}
    """
    result = merged(tmp_path, root, text.replace("FLAGS", flags))
    expected = {}
    for name, first in m["a"].items():
        second = m["far"][name]
        w = along([1, 0.5], depth(name))
        t = w / (w + 0.3)
        if axis is None or first.ndim == 1:
            expected[name] = arc(first, second, t, threshold=2)
        else:
            vectors = [arc(x, y, t, threshold=2) for x, y in zip(first.unbind(1 + axis), second.unbind(1 + axis))]
            expected[name] = torch.stack(vectors, dim=1 + axis)
    check(result, expected)


def test_nuslerp_of_task_vectors(tmp_path: Path, family: tuple[Path, dict[str, State]]):
    root, m = family
    result = merged(
        tmp_path,
        root,
        """
        merge_method: nuslerp
        base_model: ROOT/base
        models: [{model: ROOT/a, parameters: {weight: 0.3}}, {model: ROOT/b, parameters: {weight: 0.5}}]
    """,
    )
    check(result, {
        name: base + arc(m["a"][name] - base, m["b"][name] - base, 0.625, threshold=2)
        for name, base in m["base"].items()
    })  # fmt: skip


# --- methods that need no draws, each by its own steps ---------------------------------------------------


def multislerp(vectors: list[Tensor], weights: list[float], base: Tensor | None) -> Tensor:
    """Through the tangent space at the mean direction, as the original goes."""
    origin = torch.zeros_like(vectors[0]) if base is None else base
    shares = [weight / sum(weights) for weight in weights]
    rest = [vector - origin for vector in vectors]
    units = [vector / vector.norm() for vector in rest]
    mean = sum(share * unit for share, unit in zip(shares, units))
    mean = mean / mean.norm()
    tangent = sum(share * (unit - (unit * mean).sum() * mean) for share, unit in zip(shares, units))
    angle = tangent.norm() + 1e-8
    direction = mean * torch.cos(angle) + tangent * (torch.sin(angle) / angle)
    return origin + direction * sum(share * vector.norm() for share, vector in zip(shares, rest))


@pytest.mark.parametrize("base", [False, True])
def test_multislerp(tmp_path: Path, family: tuple[Path, dict[str, State]], base: bool):
    root, m = family
    result = merged(tmp_path, root, f"""
        merge_method: multislerp
        {"base_model: ROOT/base" if base else ""}
        models:
          - {{model: ROOT/a, parameters: {{weight: 0.5}}}}
          - {{model: ROOT/far, parameters: {{weight: [0.2, 0.9]}}}}
          - {{model: ROOT/b, parameters: {{weight: 1}}}}
        parameters: {{eps: 1.0e-8}}
    """)  # fmt: skip
    check(result, {
        name: multislerp(
            [m[key][name] for key in ("a", "far", "b")], [0.5, along([0.2, 0.9], depth(name)), 1.0],
            m["base"][name] if base else None,
        )
        for name in m["a"]
    })  # fmt: skip


def karcher(vectors: list[Tensor], steps: int) -> Tensor:
    norms = [vector.norm() for vector in vectors]
    units = [vector / norm for vector, norm in zip(vectors, norms)]
    mean = sum(units) / len(units)
    mean = mean / mean.norm()
    for _ in range(steps):
        pull = torch.zeros_like(mean)
        for unit in units:
            cosine = (unit * mean).sum()
            angle = torch.acos(cosine.clamp(-1, 1))
            if angle >= 1e-5:
                pull += angle / torch.sin(angle) * (unit - cosine * mean) / len(units)
        size = pull.norm()
        if size < 1e-5:
            break
        mean = torch.cos(size) * mean + torch.sin(size) * pull / size
    return mean * sum(norms) / len(norms)


@pytest.mark.parametrize("steps", [1, 10])
def test_karcher_counts_the_base_as_a_model(tmp_path: Path, family: tuple[Path, dict[str, State]], steps: int):
    root, m = family
    result = merged(tmp_path, root, f"""
        merge_method: karcher
        base_model: ROOT/base
        models: [{{model: ROOT/a}}, {{model: ROOT/far}}]
        parameters: {{max_iter: {steps}}}
    """)  # fmt: skip
    check(result, {name: karcher([m[key][name] for key in ("a", "far", "base")], steps) for name in m["a"]})


def without_tails(delta: Tensor, density: float, gamma: float) -> Tensor:
    """The ``int(density n)`` largest that are left when the ``int(gamma n)`` largest are gone; the density has to be
    reached, so fewer of the largest go if need be."""
    count = delta.numel()
    keep = int(density * count)
    top = min(int(gamma * count), count - keep)
    if density >= 1:
        return delta
    chosen = delta.flatten().abs().sort(descending=True, stable=True).indices[top : top + keep]
    result = torch.zeros_like(delta).flatten()
    result[chosen] = delta.flatten()[chosen]
    return result.view_as(delta)


@pytest.mark.parametrize("method", ["breadcrumbs", "breadcrumbs_ties"])
def test_breadcrumbs(tmp_path: Path, family: tuple[Path, dict[str, State]], method: str):
    root, m = family
    result = merged(tmp_path, root, f"""
        merge_method: {method}
        base_model: ROOT/base
        models:
          - {{model: ROOT/a, parameters: {{density: [0.5, 0.9], gamma: 0.25, weight: 0.7}}}}
          - {{model: ROOT/b, parameters: {{density: 0.6}}}}
          - {{model: ROOT/c, parameters: {{gamma: 0.3}}}}
        parameters: {{weight: 0.4, lambda: 1.5}}
    """)  # fmt: skip
    expected, weights = {}, [0.7, 0.4, 0.4]
    for name, base in m["base"].items():
        deltas = [
            without_tails(m["a"][name] - base, along([0.5, 0.9], depth(name)), 0.25),
            without_tails(m["b"][name] - base, 0.6, 0.01),  # no element of the vectors is the largest hundredth
            m["c"][name] - base,  # density 1 keeps the outliers too
        ]
        total = elect(deltas, weights, False) if "ties" in method else sum(w * d for w, d in zip(weights, deltas))
        expected[name] = base + 1.5 * total
    check(result, expected)


@pytest.mark.parametrize("share", [None, 0.3])
def test_sce(tmp_path: Path, family: tuple[Path, dict[str, State]], share: float | None):
    root, m = family
    result = merged(tmp_path, root, f"""
        merge_method: sce
        base_model: ROOT/base
        models: [{{model: ROOT/a}}, {{model: ROOT/b}}, {{model: ROOT/c}}]
        parameters: {{int8_mask: true{f", select_topk: {share}" if share else ""}}}
    """)  # fmt: skip
    expected = {}
    for name, base in m["base"].items():
        deltas = torch.stack([m[key][name] - base for key in "abc"])
        if share:
            variance = deltas.var(0, correction=0).flatten()
            count = int(share * int((variance != 0).sum()))
            mask = torch.zeros_like(variance)
            mask[variance.topk(count).indices] = 1
            deltas = deltas * mask.view_as(base)
        energy = torch.stack([delta.square().mean() for delta in deltas])
        weights = (energy / energy.sum()).view(-1, *[1] * base.ndim)
        agree = deltas.sign() == torch.where(deltas.sum(0) >= 0, 1.0, -1.0)
        shares = (weights * agree).sum(0)
        expected[name] = base + (deltas * weights * agree).sum(0) / torch.where(shares == 0, 1.0, shares)
    check(result, expected)


@pytest.mark.parametrize("plus", [False, True])
def test_ram(tmp_path: Path, family: tuple[Path, dict[str, State]], plus: bool):
    root, m = family
    result = merged(tmp_path, root, f"""
        merge_method: {"ramplus_tl" if plus else "ram"}
        base_model: ROOT/base
        models: [{{model: ROOT/a}}, {{model: ROOT/b}}, {{model: ROOT/c}}]
        parameters: {{epsilon: 0.25{", r: 0.5, alpha: 0.9" if plus else ""}}}
    """)  # fmt: skip
    expected, boosts = {}, set()
    for name, base in m["base"].items():
        deltas = [m[key][name] - base for key in "abc"]
        changed = [delta.abs() > 0.25 for delta in deltas]
        count = sum(mask.int() for mask in changed)
        total = torch.zeros_like(base)
        for delta, mask in zip(deltas, changed):
            shared, own = int((mask & (count > 1)).sum()), int((mask & (count == 1)).sum())
            boost = 1 + 0.5 * min(shared / own if own else 1e9, 0.9) if plus else 1.0
            boosts.add(round(boost, 6))
            total += torch.where(count == 1, delta * boost, delta / count.clamp(min=1)) * mask
        expected[name] = base + total
    assert len(boosts) > 2 or not plus  # the cap alone would not tell the ratio
    check(result, expected)


def test_nearswap(tmp_path: Path, family: tuple[Path, dict[str, State]]):
    root, m = family
    result = merged(tmp_path, root, """
        merge_method: nearswap
        base_model: ROOT/base
        models: [{model: ROOT/base}, {model: ROOT/a}]
        parameters: {t: [{filter: mlp, value: [0.1, 0.4]}, {value: 0.2}]}
    """)  # fmt: skip
    expected = {}
    for name, base in m["base"].items():
        t = along([0.1, 0.4], depth(name)) if "mlp" in name else 0.2
        share = (t / (base - m["a"][name]).abs()).clamp(0, 1)
        expected[name] = share * m["a"][name] + (1 - share) * base
    check(result, expected)


def test_arcee_fusion(tmp_path: Path, family: tuple[Path, dict[str, State]]):
    root, m = family
    text = "{merge_method: arcee_fusion, base_model: ROOT/base, models: [{model: ROOT/base}, {model: ROOT/a}]}"
    result, expected, taken = merged(tmp_path, root, text), {}, 0
    for name, base in m["base"].items():
        after, before = (x.softmax(-1) + 1e-8 for x in (m["a"][name], base))
        divergence = (after * (after / before).log()).sum(-1, keepdim=True)
        importance = (m["a"][name] - base).abs() * divergence
        ordered = importance.flatten().sort().values
        lower, median, upper = (ordered[int(q * (len(ordered) - 1))] for q in (0.25, 0.5, 0.75))
        mask = importance >= median + 1.5 * (upper - lower)
        taken += int(mask.sum())
        expected[name] = base + (m["a"][name] - base) * mask
    assert 10 < taken < 300
    check(result, expected)


# --- methods that drop at random: our draws, mergekit's distribution -------------------------------------


@pytest.mark.parametrize("method", ["della", "della_linear"])
def test_della_at_density_one_drops_nothing(tmp_path: Path, family: tuple[Path, dict[str, State]], method: str):
    root, m = family
    result = merged(tmp_path, root, f"""
        merge_method: {method}
        base_model: ROOT/base
        models: [{{model: ROOT/a, parameters: {{weight: 0.3}}}}, {{model: ROOT/b, parameters: {{weight: 0.9}}}}]
        parameters: {{lambda: 0.5}}
    """)  # fmt: skip
    expected = {}
    for name, base in m["base"].items():
        deltas = [m["a"][name] - base, m["b"][name] - base]
        linear = 0.3 * deltas[0] + 0.9 * deltas[1]
        expected[name] = base + 0.5 * (linear if "linear" in method else elect(deltas, [0.3, 0.9], True))
    check(result, expected)


def test_della_keeps_large_changes_more_often_and_the_l1_norm(tmp_path: Path, family: tuple[Path, dict[str, State]]):
    root, m = family
    kept_low, kept_high, rows = 0, 0, 0
    for seed in range(6):
        result = merged(tmp_path / str(seed), root, f"""
            merge_method: della_linear
            base_model: ROOT/base
            models: [{{model: ROOT/a, parameters: {{weight: 1, density: 0.5, epsilon: 0.45}}}}]
            seed: {seed}
        """)  # fmt: skip
        for name, base in m["base"].items():
            got, delta = result[name].double() - base, m["a"][name] - base
            torch.testing.assert_close(got.abs().sum(), delta.abs().sum(), rtol=1e-5, atol=1e-5)
            if base.ndim == 2:
                order = delta.abs().argsort(-1)
                kept = (got.abs() > 1e-6).gather(-1, order)
                kept_low, kept_high, rows = kept_low + kept[:, 0].sum(), kept_high + kept[:, -1].sum(), rows + len(kept)
    assert 0 < kept_low / rows < 0.1 and 0.9 < kept_high / rows < 1  # density - epsilon and density + epsilon


def test_every_method_of_mergekit_has_its_test_here():
    from hf_fuse.recipe_mergekit_parameters import METHODS

    source = Path(__file__).read_text() + (Path(__file__).parent / "test_mergekit_structure.py").read_text()
    text = set(source.replace('"', " ").replace("{", " ").replace(",", " ").replace("\n", " ").split())
    assert set(METHODS) <= text, set(METHODS) - text
