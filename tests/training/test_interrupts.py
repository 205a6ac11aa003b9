"""Signals: the first ends a run after its step, the second at once, and others' handlers come back."""

import signal
from types import SimpleNamespace

import pytest

from mpoe_convert.training.interrupts import Interrupted, StopOnSignal

ARGS = SimpleNamespace(world_size=1, save_strategy="steps")
STATE = SimpleNamespace(global_step=7)


def control():
    return SimpleNamespace(should_save=False, should_log=False)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_step_is_finished(number):
    before, told = signal.getsignal(number), []
    stop, asked, quiet = StopOnSignal(told.append), control(), control()
    with pytest.raises(Interrupted, match=f"{number.name} .*7") as stopped, stop.listening():
        stop.on_step_begin(ARGS, STATE, asked)
        stop.on_step_end(ARGS, STATE, quiet)
        stop.on_save(ARGS, STATE, quiet)  # a step's checkpoint without a signal
        signal.raise_signal(number)
        stop.on_step_end(ARGS, STATE, asked)
        stop.on_save(ARGS, STATE, asked)
    assert (quiet.should_save, asked.should_save, asked.should_log) == (False, True, True)
    assert stopped.value.number == number and stopped.value.step == 7 and told == [number]
    assert signal.getsignal(number) == before


def test_the_second_ends_at_once():
    stop = StopOnSignal()
    with pytest.raises(KeyboardInterrupt) as stopped, stop.listening():
        stop.on_step_begin(ARGS, STATE, control())
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    assert not isinstance(stopped.value, Interrupted)


def test_workers_go_on(monkeypatch):
    """A terminal sends Ctrl-C to the processes that load data as well, which were born with the handler."""
    told = []
    stop = StopOnSignal(told.append)
    with stop.listening():
        monkeypatch.setattr("os.getpid", lambda: -1)
        signal.raise_signal(signal.SIGINT)
        monkeypatch.undo()
    assert not told and not stop.number


@pytest.mark.parametrize("moment", ["before the first step", "after the last"])
def test_without_a_step_to_wait_for(moment):
    stop = StopOnSignal()
    with pytest.raises(KeyboardInterrupt) as stopped, stop.listening():
        if moment == "after the last":
            stop.on_step_begin(ARGS, STATE, control())
            stop.on_train_end(ARGS, STATE, control())
        signal.raise_signal(signal.SIGINT)
    assert not isinstance(stopped.value, Interrupted)


def test_during_the_last_evaluation():
    """Nothing is lost: the last step has a checkpoint, unless none is to be saved at all."""
    for strategy in ("steps", "no"):
        stop, args = StopOnSignal(), SimpleNamespace(world_size=1, save_strategy=strategy)
        with stop.listening():
            stop.on_step_begin(args, STATE, control())
            signal.raise_signal(signal.SIGTERM)
            if strategy == "steps":
                with pytest.raises(Interrupted):
                    stop.on_train_end(args, STATE, control())
            else:
                stop.on_train_end(args, STATE, control())


def test_what_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopOnSignal().listening():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
