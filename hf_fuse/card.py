"""Model cards: what was merged from what, with which recipe, under which licence, and how to load it.

The front matter follows the Hub's model card specification (https://huggingface.co/docs/hub/model-cards). Local paths
never appear in a card, and a licence is stated only where the parents agree on one.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from hf_fuse.errors import CheckpointError, FuseError

logger = logging.getLogger(__name__)

LOCAL_ID = 'model_id = "."  # this folder, or its id on the Hub'
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
FRONT_MATTER = re.compile(r"\A---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.S | re.M)

# Ending of the architecture's name -> (Auto class, pipeline tag). Encoder-decoders share their ending with
# image-text models, so those are told apart by family below.
TASKS: dict[str, tuple[str | None, str | None]] = {
    "ForCausalLM": ("AutoModelForCausalLM", "text-generation"),
    "WithLMHeadModel": (None, None),  # causal in one family, masked in another
    "LMHeadModel": ("AutoModelForCausalLM", "text-generation"),
    "ForMaskedLM": ("AutoModelForMaskedLM", "fill-mask"),
    "ForSequenceClassification": ("AutoModelForSequenceClassification", "text-classification"),
    "ForTokenClassification": ("AutoModelForTokenClassification", "token-classification"),
    "ForQuestionAnswering": ("AutoModelForQuestionAnswering", "question-answering"),
    "ForImageClassification": ("AutoModelForImageClassification", "image-classification"),
    "MTModel": ("AutoModelForSeq2SeqLM", "translation"),
}
# Command that repeats what was made -> (name for its output, what to call it).
COMMANDS = {
    "merge": ("merged", "merge"),
    "train": ("trained", "training"),
    "compress": ("compressed", "compression"),
    "align": ("aligned", "alignment"),
    "fuse": ("fused", "fusion"),
}
SEQ2SEQ = re.compile(
    r"(MT5|UMT5|LongT5|T5|MBart|Bart|BigBirdPegasus|PegasusX?|LED|Blenderbot(Small)?|M2M100|ProphetNet|NllbMoe|"
    r"SwitchTransformers|PLBart|T5Gemma)ForConditionalGeneration"
)
# PEFT's names of tasks -> (ending of the Auto class, pipeline tag).
ADAPTER_TASKS = {
    "CAUSAL_LM": ("ForCausalLM", "text-generation"),
    "SEQ_2_SEQ_LM": ("ForSeq2SeqLM", None),
    "SEQ_CLS": ("ForSequenceClassification", "text-classification"),
    "TOKEN_CLS": ("ForTokenClassification", "token-classification"),
    "QUESTION_ANS": ("ForQuestionAnswering", "question-answering"),
    "FEATURE_EXTRACTION": ("ForFeatureExtraction", "feature-extraction"),
}
TEXT_EXAMPLES = {
    "text-generation": """\
output = model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=40)
print(tokenizer.decode(output[0], skip_special_tokens=True))""",
    "seq2seq": """\
