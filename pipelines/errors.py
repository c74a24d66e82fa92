"""What can go wrong, as types that know their exit code.

Every message says what, where, and what to do, in one sentence. The exit code tells a scheduler whether to try again.
"""

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
