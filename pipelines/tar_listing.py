"""Members of a tar as items, read by their headers alone: nothing is unpacked, names are labels and never paths.

Headers are parsed by the standard library. The walk from one to the next is ours, because tarfile's own trusts sizes and
extended headers: a hostile tar makes it loop, read everything into memory, or end early without a word.
"""

import tarfile
from collections.abc import Iterator, Sequence
from typing import NamedTuple, NoReturn

import pyarrow as pa

from pipelines import storage
from pipelines.catalog_schema import ITEM_SCHEMA
from pipelines.errors import InputRefused
from pipelines.video import VideoRefused

TAR_SUFFIX = ".tar"
COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.lz4")
COMPRESSED_MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18")
MAX_MEMBERS = 1_000_000
MAX_EXTENSION_BYTES = 1 << 20
"""Of one extended header: a long name, or PAX records."""
MAX_EXTENSIONS = 16
"""Extended headers before one member."""
MAX_ZERO_BLOCKS = 1 << 12
"""Between two headers; writers pad a tar to 10 KiB, at most to 1 MiB."""
MAX_SIZE = 1 << 62
"""Of one member: with its offset it must fit into 64 bits."""
MAX_LABEL_BYTES = 1024
LABEL_SUFFIX = ".cls"
FIRST_SPAN, LAST_SPAN = 1 << 14, 1 << 20
CUT_OFF = "(header cut off)"
"""Member name of the row that stands for what a truncated tar lost when the name is lost too."""

EXTENSION_TYPES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE)


class _Member(NamedTuple):
    name: str
    offset: int
    size: int
    regular: bool


def tar_members(uri: str, size: int, etag: str, suffixes: Sequence[str]) -> pa.Table:
    """Rows of ITEM_SCHEMA for the members that end with one of `suffixes` (lower case, with dot), in order of offset.

    `label` is the text of the WebDataset sibling `.cls`. A truncated tar gives its complete members, and whatever its suffix the
    member where it ends: `offset + size` is then beyond the tar's size, and what followed is unknown. Raises VideoRefused
    `not_a_video` for a broken header or no tar at all, `not_allowed` for compression or sparse members, `too_large` for more than
    MAX_MEMBERS, `empty`, `missing`, `changed`; Retryable.
    """
    if size < 0:
        raise VideoRefused("missing", "the tar does not exist")
    if size == 0:
        raise VideoRefused("empty", "the tar has no bytes")
    window = _Window(uri, size, etag)
    try:
        rows, labels = _wanted(window, tuple(suffixes))
    except storage.ObjectChanged as error:
        raise VideoRefused("changed", str(error)) from error
    except InputRefused as error:
        raise VideoRefused("missing", str(error)) from error
    count = len(rows)
    columns = {
        "uri": pa.repeat(uri, count),
        "member": [row.name for row in rows],
        "offset": [row.offset for row in rows],
        "size": [row.size for row in rows],
        "etag": pa.repeat(etag, count),
        "label": [labels.get(_sample(row.name)) for row in rows],
        "cuts": pa.nulls(count, ITEM_SCHEMA.field("cuts").type),
    }
    return pa.table(columns, ITEM_SCHEMA)


class _Window:
    """Reads forwards: 16 KiB around each header of large members, growing to 1 MiB where members lie close together."""

    def __init__(self, uri: str, size: int, etag: str) -> None:
        self.uri, self.size, self.etag = uri, size, etag
        self._start, self._data, self._span = 0, b"", FIRST_SPAN

    def read(self, start: int, length: int) -> bytes:
        """`length` bytes from `start`, fewer only at the end."""
        stop = min(start + length, self.size)
        end = self._start + len(self._data)
        if start < self._start or stop > end:
            self._span = min(2 * self._span, LAST_SPAN) if end and start <= end + self._span else FIRST_SPAN
            self._data = storage.read_range(self.uri, start, min(max(stop, start + self._span), self.size), self.etag or None)
            self._start = start
        return self._data[start - self._start : stop - self._start]


def _wanted(window: _Window, suffixes: tuple[str, ...]) -> tuple[list[_Member], dict[str, str]]:
    """Members to list, and the texts of `.cls` members by the name of their sample."""
    rows: list[_Member] = []
    labels: dict[str, str] = {}
    for count, member in enumerate(_members(window)):
        if count >= MAX_MEMBERS:
            raise VideoRefused("too_large", f"the tar has more than {MAX_MEMBERS} members: make several of it")
        complete = member.offset + member.size <= window.size
        name = member.name.lower()
        if not complete or (member.regular and name.endswith(suffixes)):
            rows.append(member)
        elif member.regular and name.endswith(LABEL_SUFFIX) and member.size <= MAX_LABEL_BYTES:
            text = window.read(member.offset, member.size).decode("utf-8", "replace").strip()
            if text:
                labels[_sample(member.name)] = text
    return rows, labels


