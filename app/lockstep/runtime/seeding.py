"""Random states as pure functions of the position in a run: resuming exactly needs no saved random state."""

import hashlib
import os

import torch


def seed_model(seed: int) -> None:
    """Set the same random state on every rank, to build the same model."""
    torch.manual_seed(seed)


def update_seed(seed: int, step: int, rank: int) -> int:
    """The seed of all random numbers (dropout) of update `step` on `rank`: unrelated for any two updates or ranks."""
    # A hash, because a sum such as seed + step + rank would repeat another rank's seeds.
    digest = hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def seed_update(seed: int, device: torch.device) -> None:
    """Set the random state of this rank from an `update_seed`."""
    # torch.manual_seed seeds every kind of device: 130 microseconds instead of 10.
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def random_state_digest(device: torch.device) -> str:
    """The sha256 of this rank's random state, hexadecimal."""
    digest = hashlib.sha256(torch.get_rng_state().numpy().data)
    if device.type == "cuda":
        digest.update(torch.cuda.get_rng_state(device).numpy().data)
    return digest.hexdigest()


def make_deterministic() -> None:
    """Use only operations that give the same bits in every run on the same machine; others raise an error."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
