"""What can go wrong, as types that know their exit code.

Every message says what, where, and what to do, in one sentence. The exit code tells a scheduler whether to try again.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

EXIT_OK = 0
EXIT_BUG = 1
EXIT_INTERRUPTED = 130


class JepaError(Exception):
    """Base of every error that a user is meant to read; `exit_code` is what the process ends with."""

    exit_code: ClassVar[int] = EXIT_BUG


class UsageError(JepaError):
    """The command or the configuration is wrong: change it, trying again as it is will fail again."""

    exit_code = 2


class InputRefused(JepaError):
    """The input data cannot be used (empty prefix, corrupt beyond budget, missing checkpoint)."""

    exit_code = 3


class ConditionMissed(JepaError):
    """The work is done and its result stands, but it is not what the command was told to require."""

    exit_code = 4


class Retryable(JepaError):
    """Something outside failed (network, object store, a lost worker): the same command may succeed later."""

    exit_code = 75


def unwrapped(error: BaseException) -> BaseException:
    """The first error of ours in a chain that Ray has wrapped around what a task raised; the error itself when there is none."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, JepaError):
            return seen
        seen = getattr(seen, "cause", None) or seen.__cause__
    return error


def last_line(error: BaseException) -> str:
    """What a traceback that Ray has made the message of an error ends with."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


@contextmanager
def unwrapping(lost: str = "") -> Iterator[None]:
    """Raises our own error, which Ray wraps, as the task raised it.

    Of any other error, `lost` makes a Retryable: one sentence with {} for what the error says last. Without it they pass.
    """
    try:
        yield
    except Exception as error:
        ours = unwrapped(error)
        if ours is not error:
            raise ours from error
        if isinstance(error, JepaError) or not lost:
            raise
        raise Retryable(lost.format(last_line(error))) from error
