"""The script for machines with a GPU, on the CPU with the smallest sizes."""

import json
from pathlib import Path

import pytest
import torch
from helpers.modules import load_module

check = load_module(Path(__file__).with_name("check.py"))


@pytest.mark.slow
def test_it_passes_on_a_cpu_and_writes_what_it_found(tmp_path, capsys):
    assert check.main(["--device", "cpu", "--small", "--out", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert all(each["ok"] for each in found["checks"]) and found["card"] == "cpu"
    assert len([each for each in found["checks"] if each["name"].startswith("conversion ")]) == 8
    assert len(found["timings"]) == 12
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(table) == 1 + 12


def test_what_differs_fails(monkeypatch, tmp_path):
    """A schedule that is off by a thousandth, and a comparison that raises; the rest is run."""
    checks = check.Checks(torch.device("cpu"), small=True)
    exact = checks.bench.Scheduled.forward
    checks.check("right", 2e-5, lambda: checks.differs("gpt2", "rebuild", check.MODES[0]))
    monkeypatch.setattr(
        checks.bench.Scheduled,
        "forward",
        lambda self, x: exact(self, x) * (1.001 if self.schedule == "rebuild" else 1),
    )
    checks.check("wrong", 2e-5, lambda: checks.differs("gpt2", "rebuild", check.MODES[0]))
    checks.check("timed", None, lambda: checks.timed("gpt2", 1, torch.float32, False))
    assert [each.is_ok for each in checks.found] == [True, False, False]
    assert checks.found[1].value == pytest.approx(1e-3, rel=0.1)
    assert checks.found[2].error.startswith("AssertionError: rebuild differs by 0.001")


def test_the_exit_status_says_so(monkeypatch):
    monkeypatch.setattr(check.Checks, "run", lambda self: self.check("x", 1.0, lambda: 2.0))
    assert check.main(["--device", "cpu", "--small"]) == 1
