"""The command line: parse, call one function, print. Imports only what the command needs."""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from hf_fuse.errors import FuseError, RecipeError

app = typer.Typer(
    name="hf-fuse",
    help="Make one model out of many.\n\nExample: hf-fuse merge recipe.yaml --output merged",
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)
INTERRUPTED = 130  # exit status of what Ctrl-C ended
EXTRA = {"allow_extra_args": True, "ignore_unknown_options": True}

RecipeFile = Annotated[Path, typer.Argument(help="A recipe in YAML, ours or mergekit's.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Folder to make.", show_default=False)]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an existing output when the new one is complete.")
]
Pickle = Annotated[bool, typer.Option("--allow-pickle", help="Accept .bin inputs (torch's restricted unpickler).")]
Verify = Annotated[bool, typer.Option("--verify", help="Compare Hub inputs with the Hub's hashes first.")]


def main() -> None:
    """Entry point of ``hf-fuse`` and ``python -m hf_fuse``: ends the process."""
    run_command(sys.argv[1:])
    _leave()


def run_command(arguments: list[str]) -> None:
    """Runs one command. An expected failure is one line on stderr and SystemExit with status 1."""
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"] or ["--help"]
    # Ended by a scheduler or a launcher, a merge cleans up as after Ctrl-C.
    signal.signal(signal.SIGTERM, _terminate)
    try:
        status = app(arguments, standalone_mode=False)
        if status:  # typer turns Ctrl-C into a status that it only returns
            raise KeyboardInterrupt if status == INTERRUPTED else SystemExit(status)
    except FuseError as error:
        if getattr(error, "said_by_lead", False) and not debug:
            raise SystemExit(1) from None
        _fail(str(error), debug)
    except typer.Abort:
        _fail("stopped", debug)
    except KeyboardInterrupt:
        _fail("stopped; no output was left behind", debug, status=INTERRUPTED)
    except BrokenPipeError:
        raise SystemExit(0) from None
    except OSError as error:
        _fail(f"{error.filename or 'output'}: {error.strerror or error}", debug)
    except Exception as error:
        if hasattr(error, "format_message"):  # click's usage errors
            _fail(error.format_message(), debug, status=2)
        _fail(f"{type(error).__name__}: {error}. This is a fault of hf_fuse; --debug shows where.", debug)


def _leave() -> None:
    """Ends the process after everything that was to be done at exit, but without taking the libraries' objects apart
    one by one: with torch loaded that costs half a second, as much as merging half a billion numbers."""
    atexit._run_exitfuncs()
    status = 0
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None: closed by whoever started us
        try:
            stream.flush()
        except BrokenPipeError:
            pass
        except OSError:
            status = 1
    os._exit(status)


def _fail(message: str, debug: bool, status: int = 1) -> None:
    if debug:
        raise  # noqa: PLE0704 - called while an exception is being handled
    # Names of tensors and files come from strangers: whatever they hold, the message is one line of text.
    text = "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in message)
    print(f"error: {text}", file=sys.stderr)
    raise SystemExit(status) from None


