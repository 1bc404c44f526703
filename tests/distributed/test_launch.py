"""Processes that tests start find this repository first, and after it what the caller's PYTHONPATH names."""

import os

from tests.distributed.launch import REPOSITORY, launch

RANK = """
import sys
import only_here
import sedd_megatron
from tests.commands import run
from tests.distributed.launch import own_jobs

for repository, word in own_jobs():
    assert sedd_megatron.__file__.startswith(repository), sedd_megatron.__file__
    assert only_here.WORD == word
    done = run([sys.executable, "-c", "import only_here, tests.commands; print(only_here.WORD)"])
    assert done.stdout == word + "\\n", done.stderr
"""


def test_ranks_and_commands_keep_the_callers_path_behind_the_repository(tmp_path, monkeypatch):
    folder = tmp_path / "packages"
    folder.mkdir()
    (folder / "only_here.py").write_text("WORD = 'found'\n")
    (folder / "sedd_megatron.py").write_text("raise ImportError('the caller has another one')\n")
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(tmp_path / "nothing")]))
    launch(str(script), 1, [[str(REPOSITORY), "found"]])
