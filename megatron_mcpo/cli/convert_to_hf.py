"""Convert a Megatron checkpoint (a run's checkpoints/step_NNNNNN, or a converted folder) to a Hugging Face folder.

config.json and tokenizer come from --hf, from SRC itself, or from model.path of the run that the checkpoint belongs to.
SRC may come from anyone: nothing in it is executed. Everything is read back and compared before DST gets its name; a
call after an interruption continues where the interrupted call stopped. Under torchrun all processes share the work.
Exit code 1: the result differs from the source.
"""

from collections.abc import Sequence
from pathlib import Path

from megatron_mcpo.cli import options
from megatron_mcpo.cli.converting import exit_code, parse, positive, report_success, say
from megatron_mcpo.convert.convert import MAX_FILE_BYTES, megatron_to_hf


def main(arguments: Sequence[str]) -> int:
    parser = options.parser("convert to-hf", __doc__, example="runs/latest/checkpoints/step_000020 models/trained")
    parser.add_argument("--hf", type=Path, metavar="FOLDER", help="folder with config.json and tokenizer")
    parser.add_argument(
        "--max-file-bytes", type=positive, default=MAX_FILE_BYTES, metavar="N", help="most bytes of a safetensors file"
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
        return report_success(known, compared)

    return exit_code(work)
