"""What a loader reads from: samples with labels, fetched by index."""

from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

Image: TypeAlias = NDArray[np.uint8]
"""Square pixels, ``[side, side, channels]``, with 1 or 3 channels."""

Images: TypeAlias = Image | list[Image]
"""An array ``[b, side, side, channels]`` where all have one side, else one array each."""


class ImageSource(Protocol):
    """Images that can be fetched by index, from several threads at once."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """The class of every image, ``[n]``."""
        ...

    def __len__(self) -> int: ...

    def fetch(self, indices: NDArray[np.int64], size: int) -> Images:
        """Read images.

        Args:
            indices: which ones, ``[b]``.
            size: the side that the model wants, in pixels. A larger image is reduced to it, a smaller one is
                left for the loader, which enlarges many at once.

        Returns:
            ``b`` images.

        Raises:
            UserError: an image is damaged. Names the file.
        """
        ...


class MemorySource:
    """Images of one size that fit in memory.

    Args:
        images: ``[n, side, side, channels]`` or ``[n, side, side]``.
        labels: ``[n]``.
    """

    def __init__(self, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> None:
        self._images = np.ascontiguousarray(images if images.ndim == 4 else images[..., None])
        self.labels = np.asarray(labels, np.int64)
        if len(self._images) != len(self.labels):
            raise ValueError(f"{len(self._images)} images but {len(self.labels)} labels")

    def __len__(self) -> int:
        return len(self.labels)

    def fetch(self, indices: NDArray[np.int64], size: int) -> Images:
        """Copy images out; see `ImageSource.fetch`."""
        picked: Image = self._images[indices]
        return picked


class Subset:
    """Some of another source's images, numbered anew from 0."""

    def __init__(self, source: ImageSource, indices: NDArray[np.int64]) -> None:
        self._source = source
        self._indices = indices
        self.labels: NDArray[np.int64] = source.labels[indices]

    def __len__(self) -> int:
        return len(self._indices)

    def fetch(self, indices: NDArray[np.int64], size: int) -> Images:
        """Fetch from the underlying source; see `ImageSource.fetch`."""
        return self._source.fetch(self._indices[indices], size)
