"""Whether all of this works on a GPU, and how fast: bash tests/gpu/check.sh 1 and bash tests/gpu/check.sh 2

Part 1 tells whether it is right, several tests at a time on the one GPU, and trains SEDD-small; part 2 measures. A part
ends within its budget whatever happens, with a table of its steps. Nothing is installed: what the machine lacks of
Megatron-Core and Transformer Engine comes out of a tarball of site-packages, for this Python, torch and GPU.

Written are table.md, logs.tar.gz, and results.tar.gz with the tables that benchmarks wrote to tests/benchmarks/results.
Exit code 1 if a step was not ok, 2 if nothing could be run.
"""

import argparse
import datetime
import hashlib
import importlib.metadata
import importlib.util
import lzma
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

from tests.benchmarks.goals import GOALS
from tests.distributed.launch import REPOSITORY, child_environment
from tests.gpu.runner import Runner, Stage, Step

RESULTS = REPOSITORY / "tests" / "benchmarks" / "results"
# Of SEDD-small; the dense path has no room for more than 16 sequences.
HEAD_AND_LOSS = ("--batch", "16", "--alone-batch", "64", "--length", "1024", "--width", "768", "--chunk-rows", "8192",
                 "--rows", "16384", "65536")  # fmt: skip
SAMPLING = ("--cases", "medium-long", "--samplers", "event-driven")
PYTEST_OPTIONS = ("-p", "no:cacheprovider", "-q", "--tb=short", "-rfEs", "-W", "ignore")
AT_ONCE = 6  # tests on one GPU: most of their time they import, compile and wait
SECONDS_TO_PACK = 3.0
SMALL_LIMIT = 90
SMALL_SECONDS = 70  # what such a step takes


def pytest_step(name: str, limit: float, *selection: str) -> Step:
    """A step of pytest's: tests of this folder."""
    return Step(name, (sys.executable, "-m", "pytest", *PYTEST_OPTIONS, *selection), limit)


def module_step(name: str, limit: float, module_name: str, *arguments: str, goal: str = "") -> Step:
    """A step that is a module of the tests'."""
    return Step(name, (sys.executable, "-m", f"tests.{module_name}", *arguments), limit, goal)


def throughput(shape: str, precision: str, limit: float, *arguments: str) -> Step:
    """A row of the throughput table, its GPT beside it."""
    return module_step(
        f"throughput {shape} {precision}" + "".join(f" {argument.removeprefix('--')}" for argument in arguments),
        limit, "benchmarks.training_throughput", "--shapes", shape, "--precisions", precision, "--steps", "6",
        *arguments, goal=goals(f"{shape} {precision}"),
    )  # fmt: skip


def goals(name: str) -> str:
    """The goal of each device, in words."""
    return ", ".join(f"{device} {of_device[name]}" for device, of_device in GOALS.items() if name in of_device)


