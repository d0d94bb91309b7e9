"""Convert a Hugging Face folder to a Megatron checkpoint (torch_dist), as the ranks of a layout would save it.

One process converts, with a few tensors in memory, or several share the work: `torchrun --nproc-per-node N -m
megatron_mcpo convert to-megatron ...` (torchrun's own exit code is 1 for every error). Everything is read back and
compared before DST gets its name. A call after an interruption continues where the interrupted call stopped. Exit code
1: the result differs from the source.
"""

from collections.abc import Sequence

from megatron_mcpo.cli import options
from megatron_mcpo.cli.converting import exit_code, parse, positive, report_success, say
from megatron_mcpo.convert.convert import hf_to_megatron, layout_of


def main(arguments: Sequence[str]) -> int:
    parser = options.parser(
        "convert to-megatron", __doc__, example="models/qwen3-0.6b megatron/qwen3-0.6b --tp 2 --pp 2"
    )
    for name, meaning in {"tp": "tensor", "pp": "pipeline", "vpp": "virtual pipeline", "ep": "expert"}.items():
        parser.add_argument(f"--{name}", type=positive, default=1, metavar="N", help=f"{meaning} parallel size")
    parser.add_argument(
        "--layers-per-stage",
        type=_numbers,
        default=(),
        metavar="N,N,...",
        help="layers of every pipeline stage (of every chunk with --vpp); default: equally many",
    )
    known = parse(parser, arguments)

    def work() -> int:
        layout = layout_of(
            tensor=known.tp,
            pipeline=known.pp,
            virtual_pipeline=known.vpp,
            expert=known.ep,
            layers_per_stage=known.layers_per_stage,
        )
        compared = hf_to_megatron(
            known.source, known.final, layout, dtype=known.dtype, verify_forward=known.verify_forward, say=say
        )
        return report_success(known, compared)

    return exit_code(work)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(positive(part) for part in text.split(","))
