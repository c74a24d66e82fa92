"""Units: one row without copies, and their way through Ray Data: in order, to the right worker, with bounded room."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import ray
import ray.data

from pipelines import units
from pipelines.config import DataConfig
from pipelines.errors import InputRefused, Retryable

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's workers cannot import tests
PARTS = 4
"""Microbatches of a step."""


def example(number=5):
    tubelets = np.random.default_rng(number).integers(0, 256, (2, 3, 4), dtype=np.uint8)
    states = np.arange(10, dtype=np.float32).reshape(2, 5)
    failures = [{"sample": 3, "reason": "undecodable", "detail": 'a "quote"'}]
    row = units.block(number, 1, 2, np.array([10, 11]), {"tubelets": tubelets, "states": states},
                      datasets=np.array([0, 3]), digest="ab", failures=failures)  # fmt: skip
    return row, tubelets, states, failures


def test_a_row_gives_back_what_was_put_in_without_a_copy():
    row, tubelets, states, failures = example()
    unit = units.unit_of(row)
    assert (unit.number, unit.step, unit.group, unit.digest, unit.failures) == (5, 1, 2, "ab", failures)
    assert (unit.samples.tolist(), unit.datasets.tolist()) == ([10, 11], [0, 3])
    for name, array in (("tubelets", tubelets), ("states", states)):
        found = unit.array(name, array.dtype, array.shape)
        np.testing.assert_array_equal(found, array)
        assert found.ctypes.data == array.ctypes.data
        assert not found.flags.writeable
    assert unit.array("states", np.float32, (2, -1)).shape == (2, 5)


def test_rows_are_found_in_sliced_and_combined_tables():
    table = pa.concat_tables([example(4)[0], example(5)[0]])
    for each in (table, table.combine_chunks()):
        unit = units.unit_of(each.slice(1, 1))
        np.testing.assert_array_equal(unit.array("tubelets", np.uint8, (2, 3, 4)), example(5)[1])
        assert unit.samples.tolist() == [10, 11]


def test_fillers_have_the_columns_of_a_unit_and_no_data():
    row = units.empty(9, units.FILLER, ["tubelets", "states"])
    assert row.schema == example()[0].schema
    unit = units.unit_of(row)
    assert (unit.number, unit.step, len(unit.samples), unit.failures) == (9, units.FILLER, 0, [])
    assert unit.array("states", np.float32, (0, 5)).size == 0


def test_the_digest_tells_samples_ids_and_order_apart():
    digests = [units.digest(np.array(samples), ids) for samples, ids in
               [([1, 2], "ab"), ([1, 2], "ba"), ([2, 1], "ab"), ([1, 3], "ab"), ([12], "a")]]  # fmt: skip
    assert len(set(digests)) == 5
    assert digests[0] == "321d21f102efa96b"


def test_a_month_of_steps_is_planned_in_segments_that_miss_and_repeat_nothing():
    span = units.Span(17, 240_000, 128)
    pieces = span.pieces()
    assert len(pieces) == span.segment // units.CHUNK == 512
    segments = -(-(240_000 - 17) * 128 // span.segment)
    seen = 17 * 128
    for segment in (*range(3), segments - 2, segments - 1):
        told = [pair for piece in pieces for pair in span.numbers(piece, segment, 3)]
        numbers = [unit for unit, step in told if step != units.FILLER]
        if segment == segments - 2:
            seen = numbers[0]
        assert numbers == list(range(seen, seen + len(numbers)))
        seen += len(numbers)
        assert told[-3:] == [(seen + n, units.FILLER) for n in range(3)]
        assert all(step == unit // 128 for unit, step in told[:-3])
        for workers in (1, 3, 4):
            owners = [span.owner(unit, workers) for unit in numbers[:50]]
            assert owners == [n % workers for n in range(len(owners))]
    assert seen == 240_000 * 128
    assert [pair for piece in pieces for pair in span.numbers(piece, segments, 3)] == []


# Through Ray Data.


def plan(number, **_):
    return {"rows": pa.py_buffer(bytes(1000))}


def decode(number, step, planned, size=100, slow=(), notes=None):
    """A unit full of its number's last octet; some take their time, as some videos do."""
    assert len(planned["rows"]) == 1000
    if notes:
        Path(notes, str(number)).touch()
    time.sleep(0.3 if number in slow else 0.002)
    data = np.empty(size, np.uint8)
    data[:] = number % 251
    return units.block(number, step, 0, np.array([number]), {"data": data})


def consume(shard, pause, out):
    for block in shard.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
        unit = units.unit_of(block)
        if unit.step != units.FILLER:
            assert set(unit.array("data", np.uint8, (-1,)).tolist()) == {unit.number % 251}
        out.append((unit.number, unit.step))
        time.sleep(pause)


def dataset(span, fillers, size=100, planner=plan, decoder=decode, samples=8, **arguments):
    recipe = units.Recipe(planner, decoder, {"size": size, **arguments}, ("data",), size, samples)
    return units.dataset(recipe, span, fillers, DataConfig())


