#!/bin/sh
# Quantize a model in two ways and compare them: deploy/examples/compare.sh MODEL CALIBRATION TEXT OUT
# MODEL: a folder or a name on the hub. CALIBRATION, TEXT: .txt, .jsonl or .parquet files. OUT: a folder to make.
set -eu
model=$1 calibration=$2 text=$3 out=$4
mkdir -p "$out"
for bits in 3.2 4.2; do
    babai quantize "$model" "$out/ssqr-$bits" --target-bits "$bits" --calibration "$calibration" \
        --samples "${SAMPLES:-128}" --sequence-length "${LENGTH:-512}"
done
babai compare "$out/ssqr-3.2" "$out/ssqr-4.2" --against "$model" --data "$text" --window "${LENGTH:-512}" --samples 32
