"""Randomness as a function: every draw depends only on (seed, epoch, position, purpose).

The generator is SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014) addressed by
counter: output n of the stream with a given key costs the same for any n. A worker therefore draws only for its own positions,
and N workers together draw exactly what one worker would. There is no state to checkpoint, and a resumed run gets the same draws
as an uninterrupted one. Draws are made on the host: they are tiny, and equal for every device.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)

Positions = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


def key(*parts: int | str) -> int:
    """The 64-bit key of the stream named by the parts (seed, epoch, purpose, ...)."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def bits(stream: int, positions: Positions, draws: int) -> npt.NDArray[np.uint64]:
    """64 random bits for each position and draw, shape (B, draws); row i depends on ``positions[i]`` alone."""
    counter = positions.astype(np.uint64)[:, None] * np.uint64(draws) + np.arange(1, draws + 1, dtype=np.uint64)
    # Arrays of uint64 wrap around, as the generator requires.
    z = np.add(np.uint64(stream), counter * _GAMMA, dtype=np.uint64)
    z = (z ^ (z >> np.uint64(30))) * _MIX_1
    z = (z ^ (z >> np.uint64(27))) * _MIX_2
    mixed: npt.NDArray[np.uint64] = z ^ (z >> np.uint64(31))
    return mixed


def uniform(stream: int, positions: Positions, draws: int) -> Floats:
    """Uniform numbers in [0, 1) with 53 random bits, shape (B, draws)."""
    result: Floats = np.right_shift(bits(stream, positions, draws), np.uint64(11)).astype(np.float64) * 2.0**-53
    return result


def permutation(stream: int, size: int) -> Positions:
    """A random order of ``range(size)``, shape (size,)."""
    order: Positions = np.argsort(bits(stream, np.arange(size), 1)[:, 0], kind="stable")
    return order


@contextmanager
def seeded(*parts: int | str) -> Iterator[None]:
    """Run the body with torch's host generator seeded from the parts, and restore the generator afterwards.

    Used for initial weights, keyed by (seed, module path), so that an additional module does not change the others.
    """
    import torch  # only here: checks of a configuration draw numbers without torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(*parts) >> 1)
        yield
