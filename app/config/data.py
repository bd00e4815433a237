"""What is learned from."""

from dataclasses import dataclass
from typing import Literal

from app.config.check import check


@dataclass(frozen=True)
class DataSettings:
    """What is learned from, and how it is divided over the ranks."""

    name: Literal["digits", "mnist", "synthetic"] = "digits"
    """digits: 5,000 real ones that need no network; mnist: all 70,000, downloaded once; synthetic: for speed tests."""

    root: str = "data"
    """Folder for downloaded data; on a cluster, one that all nodes share."""

    batch_size: int = 64
    """Samples in one *global* batch, which is divided over all ranks."""

    batch_size_per_rank: int | None = None
    """The other way to say it: the global batch is this times the number of data shards, which are the ranks (of a
    pipeline: the replicas), and batch_size is ignored."""

    sharding: Literal["contiguous", "random", "hash"] = "contiguous"
    """How the samples of a global batch are dealt to the ranks."""

    num_samples: int = 4096
    """Samples of the synthetic data set."""

    def __post_init__(self) -> None:
        check(self.batch_size >= 1, "data.batch_size", self.batch_size, "it must be at least 1")
        per_rank = self.batch_size_per_rank
        check(per_rank is None or per_rank >= 1, "data.batch_size_per_rank", per_rank, "it must be at least 1")
        check(self.num_samples >= 1, "data.num_samples", self.num_samples, "it must be at least 1")

    def global_batch_size(self, num_ranks: int) -> int:
        return self.batch_size if self.batch_size_per_rank is None else self.batch_size_per_rank * num_ranks
