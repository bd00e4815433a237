"""Problems of a user's own, as docs/problems.md tells: the page's example, regression, and what is told of mistakes."""

import json
import re
import shlex
from pathlib import Path

import pytest

from lockstep.training.checkpoint import list_checkpoints
from tests.launching import ROOT, Finished, block_of, kill_after_a_checkpoint, launch

PAGE = ROOT / "docs" / "problems.md"
EXAMPLE = block_of(PAGE, "python", "import torch")
TRAIN = f"mpirun -np 2 python {shlex.quote(str(ROOT / 'app' / 'train.py'))}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "my_weather.py").write_text(EXAMPLE)
    return tmp_path


def _page_commands() -> list[str]:
    lines = re.findall(r"^env/run (.* runs/weather.*)$", PAGE.read_text(), flags=re.MULTILINE)
    return [line.replace("app/train.py", shlex.quote(str(ROOT / "app" / "train.py"))) for line in lines]


def test_the_pages_example_is_killed_and_goes_on_bit_for_bit(folder: Path) -> None:
    """Forty lines of a user's, from an empty file to a merged model."""
    assert len(EXAMPLE.splitlines()) <= 40
    train, evaluate = _page_commands()
    train += " --num_epochs 60"  # or it would be over before it is killed
    assert (finished := launch(train, cwd=folder)).returncode == 0, finished.output
    scores = json.loads((folder / "runs/weather/summary.json").read_text())
    assert scores["num_held_out_samples"] == 2000
    assert scores["loss"] < 2  # of targets whose mean square is 3.5: 6 of one and 1 of the other
    evaluated = launch(evaluate, cwd=folder)
    assert f"Loss: {scores['loss']:.4f} on 2000 held-out samples" in evaluated.stdout, evaluated.output

    stopped = train.replace("runs/weather", "runs/stopped")
    kill_after_a_checkpoint(f"{stopped} --checkpoint.interval 100", folder / "runs/stopped", folder)
    assert int(list_checkpoints(folder / "runs/stopped")[-1].name) < 60 * 32
    resumed = launch(f"{stopped} --resume", cwd=folder)
    assert "Goes on after update" in resumed.stdout, resumed.output
    files = [(folder / "runs" / run / "model.safetensors").read_bytes() for run in ("weather", "stopped")]
    assert files[0] == files[1]


def test_options_are_settings(folder: Path) -> None:
    """As on the page: in --help, the command line, the environment and settings.yaml, and fixed in a resumed run."""
    with (folder / "my_weather.py").open("a") as file:
        file.write(block_of(PAGE, "python", "from dataclasses"))
    alone = TRAIN.removeprefix("mpirun -np 2 ")
    quick = f"{alone} --task my_weather.Wider --num_epochs 1 --run_dir run --log_interval 1000"
    helped = launch(f"{alone} --task my_weather.Wider --help", cwd=folder).stdout
    told = r"--options.width WIDTH\n.*\n? +Units of the hidden layer. .type: int, default: 32"
    assert re.search(told, helped), helped
    wrong = launch(f"{quick} --options.widht 3", cwd=folder)
    assert (wrong.returncode, "Did you mean --options.width?" in wrong.stderr) == (2, True), wrong.output
    assert not (folder / "run").exists()
    assert launch(quick, cwd=folder, environment={"LOCKSTEP_OPTIONS__WIDTH": "20"}).returncode == 0
    assert "\noptions:\n  width: 20\n" in (folder / "run/settings.yaml").read_text()
    changed = launch(f"{alone} --resume --run_dir run --num_epochs 2 --options.width 21", cwd=folder)
    assert changed.returncode == 2
    assert "options is {'width': 21} and was {'width': 20}" in changed.stderr


MISTAKES = {  # a line of the example, what stands there instead, the exit code, and what is told
    "no scalar": ("return squares.sum(), ", "return squares.sum(1), ", 9, "the sum of the loss as a scalar tensor"),
    "no pair": (', batch["known"].sum()', "", 9, r"must return \(sum, weight\)"),
    "an error": ("self.sea(sea)", "self.see(sea)", 9, r"AttributeError.*my_weather\.py, line \d+: .*self\.see\(sea\)"),
    "other outputs": ("nn.Linear(32, 2)", "nn.Linear(32, 3)", 9, r"Weather\.loss failed.*line \d+: squares = "),
    "nothing learns": ("return Network()", "return Network().requires_grad_(False)", 9, "has no parameters to learn"),
    "no rows": ('"air": air,', '"air": air[1:],', 3, r"tensors of \[1999, 2000\] rows"),
    "no data": ("2000", "0", 3, "a data set without samples"),
    "no network": ("def network(", "def networks(", 9, "must have a method network"),
    "a syntax error": ("return Network()", "return Network(", 2, "my_weather"),
    "no task": ("(SupervisedTask)", "", 2, "derived from lockstep.SupervisedTask"),
}
FIRST, *OTHERS = MISTAKES


def _failed(folder: Path) -> Finished:
    return launch(f"{TRAIN} --task my_weather.Weather --num_epochs 1 --run_dir run", cwd=folder)


@pytest.mark.parametrize("mistake", [FIRST, *(pytest.param(name, marks=pytest.mark.thorough) for name in OTHERS)])
def test_a_mistake_is_told_once_before_the_run_begins(mistake: str, tmp_path: Path) -> None:
    line, instead, code, told = MISTAKES[mistake]
    assert line in EXAMPLE
    (tmp_path / "my_weather.py").write_text(EXAMPLE.replace(line, instead))
    finished = _failed(tmp_path)
    assert finished.returncode == code, finished.output
    assert re.search(told, finished.stderr, flags=re.DOTALL), finished.stderr
    assert "Traceback" not in finished.output
    assert finished.stderr.count("lockstep: ") == 1
    assert not (tmp_path / "run").exists()


def test_a_metric_that_is_no_number_is_told_once(folder: Path) -> None:
    with (folder / "my_weather.py").open("a") as file:
        file.write('\n    def metrics(self, outputs, batch):\n        return {"odd": (float("nan"), 1.0)}\n')
    finished = _failed(folder)
    assert finished.returncode == 0, finished.output
    assert finished.stdout.count("odd is not a number") == 1, finished.stdout
    assert json.loads((folder / "run/summary.json").read_text())["odd"] is None


def test_the_forecast_is_learned_and_drawn(tmp_path: Path) -> None:
    """A part of the preset's run: better than to forecast no change, and exactly what the file alone says."""
    train = f"{TRAIN} --config regress --options.width 8 --num_epochs 1 --run_dir run"
    assert (finished := launch(train, cwd=tmp_path, timeout_seconds=240)).returncode == 0, finished.output
    scores = json.loads((tmp_path / "run/summary.json").read_text())
    assert 0.1 < scores["rmse"] < 0.6  # no change: 0.69
    assert scores["r2"] > 0.6
    evaluated = launch("lockstep evaluate run", cwd=tmp_path)
    assert f"Rmse: {scores['rmse']:.4f} on 200 held-out samples, r2 {scores['r2']:.4f}" in evaluated.stdout
    again = train.replace("--run_dir run", "--run_dir numbers --options.target numbers")
    numbers = launch(f"{again} --options.width 12 --num_epochs 3", cwd=tmp_path)
    assert numbers.returncode == 0, numbers.output
    assert json.loads((tmp_path / "numbers/summary.json").read_text())["r2"] > 0.4  # 0: the mean of all
    assert (tmp_path / "run/predictions.png").read_bytes().startswith(b"\x89PNG")
