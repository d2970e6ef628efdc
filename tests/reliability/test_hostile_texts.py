"""Texts of others in pages, tables and terminals: shown as they are, never as markup, never as an order."""

import csv
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import hostile_files as hostile
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from polyrank.core.errors import printable
from polyrank.core.records import Metric, Row, new_record, write_record
from polyrank.report import write_report
from polyrank.report.exports import csv_table, latex_table
from polyrank.report.markov_figures import write_page
from polyrank.report.tables import build_table

polyrank = hostile.polyrank
TEXTS = {
    "script": "<script>alert(1)</script>",
    "closed-script": "</script><script>alert(1)</script>",
    "style": "</style><style>*{display:none}</style>",
    "image": "<img src=x onerror=alert(1)>",
    "svg": "<svg/onload=alert(1)>",
    "frame": "<iframe src='javascript:alert(1)'></iframe>",
    "attribute": '" onmouseover="alert(1)" x="',
    "single-quote": "' onfocus='alert(1)' autofocus='",
    "table": "</td></tr></table><h1>x</h1>",
    "comment": "<!-- x --><!--",
    "cdata": "<![CDATA[<script>alert(1)</script>]]>",
    "entities": "&lt;script&gt;&#x3c;script&#62;&amp;",
    "braces": "{title} {0} {__class__} %s %(x)s $x",
    "template": "{{7*7}} ${7*7} <%= 7*7 %>",
    "link": "[x](javascript:alert(1)) ![y](http://evil.example/x.png)",
    "pipe": "a | b || c \\| d",
    "backticks": "``` <b>x</b> ```",
    "heading": "# x\n\n---\n<b>y</b>",
    "latex": r"\input{/etc/passwd} $x$ 50% a_b ^ ~ \\ {",
    "meta": '<meta http-equiv="refresh" content="0;url=http://evil.example">',
    "base": "<base href='http://evil.example/'>",
    "form": "<form action='http://evil.example'><input name=q>",
    "right-to-left": "abc\u05d0\u05d1 def",
    "wide": "漢字 🙂 é",
    "long": "<b>" * 600,
}
FORMULAS = ["=1+1", "=cmd|' /C calc'!A0", "+1+1", "-1+1", "@SUM(A1)", " =1+1", '=HYPERLINK("http://evil.example")']
VOID = {"meta", "br", "hr", "img", "input", "link"}


