"""A small weather-like data set: the barotropic vorticity equation, made here from seeds.

The first numerical weather forecast (Charney, Fjortoft and von Neumann 1950) solved this equation for the relative
vorticity z of a flow without divergence on a beta plane, here doubly periodic with sides of 2 pi:

    dz/dt + J(p, z) + beta dp/dx = nu lap z,    lap p = z,    J(p, z) = dp/dx dz/dy - dp/dy dz/dx

p is the stream function. Derivatives are spectral, products are dealiased by the rule of two thirds (Orszag 1971), and
time steps are Runge and Kutta's of order 4. A sample is a random smooth field and what becomes of it.
"""

import os
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from lockstep.data.sharding import content_hash
from lockstep.runtime.errors import DataError

GRID, BETA, VISCOSITY, TIME_STEP = 32, 1.0, 2e-3, 0.1
NUM_STEPS = 20  # of a forecast: 2 units of time
NUM_TRAINING, NUM_HELD_OUT = 800, 200
PARAMETERS = (GRID, BETA, VISCOSITY, TIME_STEP, NUM_STEPS, NUM_TRAINING, NUM_HELD_OUT)

Spectrum = NDArray[np.complex128]
_KX = np.arange(GRID // 2 + 1)[None, :]
_KY = np.fft.fftfreq(GRID, 1 / GRID)[:, None]
_SQUARE = _KX**2 + _KY**2
_INVERSE = np.where(_SQUARE > 0, -1 / np.where(_SQUARE > 0, _SQUARE, 1), 0)  # of the Laplacian
_KEPT = (np.abs(_KX) < GRID / 3) & (np.abs(_KY) < GRID / 3)


def make_vorticity(root: Path) -> None:
    """Make the data set in `root`, unless it is there. One rank calls this while the others wait; it takes seconds.

    Raises:
        OSError: it cannot be written.
    """
    file = _file(root)
    if not file.exists():
        root.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(f".{os.getpid()}.part")  # another job may be making it, too
        save_file(_solve(), temporary)
        temporary.replace(file)


def load_vorticity(root: Path, train: bool) -> tuple[Tensor, Tensor]:
    """Load vorticity before and after a forecast: two of (n, 1, GRID, GRID) float32, of about unit variance.

    Raises:
        DataError: the file that `make_vorticity` writes is missing or damaged.
    """
    try:
        found = load_file(_file(root))
    except Exception as error:  # safetensors' own errors, too
        raise DataError(f"{_file(root)} cannot be read ({error}): remove it, and it will be made anew") from error
    part = slice(None, NUM_TRAINING) if train else slice(NUM_TRAINING, None)
    return found["before"][part], found["after"][part]


def _file(root: Path) -> Path:
    return root / f"vorticity-{content_hash(PARAMETERS)[:12]}.safetensors"


def _solve() -> dict[str, Tensor]:
    before = initial_fields(NUM_TRAINING + NUM_HELD_OUT, seed=0)
    fields = {"before": before, "after": forecast(before, NUM_STEPS)}
    return {name: torch.from_numpy(field).float().unsqueeze(1) for name, field in fields.items()}


def initial_fields(num_fields: int, seed: int) -> NDArray[np.float64]:
    """Draw smooth random fields (n, GRID, GRID) of unit variance, whose waves have wave numbers of about 4."""
    noise = np.fft.rfft2(np.random.default_rng(seed).standard_normal((num_fields, GRID, GRID)))
    fields = np.fft.irfft2(noise * np.exp(-((np.sqrt(_SQUARE) - 4) ** 2) / 4) * (_SQUARE > 0))
    normalised: NDArray[np.float64] = fields / fields.std((1, 2), keepdims=True)
    return normalised


def forecast(fields: NDArray[np.float64], num_steps: int) -> NDArray[np.float64]:
    """Integrate vorticity fields (n, GRID, GRID) over `num_steps` time steps."""
    spectrum = np.fft.rfft2(fields) * _KEPT
    for _ in range(num_steps):
        first = _tendency(spectrum)
        second = _tendency(spectrum + TIME_STEP / 2 * first)
        third = _tendency(spectrum + TIME_STEP / 2 * second)
        fourth = _tendency(spectrum + TIME_STEP * third)
        spectrum = spectrum + TIME_STEP / 6 * (first + 2 * second + 2 * third + fourth)
    return np.fft.irfft2(spectrum)


def _tendency(vorticity: Spectrum) -> Spectrum:
    """Compute dz/dt of a spectrum (n, GRID, GRID // 2 + 1)."""
    stream = _INVERSE * vorticity
    px, py, zx, zy = (np.fft.irfft2(1j * wave * field) for field in (stream, vorticity) for wave in (_KX, _KY))
    jacobian = np.fft.rfft2(px * zy - py * zx) * _KEPT
    tendency: Spectrum = -jacobian - BETA * 1j * _KX * stream - VISCOSITY * _SQUARE * vorticity
    return tendency


def energy_and_enstrophy(fields: Tensor) -> Tensor:
    """Compute energy and enstrophy (n, 2) of vorticity (n, 1, GRID, GRID): the means of -p z / 2 and z^2 / 2."""
    vorticity = fields.squeeze(1).double().numpy()
    stream = np.fft.irfft2(_INVERSE * np.fft.rfft2(vorticity))
    means = [(-stream * vorticity / 2).mean((1, 2)), (vorticity**2 / 2).mean((1, 2))]
    return torch.from_numpy(np.stack(means, 1)).float()
