#!/usr/bin/env bash
# The GPU kernels on the GPU at hand, in under ten minutes: correctness against fp64 first, then times beside dense bf16.
#
#   benchmarks/gpu.sh                      rows are appended to benchmarks/results/gpu.jsonl
#   benchmarks/gpu.sh --out FILE           … to FILE
#   benchmarks/gpu.sh --tune MINUTES       time for the dispatch table, measured first and kept beside the rows (2.5; 0: none)
#   benchmarks/gpu.sh --plot PNG           draws what was measured
#   benchmarks/gpu.sh --dry                tiny shapes in Triton's interpreter, without a GPU: checks this script, times nothing
#
# Needs torch and triton (PYTHON names the interpreter, python3 unless set), and for the check of a whole model what compress needs;
# nothing is installed or fetched. Without git, COMMIT names the commit.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD/kernels:$PWD${PYTHONPATH:+:$PYTHONPATH}"
export TRITON_DEFAULT_FP_FUSION="${TRITON_DEFAULT_FP_FUSION:-1}"
exec "${PYTHON:-python3}" benchmarks/gpu.py "$@"
