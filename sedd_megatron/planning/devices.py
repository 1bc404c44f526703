"""GPUs and the links between them, from the vendor's data sheets; and how much of that a training run gets."""

from dataclasses import dataclass

from sedd_megatron.training.estimates import peak_tflops

# What runs reach of the data sheets' numbers. Memory and links: usual results of STREAM-like kernels and of nccl-tests
# (235 of 300 GB/s on an A100's NVLink), rounded down.
MEMORY_SHARE = 0.8
LINK_SHARE = 0.8
# Of tensor-parallel communication, what --tp-comm-overlap leaves to be waited for: a guess that no table tells from
# others.
TENSOR_EXPOSED = 0.5
# Attention in one kernel, forward and backward together: Dao, arXiv 2307.08691, section 4.1, on an A100; Shah et al.,
# arXiv 2407.08608, section 4.1, on an H100.
ATTENTION_SHARE = 0.5
# Of a large matrix product, by generation, for Ampere's power is not its limit and Hopper's is. These two, and no
# other number here, are fitted: to Megatron-LM's published tables (tests/benchmarks/results/plan.md).
AMPERE_PRODUCT_SHARE, HOPPER_PRODUCT_SHARE = 0.8, 0.62


@dataclass(frozen=True)
class Device:
    """One GPU as its node has it; bytes, bytes per second in one direction, operations per second."""

    name: str
    memory: float
    memory_bandwidth: float
    nvlink: float
    network: float
    product_share: float
    peak_name: str  # in training/estimates.py

    def peak_flops(self, fp8: bool) -> float | None:
        """Dense peak of the matrix units; None where they have no FP8."""
        peak = peak_tflops(self.peak_name, fp8)
        return None if peak is None else peak * 1e12


# The data sheet's gigabytes are taken as 10^9 bytes; what devices have beyond that is left to the allocator's gaps.
# Networks are those of the vendor's own nodes, one adapter a GPU.
DEVICES = {
    device.name: device
    for device in (
        # NVIDIA A100 data sheet (June 2021); DGX A100 data sheet: HDR InfiniBand, 200 Gb/s a GPU.
        Device("a100-40gb", 40e9, 1.555e12, 300e9, 25e9, AMPERE_PRODUCT_SHARE, "A100"),
        Device("a100", 80e9, 2.039e12, 300e9, 25e9, AMPERE_PRODUCT_SHARE, "A100"),
        # NVIDIA H100 data sheet, SXM; DGX H100 data sheet: NDR InfiniBand, 400 Gb/s a GPU.
        Device("h100", 80e9, 3.35e12, 450e9, 50e9, HOPPER_PRODUCT_SHARE, "H100"),
        # NVIDIA H200 data sheet, SXM; DGX H200 data sheet.
        Device("h200", 141e9, 4.8e12, 450e9, 50e9, HOPPER_PRODUCT_SHARE, "H200"),
        # DGX B200 data sheet, an eighth of it: 1,440 GB, 64 TB/s, 14.4 TB/s of NVLink, 400 Gb/s a GPU. No published run
        # says what share of its peak products reach; Hopper's is taken.
        Device("b200", 180e9, 8e12, 900e9, 50e9, HOPPER_PRODUCT_SHARE, "B200"),
    )
}


@dataclass(frozen=True)
class Cluster:
    """GPUs of one kind in nodes of one size."""

    gpus: int
    gpus_per_node: int
    device: Device
