"""The page: well-formed, self-contained, nothing in it runs but its own script; the same in Markdown."""

import base64
import hashlib
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from polyrank.core.errors import ConfigError, DataError
from polyrank.core.records import Metric, Row, new_record
from polyrank.report import load_results, write_report
from polyrank.report.markov_figures import write_page
from polyrank.report.plots import choose_plots, draw_svg
from polyrank.report.tables import build_table

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Reader(HTMLParser):
    """Reads a page; fails on tags that do not close in order."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.texts, self.attributes = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.texts.append(data)


@pytest.fixture
def page(results, tmp_path):
    (path,) = write_report([results], tmp_path / "report.html", "Two methods & <more>")
    return path.read_text(encoding="utf-8")


def nothing_from_elsewhere(page):
    """Asserts that no address of the page leads out of it."""
    for name, value in read(page).attributes:
        if name in ("src", "href", "xlink:href", "action", "data", "srcset", "poster", "background"):
            assert value.startswith(("#", "data:image/png;base64,")), (name, value)
    assert not re.search(r"@import|url\((?!#)", page)
    assert not re.search(r"\b(fetch|XMLHttpRequest|WebSocket|import)\s*\(", page)


def read(page):
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert not reader.open
    return reader


def test_nothing_comes_from_elsewhere(page):
    nothing_from_elsewhere(page)
    assert {"link", "iframe", "object", "img"}.isdisjoint(read(page).tags)


def test_names_are_shown_as_text_and_only_the_pages_own_script_may_run(page, hostile):
    reader = read(page)
    assert reader.tags.count("script") == 1
    assert not [name for name, _ in reader.attributes if name.startswith("on")]
    assert hostile in reader.texts
    script = re.search(r"<script>(.*?)</script>", page, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(value for _, value in reader.attributes if "default-src" in (value or ""))
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


def test_ids_are_unique_and_labels_exist(page):
    reader = read(page)
    ids = [value for name, value in reader.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    for name, value in reader.attributes:
        if name in ("aria-labelledby", "data-sortable"):
            assert value in ids
        if name == "xlink:href":
            assert value[1:] in ids


def test_the_table_says_what_it_shows(page):
    reader = read(page)
    text = " ".join("".join(reader.texts).split())
    assert "oracle BLEU (%) ↑" in text
    assert "40 ± 2.0" in text
    assert "3 (0, 1, 2)" in text
    assert '<span class="best" title="best">40</span>' in page
    assert reader.tags.count("caption") >= 2
    assert page.count('<span class="unseen"> (best)</span>') == page.count(' title="best">') > 0
    assert "oracle BLEU against mBLEU-4. Bars: sample standard deviation over seeds" in text
    assert ("scope", "row") in reader.attributes
    assert ("scope", "col") in reader.attributes
    assert "oracle BLEU against mBLEU-4" in text
    assert "oracle BLEU against trainable parameters" in text


def test_every_seed_as_measured_and_a_list_of_the_results(page):
    (table,) = re.findall(r'<table data-sortable="e\d+">.*?</table>', page, re.S)
    heads = re.findall(r'<th scope="col"><span>(.*?)</span>', table)
    assert heads[:6] == ["method", "budget", "seed", "oracle BLEU (%)", "mBLEU-4 (%)", "peak memory (bytes)"]
    mcl = [re.sub("<[^>]*>", " ", row).split() for row in table.splitlines() if ">LoRA-MCL<" in row]
    assert [row[1:] for row in mcl] == [
        ["3", str(seed), bleu, "20", "6.29146e+06", "3000"] for seed, bleu in enumerate(("38", "40", "42"))
    ]
    assert re.findall(r'<a href="#(t\d)">([\w-]+)</a>', page) == [("t0", "bench-mcl"), ("t1", "e2e")]


def test_the_page_of_the_toy_is_of_the_same_kind(tmp_path, hostile):
    png = tmp_path / "a.png"
    png.write_bytes(b"\x89PNG")
    rows = [["MLE line", "", "0.5"], [f"  {hostile}", "1 ± 2", "0.3"]]
    path = write_page(tmp_path / "toy.html", "A & B", [hostile], ["", "measured", "exact"], rows, {hostile: png})
    page = path.read_text(encoding="utf-8")
    nothing_from_elsewhere(page)
    reader = read(page)
    assert reader.tags.count("script") == 1
    assert reader.tags.count("th") == 3 + 2
    assert [value for name, value in reader.attributes if name == "scope"] == ["col"] * 3 + ["row"] * 2
    assert "<title>A &amp; B</title>" in page
    assert "".join(reader.texts).count(hostile) == 3  # a paragraph, a row, a caption
    assert f"Plot: {hostile}" in [value for name, value in reader.attributes if name == "alt"]
    assert "prefers-color-scheme: dark" in page
    assert "quantity" in reader.texts  # a head without words would be a head that nobody can name


def test_it_follows_light_and_dark_and_the_width(page):
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport" content="width=device-width' in page
    assert "currentColor" in page
    assert "#010203" not in page


def test_plots_need_two_methods_and_skip_what_is_no_number(results):
    e2e = next(record for record in load_results([results]) if record.name == "e2e")
    first, *_ = choose_plots(build_table(e2e))
    assert (first.x.key, first.y.key) == ("mbleu", "bleu")
    svg = draw_svg(first, "p")
    assert "<script" not in svg
    assert "&lt;script&gt;" in svg
    lonely = new_record(
        "x", "run", {"c": Metric(role="cost"), "m": Metric(better="higher")}, [Row("a", {"c": 1, "m": 2})]
    )
    assert choose_plots(build_table(lonely)) == []


def test_the_same_files_make_the_same_page(results, tmp_path):
    (one,), (other,) = write_report([results], tmp_path / "a.html"), write_report([results], tmp_path / "b.html")
    assert one.read_bytes() == other.read_bytes()


def test_markdown_has_the_same_table_and_no_markup_of_others(results, tmp_path):
    report, *pictures = write_report([results], tmp_path / "out" / "report.md")
    text = report.read_text(encoding="utf-8")
    assert "| LoRA\\-MCL |" in text or "| LoRA-MCL |" in text
    assert "**40** ± 2.0" in text
    assert "*35* ± 0.0" in text
    assert not re.search(r"<(script|img|b)\b", text)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = {len(re.findall(r"(?<!\\)\|", line)) for line in lines if "budget" in text and len(line) > 40}
    assert len(cells) <= 3  # one width for each of the three tables
    assert "### e2e: every seed" in text
    assert "| LoRA-MCL | 3 | 2 | 42 | 20 | 6.29146e+06 | 3000 |" in text
    assert "*oracle BLEU against mBLEU-4. Bars: sample standard deviation over seeds.*" in text
    assert re.search(r"^Versions: .*torch 2", text, re.M)
    assert pictures
    for picture in pictures:
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert f"]({picture.name})" in text


def test_mistakes(results, tmp_path):
    with pytest.raises(ConfigError, match=r"ends with .html, .md, .tex or .csv, got '.*report.pdf'"):
        write_report([results], tmp_path / "report.pdf")
    with pytest.raises(DataError, match="no result files given"):
        write_report([], tmp_path / "report.html")
    with pytest.raises(DataError, match="no such file"):
        write_report([tmp_path / "absent.json"], tmp_path / "report.html")
    assert not list(tmp_path.glob("report.*"))


def test_a_report_needs_no_torch(results, tmp_path):
    code = (
        "import sys, types\n"
        "package = types.ModuleType('polyrank'); package.__path__ = [sys.argv[1]]; sys.modules['polyrank'] = package\n"
        "from polyrank.report import write_report\n"
        "write_report([sys.argv[2]], sys.argv[3])\n"
        "assert not {'torch', 'transformers', 'peft'} & set(sys.modules)"
    )
    import polyrank

    arguments = [str(Path(polyrank.__file__).parent), str(results), str(tmp_path / "r.html")]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True)
    assert (tmp_path / "r.html").exists()
