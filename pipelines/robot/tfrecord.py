"""TFRecord files and tf.train.Example without TensorFlow: checked records as a stream, features without copies.

A record is <u64 length> <u32 masked CRC32C of it> <data> <u32 masked CRC32C of the data>. An Example is a protobuf map from names
to one of three lists. Source: tensorflow/core/lib/io/record_writer.h and core/example/feature.proto.
"""

import struct
from collections.abc import Iterator
from typing import IO, NamedTuple

import numpy as np

from pipelines.robot.crc32c import masked
from pipelines.robot.refusals import EpisodeRefused

HEADER, FOOTER = struct.Struct("<QI"), struct.Struct("<I")
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
"""Wire types of protobuf."""


class Record(NamedTuple):
    """One record: where its data begin in the file, and the data; or why there are none."""

    offset: int
    data: bytes
    refusal: EpisodeRefused | None = None


def records(file: IO[bytes], size: int) -> Iterator[Record]:
    """The records of a file of `size` bytes in order, with the memory of one.

    A record with a wrong checksum has a refusal in place of its data. After a wrong length, or where the file ends within a
    record, nothing more can be found: the last record says so.
    """
    offset = 0
    while offset < size:
        start = offset + HEADER.size
        if start > size:
            yield Record(offset, b"", EpisodeRefused("truncated", f"the file ends within the header at byte {offset}"))
            return
        header = file.read(HEADER.size)
        length, crc = HEADER.unpack(header)
        if masked(header[:8]) != crc:
            yield Record(offset, b"", EpisodeRefused("wrong_crc", f"the length at byte {offset} does not have its checksum"))
            return
        offset = start + length + FOOTER.size
        if offset > size:
            detail = f"the record at byte {start} has {length} bytes, the file ends after {size - start}"
            yield Record(start, b"", EpisodeRefused("truncated", detail))
            return
        data = file.read(length + FOOTER.size)
        if masked(data[:length]) != FOOTER.unpack_from(data, length)[0]:
            detail = f"the {length} bytes at {start} do not have their checksum"
            yield Record(start, b"", EpisodeRefused("wrong_crc", detail))
        else:
            yield Record(start, data)


class Spans(NamedTuple):
    """The values of a list of byte strings, by where they lie in the record: int64 [n] each."""

    starts: np.ndarray
    sizes: np.ndarray


def example(data: bytes) -> dict[str, Spans | np.ndarray]:
    """The features of one Example by name: byte strings as Spans, floats as float32 [n], integers as int64 [n].

    `data` may have a footer behind it: the caller passes the record as it was read. Raises ValueError for what is no Example.
    """
    try:
        return _example(data, len(data) - FOOTER.size)
    except (IndexError, struct.error) as error:
        raise ValueError(f"no tf.train.Example: {error}") from error


def _example(data: bytes, end: int) -> dict[str, Spans | np.ndarray]:
    found: dict[str, Spans | np.ndarray] = {}
    for number, wire, begin, stop in _fields(data, 0, end):
        if (number, wire) != (1, _BYTES):
            continue
        for entry, entry_wire, entry_begin, entry_stop in _fields(data, begin, stop):  # Features.feature, a map
            if (entry, entry_wire) != (1, _BYTES):
                continue
            name, value = "", None
            for part, part_wire, part_begin, part_stop in _fields(data, entry_begin, entry_stop):
                if (part, part_wire) == (1, _BYTES):
                    name = data[part_begin:part_stop].decode()
                elif (part, part_wire) == (2, _BYTES):
                    value = _feature(data, part_begin, part_stop)
            if value is not None:
                found[name] = value
    return found


def _feature(data: bytes, begin: int, stop: int) -> Spans | np.ndarray | None:
    for kind, wire, first, last in _fields(data, begin, stop):
        if wire != _BYTES:
            continue
        if kind == 1:
            places = [(a, b - a) for number, _, a, b in _fields(data, first, last) if number == 1]
            both = np.array(places, np.int64).reshape(-1, 2)
            return Spans(both[:, 0], both[:, 1])
        if kind == 2:
            parts = [np.frombuffer(data, "<f4", (b - a) // 4, a) for number, _, a, b in _fields(data, first, last) if number == 1]
            return np.concatenate(parts) if parts else np.empty(0, np.float32)
        if kind == 3:
            parts = [_integers(data[a:b]) for number, _, a, b in _fields(data, first, last) if number == 1]
            return np.concatenate(parts) if parts else np.empty(0, np.int64)
    return None


def _integers(packed: bytes) -> np.ndarray:
    """Varints one behind the other: int64 [n]."""
    raw = np.frombuffer(packed, np.uint8)
    if (raw < 0x80).all():
        return raw.astype(np.int64)
    values, at = [], 0
    while at < len(packed):
        value, at = _varint(packed, at)
        values.append(value - (1 << 64) if value >> 63 else value)
    return np.array(values, np.int64)


def _fields(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """(field number, wire type, first byte of the value, byte after it) of a message that fills data[at:end]."""
    while at < end:
        key, at = _varint(data, at)
        wire = key & 7
        if wire == _BYTES:
            length, at = _varint(data, at)
            stop = at + length
        elif wire == _VARINT:
            _, stop = _varint(data, at)
        elif wire in (_FIXED64, _FIXED32):
            stop = at + (8 if wire == _FIXED64 else 4)
        else:
            raise ValueError(f"no tf.train.Example: wire type {wire} at byte {at}")
        if stop > end:
            raise ValueError(f"no tf.train.Example: a field at byte {at} is longer than its message")
        yield key >> 3, wire, at, stop
        at = stop


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value, shift = 0, 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, at
        shift += 7
        if shift > 63:
            raise ValueError(f"no tf.train.Example: a varint at byte {at} does not end")
