"""Runs one after the other, each of which says how it has left its folder; a job is flags and a rank an hour ahead."""

import json
import os
from pathlib import Path

from sedd_megatron.arguments import parse_pretrain_options
from sedd_megatron.training.pretrain import pretrain
from sedd_megatron.training.stop_requests import StopRequests
from tests.distributed.launch import own_jobs

if __name__ == "__main__":
    for arguments, ahead in own_jobs():
        options = parse_pretrain_options(arguments)
        with StopRequests() as requests:
            requests.began_at -= 3600 * (os.environ["RANK"] == str(ahead))
            code = pretrain(options, requests)
        finished = Path(options.checkpoint.save) / "finished"
        left = json.loads(finished.read_text())["iteration"] if finished.exists() else None
        print(f"LEFT {code} {left}", flush=True)
