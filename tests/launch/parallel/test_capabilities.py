"""Exactness does not depend on the CPU: the same tests with other kernels."""

import sys

import pytest
import torch

from tests.launching import launch

FILES = "tests/parallel/training/test_exactness.py tests/parallel/parallel/test_zero.py"
# Adaptive ones enlarge what is rounding alone.
CHOSEN = "test_adam_too or (test_any_model_and_elementwise_optimizer and 3- and not sgd)"


@pytest.mark.thorough
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_adaptive_optimizers_are_exact_with_other_kernels(capability: str) -> None:
    if capability == "avx2" and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("this CPU has no AVX2")
    finished = launch(
        f'{sys.executable} -m pytest -m "" -q -p no:cacheprovider {FILES} -k "{CHOSEN}"',
        timeout_seconds=600,
        environment={"ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"},
    )
    assert finished.returncode == 0, finished.output[-4000:]
