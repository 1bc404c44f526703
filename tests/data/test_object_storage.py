"""Corpora in object storage against a real server of S3's protocol on this machine: the same windows, the same run."""

import json
import pickle
import re
import shutil
import threading
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import numpy as np
import pytest
from moto.server import ThreadedMotoServer

from sedd_megatron.arguments import corpora_in_object_storage, parse_pretrain_options, weighted_corpora
from sedd_megatron.data import object_storage
from sedd_megatron.data.corpus import open_tokens
from sedd_megatron.data.digests import find_fault
from sedd_megatron.data.object_storage import RemoteTokens, copy_beside, remote_bin
from sedd_megatron.data.splits import check_tokens_of_parts
from sedd_megatron.data.windows import open_windows
from sedd_megatron.errors import UserError
from sedd_megatron.parallel import cpu_backend
from sedd_megatron.prepare_data import PrepareOptions, prepare
from sedd_megatron.training_config import WeightedCorpus
from tests.distributed.compare import metrics
from tests.distributed.launch import free_ports, launch
from tests.distributed.layouts import MODEL

cpu_backend.install()

URL = "s3://texts/corpora/c"


@pytest.fixture(scope="module")
def server():
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=free_ports(1)[0], verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(server, byte_corpus, monkeypatch):
    """With the corpus in it; as the environment of this process and of what it starts names it."""
    for name, value in {"ENDPOINT_URL": server, "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b", "MAX_ATTEMPTS": "2",
                        "DEFAULT_REGION": "us-east-1"}.items():  # fmt: skip
        monkeypatch.setenv(f"AWS_{name}", value)
    client = boto3.Session().client("s3")
    client.create_bucket(Bucket="texts")
    for path in byte_corpus.parent.rglob("*"):
        if path.is_file():
            name = str(path.relative_to(byte_corpus.parent)).replace(byte_corpus.name, "c", 1)
            client.upload_file(str(path), "texts", f"corpora/{name}")
    # Which begins as it does.
    client.put_object(Bucket="texts", Key="corpora/c_other/x.idx", Body=b"x")
    return client


def options_of(folder, *flags: str, url: str = URL):
    return parse_pretrain_options(["--data-path", url, "--object-storage-cache-path", str(folder), *MODEL, *flags])


def copied(folder) -> str:
    ((url, prefix),) = corpora_in_object_storage(options_of(folder).data).items()
    copy_beside(url, prefix)
    return prefix


def opened(prefix: str):
    return open_windows([WeightedCorpus(Fraction(1), prefix)], seq_length=16, split="80,20,0", num_tokens=256, seed=0)


def test_windows_and_what_lies_beside_are_those_of_the_disk(bucket, byte_corpus, tmp_path):
    prefix = copied(tmp_path)
    assert prefix == str(tmp_path / "s3/texts/corpora/c") == weighted_corpora(options_of(tmp_path).data)[0].prefix
    here, there = opened(str(byte_corpus)), opened(prefix)
    check_tokens_of_parts(there, 256)
    for windows in (there, pickle.loads(pickle.dumps(there))):
        for n in (0, 1, 7, len(here.train), 2 * len(here.train) - 1):
            assert windows.train[n][1].tolist() == here.train[n][1].tolist()
    assert sorted(path.name for path in Path(f"{prefix}_tokenizer").iterdir()) == ["description.json"]
    assert find_fault(prefix) is None
    with pytest.raises(UserError, match=r"^--check s3://texts/c: prepare_data works on disks; name a prefix there"):
        prepare(PrepareOptions(check="s3://texts/c"))
    from sedd_megatron.training.same_run import describe_run

    on_disk = parse_pretrain_options(["--data-path", str(byte_corpus), *MODEL])
    assert describe_run(options_of(tmp_path), 256)["data"] == describe_run(on_disk, 256)["data"]


