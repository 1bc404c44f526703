"""What `pip install` brings: a wheel trains by itself, with the presets of examples/configs and no checkout."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from sedd_megatron import preset_files
from sedd_megatron.arguments import parse_pretrain_options
from sedd_megatron.errors import UserError
from sedd_megatron.wording import how_to_install
from tests.distributed.launch import REPOSITORY
from tests.distributed.layouts import MODEL

PRESETS = "presets are sedd-1.7b, sedd-7b, sedd-medium, sedd-small, tiny"
# In place of Python's own way to an installed command, which is by the same line of the wheel.
START = """
import importlib.metadata, sys
sys.path.insert(0, sys.argv.pop(1))
(entry,) = importlib.metadata.entry_points(group="console_scripts", name="sedd-pretrain")
entry.load()()
"""


@pytest.fixture(scope="module")
def site_packages(tmp_path_factory) -> Path:
    """The content, in a folder of its own, of a wheel that is built of a source distribution and nothing else."""
    root = tmp_path_factory.mktemp("wheel")
    source = root / "source"
    # Not in the checkout, where a build leaves folders behind.
    for name in ("sedd_megatron", "examples"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "setup.py", source / "setup.py")
    subprocess.run([sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", str(root)], cwd=source, check=True,
                   capture_output=True, timeout=200)  # fmt: skip
    shutil.rmtree(source)
    (sdist,) = root.glob("*.tar.gz")
    subprocess.run([sys.executable, "-m", "pip", "wheel", str(sdist), "--no-deps", "--no-build-isolation", "--quiet",
                    "--wheel-dir", str(root)], cwd=root, check=True, capture_output=True, timeout=200)  # fmt: skip
    (wheel,) = root.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(root / "site-packages")
    return root / "site-packages"


def start(site_packages: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", START, str(site_packages), *arguments], cwd=site_packages.parent,
                          env=environment, capture_output=True, text=True, timeout=200)  # fmt: skip


def test_a_wheel_has_the_presets_and_trains(site_packages, tmp_path):
    for preset in (REPOSITORY / "examples" / "configs").glob("*.yaml"):
        assert (site_packages / "sedd_megatron" / "presets" / preset.name).read_bytes() == preset.read_bytes()
    mock = ["--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "50"]
    small = MODEL[: MODEL.index("--global-batch-size")]
    done = start(site_packages, "--config", "tiny", *small, *mock, "--train-iters", "2", "--lr-warmup-iters", "1",
                 "--save", str(tmp_path / "run"), "--device", "cpu")  # fmt: skip
    assert done.returncode == 0, done.stderr
    (manifest,) = (tmp_path / "run").glob("iter_0000002/manifest.json")
    options = json.loads(manifest.read_text())["body"]["state"]["options"]
    assert (options["lr"], options["ema_decay"], options["hidden_size"]) == (0.003, 0.995, 32)
    done = start(site_packages, "--config", "small")
    assert done.returncode == 2
    assert done.stderr == f"error: --config small: no such file; {PRESETS}\n"


def test_a_preset_is_known_by_name_unless_a_file_has_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("tiny", "tiny.yaml", str(REPOSITORY / "examples/configs/tiny.yaml")):
        assert parse_pretrain_options(["--config", name, "--data-path", "x"]).model.hidden_size == 128
    (tmp_path / "tiny").write_text("hidden_size: 64\nnum_attention_heads: 2\n")
    assert parse_pretrain_options(["--config", "tiny", "--data-path", "x"]).model.hidden_size == 64
    with pytest.raises(
        UserError,
        match=f"--config no/tiny: no such file; {PRESETS}",
    ):
        parse_pretrain_options(["--config", "no/tiny"])


def test_advice_names_the_checkout_or_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    assert how_to_install("harness") == "pip install -e '.[harness]'"
    monkeypatch.chdir(tmp_path)
    assert how_to_install("log") == f"pip install -e '{REPOSITORY}[log]'"
    monkeypatch.setattr("sedd_megatron.wording.__file__", str(tmp_path / "sedd_megatron" / "wording.py"))
    assert how_to_install("log") == "pip install 'sedd_megatron[log]'"
    assert set(preset_files.presets()) >= {"tiny", "sedd-small", "sedd-medium"}