def _terminate(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: the clean-up is not to be interrupted
    raise KeyboardInterrupt


def _overrides(arguments: list[str], known: Any = None) -> dict[str, Any]:
    """``--parameters.density 0.3 --seed=1`` -> ``{"parameters.density": 0.3, "seed": 1}``.

    ``known``: the recipe's keys, by default those of one for merging.
    """
    from hf_fuse.recipe import Recipe, read_yaml
    from hf_fuse.registry import nearest

    known = known or {*Recipe.model_fields, "merge_method"}
    found, rest = {}, list(arguments)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            raise RecipeError(f"{flag!r} is one argument too many. Expected a recipe and --options.")
        key, given, value = flag[2:].partition("=")
        if key.split(".")[0] not in known:
            hint = f" A method's parameter is --parameters.{key}." if "parameters" in known and "." not in key else ""
            raise RecipeError(f"--{key}: no such option or recipe key. {nearest(key, known)}{hint}")
        if not given:
            if not rest:
                raise RecipeError(f"--{key} needs a value.")
            value = rest.pop(0)
        found[key] = read_yaml(value, f"--{key}")
    return found


def _console(stderr: bool = False) -> Any:
    from rich.console import Console

    return Console(stderr=stderr, soft_wrap=False)


@app.command(context_settings=EXTRA)
def merge(
    context: typer.Context,
    recipe: RecipeFile,
    output: Output = None,
    overwrite: Overwrite = False,
    device: Annotated[str, typer.Option(help="cpu or cuda[:N].")] = "cpu",
    push: Annotated[str | None, typer.Option(help="Push the result to this Hub id.", show_default=False)] = None,
    private: Annotated[bool | None, typer.Option("--private/--public", help="Of a new repository.")] = None,
    allow_nonfinite: Annotated[bool, typer.Option("--allow-nonfinite", help="Merge NaN and infinity too.")] = False,
    allow_pickle: Pickle = False,
    verify: Verify = False,
    workers: Annotated[int | None, typer.Option(help="Threads; one per core, at most 8.", min=1)] = None,
    continue_from: Annotated[
        str | None, typer.Option(help="Output of an earlier merge to add the models to (opcm).", show_default=False)
    ] = None,
) -> None:
    """Merge checkpoints as a recipe says. Any recipe key can be set: --parameters.density 0.3

    Several processes: accelerate launch -m hf_fuse merge recipe.yaml --output merged
    """
    from hf_fuse.merge.engine import merge as run
    from hf_fuse.merge.plan import plan as make_plan
    from hf_fuse.merge.workers import World

    options = {"overwrite": overwrite, "allow_pickle": allow_pickle, "verify": verify}
    options["continue_from"] = continue_from
    made = make_plan(recipe, overrides=_overrides(context.args), output=output, **options)
    leads = World().leads
    if leads and sys.stderr.isatty():
        from hf_fuse.merge.report import print_plan

        print_plan(made, _console(stderr=True))
    elif leads:
        for warning in made.warnings:
            print(f"note: {warning}", file=sys.stderr)
    folder = run(
        made,
        overwrite=overwrite,
        device=device,
        allow_nonfinite=allow_nonfinite,
        push=push,
        private=private,
        workers=workers,
    )
    if leads:
        print(f"merged: {folder}\nmethod: {made.method.name}\ntensors: {len(made.units)}\nbytes: {made.layout.nbytes}")
        if lost := getattr(made, "truncation", None):
            print(f"left out by the rank: {lost:.3%} of the change")


@app.command(context_settings=EXTRA)
def plan(
    context: typer.Context,
    recipe: RecipeFile,
    output: Output = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    allow_pickle: Pickle = False,
    verify: Verify = False,
) -> None:
    """Show what a merge would read, compute and write. Reads headers only."""
    from hf_fuse.merge.plan import plan as make_plan

    overrides = _overrides(context.args)
    made = make_plan(
        recipe, overrides=overrides, output=output, overwrite=overwrite, allow_pickle=allow_pickle, verify=verify
    )
    if as_json:
        print(json.dumps(made.to_dict(), indent=2))
    else:
        from hf_fuse.merge.report import print_plan

        print_plan(made, _console())


@app.command(context_settings=EXTRA)
def sweep(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(help="A recipe with a section sweep.", show_default=False)],
    output: Output = None,
    overwrite: Overwrite = False,
    trials: Annotated[int | None, typer.Option(help="Instead of the file's.", min=1, show_default=False)] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda[:N].")] = "cpu",
    as_json: Json = False,
    plot: Annotated[Path | None, typer.Option(help="Draw here, not beside the output.", show_default=False)] = None,
    allow_pickle: Pickle = False,
    workers: Annotated[int | None, typer.Option(help="Threads; one per core, at most 8.", min=1)] = None,
) -> None:
    """Merge with many sets of parameters, score each merge, keep the best. Any recipe key can be set as in merge."""
    from hf_fuse.merge.sweep import sweep as run

    found = run(
        recipe, output, overrides=_overrides(context.args), trials=trials, overwrite=overwrite, device=device,
        allow_pickle=allow_pickle, workers=workers, plot=plot,
    )  # fmt: skip
    print(json.dumps(found.to_dict(), indent=2, default=str)) if as_json else found.print(_console())


