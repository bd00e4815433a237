"""Every setting, its default, its unit and its check. How they are read stands in settings.py."""

import math
from dataclasses import dataclass, field
from typing import Literal


def _check(holds: bool, name: str, value: object, fix: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {value}: {fix}")


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
    """The other way to say it: the global batch is this times the number of ranks, and batch_size is ignored."""

    sharding: Literal["contiguous", "random", "hash"] = "contiguous"
    """How the samples of a global batch are dealt to the ranks."""

    num_samples: int = 4096
    """Samples of the synthetic data set."""

    def __post_init__(self) -> None:
        _check(self.batch_size >= 1, "data.batch_size", self.batch_size, "it must be at least 1")
        per_rank = self.batch_size_per_rank
        _check(per_rank is None or per_rank >= 1, "data.batch_size_per_rank", per_rank, "it must be at least 1")
        _check(self.num_samples >= 1, "data.num_samples", self.num_samples, "it must be at least 1")

    def global_batch_size(self, num_ranks: int) -> int:
        return self.batch_size if self.batch_size_per_rank is None else self.batch_size_per_rank * num_ranks


@dataclass(frozen=True)
class ModelSettings:
    """The seed's `Net`."""

    dropout1: float = 0.25
    """Probability of dropping a channel after the convolutions."""

    dropout2: float = 0.5
    """Probability of dropping a unit after the first linear layer."""

    channels_last: bool = True
    """Keep images and filters with their channels innermost, which convolutions compute on fastest."""

    compile: bool = False
    """Compile the model with torch.compile: worth its first minute on GPUs and for models of many small layers."""

    def __post_init__(self) -> None:
        for name in ("dropout1", "dropout2"):
            value = getattr(self, name)
            _check(0 <= value < 1, f"model.{name}", value, "a probability of at least 0 and below 1 is needed")


@dataclass(frozen=True)
class OptimizerSettings:
    """How the gradient becomes a step."""

    name: Literal["sgd", "adam", "adamw"] = "sgd"
    """The optimizer, from torch.optim."""

    learning_rate: float = 0.05
    """The highest learning rate of the schedule."""

    momentum: float = 0.9
    """For sgd only."""

    weight_decay: float = 5e-4
    """Decay of the weights; coupled to the gradient except with adamw."""

    schedule: Literal["constant", "cosine"] = "cosine"
    """How the learning rate goes on after the warm-up: cosine falls to 0 at the last update."""

    warmup_steps: int = 0
    """Updates over which the learning rate rises linearly from 0."""

    scale_learning_rate: bool = False
    """Multiply the learning rate by the number of ranks (Goyal et al. 2017), for batch_size_per_rank."""

    def __post_init__(self) -> None:
        rate = self.learning_rate
        _check(math.isfinite(rate) and rate > 0, "optimizer.learning_rate", rate, "it must be finite and above 0")
        _check(0 <= self.momentum < 1, "optimizer.momentum", self.momentum, "it must be at least 0 and below 1")
        decay = self.weight_decay
        _check(math.isfinite(decay) and decay >= 0, "optimizer.weight_decay", decay, "it must be finite, not negative")
        _check(self.warmup_steps >= 0, "optimizer.warmup_steps", self.warmup_steps, "it must not be negative")


@dataclass(frozen=True)
class GradientSettings:
    """How the ranks' gradients become one."""

    reduction: Literal["sum", "adasum"] = "sum"
    """sum: the exact mean over the global batch; adasum: Maleki et al. 2020, for a power of two of ranks."""

    wire: Literal["full", "bf16", "fp16"] = "full"
    """The data type in which gradients are sent; they are added up in full. Halves the time on a slow network."""

    bucket_mib: float | None = None
    """MiB of gradients that are sent at once while the backward pass goes on; by default 25 on GPUs, and on CPUs, where
    no core is left to send them, all after it."""

    num_micro_batches: int = 1
    """In how many pieces a rank takes its part of a global batch through the model, to save memory; sent once."""

    def __post_init__(self) -> None:
        size = self.bucket_mib
        _check(size is None or size > 0, "gradient.bucket_mib", size, "it must be above 0")
        _check(
            self.num_micro_batches >= 1, "gradient.num_micro_batches", self.num_micro_batches, "it must be at least 1"
        )
        full = self.reduction == "sum" or self.wire == "full"
        _check(full, "gradient.wire", self.wire, "adasum sends gradients in full")


@dataclass(frozen=True)
class CheckpointSettings:
    """What a run leaves behind to go on from."""

    interval: int = 100
    """Updates between two checkpoints, beside the one after the last update; 0: none at all."""

    keep: int = 3
    """How many of the last checkpoints stay."""

    asynchronous: bool = True
    """Write from a thread while training goes on."""

    def __post_init__(self) -> None:
        _check(self.interval >= 0, "checkpoint.interval", self.interval, "it must not be negative")
        _check(self.keep >= 1, "checkpoint.keep", self.keep, "it must be at least 1")


@dataclass(frozen=True)
class ProofSettings:
    """How closely a run watches itself."""

    ledger: bool = False
    """Record which rank learned from which samples in which update; `app/verify.py` reads it."""

    sentinel_interval: int = 100
    """Updates between two comparisons of model, optimizer and learning rate over the ranks; 0: only at the end."""

    non_finite: Literal["stop", "skip"] = "stop"
    """What all ranks do with an update in which a loss or gradient is infinite or not a number on any rank."""

    deterministic: bool = False
    """Refuse operations that may give other bits in another run (GPUs; on CPUs all are deterministic)."""

    def __post_init__(self) -> None:
        _check(
            self.sentinel_interval >= 0, "proof.sentinel_interval", self.sentinel_interval, "it must not be negative"
        )


@dataclass(frozen=True)
class Settings:
    """One run. With no settings: the seed's network on the embedded digits, to 97 % or more."""

    run_dir: str | None = None
    """New folder for everything that the run leaves behind; by default runs/<date and time>."""

    seed: int = 0
    """The start of every random sequence: initial weights, order of samples, dropout."""

    num_epochs: int = 12
    """How often every sample is learned from."""

    precision: Literal["float32", "float64", "bf16"] = "float32"
    """The data type of parameters and arithmetic; bf16: parameters in float32, and layers that gain by it in bfloat16
    (torch.autocast)."""

    log_interval: int = 100
    """Updates between two log lines; each costs one reduction over the ranks."""

    evaluate_every: int = 1
    """Epochs between two evaluations on the held-out samples; 0: only after the last epoch."""

    data: DataSettings = field(default_factory=DataSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    gradient: GradientSettings = field(default_factory=GradientSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    proof: ProofSettings = field(default_factory=ProofSettings)

    def __post_init__(self) -> None:
        _check(self.run_dir != "", "run_dir", "empty", "leave it out, or name a new folder")
        _check(0 <= self.seed < 2**63, "seed", self.seed, "it must lie in 0 ... 2^63 - 1")
        _check(self.num_epochs >= 0, "num_epochs", self.num_epochs, "it must not be negative")
        _check(self.log_interval >= 1, "log_interval", self.log_interval, "it must be at least 1")
        _check(self.evaluate_every >= 0, "evaluate_every", self.evaluate_every, "it must not be negative")
        scaled = self.optimizer.scale_learning_rate
        _check(
            not scaled or self.data.batch_size_per_rank is not None,
            "optimizer.scale_learning_rate",
            scaled,
            "it goes with data.batch_size_per_rank, where the global batch grows with the number of ranks",
        )
