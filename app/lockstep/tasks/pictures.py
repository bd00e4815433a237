"""What a task shows of its held-out samples."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray


@dataclass(frozen=True)
class Pictures:
    """Images in a grid, for a file in the run folder.

    Attributes:
        name: of the file, without its ending.
        heading: above the grid.
        images: (height, width) of numbers of any range, or (height, width, 3) of bytes.
        titles: one for each image.
        num_columns: of the grid.
    """

    name: str
    heading: str
    images: Sequence[NDArray[Any]]
    titles: Sequence[str]
    num_columns: int
