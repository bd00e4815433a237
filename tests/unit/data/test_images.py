"""Image pipelines: augmentation, mixup, folders of images, a user's own data set."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets import CIFAR10

from lockstep.data.batch import DataBatch
from lockstep.data.data_sets import image_files, load_images, load_unlabelled
from lockstep.data.image_set import ImageSet, LabelledImages
from lockstep.data.item_set import ItemSet
from lockstep.data.loader import BatchLoader, partners_of, with_partners
from lockstep.models.classifier import classifier_blocks
from lockstep.runtime.errors import DataError, SettingsError
from lockstep.settings import DataSettings, ModelSettings

F64 = torch.float64


def _loader(images: LabelledImages, shard: int, num_shards: int, mixup: float = 0.0) -> BatchLoader:
    return BatchLoader(images, 6, "hash", shard, num_shards, seed=3, dtype=F64, mixup=mixup)


def _by_id(batches: list[DataBatch]) -> dict[int, Tensor]:
    return {number: batch.inputs[row] for batch in batches for row, number in enumerate(batch.ids.tolist())}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write two classes of 8 + 3 images of several sizes; the brightness identifies an image."""
    for part, count in (("train", 8), ("val", 3)):
        for label, name in enumerate(("dark", "light")):
            (tmp_path / part / name).mkdir(parents=True)
            for index in range(count):
                pixels = np.full((20 + index, 24, 3), 40 + 150 * label + index, dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{index}.png")
    return tmp_path


@pytest.mark.parametrize("augmentation", ["shift", "crop_flip", "resized_crop"])
@pytest.mark.parametrize("mixup", [0.0, 0.4])
def test_an_image_is_changed_in_the_same_way_on_any_number_of_shards(
    augmentation: Literal["shift", "crop_flip", "resized_crop"], mixup: float
) -> None:
    images = load_images(DataSettings(name="synthetic", num_samples=15, augmentation=augmentation), train=True)
    alone = _loader(images, 0, 1, mixup)
    epochs = [list(alone.rest_of_epoch()) for _ in range(2)]
    expected = [_by_id(batches) for batches in epochs]
    assert any(not torch.equal(expected[0][number], expected[1][number]) for number in range(15))
    for shard in range(3):
        loader = _loader(images, shard, 3, mixup)
        for epoch in range(2):
            for number, image in _by_id(list(loader.rest_of_epoch())).items():
                assert torch.equal(image, expected[epoch][number])


def test_held_out_images_are_not_changed() -> None:
    settings = DataSettings(name="synthetic", num_samples=4, augmentation="crop_flip")
    ids = [np.arange(4)]
    held_out = next(load_images(settings, train=False).batches(ids, F64, seed=(0, 0)))[0]
    plain = next(load_images(DataSettings(name="synthetic", num_samples=4), train=False).batches(ids, F64))[0]
    assert torch.equal(held_out, plain)


def test_an_image_is_mixed_with_the_next_of_the_global_batch() -> None:
    images = load_images(DataSettings(name="synthetic", num_samples=6), train=True)
    plain, mixed = (
        next(BatchLoader(images, 6, "contiguous", 0, 1, 3, F64, mixup).rest_of_epoch()) for mixup in (0.0, 1.0)
    )
    assert 0 < mixed.data[3] < 1
    assert torch.equal(mixed.data[1], plain.data[1])
    assert torch.equal(mixed.data[2], plain.data[1].roll(-1))
    expected = mixed.data[3] * plain.inputs + (1 - mixed.data[3]) * plain.inputs.roll(-1, 0)
    torch.testing.assert_close(mixed.inputs, expected, rtol=1e-12, atol=1e-12)


def test_a_shard_fetches_only_the_partners_that_it_has_not() -> None:
    whole = np.array([5, 2, 9, 7])
    assert partners_of(np.array([2, 7]), whole).tolist() == [9, 5]
    assert with_partners(np.array([5, 2]), whole).tolist() == [5, 2, 9]
    assert with_partners(whole, whole).tolist() == whole.tolist()
    assert with_partners(whole[:0], whole).tolist() == []


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_folder_is_read_with_and_without_workers(folder: Path, num_workers: int) -> None:
    settings = DataSettings(
        name="image_folder", root=str(folder), image_size=16, augmentation="resized_crop", num_workers=num_workers
    )
    images = load_images(settings, train=True)
    assert (images.classes, images.shape, len(images)) == (["dark", "light"], (3, 16, 16), 16)
    loader = _loader(images, 0, 1)
    for _ in range(2):
        batches = list(loader.rest_of_epoch())
        assert sorted(number for batch in batches for number in batch.ids.tolist()) == list(range(16))
        for batch in batches:
            assert batch.inputs.shape == (len(batch.ids), 3, 16, 16)
            assert batch.data[1].tolist() == [int(number >= 8) for number in batch.ids.tolist()]
            brightness = batch.inputs.mean((1, 2, 3))  # one colour, so that every crop has the same mean
            pixels = torch.tensor([40 + 142 * int(number >= 8) + number for number in batch.ids.tolist()])
            expected = (pixels / 255 - 0.449) / 0.226  # of the means and deviations of three channels
            torch.testing.assert_close(brightness, expected.double(), rtol=0.02, atol=0.02)
    held_out = load_images(settings, train=False)
    assert len(held_out) == 6
    assert held_out.pictures(np.array([0, 5]))[:, 0, 0, 0].tolist() == [40, 192]


def test_from_the_middle_of_an_epoch_a_folder_goes_on_where_it_was(folder: Path) -> None:
    settings = DataSettings(name="image_folder", root=str(folder), image_size=16, augmentation="resized_crop")
    images = load_images(settings, train=True)
    whole = list(_loader(images, 0, 2).rest_of_epoch())
    later = _loader(images, 0, 2)
    later.consumed = 6
    rest = list(later.rest_of_epoch())
    assert [batch.index for batch in rest] == [1, 2]
    assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(rest, whole[1:], strict=True))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_broken_file_is_named(folder: Path, num_workers: int) -> None:
    broken = folder / "train" / "light" / "3.png"
    broken.write_bytes(b"no picture")
    settings = DataSettings(name="image_folder", root=str(folder), image_size=16, num_workers=num_workers)
    with pytest.raises(DataError, match=r"light/3\.png cannot be used \(UnidentifiedImageError") as caught:
        list(_loader(load_images(settings, train=True), 0, 1).rest_of_epoch())
    assert "Traceback" not in str(caught.value)


