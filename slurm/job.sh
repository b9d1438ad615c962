# What the job scripts share; each reads it first. Jobs start in the root of the repository, where they were submitted.
# shellcheck shell=bash disable=SC2034 # the scripts use what is set here

# shellcheck source=slurm/site.env
. slurm/site.env
if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python3
    [[ -x .venv/bin/python ]] && PYTHON=$PWD/.venv/bin/python
fi
COMMAND=("${LAUNCH[@]}" "$PYTHON") # a LAUNCH that was never set is an empty one

# look: ask Slurm about this job, for `field`; tries on while the controller is away. Not read from the environment, because a
# job that was submitted from within another inherits that one's variables.
look() {
    local try
    for try in {1..20}; do
        # All tasks of an array are shown where the id is also that of the array.
        SEEN=$(scontrol show job --oneliner "$SLURM_JOB_ID" | grep "^JobId=$SLURM_JOB_ID ") && return
        sleep 10
    done
}

# field NAME: a word of what `look` has seen.
field() { grep --only-matching --max-count=1 " $1=[^ ]*" <<<"$SEEN" | sed -n '1s/[^=]*=//p' || :; }

say() { echo "$(date -Is) job $JOB, start $((RESTARTS + 1)): $*" || :; } # a full disk must not end the job here

look
# The id of an array's last task is that of the whole array too: scontrol would queue all tasks again.
JOB=$(field ArrayJobId)_$(field ArrayTaskId)
[[ $JOB != _ ]] || JOB=$SLURM_JOB_ID
RESTARTS=$(field Restarts)
# On each node; Triton's cache must not be on a disk that nodes share, where they would race for it.
LOCAL=$LOCAL_SCRATCH/dnabert2-$(id -un)-$SLURM_JOB_ID
export SLURM_RESTART_COUNT=$RESTARTS TRITON_CACHE_DIR=$LOCAL/triton TOKENIZERS_PARALLELISM=true
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}

set +eu # what sites run is not written for these
site_setup
set -eu

# ended_before PATTERN: how many starts of this job, this one among them, have said so in its log. 0 where that is no file.
ended_before() { grep -c "job $JOB, start [0-9]*: $1" "/proc/$$/fd/1" 2>/dev/null || :; }

# attend COMMAND...: run it, and set `status`. This shell hears meanwhile that the job ends: TERM comes before the time limit to
# scripts that asked for it with --signal=B:TERM, and at the limit to all.
PASS_ON=0 STOPPED=0
attend() {
    local child told=
    "$@" &
    child=$!
    trap 'told=1' TERM
    while :; do
        status=0
        wait "$child" || status=$?
        if [[ -n $told ]]; then
            told=
            STOPPED=1
            # KILL comes soon, also to this shell: what a command that hangs keeps it from doing is done now.
            [[ $(over_time) == no ]] || requeue
            ((PASS_ON)) && kill -TERM "$child" 2>/dev/null || :
        fi
        kill -0 "$child" 2>/dev/null || break
    done
}

over_time() { [[ $(squeue --noheader --jobs="$JOB" --format=%L) == @(0:00|INVALID) ]] && echo yes || echo no; }

# requeue [NODES...]: queue this job again, without NODES, unless it has been MAX_REQUEUES times or was cancelled.
# shellcheck disable=SC2119,SC2120
requeue() {
    local excluded try
    if ((RESTARTS >= MAX_REQUEUES)); then
        say "not queued again: it was $RESTARTS times (MAX_REQUEUES); submit it again to go on"
        return
    fi
    look
    # A job that scancel ends is COMPLETING by now, and would come back; one that ran over its time limit should.
    if [[ $(field Restarts) != "$RESTARTS" ]]; then
        return # already, at the time limit or by Slurm
    elif [[ $(field JobState) != RUNNING && $(over_time) == no ]]; then
        say "not queued again: Slurm has ended the job, by scancel or for a node, for which it queues it again itself"
        return
    fi
    excluded=$(field ExcNodeList)
    excluded=$(printf '%s\n' "${excluded/(null)/}" "$@" | sed '/^$/d' | paste -sd,)
    trap '' TERM # Slurm ends this script now; the next lines must still be done
    for try in {1..20}; do
        scontrol requeue "$JOB" && break
        # Refused, and Slurm has said why; or the controller is away.
        if scontrol ping | grep -q "is UP" || ((try == 20)); then return; fi
        sleep 10
    done
    say "queued again${excluded:+, without $excluded (to take them back: scontrol update JobId=$JOB ExcNodeList=)}"
    [[ -z $excluded ]] || scontrol update JobId="$JOB" ExcNodeList="$excluded" || :
}

# run_task PACKAGE VERB ARGUMENTS...: run a verb, in an array its share of the work. What fails is tried again, but for bad
# input: the verbs do nothing twice that is done. Not in an srun step, which says 0 when Slurm ends it.
run_task() {
    local share=()
    PASS_ON=1 # an srun step is told by Slurm itself
    if [[ $JOB == *_* ]]; then
        if [[ " $*" != *" --num-tasks"* ]]; then
            share=(--num-tasks "$SLURM_ARRAY_TASK_COUNT")
            if ((SLURM_ARRAY_TASK_COUNT != SLURM_ARRAY_TASK_MAX + 1)); then
                say "an array that is not 0-N needs --num-tasks after the verb: among how many tasks the work is divided" >&2
                exit 2
            fi
        fi
        share+=(--task "$SLURM_ARRAY_TASK_ID")
    fi
    say "$1 $2 ${share[*]}"
    attend "${COMMAND[@]}" -m "$@" "${share[@]}"
    rm -rf "$LOCAL"
    if ((status == 0 || status == 2)); then
        say "status $status"
    elif ((STOPPED)); then
        say "stopped with status $status"
        requeue
    else
        say "failed with status $status"
        if (($(ended_before failed) <= MAX_RETRIES)); then
            requeue
        else
            say "not queued again: it has failed more than $MAX_RETRIES times (MAX_RETRIES); see above"
        fi
    fi
    exit "$status"
}
