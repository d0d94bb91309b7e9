"""Run `mcpo convert to-hf`, under the name that users of Megatron look for."""

import sys

from megatron_mcpo.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["convert", "to-hf", *sys.argv[1:]]))
