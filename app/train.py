"""Trains synchronously over every rank of the job, then merges the model on rank 0.

    python app/train.py                                   one rank
    horovodrun -np 4 python app/train.py                  four ranks on this machine
    mpirun -np 4 python app/train.py --config seed        the seed's run to the letter
    mpirun -np 4 python app/train.py --resume             goes on with runs/latest, as if it had never stopped
    python app/train.py --help                            every setting

Put `env/run` before any of them, or source env/activate once.
"""

import contextlib

from app.cluster.comm import Cluster
from app.cluster.inventory import describe_binding, describe_briefly, take_inventory
from app.cluster.memory import peak_mib
from app.cluster.program import run_program
from app.parallel.layout import Layout
from app.settings import parse_settings
from app.tasks.classify import Classify, Evaluation
from app.training.build import build_trainer
from app.training.loop import Trainer
from app.training.run_folder import MODEL, RunFolder, json_number, storage_errors
from app.training.seeding import make_deterministic
from app.training.tensor_file import TensorFileWriter


def main(cluster: Cluster) -> None:
    settings, resume = cluster.on_root(parse_settings)
    if settings.proof.deterministic:
        make_deterministic()
    task = Classify(settings, cluster)
    Layout.of(settings, cluster.rank, cluster.size)  # a number of ranks that does not fit leaves no folder behind
    folder = cluster.on_root(lambda: RunFolder.reopen(settings) if resume else RunFolder.create(settings))
    with contextlib.ExitStack() as stack:
        cluster.on_root(lambda: stack.enter_context(folder.locked()))
        inventory = take_inventory(cluster)
        if cluster.is_root:
            print(describe_briefly(cluster, inventory), *describe_binding(inventory), sep="\n", flush=True)
        trainer = build_trainer(cluster, settings, task, folder, resume)
        cluster.on_root(lambda: folder.begin(settings, inventory))
        evaluation = trainer.train()
        merged = merge_into(folder, cluster, trainer)
        peaks = cluster.all_gather_object(round(peak_mib()))
        cluster.on_root(lambda: _finish(folder, merged, evaluation, trainer, peaks))


def merge_into(folder: RunFolder, cluster: Cluster, trainer: Trainer) -> TensorFileWriter | None:
    """Collective: the merged model goes into rank 0's file, tensor by tensor. None but on rank 0.

    Raises:
        ReplicasDifferError: on every rank, if they do not agree; on rank 0, if parts were lost on the way.
        StorageError: on rank 0: it cannot be written.
    """
    strategy = trainer.strategy
    if not cluster.is_root:
        strategy.merge(None)
        return None
    with folder.model_writer(strategy.like) as writer:
        strategy.merge(writer.write)
    return writer


def _finish(
    folder: RunFolder, merged: TensorFileWriter | None, evaluation: Evaluation, trainer: Trainer, peaks: list[int]
) -> None:
    """Write the summary, tell the result, and draw the curves.

    Raises:
        StorageError: something cannot be written.
    """
    from app.training.plots import plot_curves  # matplotlib is for rank 0 alone

    assert merged
    progress = trainer.progress
    folder.write_json(
        "summary.json",
        {
            "accuracy": evaluation.accuracy,
            "loss": json_number(evaluation.loss),
            "num_held_out_samples": evaluation.num_samples,
            "num_parameters": merged.num_elements,
            "model_digest": merged.digest,
            "num_ranks": len(peaks),
            "peak_mib_of_ranks": peaks,
            "num_updates": progress.step,
            "num_skipped": progress.num_skipped,
            "training_seconds": round(progress.seconds, 3),
            "images_per_second": round(progress.images_per_second, 1),
        },
    )
    print(f"Trained {progress.step} updates in {progress.seconds:.1f} s, {progress.images_per_second:.0f} images/s")
    print(f"Merged model: {folder.path / MODEL}")
    print(evaluation)
    with storage_errors():
        plot_curves(folder.metrics, folder.path / "curves.png")


if __name__ == "__main__":
    run_program(main)
