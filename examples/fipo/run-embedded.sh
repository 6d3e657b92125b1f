#!/bin/bash
# The embedded engine as a Ray job: a small model trained with FIPO on one node's CPU, to try out Ray, Slurm, signals and
# resuming before any GPU is taken. Arguments are handed on to `slime-fipo local`. Ray's variables: ray_job.sh.
#   SAVE       run directory, on a disk that every node sees; the same again continues the run
#   PROBE=1    first compute one FIPO loss with a context-parallel rank on every node (probe_nodes.py)
set -euo pipefail
SCRIPT_DIR="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=examples/fipo/ray_job.sh
source "${SCRIPT_DIR}/ray_job.sh"

SAVE="$(realpath -m -- "${SAVE:-runs/embedded}")"
PYTHONPATH_OF_JOB="PYTHONPATH=$(realpath -- "${SCRIPT_DIR}/../..")"

if [[ ${PROBE:-0} == 1 ]]; then
   submit 0 "${PYTHONPATH_OF_JOB}" -- python3 "${SCRIPT_DIR}/probe_nodes.py"
fi
submit 0 "${PYTHONPATH_OF_JOB}" -- python3 -m slime_fipo.cli local --save "${SAVE}" "$@"
