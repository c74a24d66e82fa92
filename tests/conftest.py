"""Shared parts of the tests: environment before Ray is imported, real encoded videos, a real S3 server, one Ray session."""

import os
import secrets

# Ray reads its token once, when it is first imported.
os.environ["RAY_AUTH_MODE"] = "token"
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
os.environ.setdefault("AWS_EC2_METADATA_DISABLED", "true")

import io
import json
import subprocess
import sys
import tempfile
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import timm  # noqa: F401 - what torch imports with it crashes the process once headless_gl has loaded Mesa, in whatever file

S3_ENDPOINT = "JEPA_TEST_S3_ENDPOINT"
"""Names an S3 server to test against instead of moto's; credentials by AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."""


def make_frames(num_frames: int, width: int = 96, height: int = 64, seed: int = 0) -> np.ndarray:
    """Moving texture uint8 [F, H, W, 3]: every frame differs from every other."""
    rng = np.random.default_rng(seed)
    texture = rng.integers(0, 256, (height // 8 + 16, width // 8 + 64, 3), dtype=np.uint8)
    texture = texture.repeat(8, axis=0).repeat(8, axis=1)
    return np.stack([texture[k : k + height, 3 * k % 256 : 3 * k % 256 + width] for k in range(num_frames)])


def encode(frames: np.ndarray, codec: str = "libx264", container: str = "mp4", pts: list[int] | None = None, rate: int = 30,
           options: dict[str, str] | None = None, container_options: dict[str, str] | None = None) -> bytes:  # fmt: skip
    """A real encoded video; `pts` in 1/rate seconds makes the frame rate variable."""
    buffer = tempfile.TemporaryFile() if container_options else io.BytesIO()  # noqa: SIM115 - faststart needs a name
    target = f"/proc/self/fd/{buffer.fileno()}" if container_options else buffer
    with av.open(target, "w", format=container, container_options=container_options or {}) as out:
        stream = out.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.time_base = Fraction(1, rate)
        for index, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts = pts[index] if pts else index
            frame.time_base = Fraction(1, rate)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    buffer.seek(0)
    return buffer.read()


def facts_of(data: bytes, validate: str = "none", **limits: int) -> SimpleNamespace:
    """What probing tells about a file, with the times of its frames as `pts`. Raises VideoRefused."""
    from pipelines import packet_index, sandbox
    from pipelines.ingest_config import LimitsConfig

    source = sandbox.Source(len(data), lambda start, stop: data[start:stop])
    facts, _ = sandbox.probe(source, LimitsConfig(**limits), validate)
    index = packet_index.decode(facts["blob"], facts["index_directory"])
    return SimpleNamespace(**facts, index=index, pts=packet_index.shown(index))


def make_corpus(folder: Path, count: int = 3) -> Path:
    """`count` good videos, a truncated one, a text in disguise and an empty file."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        (folder / f"good{index}.mp4").write_bytes(encode(make_frames(60, seed=index)))
    whole = (folder / "good0.mp4").read_bytes()
    (folder / "truncated.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "text.mp4").write_text("not a video at all\n" * 100)
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "notes.txt").write_text("not listed")
    return folder


def make_catalogs(root: Path, videos: dict[str, int], reporter) -> dict[str, str]:
    """Catalogs below `root` of so many videos of 40 frames each, and one of five `images`: {name: uri@version}."""
    from PIL import Image

    from pipelines import catalog, ingest
    from pipelines.ingest_config import IngestConfig

    for name, count in videos.items():
        (root / name).mkdir()
        for index in range(count):
            (root / name / f"{index}.mp4").write_bytes(encode(make_frames(40, seed=index)))
    (root / "images").mkdir()
    for index, picture in enumerate(make_frames(5, seed=9)):
        Image.fromarray(picture).save(root / "images" / f"{index}.png")
    made = {}
    for name in (*videos, "images"):
        kind = "images" if name == "images" else "auto"
        ingest.run(IngestConfig(source=f"{root}/{name}", catalog=f"{root}/catalog-{name}", kind=kind), reporter)
        made[name] = str(catalog.pin(catalog.parse_ref(f"{root}/catalog-{name}")))
    return made


def jepa(*arguments: str, env: dict[str, str] | None = None, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    command = [sys.executable, "-m", "pipelines.cli", *arguments]
    base = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return subprocess.run(command, env={**base, **(env or {})}, capture_output=True, text=True, timeout=timeout)


def events(result: subprocess.CompletedProcess[str]) -> list[dict]:
    """The JSON lines that a command printed."""
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def ray_session():
    """One embedded Ray for all tests that need one in this process."""
    from pipelines import ray_session as module
    from pipelines.config import RayConfig

    with module.session(RayConfig(object_store_mb=512)):
        yield


@pytest.fixture(scope="session")
def reporter():
    from pipelines.progress import Reporter

    return Reporter(io.StringIO())


@pytest.fixture(scope="session")
def catalog_uri(corpus: Path, ray_session, reporter, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A catalog of the corpus."""
    from pipelines import ingest
    from pipelines.ingest_config import IngestConfig

    uri = str(tmp_path_factory.mktemp("catalog") / "c")
    ingest.run(IngestConfig(source=str(corpus), catalog=uri), reporter)
    return uri