HEAD = "tests/gpu/test_head_and_loss.py"
SPECS = "tests/gpu/test_specs.py"
TRAINING = "tests/gpu/test_training.py"
# What tells most, then what takes longest: the last to begin get what is left.
RIGHT = (
    module_step("probe engine", 100, "gpu.probe", "engine"),
    module_step("probe operations", 100, "gpu.probe", "operations"),
    pytest_step("head and loss", 120, HEAD, "-k", "not compiled and not table"),
    pytest_step("layers in bf16", 150, SPECS, "-k", "not fp8_is_near and not checkpoint"),
    pytest_step("FP8 trains", 240, f"{TRAINING}::test_fp8_trains_what_bf16_trains", "-k", "not use and not recompute"),
    pytest_step("FP8 with recompute", 220, f"{TRAINING}::test_fp8_trains_what_bf16_trains", "-k", "recompute"),
    pytest_step("FP8 parameters", 220, f"{TRAINING}::test_fp8_trains_what_bf16_trains", "-k", "use"),
    pytest_step("checkpoints of either layers", 220,
                f"{SPECS}::test_a_checkpoint_is_the_same_model_in_the_other_layers"),
    pytest_step("example over NCCL", 180, f"{TRAINING}::test_the_example_trains_over_nccl_and_resumes"),
    pytest_step("sampling", 180, "tests/gpu/test_sampling.py", "-k", "not table"),
    pytest_step("compilations", 150, f"{TRAINING}::test_nothing_is_compiled_after_the_first_step"),
    pytest_step("FP8 resumes", 180, f"{TRAINING}::test_delayed_scaling_resumes_without_a_bump"),
    *(
        pytest_step(f"FP8 layers {recipe}", 150, f"{SPECS}::test_fp8_is_near_bf16_forward_and_backward", "-k", recipe)
        for recipe in ("delayed", "tensorwise", "blockwise")
    ),
    pytest_step("compiled operations", 120, f"{HEAD}::test_compiled_operations_are_the_plain_ones"),
    pytest_step("check of a layout", 120, f"{TRAINING}::test_verify_layout_passes_on_one_gpu"),
)  # fmt: skip
FAST = (
    module_step("time of head and loss", 80, "benchmarks.loss", *HEAD_AND_LOSS, "--graphs", "absorb", "--pairs", "3",
                "--output", str(RESULTS / "loss_gpu.md"), goal=goals("head and loss")),
    throughput("1.7B", "bf16", 120),
    throughput("7B-slice", "fp8-delayed", 120),
    module_step("time of sampling", 100, "benchmarks.sampling", *SAMPLING, "--pairs", "1", "--output",
                str(RESULTS / "sampling_gpu.md"), goal=goals("sampling")),
    module_step("profile", 80, "gpu.probe", "profile"),
    module_step("probe speeds", 60, "gpu.probe", "speeds"),
    throughput("SEDD-small", "bf16", SMALL_LIMIT),
    throughput("SEDD-small", "fp8-delayed", SMALL_LIMIT),
    throughput("SEDD-medium", "bf16", SMALL_LIMIT),
)  # fmt: skip
PARTS = {
    # The goal is for 64k tokens a step: one micro-batch.
    1: (Stage(RIGHT, AT_ONCE, leave=SMALL_SECONDS),
        Stage((throughput("SEDD-small", "bf16", SMALL_LIMIT, "--micro-batches", "1"),), 1)),
    2: (Stage(FAST, 1),),
}  # fmt: skip


