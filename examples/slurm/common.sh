# shellcheck shell=bash
# shellcheck disable=SC2034 # what it sets, they read
# What the job scripts beside it share; sourced by them. They run with the repository, which is the folder that the job
# was submitted from, or REPOSITORY; with PYTHON, or .venv's there, or python3; in a container where CONTAINER_IMAGE
# names one (container.sh).

fail() {
    echo "error: $*" >&2
    exit 2
}

TRAIN="$REPOSITORY/examples/pretrain_sedd.py"
CONTAINER=()
if [ -n "${CONTAINER_IMAGE:-}" ]; then
    # shellcheck source=examples/slurm/container.sh
    source "$REPOSITORY/examples/slurm/container.sh"
elif [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ ! -x "$REPOSITORY/.venv/bin/python" ] || PYTHON="$REPOSITORY/.venv/bin/python"
fi
export PYTHONPATH="$REPOSITORY${PYTHONPATH:+:$PYTHONPATH}"
# torch takes every core for each rank otherwise, and srun of Slurm 22.05 and newer one for each task.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"

# Sets MAX_RESTARTS, SAVE and ARGUMENTS, which are those of training, from the script's own; SAVES is empty where it is
# asked for a result and saves nothing.
read_arguments() {
    MAX_RESTARTS=100 SAVE='' SAVES=1 ARGUMENTS=()
    while [ $# -gt 0 ]; do
        case $1 in
            --max-restarts) MAX_RESTARTS=${2:-} && shift ;;
            --max-restarts=*) MAX_RESTARTS=${1#*=} ;;
            *) ARGUMENTS+=("$1") ;;
        esac
        case $1 in
            --save) SAVE=${2:-} ;;
            --save=*) SAVE=${1#*=} ;;
            --skip-train | --verify-layout) SAVES='' ;;
        esac
        [ $# -eq 0 ] || shift
    done
    [[ $MAX_RESTARTS =~ ^[0-9]+$ ]] || fail "--max-restarts $MAX_RESTARTS: must be a number"
    [ -n "$SAVE" ] || [ -z "$SAVES" ] || fail "--save DIR is missing on the command line: by what lies there the job is requeued or ends"
}

# Line number SLURM_ARRAY_TASK_ID of a file, as words; quotes as in a shell.
read_line() {
    [ -n "${SLURM_ARRAY_TASK_ID:-}" ] || fail "$1: a line for each element of an array; submit with --array=1-N"
    local line
    line=$(sed -n "${SLURM_ARRAY_TASK_ID}p" -- "$1")
    [ -n "$line" ] || fail "$1: has no line $SLURM_ARRAY_TASK_ID; submit with --array=1-$(wc -l <"$1")"
    mapfile -t LINE < <(xargs printf '%s\n' <<<"$line")
}

# Which file of this name it is, and of when; nothing where there is none. Opened: a network file system may answer
# from memory.
state_of() {
    [ ! -f "$1" ] || stat -c '%i %y' - <"$1"
}

remember_save() {
    FINISHED_BEFORE=$(state_of "$SAVE/finished")
    SAVED_BEFORE=$(state_of "$SAVE/latest_checkpointed_iteration.txt")
}

# Ends the job after its run has ended with this code: finished, requeued, or failed. Of torchrun, which ends with 1
# when it was asked to end, the code alone means nothing: `any-code` judges by the folder.
end_job() {
    local code=$1 judges=${2:-} finished saved restarts=${SLURM_RESTART_COUNT:-0}
    [ -n "$SAVES" ] || exit "$code"
    finished=$(state_of "$SAVE/finished") saved=$(state_of "$SAVE/latest_checkpointed_iteration.txt")
    if [ -n "$finished" ] && [ "$finished" != "$FINISHED_BEFORE" ]; then
        echo "job $SLURM_JOB_ID: $SAVE is finished"
        exit 0
    elif [ "$code" -ne 0 ] && { [ "$judges" != any-code ] || [ "$saved" = "$SAVED_BEFORE" ]; }; then
        echo "error: job $SLURM_JOB_ID: the run failed with code $code and is not requeued; its error is above" >&2
        exit "$code"
    elif [ "$saved" = "$SAVED_BEFORE" ]; then
        echo "error: job $SLURM_JOB_ID: no checkpoint came to $SAVE since this start, and none would at the next: not" \
            "requeued; give more time, or a shorter --save-interval" >&2
        exit 1
    elif [ "$restarts" -ge "$MAX_RESTARTS" ]; then
        echo "error: job $SLURM_JOB_ID: was requeued $restarts times (--max-restarts), and is not again" >&2
        exit 1
    fi
    echo "job $SLURM_JOB_ID: $SAVE is not finished, and goes on: requeued (restart $((restarts + 1)) of $MAX_RESTARTS)"
    # The number of an array's last element is that of the whole array.
    scontrol requeue "${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}"
    # Slurm ends this script.
    sleep 60
    fail "job $SLURM_JOB_ID: Slurm has not requeued it; submit it again, and the run goes on"
}
