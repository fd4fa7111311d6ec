"""Noise of step times: mean 1, the stated spread, the same by step index."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from servecast.sim.hardware.noise import StepNoise
from servecast.sim.inputs.errors import InputError


def draw(noise: StepNoise, count: int, seed: int = 1) -> np.ndarray:
    return np.array(list(islice(noise.factors(np.random.default_rng(seed)), count)))


NOISES = [StepNoise(0.05), StepNoise(0.3), StepNoise(0.0, 0.01, 5.0), StepNoise(0.1, 0.02, 3.0)]


@pytest.mark.parametrize("noise", NOISES)
def test_mean_one_and_the_stated_spread(noise: StepNoise) -> None:
    factors = draw(noise, 200_000)
    second = (1 + noise.cv**2) * (1 + noise.stall_probability * (noise.stall_factor**2 - 1))
    mean_stall = 1 + noise.stall_probability * (noise.stall_factor - 1)
    spread = np.sqrt(second / mean_stall**2 - 1)
    assert factors.mean() == pytest.approx(1.0, abs=5 * spread / np.sqrt(len(factors)))
    assert factors.std() == pytest.approx(spread, rel=0.06)
    assert factors.min() > 0


def test_no_noise_is_exactly_one_and_draws_nothing() -> None:
    rng = np.random.default_rng(7)
    assert list(islice(StepNoise().factors(rng), 3)) == [1.0, 1.0, 1.0]
    assert rng.random() == np.random.default_rng(7).random()


def test_the_nth_step_draws_the_nth_factor() -> None:
    noise = StepNoise(0.1, 0.01, 4.0)
    assert (draw(noise, 10_000) == draw(noise, 10_000)).all()
    assert (draw(noise, 10_000)[:5000] == draw(noise, 5000)).all()
    assert type(next(noise.factors(np.random.default_rng(1)))) is float


@pytest.mark.parametrize(
    ("field", "value"),
    [("cv", -0.1), ("stall_probability", 1.0), ("stall_factor", 0.5), ("cv", float("nan"))],
)
def test_impossible_noise_is_refused(field: str, value: float) -> None:
    with pytest.raises(InputError, match=f"noise.{field}"):
        StepNoise(**{field: value})