@pytest.mark.ray
@pytest.mark.parametrize("workers", [1, 2, 3, 4])
def test_workers_take_turns_whatever_is_slow(ray_session, workers):
    """In three segments of five steps, the last one of two."""
    span = units.Span(3, 15, PARTS, segment_steps=5)
    shards = dataset(span, workers - 1, slow=[13, 14, 21]).streaming_split(workers, equal=True)
    taken = [[] for _ in shards]
    pauses = [0.05 if rank == workers - 1 else 0.0 for rank in range(workers)]
    for segment in range(3):
        before = [len(mine) for mine in taken]
        threads = [threading.Thread(target=consume, args=job) for job in zip(shards, pauses, taken, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        first = (3 + 5 * segment) * PARTS
        for rank, mine in enumerate(taken):
            due = [(u, u // PARTS) for u in range(first, min(first + 5 * PARTS, 15 * PARTS)) if span.owner(u, workers) == rank]
            new = mine[before[rank] :]
            assert new[: len(due)] == due
            assert all(step == units.FILLER for _, step in new[len(due) :])
        assert len({len(mine) for mine in taken}) == 1


@pytest.mark.ray
def test_large_units_do_not_spill_when_the_first_one_is_slow(ray_session):
    from ray._private.internal_api import memory_summary

    def spilled():
        lines = memory_summary(ray.get_runtime_context().gcs_address, stats_only=True).splitlines()
        return [line for line in lines if "pilled" in line]

    before, taken = spilled(), []
    consume(dataset(units.Span(0, 5, PARTS), 0, size=75 << 20, slow=[0, 1, 7]), 0.1, taken)
    assert [number for number, _ in taken] == list(range(20))
    assert spilled() == before


@pytest.mark.ray
@pytest.mark.parametrize("stage", ["planner", "decoder"])
@pytest.mark.parametrize("kind", [Retryable, InputRefused])
def test_an_error_arrives_where_its_unit_was_due_and_is_what_it_was(ray_session, stage, kind):
    def fails(number, *planned, **arguments):
        if number == 2:
            raise kind("s3://b/a.mp4: this and that")
        return (decode if planned else plan)(number, *planned, **arguments)

    taken = []
    with pytest.raises(kind, match=r"^s3://b/a.mp4: this and that$"):
        consume(dataset(units.Span(0, 2, PARTS), 0, **{stage: fails}), 0, taken)
    assert taken == [(0, 0), (1, 0)]


PLACES = """
import json, numpy as np, ray, sys
from ray.cluster_utils import Cluster
sys.path[:0] = {path}
from pipelines import units
from pipelines.config import DataConfig

def plan(number):
    return dict()

def decode(number, step, planned):
    node = ray.get_runtime_context().get_node_id()
    return units.block(number, step, 0, np.array([number]), dict(node=np.frombuffer(node.encode(), np.uint8)))

def places(decode_on):
    recipe = units.Recipe(plan, decode, dict(), ("node",), 100, 32)
    rows = units.dataset(recipe, units.Span(0, 10, 2), 0, DataConfig(decode_on=decode_on))
    found = [units.unit_of(block) for block in rows.iter_batches(batch_size=None, batch_format="pyarrow")]
    return sorted({{bytes(unit.array("node", np.uint8, (-1,))).decode() for unit in found}})

cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=2))
ray.init(address=cluster.address, log_to_driver=False)
told = dict(head=ray.get_runtime_context().get_node_id(), without=places("auto"))
cluster.add_node(num_cpus=1, labels=dict(role="decode"))
cluster.wait_for_nodes()
told |= {{on: places(on) for on in ("auto", "labelled")}}
print(json.dumps(told | dict(labelled_nodes=[n["NodeID"] for n in ray.nodes() if n["Labels"].get("role") == "decode"])))
"""


@pytest.mark.ray
def test_decoding_goes_to_the_nodes_that_are_labelled_for_it():
    root = str(Path(units.__file__).parents[1])
    result = subprocess.run([sys.executable, "-c", PLACES.format(path=[root])], capture_output=True, text=True, timeout=600)
    told = json.loads(result.stdout.splitlines()[-1])
    assert told["without"] == [told["head"]]
    assert told["auto"] == told["labelled"] == told["labelled_nodes"]
    assert told["head"] not in told["auto"]


def dying(number, step, planned, size=100, deaths=2):
    """A unit that kills its process in the first attempts."""
    if number == 3 and units.attempt() < deaths:
        os.kill(os.getpid(), signal.SIGSEGV)
    return units.block(number, step, 0, np.array([units.attempt() if number == 3 else 0]), {"data": np.zeros(size, np.uint8)})


def test_a_task_knows_how_often_it_died(ray_session):
    rows = dataset(units.Span(0, 4, 1), 0, decoder=dying).iter_batches(batch_size=None, batch_format="pyarrow")
    found = [units.unit_of(row) for row in rows]
    assert [unit.number for unit in found] == list(range(4))
    assert found[3].samples.tolist() == [2]
    assert units.attempt() == 0
