"""Running statistics, such as batch norm's: buffers that each rank's forward passes change, kept equal on all ranks."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from app.cluster.comm import Cluster


class Buffers:
    """The persistent buffers of a model. Each rank normalises by its own samples; what they have changed in the buffers
    is averaged after every update, by the ranks' numbers of samples.
    """

    def __init__(self, model: nn.Module, cluster: Cluster) -> None:
        saved = model.state_dict()
        self._cluster = cluster
        self._buffers = [buffer for name, buffer in model.named_buffers() if name in saved]
        self.remember()

    def remember(self) -> None:
        """Take the buffers, which are equal on all ranks now, for what the next changes start from."""
        if self._buffers and self._cluster.size > 1:
            self._before = torch.cat([buffer.double().flatten() for buffer in self._buffers])

    def forget_changes(self) -> None:
        """What forward passes have changed since all ranks agreed on the buffers is undone."""
        if self._buffers and self._cluster.size > 1:
            self._take(self._before)

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Whatever forward passes do to the buffers inside is undone."""
        before = [buffer.clone() for buffer in self._buffers]
        yield
        for buffer, value in zip(self._buffers, before, strict=True):
            buffer.copy_(value)

    def agree(self, share: float) -> None:
        """Collective: one small sum, if there is any buffer.

        Args:
            share: this rank's part of the global batch, 0 ... 1.
        """
        if not self._buffers or self._cluster.size == 1:
            return
        now = torch.cat([buffer.double().flatten() for buffer in self._buffers])
        # A rank without samples may have divided by their number.
        change = (now - self._before) * share if share else torch.zeros_like(now)
        self._before += self._cluster.sum_(change, name="buffers")
        self._take(self._before)
        self.remember()

    def _take(self, values: Tensor) -> None:
        for buffer, value in zip(self._buffers, values.split([b.numel() for b in self._buffers]), strict=True):
            buffer.copy_(_as_type_of(buffer, value).view(buffer.shape))


def _as_type_of(buffer: Tensor, values: Tensor) -> Tensor:
    return (values if buffer.is_floating_point() else values.round()).to(buffer.dtype)
