"""Exports the merged model of a finished run for programs without Lockstep.

env/run lockstep export runs/latest                 model.pt2, for torch.export.load; model.onnx, for ONNX Runtime
env/run lockstep export runs/latest --formats onnx  one of them

The inputs are those of the network: normalised images or observations, in batches of any size. ONNX is in float32. Each
file also holds the run's settings.yaml. It is loaded again, and its outputs must equal the model's.
`model.safetensors`, which every run leaves, has the weights only.
"""

import argparse
import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lockstep.comm.cluster import Cluster
from lockstep.comm.program import run_program
from lockstep.runtime.command_line import command_parser
from lockstep.runtime.errors import LockstepError, SettingsError
from lockstep.settings.reading import SETTINGS_FILE
from lockstep.settings.trust import add_trust
from lockstep.training.build import load_task
from lockstep.training.run_folder import RunFolder, replacing

Outputs = Callable[[Tensor], Tensor]
NUM_EXAMPLES = 3  # batch size of the example inputs for tracing
NUM_CHECKED = 64  # batch size of the comparison: another size, and other inputs
TOLERANCE = 1e-5  # relative to the largest output; other runtimes sum float32 in another order


def run(cluster: Cluster) -> None:
    """
    Raises:
        LockstepError: an exported file gives other outputs than the model.
        SettingsError: this was started as several ranks.
        StorageError: the run is not finished, or a file cannot be written.
    """
    arguments = _parse_args()
    if cluster.size > 1:
        raise SettingsError("export runs on one rank: start it without a launcher").as_shared()
    folder = RunFolder.open(arguments.run)
    settings = folder.load_settings(arguments.trust == "true")
    task, model = load_task(settings, folder, cluster)
    model.cpu().eval()
    examples = task.example_inputs(NUM_EXAMPLES).cpu().to(task.dtype)
    for name in arguments.formats:
        difference = export(model, examples, folder, name)
        path = folder.path / f"model.{name}"
        print(
            f"Exported {path}, {path.stat().st_size:,} bytes: outputs within {difference:.1e} of the model's",
            flush=True,
        )


def export(model: nn.Module, examples: Tensor, folder: RunFolder, name: str) -> float:
    """Write `model` as model.`name`, load it again, and return the largest difference of the outputs.

    The difference is relative to the largest output.

    Raises:
        LockstepError: the difference is above `TOLERANCE`, or the exporter does not support this network.
        StorageError: the file cannot be written.
    """
    torch.manual_seed(0)
    inputs = examples.mean() + torch.randn(NUM_CHECKED, *examples.shape[1:], dtype=examples.dtype)
    with torch.no_grad(), warnings.catch_warnings(), replacing(folder.path / f"model.{name}") as temporary:
        warnings.simplefilter("ignore")  # the exporters warn about their own code
        expected = model(inputs)
        settings = (folder.path / SETTINGS_FILE).read_text()
        try:
            found = FORMATS[name](model, examples, temporary, settings)(inputs)
        except Exception as error:  # exporters raise many types of errors
            why = " ".join(str(error).split())[:300]
            raise LockstepError(f"this network cannot be written as model.{name}: {why}") from error
        difference = float((found - expected).abs().max() / expected.abs().max())
        if not difference <= TOLERANCE:
            raise LockstepError(
                f"model.{name} would give other outputs than the model: they differ by {difference:.1e}"
            )
    return difference


def _write_pt2(model: nn.Module, examples: Tensor, file: Path, settings: str) -> Outputs:
    program = torch.export.export(model, (examples,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    with file.open("wb") as opened:
        torch.export.save(program, opened, extra_files={SETTINGS_FILE: settings})
    with file.open("rb") as opened:
        outputs: Outputs = torch.export.load(opened).module()
    return outputs


def _write_onnx(model: nn.Module, examples: Tensor, file: Path, settings: str) -> Outputs:
    import onnxruntime

    # ONNX Runtime supports most operators in float32 only.
    model, examples = copy.deepcopy(model).float(), examples.float()
    program: Any = torch.onnx.export(
        model,
        (examples,),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        input_names=["inputs"],
        output_names=["outputs"],
        verbose=False,
    )
    program.model.metadata_props[SETTINGS_FILE] = settings
    program.save(str(file), external_data=False)
    session = onnxruntime.InferenceSession(file.read_bytes(), providers=["CPUExecutionProvider"])
    return lambda inputs: torch.from_numpy(session.run(None, {"inputs": inputs.float().numpy()})[0])


FORMATS = {"pt2": _write_pt2, "onnx": _write_onnx}


def _parse_args() -> argparse.Namespace:
    parser = command_parser("export", __doc__)
    parser.add_argument("run", type=Path, help="the folder of a finished run, such as runs/latest")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS), help="(default: %(default)s)")
    add_trust(parser)
    return parser.parse_args()


def main() -> None:
    run_program(run)
