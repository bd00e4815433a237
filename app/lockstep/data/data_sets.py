"""Load the data set that the settings name."""

import reprlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lockstep.data.augmentation import RESIZED, build_augmentation, build_centre
from lockstep.data.built_in import load_digits, load_synthetic
from lockstep.data.downloads import DOWNLOADS, download, load
from lockstep.data.image_set import ImageSet, LabelledImages
from lockstep.data.item_set import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ImageFiles,
    Items,
    ItemSet,
    WithoutLabels,
    image_and_label,
)
from lockstep.runtime.errors import DataError, SettingsError
from lockstep.runtime.importing import import_object
from lockstep.settings import DataSettings

HELD_OUT = ("val", "test", "valid")  # possible names of the held-out folder; the first that exists is used
FOLDER_SIZE = 224


def fetch(settings: DataSettings) -> None:
    """Download the data set if need be. One rank calls this while the others wait.

    Raises:
        DataError: the download fails.
    """
    if settings.name in DOWNLOADS:
        download(settings.name, Path(settings.root))


def load_images(settings: DataSettings, train: bool) -> LabelledImages:
    """Load the training images, or with `train` False the held-out ones.

    Raises:
        DataError: they are missing or damaged.
        SettingsError: there is no such data set.
    """
    if settings.name == "image_folder":
        return _load_folder(settings, train)
    if "." in settings.name:
        return _load_own(settings, train)
    if settings.name == "digits":
        images = load_digits(train)
    elif settings.name == "synthetic":
        images = load_synthetic(settings.num_samples, train)
    else:
        images = load(settings.name, Path(settings.root), train)
    return _prepared(images, settings, train)


def _prepared(images: ImageSet, settings: DataSettings, train: bool) -> ImageSet:
    """Apply the image size, augmentation and normalisation of `settings`."""
    pixels = images.images
    if settings.image_size is not None and images.shape[1:] != (settings.image_size, settings.image_size):
        from torchvision.transforms.v2.functional import resize

        pixels = resize(pixels, [settings.image_size, settings.image_size], antialias=True)
    mean, std = _normalisation(settings, images.mean, images.std, len(pixels[0]))
    _, _, height, width = pixels.shape
    transform = build_augmentation(settings.augmentation, (height, width)) if train else None
    return ImageSet(pixels, images.labels, images.num_classes, mean, std, transform)


def _normalisation(
    settings: DataSettings, mean: tuple[float, ...], std: tuple[float, ...], channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Resolve mean and std to either one value for all channels or one value for each, both alike."""
    mean, std = tuple(settings.mean or mean), tuple(settings.std or std)
    for name, values in (("mean", mean), ("std", std)):
        if len(values) not in (1, channels):
            raise SettingsError(f"data.{name} is {list(values)}, and the images have {channels} channel(s)")
    if len(mean) != len(std):
        mean, std = (values * channels if len(values) == 1 else values for values in (mean, std))
    return mean, std


def _load_folder(settings: DataSettings, train: bool) -> ItemSet:
    """Load `root`/train/CLASS/... or `root`/val/CLASS/..., the layout of ImageNet and of torchvision's ImageFolder."""
    from torchvision.datasets import ImageFolder

    root = Path(settings.root)
    held_out = next((name for name in HELD_OUT if (root / name).is_dir()), HELD_OUT[0])
    folder = root / ("train" if train else held_out)
    try:
        found = ImageFolder(str(folder))
        classes = ImageFolder(str(root / "train")).classes if not train else found.classes
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"{folder.absolute()} has no images ({error}): data.root, {settings.root}, must hold train/CLASS/*.jpg and "
            f"{HELD_OUT[0]}/CLASS/*.jpg, with a folder for each class, and must be visible to all nodes"
        ) from error
    if found.classes != classes:
        differ = sorted(set(found.classes) ^ set(classes))
        raise DataError(f"{folder} and {root / 'train'} have other classes: {', '.join(differ[:5])} in one only")
    return _items(settings, found, classes, 3, FOLDER_SIZE, train, partial(_path_in, found))


def _load_own(settings: DataSettings, train: bool) -> ItemSet:
    """Load a user's own data set by calling the named function or class with (root, train)."""
    make = import_object(settings.name, "data.name")
    try:
        samples = make(settings.root, train)
        if not (hasattr(samples, "__len__") and hasattr(samples, "__getitem__")):
            raise TypeError(f"it gave {type(samples).__name__} {reprlib.repr(samples)}")
        image, _ = image_and_label(samples[0])
        classes = _names_of_classes(samples)
    except Exception as error:  # whatever a user's data set raises
        raise DataError(
            f"data.name is {settings.name}: it must give a data set with len(), items (image, label), and classes "
            f"(their names) or num_classes: {type(error).__name__}: {error}"
        ) from error
    is_tensor = isinstance(image, torch.Tensor)
    channels = len(image) if is_tensor else 1 if image.mode in ("1", "L") else 3
    side = image.shape[-1] if is_tensor else image.width
    return _items(settings, samples, classes, channels, side, train, partial(_number_in, settings.name))


def load_unlabelled(settings: DataSettings, samples: Any, like: LabelledImages, name: str) -> ItemSet:
    """Prepare images without labels as those of `like`.

    Args:
        samples: a map-style data set of PIL images or uint8 tensors (channels, height, width); labels are ignored.
        name: of the data set, for messages.
    """
    channels, *size = like.shape
    centre = build_centre((size[0], size[1]), _enlarged(settings))
    describe = samples.describe if isinstance(samples, ImageFiles) else partial(_number_in, name)
    items = Items(WithoutLabels(samples), None, centre, channels, describe)
    return ItemSet(items, like.shape, like.classes, settings.num_workers, like.mean, like.std)


def image_files(folder: Path) -> ImageFiles:
    """Find all image files in `folder`, at any depth, in the order of their paths.

    Raises:
        DataError: there are none.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS

    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS and path.is_file())
    if not found:
        raise DataError(f"{folder.absolute()} has no image files ({', '.join(IMG_EXTENSIONS)})")
    return ImageFiles(folder, [path.relative_to(folder).as_posix() for path in found])


def _names_of_classes(samples: Any) -> list[str]:
    """Read the names of the classes from a data set: its own, Hugging Face's, or numbers."""
    if classes := getattr(samples, "classes", None):
        return list(classes)
    if features := getattr(samples, "features", None):
        return list(features["label" if "label" in features else "labels"].names)
    return [str(index) for index in range(samples.num_classes)]


def _path_in(folder: Any, number: int) -> str:
    return str(folder.samples[number][0])


def _number_in(name: str, number: int) -> str:
    return f"sample {number} of {name}"


def _items(
    settings: DataSettings,
    samples: Any,
    classes: Sequence[str],
    channels: int,
    side: int,
    train: bool,
    describe: Callable[[int], str],
) -> ItemSet:
    side = settings.image_size or side
    usual = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else ((0.5,), (0.5,))
    mean, std = _normalisation(settings, usual[0], usual[1], channels)
    augment = build_augmentation(settings.augmentation, (side, side)) if train else None
    items = Items(samples, augment, build_centre((side, side), _enlarged(settings)), channels, describe)
    return ItemSet(items, (channels, side, side), list(classes), settings.num_workers, mean, std)


def _enlarged(settings: DataSettings) -> float:
    return RESIZED if settings.name == "image_folder" else 1.0
