"""tools/requeue.py CONFIG [--section.key VALUE ...]: did the run stop to make room? Exit code 0: start it again.

For a job script, once the ranks have ended: torchrun's exit code is 1 for a run that saved and one that crashed. The
run's mark (REQUEUE in its folder) is taken away, so that the answer is yes once. Exit code 1: no; 2: bad configuration.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_mcpo.config import ConfigError, load
from megatron_mcpo.run_folder import take_restart


def main(arguments: Sequence[str]) -> int:
    try:
        return 0 if take_restart(load(Path(arguments[0]), arguments[1:])) else 1
    except ConfigError as error:
        print("\n".join(error.problems), file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
