"""Memory and time of distillation losses computed in chunks, against whole ``[tokens, vocabulary]`` logits.

``python recipes/benchmarks/distill.py``. Each measurement is a process of its own: forward and backward pass of the two
output layers and the loss, from the hidden states of student and teacher on. Ratios are chunked to whole of one run.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

MEBIBYTE = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[32000, 128256, 151936])
    parser.add_argument("--methods", nargs="+", default=["forward_kl"], help="distillation methods")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=256, help="of the student; the teacher's is twice as wide")
    parser.add_argument("--chunk-sizes", type=int, nargs="+", default=[256])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(step(**json.loads(options.child))))
        return
    where = "extra peak RSS" if options.device == "cpu" else "extra peak of allocated device memory"
    print(f"{options.tokens} tokens, student {options.hidden} wide, fp32, {options.device}; memory: {where}, without")
    print("the gradients of the inputs and the layer; seconds: CPU time of this thread, or wall time of a device")
    print(f"{'method':15}{'vocabulary':>11}{'chunk':>7}{'MiB':>9}{'ratio':>8}{'seconds':>9}{'ratio':>8}  differences")
    for method in options.methods:
        for vocabulary in options.vocabularies:
            given = {"method": method, "vocabulary": vocabulary, "tokens": options.tokens, "hidden": options.hidden}
            given["device"] = options.device
            whole = measured(given | {"chunk_size": 0})
            for chunk_size in (0, *options.chunk_sizes):
                found = measured(given | {"chunk_size": chunk_size}) if chunk_size else whole
                apart = [abs(found[name] / whole[name] - 1) for name in ("loss", "gradient")]
                print(
                    f"{method:15}{vocabulary:11}{chunk_size or 'whole':>7}{found['bytes'] / MEBIBYTE:9.0f}"
                    f"{found['bytes'] / whole['bytes']:8.3f}{found['seconds']:9.2f}"
                    f"{found['seconds'] / whole['seconds']:8.2f}  loss {apart[0]:.0e}, gradient {apart[1]:.0e}",
                    flush=True,
                )


def measured(given: dict) -> dict:
    # Freed blocks go back at once, as they do on a device's allocator, so that the peak is that of live tensors.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(MEBIBYTE)}
    command = [sys.executable, __file__, "--child", json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(done.stderr.strip() or f"The measurement {given} was killed: too little memory?")
    return json.loads(done.stdout)


def step(method: str, vocabulary: int, tokens: int, hidden: int, chunk_size: int, device: str) -> dict:
    """One forward and backward pass: extra bytes, seconds, the loss and the norm of the layer's gradient."""
    import torch

    from hf_fuse import registry
    from hf_fuse.distill.chunked import chunked_sum

    torch.manual_seed(0)
    loss_of = registry.get("distill", method).function
    labelled = "labels_N" in loss_of.__code__.co_varnames[: loss_of.__code__.co_argcount]
    hidden_ND = torch.randn(tokens, hidden, device=device, requires_grad=True)
    teacher_ND = torch.randn(tokens, 2 * hidden, device=device)
    labels_N = torch.randint(vocabulary, (tokens,), device=device)
    head = torch.nn.Linear(hidden, vocabulary, bias=False, device=device)
    teacher_head = torch.nn.Linear(2 * hidden, vocabulary, bias=False, device=device)
    for parameter in (hidden_ND, head.weight):
        parameter.grad = torch.zeros_like(parameter)

    def loss(hidden_ND, teacher_ND, labels_N):
        with torch.no_grad():
            teacher_NV = teacher_head(teacher_ND)
        return loss_of(head(hidden_ND), teacher_NV, *([labels_N] if labelled else []))

    if device != "cpu":
        # Libraries are loaded on the first call.
        (loss(hidden_ND[:1], teacher_ND[:1], labels_N[:1]) * 0).backward()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    clock = time.process_time if device == "cpu" else time.perf_counter
    before = resident() if device == "cpu" else torch.cuda.memory_allocated()
    start = clock()
    rows = hidden_ND, teacher_ND, labels_N
    value = (chunked_sum(loss, *rows, chunk_size=chunk_size) if chunk_size else loss(*rows)) / tokens
    value.backward()
    if device != "cpu":
        torch.cuda.synchronize()
    seconds = clock() - start
    if device == "cpu":
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    else:
        peak = torch.cuda.max_memory_allocated()
    gradient = head.weight.grad.norm().item()
    return {"bytes": peak - before, "seconds": seconds, "loss": value.item(), "gradient": gradient}


def resident() -> int:
    status = Path("/proc/self/statm").read_text()
    return int(status.split()[1]) * resource.getpagesize()


if __name__ == "__main__":
    main()
