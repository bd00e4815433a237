"""Writes a safetensors file tensor by tensor, so that it can be larger than memory. (The library needs all at once.)

The format: 8 bytes, the header's length; the header in JSON, with each tensor's type, shape and offsets; the tensors.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from lockstep.data.sharding import content_hash
from lockstep.parallel.merge import digest_of_hashes

TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
NO_DIGEST = "0" * 64


class TensorFileWriter:
    """Use as a context manager; `write` every tensor of `meta_state`, in any order.

    The file's header gets the `state_digest` of what was written.

    Attributes:
        digest: that digest, once all is written.
    """

    def __init__(self, path: Path, meta_state: Mapping[str, Tensor], about: Mapping[str, str] | None = None) -> None:
        """`meta_state` gives names, shapes and data types.

        With `about`, the header gets that in place of the digest, and tensors can be written by `write_rows`.
        """
        self._has_digest = about is None
        header: dict[str, object] = {"__metadata__": {"format": "pt", **(about or {"digest": NO_DIGEST})}}
        self._places: dict[str, int] = {}
        end = 0
        for name, tensor in meta_state.items():
            start, end = end, end + tensor.nbytes
            self._places[name] = start
            place = {"dtype": TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
            header[name] = place
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        self._start = 8 + len(encoded)
        self._digest_at = 8 + encoded.index(NO_DIGEST.encode()) if self._has_digest else 0
        self._meta_state = meta_state
        self._hashes: dict[str, str] = {}
        self.digest = NO_DIGEST
        self._file = path.open("wb")
        self._file.write(len(encoded).to_bytes(8, "little") + encoded)

    def __enter__(self) -> "TensorFileWriter":
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        like = self._meta_state[name]
        assert (tensor.shape, tensor.dtype) == (like.shape, like.dtype), name
        self._hashes[name] = content_hash(tensor)
        self._write_at(self._places[name], tensor)

    def write_rows(self, name: str, start: int, rows: Tensor) -> None:
        """Write the rows `start` ... `start + len(rows) - 1` of a tensor."""
        like = self._meta_state[name]
        assert (rows.shape[1:], rows.dtype) == (like.shape[1:], like.dtype), name
        assert start + len(rows) <= len(like), name
        self._write_at(self._places[name] + start * (like.nbytes // len(like)), rows)

    def _write_at(self, place: int, tensor: Tensor) -> None:
        self._file.seek(self._start + place)
        self._file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if error is None and self._has_digest:
                assert self._hashes.keys() == self._meta_state.keys()
                self.digest = digest_of_hashes(self._hashes)
                self._file.seek(self._digest_at)
                self._file.write(self.digest.encode())
