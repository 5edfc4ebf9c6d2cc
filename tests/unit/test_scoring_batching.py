"""The batch size is found by trying."""

from __future__ import annotations

import pytest

from memmc.scoring.batching import find_batch_size


class Machine:
    """Takes `fixed` seconds a batch and `each` seconds an image, up to `cores` images at a time."""

    def __init__(self, fixed: float, each: float, fits: int = 1 << 20, error: type[Exception] = RuntimeError) -> None:
        self.now, self.fixed, self.each, self.fits, self.error = 0.0, fixed, each, fits, error
        self.tried: list[int] = []

    def run(self, size: int) -> None:
        self.tried.append(size)
        if size > self.fits:
            raise self.error("CUDA out of memory")
        self.now += self.fixed + self.each * size

    def clock(self) -> float:
        return self.now


def test_doubling_ends_where_the_rate_stops_rising():
    machine = Machine(fixed=0.1, each=0.01)
    assert find_batch_size(machine.run, clock=machine.clock) == 128  # 256 brings 3.8 % more
    flat = Machine(fixed=0.0, each=0.01)
    assert find_batch_size(flat.run, clock=flat.clock) == 8


def test_it_ends_where_memory_does():
    machine = Machine(fixed=10.0, each=0.001, fits=32)
    assert find_batch_size(machine.run, clock=machine.clock) == 32
    assert max(machine.tried) == 64
    machine = Machine(fixed=10.0, each=0.001)
    found = find_batch_size(machine.run, clock=machine.clock, memory=lambda: (machine.tried[-1] * 1e6, 256e6))
    assert found == 64  # the next would take more than a quarter of what is free
    assert find_batch_size(Machine(10.0, 0.001).run, largest=16, clock=Machine(0, 0).clock) <= 16


def test_another_error_is_not_taken_for_a_full_memory():
    machine = Machine(fixed=1.0, each=0.0, fits=16)

    def run(size: int) -> None:
        if size > 16:
            raise RuntimeError("shapes do not match")
        machine.run(size)

    with pytest.raises(RuntimeError, match="shapes"):
        find_batch_size(run, clock=machine.clock)
