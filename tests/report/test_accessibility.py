"""Pages of real results in a real browser: axe-core finds nothing against WCAG 2 A and AA, light and dark, on a phone
and on a desk; a phone's width holds them; everything can be reached and told by the keyboard.

Each page stands in a frame of its own width and colour scheme and posts what was found to the page around it, so that
one start of the browser looks at all of them.
"""

import html
import json
import re
import shutil
from pathlib import Path

import pytest

from polyrank.report import write_report
from polyrank.report.markov_figures import write_page

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

ROOT = Path(__file__).parents[2]
AXE = Path(__file__).parent / "node_modules" / "axe-core" / "axe.min.js"
RESULTS = ("e2e", "methods", "glue-mrpc.json", "glue-stsb.json", "gpl-cranfield.json", "gpl-medline.json")
FRAMES = [(width, scheme) for width in (390, 1280) for scheme in ("light", "dark")]
PAPER = {"light": "rgb(255, 255, 255)", "dark": "rgb(21, 24, 27)"}

PROBE = """
<script src="axe.min.js"></script>
<script>
addEventListener("load", async () => {
  const found = {name: frameElementName(), problems: []};
  try {
    for (const details of document.querySelectorAll("details")) details.open = true;
    const tags = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"];
    const options = {runOnly: tags, resultTypes: ["violations"], iframes: false, preload: false};
    const seen = await axe.run(document, options);
    found.problems = seen.violations.map((v) => `${v.id}: ${v.nodes.length} x ${v.nodes[0].html.slice(0, 200)}`);
    found.checked = seen.passes.length;
    found.paper = getComputedStyle(document.body).backgroundColor;
    found.width = innerWidth;
    found.room = document.documentElement.clientWidth;
    found.wide = document.documentElement.scrollWidth;
    found.stuck = [...document.querySelectorAll("*")].filter((e) =>
      e.scrollWidth > e.clientWidth + 1 && /auto|scroll/.test(getComputedStyle(e).overflowX) && e.tabIndex < 0).length;
    found.small = [...document.querySelectorAll("svg text")].map((t) => t.getBoundingClientRect().height)
      .filter((height) => height < 8).length;
    found.heads = [...document.querySelectorAll("table[data-sortable] thead th")]
      .filter((th) => th.scope !== "col" || !th.querySelector("button")?.textContent).length;
    found.unnamed = [...document.querySelectorAll("table")].filter((t) => !t.caption?.textContent.trim()).length
      + [...document.querySelectorAll("img:not([alt]), svg:not([aria-label])")].length;
  } catch (error) {
    found.problems.push(String(error));
  }
  parent.postMessage(found, "*");
});
function frameElementName() { return decodeURIComponent(location.hash.slice(1)); }
</script>
</body>
"""
AROUND = """<!DOCTYPE html><title>around</title><body><pre id="answer"></pre><script>
const found = [];
addEventListener("message", (event) => {
  found.push(event.data);
  document.getElementById("answer").textContent = JSON.stringify(found);
});
</script>
"""


def frames(pages: dict[str, Path], sizes: list[tuple[int, str]], height: int = 900) -> str:
    """A page around every page at every width and in every scheme."""
    parts = [AROUND]
    for name, page in pages.items():
        for width, scheme in sizes:
            style = f"border:0;color-scheme:{scheme}"
            source = f"{page.name}#{name} {width} {scheme}"
            parts.append(f'<iframe width="{width}" height="{height}" style="{style}" src="{source}"></iframe>\n')
    return "".join(parts)


