"""Tiny models, data and objectives to train in different layouts; run by torchrun, this file trains some of them.

``torchrun training_cases.py FOLDER CASE:BATCH:ACCUMULATION ...`` writes ``FOLDER/CASE-BATCH-ACCUMULATION.json`` with
the logs and ``.safetensors`` with the trained parameters.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from hf_fuse import FuseConfig, FuseTrainer, MixLoraConfig
from hf_fuse.data.flad import FladTrainer

# Each run of a Trainer begins with collecting garbage: not through all that has been imported, which takes a second.
gc.freeze()
VOCABULARY = 32
ENCODER = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
           "num_attention_heads": 2, "initializer_range": 0.2}  # fmt: skip
DECODER = ENCODER | {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def llama(**changes):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER | changes))


def bert(**changes):
    """Ignores ``num_items_in_batch``, although it accepts it."""
    torch.manual_seed(0)
    return bert_of(**changes)


def bert_of(**changes):
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 3}
    return transformers.BertForSequenceClassification(transformers.BertConfig(**ENCODER | still | changes))


def old_bert():
    """A model of its own, not a worse copy of :func:`bert`."""
    torch.manual_seed(1)
    return bert_of(num_labels=3).eval()


def vit_mae(**changes):
    torch.manual_seed(0)
    shapes = {"image_size": 8, "patch_size": 2, "num_channels": 1}
    shapes |= {
        f"decoder_{name}": value for name, value in ENCODER.items() if name not in ("vocab_size", "initializer_range")
    }
    # Empty patches are 0 at the start, where a layer norm is as steep as its epsilon is small.
    shapes["layer_norm_eps"] = 0.01
    return transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**ENCODER | shapes | changes))


def mixtral(**changes):
    torch.manual_seed(0)
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.5}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**DECODER | experts | changes))


def mixlora(**options):
    """The adapter's configuration, to be put on :func:`llama` by the trainer."""
    options = {"router_aux_loss_coef": 0.0, "lora_dropout": 0.0} | options
    return MixLoraConfig(target_modules=["gate_proj", "up_proj", "down_proj"], num_experts=4, top_k=2, r=4, **options)


