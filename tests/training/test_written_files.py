"""What --async-save relies on in the library that writes its files."""

import threading
import time
from itertools import pairwise

import torch
from safetensors.torch import save_file


def test_other_threads_run_while_a_file_is_written(tmp_path):
    tensor, seen, is_over = torch.ones(64 << 20), [], threading.Event()

    def watch() -> None:
        while not is_over.wait(0.001):
            seen.append(time.monotonic())

    watcher = threading.Thread(target=watch)
    watcher.start()
    time.sleep(0.05)
    begin = time.monotonic()
    save_file({"weight": tensor}, tmp_path / "shard.safetensors")
    end = time.monotonic()
    is_over.set()
    watcher.join()
    moments = [begin, *(moment for moment in seen if begin < moment < end), end]
    longest = max(after - before for before, after in pairwise(moments))
    assert longest < 0.5 * (end - begin)
