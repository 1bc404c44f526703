"""What commands write to: links and devices are written through and stay what they are; what is full is one line."""

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from sedd_megatron.errors import UserError, printable
from sedd_megatron.output_files import OutputFile, check_output, write_output, write_whole
from sedd_megatron.parallel import cpu_backend
from tests.commands import ENVIRONMENT

cpu_backend.install()

from tests.training.test_convert import published_folder  # noqa: E402

PAGE = "page " * 40_000  # more than a pipe holds


def writers():
    return [lambda path: write_output("--trace", path, [PAGE]), lambda path: write_whole("--trace", path, PAGE)]


@pytest.mark.parametrize("write", writers(), ids=["line by line", "whole"])
def test_a_link_stays_and_its_target_is_written(tmp_path, write):
    target, link = tmp_path / "there" / "page.html", tmp_path / "link.html"
    target.parent.mkdir()
    target.write_text("older and longer " * 99_999)
    link.symlink_to(target)
    write(link)
    assert (link.is_symlink(), target.read_text()) == (True, PAGE)
    target.unlink()
    write(link)
    assert (link.is_symlink(), target.read_text()) == (True, PAGE)
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith("t")] == ["link.html"]


@pytest.mark.parametrize("write", writers(), ids=["line by line", "whole"])
def test_a_pipe_stays_and_who_reads_it_gets_all(tmp_path, write):
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    check_output("--trace", str(pipe))  # which would wait for a reader if it opened it
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    write(pipe)
    reader.join(timeout=20)
    assert read == [PAGE]
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert list(tmp_path.iterdir()) == [pipe]


def test_a_check_leaves_everything_as_it_was(tmp_path):
    (tmp_path / "old").write_text("older")
    check_output("--output", str(tmp_path / "old"))
    check_output("--output", str(tmp_path / "new"))
    check_output("--output", None)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("old", "older")]
    for path, reason in ((tmp_path, "Is a directory"), (tmp_path / "old" / "new", "File exists")):
        with pytest.raises(UserError) as error:
            check_output("--output", str(path))
        assert str(error.value) == f"--output {path}: cannot be written ({reason}); name another file"


def test_an_output_is_no_input_and_no_other_output(tmp_path):
    """By its name, by a link to it, and by a name of what is not there yet."""
    read, link, new = tmp_path / "read", tmp_path / "link", tmp_path / "new"
    read.write_text("kept")
    link.symlink_to(read)
    for path, other in ((read, read), (link, read), (read, link), (new, tmp_path / "." / "new")):
        with pytest.raises(UserError, match=f"^--output {path}: is --data as well"):
            check_output("--output", str(path), [("--requests", None), ("--data", str(other))])
    check_output("--output", str(new), [("--data", str(read))])
    assert read.read_text() == "kept"


def test_no_output_is_a_file_of_the_model_that_is_read(trained, monkeypatch):
    from sedd_megatron import evaluate, generate

    checkpoint = trained / "iter_0000006"
    inside = [checkpoint / "manifest.json", checkpoint / "new.jsonl", checkpoint / "tokenizer" / "description.json"]
    of_run = [trained / name for name in ("metrics.jsonl", "finished", "latest_checkpointed_iteration.txt")]
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    for command, flag in ((generate, "--output"), (generate, "--trace"), (evaluate, "--output")):
        more = ["--data", "x"] if command is evaluate else []
        for path in [*inside, *of_run]:
            argv = ["--load", str(trained), "--device", "cpu", flag, str(path), *more]
            with pytest.raises(UserError) as error:
                command.check(argv)
            kind = f"is in the folder of the model, {checkpoint}" if path in inside else "is a file of the run as well"
            assert str(error.value).startswith(f"{flag} {path}: {kind}")
    with pytest.raises(UserError, match=r"^--output -: names no file; standard output is /dev/stdout$"):
        generate.check(["--load", str(trained), "--device", "cpu", "--output", "-"])
    assert {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()} == before


def test_a_full_device_is_one_line():
    with pytest.raises(UserError) as error, OutputFile("--output", "/dev/full") as file:
        file.write("a line\n")
    assert str(error.value) == "--output /dev/full: cannot be written (No space left on device); name another file"
    with pytest.raises(UserError, match="No space left on device"), OutputFile("--output", "/dev/full") as file:
        file.write("no end of a line: met when it is closed")


def test_the_commands_end_with_one_line(tmp_path, monkeypatch):
    from sedd_megatron import generate
    from sedd_megatron.parallel.groups import groups_of_this_process

    folder = published_folder(tmp_path / "model", "absorb")
    flags = ["--load", str(folder), "--device", "cpu", "--length", "5", "--sampling-steps", "2"]
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "sedd_megatron.generate", *flags], env=ENVIRONMENT, stdout=full,
                              stderr=subprocess.PIPE, text=True, timeout=200)  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "error: standard output: cannot be written (No space left on device); send it elsewhere\n"
    monkeypatch.setattr(sys, "argv", ["generate", *flags, "--output", "/dev/full"])
    monkeypatch.setattr(generate, "joined_after_checks", _entered(groups_of_this_process))
    with pytest.raises(UserError, match=r"^--output /dev/full: cannot be written \(No space left on device\)"):
        generate.main()


def _entered(make_groups):
    import contextlib

    @contextlib.contextmanager
    def groups(options):
        yield make_groups(options)

    return groups


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é 世 \U0001f600\n\ttext", "plain é 世 \U0001f600\n\ttext"),
        ("\x1b[2J\x1b]0;title\x07", "\\x1b[2J\\x1b]0;title\\x07"),
        ("over\rwritten\x08", "over\\rwritten\\x08"),
        ("\x9b31m\x7f\0", "\\x9b31m\\x7f\\x00"),
        ("half \ud800", "half \\ud800"),
    ],
)
def test_control_characters_are_shown_and_not_obeyed(text, shown):
    assert printable(text, kept="\n\t") == shown
    assert str(UserError(text)) == shown.replace("\n", "\\n").replace("\t", "\\t")


def test_a_file_is_replaced_whole_or_stays(tmp_path):
    page = tmp_path / "page.html"
    page.write_text("older")
    with page.open() as reader:
        write_whole("--trace", Path(page), PAGE)
        assert reader.read() == "older"
    assert page.read_text() == PAGE
    assert list(tmp_path.iterdir()) == [page]


def test_two_processes_of_one_number_do_not_meet(tmp_path, monkeypatch):
    """As those of two containers; the second writes while the first has not put its file in place."""
    replace, page, other = os.replace, tmp_path / "page.html", tmp_path / "other.html"
    synced, sync = [], os.fsync

    def later(source, target):
        monkeypatch.setattr(os, "replace", replace)
        write_whole("--trace", other, "other")
        replace(source, target)

    def fsync(descriptor):
        synced.append(os.fstat(descriptor).st_size)
        sync(descriptor)

    monkeypatch.setattr(os, "replace", later)
    monkeypatch.setattr(os, "fsync", fsync)
    write_whole("--trace", page, PAGE)
    assert (page.read_text(), other.read_text()) == (PAGE, "other")
    assert sorted(tmp_path.iterdir()) == [other, page]
    assert synced == [len(PAGE), len("other")]
