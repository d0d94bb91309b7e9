"""Run a subcommand: `python -m megatron_mcpo` is `mcpo`, so that torchrun can start it with -m."""

import sys

from megatron_mcpo.cli.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