def test_missing_folders_and_other_classes_are_told(folder: Path) -> None:
    with pytest.raises(DataError, match=r"must hold train/CLASS"):
        load_images(DataSettings(name="image_folder", root=str(folder / "nowhere")), train=True)
    (folder / "val" / "dark").rename(folder / "val" / "dusk")
    with pytest.raises(DataError, match="other classes: dark, dusk"):
        load_images(DataSettings(name="image_folder", root=str(folder)), train=False)


class _Own:
    num_classes = 3

    def __init__(self, root: str, train: bool) -> None:
        self.root, self.train = root, train

    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return Image.new("L", (12, 12), 10 * index), index % self.num_classes


@pytest.fixture
def own() -> Iterator[ModuleType]:
    module = ModuleType("my_own_data")
    module.Own = _Own  # type: ignore[attr-defined]
    sys.modules["my_own_data"] = module
    yield module
    del sys.modules["my_own_data"]


def test_a_data_set_of_ones_own(own: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    images = load_images(DataSettings(name="my_own_data.Own", mean=[0.0], std=[1.0]), train=True)
    assert isinstance(images, ItemSet)
    assert (images.classes, images.shape, len(images)) == (["0", "1", "2"], (1, 12, 12), 7)
    inputs, labels = next(images.batches([np.array([6, 1])], F64))
    assert labels.tolist() == [0, 1]
    assert (inputs[:, 0, 0, 0] * 255).round().tolist() == [60, 10]
    monkeypatch.setattr(own, "Own", lambda *_: [])
    with pytest.raises(DataError, match="it must give a data set"):
        load_images(DataSettings(name="my_own_data.Own"), train=True)
    too_many = {"num_classes": 2, "__getitem__": lambda _, index: (Image.new("L", (12, 12)), index)}
    monkeypatch.setattr(own, "Own", type("TooMany", (_Own,), too_many))
    with pytest.raises(DataError, match=r"a label is .*: they must lie in 0 \.\.\. 1"):
        list(load_images(DataSettings(name="my_own_data.Own"), train=True).batches([np.arange(4)], F64))


def test_a_data_set_of_hugging_faces_form(own: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Items are dictionaries, and the names of the classes are those of a feature."""

    class Features:
        names = ("cat", "dog", "eel")

    class Faces(_Own):
        features = {"img": None, "label": Features}  # noqa: RUF012

        def __getitem__(self, index: int) -> Any:
            image, label = super().__getitem__(index)
            return {"img": image, "label": label}

    monkeypatch.setattr(own, "Own", Faces)
    images = load_images(DataSettings(name="my_own_data.Own", mean=[0.0], std=[1.0]), train=True)
    assert (list(images.classes), images.shape, len(images)) == (["cat", "dog", "eel"], (1, 12, 12), 7)
    inputs, labels = next(images.batches([np.array([6, 1])], F64))
    assert labels.tolist() == [0, 1]
    assert (inputs[:, 0, 0, 0] * 255).round().tolist() == [60, 10]


def test_cifar_is_read_from_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files in the real format; only torchvision's checks of their content are disabled."""
    import pickle

    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    base = tmp_path / CIFAR10.base_folder
    base.mkdir()
    generator = np.random.default_rng(0)
    for file, _ in CIFAR10.train_list + CIFAR10.test_list:
        pixels = generator.integers(0, 256, (4, 3072), dtype=np.uint8)
        (base / file).write_bytes(pickle.dumps({"data": pixels, "labels": [0, 9, 3, 1]}))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(index) for index in range(10)]}))
    images = load_images(DataSettings(name="cifar10", root=str(tmp_path)), train=True)
    assert (images.shape, len(images), len(images.classes)) == ((3, 32, 32), 20, 10)
    inputs, labels = next(images.batches([np.arange(4)], F64))
    assert labels.tolist() == [0, 9, 3, 1]
    first = np.random.default_rng(0).integers(0, 256, (4, 3072), dtype=np.uint8).reshape(4, 3, 32, 32)
    expected = (first[2, 1, 5, 7] / 255 - 0.4822) / 0.2435
    assert float(inputs[2, 1, 5, 7]) == pytest.approx(expected, rel=1e-12)


