"""Several processes for one training run: started with accelerate, counted, and told apart."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

from hf_fuse.errors import FuseError, RecipeError
from hf_fuse.recipe import dump_recipe
from hf_fuse.training_recipe import TrainingRecipe

MARK = "HF_FUSE_LAUNCHED"  # set in the environment of the processes that `launch` starts


def started_here() -> bool:
    """Whether this is one of the processes that :func:`launch` started."""
    return MARK in os.environ


def launched() -> bool:
    """Whether this process is one of a group already, ours or another launcher's."""
    return started_here() or "WORLD_SIZE" in os.environ


def ranks() -> tuple[int, int]:
    """``(number of this process, number of processes)``."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def speaks() -> bool:
    """Whether this process tells the result: the launching one, or the first of another launcher's group."""
    return not started_here() and ranks()[0] == 0


def launch(recipe: TrainingRecipe, *, use_cpu: bool, overwrite: bool, resume: bool) -> None:
    """Runs ``hf-fuse train`` in as many processes as the recipe says, and waits for them.

    ``accelerate launch --cpu --num_processes 2`` starts one process only. What starts two, with and without GPUs, is
    ``--multi_gpu``; the processes find out that there are none. Each of them checks how many they are.

    Raises:
        RecipeError: fewer GPUs than processes, or accelerate refuses its config file.
        FuseError: a process failed. It has said why itself, unless it was killed.
    """
    import torch
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    count = recipe.num_processes
    if count and not use_cpu and not recipe.accelerate_config and torch.cuda.device_count() < count:
        raise RecipeError(
            f"num_processes is {count}, but there are {torch.cuda.device_count()} GPUs. Lower it, or set "
            "train.use_cpu: true."
        )
    with tempfile.TemporaryDirectory(prefix="hf-fuse-train-") as scratch:
        file = Path(scratch) / "recipe.yaml"
        # The config file has been used once the processes run; what is pushed is the launcher's business.
        file.write_text(dump_recipe(recipe.model_copy(update={"push": None})), encoding="utf-8")
        command = ["--module", "hf_fuse", "train", str(file)]
        command += [flag for flag, wanted in (("--overwrite", overwrite), ("--resume", resume)) if wanted]
        options = ["--main_process_port", str(_free_port())]
        options += ["--num_processes", str(count)] if count else []
        if recipe.accelerate_config:
            options += ["--config_file", recipe.accelerate_config]
        else:
            options += ["--multi_gpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        arguments = launch_command_parser().parse_args(options + command)
        os.environ[MARK] = "1"
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # DDP's advice, once per process
        noise = logging.getLogger("torch.distributed.elastic")
        level, handlers = noise.level, {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        noise.setLevel(logging.CRITICAL)
        try:
            launch_command(arguments)
        except ChildFailedError as error:
            raise _failure(error) from None
        except SignalException:
            raise KeyboardInterrupt from None
        except (ValueError, OSError, ImportError) as error:
            raise RecipeError(
                f"accelerate can't start {count or 'the'} processes: {' '.join(str(error).split())}"
            ) from error
        finally:
            noise.setLevel(level)
            del os.environ[MARK]
            for number, handler in handlers.items():  # the launcher leaves its own
                signal.signal(number, handler)


def _failure(error: Exception) -> FuseError:
    rank, failure = error.get_first_failure()
    if failure.exitcode < 0:
        how = signal.Signals(-failure.exitcode).name
        return FuseError(
            f"process {rank} of the training was killed ({how}), perhaps for want of memory. The old output, if any, "
            "is intact; --resume goes on from the last checkpoint."
        )
    found = FuseError(f"process {rank} of the training failed.")
    found.said_by_lead = True
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def quiet(rank: int) -> Iterator[None]:
    """Progress bars of the libraries on a terminal only, and of the first process only; of the others no warnings."""
    import datasets
    from transformers.utils import logging as library

    bars, rows = library.is_progress_bar_enabled(), datasets.is_progress_bar_enabled()
    verbosity = library.get_verbosity()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # what libraries tell each other
        if rank or not sys.stderr.isatty():
            library.disable_progress_bar()
            datasets.disable_progress_bars()
        if rank:
            library.set_verbosity_error()
            warnings.simplefilter("ignore")
        try:
            yield
        finally:
            library.set_verbosity(verbosity)
            if bars:
                library.enable_progress_bar()
            if rows:
                datasets.enable_progress_bars()


@contextlib.contextmanager
def said_by_lead(rank: int) -> Iterator[None]:
    """What every process finds out for itself is said by the first."""
    try:
        yield
    except FuseError as error:
        error.said_by_lead = rank > 0
        raise
