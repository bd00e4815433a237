"""Builds a run as app/train.py does, for tests that stop it, look into it or compare it."""

from pathlib import Path

from app.cluster.comm import Cluster
from app.config import Settings
from app.parallel.replicated import Replicated
from app.tasks.classify import Classify
from app.training import loop
from app.training.loop import Trainer
from app.training.run_folder import RunFolder


def build_trainer(
    cluster: Cluster, settings: Settings, folder: Path, resume: bool = False
) -> tuple[Trainer, Replicated]:
    """Collective."""
    folder.mkdir(parents=True, exist_ok=True)
    trainer = loop.build_trainer(cluster, settings, Classify(settings, cluster), RunFolder(folder), resume)
    return trainer, trainer.strategy
