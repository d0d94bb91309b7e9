"""Tell a job script whether the run was preempted: exit code 0 if so, it should be started again; 1 if not.

Call it once the ranks have ended: torchrun's exit code is 1 for a run that was preempted and for one that crashed. The
run's mark (PREEMPTED in its folder) is removed, so that the answer is yes only once; --put-back restores it where the
run could not be started again. Exit code 2: bad configuration.
"""

from collections.abc import Sequence

from megatron_mcpo.cli import options
from megatron_mcpo.config.config import ConfigError, load
from megatron_mcpo.storage.run_folder import restore_preempted_mark, take_preempted_mark


def main(arguments: Sequence[str]) -> int:
    parser = options.parser("requeue", __doc__, example="examples/quickstart/config.toml")
    options.add_config(parser)
    parser.add_argument("--put-back", action="store_true", help="the run could not be started again")
    known, overrides = parser.parse_known_args(arguments)
    try:
        config = load(known.config, overrides)
    except ConfigError as error:
        return options.refuse(error)
    if known.put_back:
        restore_preempted_mark(config)
        return 0
    return 0 if take_preempted_mark(config) else 1