def test_what_is_copied_is_copied_once_and_again_when_it_has_changed(bucket, byte_corpus, tmp_path):
    prefix = copied(tmp_path)
    index = Path(f"{prefix}.idx")
    before = index.stat().st_mtime_ns
    copied(tmp_path)
    assert index.stat().st_mtime_ns == before
    # A copy that was broken off is made anew.
    Path(f"{prefix}_remote.json").unlink()
    index.write_bytes(b"half")
    copied(tmp_path)
    assert index.read_bytes() == Path(f"{byte_corpus}.idx").read_bytes()
    bucket.put_object(Bucket="texts", Key="corpora/c.idx", Body=b"other")
    copied(tmp_path)
    assert index.read_bytes() == b"other"
    bucket.put_object(Bucket="texts", Key="corpora/c.bin", Body=b"short!")
    index.unlink()
    bucket.upload_file(f"{byte_corpus}.idx", "texts", "corpora/c.idx")
    with pytest.raises(UserError, match=rf"^{URL}.bin: has 6 bytes, its index says \d+; it is cut short"):
        open_tokens(copied(tmp_path))


def said(folder, url: str = URL) -> str:
    with pytest.raises(UserError) as error:
        copy_beside(url, str(folder / "x" / "c"))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_errors_are_one_line_with_the_way_out(bucket, tmp_path, monkeypatch, capsys):
    assert said(tmp_path, "s3://texts/none") == (
        "s3://texts/none: no object s3://texts/none.idx; give the prefix of a corpus that is there"
    )
    assert re.fullmatch(r"s3://nowhere/c: cannot be read \(.*NoSuchBucket.*\); name a bucket that is there, or its "
                        r"store by AWS_ENDPOINT_URL", said(tmp_path, "s3://nowhere/c"))  # fmt: skip
    tokens = open_tokens(copied(tmp_path))
    # Megatron's keeps the last range that it read.
    object_storage._reader.cache_clear()
    bucket.delete_object(Bucket="texts", Key="corpora/c.bin")
    with pytest.raises(UserError, match=rf"^{URL}.bin: cannot be read \(.*NoSuchKey.*\); mend that and start again"):
        tokens[:4]
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_ports(1)[0]}")
        line = said(tmp_path)
        assert re.fullmatch(
            rf"{URL}: cannot be read \(Could not connect to the endpoint URL.*\); mend that and .*", line
        )
        # What is tried again is told.
        assert capsys.readouterr().err.count("ListObjectsV2 of S3: attempt") == 2
    assert said(tmp_path / "x" / "c.lock").startswith("--object-storage-cache-path: ")
    for text, url, flags in (
        ("give --object-storage-cache-path FOLDER", URL, []),
        ("must be a bucket and a prefix", "s3://texts", ["--object-storage-cache-path", "x"]),
        ("must be a bucket and a prefix", "s3://texts/../c", ["--object-storage-cache-path", "x"]),
    ):
        with pytest.raises(UserError, match=text):
            parse_pretrain_options(["--data-path", url, *flags, *MODEL])


def test_an_object_that_is_replaced_is_not_read_on(bucket, byte_corpus, tmp_path):
    prefix = copied(tmp_path)
    tokens, other = open_tokens(prefix), Path(f"{byte_corpus}.bin").read_bytes()[::-1]
    assert len(tokens[:4]) == 4
    bucket.put_object(Bucket="texts", Key="corpora/c.bin", Body=other)
    with pytest.raises(UserError, match=rf"^{URL}.bin: cannot be read \(.*\); it has changed since this run opened it"):
        tokens[8:12]
    assert open_tokens(copied(tmp_path))[:4].tobytes() == other[:8]


