"""The page that replays samples, as a browser shows it; the truth is a replay in a few lines of Python."""

import json
import re
import resource
import shutil
import subprocess
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import pytest

from sedd_megatron.errors import UserError
from sedd_megatron.generation.trace import Trace, write_trace

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on PATH")
# Without a network, so that whatever a page would ask of one fails.
BROWSER_FLAGS = [
    *"--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking".split(),
    *"--disable-component-update --disable-sync --hide-scrollbars".split(),
    "--host-resolver-rules=MAP * ~NOTFOUND",
]
DARK = "--blink-settings=preferredColorScheme=0"

MASK = 99
TEXTS = {
    0: "In the beginning",
    1: "</script><script>document.title = 'broken'</script>",
    2: " <b>bold</b> & &amp; \u2028",
    3: "\n",
    4: " мир 世界 שלום",
    5: "\tend",
    6: "<!--<script>__TRACE_DATA__",
    7: " never drawn",
}
SETTINGS = {"model": "runs/<model>&" + 12 * "long_name_", "seed": "7"}
# A prompt, a second block that begins at step 5, and position 1, which gives its first token back.
REMASKED = Trace(
    title="sample 1",
    num_steps=8,
    initial=[0, MASK, MASK, MASK, MASK, None, None],
    changes=[
        *[(1, 1, 4), (2, 2, 3), (3, 1, MASK), (4, 3, 1), (4, 4, 2)],
        *[(5, 5, MASK), (5, 6, MASK), (6, 1, 2), (7, 5, 5), (8, 6, 6)],
    ],
    given=[True] + [False] * 6,
    calls=[1, 2, 3, 4, 6, 7, 8],
)
SHORT = Trace("sample 0", 2, [MASK, MASK], [(1, 1, 4), (2, 0, 0)], [False, False], [1, 2])
# No mask: every position always holds a token.
NOISY = Trace("sample 0", 4, [4, 5, 0], [(1, 0, 2), (2, 1, 3), (3, 0, 4), (4, 0, 1)], [False] * 3, [1, 2, 3, 4])


def states_at(trace: Trace, step: int) -> list[int | None]:
    states = list(trace.initial)
    for when, position, state in trace.changes:
        if when <= step:
            states[position] = state
    return states


def text_at(trace: Trace, step: int) -> str:
    return "".join("" if s is None else "█" if s == MASK else TEXTS[s] for s in states_at(trace, step))


def readout_at(trace: Trace, step: int) -> str:
    masked, absent = (states_at(trace, step).count(state) for state in (MASK, None))
    later = f" · {absent} to come" if absent else ""
    return f"Step {step} of {trace.num_steps} · {masked} token{'' if masked == 1 else 's'} open{later}"


@dataclass
class Shown:
    """What a dumped document holds: texts by id and by position, the classes of positions, and the data attributes
    of its root.
    """

    texts: dict[str, str] = field(default_factory=dict)
    positions: dict[int, str] = field(default_factory=dict)
    classes: dict[int, set[str]] = field(default_factory=dict)
    root: dict[str, str] = field(default_factory=dict)

    @property
    def text(self) -> str:
        return "".join(self.positions.values())


class DumpReader(HTMLParser):
    """Reads a dumped document into Shown."""

    VOID = frozenset("meta input br link img option".split())

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.shown, self._open = Shown(), []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        named = dict(attributes)
        if tag == "html":
            self.shown.root = named
        if "data-position" in named:
            position = int(named["data-position"])
            self.shown.positions[position] = ""
            self.shown.classes[position] = set(named["class"].split()) | ({"hidden"} if "hidden" in named else set())
        if tag not in self.VOID:
            self._open.append(named)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        for named in self._open:
            if "data-position" in named:
                self.shown.positions[int(named["data-position"])] += data
            elif "id" in named:
                self.shown.texts[named["id"]] = self.shown.texts.get(named["id"], "") + data


@pytest.fixture(scope="module")
def browse(tmp_path_factory):
    """Open a page and return what it shows; with a picture's path, draw it too."""

    def open_page(
        page: Path, address: str, *flags: str, picture: Path | None = None, milliseconds: int = 1000
    ) -> Shown:
        folder = tmp_path_factory.mktemp("browser")
        flags += (f"--user-data-dir={folder}", f"--virtual-time-budget={milliseconds}", "--dump-dom")
        flags += (f"--screenshot={picture}",) if picture else ()
        command = [BROWSER, *BROWSER_FLAGS, *flags, f"{page.as_uri()}#{address}"]
        reader = DumpReader()
        reader.feed(subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout)
        return reader.shown

    return open_page


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("trace") / "trace.html"
    write_trace(path, [SHORT, REMASKED], TEXTS.__getitem__, MASK, SETTINGS)
    return path


