"""Time of fused decoding against the sum of what its models take alone, and against running them anew for each token.

``python recipes/benchmarks/decode.py``. Random Llamas: a large one and small ones of half its width. Every figure is
the least of several runs, ratios are of one process. KV prediction is measured by its first token, for which the large
model alone has to read the whole prompt.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable

import torch
import transformers

from hf_fuse.decode import dynamic_logits_fusion, ensemble, proxy_tuning, scmoe
from hf_fuse.decode.methods.kv_prediction import KvPrediction


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--new", type=int, default=64, help="tokens")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    torch.manual_seed(0)
    large, expert, base = (model(options, width) for width in (1, 2, 2))
    other, mixture = model(options, 1), model(options, 1, experts=8)
    ids = torch.randint(options.vocabulary, (options.batch, options.prompt), device=options.device)
    weakly = scmoe(mixture)
    compared = {
        "ensemble": (ensemble([large, other]), [large, other]),
        "proxy_tuning": (proxy_tuning(large, expert, base), [large, expert, base]),
        "dynamic_logits_fusion": (dynamic_logits_fusion(large, expert, base), [large, expert, base]),
        "scmoe": (weakly, [mixture, mixture]),
    }
    print(f"{options.prompt} + {options.new} tokens, batch {options.batch}, vocabulary {options.vocabulary}, "
          f"{options.dtype}, {options.device}, {torch.get_num_threads()} thread(s)")  # fmt: skip
    print(f"{'method':24}{'seconds':>9}{'sum of models':>15}{'ratio':>7}{'without cache':>15}{'ratio':>7}")
    for name, (fused, models) in compared.items():
        runs = [lambda m=m: generate(m, ids, options.new) for m in (fused, *models)]
        seconds, *alone = least(runs, options)
        (anew,) = least([lambda f=fused: generate(f, ids, options.new, use_cache=False)], options, repeats=1)
        print(f"{name:24}{seconds:9.3f}{sum(alone):15.3f}{seconds / sum(alone):7.2f}{anew:15.3f}{seconds / anew:7.2f}")
    predictor = KvPrediction(large, base)
    first, alone, small = least([lambda m=m: generate(m, ids, 1) for m in (predictor, large, base)], options)
    print(f"kv_prediction, first token: {first:.4f} s; large model alone {alone:.4f}, ratio {first / alone:.2f}; "
          f"small model alone {small:.4f}, ratio {first / small:.2f}")  # fmt: skip


def model(options: argparse.Namespace, narrower: int, experts: int = 0):
    width = options.hidden // narrower
    sizes = {
        "vocab_size": options.vocabulary, "hidden_size": width, "intermediate_size": 3 * width,
        "num_hidden_layers": options.layers, "num_attention_heads": max(1, width // 64),
        "num_key_value_heads": max(1, width // 64), "max_position_embeddings": 4096, "bos_token_id": None,
        "eos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    if experts:
        config = transformers.MixtralConfig(**sizes | {"num_local_experts": experts, "intermediate_size": width})
        made = transformers.MixtralForCausalLM(config)
    else:
        made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    return made.eval().to(options.device, getattr(torch, options.dtype))


def generate(model, ids: torch.Tensor, new: int, **settings) -> None:
    mask = torch.ones_like(ids)
    model.generate(ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, **settings)


def least(runs: list[Callable[[], None]], options: argparse.Namespace, repeats: int | None = None) -> list[float]:
    """Seconds of each, in turns, so that whatever else the machine does meets all of them."""
    wait = torch.cuda.synchronize if options.device != "cpu" else contextlib.nullcontext
    found = [float("inf")] * len(runs)
    for _ in range(repeats or options.repeats):
        for number, run in enumerate(runs):
            wait()
            start = time.perf_counter()
            run()
            wait()
            found[number] = min(found[number], time.perf_counter() - start)
    return found


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    main()
