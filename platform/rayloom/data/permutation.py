"""Pseudo-random permutations that are the same on every machine, in every version, for ever."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray


def permutation(length: int, *key: object) -> NDArray[np.int64]:
    """A permutation of `range(length)`, a pure function of `key`.

    Sorts the raw 64-bit output of the counter-based generator Philox (Salmon et al. 2011), keyed by a hash of `key`.
    NumPy promises that stream to stay as it is; it makes no such promise for `Generator.permutation`.
    """
    digest = hashlib.sha256(ascii(key).encode()).digest()  # `repr` follows the Unicode of its Python
    words = np.frombuffer(digest + bytes(16), dtype="<u8")
    raw = np.random.Philox(key=words[:2], counter=words[2:])
    return np.argsort(raw.random_raw(length), kind="stable")