def with_script(page: Path, script: str) -> Path:
    """A copy of the page with one more script at its end."""
    copy = page.with_name("copy.html")
    html = page.read_text(encoding="utf-8")
    copy.write_text(html.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    return copy


def test_page_asks_nothing_of_a_network_and_no_text_leaves_its_data(page):
    html = page.read_text(encoding="utf-8")
    assert "default-src 'none'" in html
    assert not re.search(r"https?://|url\(|@import|\bsrc=|\bhref=", html)
    assert html.count("<script") == html.count("</script") == 2
    assert "<b>bold" not in html
    assert TEXTS[7] not in html
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL).group(1))
    assert data["tokens"] == {str(token): text for token, text in TEXTS.items() if token != 7}


@needs_browser
def test_steps_show_what_a_replay_gives(page, browse, tmp_path):
    image = pytest.importorskip("PIL.Image")
    difference = pytest.importorskip("PIL.ImageChops").difference
    measured = with_script(
        page,
        """const box = document.getElementById("text").getBoundingClientRect();
        document.documentElement.dataset.box = JSON.stringify([box.left, box.top, box.right, box.bottom]);""",
    )
    pictures = {}
    for step, extra in ((0, ()), (4, (DARK,)), (8, ())):
        picture = tmp_path / f"{step}.png"
        opened = measured if step == 8 else page
        shown = browse(opened, f"sample=1&step={step}", "--window-size=900,700", *extra, picture=picture)
        pictures[step] = image.open(picture).convert("RGB")
        assert shown.text == text_at(REMASKED, step)
        assert [token for token in shown.positions.values() if token == ""] == [""] * states_at(REMASKED, step).count(
            None
        )
        assert shown.texts["readout"] == readout_at(REMASKED, step)
        assert {p for p, names in shown.classes.items() if "hidden" in names} == (set() if step == 8 else {5, 6})
        fresh = {position for when, position, _ in REMASKED.changes if when == step}
        assert {p for p, names in shown.classes.items() if "fresh" in names} == fresh
        assert {p for p, names in shown.classes.items() if "given" in names} == {0}
        assert all(value in shown.texts["settings"] for value in SETTINGS.values())
    left, top, right, bottom = (round(edge) for edge in json.loads(shown.root["data-box"]))
    changed = difference(pictures[0], pictures[8])
    assert changed.crop((left, top, right, bottom)).getbbox() is not None
    assert changed.crop((0, 0, 900, top - 4)).getbbox() is None
    for step, picture in pictures.items():
        assert picture.size == (900, 700)
        assert len(picture.crop((left, top, right, bottom)).getcolors(1 << 20)) > 16
        paper = picture.getpixel((3, 3))
        assert max(paper) < 60 if step == 4 else min(paper) > 200


@needs_browser
def test_replay_takes_eight_seconds_and_ends_at_the_last_step(page, browse):
    timed = with_script(
        page,
        """const seen = [];
        new MutationObserver(() => {
          seen.push([document.getElementById("readout").textContent, performance.now()]);
          document.documentElement.dataset.seen = JSON.stringify(seen);
        }).observe(document.getElementById("readout"), { childList: true });""",
    )
    shown = browse(timed, "sample=1&play=1", milliseconds=12_000)
    assert shown.text == text_at(REMASKED, 8)
    assert shown.texts["name"] == "Replay"
    seen = json.loads(shown.root["data-seen"])
    assert [readout for readout, _ in seen] == [readout_at(REMASKED, step) for step in range(1, 9)]
    assert 7000 < seen[-1][1] - seen[0][1] + 1000 < 9000


