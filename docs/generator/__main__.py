"""Write all generated pages, tables, figures and pictures again: `python -m docs.generator [--check]`.

Exit code 1 with --check: a committed file differs from what would be written; nothing is written then.
"""

import argparse
import sys
from collections.abc import Sequence

from docs.generator.parts import ROOT, rendered


def main(arguments: Sequence[str] | None = None) -> int:
    """Write every generated file that differs, or only name it; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m docs.generator", description=__doc__)
    parser.add_argument("--check", action="store_true", help="name the files that differ and write nothing")
    options = parser.parse_args(arguments)
    stale = {path: text for path, text in rendered().items() if not path.exists() or path.read_text("utf-8") != text}
    for path, text in stale.items():
        print(f"{path.relative_to(ROOT)}: {'differs from the generator' if options.check else 'written'}")
        if not options.check:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
    return 1 if stale and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
