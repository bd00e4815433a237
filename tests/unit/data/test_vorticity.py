"""The weather-like data set: a solver beside an exact solution and what the equation conserves."""

from pathlib import Path

import numpy as np
import pytest
import torch

from lockstep.data import vorticity
from lockstep.data.vorticity import BETA, GRID, NUM_STEPS, TIME_STEP, VISCOSITY, energy_and_enstrophy, forecast
from lockstep.runtime.errors import DataError

X, Y = np.meshgrid(*[np.arange(GRID) * 2 * np.pi / GRID] * 2)


@pytest.mark.parametrize(("k", "m"), [(1, 0), (2, 3), (4, -1)])
def test_a_rossby_wave_travels_west_and_decays_as_its_formula_says(k: int, m: int) -> None:
    """One wave is an exact solution: its frequency is -beta k / (k^2 + m^2) (Rossby 1939), its decay nu (k^2 + m^2)."""
    square, time = k**2 + m**2, NUM_STEPS * TIME_STEP
    found = forecast(np.cos(k * X + m * Y)[None], NUM_STEPS)[0]
    expected = np.exp(-VISCOSITY * square * time) * np.cos(k * X + m * Y + BETA * k / square * time)
    assert np.abs(found - expected).max() < 1e-5


def test_without_viscosity_energy_and_enstrophy_are_conserved(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the truncated equation, too (Lorenz 1960), but for the error of the time steps."""
    monkeypatch.setattr(vorticity, "VISCOSITY", 0.0)
    before = vorticity.initial_fields(3, seed=1)
    before = np.fft.irfft2(np.fft.rfft2(before) * vorticity._KEPT)  # what the solver keeps
    after = forecast(before, NUM_STEPS)
    assert np.abs(after - before).mean() > 0.1
    sums = [energy_and_enstrophy(torch.from_numpy(field).unsqueeze(1)) for field in (before, after)]
    torch.testing.assert_close(sums[1], sums[0], rtol=1e-4, atol=0)


def test_it_is_made_once_and_a_damaged_file_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vorticity, "NUM_TRAINING", 4)
    monkeypatch.setattr(vorticity, "NUM_HELD_OUT", 2)
    vorticity.make_vorticity(tmp_path / "data")
    (file,) = (tmp_path / "data").iterdir()
    made = file.stat().st_mtime_ns
    vorticity.make_vorticity(tmp_path / "data")
    assert file.stat().st_mtime_ns == made
    before, after = vorticity.load_vorticity(tmp_path / "data", train=False)
    assert before.shape == after.shape == (2, 1, GRID, GRID)
    file.write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"cannot be read .*remove it"):
        vorticity.load_vorticity(tmp_path / "data", train=True)
