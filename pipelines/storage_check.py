"""Whether a place can be written as jobs write: create, read back, create again in vain, delete. Nothing is left behind."""

import os
import secrets
import time
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple

from pipelines import storage
from pipelines.errors import InputRefused, UsageError
from pipelines.storage_s3 import ObjectChanged, Operation

SECONDS = 10.0
NAME = ".jepa-doctor-"


class Written(NamedTuple):
    """What the place allows. `skew_s` is this machine's clock less the store's, None for a local folder."""

    conditional: bool
    deletes: bool
    skew_s: float | None


def check(uri: str) -> Written:
    """Write a small object below `uri`, read it, try to create it again, and delete it.

    Raises UsageError where writing is denied, InputRefused where there is no such bucket or other bytes come back, and Retryable
    where the store does not answer.
    """
    place = storage.join(storage.normalize(uri), f"{NAME}{secrets.token_hex(6)}")
    data = secrets.token_bytes(32)
    if not storage.is_s3(place):
        return _check_folder(place, data)
    operation = Operation(place, SECONDS)
    names = {"Bucket": operation.bucket, "Key": operation.key}

    def create() -> Any:
        return operation.client.put_object(**names, Body=data, IfNoneMatch="*")

    try:
        answer = operation.request(create)
        skew = _skew(answer)
        conditional = _refused_twice(operation, create)
        _same(place, data)
    finally:
        deletes = _deleted(place)
    return Written(conditional, deletes, skew)


def _refused_twice(operation: Operation, create: Any) -> bool:
    try:
        operation.request(create)
    except ObjectChanged:
        return True
    return False  # a store that ignores the condition


def _check_folder(path: str, data: bytes) -> Written:
    storage.write_bytes(path, data)
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
        conditional = False
    except FileExistsError:
        conditional = True
    _same(path, data)
    storage.delete([path])
    return Written(conditional, not os.path.exists(path), None)


def _same(uri: str, data: bytes) -> None:
    if storage.read_bytes(uri) != data:
        raise InputRefused(f"{uri}: other bytes come back than were written: something between here and the store changes them")


def _deleted(uri: str) -> bool:
    try:
        storage.delete([uri])
        return not storage.exists(uri)
    except UsageError:
        return False  # roles without delete are usual


def _skew(answer: dict[str, Any]) -> float | None:
    stamp = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date")
    return time.time() - parsedate_to_datetime(stamp).timestamp() if stamp else None
