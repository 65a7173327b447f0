"""hf_fuse: one model out of many."""

from __future__ import annotations

from importlib import import_module

from hf_fuse._peft_import import register_with_peft

__version__ = "0.1.0"

# Public name -> module that defines it. Loaded on first use, so that `import hf_fuse` costs nothing.
_PUBLIC = {
    "plan": "hf_fuse.merge.plan",
    "merge": "hf_fuse.merge",
    "merge_state_dicts": "hf_fuse.merge.engine",
    "sweep": "hf_fuse.merge.sweep",
    "extract_lora": "hf_fuse.merge.extract_lora",
    "store": "hf_fuse.merge.extract",
    "extract": "hf_fuse.merge.extract",
    "TwinModel": "hf_fuse.merge.twin_model",
    "train_router": "hf_fuse.merge.twin_router",
    "learn": "hf_fuse.merge.learning",
    "align": "hf_fuse.merge.align.engine",
    "Recipe": "hf_fuse.recipe",
    "load_recipe": "hf_fuse.recipe",
    "inspect_models": "hf_fuse.diagnostics.task_vectors",
    "evaluate_models": "hf_fuse.evaluation",
    "compress": "hf_fuse.compress",
    "load_compressed": "hf_fuse.compress.loading",
    "add_path_ensemble": "hf_fuse.compress.path_ensemble",
    "load_path_ensemble": "hf_fuse.compress.path_ensemble",
    "generate": "hf_fuse.decode.answers",
    "push": "hf_fuse.hub",
    "train": "hf_fuse.train",
    "TrainingRecipe": "hf_fuse.training_recipe",
    "FuseTrainer": "hf_fuse.trainer",
    "FuseConfig": "hf_fuse.trainer_config",
    "teach": "hf_fuse.distill.teach",
    "fuse": "hf_fuse.distill.fusion",
    "AlignedTeacher": "hf_fuse.distill.aligned_teacher",
    "sigma_reparametrise": "hf_fuse.sigma_reparametrisation",
    "fold_sigma": "hf_fuse.sigma_reparametrisation",
    "DistillTrainer": "hf_fuse.distill.trainer",
    "DistillConfig": "hf_fuse.distill.config",
    "MixLoraConfig": "hf_fuse.adapters.mixlora",
    "DynMoleConfig": "hf_fuse.adapters.dynmole",
    "MolaConfig": "hf_fuse.adapters.mola",
    "LoraMoeConfig": "hf_fuse.adapters.loramoe",
    "HydraLoraConfig": "hf_fuse.adapters.hydralora",
    "router_statistics": "hf_fuse.adapters.router_collector",
    "NolaConfig": "hf_fuse.adapters.nola",
    "AtlasConfig": "hf_fuse.adapters.atlas",
    "MixDaConfig": "hf_fuse.adapters.mixda",
    "PstConfig": "hf_fuse.adapters.pst",
    "PstSchedule": "hf_fuse.adapters.pst_schedule",
    "select": "hf_fuse.data.selection",
    "dmt_stages": "hf_fuse.data.dmt",
    "FladTrainer": "hf_fuse.data.flad",
    "class_balanced": "hf_fuse.data.class_balanced",
    "step_law": "hf_fuse.data.step_law",
    "EncoderFeatures": "hf_fuse.heads.features",
    "Head": "hf_fuse.heads.head",
    "install_head": "hf_fuse.heads.linear",
    "compare_layers": "hf_fuse.diagnostics.layer_similarity",
    "FeatureCallback": "hf_fuse.diagnostics.callbacks",
    "SeparabilityStop": "hf_fuse.diagnostics.callbacks",
    "FuseError": "hf_fuse.errors",
}
__all__ = [*_PUBLIC, "__version__"]

register_with_peft()


def __getattr__(name: str):
    if name in _PUBLIC:
        module = import_module(_PUBLIC[name])
        return module if module.__name__ == f"hf_fuse.{name}" else getattr(module, name)
    raise AttributeError(f"module 'hf_fuse' has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
