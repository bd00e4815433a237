"""How the ranks of a job divide model and data; the degrees of parallelism are checked here, and nowhere else."""

from dataclasses import dataclass

from lockstep.runtime.errors import SettingsError
from lockstep.settings import Settings


@dataclass(frozen=True)
class RankGrid:
    """`num_replicas` copies of the model, each in `num_stages` stages: neighbouring ranks make up one replica.

    Attributes:
        rank: this rank.
    """

    num_replicas: int
    num_stages: int
    rank: int

    @staticmethod
    def of(settings: Settings, rank: int, size: int) -> "RankGrid":
        """
        Raises:
            SettingsError: on every rank: the number of ranks is not stages x replicas.
        """
        num_stages = (settings.pipeline.num_stages or size) if settings.parallel == "pipeline" else 1
        if size % num_stages:
            num_replicas = max(1, size // num_stages)
            raise SettingsError(
                f"pipeline.num_stages is {num_stages} on {size} ranks: stages x replicas must be the number of ranks, "
                f"and {num_stages} x {num_replicas} is {num_stages * num_replicas}"
            ).as_shared()
        return RankGrid(size // num_stages, num_stages, rank)

    @property
    def replica(self) -> int:
        """Which replica this rank belongs to, and which of the `num_replicas` data shards it trains on."""
        return self.rank // self.num_stages

    @property
    def stage(self) -> int:
        return self.rank % self.num_stages

    @property
    def counts_samples(self) -> bool:
        """Whether this rank records the samples of its replica: one of its stages does."""
        return self.stage == 0

    def rank_of(self, stage: int) -> int:
        """The rank of another stage of this replica."""
        return self.replica * self.num_stages + stage

    def same_stage(self) -> list[list[int]]:
        """For each stage, the ranks that hold it."""
        return [
            list(range(stage, self.num_replicas * self.num_stages, self.num_stages)) for stage in range(self.num_stages)
        ]