PROBE = """addEventListener("load", async () => {
  const byId = (id) => document.getElementById(id);
  const token = (position) => document.querySelector(`[data-position="${position}"]`);
  const press = (key) => document.body.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
  const readout = () => byId("readout").textContent;
  const wait = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));
  const found = { width: innerWidth, needed: document.documentElement.scrollWidth, touched: [], read: {}, drawn: {} };
  const observer = new MutationObserver(() => {});
  observer.observe(byId("text"), { subtree: true, childList: true, attributes: true });
  for (let step = 1; step <= 8; step += 1) {
    press("ArrowRight");
    const spans = observer.takeRecords().map((record) => record.target.closest("[data-position]"));
    found.touched.push([...new Set(spans.map((span) => Number(span.dataset.position)))].sort());
    found.read[step] = byId("text").innerText;
    found.drawn[step] = [...byId("text").children].filter((span) => span.getClientRects().length > 0).length;
  }
  found.needed = Math.max(found.needed, document.documentElement.scrollWidth);
  press("Home"); found.home = readout();
  press("End"); found.end = readout();
  press("ArrowLeft"); found.left = readout();
  const chart = byId("chart").getBoundingClientRect();
  const clientX = chart.left + chart.width / 4;
  byId("chart").dispatchEvent(new PointerEvent("pointerdown", { clientX, buttons: 1, bubbles: true }));
  found.chart = readout();
  byId("step").value = 6;
  byId("step").dispatchEvent(new Event("input"));
  found.slider = readout();
  token(1).dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));
  found.pointed = byId("details").textContent;
  token(3).focus();
  found.focused = byId("details").textContent;
  token(0).dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));
  found.pinned = byId("details").textContent === found.focused;
  await wait(600); found.address = location.hash;
  press(" "); found.playing = byId("name").textContent;
  press(" "); found.paused = byId("name").textContent;
  location.hash = "#sample=0&step=99";
  await wait(100); found.clamped = readout();
  found.resources = performance.getEntriesByType("resource").length;
  parent.postMessage(JSON.stringify(found), "*");
});"""
# A window is never as narrow as a phone, but a frame in it is.
PHONE = """<html><iframe width="375" height="700" style="border: 0"></iframe><script>
addEventListener("message", (event) => { document.documentElement.dataset.found = event.data; });
document.querySelector("iframe").src = "copy.html" + location.hash;
</script></html>"""


@needs_browser
def test_every_control_on_a_phone(page, browse):
    phone = with_script(page, PROBE).with_name("phone.html")
    phone.write_text(PHONE, encoding="utf-8")
    shown = browse(phone, "sample=1&step=0", milliseconds=3000)
    found = json.loads(shown.root["data-found"])
    assert found["width"] == 375 >= found["needed"]
    assert found["read"] == {str(step): text_at(REMASKED, step) for step in range(1, 9)}
    assert found["drawn"] == {str(step): 5 if step < 5 else 7 for step in range(1, 9)}
    changed = [{position for when, position, _ in REMASKED.changes if when == step} for step in range(9)]
    assert found["touched"] == [sorted(changed[step - 1] | changed[step]) for step in range(1, 9)]
    steps = {"home": 0, "end": 8, "left": 7, "chart": 2, "slider": 6}
    assert {name: found[name] for name in steps} == {name: readout_at(REMASKED, step) for name, step in steps.items()}
    history = ["masked at step 0", f"“{TEXTS[4]}” at step 1", "masked at step 3", f"“{TEXTS[2]}” at step 6"]
    line = f"token 2 “{TEXTS[2]}”, position 1, appeared at step 6 of 8\n"
    assert found["pointed"] == line + " → ".join(history)
    assert found["focused"] == f"token 1 “{TEXTS[1]}”, position 3, appeared at step 4 of 8"
    assert found["pinned"]
    assert found["address"] == "#sample=1&step=6"
    assert (found["playing"], found["paused"]) == ("Pause", "Play")
    assert found["clamped"] == readout_at(SHORT, 2)
    assert found["resources"] == 0


@needs_browser
def test_without_a_mask_open_means_not_yet_final(browse, tmp_path):
    path = tmp_path / "new" / "trace.html"
    write_trace(path, [NOISY], TEXTS.__getitem__, None, {})
    shown = browse(path, "sample=0&step=2")
    assert shown.text == text_at(NOISY, 2)
    assert shown.texts["readout"] == "Step 2 of 4 · 1 token open"
    assert [sorted(shown.classes[position] - {"token"}) for position in range(3)] == [
        ["appeared"],
        ["appeared", "fresh"],
        ["noise"],
    ]


def test_failed_write_names_the_way_out_and_leaves_the_old_file(tmp_path):
    path = tmp_path / "trace.html"
    path.write_text("old", encoding="utf-8")
    with pytest.raises(UserError) as error:
        write_trace(path / "trace.html", [SHORT], TEXTS.__getitem__, MASK, SETTINGS)
    assert str(error.value) == f"--trace {path / 'trace.html'}: cannot be written (File exists); name another file"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot be written \(File too large\); name another file"):
            write_trace(path, [SHORT], TEXTS.__getitem__, MASK, SETTINGS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {file.name: file.read_text(encoding="utf-8") for file in tmp_path.iterdir()} == {"trace.html": "old"}


def test_new_page_takes_the_place_of_the_old_at_once(tmp_path):
    path = tmp_path / "trace.html"
    write_trace(path, [SHORT], TEXTS.__getitem__, MASK, SETTINGS)
    old = path.read_text(encoding="utf-8")
    with path.open(encoding="utf-8") as reader:
        write_trace(path, [REMASKED], TEXTS.__getitem__, MASK, SETTINGS)
        assert reader.read() == old
    assert [file.name for file in tmp_path.iterdir()] == ["trace.html"]
    assert '"title":"sample 1"' in path.read_text(encoding="utf-8")
