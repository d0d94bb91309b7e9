"""Write report.html of a run again, also of one that is not finished: a page that any browser opens."""

import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_mcpo.cli import options
from megatron_mcpo.config.config import ConfigError, load
from megatron_mcpo.reporting.html.html_report import write_report
from megatron_mcpo.storage.run_folder import CONFIG


def main(arguments: Sequence[str]) -> int:
    parser = options.parser("report", __doc__, example="runs/latest")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run, such as runs/latest")
    for folder in parser.parse_args(arguments).runs:
        if not (folder / CONFIG).is_file():
            print(f"{folder}: is no run's folder; give one, such as runs/latest", file=sys.stderr)
            return 2
        try:
            path = write_report(folder.resolve(), load(folder / CONFIG))
        except ConfigError as error:
            return options.refuse(error)
        except OSError as error:
            print(f"{folder}: no report can be written ({error}); is it the folder of a run?", file=sys.stderr)
            return 2
        print(path)
    return 0
