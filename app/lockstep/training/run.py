"""One run, from its settings to its merged model: what `lockstep train` does on every rank."""

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from lockstep.comm.cluster import Cluster
from lockstep.comm.elastic import GenerationVote, HostUpdates, run_elastic
from lockstep.comm.inventory import describe_binding, describe_briefly, take_inventory
from lockstep.comm.mpi_library import abort_job
from lockstep.comm.program import tell
from lockstep.comm.stop import StopRequests, StopVote, end_time
from lockstep.comm.watchdog import Watchdog
from lockstep.parallel.rank_grid import RankGrid
from lockstep.runtime.resources import peak_mib
from lockstep.runtime.seeding import make_deterministic
from lockstep.settings import Settings
from lockstep.settings.reading import parse_settings
from lockstep.tasks.task import Evaluation
from lockstep.training.build import build_task, build_trainer
from lockstep.training.elastic import ElasticState, Run, check_elastic
from lockstep.training.hooks import NamedHook, TrainerHook
from lockstep.training.model_file import TensorFileWriter
from lockstep.training.optim import check_patterns
from lockstep.training.run_folder import RunFolder, storage_errors
from lockstep.training.summary import summary_lines, write_summary
from lockstep.training.trainer import Trainer

SECONDS_FOR_A_LOCK = 120.0  # of a lost rank 0, which a file server may keep


Read = Callable[[], tuple[Settings, bool]]
"""Gives a run's settings, and whether it is resumed: called on rank 0."""


def run(
    cluster: Cluster,
    hooks: Sequence[TrainerHook] = (),
    read: Read = parse_settings,
    raise_stall: Callable[[str], None] | None = None,
    requests: StopRequests | None = None,
) -> Path:
    """Collective: one run, from its settings to its merged model; `hooks` are called on the way.

    Args:
        raise_stall: see `Watchdog`.
        requests: signals to stop, if the caller looks at them, too.

    Returns:
        The run folder.
    """
    started, state = time.time(), ElasticState()
    signals = requests or StopRequests(tell if cluster.is_root else lambda _: None)

    def vote(generation: Cluster, settings: Settings, hosts: HostUpdates | None = None) -> StopVote:
        end = end_time(settings.stop.after_minutes, started)
        return GenerationVote(generation, signals, end, hosts) if hosts else StopVote(generation, signals, end)

    def train_generation(generation: Cluster, hosts: HostUpdates | None = None) -> None:
        train(generation, state, read, lambda settings: vote(generation, settings, hosts), hooks, raise_stall)

    if cluster.is_elastic:
        run_elastic(cluster, train_generation, state.leave)
    else:
        train_generation(cluster)
    assert state.run
    return state.run.folder.path


def train(
    cluster: Cluster,
    state: ElasticState,
    read: Read,
    vote: Callable[[Settings], StopVote],
    hooks: Sequence[TrainerHook] = (),
    raise_stall: Callable[[str], None] | None = None,
) -> None:
    """Collective: train from the beginning, a checkpoint or an earlier generation's state, to the merged model."""
    known = state.run_of(cluster)
    settings, resume = (known.settings, known.resume) if known else cluster.on_root(read)
    if cluster.is_elastic:
        check_elastic(settings)
    if settings.checks.deterministic:
        make_deterministic()
    if settings.profile:
        cluster.prepare_timeline()
    task = build_task(settings, cluster)
    settings = task.settings  # with all of its own
    named_hooks = cluster.on_every_rank(lambda: [NamedHook(name) for name in settings.hook_names])
    task.try_out()
    cluster.on_root(lambda: check_patterns(task.model_blocks(), settings.optimizer))
    RankGrid.of(settings, cluster.rank, cluster.size)  # what does not fit must not leave a folder
    begun = state.run = known or cluster.on_root(lambda: Run.open(settings, resume, cluster.is_elastic))
    folder = begun.folder
    if begun.is_finished:
        if cluster.is_root:
            print(f"{folder.path} is finished: nothing is left to do, and nothing was changed", flush=True)
        return
    with contextlib.ExitStack() as stack:
        cluster.on_root(lambda: stack.enter_context(folder.locked(SECONDS_FOR_A_LOCK if known else 0.0)))
        cluster.on_root(folder.begin_recording)
        watchdog = cluster.on_every_rank(lambda: watch(cluster, folder, settings.stall.limit_seconds, raise_stall))
        stack.callback(watchdog.close)
        inventory = take_inventory(cluster)
        if cluster.is_root and not settings.quiet:
            print(describe_briefly(cluster, inventory), *describe_binding(inventory), sep="\n", flush=True)
        handover = state.take_over(cluster)
        trainer = build_trainer(cluster, settings, task, folder, begun.resume, handover, [*hooks, *named_hooks])
        state.trainer = trainer
        cluster.on_root(lambda: folder.begin(settings, inventory, trainer.progress.step))
        cluster.recorder.take_seconds()  # what comes before is the start, not training
        evaluation = trainer.train(vote(settings))
        seconds = cluster.recorder.take_seconds()
        cluster.recorder.enter("merging")
        merged = merge_into(folder, cluster, trainer)
        ranks = cluster.all_gather_object((round(peak_mib()), seconds))
        cluster.on_root(lambda: _finish(folder, merged, evaluation, trainer, ranks))


def watch(
    cluster: Cluster, folder: RunFolder, limit_seconds: float, raise_stall: Callable[[str], None] | None = None
) -> Watchdog:
    """Write this rank's flight record to `folder`, and start the watchdog, which ends a stalled job.

    Raises:
        StorageError: the record cannot be written.
    """
    with storage_errors():
        return Watchdog(
            cluster.recorder, folder.recorder, cluster.rank, cluster.size, limit_seconds, abort_job, raise_stall
        )


def merge_into(folder: RunFolder, cluster: Cluster, trainer: Trainer) -> TensorFileWriter | None:
    """Collective: merge the model into a file on rank 0, tensor by tensor; returns its writer there, None elsewhere.

    Raises:
        ReplicasDifferError: on every rank, if replicas differ; on rank 0, if a shard was lost on the way.
        StorageError: on rank 0: it cannot be written.
    """
    strategy = trainer.strategy
    with strategy.averaged():
        if not cluster.is_root:
            strategy.merge(None)
            return None
        with folder.model_writer(strategy.meta_state) as writer:
            strategy.merge(writer.write)
        return writer


def _finish(
    folder: RunFolder,
    merged: TensorFileWriter | None,
    evaluation: Evaluation,
    trainer: Trainer,
    ranks: list[tuple[int, dict[str, float]]],
) -> None:
    """Write the summary, print the result, and draw the curves.

    Args:
        ranks: of each, its peak memory in MiB and its seconds by phase.

    Raises:
        StorageError: something cannot be written.
    """
    from lockstep.training.plots import plot_curves  # matplotlib is for rank 0 alone

    assert merged
    peaks, seconds = [peak for peak, _ in ranks], [seconds for _, seconds in ranks]
    with storage_errors():
        plot_curves(folder.metrics, folder.path / "curves.png", trainer.task.curves, trainer.task.samples)
    # Last: with it the run is finished.
    num_parameters = trainer.strategy.num_parameters
    summary = write_summary(
        folder, merged, num_parameters, evaluation, trainer.progress, seconds, peaks, trainer.judgement
    )
    print(*summary_lines(folder, summary, trainer.task.samples), evaluation, sep="\n")
