"""Random states as pure functions of the position: nothing of them needs to be saved to go on as if never stopped."""

import hashlib
import os

import torch


def seed_model(seed: int) -> None:
    """The same random state on every rank, to build the same model."""
    torch.manual_seed(seed)


def update_seed(seed: int, step: int, rank: int) -> int:
    """The seed of everything random (dropout) in update `step` on `rank`: unrelated for any two updates or ranks."""
    # A hash mixes: neighbouring numbers give unrelated seeds, where their sum would meet another rank's.
    digest = hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def seed_update(seed: int, device: torch.device) -> None:
    """Set the random state of this rank from an `update_seed`."""
    # Not torch.manual_seed, which visits every kind of device: 130 microseconds in place of 10.
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
    """Refuse every operation that may give other bits in another run of the same program on the same machine."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
