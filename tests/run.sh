#!/usr/bin/env bash
# Makes the environment with the test extras and runs the tests: bash tests/run.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source examples/environment.sh
make_environment "[test]"
PATH="$PWD/.venv/bin:$PATH"
# One thread per process: the distributed tests start up to four of them.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Two files of tests at a time; one on a machine with a GPU, which its benchmarks want for themselves.
workers=$(command -v nvidia-smi >/dev/null && echo 0 || echo 2)
python -m pytest -n "$workers" --dist loadfile "${@:-tests}"
