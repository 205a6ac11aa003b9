"""Passes that wait for each other."""

import pytest
import torch
from helpers.calibration import CPU

from mpoe_convert.compression.dense_run import DenseRun
from mpoe_convert.compression.lockstep import Lockstep, LockstepWalk
from mpoe_convert.compression.stream import run_batch


def test_whoever_waits_goes_on_when_all_wait():
    lockstep, events = Lockstep(), []

    def walk(number: int) -> None:
        for step in range(3 - number):
            events.append((lockstep.current, step))
            lockstep.wait()

    lockstep.run([lambda: walk(0), lambda: walk(1)], lambda: events.append("all wait"))
    first, second = [(0, 0), (1, 0), "all wait"], [(0, 1), (1, 1), "all wait"]
    assert events == [*first, *second, (0, 2), "all wait", "all wait"]


def test_an_error_in_one_ends_all():
    lockstep, ended = Lockstep(), []

    def waits() -> None:
        try:
            lockstep.wait()
        finally:
            ended.append("waits")

    def fails() -> None:
        raise ValueError("from a pass")

    with pytest.raises(ValueError, match="from a pass"):
        lockstep.run([waits, fails], lambda: pytest.fail("not all wait"))
    assert ended == ["waits"]


def test_stop_ends_one_function():
    lockstep, events = Lockstep(), []

    def stops() -> None:
        lockstep.stop()
        pytest.fail("went on")

    lockstep.run([stops, lambda: events.append(lockstep.current)], lambda: None)
    assert events == [1]


class Recorder(LockstepWalk):
    def __init__(self, run, model, fail_at=None):
        super().__init__(run, model)
        self.events, self.fail_at = [], fail_at

    def meet(self, ffn, place, x):
        self.events.append((self.current, ffn.ffn.path, place))
        if self.fail_at == (ffn.ffn.path, place):
            raise ValueError(place)
        self.wait_at(ffn, place)

    def release(self, ffn, place):
        self.events.append((None if ffn is None else ffn.ffn.path, place))

    def leave(self, ffn, matrices, x, y):
        self.events.append((self.current, *sorted(matrix.role for matrix in matrices)))


def test_a_walk_meets_every_ffn_in_lockstep(llama):
    _, checkpoint, planned, batches = llama
    run = DenseRun(planned, checkpoint, tuple(batches[:2]), CPU)
    expected = []
    for ffn in planned.ffns:
        path = ffn.ffn.path
        for place, behind in (("inputs", ["gate", "up"]), ("inner", ["down"])):
            expected.append({(number, path, place) for number in range(2)})
            expected.append({(path, place)})
            expected.append({(number, role) for number in range(2) for role in behind})
    with run.streamed() as model:
        walk = Recorder(run, model)
        walk.walk([lambda batch=batch: run_batch(model, batch) for batch in run.batches])
        assert walk.events[-1] == (None, "")
        # What two passes do between two releases has no order that matters.
        found, rest = [], walk.events[:-1]
        for events in expected:
            found.append({event for event in rest if event in events})
        assert found == expected
        releases = [event for event in walk.events if len(event) == 2 and event[1] in ("inputs", "inner")]
        assert releases == [(ffn.ffn.path, place) for ffn in planned.ffns for place in ("inputs", "inner")]
        for path, place in releases:
            at = walk.events.index((path, place))
            assert {(0, path, place), (1, path, place)} <= set(walk.events[:at])
            assert not {(0, path, place), (1, path, place)} & set(walk.events[at:])


def test_no_hook_is_left_behind(llama):
    _, checkpoint, planned, batches = llama
    run = DenseRun(planned, checkpoint, tuple(batches[:2]), CPU)

    def hooks(model: torch.nn.Module) -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    with run.streamed() as model:
        before = hooks(model)
        walk = Recorder(run, model, fail_at=(planned.ffns[1].ffn.path, "inner"))
        with pytest.raises(ValueError, match="inner"):
            walk.walk([lambda batch=batch: run_batch(model, batch) for batch in run.batches])
        assert hooks(model) == before
