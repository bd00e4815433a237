# Common functions of the scripts in this folder. Each script sources it in its job, with `root` set to the clone.
# shellcheck shell=bash

SECONDS_TO_TRY=120 # a launcher that has not connected the ranks by then does not work here

say() { echo "slurm: $*"; }

give_up() {
    say "$*" >&2
    exit 2
}

[[ -n ${SLURM_JOB_ID:-} ]] || give_up "this is not a Slurm job: sbatch slurm/${0##*/}"
root=$(CDPATH='' cd -- "$root" && pwd)
source "$root/env/activate" || exit 2
# Commands in the log begin with env/run, since the shell that they are pasted into has no environment.
export LOCKSTEP_PREFIX=$root/env/run
[[ ! $root -ef . ]] || LOCKSTEP_PREFIX=env/run

# The id of this task. The last task of an array has the array's SLURM_JOB_ID, by which scontrol means all of its tasks.
job=$SLURM_JOB_ID
[[ -z ${SLURM_ARRAY_JOB_ID:-} ]] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID

# Without a number of tasks, start one on each node, with every launcher.
if [[ -z ${SLURM_NTASKS:-} ]]; then
    export SLURM_NTASKS=$SLURM_JOB_NUM_NODES SLURM_NPROCS=$SLURM_JOB_NUM_NODES SLURM_NTASKS_PER_NODE=1
    export SLURM_TASKS_PER_NODE="1(x$SLURM_JOB_NUM_NODES)"
fi
tasks_here=${SLURM_TASKS_PER_NODE%%[(,]*} # tasks on the first node, where this script runs: 2 in `2(x3),1`
((${SLURM_GPUS_ON_NODE:-0} <= tasks_here)) ||
    say "warning: $SLURM_GPUS_ON_NODE GPUs on this node and $tasks_here task(s), each of which uses one:" \
        "sbatch --ntasks-per-node=$SLURM_GPUS_ON_NODE ..."
# Defaults that srun and mpirun lack; values that the user has set are kept.
[[ -z ${SLURM_CPUS_PER_TASK:-} ]] || # srun does not inherit it since Slurm 22.05
    export SRUN_CPUS_PER_TASK=${SRUN_CPUS_PER_TASK:-$SLURM_CPUS_PER_TASK}
export SLURM_KILL_BAD_EXIT=${SLURM_KILL_BAD_EXIT:-1} # end all ranks if one is lost
export SLURM_EXPORT_ENV=ALL SRUN_EXPORT_ENV=ALL      # even after `sbatch --export=NONE`
export PRTE_MCA_hwloc_default_binding_policy=${PRTE_MCA_hwloc_default_binding_policy:-none} # Lockstep binds the ranks
export OMPI_MCA_hwloc_base_binding_policy=${OMPI_MCA_hwloc_base_binding_policy:-none}       # the same, Open MPI 4

# The end time of the job, in seconds since the epoch, for Slurm versions that do not export it.
unset LOCKSTEP_JOB_END_TIME # it may come from a job that has submitted this one
end_time=$(SLURM_TIME_FORMAT=%s squeue --noheader --jobs="$job" --format=%e 2>/dev/null) || end_time=''
[[ ! $end_time =~ ^[0-9]+$ ]] || export LOCKSTEP_JOB_END_TIME=$end_time

# -- the launcher ------------------------------------------------------------------------------------------------------

# Set `launcher` to the first launcher whose ranks form one job, and print it. A plugin of `srun --mpi=list` may fail, or
# start separate jobs of one rank, so each launcher is tried with a short program.
choose_launcher() {
    local what="$SLURM_NTASKS rank(s) on $SLURM_JOB_NUM_NODES node(s)"
    if [[ -n ${LOCKSTEP_LAUNCHER:-} ]]; then
        read -ra launcher <<<"$LOCKSTEP_LAUNCHER"
        say "$what, started by $LOCKSTEP_LAUNCHER, as LOCKSTEP_LAUNCHER says"
        return
    fi
    local mpi offered candidate candidates=('srun --mpi=pmix' 'srun --mpi=pmi2' "mpirun -np $SLURM_NTASKS") refusals=''
    mpi=$(source "$VIRTUAL_ENV/lockstep.sh" && echo "$lockstep_mpi")
    [[ $mpi == 'Open MPI'* ]] || candidates=('srun --mpi=pmi2' 'srun --mpi=pmix' "mpirun -np $SLURM_NTASKS")
    [[ $SLURM_NTASKS != 1 ]] || candidates+=(env) # without a launcher: `env python ...`
    offered=$(srun --mpi=list 2>&1) || offered=''
    for candidate in "${candidates[@]}"; do
        read -ra launcher <<<"$candidate"
        if [[ $candidate == srun* && ! $offered =~ (^|[[:space:]])${candidate#*=}($|[[:space:]]) ]]; then
            refusals+="; not by $candidate: this Slurm does not offer it"
        elif try_launcher; then
            say "$what, started by ${candidate/#env/python itself} (${mpi:-MPI}$refusals)"
            return
        else
            refusals+="; not by ${candidate/#env/python itself}: $why_not"
        fi
    done
    give_up "no launcher makes $what one job of ${mpi:-this MPI}$refusals." \
        'Name one that does: LOCKSTEP_LAUNCHER="srun --mpi=..." sbatch ...'
}

# Succeeds if all ranks of `launcher` form one job; else sets `why_not` to the reason.
try_launcher() {
    local output code=0 sizes
    output=$(timeout --kill-after=10 "$SECONDS_TO_TRY" "${launcher[@]}" python -c '
from mpi4py import MPI
ranks = MPI.COMM_WORLD.allreduce(1)
if MPI.COMM_WORLD.rank == 0:
    print("ranks together:", ranks, flush=True)
' 2>&1 </dev/null | tr -d '\0') || code=$?
    sizes=$(sed -n 's/.*ranks together: //p' <<<"$output")
    [[ $code != 0 || $sizes != "$SLURM_NTASKS" ]] || return 0
    case $code in
        0) why_not="the ranks do not find each other (${sizes//$'\n'/, } together)" ;;
        124 | 137) why_not="nothing within $SECONDS_TO_TRY s" ;;
        *) why_not="exit code $code: $(grep -E '[[:alnum:]]' <<<"$output" | tail -n 1)" ;;
    esac
    return 1
}

# -- the ranks ---------------------------------------------------------------------------------------------------------

# Run `lockstep "$@"` on every rank and set `code` to its exit code. On USR1 or TERM this script sends USR1 to the ranks,
# which asks them to stop; on TERM mpirun would kill them.
run_ranks() {
    local process='' asked='' interrupted
    trap ask_to_stop USR1 TERM
    choose_launcher
    # USR1 is ignored until the program handles it: during its start the signal would kill it.
    "${launcher[@]}" bash -c 'trap "" USR1; exec lockstep "$@"' lockstep "$@" &
    process=$!
    [[ $asked != early ]] || ask_to_stop
    while :; do
        interrupted='' code=0
        wait "$process" || code=$?
        [[ -n $interrupted ]] || break # after a signal, `wait` returns before the process ends
    done
    trap '' USR1 TERM # the rest is short, and a requeue sends TERM before it is done
}

ask_to_stop() {
    interrupted=yes
    if [[ -z $process ]]; then
        asked=early
    elif [[ $asked != passed ]]; then
        asked=passed
        say 'a signal came: the ranks are asked to stop'
        kill -USR1 "$process" 2>/dev/null || true
    fi
}

# Run a program that starts jobs itself, one after the other, by its option --launcher; set `code` as above.
run_ranks_in_turn() {
    choose_launcher
    case ${launcher[0]-} in
        srun) launcher+=('--ntasks={ranks}') ;;
        *) launcher=(mpirun -np '{ranks}') ;;
    esac
    code=0
    lockstep "$1" "$2" --launcher "${launcher[*]}" "${@:3}" || code=$?
}