class Breaking(BaseHTTPRequestHandler):
    """A store of b"abcdefgh" that breaks off in the middle of its first answers, and then does not."""

    protocol_version, answers, versions = "HTTP/1.1", [], []

    def do_GET(self) -> None:
        self.versions.append(self.headers["If-Match"])
        self.send_response(206)
        self.send_header("Content-Length", "8")
        self.end_headers()
        self.wfile.write(b"abcdefgh"[: self.answers.pop()])
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Not among what the test says."""


def test_an_answer_that_breaks_off_is_asked_for_again_and_told(bucket, monkeypatch, capsys):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Breaking)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    Breaking.answers[:] = [8, 3, 0]
    tokens = RemoteTokens("s3://broken/off.bin", '"v1"', np.dtype(np.uint16), 4)
    assert tokens[:4].tobytes() == b"abcdefgh"
    assert Breaking.versions == ['"v1"'] * 3
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(" broke off (")[0] for line in said] == [f"s3://broken/off.bin: attempt {n}" for n in (1, 2)]
    Breaking.answers[:] = [5] * 9
    # Megatron's keeps the last range that it read.
    tokens = RemoteTokens("s3://broken/other.bin", '"v1"', np.dtype(np.uint16), 4)
    with pytest.raises(UserError, match=r"^s3://broken/other.bin: cannot be read \(.*\); mend that and start again"):
        tokens[:4]
    assert len(Breaking.answers) == 6
    server.shutdown()


def test_a_store_without_credentials_says_which(bucket, tmp_path, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    # Which remembers the keys that it found.
    object_storage._boto3.cache_clear()
    assert said(tmp_path) == (
        f"{URL}: cannot be read (Unable to locate credentials); give AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
        "AWS_PROFILE"
    )
    object_storage._boto3.cache_clear()


def test_what_lies_beside_a_corpus_sends_no_run_elsewhere(byte_corpus, tmp_path):
    prefix = str(tmp_path / "s3" / "b" / "c")
    shutil.copytree(byte_corpus.parent, tmp_path / "s3" / "b")
    for file in (tmp_path / "s3" / "b").glob(f"{byte_corpus.name}*"):
        file.rename(file.with_name(file.name.replace(byte_corpus.name, "c")))
    marker = Path(f"{prefix}_remote.json")
    marker.write_text(json.dumps({"url": "s3://b/c.bin", "objects": {".bin": [1, "x"]}}))
    assert remote_bin(prefix) is None, "the tokens are here"
    Path(f"{prefix}.bin").unlink()
    assert remote_bin(prefix).url == "s3://b/c.bin"
    for url, line in (
        ("s3://other/c.bin", "names s3://other/c.bin, which does not belong here; delete it"),
        ("http://b/c.bin", "damaged (it names no object); delete it, and the corpus is copied again"),
        (7, "damaged ('int' object has no attribute 'startswith'); delete it, and the corpus is copied again"),
    ):
        marker.write_text(json.dumps({"url": url, "objects": {".bin": [1, "x"]}}))
        with pytest.raises(UserError) as error:
            remote_bin(prefix)
        assert str(error.value) == f"{marker}: {line}"


def test_the_multi_storage_client_reads_the_same(byte_corpus, tmp_path, monkeypatch):
    store = tmp_path / "store"
    shutil.copytree(byte_corpus.parent, store / "corpora")
    (tmp_path / "msc.yaml").write_text(
        f"profiles:\n  disk:\n    storage_provider:\n      type: file\n      options:\n        base_path: {store}\n"
    )
    monkeypatch.setenv("MSC_CONFIG", str(tmp_path / "msc.yaml"))
    url = f"msc://disk/corpora/{byte_corpus.name}"
    prefix = str(tmp_path / "cache" / "msc" / "disk" / "corpora" / byte_corpus.name)
    copy_beside(url, prefix)
    here, there = opened(str(byte_corpus)), opened(prefix)
    assert [there.train[n][1].tolist() for n in range(9)] == [here.train[n][1].tolist() for n in range(9)]


def test_a_run_on_a_disk_goes_on_from_object_storage(bucket, byte_corpus, tmp_path):
    common = [*MODEL, "--save", str(tmp_path / "run"), "--num-workers", "1"]
    there = ["--data-path", URL, "--object-storage-cache-path", str(tmp_path / "cache")]
    launch("run_pretrain.py", 1, [
        [*common, "--data-path", str(byte_corpus), "--train-iters", "2"],
        [*common, *there, "--train-iters", "5"],
        [*MODEL, "--data-path", str(byte_corpus), "--train-iters", "5", "--save", str(tmp_path / "unbroken")],
    ])  # fmt: skip
    for name in ("loss", "grad_norm"):
        assert metrics(tmp_path / "run", name).tolist() == metrics(tmp_path / "unbroken", name).tolist()
