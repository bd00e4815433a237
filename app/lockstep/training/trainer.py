"""The training loop: update, metrics, checkpoint, evaluation. All ranks run it in step; rank 0 writes the run log."""

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property, partial
from typing import Any, NoReturn

from lockstep.comm.cluster import Cluster
from lockstep.comm.stop import StopVote, closing_vote
from lockstep.parallel.rank_grid import RankGrid
from lockstep.parallel.strategy import Strategy
from lockstep.runtime.errors import (
    LockstepError,
    NonFiniteError,
    NothingToLearnError,
    SettingsError,
    StoppedError,
    StorageError,
)
from lockstep.runtime.seeding import random_state_digest, update_seed
from lockstep.settings import Settings
from lockstep.tasks.task import Evaluation, Task
from lockstep.training.checkpoint import FOLDER as CHECKPOINTS
from lockstep.training.checkpoint import (
    Checkpoint,
    InMemoryCheckpoint,
    first_checkpoint,
    latest_checkpoint,
    remove_others,
)
from lockstep.training.checkpoint_writer import CheckpointWriter
from lockstep.training.held_out_scores import HeldOutScores
from lockstep.training.history import immutable_settings
from lockstep.training.hooks import TrainerHook
from lockstep.training.optim import learning_rate_at, set_learning_rate
from lockstep.training.profiling import Profiler
from lockstep.training.progress import MetricAccumulator, Progress
from lockstep.training.run_folder import RunFolder, json_number
from lockstep.training.run_logger import RootRunLogger, RunLogger
from lockstep.training.sample_ledger import SampleLedger, last_attempt


