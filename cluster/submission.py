"""One job, submitted once: its name, its attempts, and what its end means. The same for every kind of cluster.

The name is a function of what is to run, so it is the idempotency key: whoever submits the same thing meets the same name. An
attempt that failed or was stopped is followed by `NAME-try2`, and so on; every verb continues where the one before ended.
"""

import hashlib
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from cluster import windows
from pipelines import cli
from pipelines.cluster_config import SubmitConfig, has_option
from pipelines.errors import EXIT_BUG, EXIT_OK, ConditionMissed, InputRefused, JepaError, Retryable, UsageError
from pipelines.presets import to_yaml

Status = Literal["waiting", "running", "succeeded", "failed", "stopped"]
LONGEST_NAME = 47
"""Of a RayJob: KubeRay appends to it and must stay below 63 characters."""
ATTEMPT = "-try"
SOURCES = (".py", ".yaml", ".yml", ".toml", ".jinja")
"""What of a working_dir makes it other code."""
SIGNALLED = 128
"""Exit codes above are those of processes that a signal has ended: the machine's doing, not the verb's."""
CLASSES: dict[int, type[JepaError]] = {error.exit_code: error for error in (UsageError, InputRefused, ConditionMissed, Retryable)}
TOLD = {2: "usage or configuration", 3: "input refused", 4: "condition missed", Retryable.exit_code: "may pass: try again"}


@dataclass(frozen=True)
class Job:
    """What is to run: its name, the verb, and the command line as a shell takes it."""

    name: str
    verb: str
    words: list[str]
    entrypoint: str
    window: str | None


@dataclass(frozen=True)
class State:
    """Of one attempt. `code` is the exit code of the verb, None where it did not end by itself."""

    status: Status
    code: int | None = None
    message: str = ""

    @property
    def going(self) -> bool:
        """Whether it may still change."""
        return self.status in ("waiting", "running")

    @property
    def exit_code(self) -> int:
        """What a process that stands for the job ends with: the verb's code; 75 for a job that was stopped or lost."""
        if self.status == "succeeded":
            return EXIT_OK
        if self.status == "failed" and self.code is not None and 0 < self.code <= SIGNALLED:
            return self.code if self.code in TOLD else EXIT_BUG
        return Retryable.exit_code

    def as_dict(self) -> dict[str, Any]:
        """For people and programs."""
        if self.going:
            return {"status": self.status}
        code = self.exit_code
        return {"status": self.status, "exit_code": code, "retry": code == Retryable.exit_code}


class Backend(Protocol):
    """A cluster that takes jobs. All raise UsageError, InputRefused or Retryable as the case may be."""

    def states(self, prefix: str) -> Mapping[str, State]:
        """Jobs whose names begin so."""

    def start(self, name: str, job: Job) -> bool:
        """Take the job; False when one of this name stands there already."""

    def follow(self, name: str) -> State:
        """Print what the job says until it ends."""


def job_of(config: SubmitConfig) -> Job:
    """The job that a command means; the options' values count, not their order or where they come from."""
    verb, words, options = cli.checked_command(config.command)
    schema = cli.VERBS[verb].options
    if any(word.startswith("ray.address=") for word in words):
        raise UsageError("ray.address is set by jepa submit: the job joins the cluster that it runs on")
    local = [word for word in words if re.match(r"preset=.*\.ya?ml$", word)]
    if local and not config.working_dir:
        raise UsageError(f"{local[0]} is a file here: give working_dir=FOLDER with it inside, or write its options out")
    window = windows.name_of(config.window) if config.window else None
    code = _code_digest(config.working_dir) if config.working_dir else ""
    digest = hashlib.sha256(f"{verb}\n{to_yaml(options)}{code}".encode()).hexdigest()[:10]
    if window and verb == "ingest" and not options.run:
        words = [*words, f"run={window}-{digest[:6]}"]  # several sources may go into one catalog in the same window
    room = LONGEST_NAME - len(ATTEMPT) - len(f"jepa--{digest}99") - (len(window) + 1 if window else 0)
    parts = ["jepa", verb.replace(" ", "-")[:room].rstrip("-"), digest, *([window] if window else [])]
    command = ["python", "-m", "pipelines.cli"] if config.working_dir else ["jepa"]
    joins = ["ray.address=auto"] if has_option(schema, "ray") else []
    return Job("-".join(parts), verb, words, shlex.join([*command, *verb.split(), *words, *joins]), window)


def _code_digest(folder: str) -> str:
    """Of the sources below a folder: changed code is another job. Raises UsageError where there is no such folder."""
    if not Path(folder).is_dir():
        raise UsageError(f"working_dir={folder} is no folder: check the path")
    digest = hashlib.sha256()
    for path in sorted(path for path in Path(folder).rglob("*") if path.suffix in SOURCES and path.is_file()):
        place = path.relative_to(folder)
        if not any(part.startswith(".") for part in place.parts):
            digest.update(f"{place}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def begin(backend: Backend, job: Job, *, again: bool) -> tuple[str, bool]:
    """(name of the attempt, whether it is new). Attaches to what waits, runs or has succeeded; starts another attempt otherwise.

    `again` also starts one after a success. Of several that submit at once, one starts the attempt and the others attach.
    """
    while True:
        attempts = attempts_of(job.name, backend.states(job.name))
        number = max(attempts, default=0)
        if number and (attempts[number].going or (attempts[number].status == "succeeded" and not again)):
            return name_of(job.name, number), False
        name = name_of(job.name, number + 1)
        if backend.start(name, job):
            return name, True
        again = False  # somebody else was quicker: that one is it


def attempts_of(name: str, states: Mapping[str, State]) -> dict[int, State]:
    """Attempt number -> state, of the jobs that are attempts at `name`."""
    pattern = re.compile(re.escape(name) + rf"(?:{ATTEMPT}(\d+))?")
    found = {match: state for other, state in states.items() if (match := pattern.fullmatch(other))}
    return {int(match[1] or 1): state for match, state in found.items()}


def name_of(name: str, number: int) -> str:
    """The job of the attempt with this number, counted from 1."""
    return name if number == 1 else f"{name}{ATTEMPT}{number}"


def end(name: str, state: State) -> None:
    """Raise what a job's end means for who waits for it: the type of error that the verb itself raised; nothing after success."""
    code = state.exit_code
    if code == EXIT_OK:
        return
    message = f"job {name} {_how(state)}"
    raise CLASSES.get(code, JepaError)(message)


def _how(state: State) -> str:
    if state.status == "stopped":
        return "was stopped: the same submit continues it under the next attempt's name"
    if state.code is None or not 0 < state.code <= SIGNALLED:
        return f"was lost ({state.message or 'its process did not end by itself'}): the same submit continues it"
    return f"ended with exit code {state.code} ({TOLD.get(state.code, 'a bug')}): its log says why"


def last_line(text: str) -> str:
    """The last line that says something: of a traceback, the error."""
    lines = [line.strip() for line in text.splitlines() if any(letter.isalnum() for letter in line)]
    return lines[-1].rstrip(".") if lines else "no reason given"
