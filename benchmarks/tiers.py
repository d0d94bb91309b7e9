"""Sum up what the tests cost per tier and file, from the JUnit files that pytest wrote.

`.venv/bin/python -m benchmarks.tiers tests.xml [system.xml ...] --out benchmarks/results/tiers.json`, after for example
`make test PYTEST_OPTIONS=--junitxml=tests.xml`. Seconds are those of the tests in all workers together.
"""

import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.measure import options, write_rows


def main(arguments: Sequence[str]) -> int:
    parser = options(__doc__)
    parser.add_argument("files", type=Path, nargs="+", help="JUnit files of pytest")
    known = parser.parse_args(arguments)
    return write_rows("tiers", rows(known.files), known)


def rows(files: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """Yield a row per test file, the slowest of a tier first: tier, file, number of tests, seconds."""
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    for path in files:
        for case in ElementTree.parse(path).iter("testcase"):
            _, tier, file = (case.get("classname") or "").split(".")[:3]
            seconds[tier, file].append(float(case.get("time") or 0))
    for (tier, file), each in sorted(seconds.items(), key=lambda item: (item[0][0], -sum(item[1]))):
        yield {"tier": tier, "file": file, "tests": len(each), "seconds": round(sum(each), 1)}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
