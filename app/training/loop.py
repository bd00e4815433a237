"""The training loop: update, metrics, evaluation. Every rank runs it in step; rank 0 also keeps the journal."""

import contextlib
import time
from dataclasses import dataclass

from app.cluster.comm import Cluster
from app.config import Settings
from app.parallel.replicated import Replicated
from app.tasks.classify import Classify, Evaluation
from app.training.journal import Journal
from app.training.metrics import Window
from app.training.optim import learning_rate_at, set_learning_rate
from app.training.run_folder import RunFolder


@dataclass(frozen=True)
class Outcome:
    """How training ended.

    Attributes:
        evaluation: of the final model, over all held-out samples.
        num_updates: optimizer steps.
        seconds: of training alone, without evaluation.
        images_per_second: over all ranks.
    """

    evaluation: Evaluation
    num_updates: int
    seconds: float
    images_per_second: float


def train(cluster: Cluster, settings: Settings, task: Classify, strategy: Replicated, folder: RunFolder) -> Outcome:
    """Collective: `settings.num_epochs` over the data, with a log line every `settings.log_interval` updates.

    The line's loss is that of the named global batch, as in the seed; metrics.jsonl has the mean since the line before.
    """
    loader = task.build_loader()
    num_updates = settings.num_epochs * loader.batches_per_epoch
    window = Window(cluster.device)
    step, num_images, seconds = 0, 0, 0.0
    evaluation = None
    with contextlib.ExitStack() as stack:
        journal = stack.enter_context(Journal(folder, num_updates)) if cluster.is_root else None
        for epoch in range(settings.num_epochs):
            started = time.perf_counter()
            for batch in loader.rest_of_epoch():
                learning_rate = learning_rate_at(step, num_updates, settings.optimizer, cluster.size)
                set_learning_rate(strategy.optimizer, learning_rate)
                window.add(strategy.update([batch], task.loss_sum))
                step, num_images = step + 1, num_images + batch.global_size
                if batch.index % settings.log_interval == 0:
                    mean, last = window.reduce(cluster)
                    if journal:
                        journal.say(f"Epoch: {epoch}, Batch: {batch.index}, Loss: {last.loss:.4f}")
                        journal.record(
                            "train",
                            step,
                            epoch=epoch,
                            loss=mean.loss,
                            accuracy=mean.accuracy,
                            learning_rate=learning_rate,
                        )
                if journal:
                    journal.advance(step)
            seconds += time.perf_counter() - started
            evaluation = None
            if settings.evaluate_every and (epoch + 1) % settings.evaluate_every == 0:
                evaluation = _evaluate(task, strategy, journal, step, epoch)
        evaluation = evaluation or _evaluate(task, strategy, journal, step, settings.num_epochs - 1)
    return Outcome(evaluation, step, seconds, num_images / max(seconds, 1e-9))


def _evaluate(task: Classify, strategy: Replicated, journal: Journal | None, step: int, epoch: int) -> Evaluation:
    """Collective."""
    evaluation = task.evaluate(strategy.model)
    if journal:
        journal.say(f"Epoch: {epoch}, Accuracy: {evaluation.accuracy:.4f}")
        journal.record("held_out", step, epoch=epoch, loss=evaluation.loss, accuracy=evaluation.accuracy)
    return evaluation
