#!/usr/bin/env bash
# Updates and steps on a GPU: benchmarks/gpu.sh --json gpu.json; with --small on any machine.
# Needs jax, flax, optax and orbax-checkpoint; this tree is used as it is, and not installed.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="$root/.venv/bin/python"
[[ -x "$python" ]] || python=python3
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-$python}" -m benchmarks.gpu "$@"
