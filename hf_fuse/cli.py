"""The process ``hf-fuse``: how it starts, how it fails, how it ends. The commands are in ``hf_fuse.commands``."""

from __future__ import annotations

import atexit
import os
import signal
import sys
from importlib import import_module

import typer

from hf_fuse.commands import COMMANDS, app
from hf_fuse.errors import FuseError

for _name in COMMANDS:
    import_module(f"hf_fuse.commands.{_name}")

INTERRUPTED = 130  # exit status of what Ctrl-C ended


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
