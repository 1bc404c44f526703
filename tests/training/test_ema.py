"""The moving average against its definition."""

import types

import torch

from sedd_megatron.training.ema import ExponentialMovingAverage


def small_model(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    model = torch.nn.Linear(3, 2).to(dtype)
    model.config = types.SimpleNamespace(bf16=dtype == torch.bfloat16)
    return model


def test_average_is_the_weighted_sum_of_all_weights():
    model = small_model()
    history = [model.weight.detach().double().clone()]
    ema = ExponentialMovingAverage(model, decay=0.9)
    for step in range(1, 200):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3))
        ema.update(step)
        history.append(model.weight.detach().double().clone())
    expected = history[0]
    for step, weight in enumerate(history[1:], start=1):
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight
    torch.testing.assert_close(ema.averages["weight"].double(), expected, rtol=1e-5, atol=1e-6)


def test_bfloat16_weights_are_averaged_by_their_float32_main_copy():
    model = small_model(torch.bfloat16)
    for parameter in model.parameters():
        parameter.main_param = parameter.detach().float() + 2.0**-12
    ema = ExponentialMovingAverage(model, decay=0.0)
    ema.update(10**6)
    assert torch.equal(ema.averages["weight"], model.weight.main_param)
    assert not torch.equal(ema.averages["weight"], model.weight.detach().float())


def test_swapping_in_gives_the_weights_back_bitwise():
    model = small_model()
    ema = ExponentialMovingAverage(model, decay=0.5)
    with torch.no_grad():
        model.weight.add_(1 / 3)
    before = model.weight.detach().clone()
    with ema.swapped_in():
        assert torch.equal(model.weight, ema.averages["weight"])
        assert not torch.equal(model.weight, before)
    assert torch.equal(model.weight, before)
