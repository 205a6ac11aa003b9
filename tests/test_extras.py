"""Optional libraries that are missing or too old are told in a line."""

import importlib.metadata

import pytest

from mpoe_convert import extras
from mpoe_convert.errors import LibraryError


def test_a_library_that_is_missing_is_told():
    with pytest.raises(LibraryError, match=r"^finetune needs no_such: install them with .*\[train\]'$"):
        extras.need("finetune", "json", "no_such", extra="train")


def test_a_library_that_is_too_old_is_told_with_both_versions(monkeypatch):
    asked = ["accelerate>=1.3; extra == 'train'", "datasets>=5.1; extra == 'train'", "click>=8.4"]
    monkeypatch.setattr(extras, "requires", lambda name: asked)
    monkeypatch.setattr(extras, "version", lambda name: {"accelerate": "1.1.0"}.get(name, "99.0.1"))
    expected = r"^finetune needs accelerate>=1\.3 \(found 1\.1\.0\): install them with pip"
    with pytest.raises(LibraryError, match=expected):
        extras.need("finetune", "accelerate", "datasets", "sklearn", extra="train")
    assert extras.need("report", "accelerate", extra="report") is None  # which asks for no accelerate


def test_without_metadata_nothing_is_compared(monkeypatch):
    def unknown(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(extras, "requires", unknown)
    assert extras.need("finetune", "accelerate", extra="train") is None


def test_a_distribution_is_known_by_its_own_name(monkeypatch):
    """`compressed_tensors` is imported, `compressed-tensors` is installed and asked for."""
    monkeypatch.setattr(extras, "find_spec", lambda name: True)
    monkeypatch.setattr(extras, "requires", lambda name: ["compressed-tensors>=0.15; extra == 'bits'"])
    monkeypatch.setattr(extras, "version", lambda name: "0.14.0")
    with pytest.raises(LibraryError, match=r"compressed-tensors>=0\.15 \(found 0\.14\.0\)"):
        extras.need("--bits", "compressed_tensors", extra="bits")
