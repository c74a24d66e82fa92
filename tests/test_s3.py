"""Against a real S3 server: ingest, pretrain, resume. moto's by default, any endpoint named by JEPA_TEST_S3_ENDPOINT."""

import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from conftest import S3_ENDPOINT, encode, events, jepa, make_frames

pytestmark = [pytest.mark.ray, pytest.mark.s3]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def endpoint() -> Iterator[dict[str, str]]:
    """Environment of a running S3 server."""
    keys = {"AWS_REGION": "us-east-1"}
    if os.environ.get(S3_ENDPOINT):
        yield keys | {"AWS_ENDPOINT_URL": os.environ[S3_ENDPOINT]}
        return
    port = free_port()
    server = subprocess.Popen([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    keys |= {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
    }
    for _ in range(200):
        with socket.socket() as attempt:
            if attempt.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.1)
    yield keys
    server.terminate()
    server.wait()


@pytest.fixture(scope="module")
def bucket(endpoint: dict[str, str]) -> str:
    """A fresh bucket with two videos and a truncated one."""
    import boto3
    from botocore.config import Config

    client = boto3.client(
        "s3",
        endpoint_url=endpoint["AWS_ENDPOINT_URL"],
        region_name="us-east-1",
        aws_access_key_id=endpoint.get("AWS_ACCESS_KEY_ID"),
        aws_secret_access_key=endpoint.get("AWS_SECRET_ACCESS_KEY"),
        config=Config(request_checksum_calculation="when_required"),
    )
    name = f"jepa-test-{secrets.token_hex(4)}"
    client.create_bucket(Bucket=name)
    for index in range(2):
        client.put_object(Bucket=name, Key=f"raw/a{index}.mp4", Body=encode(make_frames(60, seed=index)))
    whole = encode(make_frames(60))
    client.put_object(Bucket=name, Key="raw/broken.mp4", Body=whole[: len(whole) // 2])
    return f"s3://{name}"


def test_ingest_pretrain_and_resume_on_s3(endpoint, bucket):
    catalog, run = f"catalog={bucket}/catalog", f"run.dir={bucket}/runs/one"
    ingested = jepa("ingest", f"source={bucket}/raw", catalog, env=endpoint)
    assert ingested.returncode == 0, ingested.stderr
    assert events(ingested)[-1] | {"ingested": 2, "refused": 1, "reasons": {"not_a_video": 1}} == events(ingested)[-1]

    smoke = ["pretrain", "preset=demo", "smoke=true", catalog, run]
    first = jepa(*smoke, "train.steps=2", env=endpoint)
    assert first.returncode == 0, first.stderr
    second = jepa(*smoke, "train.steps=4", "run.resume=must", env=endpoint)
    assert second.returncode == 0, second.stderr
    steps = [event["done"] for event in events(second) if event["event"] == "progress"]
    assert steps == [3, 4], "the second command continues where the first stopped"
    assert events(second)[-1]["catalogs"] == {"catalog": f"{bucket}/catalog@1"}


@pytest.mark.robot
def test_trajectories_of_a_shard_on_s3(endpoint, bucket, tmp_path):
    import robot_files as files

    (shard,) = files.write_rlds(tmp_path, [[files.rlds_episode(12)]])
    code = "import sys; from pipelines import storage; storage.upload(sys.argv[1], sys.argv[2])"
    target = f"{bucket}/droid_100/1.0.0/{shard.name}"
    subprocess.run([sys.executable, "-c", code, str(shard), target], env=os.environ | endpoint, check=True)
    words = ["ingest", "trajectories", f"source={bucket}/droid_100", f"catalog={bucket}/robots"]
    first, again = (jepa(*words, env=endpoint) for _ in range(2))
    assert first.returncode == again.returncode == 0, first.stderr + again.stderr
    assert [events(result)[-1]["ingested"] for result in (first, again)] == [3, 0]
    read = (
        "import sys; from pipelines import catalog, storage, trajectories as t; "
        "rows = catalog.read(catalog.parse_ref(sys.argv[1]), 'trajectories'); storage.reset_counters(); "
        "print(t.read_frames(rows, 1, __import__('numpy').array([2, 5]), 32)[0].shape, storage.counters()['requests'])"
    )
    command = [sys.executable, "-c", read, f"{bucket}/robots"]
    result = subprocess.run(command, env=os.environ | endpoint, capture_output=True, text=True)
    assert result.stdout.strip() == "(2, 32, 32, 3) 1", result.stderr


def test_refusals_say_what_and_where(endpoint, bucket):
    empty = jepa("ingest", f"source={bucket}/nothing", f"catalog={bucket}/catalog", env=endpoint)
    assert (empty.returncode, "no video below" in empty.stderr) == (3, True)
    missing = jepa("pretrain", "preset=demo", "smoke=true", f"catalog={bucket}/none", f"run.dir={bucket}/x", env=endpoint)
    assert (missing.returncode, "holds no catalog" in missing.stderr) == (3, True)
    absent = jepa("ingest", "source=s3://no-such-bucket-here/x", f"catalog={bucket}/catalog", env=endpoint)
    assert (absent.returncode, "no-such-bucket-here" in absent.stderr) == (3, True)


def test_an_unreachable_store_is_retryable_and_quick(endpoint):
    dead = endpoint | {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_port()}",
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
    }
    before = time.monotonic()
    result = jepa("ingest", "source=s3://bucket/x", "catalog=s3://bucket/c", env=dead)
    assert result.returncode == 75, result.stderr
    assert "did not answer" in result.stderr
    assert '"retry": true' in result.stderr
    assert time.monotonic() - before < 60
