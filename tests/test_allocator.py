"""Memory that is freed is kept for the next tensors while a conversion writes, and handed back then."""

import ctypes
import sys

import pytest
import torch

from mpoe_convert.allocator import keeping_freed_memory

resource = pytest.importorskip("resource")
if not (sys.platform.startswith("linux") and hasattr(ctypes.CDLL(None), "gnu_get_libc_version")):
    pytest.skip("glibc alone is told", allow_module_level=True)

SIZE = 64 << 20


def page_faults(number: int = 8) -> int:
    """Pages that the kernel clears for large tensors that are made one after the other.

    Small blocks in between may split what was freed, so that memory grows once more while it is reused.
    """
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(number):
        torch.ones(SIZE, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def test_large_tensors_reuse_memory_meanwhile_and_give_it_back():
    outside = page_faults()
    with keeping_freed_memory():
        page_faults(1)  # it grows once
        assert 2 * page_faults() < outside
        kept = resident()
    assert kept - resident() > SIZE // 2
    assert 2 * page_faults() > outside


def test_an_error_ends_it_too():
    with pytest.raises(ZeroDivisionError), keeping_freed_memory():
        page_faults(1)
        raise ZeroDivisionError
    with keeping_freed_memory():
        page_faults(1)
        inside = page_faults()
    assert page_faults() > 2 * inside


def test_other_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr("mpoe_convert.allocator.sys.platform", "darwin")
    with keeping_freed_memory():
        page_faults(1)
        inside = page_faults()
    assert 2 * inside > page_faults()
