#!/bin/sh
# Quantize a model to 4 bits if that is not done yet, and serve it: deploy/examples/serve.sh MODEL CALIBRATION OUT [PORT]
# MODEL: a folder or a name on the hub. CALIBRATION: a .txt, .jsonl or .parquet file. OUT: the folder to make.
set -eu
model=$1 calibration=$2 out=$3 port=${4:-8000}
[ -e "$out" ] || babai quantize "$model" "$out" --bits 4 --calibration "$calibration" \
    --samples "${SAMPLES:-128}" --sequence-length "${LENGTH:-512}"
exec vllm serve "$out" --quantization babai --max-model-len auto --port "$port"
