# What the job scripts share; each reads it first. Jobs start in the root of the repository, where they were submitted.
# shellcheck shell=bash disable=SC2034 # the scripts use what is set here

# shellcheck source=slurm/site.env
. slurm/site.env
if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python3
    [[ -x .venv/bin/python ]] && PYTHON=$PWD/.venv/bin/python
fi
COMMAND=("${LAUNCH[@]}" "$PYTHON") # a LAUNCH that was never set is an empty one
# On each node; Triton's cache must not be on a disk that nodes share, where they would race for it.
LOCAL=$SCRATCH/dnabert2-$(id -un)-$SLURM_JOB_ID
# The id of an array's last task is that of the whole array: scontrol would queue all tasks again.
JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
JOB=${JOB:-$SLURM_JOB_ID}
RESTARTS=${SLURM_RESTART_COUNT:-0}
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1} TRITON_CACHE_DIR=$LOCAL/triton TOKENIZERS_PARALLELISM=true
site_setup

# Slurm tells everyone when it ends a job. The ranks act on it; this shell waits for them.
trap : TERM USR1

say() { echo "$(date -Is) job $JOB, start $((RESTARTS + 1)): $*"; }

# each_node COMMAND...: once on every node of the job.
each_node() {
    srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpus-per-task=1 "$@"
}

state() { squeue --noheader --jobs="$JOB" --format=%T; }

# tidy_nodes: remove what the job has on its nodes' own disks; print the nodes that don't answer, with commas between.
tidy_nodes() {
    [[ $(state) == RUNNING ]] || return 0
    # srun's status is 0 for a node that can't be reached too.
    # shellcheck disable=SC2016 # the inner shells expand them
    scontrol show hostnames "$SLURM_JOB_NODELIST" | xargs -P 32 -I{} bash -c '
        said=$(timeout 60 srun --overlap --nodes=1 --ntasks=1 --nodelist="$1" sh -c "rm -rf \"\$0\"; echo here" "$0")
        [[ $said == here ]] || echo "$1"' "$LOCAL" {} | paste -sd,
}

# requeue LIMIT [NODES...]: queue this job again, without NODES, unless it has been LIMIT times or was cancelled.
requeue() {
    local limit=$1 left excluded
    shift
    if ((RESTARTS >= limit)); then
        say "not queued again: it was $RESTARTS times; submit it again to go on"
        return
    fi
    # A job that scancel ends is COMPLETING by now, and would come back; one that ran over its time limit should.
    left=$(squeue --noheader --jobs="$JOB" --format=%L)
    if [[ $(state) != RUNNING && $left != 0:00 && $left != INVALID ]]; then
        say "not queued again: Slurm has ended the job, by scancel or for a node, for which it queues it again itself"
        return
    fi
    excluded=$(squeue --noheader --jobs="$JOB" --format=%x)
    trap '' TERM # Slurm ends this script now; the next lines must still be done
    scontrol requeue "$JOB" || return 0
    excluded=$(printf '%s\n' "${excluded/(null)/}" "$@" | sed '/^$/d' | paste -sd,)
    say "queued again${excluded:+, without $excluded}"
    [[ -z $excluded ]] || scontrol update JobId="$JOB" ExcNodeList="$excluded"
}

# run_task PACKAGE VERB ARGUMENTS...: run a verb, in an array its share of the work. What fails is tried again, but for bad
# input: the verbs do nothing twice that is done.
run_task() {
    local share=() status child
    if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
        [[ " $* " == *" --num-tasks "* ]] || share+=(--num-tasks "$((SLURM_ARRAY_TASK_MAX + 1))")
        share+=(--task "$SLURM_ARRAY_TASK_ID")
    fi
    say "$1 $2 ${share[*]}"
    # Not srun: it says 0 when the step is ended by Slurm. In the background, so that this shell can pass the notice on.
    "${COMMAND[@]}" -m "$@" "${share[@]}" &
    child=$!
    trap 'kill -TERM "$child"' TERM
    while :; do
        status=0
        wait "$child" || status=$?
        kill -0 "$child" 2>/dev/null || break # else only the signal has come
    done
    rm -rf "$LOCAL"
    say "status $status"
    ((status == 0 || status == 2)) || requeue "$MAX_RETRIES"
    exit "$status"
}
