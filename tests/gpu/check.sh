#!/usr/bin/env bash
# All that needs a GPU, in two parts of under six minutes each: bash tests/gpu/check.sh 1, then 2 (--help, --dry-run)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
exec "${PYTHON:-python3}" -m tests.gpu.check "$@"
