"""A task of one's own after its training: predictions, each sample once, in order, in one file; export; pictures."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from lockstep.data.built_in import load_synthetic
from tests.launching import Finished, launch

MY_TASK = '''
"""Two inputs; the network passes on the number of each sample, which is the first column of `left`."""
import torch
from torch import nn
from lockstep import SupervisedTask
from lockstep.tasks.pictures import Pictures

class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.last = nn.Linear(6, 16), nn.Linear(3, 16), nn.Linear(16, 2)

    def forward(self, left, right):
        hidden = torch.tanh(self.left(left.sin()) + self.right(right))
        return {"sums": (self.last(hidden), hidden[:, :3]), "number": left[:, 0].clone()}

def inputs_of(num_samples, seed):
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(num_samples, 6, generator=generator, dtype=torch.float64)
    left[:, 0] = torch.arange(num_samples)
    return left, torch.randn(num_samples, 3, generator=generator, dtype=torch.float64)

class MyTask(SupervisedTask):
    def data_set(self, train):
        left, right = inputs_of(90, int(train))
        return {"left": left, "right": right, "target": left[:, 1:3] * right[:, :2]}

    def network(self):
        return Network()

    def inputs(self, batch):
        return batch["left"], batch["right"]

    def predict_inputs(self, batch):
        return batch if isinstance(batch, tuple | list) else super().predict_inputs(batch)

    def pictures(self, model):
        batch = next(self.held_out_batches())
        sums, hidden = self.outputs(model, batch.inputs)["sums"]
        return Pictures("sums", "Sums of the held-out samples", [sums.numpy(), hidden.numpy()], ["sums", "hidden"], 2)

    def loss(self, outputs, batch):
        return (outputs["sums"][0] - batch["target"]).square().sum(), batch["target"].numel()

class Items:
    """Read on demand."""
    def __init__(self, root):
        self.left, self.right = inputs_of(int(root), 5)

    def __len__(self):
        return len(self.left)

    def __getitem__(self, index):
        return self.left[index], self.right[index]

def tensors(root):
    return inputs_of(int(root), 5)

class Broken(Items):
    def __getitem__(self, index):
        if index == 20:
            raise KeyError("no number twenty")
        return super().__getitem__(index)

def one_input(root):
    return torch.zeros(7, 4)

class Uneven(MyTask):
    def predictions(self, outputs):
        return outputs["sums"][0].repeat(1, 2 if 20 in outputs["number"] else 1)
'''
PLAIN = """
import lockstep, my_task, torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader
model = lockstep.load_model("run")
with torch.no_grad():
    found = [model(left, right) for left, right in DataLoader(my_task.Items("37"), batch_size=5)]
plain = {f"sums.{place}": torch.cat([each["sums"][place] for each in found]) for place in (0, 1)}
save_file(plain, "plain.safetensors")
"""
TRAIN = "lockstep train --num_epochs 1 --loggers none --quiet true --run_dir run"
IMAGES = "--data.name synthetic --data.num_samples 64 --data.batch_size 16"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with my_task.py and a finished run of it."""
    folder = tmp_path_factory.mktemp("predict")
    (folder / "my_task.py").write_text(MY_TASK)
    finished = launch(f"{TRAIN} --task my_task.MyTask --precision float64 --data.batch_size 24", cwd=folder)
    assert finished.returncode == 0, finished.output
    return folder


