"""A model in parts learns what `replicated` learns: ZeRO 1-3 and the pipeline, in float64, to 1e-10."""

from pathlib import Path

import pytest
import torch

from lockstep.benchmark.sharding import STRATEGIES, Parallel, measure_strategy, proof_settings
from lockstep.comm.cluster import Cluster
from lockstep.settings import ModelSettings, VitSettings

TOLERANCE = 1e-10
SMALL = ModelSettings(vit=VitSettings(width=16, depth=3, num_heads=2, patch_size=14))
IN_PARTS = [how for how in STRATEGIES if how != "replicated"]
SIZES = [pytest.param(n, marks=pytest.mark.world_size(n)) for n in (2, 3)]
SIZES.append(pytest.param(4, marks=[pytest.mark.world_size(4), pytest.mark.thorough]))


@pytest.mark.usefixtures("_no_key_biases")
@pytest.mark.parametrize("how", IN_PARTS)
@pytest.mark.parametrize("size", SIZES)
def test_losses_and_weights_are_those_of_replicated_and_bytes_those_of_the_formula(
    cluster: Cluster, size: int, how: Parallel, tmp_path: Path
) -> None:
    """Ragged batches, three micro-batches, Adam with weight decay on one group of two, the gradient clipped."""
    folder = cluster.on_root(lambda: tmp_path)
    alone = measure_strategy(Cluster.alone(), proof_settings(SMALL, "replicated"), _own(tmp_path, cluster), 7)
    found = measure_strategy(cluster, proof_settings(SMALL, how), folder, 7)
    assert cluster.size == size
    assert found.losses == pytest.approx(alone.losses, rel=TOLERANCE, abs=TOLERANCE)
    assert len(set(alone.losses)) == 8
    assert found.held == pytest.approx(found.held_formula, rel=0.02)  # parts are padded to equal lengths
    if cluster.is_root:
        assert found.weights.keys() == alone.weights.keys()
        for name, tensor in alone.weights.items():
            torch.testing.assert_close(found.weights[name], tensor, rtol=TOLERANCE, atol=TOLERANCE, msg=name)


def _own(folder: Path, cluster: Cluster) -> Path:
    mine = folder / f"alone-{cluster.rank}"
    mine.mkdir()
    return mine
