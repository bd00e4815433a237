"""The exported model gives what the model gives, for any number of inputs, in PyTorch and in ONNX Runtime."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import gymnasium as gym
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from lockstep.commands import export as exporting
from lockstep.commands.export import FORMATS, export
from lockstep.data.batch import named_tensors, rows
from lockstep.models.actions import build_actions
from lockstep.models.block_sequence import BlockSequence
from lockstep.models.classifier import classifier_blocks
from lockstep.models.policy import policy_blocks
from lockstep.runtime.errors import LockstepError
from lockstep.settings import ModelSettings, VitSettings
from lockstep.training.run_folder import RunFolder

IMAGES = {
    "net": (ModelSettings(), (1, 28, 28)),
    "vit": (ModelSettings(name="vit", vit=VitSettings(width=32, depth=2, num_heads=2, patch_size=7)), (1, 28, 28)),
    "resnet18": (ModelSettings(name="resnet18"), (1, 32, 32)),
}
POLICIES = {
    "mlp": (ModelSettings(name="mlp"), (4,), gym.spaces.Discrete(2)),
    "steering": (ModelSettings(name="mlp"), (2, 12, 12), gym.spaces.Box(-1, 1, (1,))),
    "nature_cnn": (ModelSettings(name="nature_cnn"), (4, 84, 84), gym.spaces.Discrete(6)),
}


def _model(name: str) -> tuple[nn.Module, Tensor]:
    """Its weights are drawn anew, and three inputs."""
    torch.manual_seed(1)
    if name in IMAGES:
        settings, image = IMAGES[name]
        model = BlockSequence(OrderedDict(classifier_blocks(settings, image, num_classes=10)))
        return model.eval(), torch.randn(3, *image)
    settings, observation, space = POLICIES[name]
    model = BlockSequence(OrderedDict(policy_blocks(settings, observation, build_actions(space))))
    return model.eval(), torch.randn(3, *observation)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    (tmp_path / "settings.yaml").write_text("seed: 17\n")
    return RunFolder(tmp_path)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    "name",
    [pytest.param(each, marks=[] if each in ("net", "mlp") else pytest.mark.thorough) for each in (*IMAGES, *POLICIES)],
)
def test_what_is_written_gives_what_the_model_gives(name: str, form: str, folder: RunFolder) -> None:
    model, inputs = _model(name)
    assert export(model, inputs, folder, form) <= 1e-5
    with torch.no_grad():
        expected = model(inputs[:2])
    if form == "onnx":  # by itself, as a program does that knows nothing of us
        session = onnxruntime.InferenceSession(folder.path / "model.onnx")
        found = torch.from_numpy(session.run(["outputs"], {"inputs": inputs[:2].numpy()})[0])
    else:
        found = torch.export.load(folder.path / "model.pt2").module()(inputs[:2])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # float32, in another order


def test_the_settings_go_along(folder: RunFolder) -> None:
    model, inputs = _model("mlp")
    for form in FORMATS:
        export(model, inputs, folder, form)
    (settings,) = onnx.load(folder.path / "model.onnx").metadata_props
    assert (settings.key, settings.value) == ("settings.yaml", "seed: 17\n")
    extra = {"settings.yaml": ""}
    torch.export.load(folder.path / "model.pt2", extra_files=extra)
    assert extra == {"settings.yaml": "seed: 17\n"}


def test_a_model_in_float64_stays_so_but_in_onnx(folder: RunFolder) -> None:
    model, inputs = _model("net")
    assert export(model.double(), inputs.double(), folder, "pt2") <= 1e-15
    assert export(model.double(), inputs.double(), folder, "onnx") <= 1e-5


def test_an_export_that_gives_something_else_is_refused_and_leaves_no_file(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_another(model: nn.Module, examples: Tensor, file: Path, settings: str) -> exporting.Outputs:
        outputs = FORMATS["pt2"](model, examples, file, settings)
        return lambda inputs: outputs(inputs) * 1.001

    model, inputs = _model("mlp")
    monkeypatch.setitem(FORMATS, "onnx", write_another)
    with pytest.raises(LockstepError, match=r"model\.onnx would give other outputs than the model"):
        export(model, inputs, folder, "onnx")
    assert [path.name for path in folder.path.iterdir()] == ["settings.yaml"]


class TwoInputs(nn.Module):
    """A field and a few words to a tree of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.words = nn.Linear(6, 8), nn.Embedding(5, 8)

    def forward(self, left: Tensor, words: Tensor) -> dict[str, Any]:
        hidden = torch.tanh(self.left(left) + self.words(words).sum(1))
        return {"sums": (hidden.sum(1), hidden), "class": hidden.argmax(1)}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("kind", [tuple, dict])
def test_several_inputs_and_outputs(kind: type, form: str, folder: RunFolder) -> None:
    """Words are integers below 5: the check must not draw others."""
    torch.manual_seed(1)
    model = BlockSequence(OrderedDict(network=TwoInputs())).eval()
    left, words = torch.randn(3, 6), torch.randint(5, (3, 2))
    inputs: Any = (left, words) if kind is tuple else {"left": left, "words": words}
    assert export(model, inputs, folder, form) <= 1e-5
    with torch.no_grad():
        expected = model(left[:2], words[:2])
    if form == "pt2":
        first_two = rows(inputs, 0, 2)
        found = dict(named_tensors(torch.export.load(folder.path / "model.pt2").module()(first_two), "outputs"))
    else:
        session = onnxruntime.InferenceSession(folder.path / "model.onnx")
        names = ["inputs.0", "inputs.1"] if kind is tuple else ["left", "words"]
        given = dict(zip(names, (left[:2].numpy(), words[:2].numpy()), strict=True))
        outputs = ["sums.0", "sums.1", "class"]
        found = dict(zip(outputs, map(torch.from_numpy, session.run(outputs, given)), strict=True))
    torch.testing.assert_close(found, dict(named_tensors(expected, "outputs")), rtol=1e-4, atol=1e-5)


class Choosing(nn.Module):
    """Which layer is used depends on the values: no graph can say that."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * 2 if inputs.sum() > 0 else inputs


@pytest.mark.parametrize("form", FORMATS)
def test_a_network_that_no_graph_can_hold_is_told(form: str, folder: RunFolder) -> None:
    with pytest.raises(LockstepError, match=rf"this network cannot be written as model\.{form}: "):
        export(Choosing(), torch.ones(3, 4), folder, form)