def language_data(count: int = 32, *, empty: bool = False) -> list[dict[str, torch.Tensor]]:
    """Sequences of different lengths; the labels of each beginning are masked, and all of some sequences."""
    random = torch.Generator().manual_seed(1)
    rows = []
    for index in range(count):
        length = int(torch.randint(4, 12, (1,), generator=random))
        ids = torch.randint(3, VOCABULARY, (length,), generator=random)
        labels = ids.clone()
        labels[: length if empty and index % 4 == 1 else length // 3] = -100
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def classes_data(count: int = 32) -> list[dict[str, Any]]:
    """Class 0 twice as frequent as the two others; sample ids; a second view of each sample."""
    random = torch.Generator().manual_seed(2)
    ids = torch.randint(3, VOCABULARY, (count, 6), generator=random)
    second = torch.where(torch.rand(count, 6, generator=random) < 0.3, 3, ids)
    return [
        {"input_ids": ids[i], "second_input_ids": second[i], "labels": max(0, i % 4 - 1), "sample_ids": i}
        for i in range(count)
    ]


def probed_data(count: int = 32) -> list[dict[str, torch.Tensor]]:
    """Language with a number at every third token."""
    rows = language_data(count)
    for row in rows:
        row["probe_targets"] = torch.where(torch.arange(len(row["labels"])) % 3 == 0, row["labels"] / 10.0, torch.nan)
    return rows


def half_labelled_data() -> list[dict[str, Any]]:
    """Each third sample has no label."""
    return [row | {"labels": -100 if index % 3 == 1 else row["labels"]} for index, row in enumerate(classes_data())]


def digits_data(count: int = 32) -> list[dict[str, Any]]:
    """Images of digits, with the order in which their patches are masked."""
    from sklearn.datasets import load_digits

    random = torch.Generator().manual_seed(3)
    images = torch.from_numpy(load_digits().images[:count]).float() / 16
    return [{"pixel_values": image[None], "noise": torch.rand(16, generator=random)} for image in images]


def padded(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    length = max(len(row["input_ids"]) for row in rows)

    def column(name: str, filler: int) -> torch.Tensor:
        return torch.stack([torch.nn.functional.pad(r[name], (0, length - len(r[name])), value=filler) for r in rows])

    ids = column("input_ids", 0)
    probes = {"probe_targets": column("probe_targets", torch.nan)} if "probe_targets" in rows[0] else {}
    return {"input_ids": ids, "labels": column("labels", -100), "attention_mask": (ids != 0).long()} | probes


def summed_squares(outputs, labels, num_items_in_batch=None):
    """A user's loss that normalises as the Trainer asks for."""
    kept = labels != -100
    return outputs.logits.float()[kept].square().sum() / num_items_in_batch


def mean_squares(outputs, labels, num_items_in_batch=None):
    """A user's loss that doesn't."""
    return outputs.logits.float()[labels != -100].square().sum(-1).mean()


WARM_UP = {"start": 0.0, "end": 1.0, "until": 2}
CASES: dict[str, dict[str, Any]] = {
    "language": {"model": llama, "objectives": {"logit_z": 0.1, "comp_sum": {"weight": WARM_UP, "tau": 0.7}}},
    "empty": {"model": llama, "data": lambda: language_data(empty=True), "objectives": {"logit_z": 0.1}},
    "smoothing": {"model": llama, "objectives": {"logit_z": 0.1}, "label_smoothing_factor": 0.2},
    "user_loss": {"model": llama, "objectives": {"logit_z": 0.1}, "compute_loss_func": summed_squares},
    "user_mean": {"model": llama, "objectives": {"logit_z": 0.1}, "compute_loss_func": mean_squares},
    "mixtral": {"model": mixtral, "objectives": {"router_z": 0.5, "router_entropy": 0.2}},
    "mixlora": {"model": llama, "peft_config": mixlora, "objectives": {"router_z": 0.5}},
    "plain_classes": {"model": bert, "objectives": {}},
    "labels": {
        "model": bert,
        "objectives": {
            "decoupled_softmax": 0.3,
            "soft_top_k": {"weight": 0.3, "k": 2},
            "spherical_z": 0.3,
            "nested_dropout": {"weight": 0.3, "sigma": 8.0},
            "smooth_adversarial": {"weight": 0.3, "radius": 0.5},
        },
    },  # fmt: skip
    "replayed": {
        "model": llama,
        "replay_dataset": language_data(7),
        "data": probed_data,
        "objectives": {"replay": 0.5, "probe_regression": 0.5},
    },  # fmt: skip
    "old": {
        "model": bert,
        "old_model": old_bert,
        "objectives": {"bct": 0.3, "oca": 0.1, "bt2": {"weight": 0.1, "extra": 4}},
    },
    "remembered": {"model": bert, "objectives": {"look": {"weight": 0.3, "neighbours": 4}}},
    "half_labelled": {
        "model": bert,
        "data": half_labelled_data,
        "objectives": {"ler": {"weight": 0.3, "old_classes": 2, "threshold": 0.5}},
    },
    "anchored": {"model": llama, "objectives": {"entropy_bonus": {"weight": 0.3, "decay": 0.5}}},
    "flad": {
        "model": llama,
        "trainer": FladTrainer,
        "auxiliary_datasets": {"short": language_data(5), "long": language_data(9)},
        "objectives": {"replay": 0.5},
    },
    "classes": {
        "model": bert,
        "objectives": {"task": 0.5, "class_balanced": {"weight": 1.0, "beta": 0.9}, "ldam": 0.3, "dkl": 2.0},
    },
}

# Losses that compare the samples of a micro-batch, whichever processes they are on.
COMPARING_CASES: dict[str, dict[str, Any]] = {
    "compared": {
        "model": bert,
        "objectives": {
            "info_nce": {"weight": 0.1, "symmetric": True}, "mann_whitney": 0.1, "barlow_twins": 0.01,
            "sup_con": {"weight": 0.1, "projection": 8}, "any_loss": 0.3, "hoc": 0.1,
        },
        "old_model": old_bert,
    },
    "compared_further": {
        "model": bert,
        "objectives": {
            "amcl": {"weight": 0.1, "size": 8}, "isogclr": {"weight": 0.1, "rho": 2.0, "learning_rate": 0.01},
            "metrix": 0.1, "proto_triplet": {"weight": 0.1, "margin": 5.0}, "nspt": {"weight": 0.1, "temperature": 1.0},
            "bias_loss": 0.1,
        },
        "old_model": old_bert,
    },
}  # fmt: skip
# Losses that see a micro-batch as a whole: the same only where micro-batches are.
BATCH_CASES: dict[str, dict[str, Any]] = {
    "balance": {
        "model": llama,
        "peft_config": lambda: mixlora(router_aux_loss_coef=0.5),
        "objectives": {"load_balance": {"weight": 0.3, "reduction": "per_layer"}},
    },
    "own_balance": {"model": lambda: mixtral(output_router_logits=True), "objectives": {}},
}
BATCH_CASES |= {f"{name}_smoothing": case | {"label_smoothing_factor": 0.1} for name, case in BATCH_CASES.items()}


def three_steps(output: Path, batch: int, accumulation: int) -> dict[str, Any]:
    """Training arguments for three steps of plain SGD over the data as they stand."""
    return {
        "output_dir": str(output), "max_steps": 3, "learning_rate": 0.1, "optim": "sgd",
        "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation, "per_device_eval_batch_size": max(batch, 3), "use_cpu": True,
        "train_sampling_strategy": "sequential", "logging_steps": 1, "save_strategy": "no", "report_to": "none",
        "disable_tqdm": True, "dataloader_pin_memory": False,
    }  # fmt: skip


def make_trainer(case: str, output: Path, batch: int, accumulation: int, **changes: Any) -> FuseTrainer:
    """Three steps of SGD on one of the cases, in the given layout."""
    settings = (CASES | BATCH_CASES | COMPARING_CASES)[case] | changes
    model, objectives, kind = settings.pop("model")(), settings.pop("objectives"), settings.pop("trainer", FuseTrainer)
    peft_config = settings.pop("peft_config", lambda: None)()
    is_language = isinstance(model, transformers.GenerationMixin)
    data = settings.pop("data", language_data if is_language else classes_data)()
    names = ("compute_loss_func", "callbacks", "compute_metrics", "data_collator", "replay_dataset", "old_model",
             "auxiliary_datasets")  # fmt: skip
    own = {"data_collator": padded if is_language else None} | {k: settings.pop(k) for k in names if k in settings}
    if "old_model" in own:
        own["old_model"] = own["old_model"]()
    torch.manual_seed(0)
    args = FuseConfig(**three_steps(output, batch, accumulation) | {"objectives": objectives} | settings)
    return kind(
        model,
        args,
        peft_config=peft_config,
        train_dataset=data,
        eval_dataset=[data[index] for index in range(13)],
        **own,
    )


def train(trainer: FuseTrainer, **options: Any) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Log entries of the training and of an evaluation after it, and the trained parameters."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        trainer.train(**options)
        trainer.evaluate()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]
    timings = ("_runtime", "_per_second")
    logs = [{key: value for key, value in entry.items() if not key.endswith(timings)} for entry in logs]
    trained = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    return logs, trained


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for case, batch, accumulation in (argument.split(":") for argument in sys.argv[2:]):
        trainer = make_trainer(case, folder, int(batch), int(accumulation))
        assert trainer.accelerator.num_processes == 2, trainer.accelerator.state
        logs, trained = train(trainer)
        if trainer.is_world_process_zero():
            name = f"{case}-{batch}-{accumulation}"
            (folder / f"{name}.json").write_text(json.dumps(logs))
            save_file(trained, folder / f"{name}.safetensors")
    torch.distributed.destroy_process_group()
