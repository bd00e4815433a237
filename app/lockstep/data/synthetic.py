"""Synthetic images for tests and speed measurements: a random pattern for each class, plus noise."""

import torch

from lockstep.data.image_set import ImageSet


def load_synthetic(num_samples: int, train: bool, num_classes: int = 10) -> ImageSet:
    """Generate (num_samples, 1, 28, 28) images; training and held-out images share the patterns of the classes."""
    patterns = torch.randint(0, 256, (num_classes, 1, 28, 28), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1 if train else 2)
    labels = torch.randint(0, num_classes, (num_samples,), generator=generator)
    noise = torch.randint(-128, 129, (num_samples, 1, 28, 28), generator=generator)
    images = (patterns[labels] + noise).clamp_(0, 255).to(torch.uint8)
    return ImageSet(images, labels, num_classes)
