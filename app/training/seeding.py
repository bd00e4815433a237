"""Random states: the same on every rank where ranks must agree, apart where they must not."""

import numpy as np
import torch


def seed_shared(seed: int) -> None:
    """The same random state on every rank, to build the same model."""
    torch.manual_seed(seed)


def seed_rank(seed: int, rank: int) -> None:
    """A state of its own for every rank, so that dropout masks differ between them."""
    # SeedSequence mixes: neighbouring (seed, rank) give unrelated states, where seed + rank would meet another run's.
    torch.manual_seed(int(np.random.SeedSequence((seed, rank)).generate_state(1, np.uint64)[0] >> 1))