class Reader(HTMLParser):
    """Tags, attributes and texts of a page."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.texts = [], [], []
        self.open = []
        self.feed(page)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.texts.append(data)


def check_inert(page, text, plain):
    """The page has the tags of the same page about a harmless text, no handlers, and shows the text."""
    seen, harmless = Reader(page), Reader(plain)
    assert seen.tags == harmless.tags
    assert not [name for name, _ in seen.attributes if name.startswith("on") or name in ("srcdoc", "style")]
    addresses = [value for name, value in seen.attributes if name in ("src", "href", "action", "formaction")]
    assert all(not (value or "").startswith(("http", "javascript", "//")) for value in addresses)
    words = " ".join(" ".join(seen.texts).split())
    assert " ".join(text.split()) in words


def record(text):
    rows = [Row(text, {"bleu": 1.0}, 0, {"setting": text[:2000]})]
    metrics = {"bleu": Metric("%", "higher", text[:100])}
    return new_record("x", "run", metrics, rows, config={"caption": text, text: [text]}, notes=[text])


@pytest.mark.parametrize("name", TEXTS)
def test_in_a_report(tmp_path, name):
    write_record(record(TEXTS[name]), tmp_path / "a.json", root=tmp_path)
    write_record(record("plain"), tmp_path / "b.json", root=tmp_path)
    page, plain = (
        write_report([tmp_path / f"{one}.json"], tmp_path / f"{one}.html", title)[0].read_text()
        for one, title in (("a", TEXTS[name][:200]), ("b", "plain"))
    )
    check_inert(page, TEXTS[name], plain)
    (markdown, *_) = write_report([tmp_path / "a.json"], tmp_path / "a.md", TEXTS[name][:200])
    assert not re.search(r"<\w|(?<!\\)\]\(", re.sub(r"!\[[^]]*\]\([\w.-]+\)", "", markdown.read_text()))


@pytest.mark.parametrize("name", TEXTS)
def test_on_the_search_page(name):
    pytest.importorskip("faiss")
    from polyrank.retrieval._serve_page import render

    def page(text):
        hit = {"rank": 1, "id": text, "title": text, "snippet": text, "score": 0.5}
        names = [text[:50], "adapted"]
        rankings = {side: [hit] for side in names}
        answer = {"query": text, "k": 10, "rankings": rankings, "moves": {"adapted": {text: 1}}}
        return render(text, names, answer) + render(text, names, None, error=text)

    check_inert(page(TEXTS[name]), TEXTS[name], page("plain"))


@pytest.mark.parametrize("name", [name for name in TEXTS if name not in ("long",)])
def test_on_the_page_of_the_demo(tmp_path, name):
    picture = tmp_path / "x.png"
    picture.write_bytes(b"\x89PNG")

    def page(text):
        return write_page(tmp_path / "x.html", text, [text], [text], [[text]], {text: picture}).read_text()

    seen, plain = Reader(page(TEXTS[name])), Reader(page("plain"))
    assert seen.tags == plain.tags
    assert [attribute for attribute, _ in seen.attributes] == [attribute for attribute, _ in plain.attributes]


@pytest.mark.parametrize("text", FORMULAS)
def test_no_spreadsheet_computes_a_method(text):
    table = build_table(record(text))
    (head, row) = csv.reader(io.StringIO(csv_table(table)))
    assert row[:2] == [f"'{text}", f"'{text}"]
    assert float(row[head.index("bleu")]) == 1.0


@pytest.mark.parametrize("name", ["latex", "braces", "pipe", "script"])
def test_in_latex(name):
    line = latex_table(build_table(record(TEXTS[name]))).split("\\midrule\n")[1].split("\n\\bottomrule")[0]
    bare = re.sub(r"\\\\$|\\(textbackslash\{\}|textasciitilde\{\}|textasciicircum\{\}|textbf|[&%$#_{}\\])", "", line)
    assert not re.search(r"[\\$%#_^~]", bare)
    assert bare.count("&") == 2


SIGNS = [chr(code) for code in (*range(32), *range(127, 160), 0x200E, 0x202E, 0x2066, 0x2028, 0xFEFF) if code != 10]


@pytest.mark.parametrize("command", ["inspect", "evaluate", "error"])
def test_nothing_that_a_terminal_obeys_is_printed(polyrank, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    text = "".join(SIGNS)
    if command == "inspect":
        name = f"base_model.model.{text}.lora_{{}}.weight"
        header = {name.format("A"): hostile.entry([1, 2]), name.format("B"): hostile.entry([2, 1], 8, 16)}
        Path("x.safetensors").write_bytes(hostile.raw(header, bytes(16)))
        done = polyrank(["inspect", "x.safetensors", "--layers"])
        assert "?" in done.out
    elif command == "evaluate":
        line = {"id": text, "input": text, "candidates": [text, "a b"], "references": [text]}
        Path("p.jsonl").write_text(json.dumps(line) + "\n")
        done = polyrank(["evaluate", "p.jsonl", "--metrics", "nothing" + text])
    else:
        done = polyrank(["report", f"absent{text.replace(chr(0), '')}.json", "-o", "r.html"])
    hostile.check_one_line(done)


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.text())
def test_printable_keeps_what_can_be_printed_and_nothing_else(text):
    shown = printable(text)
    assert len(shown) == len(text)
    for before, after in zip(text, shown, strict=True):
        assert after == (before if before.isprintable() or before == "\n" else "?")