output = model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=40)
print(tokenizer.decode(output[0], skip_special_tokens=True))""",
    "text-classification": "print(model.config.id2label[int(model(**inputs).logits.argmax())])",
    "token-classification": "print([model.config.id2label[int(i)] for i in model(**inputs).logits[0].argmax(-1)])",
}


def merge_card(info: dict) -> str:
    """Builds the README.md of a merged or trained model.

    Args:
        info: ``title``, ``method``, ``summary``, ``recipe_yaml`` (strings); ``paper`` (address or arXiv id) and
            ``architecture`` (class name) or None; ``parents``: list of ``{"ref", "repo_id", "commit", "license",
            "role": "base" | "model", "weight"}``; ``versions``: ``{package: version}``; ``warnings``: list of strings;
            ``figures``: ``{caption: image file in the folder, or number}``. Optional: ``repo_id`` (where it will be
            pushed) and ``has_tokenizer`` (default True), both for the usage snippet. Of a LoRA adapter also
            ``adapter``: ``{"base": id of its base or None, "task_type": PEFT's name or None}``, and ``made``: how, in
            a sentence, where that was no merge (then ``recipe_yaml`` may be None). Of something else than a merge
            ``command`` (``"train"`` or ``"compress"``); of something trained ``datasets`` (Hub ids), and
            ``adapter["ours"]``: whether PEFT knows it through hf_fuse only.

    Returns:
        The whole text. Parents that are local folders are shown by their name only.
    """
    parents = info.get("parents") or []
    license_id, license_note = agreed_license(parents)
    if license_note:
        disagree = any(parent.get("license") for parent in parents)
        logger.log(logging.WARNING if disagree else logging.INFO, "%s", license_note)
    auto_class, pipeline_tag = _task(info.get("architecture"))
    adapter = info.get("adapter")
    if adapter:
        auto_class, pipeline_tag = ADAPTER_TASKS.get(adapter["task_type"], (None, None))

    metadata: dict[str, Any] = {}
    hub_parents = list(dict.fromkeys(p["repo_id"] for p in parents if p.get("repo_id")))
    if adapter:  # the Hub knows one relation per model, and what an adapter needs is its base
        hub_parents = [adapter["base"]] if adapter["base"] else []
    for repo_id in hub_parents:
        if not HUB_ID.fullmatch(repo_id):
            raise FuseError(f"model card: {repo_id!r} given as repo_id of a parent is not a Hub id (org/name).")
    if hub_parents:
        metadata["base_model"] = hub_parents
    command = info.get("command", "merge")
    merged = command == "merge"
    metadata["base_model_relation"] = "adapter" if adapter else "merge" if merged else "finetune"
    metadata["library_name"] = "peft" if adapter else "transformers"
    if pipeline_tag:
        metadata["pipeline_tag"] = pipeline_tag
    kind = ["lora" if adapter else "merge"] if merged else []
    metadata["tags"] = list(dict.fromkeys([*kind, "hf_fuse", info["method"]]))
    if info.get("datasets"):
        metadata["datasets"] = info["datasets"]
    metadata |= _license_fields(license_id)

    count = sum(p.get("role") != "base" for p in parents)
    paper = info.get("paper")
    if paper and not paper.startswith("http"):
        paper = f"https://arxiv.org/abs/{paper}"
    method = f"`{info['method']}`" + (f" ([paper]({paper}))" if paper else "")
    blocks = [
        f"# {_one_line(info['title'])}",
        _without_paths(info.get("summary") or f"{count} models merged into one."),
        "## Usage",
        _adapter_snippet(info, auto_class) if adapter else _snippet(info, auto_class, pipeline_tag),
        "## How it was made",
        info.get("made") or f"Merged with hf_fuse, method {method}.",
        _parents_table(parents),
    ]
    notes = [*(info.get("warnings") or []), *([license_note] if license_note else [])]
    if notes:
        blocks.append("\n".join(f"> - {_one_line(note)}" for note in dict.fromkeys(notes)))
    if figures := info.get("figures"):
        blocks += ["## Figures", _figures(figures)]
    if info.get("recipe_yaml"):
        done, this = COMMANDS[command]
        repeats = f"`hf-fuse {command} fuse_recipe.yaml --output {done}` repeats this {this}."
        blocks += ["## Recipe", f"{repeats}\n\n{_fenced(info['recipe_yaml'])}"]
    if versions := info.get("versions"):
        blocks += ["## Versions", "\n".join(f"- {name} {version}" for name, version in versions.items())]
    return f"---\n{_dump(metadata)}---\n\n" + "\n\n".join(blocks) + "\n"


def card_for_repo(text: str, repo_id: str, revision: str | None = None) -> str:
    """The card with the usage snippet pointing to the repository (and branch) it is pushed to."""
    if LOCAL_ID not in text:
        return text
    text = text.replace(LOCAL_ID, f'model_id = "{repo_id}"', 1)
    if revision:
        text = text.replace("from_pretrained(model_id)", f'from_pretrained(model_id, revision="{revision}")')
    return text


def agreed_license(parents: Iterable[dict]) -> tuple[str | None, str | None]:
    """``(licence, warning)``: the one licence of all parents that state one, else None and a sentence that says why."""
    stated = {_parent_name(p): p["license"] for p in parents if p.get("license")}
    silent = [_parent_name(p) for p in parents if not p.get("license")]
    if not stated:
        return None, "No parent states a licence, so none is given here. Check the parents' terms."
    if len(set(stated.values())) > 1:
        each = ", ".join(f"{name}: {license_id}" for name, license_id in stated.items())
        return None, f"The parents' licences differ ({each}), so none is given here. Decide which terms apply."
    license_id = next(iter(stated.values()))
    if silent:
        return license_id, f"The licence {license_id} is stated by {', '.join(stated)}, but not by {', '.join(silent)}."
    return license_id, None


def read_license(folder: Path | str) -> str | None:
    """The licence in the front matter of ``folder``'s README.md, None where there is none.

    ``license: other`` comes with its name, ``other (llama3.2)``: two parents under "other" need not agree.
    """
    path = Path(folder) / "README.md"
    try:
        data = _front_matter(path.read_text(encoding="utf-8", errors="replace"))[0]
    except (OSError, yaml.YAMLError):
        return None
    value = data.get("license")
    if isinstance(value, list):
        value = ", ".join(str(item) for item in value)
    if not isinstance(value, str) or not value.strip():
        return None
    name = data.get("license_name")
    return f"other ({name})" if value == "other" and name else value.strip()


def write_metrics(readme: Path | str, results: list[dict]) -> list[str]:
    """Puts evaluation results into the ``model-index`` of an existing card; everything else stays as it is.

    A figure for the same task, dataset and metric is replaced, others are added. Entries that somebody else left
    incomplete (the Trainer writes some without a dataset) are kept.

    Args:
        readme: the card.
        results: ``{"task", "dataset", "metric", "value"}``, optional ``"config"`` and ``"split"`` of the dataset. Task
            and metric are Hub identifiers (``text-generation``, ``perplexity``), the dataset a Hub id or a file's name.

    Returns:
        One sentence per incomplete entry that was kept, since the Hub ignores those.

    Raises:
        FuseError: there is no card, its front matter is broken, or a result is incomplete or not finite.
    """
    readme = Path(readme)
    try:
        text = readme.read_text(encoding="utf-8")
        metadata, block, body = _front_matter(text)
    except OSError as error:
        raise CheckpointError(f"{readme}: cannot be read ({error.strerror}). `hf-fuse merge` writes a card.") from None
    except yaml.YAMLError as error:
        raise FuseError(f"{readme}: the front matter is not valid YAML: {_one_line(error)}. Correct it.") from None
    index = metadata.get("model-index") or []
    if not (isinstance(index, list) and all(isinstance(entry, dict) for entry in index)):
        raise FuseError(f"{readme}: model-index is not a list of entries with name and results. Correct it first.")
    if not index:
        heading = re.search(r"^#\s+(.+)$", body, re.M)
        index = [{"name": heading[1].strip() if heading else readme.resolve().parent.name, "results": []}]
    for result in results:
        _put_result(index[0], _checked_result(result))
    # Only the model-index lines change: comments and formatting of the rest are somebody's work.
    front = re.sub(r"^model-index:.*?(?=^[^\s\-]|\Z)", "", block, flags=re.S | re.M) + _dump({"model-index": index})
    whole = metadata | {"model-index": index}
    if _parsed(front) != whole:  # an unusual layout: rewrite it all rather than break it
        front = _dump(whole)
    partial = readme.with_name(readme.name + ".partial")
    partial.write_text(f"---\n{front}---\n{body}", encoding="utf-8")
    partial.chmod(readme.stat().st_mode)
    partial.replace(readme)
    return [
        f"{readme.name}: kept an incomplete result without {' and '.join(lacking)}; the Hub does not show it."
        for entry in index
        for result in entry.get("results") or []
        if (lacking := [key for key in ("task", "dataset", "metrics") if not result.get(key)])
    ]


def _checked_result(result: dict) -> dict:
    missing = [key for key in ("task", "dataset", "metric", "value") if result.get(key) in (None, "")]
    if missing:
        raise FuseError(f"evaluation result {result}: lacks {', '.join(missing)}. A card needs all four.")
    value = result["value"]
    value = value if isinstance(value, (int, float)) else float(value)
    if not math.isfinite(value):
        raise FuseError(f"evaluation result {result}: the value is not finite and was not written to the card.")
    return result | {"value": value, "dataset": _public_name(result["dataset"])}


def _put_result(entry: dict, result: dict) -> None:
    dataset = {"type": result["dataset"], "name": result["dataset"]}
    dataset |= {key: result[key] for key in ("config", "split") if result.get(key)}
    if not entry.get("results"):
        entry["results"] = []
    for old in entry["results"]:
        same_task = (old.get("task") or {}).get("type") == result["task"]
        there = old.get("dataset") or {}
        if same_task and all(there.get(key) == dataset.get(key) for key in ("type", "config", "split")):
            old["metrics"] = metrics = old.get("metrics") or []
            break
    else:
        metrics = []
        entry["results"].append({"task": {"type": result["task"]}, "dataset": dataset, "metrics": metrics})
    for metric in metrics:
        if metric.get("type") == result["metric"]:
            metric["value"] = result["value"]
            metric.pop("verified", None)  # a new figure is not the one that was verified
            metric.pop("verifyToken", None)
            return
    metrics.append({"type": result["metric"], "value": result["value"]})


def _front_matter(text: str) -> tuple[dict, str, str]:
    """``(metadata, its YAML text, rest of the card)``."""
    found = FRONT_MATTER.match(text)
    if not found:
        return {}, "", "\n" + text.lstrip("\n")
    data = yaml.safe_load(found[1])
    return (data if isinstance(data, dict) else {}), found[1], text[found.end() :]


def _parsed(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return None


def _dump(data: dict) -> str:
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=1_000_000)


def _task(architecture: str | None) -> tuple[str | None, str | None]:
    if not architecture:
        return None, None
    if SEQ2SEQ.fullmatch(architecture):
        return "AutoModelForSeq2SeqLM", None
    return next((task for ending, task in TASKS.items() if architecture.endswith(ending)), (None, None))


def _snippet(info: dict, auto_class: str | None, pipeline_tag: str | None) -> str:
    architecture = info.get("architecture")
    # A class without a known Auto class is imported by its own name, which always works.
    loader = auto_class or (architecture if re.fullmatch(r"[A-Z]\w+", architecture or "") else "AutoModel")
    with_text = info.get("has_tokenizer", True) and pipeline_tag != "image-classification"
    names = sorted([loader, *(["AutoTokenizer"] if with_text else [])])
    lines = [f"from transformers import {', '.join(names)}", "", LOCAL_ID]
    if with_text:
        lines.append("tokenizer = AutoTokenizer.from_pretrained(model_id)")
    lines.append(f"model = {loader}.from_pretrained(model_id)")
    if with_text:
        example = "seq2seq" if auto_class == "AutoModelForSeq2SeqLM" else pipeline_tag
        lines += ["", 'inputs = tokenizer("Once upon a time", return_tensors="pt")']
        lines.append(TEXT_EXAMPLES.get(example or "", "print(model(**inputs)[0].shape)"))
    text = "```python\n" + "\n".join(lines) + "\n```"
    return card_for_repo(text, info["repo_id"]) if info.get("repo_id") else text


def _adapter_snippet(info: dict, auto_class: str | None) -> str:
    lines = [f"import hf_fuse  # so that PEFT knows {info['method']}"] if info["adapter"].get("ours") else []
    if auto_class:
        lines += [f"from peft import AutoPeftModel{auto_class}", "", LOCAL_ID]
        lines.append(f"model = AutoPeftModel{auto_class}.from_pretrained(model_id)  # loads the base, too")
    else:
        lines += ["from peft import PeftModel", "", LOCAL_ID]
        lines.append("model = PeftModel.from_pretrained(model, model_id)  # on the base model, loaded before")
    text = "```python\n" + "\n".join(lines) + "\n```"
    return card_for_repo(text, info["repo_id"]) if info.get("repo_id") else text


def _parents_table(parents: list[dict]) -> str:
    rows = ["| model | role | commit | weight |", "|---|---|---|---|"]
    for parent in parents:
        name, commit = _parent_name(parent), parent.get("commit")
        if repo_id := parent.get("repo_id"):
            name = f"[{name}](https://huggingface.co/{repo_id}{f'/tree/{commit}' if commit else ''})"
        weight = parent.get("weight")
        cells = [name, parent.get("role") or "model", f"`{commit[:12]}`" if commit else "local", _number(weight)]
        rows.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def _number(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_number(item) for item in value) + "]"
    return _one_line(value)


def _figures(figures: dict) -> str:
    images, numbers = [], []
    for caption, value in figures.items():
        if isinstance(value, (str, Path)):
            images.append(f"![{_one_line(caption)}]({_public_name(value)})")
        else:
            numbers.append(f"| {_one_line(caption)} | {_number(value)} |")
    table = ["| figure | value |", "|---|---|", *numbers] if numbers else []
    return "\n\n".join(filter(None, ["\n".join(table), *images]))


def _fenced(recipe: str) -> str:
    """The recipe as a YAML block without local paths. Parsed, not searched: a path may contain anything."""

    def public(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: public(item) for key, item in value.items()}
        if isinstance(value, list):
            return [public(item) for item in value]
        return _public_name(value) if isinstance(value, str) else value

    try:
        data = yaml.safe_load(recipe)
    except yaml.YAMLError as error:
        raise FuseError(f"model card: the recipe is not valid YAML ({_one_line(error)}).") from None
    shown = public(data)
    return f"```yaml\n{(recipe if shown == data else _dump(shown)).strip()}\n```"


def _license_fields(license_id: str | None) -> dict[str, Any]:
    if not license_id:
        return {}
    if found := re.fullmatch(r"other \((.+)\)", license_id):
        return {"license": "other", "license_name": found[1]}
    return {"license": license_id.split(", ") if ", " in license_id else license_id}


def _parent_name(parent: dict) -> str:
    return parent.get("repo_id") or _last_part(parent["ref"])


def public_recipe(text: str) -> str:
    """A recipe's YAML as others may read it: local files and folders by their names."""

    def named(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: named(part) for key, part in value.items()}
        if isinstance(value, list):
            return [named(part) for part in value]
        return _public_name(value) if isinstance(value, str) and "\n" not in value else value

    return yaml.safe_dump(named(yaml.safe_load(text)), sort_keys=False, allow_unicode=True, width=100)


def _public_name(value: str | Path) -> str:
    """Folder name instead of a path that says something about this machine; Hub ids and plain names as they are."""
    text = str(value)
    if re.match(r"(/|~|\.\.?[/\\]|[A-Za-z]:[\\/]|\\\\|file:)", text):
        return _last_part(text)
    return text


def _last_part(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1] or "local"


def _without_paths(text: str) -> str:
    """Free text with absolute paths cut down to their last part."""
    return re.sub(
        r"(?<![\w.:/])(?:~?/[\w.@+-]+(?:/[\w.@+-]*)+|[A-Za-z]:\\[^\s'\"`,;]+)", lambda m: _public_name(m[0]), text
    )


def _one_line(text: object) -> str:
    return _without_paths(" ".join(str(text).split()))