def test_images_are_resized_where_asked() -> None:
    assert load_images(DataSettings(image_size=14), train=True).shape == (1, 14, 14)


def _network(name: str, shape: tuple[int, int, int], **options: Any) -> torch.nn.Sequential:
    blocks = classifier_blocks(ModelSettings(name=name, options=options), shape, num_classes=7)
    return torch.nn.Sequential(*(block for _, block in blocks)).eval()


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("net", (3, 20, 32)),
        ("vit", (3, 14, 14)),
        ("resnet18", (1, 28, 28)),
        ("resnet50", (3, 32, 32)),
        ("mobilenet_v3_small", (1, 32, 32)),
        ("googlenet", (3, 64, 64)),
    ],
)
def test_every_network_gives_log_probabilities(name: str, shape: tuple[int, int, int]) -> None:
    output = _network(name, shape)(torch.rand(2, *shape))
    assert output.shape == (2, 7)
    assert output.exp().sum(1).tolist() == pytest.approx([1, 1], rel=1e-5)


def test_a_resnet_in_blocks_is_torchvisions() -> None:
    from torchvision.models import resnet18

    torch.manual_seed(0)
    expected = resnet18(num_classes=7).eval()
    torch.manual_seed(0)
    blocks = _network("resnet18", (3, 32, 32))
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(blocks(images), expected(images).log_softmax(1))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("resnet81", (3, 32, 32), "there is no such network: net, vit, resnet18"),
        ("vit", (1, 30, 30), "30, must be a multiple"),
        ("net", (1, 5, 5), "6 x 6 or more"),
        ("no_such_package.Net", (1, 5, 5), "needs the module no_such_package"),
    ],
)
def test_a_network_that_does_not_fit_is_told(name: str, shape: tuple[int, int, int], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        list(classifier_blocks(ModelSettings(name=name), shape, 10))


def test_an_image_of_the_right_size_is_left_alone_and_means_and_deviations_fit_the_channels(own: ModuleType) -> None:
    assert own
    plain = load_images(DataSettings(name="my_own_data.Own", mean=[0.0], std=[1.0]), train=False)
    assert isinstance(plain, ItemSet)
    gradient = torch.arange(144, dtype=torch.uint8).view(1, 12, 12)
    plain.items.samples = [(gradient, 0)]
    assert torch.equal(plain.pictures(np.array([0]))[0], gradient)
    with pytest.raises(SettingsError, match="the images have 1 channel"):
        load_images(DataSettings(mean=[0.1, 0.2, 0.3]), train=True)


def test_one_mean_goes_with_deviations_by_channel(folder: Path) -> None:
    settings = DataSettings(name="image_folder", root=str(folder), image_size=16, mean=[0.5], std=[0.25, 0.5, 1.0])
    image = next(load_images(settings, train=False).batches([np.array([0])], F64))[0][0, :, 0, 0]
    expected = (40 / 255 - 0.5) / torch.tensor([0.25, 0.5, 1.0], dtype=F64)
    torch.testing.assert_close(image, expected, rtol=1e-12, atol=1e-12)


def test_images_without_labels_are_prepared_as_those_with(tmp_path: Path) -> None:
    """Files at any depth, in the order of their paths, whatever their size and colours; PIL's images or tensors."""
    pixels = torch.randint(256, (4, 1, 6, 6), dtype=torch.uint8)
    like = ImageSet(pixels, torch.arange(4), 4, (0.3,), (0.7,))
    (expected, _) = next(like.batches([np.arange(4)], torch.float64))
    for number, name in enumerate(("b/0.png", "a.PNG", "b/c/d.bmp", "notes.txt")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[number, 0].numpy()).save(tmp_path / name, format="png")
    files = image_files(tmp_path)
    assert files.names == ["a.PNG", "b/0.png", "b/c/d.bmp"]
    labelled = [*zip(pixels, range(4), strict=True)]
    for samples, order in ((files, [1, 0, 2]), (pixels, [0, 1, 2, 3]), (labelled, [0, 1, 2, 3])):
        found = load_unlabelled(DataSettings(), samples, like, "photos")
        images, _ = next(found.batches([np.arange(len(order))], torch.float64))
        assert torch.equal(images, expected[order])

    Image.new("RGB", (12, 12), (7, 8, 9)).save(tmp_path / "b" / "0.png")
    (tmp_path / "a.PNG").write_bytes(b"no picture")
    found = load_unlabelled(DataSettings(), image_files(tmp_path), like, "photos")
    assert next(found.batches([np.array([1])], torch.float32))[0].shape == (1, 1, 6, 6)
    with pytest.raises(DataError, match=r"a\.PNG cannot be used"):
        next(found.batches([np.array([0])], torch.float32))
    with pytest.raises(DataError, match="has no image files"):
        image_files(tmp_path / "nowhere")
