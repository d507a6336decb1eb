"""The protocol of comparing speeds: alternating, warmed up, by ratios within a round."""

import time

import pytest
import torch

from noise2tokens import benchmark
from noise2tokens.benchmark import compare, mfu, peak_memory


class Clock:
    """A clock that calls move, so that what is measured is known."""

    def __init__(self, monkeypatch):
        self.now, self.order = 0.0, []
        monkeypatch.setattr(benchmark.time, "perf_counter", lambda: self.now)

    def call(self, name, seconds):
        def run():
            self.order.append(name)
            self.now += seconds(self.now) if callable(seconds) else seconds

        return run


def test_medians_and_ratios_on_a_known_clock(monkeypatch):
    clock = Clock(monkeypatch)
    calls = {"a": clock.call("a", 0.01), "b": clock.call("b", 0.03)}
    found = compare(calls, seconds=1.0, rounds=5)
    assert found["a"].seconds == pytest.approx(0.01) and found["a"].ratio == 1
    assert found["b"].seconds == pytest.approx(0.03) and found["b"].ratio == pytest.approx(3)
    assert found["b"].rounds == 5 and found["b"].low == pytest.approx(found["b"].high)
    # about a second each, after half a second of warm-up
    assert clock.order.count("a") == pytest.approx(150, abs=3)
    assert clock.order.count("b") == pytest.approx(50, abs=6)


def test_a_machine_that_slows_down_does_not_change_the_ratio(monkeypatch):
    clock = Clock(monkeypatch)
    slowing = 1.0  # the machine is twice as slow after a second
    calls = {
        "a": clock.call("a", lambda now: 0.001 * (1 + now / slowing)),
        "b": clock.call("b", lambda now: 0.002 * (1 + now / slowing)),
    }
    found = compare(calls, seconds=0.05, rounds=9)
    assert found["b"].ratio == pytest.approx(2, rel=0.1)


def test_a_disturbed_round_does_not_change_the_ratio(monkeypatch):
    clock = Clock(monkeypatch)
    calls = {
        "a": clock.call("a", 0.1),
        "b": clock.call("b", lambda now: 5.0 if 2 < now < 2.3 else 0.2),
    }
    found = compare(calls, seconds=1.0, rounds=5)
    assert found["b"].ratio == pytest.approx(2) and found["b"].seconds == pytest.approx(0.2)
    assert clock.now > 7  # it was disturbed


def test_rounds_alternate_and_turn_around(monkeypatch):
    clock = Clock(monkeypatch)
    compare({name: clock.call(name, 1.0) for name in "abc"}, seconds=1.0, rounds=3)
    assert "".join(clock.order[-9:]) == "abccbaabc"


def test_real_calls_are_told_apart():
    found = compare(
        {"short": lambda: time.sleep(0.001), "long": lambda: time.sleep(0.004)}, seconds=0.1
    )
    assert 2 < found["long"].ratio < 6


@pytest.mark.parametrize("bad", [{"calls": {}}, {"rounds": 2}, {"seconds": 0.0}])
def test_bad_settings_are_named(bad):
    with pytest.raises(ValueError, match="need calls"):
        compare(**({"calls": {"a": lambda: None}} | bad))


def test_mfu_is_the_share_of_the_peak():
    assert mfu(6e12, 2.0, 12e12) == 0.25
    for bad in [(0.0, 1.0, 1.0), (1.0, 0.0, 1.0), (1.0, 1.0, -1.0)]:
        with pytest.raises(ValueError, match="positive"):
            mfu(*bad)


def test_memory_is_accounted_for_on_a_gpu_only():
    with pytest.raises(ValueError, match="CUDA"):
        peak_memory(lambda: None, torch.device("cpu"))


@pytest.mark.cuda
def test_peak_memory_is_what_a_call_adds():
    held = torch.zeros(1 << 20, device="cuda")
    found = peak_memory(lambda: held + held, torch.device("cuda"))
    assert found == 4 << 20
