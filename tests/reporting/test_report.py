"""The page about runs: what it reads, what it keeps of long runs, and what a browser shows without a network."""

import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from sedd_megatron.errors import UserError
from sedd_megatron.report import check, main
from sedd_megatron.reporting.curves import smoothed, thinned
from sedd_megatron.reporting.page import report_page
from sedd_megatron.reporting.records import Series, read_run
from tests.generation.test_trace import BROWSER, BROWSER_FLAGS, DARK, DumpReader, needs_browser

pytest.importorskip("plotly")

DATA = re.compile(r'<script type="application/json" id="data">(.*?)</script>', re.DOTALL)
BAD_TEXT = "</script><img src=x onerror=\"document.title='broken'\"><b>bold</b> & &amp; \u2028"
BAD_NAME = "run <img src=x onerror=alert(1)> & <b>bold"


def lines(*records: object) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def step(iteration: int) -> dict[str, float]:
    bands = {f"loss_band_{k}": 1.0 + k for k in range(8) if (k + iteration) % 3}
    return {"iteration": iteration, "loss": 8.0 - iteration / 10, "learning_rate": 1e-3, "grad_norm": 2.0,
            "grad_norm_head": 1.0, "grad_norm_mlp": 0.5, "tokens_per_second": 1e4, "consumed_samples": 8 * iteration,
            "masked_share": 0.5, "largest_log_score": None, "memory_bytes": 2**30, "data_wait_seconds": 0.1,
            **bands}  # fmt: skip


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """A run with damage, a restart that lost two steps, and samples; its name means something to HTML."""
    folder = tmp_path_factory.mktemp("runs") / BAD_NAME
    folder.mkdir()
    steps = [step(iteration) for iteration in range(1, 21)]
    content = lines(*steps[:10]) + b'{"iteration": 11, "lo\n\n[1]\nnote\n' + lines(*steps[10:])
    content += lines({"iteration": 10, "validation_loss": 6.5}, {"iteration": 20, "validation_loss": 6.25})
    (folder / "metrics.jsonl").write_bytes(content + lines(step(20) | {"loss": 5.5}) + b'{"iteration": 21, "loss"')
    lost = [step(13), step(14), {"iteration": 14, "validation_loss": 7.0}, step(8)]
    (folder / "metrics-lost.jsonl").write_bytes(lines(*lost))
    samples = [
        {"iteration": 10, "sample": 0, "text": "early"},
        {"iteration": 20, "sample": 0, "text": "replaced"},
        {"iteration": 20, "sample": 0, "text": BAD_TEXT},
        {"iteration": 20, "sample": 1, "text": "!= ->"},
        # Of steps that the run went back behind and has not reached again.
        {"iteration": 30, "sample": 0, "text": "lost"},
    ]
    (folder / "samples.jsonl").write_bytes(lines(*samples))
    return folder


def test_damage_is_named_and_left_out(run_folder):
    run = read_run(run_folder)
    assert run.faults == [f"{run_folder / 'metrics.jsonl'}: line 11 and 3 more: no record, left out"]
    assert run.fields["loss"].iterations.tolist() == list(range(1, 21))
    # What stands there twice: the later.
    assert run.fields["loss"].values[-1] == 5.5
    assert "largest_log_score" not in run.fields
    assert run.fields["validation_loss"].values.tolist() == [6.5, 6.25]
    assert [sample["text"] for sample in run.samples] == ["early", BAD_TEXT, "!= ->"]
    # Two restarts that lost steps; and the file itself goes back once, to its validations.
    assert run.restarts == [7, 9, 12]
    assert read_run(run_folder / "metrics.jsonl").name == BAD_NAME


def test_numbers_of_any_size_make_a_page(tmp_path):
    huge = b'{"iteration": 1, "loss": 1%s, "grad_norm": 1.7e308}\n' % (b"0" * 400)
    sizes = [1e280, 1.7e308, -1e280, True, None, "9", 10**400, 2.0]
    (tmp_path / "metrics.jsonl").write_bytes(huge + lines(*(step(2 + n) | {"loss": x} for n, x in enumerate(sizes))))
    assert read_run(tmp_path).fields["loss"].values.tolist() == [1e280, -1e280, 2.0]
    data = DATA.search(report_page([read_run(tmp_path)]))[1]
    json.loads(data, parse_constant=pytest.fail)


def test_thinning_keeps_what_stands_out():
    generator = np.random.default_rng(0)
    values = generator.normal(size=400_000)
    values[123_457], values[234_561] = 50.0, -50.0
    few = thinned(Series(np.arange(400_000), values), pixels=600)
    assert len(few.values) <= 1202
    assert {123_457, 234_561, 0, 399_999} <= set(few.iterations.tolist())
    assert (values[few.iterations] == few.values).all()
    assert (np.diff(few.iterations) > 0).all()
    # Each part's range is that of the whole curve there.
    for part in range(600):
        inside = slice(int(part * 400_000 / 600), int((part + 1) * 400_000 / 600))
        own = few.values[(few.iterations >= inside.start) & (few.iterations < inside.stop)]
        assert (own.min(), own.max()) == (values[inside].min(), values[inside].max())
    short = Series(np.arange(5), values[:5])
    assert thinned(short) is short


def test_smoothing_is_the_mean_of_a_fiftieth():
    values = np.random.default_rng(0).normal(size=500)
    expected = [values[max(k - 9, 0) : k + 1].mean() for k in range(500)]
    np.testing.assert_allclose(smoothed(Series(np.arange(500), values)).values, expected, rtol=1e-9, atol=1e-12)
    # What stands behind a spike is as exact.
    values[100] = 1e30
    after = smoothed(Series(np.arange(500), values)).values[110:]
    np.testing.assert_allclose(after, expected[110:], rtol=1e-9, atol=1e-12)
    assert smoothed(Series(np.arange(49), values[:49])).values.tolist() == values[:49].tolist()