@app.command(context_settings=EXTRA)
def train(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(help="A training recipe in YAML.", show_default=False)],
    output: Output = None,
    overwrite: Overwrite = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
    push: Annotated[str | None, typer.Option(help="Push the result to this Hub id.", show_default=False)] = None,
    private: Annotated[bool | None, typer.Option("--private/--public", help="Of a new repository.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, train nothing.")] = False,
) -> None:
    """Train an adapter or a model as a recipe says. Any recipe key can be set: --train.learning_rate 1e-4

    Several processes: --num_processes 2, or accelerate launch -m hf_fuse train recipe.yaml
    """
    from hf_fuse.train import train as run
    from hf_fuse.training_launch import speaks
    from hf_fuse.training_recipe import TrainingRecipe

    overrides = _overrides(context.args, TrainingRecipe.model_fields)
    options = {"output": output, "overwrite": overwrite, "resume": resume, "push": push, "private": private}
    made = run(recipe, overrides, **options, dry_run=dry_run)
    if speaks() and not dry_run:
        print(f"trained: {made.output}")
        for name, value in made.to_dict().items():
            print(f"{name.replace('_', ' ')}: {value:{'.4g' if isinstance(value, float) else ','}}")
        if made.address:
            print(f"pushed: {made.address}")


@app.command(context_settings=EXTRA)
def compress(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(help="A recipe for compression in YAML.", show_default=False)],
    output: Output = None,
    overwrite: Overwrite = False,
    push: Annotated[str | None, typer.Option(help="Push the result to this Hub id.", show_default=False)] = None,
    private: Annotated[bool | None, typer.Option("--private/--public", help="Of a new repository.")] = None,
    as_json: Json = False,
) -> None:
    """Make one model smaller as a recipe says, with figures from before and after.

    Any recipe key can be set: --parameters.drop 4
    """
    from hf_fuse.compress.engine import compress as run
    from hf_fuse.compress.recipe import CompressRecipe

    overrides = _overrides(context.args, CompressRecipe.model_fields)
    made = run(recipe, output, overrides=overrides, overwrite=overwrite, push=push, private=private)
    if as_json:
        print(json.dumps(made.to_dict(), indent=2))
    else:
        print(f"compressed: {made.output}\n{made.summary}")
        made.print(_console())
        if made.address:
            print(f"pushed: {made.address}")


@app.command(context_settings=EXTRA)
def learn(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(help="A recipe for learning in YAML.", show_default=False)],
    output: Output = None,
    overwrite: Overwrite = False,
) -> None:
    """Estimate from data what a merge method needs to know of a model: its Fisher information, or Gram matrices.

    Any recipe key can be set: --examples 1024
    """
    from hf_fuse.merge.learn_recipe import LearnRecipe
    from hf_fuse.merge.learning import learn as run

    overrides = _overrides(context.args, LearnRecipe.model_fields)
    print(f"statistics: {run(recipe, output, overrides=overrides, overwrite=overwrite)}")


@app.command("list")
def list_methods(
    name: Annotated[str | None, typer.Argument(help="A method: its parameters and a recipe to paste.")] = None,
    as_json: Json = False,
) -> None:
    """List the merge methods and the steps after a merge, or describe one."""
    from hf_fuse.merge import report

    if as_json:
        wanted = [report.find(name)] if name else report.listed()
        facts = [report.method_facts(method) for method in wanted]
        print(json.dumps(facts[0] if name else facts, indent=2))
    elif name:
        report.print_method(name, _console())
    else:
        report.print_methods(_console())


@app.command()
def schema(
    command: Annotated[Literal["merge", "train"], typer.Argument(help="What the recipe is for.")] = "merge",
) -> None:
    """Print the JSON schema of a recipe."""
    from hf_fuse.recipe import Recipe
    from hf_fuse.training_recipe import TrainingRecipe

    print(json.dumps((TrainingRecipe if command == "train" else Recipe).model_json_schema(), indent=2))


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="A model or adapter folder.")],
    repo: Annotated[str, typer.Argument(help="org/name")],
    private: Annotated[bool | None, typer.Option("--private/--public", help="Of a new repository.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to push to.", show_default=False)] = None,
    message: Annotated[str | None, typer.Option(help="Commit message.", show_default=False)] = None,
) -> None:
    """Push a folder to the Hub; files it no longer has are removed in the same commit."""
    from hf_fuse.hub import push as run

    print(f"pushed: {run(folder, repo, private=private, revision=revision, commit_message=message)}")


