"""Trains synchronously over every rank of the job, then merges the model on rank 0.

    python app/train.py                                   one rank
    horovodrun -np 4 python app/train.py                  four ranks on this machine
    mpirun -np 4 python app/train.py --config seed        the seed's run to the letter
    python app/train.py --help                            every setting

Put `env/run` before any of them, or source env/activate once.
"""

from torch import Tensor

from app.cluster.comm import Cluster
from app.cluster.inventory import describe_briefly, take_inventory
from app.cluster.program import run_program
from app.config import parse_settings
from app.parallel.merge import state_digest
from app.parallel.replicated import Replicated
from app.tasks.classify import Classify
from app.training.loop import Outcome, train
from app.training.optim import build_optimizer
from app.training.plots import plot_curves
from app.training.run_folder import RunFolder, storage_errors
from app.training.seeding import seed_rank, seed_shared


def main(cluster: Cluster) -> None:
    settings = cluster.on_root(parse_settings)
    task = Classify(settings, cluster)
    folder = cluster.on_root(lambda: RunFolder.create(settings))
    inventory = take_inventory(cluster)
    if cluster.is_root:
        print(describe_briefly(cluster, inventory), flush=True)
        folder.write_json("environment.json", inventory)

    seed_shared(settings.seed)
    model = task.build_model()
    strategy = Replicated(model, build_optimizer(model, settings.optimizer), cluster)
    strategy.synchronise()
    seed_rank(settings.seed, cluster.rank)
    outcome = train(cluster, settings, task, strategy, folder)

    merged = strategy.full_state()
    cluster.on_root(lambda: _finish(folder, merged or {}, outcome, cluster.size))


def _finish(folder: RunFolder, merged: dict[str, Tensor], outcome: Outcome, num_ranks: int) -> None:
    """Write the merged model, the summary and the curves, and tell the result."""
    evaluation = outcome.evaluation
    folder.save_model(merged)
    folder.write_json(
        "summary.json",
        {
            "accuracy": evaluation.accuracy,
            "loss": evaluation.loss,
            "num_held_out_samples": evaluation.num_samples,
            "num_parameters": sum(tensor.numel() for tensor in merged.values()),
            "model_digest": state_digest(merged),
            "num_ranks": num_ranks,
            "num_updates": outcome.num_updates,
            "training_seconds": round(outcome.seconds, 3),
            "images_per_second": round(outcome.images_per_second, 1),
        },
    )
    with storage_errors():
        plot_curves(folder.metrics, folder.path / "curves.png")
    print(f"Trained {outcome.num_updates} updates in {outcome.seconds:.1f} s, {outcome.images_per_second:.0f} images/s")
    print(f"Merged model: {folder.path / 'model.safetensors'}")
    print(
        f"Accuracy: {evaluation.accuracy:.4f} on {evaluation.num_samples} held-out samples, loss {evaluation.loss:.4f}"
    )


if __name__ == "__main__":
    run_program(main)
