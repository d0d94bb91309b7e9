"""Tell whether Transformer Engine can be used, and hide one that can't from Megatron-Core.

Megatron-Core (0.19.2) imports Transformer Engine wherever it is installed and expects no other failure than that it is
not: one that was built for another CUDA would end every start, on a CPU too.
"""

import functools
import importlib
import importlib.util
import logging
import sys

_PACKAGE = "transformer_engine"

log = logging.getLogger(__name__)


@functools.cache
def transformer_engine_problem() -> str | None:
    """Return why Transformer Engine's layers can't be used; None if they can.

    If it is installed but cannot be imported, a warning says why, once, and nobody can import a part of it any more:
    `pip install transformer-engine` alone brings no layers for torch, and a build for another CUDA can't be loaded.
    Call it before Megatron-Core is imported.
    """
    if importlib.util.find_spec(_PACKAGE) is None:
        return "and it is not installed"
    try:
        importlib.import_module(f"{_PACKAGE}.pytorch")
    # Also OSError or RuntimeError, if a library is missing or has another version; some packages call sys.exit.
    except (Exception, SystemExit) as error:
        reason = f"and it can't be imported ({type(error).__name__}: {' '.join(str(error).split())[:300]})"
        log.warning("Transformer Engine is installed, %s: layers use torch's modules instead", reason)
        sys.modules[_PACKAGE] = None  # type: ignore[assignment]  # Python's way to say that there is no such module
        return reason
    return None
