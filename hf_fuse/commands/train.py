from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_fuse.commands import EXTRA, Output, Overwrite, Private, Push, app, overrides


@app.command(context_settings=EXTRA)
def train(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(help="A training recipe in YAML.", show_default=False)],
    output: Output = None,
    overwrite: Overwrite = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
    push: Push = None,
    private: Private = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, train nothing.")] = False,
) -> None:
    """Train an adapter or a model as a recipe says. Any recipe key can be set: --train.learning_rate 1e-4

    Several processes: --num_processes 2, or accelerate launch -m hf_fuse train recipe.yaml
    """
    from hf_fuse.train import train as run
    from hf_fuse.training_launch import speaks
    from hf_fuse.training_recipe import TrainingRecipe

    given = overrides(context.args, TrainingRecipe.model_fields)
    options = {"output": output, "overwrite": overwrite, "resume": resume, "push": push, "private": private}
    made = run(recipe, given, **options, dry_run=dry_run)
    if speaks() and not dry_run:
        print(f"trained: {made.output}")
        for name, value in made.to_dict().items():
            print(f"{name.replace('_', ' ')}: {value:{'.4g' if isinstance(value, float) else ','}}")
        if made.address:
            print(f"pushed: {made.address}")
