"""What `source=URI` holds, as items: videos and tars below a prefix, lists, LeRobot v3 datasets, folders of images."""

from collections.abc import Iterator, Sequence
from itertools import islice

import pyarrow as pa

from pipelines import lerobot, path_lists, storage
from pipelines.catalog_schema import ITEM_SCHEMA
from pipelines.errors import InputRefused
from pipelines.ingest_config import SourceKind
from pipelines.storage import ObjectInfo
from pipelines.tar_listing import COMPRESSED_SUFFIXES, TAR_SUFFIX
from pipelines.tar_listing import tar_members as tar_members  # the members of what `is_tar`

PAGE = 10_000
TARS = (TAR_SUFFIX, *COMPRESSED_SUFFIXES)
"""Compressed tars are listed too: they become rows of the quarantine, not silence."""


def detect(uri: str, kind: SourceKind) -> SourceKind:
    """What a source is. Raises InputRefused for a LeRobot dataset that is not version 3, or where `kind` asks for one in vain."""
    uri = storage.normalize(uri)
    if kind == "auto":
        if uri.lower().endswith(path_lists.SUFFIXES):
            return "list"
        kind = "prefix" if is_tar(uri) or lerobot.version(uri) is None else "lerobot"
    if kind == "lerobot":
        lerobot.check_version(uri)
    return kind


def is_tar(uri: str) -> bool:
    """Whether an object is to be expanded by `tar_members`, going by its name."""
    return uri.lower().endswith(TARS)


def objects(uri: str, kind: SourceKind, suffixes: Sequence[str]) -> Iterator[pa.Table]:
    """A source's objects in pages of ITEM_SCHEMA; a tar is one row, without a member. No object comes twice.

    `suffixes` (lower case, with dot) picks the files of `prefix`, where tars are always listed, and of `images`, where the
    label is the name of the folder that holds the image. What a list or a dataset names and does not exist has size -1 and
    etag "". Raises InputRefused, UsageError, Retryable, at any page.
    """
    uri = storage.normalize(uri)
    kind = detect(uri, kind) if kind == "auto" else kind
    if kind == "list":
        for uris, labels in path_lists.pages(uri):
            yield _stated(uris, labels, None)
    elif kind == "lerobot":
        files = lerobot.video_files(uri)
        while page := list(islice(files, PAGE)):
            uris, labels, cuts = map(list, zip(*page, strict=True))
            yield _stated(uris, labels, cuts)
    else:
        wanted = {"prefix": (*suffixes, *TARS), "tars": TARS, "images": tuple(suffixes)}[kind]
        for infos in storage.list_pages(uri, wanted):
            yield _table(infos, [_folder(info.uri, uri) for info in infos] if kind == "images" else None, None)


def _stated(uris: list[str], labels: Sequence[str | None], cuts: list[list[float]] | None) -> pa.Table:
    """Rows of objects that something else names: size and etag are asked for."""
    found = storage.stat_many(uris)
    return _table([found[uri] or ObjectInfo(uri, -1, "") for uri in uris], labels, cuts)


def _table(infos: Sequence[ObjectInfo], labels: Sequence[str | None] | None, cuts: list[list[float]] | None) -> pa.Table:
    count = len(infos)
    columns = {
        "uri": [info.uri for info in infos],
        "member": pa.repeat("", count),
        "offset": pa.repeat(pa.scalar(0, pa.int64()), count),
        "size": [info.size for info in infos],
        "etag": [info.etag for info in infos],
        "label": pa.nulls(count, pa.string()) if labels is None else labels,
        "cuts": pa.nulls(count, ITEM_SCHEMA.field("cuts").type) if cuts is None else cuts,
    }
    try:
        return pa.table(columns, ITEM_SCHEMA)
    except UnicodeEncodeError as error:
        raise InputRefused(f"the file name {error.object!r} is not UTF-8, and the catalog is: rename the file") from error


def _folder(uri: str, source: str) -> str | None:
    """Name of the folder that holds an image, None for one that lies directly in the source."""
    above = uri[len(source) :].rpartition("/")[0]
    return above.rpartition("/")[2] or None
