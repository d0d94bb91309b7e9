"""Attack the code sandbox with the programs of rewards/sandbox/attacks.py, and watch the host.

rewards/sandbox/attack_run.py says when an attack is contained. Exit code 1 if one isn't, 2 where this machine has no
such level. With --level insecure only attacks that do no harm are run; most of them succeed.
"""

import json
import sys
from collections.abc import Sequence

from megatron_mcpo.cli import options
from megatron_mcpo.rewards.sandbox.attack_run import Host, attack, attacks_for
from megatron_mcpo.rewards.sandbox.levels import available_level


def main(arguments: Sequence[str]) -> int:
    parser = options.parser("sandbox check", __doc__, example="--level bubblewrap")
    parser.add_argument(
        "--level",
        choices=("auto", "bubblewrap", "interpreter", "insecure"),
        default="auto",
        help="as rewards.sandbox (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of a table")
    known = parser.parse_args(arguments)
    try:
        level = available_level(known.level)
    except ValueError as error:
        print(error, file=sys.stderr)
        return options.REFUSED
    results = []
    with Host() as host:
        for name in attacks_for(level):
            result = attack(name, host, level)
            results.append(result)
            if not known.json:
                state = "; ".join(result.problems) or "contained"
                print(f"{name:45s} {result.verdict:8s} {result.seconds:5.1f} s  {state}", flush=True)
    contained = sum(not result.problems for result in results)
    if known.json:
        print(json.dumps({"attacks": len(results), "contained": contained, "level": level}))
    else:
        print(f"level {level}: {contained} of {len(results)} attacks contained")
    return 0 if contained == len(results) else options.FAILED
