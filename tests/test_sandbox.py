"""The sandbox: what a hostile file's process can reach, and what becomes of one that eats memory, time or itself."""

import io
import os
import signal
import socket
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import encode, make_frames

from pipelines import sandbox, sandbox_child
from pipelines.curation import CurationConfig
from pipelines.errors import Retryable
from pipelines.ingest_config import LimitsConfig
from pipelines.video import VideoRefused

QUICK = LimitsConfig(memory_mb=300, cpu_s=2, idle_s=2.0)
FACTS = {"curation": vars(CurationConfig()), "max_pixels": 10**8, "max_frames": 10**6, "max_streams": 8, "max_index_mb": 8}


def hostile(file, *, deed):
    """What code that a video has taken over might try; runs in the child."""
    if deed == "read":
        return {"data": file.read(), "array": np.arange(3), "text": "x"}
    if deed == "memory":
        return {"n": len(bytearray(2 << 30))}
    if deed == "spin":
        while True:
            pass
    if deed == "sleep":
        time.sleep(3600)
    if deed == "abort":
        os.abort()
    if deed == "linger":  # answers, and does not end
        sandbox_child.send(file._channel, sandbox_child.RESULT, sandbox_child.pack_result({"n": 1}))
        time.sleep(3600)
    if deed == "open":
        os.open("/etc/hostname", os.O_RDONLY)
    if deed == "connect":
        socket.socket()
    if deed == "write":
        os.write(3, b"\xff" * 9)  # nonsense into the channel
        time.sleep(3600)
    if deed == "outside":
        sandbox_child.send(file._channel, sandbox_child.READ, sandbox_child.SPAN.pack(0, 10**12))
        time.sleep(3600)
    if deed == "circles":
        while True:
            file.fetch(0, file.size)
    if deed == "secrets":
        return {"env": [value for value in os.environ.values() if "s3cret" in value]}
    raise AssertionError(deed)


@pytest.fixture(scope="module")
def box():
    """A zygote that also knows the function above."""
    patched = dict(sandbox.FUNCTIONS) | {"hostile": "test_sandbox:hostile"}
    zygote = sandbox._Zygote.__new__(sandbox._Zygote)
    environment = os.environ.get("PYTHONPATH")
    os.environ["AWS_TEST_SECRET"] = "s3cret"
    os.environ["PYTHONPATH"] = os.path.dirname(__file__)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox, "FUNCTIONS", patched)
        patch.setattr(sandbox, "PROGRAM", ("-c", PROGRAM))
        sandbox._Zygote.__init__(zygote)
    del os.environ["AWS_TEST_SECRET"]
    if environment is None:
        del os.environ["PYTHONPATH"]
    yield zygote
    zygote.close()


PROGRAM = """
import sys
from pipelines import sandbox_child
sandbox_child.FUNCTIONS["hostile"] = "test_sandbox:hostile"
sys.modules["__main__"] = sandbox_child
sandbox_child.main()
"""


def source(data: bytes) -> sandbox.Source:
    return sandbox.Source(len(data), lambda start, stop: data[start:stop])


def test_bytes_go_in_and_values_come_out(box):
    data = os.urandom(3_000_000)
    values, cost = box.call("hostile", source(data), QUICK, {"deed": "read"})
    assert (values["data"], values["text"], values["array"].tolist()) == (data, "x", [0, 1, 2])
    assert cost.cpu_s < 2


@pytest.mark.parametrize(
    ("deed", "reason", "detail"),
    [
        ("memory", "limit_memory", "memory"),
        ("spin", "limit_time", "CPU"),
        ("sleep", "limit_time", "no sign of life"),
        ("circles", "limit_time", "times"),
        ("abort", "crashed", "SIGABRT"),
        ("open", "crashed", "Too many open files"),
        ("connect", "crashed", "Too many open files"),
        ("write", "crashed", "nonsense"),
        ("outside", "crashed", "outside"),
    ],
)
def test_a_hostile_process_ends_with_a_reason_and_the_next_file_is_served(box, deed, reason, detail):
    before = time.monotonic()
    with pytest.raises(VideoRefused) as caught:
        box.call("hostile", source(b"x" * 100_000), QUICK, {"deed": deed})
    assert (caught.value.reason, detail in caught.value.detail) == (reason, True), caught.value
    assert time.monotonic() - before < 20
    assert box.call("hostile", source(b"abc"), QUICK, {"deed": "read"})[0]["data"] == b"abc"


