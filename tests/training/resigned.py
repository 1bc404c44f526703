"""Checkpoints changed and signed again, as by one who knows the format."""

import hashlib
import json
from pathlib import Path

from safetensors.torch import load_file, save_file

from sedd_megatron.training.checkpoint_format import MANIFEST


def resign(folder: Path, change) -> None:
    """Change a manifest's body."""
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest["body"])
    digest = hashlib.sha256(json.dumps(manifest["body"], sort_keys=True).encode()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps({"digest": digest, "body": manifest["body"]}))


def resign_files(folder: Path, change) -> None:
    """Change the tensors of the first rank's file."""
    path = folder / "shards-00000.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    record = {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    resign(folder, lambda body: body["files"].update({path.name: record}))
