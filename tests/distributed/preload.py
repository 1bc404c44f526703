"""What a rank needs before its own script, imported once in the process that ranks are forked from.

With a GPU only torch: a fork has no use for a CUDA context, and each rank decides itself where it computes.
"""

import shutil

import torch  # noqa: F401

if shutil.which("nvidia-smi") is None:
    from sedd_megatron.parallel import cpu_backend

    cpu_backend.install()

    import sedd_megatron.training.loop
    import sedd_megatron.training.pretrain  # noqa: F401
