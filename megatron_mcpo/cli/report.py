"""Write report.html of runs again, finished or not: one page for any browser."""

from collections.abc import Sequence
from pathlib import Path

from megatron_mcpo.cli import options
from megatron_mcpo.config.config import ConfigError, load
from megatron_mcpo.reporting.html.html_report import write_report
from megatron_mcpo.storage.run_folder import CONFIG


def main(arguments: Sequence[str]) -> int:
    """Write the reports of the runs that the arguments name; return the exit code."""
    parser = options.parser("report", __doc__, example="runs/latest")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run, such as runs/latest")
    for folder in parser.parse_args(arguments).runs:
        if not (folder / CONFIG).is_file():
            problem = f"{folder}: must be the folder of a run ({CONFIG} missing). Give one, such as runs/latest."
            return options.refuse(ConfigError([problem]))
        try:
            path = write_report(folder.resolve(), load(folder / CONFIG))
        except ConfigError as error:
            return options.refuse(error)
        except OSError as error:
            problem = f"{folder}: must take the report ({error}). Free space or set permissions."
            return options.refuse(ConfigError([problem]))
        print(path)
    return 0
