"""The moving average against its definition."""

import math

import pytest
import torch

from sedd_megatron.training.ema import ExponentialMovingAverage
from sedd_megatron.training.main_parameters import MainParameter


def average_of(main: torch.Tensor, copy_to_model, decay: float, interval: int = 1) -> ExponentialMovingAverage:
    return ExponentialMovingAverage([MainParameter(main, None, None)], copy_to_model, decay, interval)


def test_average_is_the_weighted_sum_of_all_weights():
    weight = torch.randn(2, 3)
    history = [weight.double().clone()]
    ema = average_of(weight, lambda: None, decay=0.9)
    for step in range(1, 200):
        weight.add_(torch.randn(2, 3))
        ema.update(step)
        history.append(weight.double().clone())
    expected = history[0]
    for step, past in enumerate(history[1:], start=1):
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * past
    torch.testing.assert_close(ema.averages[0].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("interval", [1, 4, 7])
def test_an_interval_is_taken_in_as_if_its_last_weights_had_been_there_throughout(interval):
    weight = torch.randn(2, 3)
    ema, expected = average_of(weight, lambda: None, decay=0.9, interval=interval), weight.double().clone()
    for step in range(1, 200):
        weight.add_(torch.randn(2, 3))
        before = ema.averages[0].clone()
        ema.update(step)
        if step % interval:
            assert torch.equal(ema.averages[0], before)
            continue
        for past in range(step - interval + 1, step + 1):
            decay = min(0.9, (1 + past) / (10 + past))
            expected = decay * expected + (1 - decay) * weight.double()
        torch.testing.assert_close(ema.averages[0].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 1), (4, 3)])
def test_another_interval_takes_each_step_in_once(before, after):
    """Resumed in the middle of an interval: the decays of all steps up to the last update, each once."""
    weight = torch.zeros(1)
    ema = average_of(weight, lambda: None, decay=0.9, interval=before)
    ema.averages[0].fill_(1.0)
    for step in range(1, 11):
        ema.update(step)
    resumed = average_of(weight, lambda: None, decay=0.9, interval=after)
    resumed.averages[0].copy_(ema.averages[0])
    resumed.last_update = 10 - 10 % before
    for step in range(11, 13):
        resumed.update(step)
    # Of weights that are 0 the average keeps the product of all decays.
    expected = math.prod(min(0.9, (1 + step) / (10 + step)) for step in range(1, 13))
    torch.testing.assert_close(resumed.averages[0], torch.tensor([expected]))


def test_swapping_in_gives_weights_and_averages_back_bitwise():
    weight = torch.nn.Parameter(torch.randn(4, 5, dtype=torch.bfloat16))
    main = weight.detach().float() + 2.0**-12

    def copy_to_model():
        with torch.no_grad():
            weight.copy_(main)

    copy_to_model()
    ema = average_of(main, copy_to_model, decay=0.5)
    main.add_(1 / 3)
    copy_to_model()
    ema.update(1)
    before, main_before, average_before = weight.detach().clone(), main.clone(), ema.averages[0].clone()
    with ema.swapped_in():
        assert torch.equal(weight, average_before.bfloat16())
        assert not torch.equal(weight, before)
    assert torch.equal(weight, before)
    assert torch.equal(main, main_before)
    assert torch.equal(ema.averages[0], average_before)
