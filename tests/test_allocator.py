"""Memory that is freed is kept for the next tensors while a conversion writes, and handed back then."""

import ctypes
import json
import subprocess
import sys

import pytest

from mpoe_convert.allocator import keeping_freed_memory

is_glibc = sys.platform.startswith("linux") and hasattr(ctypes.CDLL(None), "gnu_get_libc_version")

SIZE = 64 << 20
# A process of its own: what other tests freed would be reused here, within and without.
SCRIPT = f"""
import json, resource
from contextlib import suppress
import numpy
from mpoe_convert.allocator import keeping_freed_memory

def page_faults(number=8):  # pages that the kernel clears for arrays that are made one after the other
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(number):
        numpy.ones({SIZE}, dtype=numpy.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

found = {{"outside": page_faults()}}
with keeping_freed_memory():
    page_faults(1)  # it grows once
    found["inside"] = page_faults()
    kept = resident()
found["handed back"] = kept - resident()
with suppress(ZeroDivisionError), keeping_freed_memory():
    page_faults(1)
    kept = resident()
    raise ZeroDivisionError
found["after an error"] = kept - resident()
print(json.dumps(found))
"""


@pytest.mark.skipif(not is_glibc, reason="glibc alone is told")
def test_large_tensors_reuse_memory_meanwhile_and_give_it_back():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert 2 * found["inside"] < found["outside"]  # small blocks may split what was freed
    assert found["handed back"] > SIZE // 2 and found["after an error"] > SIZE // 2


def test_other_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr("mpoe_convert.allocator.sys.platform", "darwin")
    monkeypatch.setattr(
        "mpoe_convert.allocator.ctypes.CDLL", lambda name: pytest.fail("it was told something")
    )
    with keeping_freed_memory():
        pass
