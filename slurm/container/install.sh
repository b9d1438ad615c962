#!/usr/bin/env bash
# Installs the project for NVIDIA GPUs. dnabert2.def and Dockerfile run it in an image that has CUDA's compiler, as root:
#
#   bash install.sh system torch deepspeed apex project check
#
# It needs a network but no GPU. Should compiling run out of memory, `export MAX_JOBS=4` here.
set -euo pipefail
cd "$(dirname "$0")/../.."

PREFIX=${PREFIX:-/opt/dnabert2} # becomes a virtual environment
APEX=26.09                      # a tag of NVIDIA's repository; the package "apex" in the Python index is another project
export TORCH_CUDA_ARCH_LIST="8.0;9.0" # A100 and H100; without it, DeepSpeed asks for GPUs that CUDA 13 has dropped
export PATH=$PREFIX/bin:/usr/local/cuda/bin:$PATH

install() { python -m pip install --no-cache-dir --disable-pip-version-check --constraint constraints.txt "$@"; }

system() {
    export DEBIAN_FRONTEND=noninteractive
    apt-get update
    # A compiler and Python's headers serve Triton too, whenever a run starts.
    apt-get install --yes --no-install-recommends ca-certificates g++ git python3-dev python3-venv
    rm -rf /var/lib/apt/lists/*
}

torch() {
    python3 -m venv "$PREFIX"
    # With torch, what the builds below need: they have to see this torch, so they can't be isolated.
    install torch setuptools ninja numpy packaging psutil py-cpuinfo
    local cuda
    cuda=$(python -c 'import torch; print(torch.version.cuda)')
    if [[ $(nvcc --version) != *"release $cuda,"* ]]; then
        echo "torch is built for CUDA $cuda, the compiler here is not; begin with an image nvidia/cuda:$cuda.x-devel" >&2
        exit 1
    fi
}

# Training takes no operator of DeepSpeed's on a GPU: AdamW is torch's. Built are those that DeepSpeed would compile in a
# job when its own Adam is asked for. Not those for CPUs, which would be bound to the processor of the machine that builds
# (-march=native), nor those of inference. They are compiled at their first use; the image has what that takes.
deepspeed() {
    # "cuda", because no GPU is seen here; nvidia-ml-py, because such a build of DeepSpeed depends on it.
    DS_ACCELERATOR=cuda DS_BUILD_OPS=0 DS_BUILD_FUSED_ADAM=1 DS_BUILD_UTILS=1 \
        install --no-build-isolation --use-pep517 --no-binary deepspeed deepspeed nvidia-ml-py==13.615.71
}

apex() {
    local source
    source=$(mktemp -d)
    git clone --depth 1 --branch "$APEX" https://github.com/NVIDIA/apex "$source"
    APEX_CPP_EXT=1 APEX_CUDA_EXT=1 APEX_FAST_LAYER_NORM=1 install --no-build-isolation --use-pep517 "$source"
    rm -rf "$source"
}

project() { install --no-build-isolation ".[remote,test]"; }

check() (
    cd /                             # not here, where the packages are found uninstalled
    TRITON_CACHE_DIR=$(mktemp -d)    # the image may be read-only
    export TRITON_CACHE_DIR
    trap 'rm -rf "$TRITON_CACHE_DIR"' EXIT
    python -m pip check
    DS_ACCELERATOR=cpu python -c '
import torch  # before its extensions
import fast_layer_norm, fused_layer_norm_cuda
from deepspeed.git_version_info import installed_ops
from kernels import apex

apex.load()
missing = [op for op in ("fused_adam", "utils") if not installed_ops.get(op)]
assert not missing, f"DeepSpeed left out {missing}: its build says why"'
    python -m kernels compile --arch sm_80 --arch sm_90
)

for step in "$@"; do
    case $step in
        system | torch | deepspeed | apex | project | check) "$step" ;;
        *) echo "install.sh: no step '$step'; there are system, torch, deepspeed, apex, project, check" >&2 && exit 2 ;;
    esac
done
