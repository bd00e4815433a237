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
    """The other way to say it: the global batch is this times the number of data shards, which are the ranks (of a
    pipeline: the replicas), and batch_size is ignored."""

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
class VitSettings:
    """The vision transformer's size: about 12 times depth times the square of width parameters."""

    width: int = 128
    """Numbers in a token."""

    depth: int = 4
    """Layers."""

    num_heads: int = 4
    """Heads of attention in each layer."""

    patch_size: int = 7
    """Side of the patches, in pixels, that an image is cut into; 28 must be a multiple of it."""

    dropout: float = 0.0
    """Probability of dropping a unit within the layers."""

    def __post_init__(self) -> None:
        for name in ("width", "depth", "num_heads", "patch_size"):
            _check(getattr(self, name) >= 1, f"model.vit.{name}", getattr(self, name), "it must be at least 1")
        _check(self.width % self.num_heads == 0, "model.vit.width", self.width, "it must be a multiple of num_heads")
        _check(
            28 % self.patch_size == 0, "model.vit.patch_size", self.patch_size, "the images' side, 28, is no multiple"
        )
        _check(0 <= self.dropout < 1, "model.vit.dropout", self.dropout, "a probability below 1 is needed")


@dataclass(frozen=True)
class ModelSettings:
    """What learns."""

    name: Literal["net", "vit"] = "net"
    """net: the seed's convolutional network; vit: a vision transformer of any size (Dosovitskiy et al. 2021)."""

    dropout1: float = 0.25
    """net: probability of dropping a channel after the convolutions."""

    dropout2: float = 0.5
    """net: probability of dropping a unit after the first linear layer."""

    vit: VitSettings = field(default_factory=VitSettings)

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

    decay_vectors: bool = True
    """Apply the decay to biases and normalisations, too, and not to matrices and filters alone."""

    schedule: Literal["constant", "cosine"] = "cosine"
    """How the learning rate goes on after the warm-up: cosine falls to 0 at the last update."""

    warmup_steps: int = 0
    """Updates over which the learning rate rises linearly from 0."""

    scale_learning_rate: bool = False
    """Multiply the learning rate by the number of data shards, which are the ranks (of a pipeline: the replicas), for
    batch_size_per_rank (Goyal et al. 2017)."""

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
    """In how many pieces a rank takes its part of a global batch through the model, to save memory; a pipeline is kept
    full by them. Gradients are sent once, but with zero2, zero3 after each."""

    clip_norm: float | None = None
    """The largest norm of the gradient, over the whole model, that an optimizer step is taken along as it is; a larger
    one is scaled down to it."""

    def __post_init__(self) -> None:
        size = self.bucket_mib
        _check(size is None or size > 0, "gradient.bucket_mib", size, "it must be above 0")
        _check(
            self.num_micro_batches >= 1, "gradient.num_micro_batches", self.num_micro_batches, "it must be at least 1"
        )
        clip = self.clip_norm
        _check(clip is None or clip > 0, "gradient.clip_norm", clip, "it must be above 0")
        full = self.reduction == "sum" or self.wire == "full"
        _check(full, "gradient.wire", self.wire, "adasum sends gradients in full")


@dataclass(frozen=True)
class PipelineSettings:
    """How a model is cut into stages, with `parallel: pipeline`."""

    num_stages: int | None = None
    """Stages of the model; the ranks must be a multiple of it, and make up replicas. By default as many as ranks."""

    schedule: Literal["1f1b", "gpipe"] = "1f1b"
    """The order of forward and backward passes: 1f1b keeps fewer activations; gpipe is the reference."""

    cuts: list[str] | None = None
    """The first block of every stage but the first, by name; by default they are cut by measured cost."""

    def __post_init__(self) -> None:
        stages = self.num_stages
        _check(stages is None or stages >= 1, "pipeline.num_stages", stages, "it must be at least 1")


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

    parallel: Literal["replicated", "zero1", "zero2", "zero3", "pipeline"] = "replicated"
    """Where the model lives. replicated: whole, on every rank; zero1, zero2, zero3: the optimizer's state, and the
    gradients, and the parameters in parts (Rajbhandari et al. 2020); pipeline: block by block, in stages."""

    data: DataSettings = field(default_factory=DataSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    gradient: GradientSettings = field(default_factory=GradientSettings)
    pipeline: PipelineSettings = field(default_factory=PipelineSettings)
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
        self._check_parallel()

    def _check_parallel(self) -> None:
        gradient, how = self.gradient, self.parallel
        _check(
            not self.model.compile or how in ("replicated", "zero1"),
            "model.compile",
            True,
            f"it does not go with {how}",
        )
        for name, value, usual in (("reduction", gradient.reduction, "sum"), ("wire", gradient.wire, "full")):
            fits = value == usual or how == "replicated" or (how == "pipeline" and name == "wire")
            _check(fits, f"gradient.{name}", value, f"it does not go with {how}")
        _check(
            gradient.bucket_mib is None or not how.startswith("zero"),
            "gradient.bucket_mib",
            gradient.bucket_mib,
            f"{how} sends gradients block by block",
        )
