"""These tests need a GPU and are skipped, with the reason, where there is none: bash tests/run.sh tests/gpu"""

import importlib.util

import pytest
import torch

# Asked when the tests are collected: a test that installs the CPU backend changes torch's answer for good.
HAS_GPU = torch.cuda.is_available()
HAS_TRANSFORMER_ENGINE = importlib.util.find_spec("transformer_engine") is not None


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/gpu" not in str(item.path):
            continue
        if not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a GPU, and torch finds none"))
        elif "transformer_engine" in item.keywords and not HAS_TRANSFORMER_ENGINE:
            item.add_marker(pytest.mark.skip(reason="needs Transformer Engine: pip install -e '.[gpu]'"))


def pytest_configure(config):
    config.addinivalue_line("markers", "transformer_engine: needs the extra 'gpu'")
