"""The errors a user can cause or meet. Each message names what, where, what was expected and what to do next.

The command line prints the message alone; ``--debug`` shows the traceback as well.
"""


class FuseError(Exception):
    """Any failure that has an explanation. The message is complete: no traceback is needed to act on it."""


class RecipeError(FuseError):
    """The recipe asks for something that does not exist or does not fit together."""


class CheckpointError(FuseError):
    """An input checkpoint, adapter or tokenizer is damaged, incomplete or does not fit the others."""


class OutputError(FuseError):
    """The output folder exists, is in use by another run, or there is no room for it."""


class HubError(FuseError):
    """The Hub refused: token, access, a parallel push, or the network."""
