"""Memory and time of one gradient of merging coefficients, against the size of the model.

``python recipes/benchmarks/coefficients.py --work-dir /tmp/coefficients``. Each measurement is a process of its own: a
live model is filled with the merged weights, and a backward pass gives the gradient of a coefficient per model
and tensor. ``contraction`` streams the task vectors from their files; ``autograd`` (with ``--autograd``) builds every
merged tensor in one graph and holds all models, as a plain implementation does; ``model`` only loads the model and runs
it forwards, which is the least that anything can take. Memory is the peak above what the process has after importing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

from checkpoint_family import FamilySize, build_family
from process_usage import SAMPLE_SECONDS, anonymous_bytes

MEGABYTE = 10**6
WIDTHS = {"bfloat16": 2, "float32": 4}
DIMENSIONS = ("layers", "hidden", "intermediate", "heads", "kv_heads", "vocab")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--work-dir", type=Path, required=True, help="where the models are kept")
    parser.add_argument("--models", type=int, nargs="+", default=[1, 2, 4], help="how many task vectors")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=WIDTHS, default="bfloat16", help="of the live model")
    parser.add_argument(
        "--autograd", action="store_true", help="measure the plain way too; it needs K times the memory"
    )
    parser.add_argument("--json", type=Path, help="write the figures there")
    sizes = {"layers": 8, "hidden": 1024, "intermediate": 2816, "heads": 8, "kv_heads": 4, "vocab": 16_000}
    for name in DIMENSIONS:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=sizes[name])
    options = parser.parse_args(arguments)
    size = FamilySize(**{name: getattr(options, name) for name in DIMENSIONS}, models=max(options.models), shards=1)
    build_family(size, options.work_dir)
    largest = max(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in size.tensors().values())
    width = WIDTHS[options.dtype]
    whole = width * size.parameters
    least = whole + width * largest
    print(
        f"model {whole / MEGABYTE:.0f} MB in {options.dtype} ({size.parameters / 1e6:.0f}M numbers), largest gradient"
    )
    print(f"{width * largest / MEGABYTE:.0f} MB, {options.tokens} tokens, {options.device}")
    print(f"{'way':13}{'models':>7}{'peak MB':>9}{'/ model':>9}{'/ (model + gradient)':>22}{'seconds':>9}")
    rows = []
    ways = [("model", 1), *(("contraction", count) for count in options.models)]
    ways += [("autograd", count) for count in options.models if options.autograd]
    for way, count in ways:
        given = {"way": way, "models": count, "folder": str(options.work_dir), "tokens": options.tokens}
        found = measured(given | {"device": options.device, "dtype": options.dtype})
        row = {
            "way": way,
            "models": count,
            "to_model": found["bytes"] / whole,
            "to_least": found["bytes"] / least,
        }
        rows.append(row | found)
        print(f"{way:13}{count:7}{found['bytes'] / MEGABYTE:9.0f}{row['to_model']:9.2f}{row['to_least']:22.2f}"
              f"{found['seconds']:9.2f}", flush=True)  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps({"size": asdict(size), "rows": rows}, indent=1))
    return 0


def measured(given: dict) -> dict:
    # Freed blocks go back at once, as they do on a device's allocator, so that the peak is that of live tensors.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
    command = [sys.executable, __file__, "--child", json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(done.stderr.strip() or f"The measurement {given} was killed: too little memory?")
    return json.loads(done.stdout.splitlines()[-1])


def gradient(way: str, models: int, folder: str, tokens: int, device: str, dtype: str) -> dict:
    """Bytes and seconds of one gradient, and the gradient's norm."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    import hf_fuse
    from hf_fuse.merge.columns import columns
    from hf_fuse.merge.contraction import Contraction
    from hf_fuse.merge.stream import Merger

    base, tuned = f"{folder}/base", [f"{folder}/tuned-{number}" for number in range(1, models + 1)]
    plan = hf_fuse.plan({"method": "task_arithmetic", "base_model": base, "models": tuned})
    merger = Merger(plan.method, {key: p.source for key, p in plan.parents.items()}, plan.units, torch.float32)
    layout, count = columns(plan.units, "tensor")
    ids = torch.arange(3, 3 + tokens, device=device)[None] % 50 + 3

    def loss_of(model: torch.nn.Module) -> torch.Tensor:
        return model(ids, use_cache=False).logits[0, :-1].float().log_softmax(-1).gather(1, ids[0, 1:, None]).mean()

    tiny = AutoConfig.from_pretrained(base, num_hidden_layers=1, hidden_size=64, intermediate_size=64)
    loss_of(AutoModelForCausalLM.from_config(tiny, dtype=getattr(torch, dtype)).to(device)).backward()
    with Peak(device) as peak:
        start = time.perf_counter()
        live = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype)).to(device).eval()
        start_KG = torch.full((models, count), 0.3)
        if way == "model":
            with torch.no_grad():
                for parameter in live.parameters():
                    parameter.mul_(1)  # a mapped file becomes memory when it is written
                norm = loss_of(live).item()
        elif way == "contraction":
            with Contraction(live, merger, plan.units, layout, count) as contraction:
                contraction.write(start_KG)
                loss_of(live).backward()
                norm = contraction.taken_gradient().norm().item()
        else:
            norm = plain(live, tuned, start_KG, layout, loss_of)
        seconds = time.perf_counter() - start
    return {"bytes": peak.bytes, "seconds": seconds, "norm": norm}


def plain(live, tuned, start_KG, layout, loss_of) -> float:
    """The gradient through one graph of merged tensors."""
    import torch
    from safetensors.torch import load_file

    leaf_KG = start_KG.requires_grad_()
    parameters = dict(live.named_parameters())
    merged = {name: value.detach() for name, value in parameters.items()}
    for k, folder in enumerate(tuned):
        for name, values in load_file(f"{folder}/model.safetensors").items():
            delta = values.to(parameters[name]) - parameters[name].detach()
            merged[name] = merged[name] + leaf_KG[k, layout[name].first].to(delta) * delta

    class Called(torch.nn.Module):
        def forward(self, *arguments, **options):
            return torch.func.functional_call(live, merged, arguments, options)

    loss_of(Called()).backward()
    return leaf_KG.grad.norm().item()


class Peak:
    """Largest memory while it is open, above what there was before."""

    def __init__(self, device: str):
        self.device, self.bytes, self._done = device, 0, threading.Event()

    def __enter__(self) -> Peak:
        self._before = self._now()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.bytes = max(self.bytes, self._now() - self._before)

    def _now(self) -> int:
        if self.device == "cpu":
            return anonymous_bytes(os.getpid())
        import torch

        return torch.cuda.max_memory_allocated()

    def _watch(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS / 4):
            self.bytes = max(self.bytes, self._now() - self._before)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(gradient(**json.loads(sys.argv[2]))))
    else:
        raise SystemExit(main())
