"""Times between 1 and time_eps: closed forms, order and errors."""

import math

import pytest
import torch

from sedd_megatron.diffusion.time_grid import TIME_GRIDS, sampling_times

CLOSED_FORM = {
    "uniform": {1: [1, 0], 4: [1, 0.75, 0.5, 0.25, 0]},
    "cosine": {1: [1, 0], 2: [1, math.sqrt(0.5), 0], 3: [1, math.sqrt(0.75), 0.5, 0]},
}


@pytest.mark.parametrize(("name", "steps"), [(name, steps) for name, cases in CLOSED_FORM.items() for steps in cases])
@pytest.mark.parametrize("time_eps", [0.0, 1e-5, 0.3])
def test_times_have_their_closed_form(name, steps, time_eps):
    expected = [time_eps + (1 - time_eps) * t for t in CLOSED_FORM[name][steps]]
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(sampling_times(name, steps, time_eps), expected, rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize("name", TIME_GRIDS)
@pytest.mark.parametrize("steps", [1, 7, 128, 4096, 100_000])
def test_times_fall_from_one_to_time_eps(name, steps):
    times = sampling_times(name, steps, 1e-5)
    assert times.shape == (steps + 1,)
    assert times[0] == 1
    assert times[-1] == 1e-5
    assert (times.diff() < 0).all()
    assert sampling_times(name, steps, 0.0)[-1] == 0


def test_cosine_steps_grow_along_the_way_and_uniform_ones_do_not():
    assert (sampling_times("cosine", 50, 1e-5).diff().diff() < 0).all()
    torch.testing.assert_close(
        sampling_times("uniform", 50, 0.0).diff(), torch.full((50,), -0.02).double(), rtol=1e-7, atol=0
    )


@pytest.mark.parametrize("steps", [0, -1])
def test_fewer_than_one_step_is_refused(steps):
    with pytest.raises(ValueError, match=f"num_steps {steps} must be at least 1"):
        sampling_times("uniform", steps, 1e-5)


def test_an_unknown_grid_names_the_known():
    with pytest.raises(ValueError, match="'sine' does not exist; choose one of uniform, cosine"):
        sampling_times("sine", 4, 1e-5)