def _members(window: _Window) -> Iterator[_Member]:
    """Every member in order, links and folders included, up to the end of the bytes or a broken header.

    Zero blocks end a tar but not the walk: tars that were put one after the other are read to the end.
    """
    position, extensions, zeros = 0, 0, 0
    records: dict[str, str] = {}  # what extended headers say about the next member
    while position < window.size:
        block = window.read(position, tarfile.BLOCKSIZE)
        if position == 0 and block.startswith(COMPRESSED_MAGIC):
            raise VideoRefused("not_allowed", "a compressed tar cannot be read by offset: store it uncompressed, as .tar")
        if not block.strip(b"\0"):
            position, zeros = position + tarfile.BLOCKSIZE, zeros + 1
            if zeros > MAX_ZERO_BLOCKS:
                _broken(position, f"{zeros} blocks of zeros stand where a header should be")
            continue
        if len(block) < tarfile.BLOCKSIZE and position:
            yield _Member(CUT_OFF, position, tarfile.BLOCKSIZE, False)
            return
        header, start, zeros = _header(block, position), position + tarfile.BLOCKSIZE, 0
        if header.type in EXTENSION_TYPES:
            extensions += 1
            if header.size > MAX_EXTENSION_BYTES or extensions > MAX_EXTENSIONS:
                _broken(position, "its extended headers are too large or too many")
            if start + header.size > window.size:
                yield _Member(CUT_OFF, start, header.size, False)
                return
            records |= _extension(header.type, window.read(start, header.size), position)
            position = start + _padded(header.size)
            continue
        size = _size(header, records, position)
        if header.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse.") for key in records):
            raise VideoRefused("not_allowed", f"the member at byte {position} is sparse: make the tar without --sparse")
        yield _Member(_text(records.get("path", header.name)), start, size, header.isreg())
        position, extensions, records = start + _padded(size), 0, {}
    if extensions:
        yield _Member(CUT_OFF, position, tarfile.BLOCKSIZE, False)


def _header(block: bytes, position: int) -> tarfile.TarInfo:
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError) as error:
        _broken(position, str(error), error)
    if not 0 <= header.size <= MAX_SIZE:
        _broken(position, f"its size is {header.size}")
    return header


def _size(header: tarfile.TarInfo, records: dict[str, str], position: int) -> int:
    """Bytes of data behind a header: links, folders and devices have none, whatever the header says."""
    if header.type in tarfile.SUPPORTED_TYPES and not header.isreg():
        return 0
    if "size" not in records:
        return header.size
    text = records["size"]
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(MAX_SIZE)) and int(text) <= MAX_SIZE):
        _broken(position, f"its PAX size is {text[:40]!r}")
    return int(text)


def _extension(kind: bytes, data: bytes, position: int) -> dict[str, str]:
    """What an extended header says about the next member, as PAX records. Linear in its length, unlike tarfile's."""
    if kind in (tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE):  # about links, or about all members: nothing we use
        return {}
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {"path": data.partition(b"\0")[0].decode("utf-8", "replace")}
    records, start = {}, 0
    while data[start : start + 1].strip(b"\0"):
        digits, space, _ = data[start : start + 20].partition(b" ")
        stop = start + int(digits) if space and digits.isdigit() else 0
        key, equals, value = data[start + len(digits) + 1 : max(0, stop - 1)].partition(b"=")
        if stop > len(data) or not equals:
            _broken(position, "its PAX records are malformed")
        if key in (b"path", b"size") or key.startswith(b"GNU.sparse."):
            records[_text(key)] = _text(value)
        start = stop
    return records


def _broken(position: int, why: str, cause: Exception | None = None) -> NoReturn:
    what = f"broken tar header at byte {position}" if position else "no tar, or its first header is broken"
    raise VideoRefused("not_a_video", f"{what}: {why}") from cause


def _padded(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _text(name: str | bytes) -> str:
    """A name as valid Unicode without NUL: the catalog's ids join fields by NUL."""
    raw = name.encode("utf-8", "surrogateescape") if isinstance(name, str) else name
    return raw.decode("utf-8", "replace").replace("\0", "\ufffd")


def _sample(name: str) -> str:
    """WebDataset's name of a sample: up to the first dot of the last part."""
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.partition(".")[0]
