"""Convert a Megatron checkpoint, a run's checkpoints/step_NNNNNN or a converted folder, to a Hugging Face folder.

config.json and tokenizer come from --hf, from SRC itself, or from model.path of the run that the
checkpoint belongs to. Nothing in SRC can run code, whoever wrote it. Otherwise as `mcpo convert to-megatron`.
"""

from collections.abc import Sequence
from pathlib import Path

from megatron_mcpo.cli import options
from megatron_mcpo.cli.converting import guarded, parse, say, size, tell
from megatron_mcpo.convert.convert import MAX_FILE_BYTES, megatron_to_hf


def main(arguments: Sequence[str]) -> int:
    parser = options.parser("convert to-hf", __doc__, example="runs/latest/checkpoints/step_000020 models/trained")
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