def test_runs_stand_anywhere_among_the_flags_and_mistakes_are_one_line(run_folder, tmp_path):
    page = str(tmp_path / "r.html")
    for argv in (["a", "b", "--output", page], ["--output", page, "a", "b"], ["a", f"--output={page}", "b"],
                 ["--runs", "a", "b", "--output", page]):  # fmt: skip
        assert check(argv).runs == ("a", "b")
    for argv, words in (
        (["--output", page], "missing --runs"),
        (["a", "--out", page], "unknown flag --out"),
        ([str(run_folder), "--output", str(run_folder / "metrics.jsonl")], "metrics.jsonl: is a run as well"),
    ):
        with pytest.raises(UserError, match=words):
            check(argv)
    # Too long a name, as nobody may look at it.
    unseen = "/".join([*16 * ["a" * 254], "b" * 10])
    assert check([unseen, "--output", page]).runs == (unseen,)
    for folder in (tmp_path, Path(unseen)):
        with pytest.raises(UserError, match=r"has no metrics\.jsonl; name the folder of --save or --log-dir"):
            read_run(folder)
    (tmp_path / "metrics.jsonl").write_text("nothing\n")
    with pytest.raises(UserError, match="has no record of a step"):
        read_run(tmp_path)


PROBE = """<script>
const found = { violations: [], errors: [] };
addEventListener("securitypolicyviolation", (event) => found.violations.push(event.violatedDirective));
addEventListener("error", (event) => found.errors.push(event.message));
addEventListener("load", () => setTimeout(() => {
  found.title = document.title;
  found.needed = document.documentElement.scrollWidth;
  found.width = innerWidth;
  found.images = document.querySelectorAll("img").length;
  const all = (selector, of = document) => [...of.querySelectorAll(selector)];
  found.charts = all("#charts section h2").map((title) => title.textContent);
  found.curves = all(".chart").map((chart) => all(".scatterlayer .trace", chart).length);
  found.marks = document.querySelector(".chart").querySelectorAll(".shapelayer path").length;
  found.wide = Math.max(...all(".chart svg").map((svg) => svg.getBoundingClientRect().right));
  found.names = document.querySelector("#runs h2").textContent;
  found.texts = all("#texts pre").map((text) => text.textContent);
  byId("at").value = 0;
  byId("at").dispatchEvent(new Event("input"));
  found.early = all("#texts pre").map((text) => text.textContent);
  found.resources = performance.getEntriesByType("resource").filter((one) => !one.name.startsWith("data:")).length;
  parent.postMessage(JSON.stringify(found), "*");
}, 1000));
</script>"""
PHONE = """<html><iframe width="375" height="700" style="border: 0"></iframe><script>
addEventListener("message", (event) => { document.documentElement.dataset.found = event.data; });
document.querySelector("iframe").src = "probed.html";
</script></html>"""


@needs_browser
def test_a_phone_shows_all_of_it_without_a_network(run_folder, tmp_path, monkeypatch, capsys):
    image = pytest.importorskip("PIL.Image")
    other = tmp_path / "other"
    other.mkdir()
    (other / "metrics.jsonl").write_bytes(lines(*map(step, range(1, 9))))
    page = tmp_path / "pages" / "report.html"
    monkeypatch.setattr("sys.argv", ["report", str(run_folder), str(other), "--output", str(page)])
    main()
    said = capsys.readouterr()
    assert said.out == f"wrote {page}\n"
    assert said.err.startswith("warning: ")
    html = page.read_text(encoding="utf-8")
    data = DATA.search(html)[1]
    assert json.loads(data)["runs"][0]["samples"][1]["text"] == BAD_TEXT
    assert not re.search(r"<(?:script|link|img)[^>]*(?:src|href)=", html.replace(data, "")[:5000])
    (page.parent / "probed.html").write_text(html.replace("<title>", PROBE + "<title>", 1), encoding="utf-8")
    (page.parent / "phone.html").write_text(PHONE, encoding="utf-8")
    pictures = []
    for flags in ((), (DARK,)):
        picture = tmp_path / f"{len(flags)}.png"
        command = [BROWSER, *BROWSER_FLAGS, *flags, "--window-size=900,800", f"--user-data-dir={tmp_path / 'browser'}",
                   "--virtual-time-budget=6000", "--dump-dom", f"--screenshot={picture}",
                   (page.parent / "phone.html").as_uri()]  # fmt: skip
        reader = DumpReader()
        reader.feed(subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout)
        pictures.append(image.open(picture).convert("RGB"))
        found = json.loads(reader.shown.root["data-found"])
        assert found["errors"] == found["violations"] == []
        assert found["title"] == "Training report"
        assert found["width"] == 375 >= max(found["needed"], found["wide"])
        assert found["images"] == found["resources"] == 0
        assert found["names"] == BAD_NAME
        assert (found["texts"], found["early"]) == ([BAD_TEXT, "!= ->"], ["early"])
        # Of each run the steps and their mean; of one the validations too.
        assert dict(zip(found["charts"], found["curves"], strict=True)) == {
            "Loss nats per token": 5,
            "Loss by noise nats per token": 16,
            "Learning rate ": 2,
            "Gradient norm before clipping": 4,
            "Gradient norm by part before clipping": 4,
            "Throughput tokens per second": 4,
            "Memory GiB, of the rank that has most": 4,
            "Wait for data seconds a step": 4,
            "Noised tokens share": 4,
        }
        assert found["marks"] == 3
    # Beside the panels, in the frame.
    assert min(pictures[0].getpixel((12, 100))) > 200
    assert max(pictures[1].getpixel((12, 100))) < 60
