"""Random choices that are pure functions of where they are used: order, subsets, augmentation.

Nothing here keeps state: a choice depends on (seed, epoch, sample) alone, so a resumed run, another batch
size or another thread timing sees the same data. The bits come from the finaliser of SplitMix64 (Steele, Lea
and Flood, "Fast splittable pseudorandom number generators", 2014), used as a counter-based generator; unlike
numpy's generators, its stream can never change with a library's version.
"""

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from common.seeding import derive_seed

Bits: TypeAlias = NDArray[np.uint64]
Ids: TypeAlias = NDArray[np.int64]

FIXED_SEED = 20
"""Of what must not vary from run to run: the digits' split, and which test samples a limit keeps."""


def draw(ids: Ids, *path: int | str) -> Bits:
    """Draw 64 random bits for every sample.

    Args:
        ids: sample ids, any shape.
        path: where the bits are used, such as ``(seed, epoch, "flip")``.

    Returns:
        Bits of the shape of `ids`; those of one sample do not depend on which others are asked for.
    """
    z = (ids.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z ^= np.uint64(derive_seed(*path))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (30, 0xBF58476D1CE4E5B9)):
        z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
    mixed: Bits = z ^ (z >> np.uint64(31))
    return mixed


def below(bits: Bits, limit: int) -> Ids:
    """Turn random bits into integers in ``[0, limit)``, for a limit under 2**32."""
    scaled: Ids = (((bits >> np.uint64(32)) * np.uint64(limit)) >> np.uint64(32)).astype(np.int64)
    return scaled


def epoch_order(n: int, seed: int, epoch: int) -> Ids:
    """Order the samples of one epoch.

    Args:
        n: number of samples.
        seed: the run's seed.
        epoch: number of the epoch, from 0.

    Returns:
        A permutation of ``range(n)``, a pure function of the arguments.
    """
    return np.argsort(draw(np.arange(n), seed, "order", epoch), kind="stable")


def balanced_subset(labels: NDArray[np.int64], limit: int, seed: int) -> Ids:
    """Choose `limit` samples with as equal a share of every class as the classes allow.

    Returns:
        Sorted indices; all of them when there are no more than `limit`. A larger limit keeps what a smaller
        one chose.
    """
    n = len(labels)
    bits = draw(np.arange(n), seed, "subset")
    by_class = np.lexsort((bits, labels))
    _, starts, counts = np.unique(labels[by_class], return_index=True, return_counts=True)
    rank = np.empty(n, np.int64)
    rank[by_class] = np.arange(n) - np.repeat(starts, counts)
    # Ties between classes are broken at random: the first class must not win every uneven limit.
    return np.sort(np.lexsort((bits, rank))[:limit])
