"""Buffers that forward passes change, such as batch norm's running statistics, kept equal on all ranks."""

import torch
from torch import Tensor, nn

from lockstep.comm.cluster import Cluster


class Buffers:
    """The buffers of a model. Each rank normalises by its own samples; what they have changed in the persistent buffers
    is averaged after every update, weighted by the ranks' numbers of samples. A failed update's changes are undone.
    """

    def __init__(self, model: nn.Module, cluster: Cluster) -> None:
        saved = model.state_dict()
        self._cluster = cluster
        # By data type, and by module and name: a forward pass may replace a buffer by another tensor.
        self._places: dict[torch.dtype, list[tuple[nn.Module, str]]] = {}
        seen: set[Tensor] = set()
        for prefix, module in model.named_modules():
            for name, buffer in module.named_buffers(prefix, recurse=False):
                if name in saved and buffer not in seen:
                    seen.add(buffer)
                    self._places.setdefault(buffer.dtype, []).append((module, name.rpartition(".")[2]))
        # Caches and the like: each rank has its own, and a forward pass may replace, add or remove them.
        self._others = [(m, name) for m in model.modules() for name, buffer in m._buffers.items() if buffer not in seen]
        self.remember()

    def remember(self) -> None:
        """Remember the buffers, which are equal on all ranks now, as what the next changes start from."""
        self._before = self._copies()
        self._remember_others()

    @torch.no_grad()
    def forget_changes(self) -> None:
        """Undo what forward passes have changed since the last `average` or `remember`. Not a collective."""
        self._put_back()
        for (module, name), (other, value) in zip(self._others, self._others_before, strict=True):
            module._buffers[name] = other
            if other is not None and value is not None and not torch.equal(other, value):  # constants may be expanded
                other.copy_(value)

    def _put_back(self) -> None:
        """Set the persistent buffers to what is remembered of them. Does not wait for the device."""
        for places, before in zip(self._places.values(), self._before, strict=True):
            buffers = [self._at(*place) for place in places]
            sizes = [buffer.numel() for buffer in buffers]
            for buffer, values in zip(buffers, before.split(sizes), strict=True):
                buffer.copy_(values.view(buffer.shape))

    @torch.no_grad()
    def average(self, share: float) -> None:
        """Collective: average the changes over the ranks, by one small all-reduce, if there is any buffer.

        Args:
            share: this rank's share of the global batch, 0 ... 1.
        """
        if not self._places or self._cluster.size == 1:
            self.remember()
            return
        now = self._copies()
        self._remember_others()
        change = torch.cat([mine.double() - before.double() for mine, before in zip(now, self._before, strict=True)])
        # A rank without samples may have divided by their number.
        change = change * share if share else torch.zeros_like(change)
        sums = self._cluster.sum_(change, name="buffers").split([len(before) for before in self._before])
        for before, summed in zip(self._before, sums, strict=True):
            agreed = before.double() + summed
            before.copy_(agreed if before.is_floating_point() else agreed.round())
        self._put_back()

    @torch.no_grad()
    def _remember_others(self) -> None:
        buffers = [module._buffers[name] for module, name in self._others]
        self._others_before = [(buffer, None if buffer is None else buffer.clone()) for buffer in buffers]

    @torch.no_grad()
    def _copies(self) -> list[Tensor]:
        """Copy the persistent buffers, those of each data type into one flat tensor."""
        return [torch.cat([self._at(*place).flatten() for place in places]) for places in self._places.values()]

    @staticmethod
    def _at(module: nn.Module, name: str) -> Tensor:
        buffer = module._buffers[name]
        assert buffer is not None
        return buffer
