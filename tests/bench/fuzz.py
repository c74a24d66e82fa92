"""`make fuzz`: hostile files with fixed seeds through the sandboxed probe with validate=full, and the rules for each.

    python tests/bench/fuzz.py --count 10000 --seed 0 [--clips FOLDER]

Two processes share the files. Ends with exit code 1 when any rule is broken; every broken one names the file, which
`fuzz_corpus.file(number, seed)` makes again.
"""

import argparse
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

PROCESSES = 2
GROWTH_MB = 100
SHOWN = 40


def main() -> int:
    options = _options()
    if options.part is not None:
        print(json.dumps(_work(options)))
        return 0
    began = time.monotonic()
    workers = [
        subprocess.Popen([sys.executable, *sys.argv, "--part", str(part)], stdout=subprocess.PIPE, text=True)
        for part in range(PROCESSES)
    ]
    answers = [worker.communicate()[0] for worker in workers]
    if any(worker.returncode for worker in workers):
        print("a fuzzing process died: its error is above")
        return 1
    parts = [json.loads(answer) for answer in answers]
    rows = [row for part in parts for row in part["rows"]]
    _print_tables(rows)
    broken = [(row["name"], text) for row in rows for text in row["violations"]]
    broken += [("the parent", f"grew by {part['growth_mb']:.0f} MB") for part in parts if part["growth_mb"] > GROWTH_MB]
    slowest = max(rows, key=lambda row: row["seconds"])
    print(f"slowest file {slowest['seconds']:.2f} s ({slowest['name']}), largest reading process "
          f"{max(part['largest_mb'] for part in parts):.0f} MB, parents grew by at most "
          f"{max(part['growth_mb'] for part in parts):.0f} MB")  # fmt: skip
    print(f"{len(rows)} files, {len(broken)} rules broken, {time.monotonic() - began:.0f} s")
    for name, text in broken[:SHOWN]:
        print(f"  {name}: {text}")
    return 1 if broken or len(rows) != options.count else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000, help="files, the hand-made ones first")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clips", type=Path, help="a folder whose files below 100 kB are mutated too")
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.count < 1 or (options.clips and not options.clips.is_dir()):
        parser.error("--count must be at least 1 and --clips an existing folder")
    return options


def _work(options: argparse.Namespace) -> dict[str, Any]:
    """Every PROCESSES-th file: first all probes, so that their memory can be told from the oracle's, then the oracle."""
    import fuzz_corpus

    def files() -> Iterator[Any]:
        return (fuzz_corpus.file(number, options.seed, options.clips) for number in range(options.part, options.count, PROCESSES))

    outcomes, before = [], 0.0
    for index, file in enumerate(files()):
        outcomes.append(fuzz_corpus.probe(file.data, file.name, "full"))
        if index == 20:
            before = fuzz_corpus.resident_mb()  # the clips are made, the modules are loaded
    growth = fuzz_corpus.resident_mb() - before if before else 0.0
    largest = fuzz_corpus.largest_child_mb()
    rows = []
    for file, outcome in zip(files(), outcomes, strict=True):
        count = fuzz_corpus.oracle(file.data)
        rows.append(
            {
                "name": file.name,
                "kind": file.kind,
                "status": outcome.status,
                "value": outcome.value,
                "seconds": outcome.seconds,
                "decodes": bool(count),
                "violations": fuzz_corpus.violations(file, outcome, count),
            }
        )
    return {"rows": rows, "growth_mb": growth, "largest_mb": largest}


def _print_tables(rows: list[dict[str, Any]]) -> None:
    kinds = list(dict.fromkeys(sorted(row["kind"] for row in rows)))
    print(f"\n{'kind':20} {'files':>7} {'accepted':>9} {'refused':>8} {'slowest s':>10}")
    for kind in kinds:
        mine = [row for row in rows if row["kind"] == kind]
        accepted = sum(row["status"] == "ok" for row in mine)
        slowest = max(row["seconds"] for row in mine)
        print(f"{kind:20} {len(mine):7} {accepted:9} {len(mine) - accepted:8} {slowest:10.2f}")
    refused = [row for row in rows if row["status"] == "refused"]
    whole = Counter(row["value"] for row in refused if row["decodes"])
    print(f"\n{'reason':20} {'files':>7} {'of these a plain decode gives frames without an error':>9}")
    for reason, count in Counter(row["value"] for row in refused).most_common():
        print(f"{reason:20} {count:7} {whole[reason]:9}")
    print()


if __name__ == "__main__":
    sys.exit(main())
