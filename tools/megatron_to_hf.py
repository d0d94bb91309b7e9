"""Makes a Hugging Face folder of a Megatron checkpoint: a run's checkpoints/step_NNNNNN, or a converted folder.

`.venv/bin/python tools/megatron_to_hf.py SRC DST [--hf FOLDER] [--dtype bf16]`
config.json and tokenizer come from --hf, from SRC itself, or from model.path of the run that the
checkpoint belongs to. Nothing in SRC can run code, whoever wrote it. Otherwise as hf_to_megatron.py.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Logits are compared in fp32, which a GPU's kernels round to TF32.

from megatron_mcpo.cli.convert import guarded, parse, say, size, tell
from megatron_mcpo.convert.convert import MAX_FILE_BYTES, megatron_to_hf


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", type=Path, metavar="FOLDER", help="with config.json and tokenizer")
    parser.add_argument(
        "--max-file-bytes", type=size, default=MAX_FILE_BYTES, metavar="N", help="of a safetensors file"
    )
    known = parse(parser, arguments)

    def work() -> int:
        compared = megatron_to_hf(
            known.source,
            known.final,
            assets=known.hf,
            dtype=known.dtype,
            max_file_bytes=known.max_file_bytes,
            verify_forward=known.verify_forward,
            say=say,
        )
        return tell(known, compared)

    return guarded(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