# Set `run_dir` to the value of the last --run_dir in the arguments, or to the first argument if there is none.
find_run_dir() {
    run_dir=$1
    shift
    while (($#)); do
        case $1 in
            --run_dir=*) run_dir=${1#*=} ;;
            --run_dir) run_dir=${2-} ;;
        esac
        shift
    done
}

# Print the 12-digit number of the newest checkpoint in `run_dir`, or nothing if there is none.
newest_checkpoint() {
    local folder newest=''
    for folder in "$run_dir"/checkpoints/[0-9]*/; do
        folder=${folder%/}
        [[ ! ${folder##*/} =~ ^[0-9]{12}$ ]] || newest=${folder##*/} # matches of a pattern are sorted
    done
    echo "$newest"
}

# Train in a folder that is the same in each attempt of this job, and set `code`. If a stop, a stall or a lost rank ended
# the run and there is a new checkpoint, requeue the job, to resume from it.
train() {
    local before after default_run_dir=$1 go_on=()
    shift
    find_run_dir "${LOCKSTEP_RUN_DIR:-$default_run_dir}" "$@"
    before=$(newest_checkpoint)
    [[ ! -d $run_dir ]] || go_on=(--resume) # an earlier attempt has started it
    run_ranks train "${go_on[@]}" --run_dir "$run_dir" "$@"
    [[ $code != 0 ]] || return 0
    after=$(newest_checkpoint)
    local ended="ended with exit code $code (docs/exit-codes.md)"
    # After the loss of a rank or a node the code is 128 + the signal, or one of the MPI library's own.
    if [[ $code =~ ^([1-6]|8|130)$ ]]; then
        say "$ended; not put back into the queue: it would end so again"
    elif [[ ! $after > $before ]]; then
        say "$ended; not put back into the queue: no checkpoint is newer than ${before:-none}," \
            'with which this attempt began'
    elif [[ $(squeue --noheader --jobs="$job" --format=%T 2>/dev/null) != RUNNING ]]; then
        say "$ended; not put back into the queue: the job is being ended from outside"
    elif scontrol requeue "$job"; then
        say "$ended; back in the queue (scontrol requeue $job), to go on from $run_dir/checkpoints/$after"
    else
        say "$ended; Slurm does not take it back. To go on: sbatch ... --run_dir $run_dir"
    fi
}
