"""Which layers --transformer-impl means."""

import pytest

from sedd_megatron.config import PrecisionOptions
from sedd_megatron.parallel import cpu_backend


@pytest.mark.parametrize("has_engine", [False, True])
@pytest.mark.parametrize("for_training", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_auto_takes_transformer_engine_for_bf16_training_alone(has_engine, for_training, bf16):
    cpu_backend.install()
    from sedd_megatron.model.layer_spec import takes_transformer_engine

    automatic = takes_transformer_engine(PrecisionOptions(bf16=bf16), for_training, has_engine)
    assert automatic == (has_engine and for_training and bf16)
    for name, expected in (("local", False), ("transformer_engine", True)):
        assert takes_transformer_engine(PrecisionOptions(bf16, name), for_training, has_engine) == expected