def seen_by(chromium, around: Path) -> list[dict]:
    """What the frames of a page have posted; virtual time waits for all of them, however slow the machine is."""
    flags = ("--virtual-time-budget=20000", "--window-size=1400,900")
    dom = chromium.run(*flags, "--dump-dom", around.as_uri(), timeout=240.0)
    assert dom is not None, f"Chromium showed its first page, but never {around}"
    return json.loads(html.unescape(re.search(r'<pre id="answer">(.*?)</pre>', dom, re.S)[1]) or "[]")


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Pages of results of this repository, the demo's page and the search page, without the policy that would stop
    the probe, with the probe and axe beside them."""
    if not AXE.exists():
        pytest.skip("axe-core is not installed: npm ci --prefix tests/report")
    folder = tmp_path_factory.mktemp("pages")
    shutil.copy(AXE, folder)
    made = {}
    (made["report"],) = write_report([ROOT / "results" / name for name in RESULTS], folder / "report.html", "Results")
    header, rows = ["", "measured", "exact"], [["MLE line", "", "0.5961"], ["  as a mixture", "0.6 ± 0.1", "0.596"]]
    figures = {"Held-out loss.": ROOT / "docs" / "images" / "demo.png"}
    made["demo"] = write_page(folder / "demo.html", "Markov chains", ["What it is."], header, rows, figures)
    made |= {"search": folder / "search.html", "searched": folder / "searched.html"}
    from polyrank.retrieval._serve_page import render

    hit = {"id": "d1", "rank": 1, "title": "Wings", "snippet": "A swept wing. " * 20, "score": 0.5}
    rankings = {"base": [hit, hit | {"rank": 2, "id": "d2", "title": ""}], "adapted": [hit]}
    answer = {"query": "wing", "k": 2, "rankings": rankings, "moves": {"adapted": {"d1": 1, "d2": None}}}
    made["search"].write_text(render("Papers", ["base", "adapted"], None, "the query is empty"), encoding="utf-8")
    made["searched"].write_text(render("Papers", ["base", "adapted"], answer), encoding="utf-8")
    for page in made.values():
        text = re.sub(r"<meta http-equiv=[^>]*>", "", page.read_text(encoding="utf-8"))
        page.write_text(text.replace("</body>", PROBE), encoding="utf-8")
    return made


@pytest.fixture(scope="module")
def found(pages, chromium):
    """What was seen of each page: "report 390 dark" -> dict."""
    folder = pages["report"].parent
    (folder / "around.html").write_text(frames(pages, FRAMES), encoding="utf-8")
    return {answer["name"]: answer for answer in seen_by(chromium, folder / "around.html")}


def test_the_checker_is_pinned_by_hash_and_no_host_is_named():
    """npm checks the hash; the host is that of the machine's own npm configuration."""
    asked = json.loads((AXE.parents[2] / "package.json").read_text(encoding="utf-8"))["devDependencies"]
    locked = json.loads((AXE.parents[2] / "package-lock.json").read_text(encoding="utf-8"))["packages"]
    assert set(locked) == {"", "node_modules/axe-core"}
    assert locked["node_modules/axe-core"]["version"] == asked["axe-core"]
    assert locked["node_modules/axe-core"]["integrity"].startswith("sha512-")
    assert "resolved" not in locked["node_modules/axe-core"]


@pytest.mark.parametrize("name", ["report", "demo", "search", "searched"])
@pytest.mark.parametrize(("width", "scheme"), FRAMES)
def test_a_page_breaks_no_rule_and_fits(found, name, width, scheme):
    seen = found[f"{name} {width} {scheme}"]
    assert seen["problems"] == []
    assert seen["checked"] >= 8  # rules that had something to look at
    assert seen["paper"] == PAPER[scheme]
    assert seen["width"] == width
    assert seen["wide"] <= seen["room"]
    assert (seen["stuck"], seen["heads"], seen["unnamed"], seen["small"]) == (0, 0, 0, 0)


def test_axe_would_have_found_a_mistake(pages, chromium):
    broken = pages["demo"].with_name("broken.html")
    text = pages["demo"].read_text(encoding="utf-8").replace(' alt="Plot: Held-out loss."', "")
    broken.write_text(text.replace("--quiet: #56606a", "--quiet: #c0c0c0"), encoding="utf-8")
    around = broken.with_name("around-broken.html")
    around.write_text(frames({"broken": broken}, [(390, "light")]), encoding="utf-8")
    (seen,) = seen_by(chromium, around)
    assert {problem.split(":")[0] for problem in seen["problems"]} == {"color-contrast", "image-alt"}
    assert seen["unnamed"] == 1
