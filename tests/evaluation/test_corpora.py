"""Corpora and their detokenizers: each rule on a line made for it, each file format, each mistake by its text."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from sedd_megatron.errors import UserError
from sedd_megatron.evaluation import detokenizers
from sedd_megatron.evaluation.corpora import CORPORA, documents_of

WIKITEXT = [
    ("the players ' wives", "the players' wives"),
    ("a two @-@ part 1 @,@ 000 m 2 @.@ 5 km", "a two-part 1,000 m 2.5 km"),
    ("He said : yes ; or no . Then , what ? Now ! Done", "He said: yes; or no. Then, what? Now! Done"),
    ("13 lb ( 6 kg ) and [ sic ] and { x }", "13 lb (6 kg) and [sic] and {x}"),
    ('the " lobster red " shell', 'the "lobster red" shell'),
    ("the word ' cutter ' here", "the word 'cutter' here"),
    (" = = = = Deep = = = = \n", " ==== Deep ====\n"),
    (" = = = = = Deepest = = = = = \n", " ===== Deepest =====\n"),
    (" = = = Part = = = \n", " === Part ===\n"),
    (" = = Description = = \n", " == Description ==\n"),
    (" = Robert = \n", " = Robert =\n"),
    ("at 5 \u00b0 C", "at 5\u00b0C"),
    ("one \n two", "one\ntwo"),
    ("53 N of", "53 1 of"),
    ("Teddy 's Story", "Teddy's Story"),
]
PENN_TREEBANK = [
    ("the bank 's plan", "the bank's plan"),
    ("the banks ' plan", "the banks' plan"),
    ("no it was n't black monday", "no it wasn't black monday"),
    ("one \n two", "one\ntwo"),
    ("a 50\\/50 chance", "a 50/50 chance"),
    ("from N N to N N years", "from 1 1 to 1 1 years"),
    ("at $ N or # N a share", "at $1 or #1 a share"),
    ("mr. <unk> is chairman", "mr. ? is chairman"),
]
BILLION_WORDS = [
    ("see http : / / a.com and https : / / b.com", "see http://a.com and https://b.com"),
    ("it 's what they 'd want", "it's what they'd want"),
    ("It ended . They left .", "It ended. They left."),
    ("Why ? Who knows ?", "Why? Who knows?"),
    ("Stop ! Now !", "Stop! Now!"),
    ("first , second : third ; and / or", "first, second: third; and/or"),
    ('he said " never again " twice', 'he said "never again" twice'),
    # The rule for clitics comes before the one for quotes, and takes the blank that the latter asks for.
    ("a ' fine mess ' indeed", "a 'fine mess' indeed"),
    ("the group ( or band ) and [ sic ]", "the group (or band) and [sic]"),
    ("for $ 5 or \u00a3 3", "for $5 or \u00a33"),
]
CASES = (
    [(detokenizers.wikitext, *case) for case in WIKITEXT]
    + [(detokenizers.penn_treebank, *case) for case in PENN_TREEBANK]
    + [(detokenizers.billion_words, *case) for case in BILLION_WORDS]
    + [
        (detokenizers.lambada, " \u201cNo,\u201d she said. \n", '\n"No," she said.'),
        (
            detokenizers.scientific_papers,
            "a 2 @.@ 5 fold rise ( see fig ) . it 's $ 3 .",
            "a 2.5 fold rise (see fig). it's $3.",
        ),
        (detokenizers.unchanged, " 's . ", " 's . "),
    ]
)


@pytest.mark.parametrize(("detokenize", "found", "expected"), CASES, ids=[f"{c[0].__name__}: {c[1]!r}" for c in CASES])
def test_a_rule(detokenize, found, expected):
    assert detokenize(found) == expected


def test_every_rule_is_needed_by_a_case():
    for function, rules, cases in (
        ("wikitext", "WIKITEXT", WIKITEXT),
        ("penn_treebank", "PENN_TREEBANK", PENN_TREEBANK),
        ("billion_words", "BILLION_WORDS", BILLION_WORDS),
    ):
        table = getattr(detokenizers, rules)
        for left_out in range(len(table)):
            fewer = table[:left_out] + table[left_out + 1 :]
            changed = [found for found, expected in cases if detokenizers._apply(fewer, found) != expected]
            assert changed, f"{function}: nothing shows {table[left_out]}"


def test_wikitext_rows_keep_line_feeds_and_blank_lines(tmp_path):
    (tmp_path / "wikitext2-train.txt").write_text(" \n = Homarus gammarus = \n \n It grows to 60 cm ( 24 in ) . \n")
    documents = documents_of("wikitext2", tmp_path)
    assert documents == ["", " = Homarus gammarus =\n", "", " It grows to 60 cm (24 in).\n"]


def test_other_text_files_give_a_document_a_line_and_text8_one(tmp_path):
    (tmp_path / "ptb-test.txt").write_text(" no it was n't black monday \n but while N \u2028 rose \n")
    assert documents_of("ptb", tmp_path) == ["no it wasn't black monday", "but while 1 \u2028 rose"]
    (tmp_path / "ag_news-test.txt").write_text("\ufeffone\r\ntwo", encoding="utf-8")
    assert documents_of("ag_news", tmp_path) == ["one", "two"], "a byte order mark is no part of a text"
    (tmp_path / "text8-test.txt").write_text(" anarchism originated\n")
    assert documents_of("text8", tmp_path) == [" anarchism originated"]


def test_json_lines_and_parts_in_their_order(tmp_path):
    for part, texts in (("00001", ["third"]), ("00000", ["first\nline", "second"])):
        lines = [json.dumps({"article": text, "abstract": "no"}) for text in texts]
        (tmp_path / f"pubmed-validation-{part}.jsonl").write_text("\n".join(lines) + "\n")
    assert documents_of("pubmed", tmp_path) == ["first\nline", "second", "third"]
    (tmp_path / "lambada-test.jsonl").write_text('\ufeff{"text": "\u201cYes\u201d "}\n', encoding="utf-8")
    assert documents_of("lambada", tmp_path) == ['\n"Yes"']


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    path = tmp_path / "ag_news-test.parquet"
    parquet.write_table(pyarrow.table({"label": [0, 1], "text": ["Fears for pensions", "The race is on"]}), path)
    assert documents_of("ag_news", tmp_path) == ["Fears for pensions", "The race is on"]
    parquet.write_table(pyarrow.table({"label": [0, 1]}), path)
    with pytest.raises(UserError, match=r"ag_news-test.parquet: no column 'text'; it has label$"):
        documents_of("ag_news", tmp_path)
    for values, row in ((["a", None], 2), ([1, 2], 1), ([b"a", b"b"], 1), ([["a"], ["b"]], 1)):
        parquet.write_table(pyarrow.table({"text": values}), path)
        with pytest.raises(UserError) as raised:
            documents_of("ag_news", tmp_path)
        assert str(raised.value) == f"{path}, row {row}: no text at key 'text'; use another copy"
    ends = pyarrow.array([0, 1], pyarrow.int32()).buffers()[1]
    not_utf8 = pyarrow.Array.from_buffers(pyarrow.string(), 1, [None, ends, pyarrow.py_buffer(b"\xff")])
    parquet.write_table(pyarrow.table({"text": not_utf8}), path)
    with pytest.raises(UserError, match=r"ag_news-test.parquet: not a Parquet file of text \("):
        documents_of("ag_news", tmp_path)
    path.write_bytes(b"not Parquet")
    with pytest.raises(UserError, match=r"ag_news-test.parquet: not a Parquet file of text \(.*\); use another copy$"):
        documents_of("ag_news", tmp_path)


@pytest.mark.parametrize("name", CORPORA)
def test_a_missing_file_is_named(tmp_path, name):
    split = {"wikitext2": "train", "pubmed": "validation", "arxiv": "validation"}.get(name, "test")
    files = " or ".join(f"{name}-{split}.{suffix}" for suffix in ("parquet", "jsonl", "txt"))
    with pytest.raises(UserError) as raised:
        documents_of(name, tmp_path)
    assert str(raised.value) == (
        f"corpus {name}: {tmp_path} has no {files}; put its {split} split there under one of these names, or name no "
        "folder where there is a network"
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("lm1b-test.txt", b"\xff\xfe", "lm1b-test.txt: cannot be read as UTF-8 text .*; use another copy$"),
        ("lm1b-test.jsonl", b"{", "lm1b-test.jsonl, line 1: not JSON .*; use another copy$"),
        ("lm1b-test.jsonl", b"[" * 100_000, r"lm1b-test.jsonl, line 1: not JSON \(maximum recursion"),
        ("lm1b-test.jsonl", b'\n{"a": 1}', "line 2: no text at key 'text'; write one JSON object a line with it$"),
        ("lm1b-test.jsonl", b'{"text": null}', "line 1: no text at key 'text'; write one JSON object a line with it$"),
        (
            "lm1b-test.jsonl",
            b'{"text": "a\\ud800"}',
            "line 1: character 1 of 'text' is half a surrogate pair",
        ),
        ("lm1b-test.jsonl", b'["text"]', "line 1: no text at key 'text'; write one JSON object a line with it$"),
        (
            "lm1b-test.txt",
            b"\n",
            "^corpus lm1b: no text there; put its test split into a folder as lm1b-test.parquet or",
        ),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        documents_of("lm1b", tmp_path)


def test_an_unknown_corpus_is_refused(tmp_path):
    with pytest.raises(
        UserError, match=r"^corpus wikitext does not exist; choose one of lambada, wikitext2, wikitext103,"
    ):
        documents_of("wikitext", tmp_path)


def test_without_the_package_the_local_file_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError) as raised:
        documents_of("ptb", None)
    assert str(raised.value) == (
        "corpus ptb: needs the package datasets; pip install 'datasets>=4', or put its test split into a "
        "folder as ptb-test.parquet or ptb-test.jsonl or ptb-test.txt and name that folder"
    )
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(__version__="3.6.0"))
    with pytest.raises(
        UserError, match=r"^corpus ptb: the package datasets is 3.6.0, which can run scripts .*; pip install"
    ):
        documents_of("ptb", None)


@pytest.mark.parametrize(
    ("name", "hub_name"), [("ptb", "ptb-text-only/ptb_text_only"), ("ag_news", "fancyzhx/ag_news")]
)
def test_without_a_network_the_command_ends_with_one_line(tmp_path, name, hub_name):
    pytest.importorskip("datasets", reason="datasets is not installed")
    script = (
        "from sedd_megatron.errors import run_command\nfrom sedd_megatron.evaluation.corpora import documents_of\n"
        f"run_command(lambda: documents_of({name!r}, None))"
    )
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=dict(os.environ, **offline), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    last = done.stderr.strip().split("\n")[-1]
    assert last.startswith(f"error: corpus {name}: {hub_name} cannot be fetched (")
    assert last.endswith(f"{name}-test.parquet or {name}-test.jsonl or {name}-test.txt and name that folder")


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (["00000-of-00003"], "has 1 of the 3 parts of ptb-test-00000-of-00003.jsonl, and not number 00001; put"),
        (["00001-of-00003", "00002-of-00003"], "has 2 of the 3 parts of ptb-test-00002-of-00003.jsonl, and not number"),
        (["1-of-3", "3-of-3"], "has 2 of the 3 parts of ptb-test-3-of-3.jsonl, and not number 2; put all of"),
        (["0-of-1", "0-of-2", "1-of-2"], "ptb-test-0-of-2.jsonl is of another set of parts than ptb-test-0-of-1.jsonl"),
        (["0-of-2", "1-of-2", "more"], "ptb-test-more.jsonl is of another set of parts than ptb-test-0-of-2.jsonl"),
    ],
)  # fmt: skip
def test_parts_that_are_missing_are_named(tmp_path, names, why):
    for name in names:
        (tmp_path / f"ptb-test-{name}.jsonl").write_text('{"sentence": "a"}\n')
    with pytest.raises(UserError, match=r"^corpus ptb: ") as error:
        documents_of("ptb", tmp_path)
    assert why in str(error.value)


def test_all_parts_are_read(tmp_path):
    for first, count in ((0, 2), (1, 2)):
        for number in range(first, first + count):
            (tmp_path / f"ptb-test-{number}-of-{count}.jsonl").write_text(f'{{"sentence": "{number}"}}\n')
        assert documents_of("ptb", tmp_path) == [str(number) for number in range(first, first + count)]
        for path in tmp_path.iterdir():
            path.unlink()
