"""Makes a Megatron checkpoint (torch_dist) of a Hugging Face folder, as the ranks of a layout would save it.

`.venv/bin/python tools/hf_to_megatron.py SRC DST [--tp 2 --pp 2 --vpp 1 --ep 1 --dtype bf16]`
One process does it, with a few tensors in memory, or several: `torchrun --nproc-per-node N tools/hf_to_megatron.py ...`
(its own exit code is 1 whatever is wrong). Everything is read back and compared before DST gets its name; an
interrupted call goes on where it stopped. Exit code 1: the result is not the source; 2: something is to be mended.
"""

import argparse
import os
import sys
from collections.abc import Sequence

if __name__ == "__main__":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Logits are compared in fp32, which a GPU's kernels round to TF32.

from megatron_mcpo.cli.convert import guarded, parse, say, size, tell
from megatron_mcpo.convert.convert import hf_to_megatron, layout_of


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, meaning in {"tp": "tensor", "pp": "pipeline", "vpp": "virtual pipeline", "ep": "expert"}.items():
        parser.add_argument(f"--{name}", type=size, default=1, metavar="N", help=f"{meaning} parallel size")
    known = parse(parser, arguments)

    def work() -> int:
        layout = layout_of(tensor=known.tp, pipeline=known.pp, virtual_pipeline=known.vpp, expert=known.ep)
        compared = hf_to_megatron(
            known.source, known.final, layout, dtype=known.dtype, verify_forward=known.verify_forward, say=say
        )
        return tell(known, compared)

    return guarded(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
