# What the scripts of this folder share; each of them sources it, in the job, with `root` set to the clone.
# shellcheck shell=bash

SECONDS_TO_TRY=120 # a launcher that has not brought the ranks together by then does not work here

say() { echo "slurm: $*"; }

give_up() {
    say "$*" >&2
    exit 2
}

[[ -n ${SLURM_JOB_ID:-} ]] || give_up "this is no Slurm job: sbatch slurm/${0##*/}"
root=$(CDPATH='' cd -- "$root" && pwd)
source "$root/env/activate" || exit 2
# Whoever reads the log and pastes a command from it has no environment in their shell.
export LOCKSTEP_PREFIX=$root/env/run
[[ ! $root -ef . ]] || LOCKSTEP_PREFIX=env/run

# This job alone. The last task of an array has the array's own SLURM_JOB_ID, which means all of its tasks to scontrol.
job=$SLURM_JOB_ID
[[ -z ${SLURM_ARRAY_JOB_ID:-} ]] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID

# A job that says nothing of tasks has one on each node, whatever starts them.
if [[ -z ${SLURM_NTASKS:-} ]]; then
    export SLURM_NTASKS=$SLURM_JOB_NUM_NODES SLURM_NPROCS=$SLURM_JOB_NUM_NODES SLURM_NTASKS_PER_NODE=1
    export SLURM_TASKS_PER_NODE="1(x$SLURM_JOB_NUM_NODES)"
fi
tasks_here=${SLURM_TASKS_PER_NODE%%[(,]*} # of `2(x3),1`, on the first node, where this runs
((${SLURM_GPUS_ON_NODE:-0} <= tasks_here)) ||
    say "warning: $SLURM_GPUS_ON_NODE GPUs on this node and $tasks_here task(s), each of which uses one:" \
        "sbatch --ntasks-per-node=$SLURM_GPUS_ON_NODE ..."
# What srun, or mpirun, would not do by itself; a value that the user has set is left alone.
[[ -z ${SLURM_CPUS_PER_TASK:-} ]] || # not inherited since Slurm 22.05
    export SRUN_CPUS_PER_TASK=${SRUN_CPUS_PER_TASK:-$SLURM_CPUS_PER_TASK}
export SLURM_KILL_BAD_EXIT=${SLURM_KILL_BAD_EXIT:-1} # one rank that is lost ends all
export SLURM_EXPORT_ENV=ALL SRUN_EXPORT_ENV=ALL      # after `sbatch --export=NONE`, too
export PRTE_MCA_hwloc_default_binding_policy=${PRTE_MCA_hwloc_default_binding_policy:-none} # Lockstep binds the ranks
export OMPI_MCA_hwloc_base_binding_policy=${OMPI_MCA_hwloc_base_binding_policy:-none}       # the same, Open MPI 4

# When Slurm will end the job, in seconds since the epoch: newer versions say it themselves.
unset LOCKSTEP_JOB_END_TIME # of a job that has submitted this one
end_time=$(SLURM_TIME_FORMAT=%s squeue --noheader --jobs="$job" --format=%e 2>/dev/null) || end_time=''
[[ ! $end_time =~ ^[0-9]+$ ]] || export LOCKSTEP_JOB_END_TIME=$end_time

# -- the launcher ------------------------------------------------------------------------------------------------------

# Set `launcher` to the first way to start ranks that makes them one job here, and say which. What `srun --mpi=list`
# names may fail, or start so many jobs of one rank: each is tried, with a program of a second.
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
    [[ $SLURM_NTASKS != 1 ]] || candidates+=(env) # no launcher at all: `env python ...`
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

# True if `launcher` makes one job of all ranks; else `why_not` says why.
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

# Run `lockstep "$@"` on every rank and set `code` to the program's exit code. USR1 or TERM, to this script, asks the
# ranks to stop: by USR1, since mpirun answers TERM by killing them.
run_ranks() {
    local process='' asked='' interrupted
    trap ask_to_stop USR1 TERM
    choose_launcher
    # Until the program listens, USR1 is ignored: one that comes while it starts would kill it.
    "${launcher[@]}" bash -c 'trap "" USR1; exec lockstep "$@"' lockstep "$@" &
    process=$!
    [[ $asked != early ]] || ask_to_stop
    while :; do
        interrupted='' code=0
        wait "$process" || code=$?
        [[ -n $interrupted ]] || break # else the code may be that of `wait` itself
    done
    trap '' USR1 TERM # what is left takes a moment; a requeue sends TERM before it is over
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

# As above for a program that is no rank itself but starts jobs in turn, by its option --launcher.
run_ranks_in_turn() {
    choose_launcher
    case ${launcher[0]-} in
        srun) launcher+=('--ntasks={ranks}') ;;
        *) launcher=(mpirun -np '{ranks}') ;;
    esac
    code=0
    lockstep "$1" "$2" --launcher "${launcher[*]}" "${@:3}" || code=$?
}

# Set `run_dir` to the last --run_dir among the arguments, or else to the first of them.
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

# The number of the newest checkpoint in `run_dir`, of 12 digits; nothing if there is none.
newest_checkpoint() {
    local folder newest=''
    for folder in "$run_dir"/checkpoints/[0-9]*/; do
        folder=${folder%/}
        [[ ! ${folder##*/} =~ ^[0-9]{12}$ ]] || newest=${folder##*/} # a pattern's matches are sorted
    done
    echo "$newest"
}

# Train in a folder that is the same each time this job is started, and set `code`. If a stop, a stall or a lost rank
# ended it, and it got further than the attempt before, the job goes back into the queue, to go on from there.
train() {
    local before after default_run_dir=$1 go_on=()
    shift
    find_run_dir "${LOCKSTEP_RUN_DIR:-$default_run_dir}" "$@"
    before=$(newest_checkpoint)
    [[ ! -d $run_dir ]] || go_on=(--resume) # what an attempt before has begun
    run_ranks train "${go_on[@]}" --run_dir "$run_dir" "$@"
    [[ $code != 0 ]] || return 0
    after=$(newest_checkpoint)
    local ended="ended with exit code $code (docs/exit-codes.md)"
    # A rank or a node that was lost ends the job with 128 + the signal, or with a code of the MPI's own.
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
