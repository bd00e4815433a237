"""The training loop: update, metrics, evaluation. Every rank runs it in step; rank 0 keeps the journal."""

import time
from dataclasses import dataclass

from app.cluster.comm import Cluster
from app.config import Settings
from app.parallel.replicated import Replicated
from app.tasks.classify import Classify, Evaluation
from app.training.journal import Journal, RootJournal
from app.training.metrics import Window
from app.training.optim import learning_rate_at, set_learning_rate
from app.training.run_folder import RunFolder


@dataclass(frozen=True)
class Outcome:
    """How training ended.

    Attributes:
        evaluation: of the final model, over all held-out samples.
        num_updates: optimizer steps.
        num_images: samples learned from, over all ranks and epochs.
        seconds: of the updates alone, without evaluation.
    """

    evaluation: Evaluation
    num_updates: int
    num_images: int
    seconds: float

    @property
    def images_per_second(self) -> float:
        return self.num_images / max(self.seconds, 1e-9)


def train(cluster: Cluster, settings: Settings, task: Classify, strategy: Replicated, folder: RunFolder) -> Outcome:
    """Collective: `settings.num_epochs` over the data, with a log line every `settings.log_interval` updates.

    The line's loss is that of the named global batch, as in the seed; metrics.jsonl has the mean since the line before.
    """
    loader = task.build_loader()
    num_updates = settings.num_epochs * loader.batches_per_epoch
    window = Window(cluster.device)
    step, num_images, seconds = 0, 0, 0.0
    evaluation = None
    with RootJournal(folder, num_updates) if cluster.is_root else Journal() as journal:
        for epoch in range(settings.num_epochs):
            started = time.perf_counter()
            for batch in loader.rest_of_epoch():
                learning_rate = learning_rate_at(step, num_updates, settings.optimizer, cluster.size)
                set_learning_rate(strategy.optimizer, learning_rate)
                window.add(strategy.update([batch], task.loss_sum))
                step, num_images = step + 1, num_images + batch.global_size
                journal.advance(step)
                is_line = batch.index % settings.log_interval == 0
                if is_line or step == num_updates:
                    mean, last = window.reduce(cluster)
                    journal.record("train", step, epoch, mean.loss, mean.accuracy, learning_rate=learning_rate)
                    if is_line:
                        journal.say(f"Epoch: {epoch}, Batch: {batch.index}, Loss: {last.loss:.4f}")
            seconds += time.perf_counter() - started
            evaluation = None
            if settings.evaluate_every and (epoch + 1) % settings.evaluate_every == 0:
                evaluation = task.evaluate(strategy.model)
                journal.record("held_out", step, epoch, evaluation.loss, evaluation.accuracy)
                journal.say(f"Epoch: {epoch}, Accuracy: {evaluation.accuracy:.4f}")
        if evaluation is None:
            evaluation = task.evaluate(strategy.model)
            journal.record("held_out", step, settings.num_epochs, evaluation.loss, evaluation.accuracy)
    return Outcome(evaluation, step, num_images, seconds)
