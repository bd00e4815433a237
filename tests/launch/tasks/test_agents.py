"""PPO by the programs as users start them."""

import json
from pathlib import Path

import pytest
from PIL import Image

from tests.launching import ROOT, block_of, launch

BRIEF = """--env.options '{"config": {"duration": 4}}'"""  # seconds of an episode
DOC = ROOT / "docs" / "agents.md"


def _summary(run: Path) -> dict[str, float]:
    summary: dict[str, float] = json.loads((run / "summary.json").read_text())
    return summary


@pytest.mark.thorough
def test_a_pole_is_balanced_and_another_program_sees_it(tmp_path: Path) -> None:
    """The first command of docs/agents.md: at least 475 over 100 episodes. Then the merged policy, on two ranks."""
    command, *_, evaluate = [line.split("  #")[0] for line in block_of(DOC, "bash", "env/run horovodrun").splitlines()]
    trained = launch(f"{command} --run_dir {tmp_path}/run", timeout_seconds=180)
    assert trained.returncode == 0, trained.output
    summary = _summary(tmp_path / "run")
    assert summary["num_episodes"] == 100
    assert summary["return"] >= 475
    assert f"Return: {summary['return']:.2f}" in trained.stdout
    reported = launch(f"env/run lockstep report {tmp_path}/run")
    assert reported.returncode == 0, reported.output
    assert "Returns" in (tmp_path / "run" / "report.html").read_text()
    play = evaluate.replace("runs/latest", f"{tmp_path}/run").replace("play.gif", f"{tmp_path}/play.gif")
    evaluated = launch(play, timeout_seconds=120)
    assert evaluated.returncode == 0, evaluated.output
    assert "in 20 episodes" in evaluated.stdout
    with Image.open(tmp_path / "play.gif") as picture:
        assert picture.n_frames > 100  # type: ignore[attr-defined]


def test_an_environment_and_a_policy_of_ones_own(tmp_path: Path) -> None:
    """The example of docs/agents.md learns: the way to the light is 6 steps, 5 of which cost 0.05."""
    (tmp_path / "my_world.py").write_text(block_of(DOC, "python", "# my_world.py"))
    for name in ("app", "env"):
        (tmp_path / name).symlink_to(ROOT / name)
    trained = launch(
        f"{block_of(DOC, 'bash', 'env/run mpirun').strip()} --run_dir run", timeout_seconds=120, cwd=tmp_path
    )
    assert trained.returncode == 0, trained.output
    assert _summary(tmp_path / "run")["return"] == pytest.approx(0.75)
    evaluated = launch("lockstep evaluate run --episodes 7", cwd=tmp_path)
    assert "Return: 0.75 +- 0.00 in 7 episodes" in evaluated.stdout, evaluated.output


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("preset", "settings"),
    [
        ("pong", """--ppo.total_steps 256 --ppo.num_steps 16 --env.options '{"max_num_frames_per_episode": 400}'"""),
        ("racetrack", "--ppo.total_steps 128 --ppo.num_steps 8 " + BRIEF),
        ("highway", "--ppo.total_steps 128 --ppo.num_steps 8 " + BRIEF),
    ],
)
def test_every_preset_runs_and_can_be_seen(preset: str, settings: str, tmp_path: Path) -> None:
    few = f"{settings} --env.num_evaluation_episodes 2 --log_interval 1 --run_dir {tmp_path}/run"
    trained = launch(f"mpirun -np 2 python app/train.py --config {preset} {few}", timeout_seconds=180)
    assert trained.returncode == 0, trained.output
    assert _summary(tmp_path / "run")["num_episodes"] == 2
    seen = launch(f"lockstep evaluate {tmp_path}/run --episodes 1 --record {tmp_path}/play.gif")
    assert seen.returncode == 0, seen.output
    with Image.open(tmp_path / "play.gif") as picture:
        assert len(picture.convert("RGB").getcolors(2**16) or []) > 2  # something is drawn


@pytest.mark.thorough
def test_what_does_not_fit_is_told_once(tmp_path: Path) -> None:
    settings = f"--task ppo --env.id CartPole-v1 --model.name nature_cnn --run_dir {tmp_path}/run"
    finished = launch(f"mpirun -np 2 python app/train.py {settings}")
    assert finished.returncode == 2, finished.output
    assert finished.output.count("it takes images, and observations are (4,): use mlp") == 1, finished.output
    assert "Traceback" not in finished.output