@app.command("extract-lora")
def extract_lora(
    model: Annotated[str, typer.Argument(help="A fine-tuned model: folder or Hub id.", show_default=False)],
    base: Annotated[str, typer.Option(help="The model it was fine-tuned from.", show_default=False)],
    rank: Annotated[int, typer.Option(help="Rank of the adapter, at most.", min=1, show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to make.", show_default=False)],
    energy: Annotated[
        float | None, typer.Option(help="Lower ranks where they hold this share, as 0.99.", show_default=False)
    ] = None,
    targets: Annotated[
        str | None, typer.Option(help="Modules: an expression; else all linear layers.", show_default=False)
    ] = None,
    save_full: Annotated[
        str | None, typer.Option(help="Tensors to keep whole: an expression, as norm.", show_default=False)
    ] = None,
    out_dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64.")] = "float32",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    overwrite: Overwrite = False,
    as_json: Json = False,
    allow_pickle: Pickle = False,
    workers: Annotated[int | None, typer.Option(help="Threads; one per core, at most 8.", min=1)] = None,
) -> None:
    """Turn a fine-tuned model into a LoRA adapter of its base, and say what that leaves out."""
    from hf_fuse.merge.extract_lora import extract_lora as run

    found = run(
        model, base, rank=rank, output=output, energy=energy, targets=targets, save_full=save_full,
        out_dtype=out_dtype, seed=seed, overwrite=overwrite, allow_pickle=allow_pickle, workers=workers,
    )  # fmt: skip
    print(json.dumps(found.to_dict(), indent=2)) if as_json else found.print(_console())


@app.command(context_settings=EXTRA)
def store(
    context: typer.Context,
    kind: Annotated[str, typer.Argument(help="twin or tall-masks.", show_default=False)],
    recipe: RecipeFile,
    output: Output = None,
    task: Annotated[list[str] | None, typer.Option(help="Name of a model, in their order; repeatable.")] = None,
    density: Annotated[
        str | None, typer.Option(help="twin: share of each difference's directions to keep.", show_default=False)
    ] = None,
    overwrite: Overwrite = False,
    allow_pickle: Pickle = False,
    verify: Verify = False,
    workers: Annotated[int | None, typer.Option(help="Threads; one per core, at most 8.", min=1)] = None,
) -> None:
    """Keep several fine-tunes in the room of few: twin (merged model + low-rank rest) or tall-masks (a bit per weight).

    Any recipe key can be set: --parameters.lambda 0.3
    """
    from hf_fuse.merge.extract import store as run
    from hf_fuse.recipe import read_yaml

    options: dict[str, Any] = {"tasks": task, "overrides": _overrides(context.args), "overwrite": overwrite}
    if density is not None:
        if kind != "twin":
            raise RecipeError(f"--density belongs to the store twin, not to {kind}. Leave it out.")
        options["density"] = read_yaml(density, "--density")
    folder = run(kind, recipe, output, allow_pickle=allow_pickle, verify=verify, workers=workers, **options)
    print(f"store: {folder}\nbytes: {sum(path.stat().st_size for path in folder.rglob('*') if path.is_file())}")


@app.command()
def extract(
    store: Annotated[Path, typer.Argument(help="A folder made by hf-fuse store.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to make.", show_default=False)],
    task: Annotated[str | None, typer.Option(help="The task whose model is wanted.", show_default=False)] = None,
    weight: Annotated[
        list[str] | None, typer.Option(help="Instead, a mix: TASK=NUMBER, repeatable (twin).", show_default=False)
    ] = None,
    base: Annotated[str | None, typer.Option(help="tall-masks: where the base is now.", show_default=False)] = None,
    out_dtype: Annotated[str | None, typer.Option(help="twin: dtype of the result.", show_default=False)] = None,
    overwrite: Overwrite = False,
    workers: Annotated[int | None, typer.Option(help="Threads; one per core, at most 8.", min=1)] = None,
) -> None:
    """Restore one task's model, or a mix of several, from a store."""
    from hf_fuse.merge.extract import extract as run
    from hf_fuse.merge.extract import parse_weights

    options = {"base": base, "out_dtype": out_dtype}
    options = {name: value for name, value in options.items() if value is not None}
    weights = parse_weights(weight) if weight else None
    folder = run(store, output, task=task, weights=weights, overwrite=overwrite, workers=workers, **options)
    print(f"restored: {folder}")


@app.command()
def inspect(
    models: Annotated[list[str], typer.Argument(help="Fine-tuned models: folders or Hub ids.")],
    base: Annotated[str, typer.Option(help="The model they were fine-tuned from.")],
    as_json: Json = False,
    plot: Annotated[Path | None, typer.Option(help="Save a heat-map of the cosines here.", show_default=False)] = None,
    per_tensor: Annotated[bool, typer.Option("--per-tensor", help="One row per tensor.")] = False,
    allow_pickle: Pickle = False,
) -> None:
    """Compare task vectors: norms, cosines and sign conflicts, per tensor and over the whole model."""
    from hf_fuse.diagnostics.task_vectors import inspect_models, print_inspection

    found = inspect_models(models, base, allow_pickle=allow_pickle)
    if plot:
        found.plot(plot)
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        print_inspection(found, _console(), per_tensor=per_tensor)


@app.command("eval")
def evaluate(
    models: Annotated[list[str], typer.Argument(help="One or several models: folders or Hub ids.")],
    text: Annotated[list[Path] | None, typer.Option(help="Text file for perplexity; repeatable.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Data file, folder or Hub id.", show_default=False)] = None,
    subset: Annotated[str | None, typer.Option(help="Configuration of the data set.", show_default=False)] = None,
    split: Annotated[str, typer.Option(help="Split of the data set.")] = "test",
    text_column: Annotated[str, typer.Option(help="Column with the text or image.")] = "text",
    label_column: Annotated[str | None, typer.Option(help="Column with labels: accuracy and F1.")] = None,
    tasks: Annotated[list[str] | None, typer.Option(help="lm-eval task; repeatable (extra: eval).")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    max_length: Annotated[int | None, typer.Option(min=2, help="Tokens per window.", show_default=False)] = None,
    stride: Annotated[int | None, typer.Option(min=1, help="Tokens between windows.", show_default=False)] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use the first N examples.", show_default=False)] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda[:N].")] = "cpu",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    tokenizer: Annotated[str | None, typer.Option(help="Tokenizer for all models.", show_default=False)] = None,
    as_json: Json = False,
    chart: Annotated[Path | None, typer.Option(help="Save a bar chart here.", show_default=False)] = None,
    write_card: Annotated[bool, typer.Option("--write-card", help="Put the figures into the models' cards.")] = False,
) -> None:
    """Evaluate models side by side: perplexity, accuracy and F1, or lm-eval tasks."""
    from hf_fuse.evaluation import evaluate_models

    report = evaluate_models(
        models, texts=text or [], dataset=dataset, subset=subset, split=split, text_column=text_column,
        label_column=label_column, tasks=tasks or [], batch_size=batch_size, max_length=max_length, stride=stride,
        limit=limit, device=device, dtype=dtype, tokenizer=tokenizer,
    )  # fmt: skip
    # Printed first: what was measured must not be lost to a missing plot library or a read-only card.
    print(report.to_json()) if as_json else report.print()
    if write_card:
        report.write_card()
    if chart:
        report.chart(chart)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for everything the demo makes.")] = Path(
        "hf-fuse-demo"
    ),
    seed: Annotated[int, typer.Option()] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="Seconds instead of minutes; the figures mean nothing.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Train experts on text that every Python carries, merge them by several methods, and compare."""
    from hf_fuse.demo import run_demo

    run_demo(output, seed=seed, quick=quick, overwrite=overwrite)
