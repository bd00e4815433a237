"""Settings of the optimizer, of gradients and of the pipeline."""

import math
from dataclasses import dataclass, field
from typing import Literal

from lockstep.runtime.errors import check


@dataclass(frozen=True)
class OptimizerSettings:
    """The optimizer and its schedule."""

    name: Literal["sgd", "adam", "adamw", "lars", "lamb"] = "sgd"
    """sgd, adam, adamw: from torch.optim; lars (You et al. 2017), lamb (You et al. 2020): for large batches."""

    learning_rate: float = 0.05
    """Peak learning rate of the schedule."""

    momentum: float = 0.9
    """Momentum of sgd and lars."""

    weight_decay: float = 5e-4
    """Weight decay: adamw decouples it from the gradient, lamb adds it to the update, others to the gradient."""

    decay_vectors: bool = True
    """Apply weight decay to biases and normalisation layers as well; false: only to matrices and filters."""

    freeze: list[str] = field(default_factory=list)
    """Patterns of parameters that do not learn, as in a shell, over the names in model.safetensors:
    '["network.stem.*"]'."""

    groups: dict[str, dict[str, float]] = field(default_factory=dict)
    """Parameters with a learning rate or weight decay of their own, by patterns:
    '{"network.stem.*": {learning_rate_factor: 0.1, weight_decay: 0}}'. Of several that match, the first counts."""

    schedule: Literal["constant", "linear", "cosine", "step"] = "cosine"
    """Learning rate after the warm-up: linear and cosine fall to 0 at the last update; step is multiplied by
    step_factor at each of step_at."""

    step_at: list[float] = field(default_factory=lambda: [0.5, 0.75])
    """step: shares of the run, in 0 ... 1, after which the learning rate falls."""

    step_factor: float = 0.1
    """step: factor by which the learning rate is multiplied each time."""

    average_decay: float | None = None
    """Decay of a moving average of the weights, such as 0.99; the average is evaluated and merged in place of the last
    weights. By default there is none."""

    warmup_steps: int = 0
    """Number of first updates over which the learning rate rises linearly from 0."""

    scale_learning_rate: bool = False
    """Multiply the learning rate by the number of ranks (in a pipeline: of replicas), for use with batch_size_per_rank
    (Goyal et al. 2017)."""

    def __post_init__(self) -> None:
        rate = self.learning_rate
        check(math.isfinite(rate) and rate > 0, "optimizer.learning_rate", rate, "it must be finite and above 0")
        check(0 <= self.momentum < 1, "optimizer.momentum", self.momentum, "it must be at least 0 and below 1")
        decay = self.weight_decay
        check(math.isfinite(decay) and decay >= 0, "optimizer.weight_decay", decay, "it must be finite, not negative")
        for pattern, own in self.groups.items():
            name = f"optimizer.groups of {pattern}"
            check(
                own.keys() <= {"learning_rate_factor", "weight_decay"},
                name,
                own,
                "it can have these two: learning_rate_factor, weight_decay",
            )
            times, own_decay = own.get("learning_rate_factor", 1.0), own.get("weight_decay", 0.0)
            check(math.isfinite(times) and times > 0, name, own, "the factor must be finite and above 0 (0: freeze)")
            check(math.isfinite(own_decay) and own_decay >= 0, name, own, "the decay must be finite, not negative")
        shares, factor, average = self.step_at, self.step_factor, self.average_decay
        fits = all(0 < share < 1 for share in shares) and shares == sorted(shares)
        check(fits, "optimizer.step_at", shares, "rising shares of the run, between 0 and 1, are needed")
        check(0 < factor <= 1, "optimizer.step_factor", factor, "it must be above 0 and at most 1")
        check(average is None or 0 < average < 1, "optimizer.average_decay", average, "it must lie between 0 and 1")
        check(self.warmup_steps >= 0, "optimizer.warmup_steps", self.warmup_steps, "it must not be negative")


@dataclass(frozen=True)
class GradientSettings:
    """The reduction of gradients over the ranks."""

    reduction: Literal["sum", "adasum"] = "sum"
    """sum: the exact mean over the global batch; adasum: Maleki et al. 2020, on 1, 2, 4, 8 ... ranks."""

    wire: Literal["full", "bf16", "fp16"] = "full"
    """Data type in which gradients are sent; bf16 and fp16 halve the time on a slow network. Sums are computed in the
    parameters' data type."""

    bucket_mib: float | None = None
    """Size in MiB of gradient buckets that are sent during the backward pass; by default 25 on GPUs, and on CPUs, where
    no core is idle to send them, one bucket after it."""

    num_micro_batches: int = 1
    """Number of micro-batches into which a rank splits its samples, to save memory or to fill a pipeline. Gradients are
    sent once an update, with zero2 and zero3 after each micro-batch."""

    clip_norm: float | None = None
    """Clip the norm of the gradient over the whole model to this value; by default it is not clipped."""

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
    """Stages and schedule of `parallel: pipeline`."""

    num_stages: int | None = None
    """Number of stages, by default one for each rank; with a multiple of as many ranks there are replicas."""

    schedule: Literal["1f1b", "gpipe"] = "1f1b"
    """Order of forward and backward passes: 1f1b keeps fewer activations than gpipe."""

    cuts: list[str] | None = None
    """Names of the first block of every stage but the first; by default stages are balanced by measured cost."""

    def __post_init__(self) -> None:
        stages = self.num_stages
        check(stages is None or stages >= 1, "pipeline.num_stages", stages, "it must be at least 1")
