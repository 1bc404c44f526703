"""For tests of what is compiled for GPUs, through the CPU's compiler where there is one."""

import shutil

import pytest


def needs_compiler(value):
    """`value` as a test's parameter, skipped where torch.compile would find no C++ compiler."""
    missing = not any(shutil.which(name) for name in ("g++", "clang++", "c++"))
    return pytest.param(value, marks=pytest.mark.skipif(missing, reason="needs a C++ compiler, and there is none"))
