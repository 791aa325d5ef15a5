#!/usr/bin/env bash
# Brings vLLM to a GPU machine that has torch and transformers but cannot download: wheels for it, unpacked, slimmed and
# cut into parts that fit through a narrow door.
#
#   bench/pack_vllm.sh FOLDER            # here, with a network: writes FOLDER/vllm.part.00, .01, ... and unpack.sh
#   sh FOLDER/unpack.sh TARGET           # there, when all parts lie in one folder; says what to export
#   martlet bench gpu --engines native,vllm
#
# vLLM 0.24.0 pins torch 2.11.0, which must be there with CUDA; Python is 3.12, the GPU a Hopper. Left out, because these
# workloads never load it: kernels for mixtures of experts and other GPUs, FlashAttention 2 (Hopper runs 3), FlashInfer.
set -euo pipefail

VLLM=0.24.0 PYTHON=3.12 PART=45M
FOLDER=${1:?usage: pack_vllm.sh FOLDER}
mkdir -p "$FOLDER"
FOLDER=$(realpath "$FOLDER")
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
SITE=$WORK/site

get() {  # packages as they run there, whatever this machine is; dependencies only where pip is asked for them
    local platforms=() glibc
    for glibc in 2_5 2_12 2_17 2_24 2_26 2_27 2_28 2_31 2_34; do platforms+=(--platform "manylinux_${glibc}_x86_64"); done
    platforms+=(--platform manylinux1_x86_64 --platform manylinux2010_x86_64 --platform manylinux2014_x86_64)
    pip install --quiet --disable-pip-version-check --target "$SITE" --only-binary=:all: --implementation cp \
        --python-version "$PYTHON" "${platforms[@]}" "$@"
}

# With their dependencies: small packages, none of which pulls torch.
get anthropic blake3 cachetools cbor2 'diskcache==5.6.3' 'fastapi>=0.133,<0.137' ijson 'jsonschema>=4.23' 'lark==1.2.2' \
    'llguidance>=1.7,<1.8' 'lm-format-enforcer==0.11.3' mcp 'mistral_common>=1.11.3' \
    'model-hosting-container-standards<1' msgspec 'openai>=2' openai-harmony opentelemetry-api \
    opentelemetry-exporter-otlp opentelemetry-sdk opentelemetry-semantic-conventions-ai 'outlines_core==0.2.14' \
    partial-json-parser 'prometheus-fastapi-instrumentator>=8' pybase64 'pydantic>=2.12' python-json-logger \
    python-multipart pyzmq setproctitle 'starlette>=1.0.1' uvicorn watchfiles
# Without: these ask for torch or for what is left out.
get --no-deps "vllm==$VLLM" 'apache-tvm-ffi>=0.1.11' astor 'compressed-tensors==0.17.0' 'depyf==0.20.0' dill frozendict \
    loguru 'xgrammar>=0.2.1,<1'

cd "$SITE"
# What the machine has, in versions that fit its torch.
rm -rf numpy numpy.libs numpy-*.dist-info PIL pillow.libs pillow-*.dist-info grpc grpcio-*.dist-info \
    google protobuf-*.dist-info yaml PyYAML-*.dist-info pyyaml-*.dist-info tiktoken tiktoken-*.dist-info regex \
    regex-*.dist-info setuptools setuptools-*.dist-info bin share
rm -rf pycountry/locales vllm/_moe_C_stable_libtorch.abi3.so vllm/_qutlass_C.abi3.so vllm/vllm-rs \
    vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so vllm/third_party/deep_gemm vllm/third_party/fmha_sm100
find . -name __pycache__ -type d -prune -exec rm -rf {} +

rm -f "$FOLDER"/vllm.part.*
tar -C "$WORK" -cf - site | xz -T0 -3 | split -b "$PART" -d - "$FOLDER/vllm.part."
cat > "$FOLDER/unpack.sh" <<'UNPACK'
#!/bin/sh
# Usage: sh unpack.sh TARGET
set -eu
mkdir -p "$1"
cat "$(dirname "$0")"/vllm.part.* | xz -d -T0 | tar -C "$1" -xf -
echo "export PYTHONPATH=$(cd "$1" && pwd)/site VLLM_USE_FLASHINFER_SAMPLER=0 VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1"
UNPACK
du -ch "$FOLDER"/vllm.part.*
