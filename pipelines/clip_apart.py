"""One training clip read in a process of its own: what kills that process is a reason, not the end of a Ray task.

For units whose task has died before. Ray tries such a task again without end, so a video that crashes a codec would stop a
run for good.
"""

import os
import pickle
import signal
import subprocess
import sys
from typing import Any

import numpy as np

from jepa_core.config import ClipConfig
from pipelines.catalog_schema import CatalogRef
from pipelines.clip_reader import read_clip
from pipelines.errors import JepaError, Retryable
from pipelines.video import VideoRefused

PROGRAM = ("-m", "pipelines.clip_apart")
TRIES = 3
"""A process that somebody else killed (SIGKILL) says nothing about its video, unless it happens again and again."""


def read_clip_apart(ref: CatalogRef, entry: dict[str, Any], clip: ClipConfig, rng: np.random.Generator, out: np.ndarray) -> None:
    """What clip_reader.read_clip writes into `out`, and raises; VideoRefused("crashed") besides, where the process dies of it."""
    request = pickle.dumps((ref, entry, clip, rng, out.shape))
    for _ in range(TRIES):
        ended = subprocess.run([sys.executable, *PROGRAM], input=request, capture_output=True)
        if ended.returncode != -signal.SIGKILL:
            break
    if ended.returncode < 0:
        raise VideoRefused("crashed", f"the process that read it died of {signal.Signals(-ended.returncode).name}")
    if ended.returncode:
        last = (ended.stderr.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
        raise Retryable(f"{entry['uri']}: the process that read it failed ({last}): try again")
    answer = pickle.loads(ended.stdout)  # noqa: S301, of our own process
    if isinstance(answer, Exception):
        raise answer
    out[...] = np.frombuffer(answer, np.uint8).reshape(out.shape)


def main() -> None:
    """The other side: a request on standard input, frames or an error on standard output."""
    ref, entry, clip, rng, shape = pickle.load(sys.stdin.buffer)  # noqa: S301, of the process that started this one
    answers, sys.stdout = os.fdopen(os.dup(1), "wb"), sys.stderr  # what a library prints must not get among them
    out = np.empty(shape, np.uint8)
    try:
        read_clip(ref, entry, clip, rng, out)
    except (VideoRefused, JepaError) as error:
        answers.write(pickle.dumps(error))
    else:
        answers.write(pickle.dumps(out.tobytes()))
    answers.flush()


if __name__ == "__main__":
    main()