def test_a_process_that_answers_and_stays_is_killed(box, monkeypatch):
    monkeypatch.setattr(sandbox, "GRACE_S", 0.2)
    assert box.call("hostile", source(b"x"), QUICK, {"deed": "linger"})[0] == {"n": 1}
    assert box.call("hostile", source(b"abc"), QUICK, {"deed": "read"})[0]["data"] == b"abc"


@pytest.mark.parametrize("whom", ["child", "parent"])
def test_a_process_that_somebody_kills_is_tried_again(whom):
    reads = []

    def read(start, stop):
        reads.append(start)
        if len(reads) == 1:
            zygote = sandbox._current._process.pid
            (child,) = Path(f"/proc/{zygote}/task/{zygote}/children").read_text().split()
            os.kill(int(child) if whom == "child" else zygote, signal.SIGKILL)
        return data[start:stop]

    data = encode(make_frames(6))
    values, _ = sandbox.call("probe", sandbox.Source(len(data), read), LimitsConfig(), validate="none", **FACTS)
    assert values["num_frames"] == 6


def test_a_file_whose_process_is_killed_every_time_is_refused():
    def read(start, stop):
        zygote = sandbox._current._process.pid
        (child,) = Path(f"/proc/{zygote}/task/{zygote}/children").read_text().split()
        os.kill(int(child), signal.SIGKILL)
        return bytes(stop - start)

    with pytest.raises(VideoRefused) as caught:
        sandbox.call("probe", sandbox.Source(100_000, read), LimitsConfig(), validate="none", **FACTS)
    assert (caught.value.reason, "killed 3 times" in caught.value.detail) == ("limit_memory", True)


def test_the_child_sees_no_credentials(box):
    assert box.call("hostile", source(b"x"), QUICK, {"deed": "secrets"})[0]["env"] == []


def test_errors_of_the_store_are_not_the_file_s_fault(box):
    def down(start, stop):
        raise Retryable("the store is down")

    with pytest.raises(Retryable, match="down"):
        box.call("hostile", sandbox.Source(10, down), QUICK, {"deed": "read"})
    assert box.call("hostile", source(b"abc"), QUICK, {"deed": "read"})[0]["data"] == b"abc"


@pytest.mark.parametrize("validate", ["none", "sample", "full"])
def test_probing_in_the_sandbox_needs_no_file_of_python_either(validate):
    """Every module that a probe may import is imported before the fork: all kinds of containers and codecs, with curation."""
    kinds = {
        "libx264": ("mp4", "matroska", "mpegts"),
        "libx265": ("mp4",),
        "libvpx": ("webm",),
        "mpeg4": ("avi",),
        "gif": ("gif",),
    }
    curation = vars(CurationConfig(shots=True, duplicates=True, motion=True))
    for codec, containers in kinds.items():
        for container in containers:
            frames = make_frames(12)
            data = encode(frames, codec, container) if codec != "gif" else gif(frames)
            values, _ = sandbox.call("probe", source(data), LimitsConfig(), validate=validate, **FACTS | {"curation": curation})
            assert values["num_frames"] == 12, (codec, container)
            assert (values.get("hashes") is not None) == (validate == "full")


def gif(frames: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    pictures = [Image.fromarray(frame) for frame in frames]
    pictures[0].save(buffer, "GIF", save_all=True, append_images=pictures[1:], duration=40)
    return buffer.getvalue()


def test_limits_of_size_are_reasons():
    data = encode(make_frames(12))
    for limit, reason in (({"max_pixels": 100}, "too_large"), ({"max_frames": 5}, "too_large")):
        with pytest.raises(VideoRefused) as caught:
            sandbox.call("probe", source(data), LimitsConfig(), validate="none", **FACTS | limit)
        assert caught.value.reason == reason
