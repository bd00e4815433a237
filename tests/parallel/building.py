"""Builds a run as app/train.py does, for tests that stop it, look into it or compare it."""

from pathlib import Path

from app.cluster.comm import Cluster
from app.config import Settings
from app.parallel.replicated import Replicated
from app.tasks.classify import Classify
from app.training.loop import Trainer
from app.training.optim import build_optimizer
from app.training.run_folder import RunFolder
from app.training.seeding import seed_model


def build_trainer(
    cluster: Cluster, settings: Settings, folder: Path, resume: bool = False
) -> tuple[Trainer, Replicated]:
    """Collective."""
    folder.mkdir(parents=True, exist_ok=True)
    task = Classify(settings, cluster)
    seed_model(settings.seed)
    model = task.build_model()
    strategy = Replicated(model, build_optimizer(model, settings.optimizer), cluster)
    return Trainer(cluster, settings, task, strategy, RunFolder(folder), resume), strategy
