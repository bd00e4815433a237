"""How it learns, and how the ranks share the work."""

import math
from dataclasses import dataclass, field
from typing import Literal

from lockstep.settings.check import check


@dataclass(frozen=True)
class OptimizerSettings:
    """How the gradient becomes a step."""

    name: Literal["sgd", "adam", "adamw", "lars", "lamb"] = "sgd"
    """sgd, adam, adamw: from torch.optim; for large batches lars (You et al. 2017) and lamb (You et al. 2020)."""

    learning_rate: float = 0.05
    """The highest learning rate of the schedule."""

    momentum: float = 0.9
    """For sgd and lars."""

    weight_decay: float = 5e-4
    """Decay of the weights; coupled to the gradient except with adamw."""

    decay_vectors: bool = True
    """Apply the decay to biases and normalisations, too, and not to matrices and filters alone."""

    schedule: Literal["constant", "linear", "cosine", "step"] = "cosine"
    """How the learning rate goes on after the warm-up: linear and cosine fall to 0 at the last update; step falls by
    step_factor at each of step_at."""

    step_at: list[float] = field(default_factory=lambda: [0.5, 0.75])
    """step: the shares of the run after which the rate falls."""

    step_factor: float = 0.1
    """step: what it falls to, each time, of what it was."""

    average_decay: float | None = None
    """Keep a moving average of the weights, of which each update leaves this share (such as 0.99); it is evaluated and
    merged in place of the last weights."""

    warmup_steps: int = 0
    """Updates over which the learning rate rises linearly from 0."""

    scale_learning_rate: bool = False
    """Multiply the learning rate by the number of data shards, which are the ranks (of a pipeline: the replicas), for
    batch_size_per_rank (Goyal et al. 2017)."""

    def __post_init__(self) -> None:
        rate = self.learning_rate
        check(math.isfinite(rate) and rate > 0, "optimizer.learning_rate", rate, "it must be finite and above 0")
        check(0 <= self.momentum < 1, "optimizer.momentum", self.momentum, "it must be at least 0 and below 1")
        decay = self.weight_decay
        check(math.isfinite(decay) and decay >= 0, "optimizer.weight_decay", decay, "it must be finite, not negative")
        shares, factor, average = self.step_at, self.step_factor, self.average_decay
        fits = all(0 < share < 1 for share in shares) and shares == sorted(shares)
        check(fits, "optimizer.step_at", shares, "rising shares of the run, between 0 and 1, are needed")
        check(0 < factor <= 1, "optimizer.step_factor", factor, "it must be above 0 and at most 1")
        check(average is None or 0 < average < 1, "optimizer.average_decay", average, "it must lie between 0 and 1")
        check(self.warmup_steps >= 0, "optimizer.warmup_steps", self.warmup_steps, "it must not be negative")


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
        check(size is None or size > 0, "gradient.bucket_mib", size, "it must be above 0")
        check(
            self.num_micro_batches >= 1, "gradient.num_micro_batches", self.num_micro_batches, "it must be at least 1"
        )
        clip = self.clip_norm
        check(clip is None or clip > 0, "gradient.clip_norm", clip, "it must be above 0")
        full = self.reduction == "sum" or self.wire == "full"
        check(full, "gradient.wire", self.wire, "adasum sends gradients in full")


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
        check(stages is None or stages >= 1, "pipeline.num_stages", stages, "it must be at least 1")
