"""Signs a changed checkpoint as one who knows the format would: no digest then says that it was changed."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def sign(checkpoint: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the body of a manifest, and write it with its digest."""
    body = json.loads((checkpoint / "manifest.json").read_text())["body"]
    change(body)
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (checkpoint / "manifest.json").write_text(json.dumps({"digest": digest, "body": body}))


def record(path: Path) -> dict[str, Any]:
    """What a manifest says of a file."""
    data = path.read_bytes()
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
