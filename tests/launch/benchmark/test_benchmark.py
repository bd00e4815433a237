"""The benchmark as its users start it: short, and for its form, not for its figures."""

import json
from pathlib import Path

import pytest

from tests.launching import launch

SHORT = "--rounds 2 --updates 5 --data.name synthetic --data.num_samples 500 --data.batch_size_per_rank 8"


def test_throughput_leaves_a_table_json_and_a_picture(tmp_path: Path) -> None:
    finished = launch(f"horovodrun -np 2 lockstep benchmark throughput {SHORT} --out {tmp_path}")
    assert finished.returncode == 0, finished.output
    assert "its limit" in finished.stdout
    result = json.loads((tmp_path / "throughput.json").read_text())
    assert result["num_ranks"] == 2
    assert all(len(rates) == 2 and min(rates) > 0 for rates in result["rounds"].values())
    assert sum(result["milliseconds"].values()) > 0
    assert [len(rank["cpus"]) >= 1 for rank in result["environment"]["ranks"]] == [True, True]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["throughput.json", "throughput.png"]


@pytest.mark.thorough
def test_comm_fits_forecasts_and_compares_with_the_link(tmp_path: Path) -> None:
    finished = launch(f"mpirun -np 2 lockstep benchmark comm {SHORT} --link_gbits 1000 --out {tmp_path}")
    assert finished.returncode == 0, finished.output
    assert (tmp_path / "comm.png").is_file()
    result = json.loads((tmp_path / "comm.json").read_text())
    assert result["gradient_bytes"] == 4 * 1_199_882
    assert list(result["gradient_seconds_by_wire"]) == ["float32", "bf16", "fp16"]
    forecast = result["forecast"]
    assert list(forecast) == ["4", "16", "64", "256", "1024", "4096"]
    assert 0 < forecast["4096"] < forecast["4"] < 1
    assert result["link_bound_seconds"] == 4 * 1_199_882 * 8 / 1e12


@pytest.mark.thorough
def test_scaling_starts_jobs_of_each_size(tmp_path: Path) -> None:
    others = "--updates 5 --data.name synthetic --data.num_samples 500"
    finished = launch(
        f"lockstep benchmark scaling --ranks 1,2 --rounds 1 --batch_size_per_rank 8 --out {tmp_path} {others}"
    )
    assert finished.returncode == 0, finished.output
    result = json.loads((tmp_path / "scaling.json").read_text())
    assert result["efficiency"]["weak"]["1"] == result["efficiency"]["strong"]["1"] == 1.0
    assert set(result["efficiency"]["weak"]) == {"1", "2"}
    assert (tmp_path / "scaling.png").is_file()


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ("warp", "there is no benchmark 'warp': choose one of throughput, comm, sharding, pipeline, peers, scaling"),
        pytest.param("throughput --updats 3", "Did you mean --updates?", marks=pytest.mark.thorough),
        pytest.param("comm", "comm needs two ranks or more", marks=pytest.mark.thorough),
    ],
)
def test_what_cannot_be_measured_is_told_in_one_message(args: str, told: str) -> None:
    finished = launch(f"lockstep benchmark {args}", timeout_seconds=60)
    assert finished.returncode == 2, finished.output
    assert told in finished.stderr
    assert "Traceback" not in finished.output
