"""Convert a Hugging Face folder to Megatron's format and back, in several layouts, and compare every bit.

Prints a row per layout: tensors compared, bits that differ, and the largest error of the logits that Megatron's modules
compute from the converted folder, against transformers and relative to the largest logit (for small models, or with
--verify-forward). Without --layouts all layouts of a list that are possible are tried. Exit code 1: something differs.
"""

import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_mcpo.cli import options
from megatron_mcpo.cli.converting import exit_code
from megatron_mcpo.config.config import ConfigError
from megatron_mcpo.config.hf_config import from_folder
from megatron_mcpo.config.layout import Layout
from megatron_mcpo.config.model import ModelConfig, layout_problems
from megatron_mcpo.convert.compare import compare, is_small
from megatron_mcpo.convert.convert import (
    VerificationError,
    hf_to_megatron,
    layout_of,
    megatron_to_hf,
)
from megatron_mcpo.weights.checkpoint_layout import MegatronFolder
from megatron_mcpo.weights.hf_io import HfFolder

LAYOUTS = ("tp1", "tp2", "pp2", "pp2vpp2", "tp2pp2", "tp3", "ep2", "tp2ep2")


def main(arguments: Sequence[str]) -> int:
    parser = options.parser("convert check", __doc__, example="models/qwen3-0.6b --layouts tp2,pp2")
    parser.add_argument("folder", type=Path, metavar="HF_DIR")
    parser.add_argument("--layouts", type=lambda text: text.split(","), help="layouts to try, such as tp2,pp2,tp2pp2")
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    parser.add_argument("--verify-forward", action="store_true", help="compare logits of a large model, too")
    parser.add_argument("--work", type=Path, help="where to write converted folders meanwhile (default: beside HF_DIR)")
    known = parser.parse_args(arguments)

    def work() -> int:
        model = from_folder(known.folder)
        names = known.layouts or [name for name in LAYOUTS if not layout_problems(model, parse(name), 1)]
        wrong = False
        for row in rows(known.folder, model, names, known.work or known.folder.resolve().parent, known.verify_forward):
            wrong |= bool(row["bits"] or row["problems"])
            shown = [f"{key} {value}" for key, value in row.items() if value or key == "bits"]
            print(json.dumps(row) if known.json else "  ".join(shown), flush=True)
        return int(wrong)

    return exit_code(work)


def rows(
    folder: Path, model: ModelConfig, names: Sequence[str], where: Path, verify_forward: bool
) -> Iterator[dict[str, Any]]:
    """Yield a row per layout. The tensors compared are those of the first folder and of the one converted back."""
    source = HfFolder(folder, model)
    for name in names:
        with tempfile.TemporaryDirectory(prefix=".roundtrip-", dir=where) as temporary:
            megatron, back = Path(temporary) / "megatron", Path(temporary) / "hf"
            row: dict[str, Any] = {"layout": name, "tensors": len(source.names), "bits": 0, "logits": None}
            row["left_out"] = list(source.left_out)
            try:
                hf_to_megatron(folder, megatron, parse(name), verify_forward=False, say=_nothing)
                megatron_to_hf(megatron, back, verify_forward=False, say=_nothing)
                compared = compare(source, HfFolder(back, model))
            except VerificationError as error:
                yield row | {"bits": error.compared.num_bits_different, "problems": str(error).splitlines()}
                continue
            problems = list(compared.differing)
            if verify_forward or is_small(source):
                from megatron_mcpo.convert.compare_logits import TOLERANCE, logits_error

                found = MegatronFolder.open(megatron, model)
                row["logits"] = logits_error(found, model, back, found.dtype(found.names[0]))
                problems += [] if row["logits"] <= TOLERANCE else ["logits differ from those of transformers"]
            yield row | {"bits": compared.num_bits_different, "problems": problems}


def parse(name: str) -> Layout:
    """Return the layout of a name such as 'tp2pp2vpp2'. Raises ConfigError for other names."""
    found = re.fullmatch(r"((tp|vpp|pp|ep)[1-9]\d*)+", name)
    sizes = {kind: int(size) for kind, size in re.findall(r"(tp|vpp|pp|ep)(\d+)", name)} if found else {}
    if not sizes:
        raise ConfigError([f"--layouts: {name!r}: must be like tp2, pp2vpp2 or tp2ep2"])
    tensor, pipeline, virtual, expert = (sizes.get(kind, 1) for kind in ("tp", "pp", "vpp", "ep"))
    return layout_of(tensor=tensor, pipeline=pipeline, virtual_pipeline=virtual, expert=expert)


def _nothing(_text: str) -> None:
    """Print no progress: the rows say enough."""
