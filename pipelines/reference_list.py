"""The reference's list of videos: lines `path label`, which pandas.read_csv reads with delimiter " " or, if that raises, "::".

The format has no quoting. What it cannot hold is left out and counted, never written so that it is read as something else.
"""

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

COLUMNS = ("uri", "member", "label")
NO_LABEL = "0"
SPACE, COLONS = " ", "::"
LINES_PER_WRITE = 1 << 16


def write(videos: pa.Table, path: Path) -> dict[str, int | bool]:
    """Write rows with COLUMNS in order; an empty label becomes 0. Where a path or label holds a space, "::" parts all lines.

    Returns `videos` written, `skipped` (members of tars; paths that no line can hold) and `ambiguous`: every line has the same
    number of spaces, so the reference's first attempt does not raise and cuts the paths at a space.
    """
    plain = videos.filter(pc.equal(videos["member"], ""))
    label = pc.if_else(pc.equal(pc.fill_null(plain["label"], ""), ""), NO_LABEL, plain["label"])
    plain = pa.table({"uri": plain["uri"], "label": label})
    plain = plain.filter(pc.invert(_holds(plain, '[\n\r"]')))
    spaced = pc.any(_holds(plain, SPACE), min_count=0).as_py()
    if spaced:
        plain = plain.filter(pc.invert(_holds(plain, COLONS)))
    lines = pc.binary_join_element_wise(plain["uri"], plain["label"], COLONS if spaced else SPACE)
    ambiguous = False
    if spaced and len(lines):
        # pandas counts the columns of the first line and raises at a longer one: the line with the fewest spaces goes first.
        spaces = pc.count_substring(lines, SPACE)
        fewest, most = pc.min_max(spaces).as_py().values()
        ambiguous = fewest == most
        first = pc.index(spaces, fewest).as_py()
        lines = pa.chunked_array([*lines.slice(first, 1).chunks, *lines.slice(0, first).chunks, *lines.slice(first + 1).chunks])
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for start in range(0, len(lines), LINES_PER_WRITE):
            file.write("\n".join(lines.slice(start, LINES_PER_WRITE).to_pylist()) + "\n")
    return {"videos": len(lines), "skipped": len(videos) - len(lines), "ambiguous": ambiguous}


def _holds(rows: pa.Table, pattern: str) -> pa.ChunkedArray:
    """Which rows hold the pattern in their path or label."""
    return pc.or_(*(pc.match_substring_regex(rows[name], pattern) for name in ("uri", "label")))
