"""How labelled lists are given: options that evaluations and the probe of a training share. See evaluate_config.py."""

from typing import Any, Literal

from pipelines.errors import UsageError

ListFormat = Literal[
    "auto", "reference", "kinetics", "kinetics_json", "ssv2", "diving48", "jester", "coin", "table", "folders", "catalog"
]
LIST_SPLITS = ("train", "validation", "test")
UNLISTED = ("folders", "catalog")
"""Formats that need no list."""


def list_files(given: Any) -> list[tuple[str | None, str]]:
    """(split of rows that do not say one, URI) of the lists in `labels`. Raises UsageError."""
    if given is None:
        return []
    if isinstance(given, dict):
        if unknown := [str(name) for name in given if name not in LIST_SPLITS]:
            raise UsageError(f"labels.{unknown[0]}: lists are given as {', '.join(LIST_SPLITS)}")
        pairs = [(str(split), uri) for split, uris in given.items() for uri in (uris if isinstance(uris, list) else [uris])]
    else:
        pairs = [(None, uri) for uri in (given if isinstance(given, list | tuple) else [given])]
    if not pairs or not all(isinstance(uri, str) and uri for _, uri in pairs):
        raise UsageError(f"labels={given}: give the URI of a list, several as [a,b], or {{train: a, test: b}}")
    return pairs