class Trainer:
    """One run, from its beginning or from its last checkpoint to its end.

    Attributes:
        task: what is learned.
        strategy: how the model is placed on the ranks.
        loader: of this rank's shard of the training data, at the run's position.
        progress: how far the run is.
        metrics: this rank's metric sums since the last log line.
        folder: the run folder.
        hooks: called before and after updates, at checkpoints and at the end.
        writer: of checkpoints.
        judgement: what summary.json says of an early stop and of the best checkpoint.
    """

    def __init__(
        self,
        cluster: Cluster,
        settings: Settings,
        task: Task,
        strategy: Strategy,
        grid: RankGrid,
        folder: RunFolder,
        resume: bool,
        handover: InMemoryCheckpoint | None = None,
        hooks: Sequence[TrainerHook] = (),
    ) -> None:
        """Collective: continue from `handover`; with `resume`, from the last intact checkpoint in `folder`, if any.

        Raises:
            SettingsError: on every rank: the run does not have the updates that are to be profiled.
            StorageError: on every rank: there are checkpoints, none of them intact; or the run log cannot be written.
        """
        self._cluster = cluster
        self._settings = settings
        self.task = task
        self.strategy = strategy
        self.folder = folder
        self.hooks = [*hooks]
        self._grid = grid
        self.loader = task.build_loader(grid.replica, grid.num_replicas, strategy)
        self._num_updates = task.num_epochs * self.loader.updates_per_epoch
        self._profiler = Profiler(settings, self._num_updates, cluster, folder)
        self.metrics = MetricAccumulator(cluster.device, task.num_metric_sums)
        self.progress = Progress()
        self._saved_step = -1
        self._told_of: set[str] = set()
        self._early = HeldOutScores.of(settings.stop.early_criterion)
        self._best = HeldOutScores.of(settings.checkpoint.best_criterion)
        self.judgement: dict[str, Any] = {}
        of_task = task.immutable_settings(self.loader, grid.num_replicas)
        self._immutable_settings = immutable_settings(settings, of_task, grid.num_replicas)
        mark = self._resume(handover) if handover or resume else 0
        self._repeats_checkpoint = handover is not None and self._checkpoint_is_due()
        if self.progress.step == 0:
            strategy.synchronise()
        cluster.on_root(folder.remove_results)  # before the run log and the ledger no longer hold them
        attempt = cluster.on_root(lambda: last_attempt(folder.path) + 1)
        path = SampleLedger.path(folder.path, attempt, self.progress.step, cluster.rank, cluster.size)
        keeps = settings.checks.ledger
        self._ledger = SampleLedger(path if keeps else None, self.loader.num_samples, ahead=cluster.is_elastic)
        if cluster.is_elastic:
            cluster.barrier()  # no update counts before every rank can record it
        self.writer = CheckpointWriter(folder.path, settings.checkpoint, cluster)
        run_logger = cluster.on_root_only(lambda: RootRunLogger(folder, settings, self._num_updates, mark))
        self._run_logger = run_logger or RunLogger()

    def train(self, stop: StopVote | None = None) -> Evaluation:
        """Collective: do all updates that are left, with a log line every `log_interval` of them, and evaluate.

        metrics.jsonl gets the means since the line before.

        Args:
            stop: asked after each update whether to stop.

        Returns:
            The evaluation of the model that the ranks hold at the end: the last or the best.

        Raises:
            NonFiniteError, ReplicasDifferError: on every rank.
            SettingsError: on every rank: there is no such held-out score as the settings name.
            StoppedError: on every rank: `stop` asked for it, and a checkpoint has been saved.
            StorageError: on the rank that cannot write.
        """
        every, num_epochs = self.task.evaluate_every, self.task.num_epochs
        evaluation = None
        with self._run_logger, contextlib.closing(self._ledger), self._finishing_to_write(), closing_vote(stop):
            if self._repeats_checkpoint:  # the generation before may not have taken it
                self.checkpoint()
            for epoch in range(self.loader.epoch, num_epochs):
                last = (epoch + 1) * self.loader.updates_per_epoch
                for item in self._profiler.watch(self._work_items(), self.progress, last):
                    self.update(item)
                    if stop and (reason := stop.reason(self._seconds_to_stop())):
                        self._stop(reason)
                evaluation = None
                if every and (epoch + 1) % every == 0:
                    evaluation = self._evaluate(epoch)
                    self._run_logger.say(_first_score(epoch, evaluation))
                    if self._early and (why := self._early.why_to_stop()) and epoch + 1 < num_epochs:
                        self._run_logger.say(f"Stopped early: {why}")
                        self.judgement["stopped_early"] = why
                        self._profiler.finish(self.progress)
                        break
            if evaluation is None:
                evaluation = self._evaluate(num_epochs - 1)
            if self._best and (best := self._put_best_back(self._best)):
                evaluation = best
            for hook in self.hooks:
                hook.at_end(self, evaluation)
            self._enter("checkpoint")
            self.writer.wait()
        return evaluation

    def _work_items(self) -> Iterator[Any]:
        """Iterate over the rest of the epoch; the time to load an item counts for its update."""
        items = self.loader.rest_of_epoch()
        while True:
            self._enter("data loading", self.progress.step + 1)
            started = time.perf_counter()
            item = next(items, None)
            if item is None:
                return
            self.progress.seconds += time.perf_counter() - started
            yield item

    def _seconds_to_stop(self) -> float:
        """How long this rank needs to stop after an update: to finish a checkpoint being written, to write another one,
        and the margin.
        """
        return 2 * self.writer.seconds_to_save(self._bytes_to_save) + self._settings.stop.margin_seconds

    @cached_property
    def _bytes_to_save(self) -> int:
        return sum(part.values.nbytes for part in self.strategy.saved_state().values())

    def _stop(self, reason: str) -> NoReturn:
        """Collective: take a checkpoint, unless one was just taken, and stop."""
        step = self.progress.step
        self._profiler.finish(self.progress)
        if self._saved_step != step:
            self.checkpoint()
        self.writer.wait()
        left = self._num_updates - step
        raise StoppedError(
            f"stopped by {reason} after update {step} of {self._num_updates}, which is saved: {left} are left. Go on "
            f"with the same command and --resume --run_dir {self.folder.path}"
        ).as_shared()

    def _enter(self, phase: str, update: int | None = None) -> None:
        self._cluster.recorder.enter(phase, update)

    @contextlib.contextmanager
    def _finishing_to_write(self) -> Iterator[None]:
        """Finish the checkpoint that is being written before an error leaves, if no other rank waits for this one."""
        try:
            yield
        except BaseException as error:
            if self._cluster.size == 1 or (isinstance(error, LockstepError) and error.shared):
                with contextlib.suppress(StorageError):
                    self.writer.wait()
            raise

    def update(self, item: Any) -> None:
        """Collective: do one update, and what is due after it: replica check, log line, checkpoint."""
        started = time.perf_counter()
        settings, progress = self._settings, self.progress
        for hook in self.hooks:
            hook.before_update(self, item)
        num_shards = self._grid.num_replicas
        learning_rate = learning_rate_at(progress.step, self._num_updates, settings.optimizer, num_shards)
        set_learning_rate(self.strategy.optimizer, learning_rate)
        seed = update_seed(settings.seed, progress.step, self._grid.replica)
        ids = item.ids if self._grid.counts_samples else item.ids[:0]
        self._ledger.announce(progress.step, self.loader.epoch, ids)
        skipped = False
        try:
            self.metrics.add(self.task.learn(item, self.strategy, seed, self.writer.wait_for_copy))
        except (NonFiniteError, NothingToLearnError) as error:
            if isinstance(error, NonFiniteError) and settings.checks.non_finite == "stop":
                error.args = (f"update {progress.step + 1}: {error}",)
                raise
            skipped = True
            progress.num_skipped += 1
            self._run_logger.say(f"Update {progress.step + 1} is skipped: {error}")
        self._enter("keeping of accounts")
        self._ledger.record(progress.step, self.loader.epoch, ids, skipped)
        progress.step += 1
        progress.num_samples += item.global_size
        self._run_logger.advance(progress.step)
        for hook in self.hooks:
            hook.after_update(self)
        if _is_due(progress.step, settings.checks.replica_interval):
            self.strategy.compare(f"after update {progress.step}")
        is_line = (item.index if self.loader.updates_per_epoch > 1 else progress.step) % settings.log_interval == 0
        if is_line or progress.step == self._num_updates:
            self._log(item, learning_rate, is_line)
        progress.seconds += time.perf_counter() - started
        if self._checkpoint_is_due():
            self.checkpoint()

    def _log(self, item: Any, learning_rate: float, is_line: bool) -> None:
        """Collective: write a log line; costs one all-reduce."""
        mean, last = (self.task.scores(metric_sums) for metric_sums in self.metrics.reduce(self._cluster))
        if not mean:  # every update since the last line was skipped
            return
        self._tell_of_nan(mean)
        epoch, step, samples = self.loader.epoch, self.progress.step, self.progress.num_samples
        self._run_logger.record("train", step, epoch, samples, **mean, learning_rate=learning_rate)
        if is_line:
            line = self.task.line(epoch, item, samples, mean, last)
            self._run_logger.say_progress(line, self.progress, self.task.samples)

    def _evaluate(self, epoch: int) -> Evaluation:
        """Collective: evaluate the model, or its average, judge it, and record the scores."""
        evaluation, progress = self._evaluation(), self.progress
        self._tell_of_nan(evaluation.scores)
        for scores in self._judges.values():
            scores.add(progress.step, evaluation.scores)
        is_over = self._early and self._early.why_to_stop() and self._settings.checkpoint.interval
        if self._saved_step != progress.step and (is_over or (self._best and progress.step in self._best.best)):
            self.checkpoint()  # before the record: a run that goes on from here evaluates again
        self._run_logger.record("held_out", progress.step, epoch, progress.num_samples, **evaluation.scores)
        return evaluation

    def _evaluation(self) -> Evaluation:
        """Collective: evaluate the model, or its average."""
        self._enter("evaluation")
        strategy, grid = self.strategy, self._grid
        forward = partial(strategy.forward, self.task)
        self.writer.wait_for_copy()  # of weights, which are now exchanged with their average
        with strategy.averaged():
            return self.task.evaluate(strategy.model, forward, grid.replica, grid.num_replicas)

    def _put_best_back(self, scores: HeldOutScores) -> Evaluation | None:
        """Collective: give the ranks the state of the best checkpoint, unless it is the last.

        Returns:
            Its evaluation, or None if it is the last.

        Raises:
            StorageError: on every rank: the best checkpoint was altered.
        """
        self._enter("checkpoint")
        self.writer.wait()
        run, keep = self.folder.path, self._settings.checkpoint.keep
        self._cluster.on_root(lambda: remove_others(run / CHECKPOINTS, keep, scores.best))
        ranking = scores.ranking()
        found = self._cluster.on_root(lambda: first_checkpoint(run, ranking))
        if found is None:  # no score was a number
            return None
        if found.step != ranking[0]:
            self._tell(f"The checkpoint of update {ranking[0]} was the best, and is gone")
        self.judgement["best"] = {"update": found.step, scores.criterion.metric: json_number(scores.score(found.step))}
        if found.step == self.progress.step:
            return None
        self.strategy.load_state(found)
        return self._evaluation()

    def _tell_of_nan(self, scores: Mapping[str, float]) -> None:
        """Say once of each score that it is not a number: it is recorded as null, and says nothing."""
        for name in scores.keys() - self._told_of:
            if math.isnan(scores[name]):
                self._told_of.add(name)
                self._run_logger.say(f"{name} is not a number after update {self.progress.step}, and recorded as null")

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def _checkpoint_is_due(self) -> bool:
        step, interval = self.progress.step, self._settings.checkpoint.interval
        return _is_due(step, interval) or (interval > 0 and step == self._num_updates)

    def position(self) -> dict[str, Any]:
        """What a checkpoint holds beside tensors that is equal on all ranks."""
        epoch, consumed = self.loader.position_after(self.progress.step)
        progress = asdict(self.progress)
        immutable = self._immutable_settings
        scores = {setting: scores.as_saved() for setting, scores in self._judges.items()}
        return {
            "progress": progress,
            "epoch": epoch,
            "consumed": consumed,
            "immutable_settings": immutable,
            "held_out_scores": scores,
        }

    @property
    def _judges(self) -> dict[str, HeldOutScores]:
        """The scores that decide something, by the settings that ask for them."""
        return {scores.criterion.setting: scores for scores in (self._early, self._best) if scores}

    def checkpoint(self) -> None:
        """Collective: take a checkpoint, from which a run continues exactly as if it had never stopped."""
        self._enter("checkpoint")
        self._saved_step = self.progress.step
        self._ledger.flush()  # before the all-gather: the checkpoint relies on every rank's ledger
        random_state = random_state_digest(self._cluster.device)
        of_ranks = self._cluster.all_gather_object((self.metrics.metric_sums(), random_state))
        counters: dict[str, Any] = {
            **self.position(),
            "metrics_mark": self._run_logger.mark(),
            "tied_weights": self.strategy.tied_weights,
            "metric_sums_of_ranks": [metric_sums for metric_sums, _ in of_ranks],
            "random_state_of_ranks": [state for _, state in of_ranks],  # for certificates; every update seeds its own
        }
        best = self._best.best if self._best else []
        volatile = self.strategy.changed_by_forward
        self.writer.save(self.progress.step, self.strategy.saved_state(), counters, volatile, best)
        self.loader.after_checkpoint()
        if self.hooks:
            self.writer.wait_for_copy()  # a hook may change the model
        for hook in self.hooks:
            hook.at_checkpoint(self)

    def _resume(self, handover: InMemoryCheckpoint | None) -> int:
        """Collective: continue from `handover` or the last intact checkpoint; returns its `mark` of the run log."""
        found: Checkpoint | InMemoryCheckpoint | None = handover
        if found is None:
            found = self._cluster.on_root(lambda: latest_checkpoint(self.folder.path, tell=self._tell))
        if found is None:
            self._tell(f"{self.folder.path} has no checkpoint yet: the run begins at update 0")
            return 0
        counters = found.counters
        for name, now in self._immutable_settings.items():
            if (
                was := counters["immutable_settings"].get(name, now)
            ) != now:  # older checkpoints do not have all of them
                message = f"{name} is {now} and was {was}: a run that goes on cannot change it"
                raise SettingsError(message).as_shared()
        if found.step > self._num_updates:
            message = f"the run has done {found.step} updates, and the settings ask for {self._num_updates} in all"
            raise SettingsError(f"{message}: it cannot become shorter than it is").as_shared()
        self.strategy.load_state(found)
        self.progress = Progress(**counters["progress"])
        self._saved_step = -1 if handover else self.progress.step
        self.loader.epoch, self.loader.consumed = counters["epoch"], counters["consumed"]
        self.metrics.restore(counters["metric_sums_of_ranks"], self._cluster)
        for setting, saved in counters.get("held_out_scores", {}).items():  # older checkpoints have none
            if setting in self._judges:
                self._judges[setting].restore(saved)
        self._tell(f"Goes on after update {found.step} from {found.path}")
        return int(counters["metrics_mark"])

    def _tell(self, line: str) -> None:
        if self._cluster.is_root:
            print(line, flush=True)


def _first_score(epoch: int, evaluation: Evaluation) -> str:
    name, value = next(iter(evaluation.scores.items()))
    return f"Epoch: {epoch}, {name.capitalize()}: {value:.4f}"


def _is_due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
