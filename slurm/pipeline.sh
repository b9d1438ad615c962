#!/usr/bin/env bash
# Submits everything that a YAML file describes as one chain of jobs, and prints their ids; again, only what is missing.
#
#   slurm/pipeline.sh PIPELINE.yaml [--dry-run] [--json]
#
# slurm/pipeline.yaml is an example to copy. Account, partition, modules and container: slurm/site.env.
set -euo pipefail

if [[ $# -eq 0 || $1 == -* ]]; then
    echo "usage: slurm/pipeline.sh PIPELINE.yaml [--dry-run] [--json]" >&2
    exit 2
fi
file=$(realpath -- "$1")
cd -- "$(dirname -- "$(realpath -- "$0")")/.."
# shellcheck source=slurm/site.env
. slurm/site.env
# sbatch is not in a container, so this is not either: pydantic, PyYAML and tqdm are all that it needs.
python=${PYTHON:-}
if [[ -z $python || -n ${LAUNCH[*]:-} ]]; then
    python=python3
    [[ -x .venv/bin/python ]] && python=.venv/bin/python
fi
exec "$python" -m slurm submit "$file" "${@:2}"