@pytest.fixture(scope="module")
def classified(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run of image classification."""
    folder = tmp_path_factory.mktemp("classified")
    finished = launch(f"{TRAIN} {IMAGES}", cwd=folder)
    assert finished.returncode == 0, finished.output
    return folder


def _predict(folder: Path, arguments: str, num_ranks: int = 2) -> dict[str, Tensor]:
    finished = launch(f"mpirun -np {num_ranks} lockstep predict run {arguments}", cwd=folder)
    assert finished.returncode == 0, finished.output
    (path,) = re.findall(r"^Predicted \d+ \w+: (\S+), [\d,]+ bytes$", finished.stdout, flags=re.MULTILINE)
    return dict(load_file(folder / path))


def _metadata(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        return {name: value if name == "format" else json.loads(value) for name, value in file.metadata().items()}


@pytest.mark.parametrize(
    ("num_ranks", "data"),
    [
        pytest.param(1, "tensors", marks=pytest.mark.thorough),
        pytest.param(2, "Items", marks=pytest.mark.thorough),
        (3, "Items"),
        pytest.param(4, "tensors", marks=pytest.mark.thorough),
    ],
)
def test_the_rows_are_those_of_a_plain_loop_on_any_number_of_ranks(num_ranks: int, data: str, trained: Path) -> None:
    """37 samples: on three ranks two batches each, on four one, of unequal sizes."""
    if not (trained / "plain.safetensors").exists():
        (trained / "plain.py").write_text(PLAIN)
        assert launch("python plain.py", cwd=trained).returncode == 0
    found = _predict(trained, f"--data my_task.{data} --root 37 --output found.safetensors", num_ranks)
    assert torch.equal(found.pop("number"), torch.arange(37.0, dtype=torch.float64))
    expected = load_file(trained / "plain.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == torch.float64
        assert (found[name] - tensor).abs().max() <= 1e-12
    assert _metadata(trained / "found.safetensors") == {"format": "pt", "num_samples": 37}


@pytest.mark.thorough
def test_fewer_samples_than_ranks_and_the_held_out_ones(trained: Path) -> None:
    found = _predict(trained, "--data my_task.Items --root 2 --output few.safetensors", 3)
    assert found["number"].tolist() == [0, 1]
    assert _predict(trained, "")["number"].tolist() == [*range(90)]
    assert (trained / "run" / "predictions.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        pytest.param(
            "--data my_task.Items --root 0",
            3,
            "my_task.Items gave a data set without samples",
            marks=pytest.mark.thorough,
        ),
        (
            "--data my_task.Broken --root 37",
            3,
            "sample 20 of my_task.Broken cannot be used: KeyError: 'no number twenty'",
        ),
        pytest.param(
            "--data my_task.one_input",
            9,
            "the network of my_task.MyTask, given (3, 4) float64, failed: TypeError: ",
            marks=pytest.mark.thorough,
        ),
        pytest.param("--data my_task.Items", 9, "my_task.Items failed: ValueError: ", marks=pytest.mark.thorough),
        pytest.param("--data my_task.nothing", 2, "has no nothing", marks=pytest.mark.thorough),
        pytest.param("--folder run", 2, "--folder is for classify", marks=pytest.mark.thorough),  # it has curves.png
    ],
    ids=lambda value: str(value).split(" ")[1] if str(value).startswith("--") else "",
)
def test_what_is_wrong_is_told_once(arguments: str, code: int, message: str, trained: Path) -> None:
    finished = launch(f"mpirun -np 2 lockstep predict run {arguments} --output wrong.safetensors", cwd=trained)
    _assert_told_once(finished, code, message)
    assert not [path for path in trained.iterdir() if "wrong" in path.name]


@pytest.mark.thorough
def test_rows_that_differ_from_batch_to_batch_are_told(trained: Path) -> None:
    settings = (trained / "run" / "settings.yaml").read_text()
    (trained / "uneven").mkdir()
    (trained / "uneven" / "settings.yaml").write_text(settings.replace("my_task.MyTask", "my_task.Uneven"))
    (trained / "uneven" / "model.safetensors").symlink_to(trained / "run" / "model.safetensors")
    finished = launch("mpirun -np 3 lockstep predict uneven", cwd=trained)
    message = "the predictions of one batch are outputs (n, 2) float64, those of another outputs (n, 4) float64"
    _assert_told_once(finished, 9, message)


@pytest.mark.thorough
def test_an_agent_and_a_missing_run_are_told(trained: Path) -> None:
    settings = (trained / "run" / "settings.yaml").read_text()
    (trained / "agent").mkdir()
    (trained / "agent" / "settings.yaml").write_text(
        settings.replace("my_task.MyTask", "ppo").replace("name: net", "name: mlp")
    )
    (trained / "agent" / "model.safetensors").touch()
    finished = launch("mpirun -np 2 lockstep predict agent", cwd=trained)
    _assert_told_once(finished, 2, "agent has learned ppo: predict is for samples")
    finished = launch("mpirun -np 2 lockstep predict nowhere", cwd=trained)
    _assert_told_once(finished, 5, "nowhere is not the folder of a finished run")


def _assert_told_once(finished: Finished, code: int, message: str) -> None:
    assert finished.returncode == code, finished.output
    (complaint,) = [line for line in finished.output.splitlines() if "lockstep: " in line]
    assert message in complaint
    assert "Traceback" not in finished.output


def test_a_folder_of_images_is_classified_as_the_same_images_are(classified: Path) -> None:
    """The held-out images as files at any depth."""
    held_out = load_synthetic(64, train=False)
    names = [f"{number % 3}/{number:03}.png" for number in range(64)]
    for name, image in zip(names, held_out.images, strict=True):
        path = classified / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(path)
    (classified / "images" / "notes.txt").write_text("no image")
    of_held_out = _predict(classified, "", 2)
    of_files = _predict(classified, "--folder images --output files.safetensors", 2)

    assert torch.equal(of_held_out["probabilities"].argmax(1), of_held_out["class"])
    torch.testing.assert_close(of_held_out["probabilities"].sum(1), torch.ones(64))
    accuracy = json.loads((classified / "run" / "summary.json").read_text())["accuracy"]
    assert (of_held_out["class"] == held_out.labels).float().mean().item() == pytest.approx(accuracy)

    order = sorted(range(64), key=lambda number: names[number])
    metadata = _metadata(classified / "files.safetensors")
    assert metadata["files"] == [names[number] for number in order]
    assert metadata["classes"] == [str(number) for number in range(10)]
    torch.testing.assert_close(of_files["probabilities"], of_held_out["probabilities"][order])


def test_a_model_of_several_inputs_and_outputs_is_exported(trained: Path) -> None:
    finished = launch("lockstep export run", cwd=trained)
    assert finished.returncode == 0, finished.output
    assert re.findall(r"Exported run/model\.(\w+), ", finished.stdout) == ["pt2", "onnx"]


def test_the_pictures_of_a_task_are_drawn_and_reported(trained: Path) -> None:
    evaluated = launch("mpirun -np 2 lockstep evaluate run", cwd=trained)
    assert evaluated.returncode == 0, evaluated.output
    assert "Sums of the held-out samples: run/sums.png" in evaluated.stdout
    with Image.open(trained / "run" / "sums.png") as picture:
        assert picture.width > 200
    reported = launch("lockstep report run", cwd=trained)
    assert reported.returncode == 0, reported.output
    assert "sums.png" in (trained / "run" / "report.html").read_text()