def main(argv: Sequence[str]) -> int:
    start = time.monotonic()
    arguments = parse(argv)
    stages = PARTS[arguments.part]
    if arguments.dry_run:
        print(plan(stages))
        return 0
    try:
        gpu = gpu_in_words()
        packages = unpacked_packages(arguments.packages)
    except (OSError, subprocess.CalledProcessError, tarfile.TarError) as error:
        print(f"error: {error}; --dry-run prints what would be run", file=sys.stderr)
        return 2
    began = time.time()
    runner = Runner(
        arguments.output,
        logs_folder(arguments.part),
        step_environment(packages),
        start + arguments.budget - SECONDS_TO_PACK,
        heading(arguments.part, gpu, packages, argv),
    )
    all_ok = runner.run(stages)
    with tarfile.open(arguments.output / "results.tar.gz", "w:gz") as archive:
        for path in sorted(RESULTS.iterdir()):
            if path.stat().st_mtime >= began:
                archive.add(path, path.relative_to(REPOSITORY))
    print((arguments.output / "table.md").read_text())
    print(f"part {arguments.part} took {time.monotonic() - start:.0f} s; its files are in {arguments.output}")
    return 0 if all_ok else 1


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="bash tests/gpu/check.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", type=int, choices=PARTS)
    parser.add_argument("--budget", type=float, default=340, help="seconds within which the part ends; default: 340")
    parser.add_argument(
        "--packages",
        type=Path,
        default=os.environ.get("GPU_CHECK_PACKAGES", REPOSITORY / ".gpu"),
        help="folder that holds a tarball of Megatron-Core and Transformer Engine (or $GPU_CHECK_PACKAGES); not needed "
        "where they are installed. Default: .gpu",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=os.environ.get("OUT"),
        help="folder to write to (or $OUT); default: runs/gpu_check_N",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the steps and run none; needs no GPU")
    arguments = parser.parse_args(argv)
    arguments.output = Path(arguments.output or REPOSITORY / "runs" / f"gpu_check_{arguments.part}").resolve()
    return arguments


def plan(stages: Sequence[Stage]) -> str:
    """The steps in words."""
    lines = []
    for stage in stages:
        kept = f", the last {stage.leave:.0f} s kept for what follows" if stage.leave else ""
        lines.append(f"{stage.at_once} at a time{kept}:")
        for step in stage.steps:
            command = shlex.join(["python", *step.command[1:]]).replace(str(REPOSITORY) + "/", "")
            lines.append(f"  {step.name}, at most {step.limit:.0f} s: {command}")
    return "\n".join(lines)


def gpu_in_words() -> str:
    """Name, memory and driver.

    Raises:
        FileNotFoundError, CalledProcessError: no NVIDIA driver, or no GPU.
    """
    if shutil.which("nvidia-smi") is None:
        raise FileNotFoundError("no GPU: nvidia-smi is not there")
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    return subprocess.run(query, check=True, capture_output=True, text=True).stdout.splitlines()[0]


def unpacked_packages(folder: Path) -> Path | None:
    """Where the tarball in `folder` has been unpacked to, once for all parts; None where Megatron-Core is installed and
    no tarball is there.

    Raises:
        FileNotFoundError: neither the one nor the other.
        tarfile.ReadError: a damaged tarball, by name.
    """
    tarballs = sorted(folder.glob("*.tar.*"))
    if not tarballs:
        if importlib.util.find_spec("megatron") is None:
            raise FileNotFoundError(f"--packages {folder}: no tarball there, and megatron-core is not installed")
        return None
    digest = hashlib.sha256(tarballs[0].read_bytes()).hexdigest()[:12]
    unpacked = work_folder() / f"packages-{digest}"
    if not unpacked.exists():
        unfinished = Path(tempfile.mkdtemp(dir=work_folder()))
        try:
            with tarfile.open(tarballs[0]) as archive:
                archive.extractall(unfinished, filter="data")
        except (tarfile.TarError, EOFError, lzma.LZMAError, zlib.error) as error:
            raise tarfile.ReadError(f"{tarballs[0]}: damaged ({error})") from error
        unfinished.rename(unpacked)
    return unpacked


def work_folder() -> Path:
    """What the second part takes over from the first: the unpacked packages, compiled code."""
    folder = Path(tempfile.gettempdir()) / "sedd_megatron_gpu_check"
    folder.mkdir(exist_ok=True)
    return folder


def logs_folder(part: int) -> Path:
    """An empty one."""
    folder = work_folder() / f"logs_{part}"
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def step_environment(packages: Path | None) -> dict[str, str]:
    """The environment of every step."""
    own = child_environment()["PYTHONPATH"].split(os.pathsep)
    path = [own[0], *([str(packages)] if packages else []), *own[1:]]
    variables = {
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",  # an aborted process says where it was
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # an image has many, which cost seconds to import
        "OMP_NUM_THREADS": "4",
        "TOKENIZERS_PARALLELISM": "false",
        "NVTE_FRAMEWORK": "pytorch",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "TORCHINDUCTOR_COMPILE_THREADS": "4",  # of each process, and several compile at a time
        "TORCHINDUCTOR_CACHE_DIR": str(work_folder() / "inductor"),
        "TRITON_CACHE_DIR": str(work_folder() / "triton"),
    }
    # Transformer Engine compiles some of its kernels when they are first used; torch brings CUDA's headers along.
    of_torch = importlib.util.find_spec("nvidia")
    roots = [*(of_torch.submodule_search_locations if of_torch else ()), "/usr/local"]
    for include in (Path(root, name, "include") for root in roots for name in ("cu13", "cuda")):
        if (include / "cuda_runtime.h").exists():
            variables.setdefault("NVTE_CUDA_INCLUDE_DIR", str(include))
    return child_environment(**variables)


def heading(part: int, gpu: str, packages: Path | None, argv: Sequence[str]) -> str:
    """The table's title, with the machine in words and the command."""
    versions = [f"Python {platform.python_version()}"]
    path = [str(packages), *sys.path] if packages else sys.path
    for name in ("torch", "triton", "megatron-core", "transformer-engine"):
        found = next(iter(importlib.metadata.distributions(name=name, path=path)), None)
        versions.append(f"{name} {found.version if found else 'missing'}")
    return (
        f"# GPU check, part {part}\n\n{datetime.date.today()}, {gpu}, {os.cpu_count()} CPU cores; "
        f"{', '.join(versions)}\n\n    bash tests/gpu/check.sh {' '.join(argv)}"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
