"""Run `mcpo convert to-megatron`, under the name that users of Megatron look for."""

import sys

from megatron_mcpo.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["convert", "to-megatron", *sys.argv[1:]]))
