"""Settings of the training data."""

import math
from dataclasses import dataclass
from typing import Literal

from lockstep.runtime.errors import check

Augmentation = Literal["none", "shift", "crop_flip", "resized_crop"]
NAMES = ("digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "image_folder", "synthetic", "vorticity")


@dataclass(frozen=True)
class DataSettings:
    """The training data and its division over the ranks."""

    name: str = "digits"
    """digits: 5,000 real digits, included; mnist, fashion_mnist, cifar10, cifar100: downloaded once; image_folder:
    train/CLASS/*.jpg and val/CLASS/*.jpg in root, as ImageNet; synthetic: random images for speed tests; vorticity: for
    regress; or the name of a data set of your own, my_package.my_data."""

    root: str = "data"
    """Folder of the data; on a cluster, one that all nodes share."""

    image_size: int | None = None
    """Side in pixels to which images are resized; by default they keep their own, for image_folder 224."""

    augmentation: Augmentation = "none"
    """Augmentation of training images. shift: moved by up to an eighth of their side; crop_flip: also flipped left to
    right, as is usual for CIFAR; resized_crop: a random part, flipped, as is usual for ImageNet."""

    mean: list[float] | None = None
    """Mean that is subtracted from pixels in 0 ... 1, one for each channel or one for all; by default the usual one."""

    std: list[float] | None = None
    """Standard deviation that pixels are then divided by, one for each channel or one for all."""

    num_workers: int = 0
    """Worker processes of each rank that read image_folder or a data set of your own ahead; 0: the rank reads."""

    label_smoothing: float = 0.0
    """Share of the target probability that is spread evenly over all classes (Szegedy et al. 2016)."""

    mixup: float = 0.0
    """Alpha: each image is mixed with the next one of the global batch, with a weight from Beta(alpha, alpha) (Zhang et
    al. 2018); 0: no mixup."""

    batch_size: int = 64
    """Samples in one *global* batch, which is divided over all ranks."""

    batch_size_per_rank: int | None = None
    """Samples of each rank in a batch (in a pipeline: of each replica); if set, the global batch is this times their
    number, and batch_size is ignored."""

    sharding: Literal["contiguous", "random", "hash"] = "contiguous"
    """How the samples of a global batch are assigned to the ranks."""

    held_out_share: float = 0.2
    """Share of the samples of a task of your own that is held out, chosen by hash, if it has no such data."""

    num_samples: int = 4096
    """Samples of the synthetic data set."""

    def __post_init__(self) -> None:
        check(self.batch_size >= 1, "data.batch_size", self.batch_size, "it must be at least 1")
        per_rank = self.batch_size_per_rank
        check(per_rank is None or per_rank >= 1, "data.batch_size_per_rank", per_rank, "it must be at least 1")
        known = self.name in NAMES or "." in self.name
        check(known, "data.name", self.name, f"{', '.join(NAMES)}, or a data set of your own, my_package.my_data")
        share = self.held_out_share
        check(0 < share < 1, "data.held_out_share", share, "it must lie between 0 and 1")
        size, workers = self.image_size, self.num_workers
        check(size is None or size >= 1, "data.image_size", size, "it must be at least 1")
        check(workers >= 0, "data.num_workers", workers, "it must not be negative")
        smoothing = self.label_smoothing
        check(0 <= smoothing < 1, "data.label_smoothing", smoothing, "it must be at least 0 and below 1")
        check(
            math.isfinite(self.mixup) and self.mixup >= 0, "data.mixup", self.mixup, "it must be finite, not negative"
        )
        for name in ("mean", "std"):
            value = getattr(self, name)
            check(value is None or len(value) in (1, 3), f"data.{name}", value, "one number, or one for each channel")
        check(self.std is None or min(self.std) > 0, "data.std", self.std, "it must be above 0")
        check(self.num_samples >= 1, "data.num_samples", self.num_samples, "it must be at least 1")

    def global_batch_size(self, num_ranks: int) -> int:
        return self.batch_size if self.batch_size_per_rank is None else self.batch_size_per_rank * num_ranks
