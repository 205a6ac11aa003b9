"""The C library's memory: keep what is freed for the next tensors, instead of handing it back."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# glibc's malloc.h; mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
# glibc's defaults, and the largest thresholds at which its own rule, which `mallopt` ends, arrives.
_MMAP_MAX = 65_536
_MMAP_THRESHOLD = 32 << 20
_TRIM_THRESHOLD = 2 * _MMAP_THRESHOLD
_NEVER = -1  # mallopt(3): disables trimming


@contextmanager
def keeping_freed_memory() -> Iterator[None]:
    """Reuse the memory of large tensors while this lasts; afterwards what is free is handed back.

    glibc gives every block of 32 MiB and more a map of its own, whose pages the kernel clears one by one when
    they are written first, and drops when the block is freed. A conversion makes tensors of the same sizes
    over and over, and spent 5.9 of 12.7 s of the processor so (0.62 B parameters in bfloat16; 2.2 of 9.0 s
    since then). Other C libraries are left as they are.
    """
    library = _glibc()
    if library is None:
        yield
        return
    library.mallopt(_M_MMAP_MAX, 0)
    library.mallopt(_M_TRIM_THRESHOLD, _NEVER)
    try:
        yield
    finally:
        library.mallopt(_M_MMAP_MAX, _MMAP_MAX)
        library.mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD)
        library.mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD)
        library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """The process's C library, if it is glibc."""
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None
