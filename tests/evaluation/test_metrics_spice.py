"""SPICE's program: its scorer in place of a stub here (CoreNLP is too large to carry), called as the real one is."""

import shutil
import subprocess
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from polyrank.core.errors import DataError, RunError
from polyrank.evaluation.metrics import _registry, evaluate_predictions, spice
from polyrank.evaluation.metrics._session import session

pytest.importorskip("pycocoevalcap")
ROWS = [
    {"id": "a", "candidates": ["a b c", "x"], "references": ["b", "a d"]},
    {"id": "b", "candidates": ["", "a b"], "references": ["a b"]},
]
STUB = {  # F = share of the candidate's words that some reference has; written back to front
    "SpiceArguments": "public class SpiceArguments { String[] all; SpiceArguments(String[] a) { all = a; } }",
    "SpiceStats": """public class SpiceStats {
        String json = "";
        public String toJSONString() { return "[" + json + "]"; }
    }""",
    "SpiceScorer": """
        import java.io.FileReader; import java.util.*; import org.json.simple.*; import org.json.simple.parser.*;
        public class SpiceScorer {
            public SpiceStats stats;
            SpiceScorer() {}
            public void scoreBatch(SpiceArguments given) throws Exception {
                stats = new SpiceStats();
                for (Object one : (JSONArray) new JSONParser().parse(new FileReader(given.all[0]))) {
                    JSONObject item = (JSONObject) one;
                    String[] words = ((String) item.get("test")).split(" ");
                    if (words[0].equals("fail")) throw new IllegalStateException("no parse");
                    Set<String> known = new HashSet<>();
                    for (Object ref : (JSONArray) item.get("refs"))
                        known.addAll(Arrays.asList(((String) ref).split(" ")));
                    double found = 0;
                    for (String word : words) if (known.contains(word)) found += 1;
                    String scores = "{\\"All\\": {\\"f\\": " + found / words.length + "}}";
                    String entry = "{\\"image_id\\": " + item.get("image_id") + ", \\"scores\\": " + scores + "}";
                    stats.json = entry + (stats.json.isEmpty() ? "" : ", ") + stats.json;
                }
            }
        }""",
}


def corenlp(folder: Path) -> Path:
    for name in spice.CORENLP:
        with zipfile.ZipFile(folder / name, "w") as jar:
            jar.writestr("empty", "")
    return folder


@pytest.fixture(scope="module")
def stub(tmp_path_factory):
    """A folder laid out as pycocoevalcap's spice/, whose scorer is the stub."""
    if shutil.which("javac") is None or not spice.spice_java():
        pytest.skip("no Java compiler")
    place = tmp_path_factory.mktemp("spice")
    (place / "source").mkdir()
    lib = Path(next(iter(find_spec("pycocoevalcap").submodule_search_locations))) / "spice" / "lib"
    shutil.copytree(lib, place / "lib", ignore=shutil.ignore_patterns("*corenlp*"))
    for name, text in STUB.items():
        (place / "source" / f"{name}.java").write_text(f"package edu.anu.spice;\n{text}")
    files = sorted(map(str, (place / "source").glob("*.java")))
    command = ["javac", "-cp", str(place / "lib" / "*"), "-d", str(place / "out"), *files]
    subprocess.run(command, check=True, timeout=120, stdin=subprocess.DEVNULL)
    with zipfile.ZipFile(place / "spice-1.0.jar", "w") as jar:
        for file in (place / "out").rglob("*.class"):
            jar.write(file, file.relative_to(place / "out").as_posix())
    return corenlp(place)


@pytest.mark.slow
def test_scores_come_back_to_their_candidates(stub, monkeypatch):
    monkeypatch.setattr(spice, "_package", lambda: stub)
    monkeypatch.setitem(_registry.INSTALLED, "spice", ("", lambda: True))
    if spice._java_version() < 15:
        pytest.skip("Java before 15 is called otherwise: next test")
    found = evaluate_predictions(ROWS, ["oracle_spice", "mean_spice"], models={"spice": str(stub)})
    assert found["oracle_spice"] == pytest.approx((2 / 3 + 1) / 2)
    assert found["mean_spice"] == pytest.approx((2 / 3 + 0 + 0 + 1) / 4)
    with session({"spice": str(stub)}), pytest.raises(RunError, match=r"failed with status 1: .*no parse"):
        spice.score_spice([("fail", ("a",))])


def test_the_call_of_an_older_java(tmp_path, monkeypatch):
    """Java 8 stands in as a script: it says its version, notes its arguments and writes what SPICE writes."""
    program = tmp_path / "bin" / "java"
    program.parent.mkdir()
    program.write_text(
        '#!/bin/sh\nif [ "$1" = -version ]; then echo \'openjdk version "1.8.0_462"\' >&2; exit; fi\n'
        f'echo "$@" > {tmp_path}/arguments\n'
        'while [ "$1" != -out ]; do shift; done\n'
        'echo \'[{"image_id": 1, "scores": {"All": {"f": NaN}}},\' > "$2"\n'
        'echo \'{"image_id": 0, "scores": {"All": {"f": 0.25}}}]\' >> "$2"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    folder = corenlp(tmp_path)
    with session({"spice": str(folder)}):
        assert spice.spice_java()
        assert spice.score_spice([("a b", ("a",)), ("c", ("d",))]) == [0.25, 0.0]
    arguments = (tmp_path / "arguments").read_text()
    assert "edu.anu.spice.SpiceScorer" in arguments
    assert f"{folder}/*" in arguments
    program.write_text(program.read_text().replace("0.25", '"x"'))
    with session({"spice": str(folder)}), pytest.raises(RunError, match="wrote no scores that can be read"):
        spice.score_spice([("a b", ("a",)), ("c", ("d",))])


def test_without_corenlp_it_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(spice, "_package", lambda: tmp_path)
    monkeypatch.setitem(_registry.INSTALLED, "java", ("", lambda: True))
    for name in ("oracle_spice", "mean_spider"):
        with pytest.raises(DataError, match=f"metric '{name}' needs Stanford CoreNLP 3.6.0 .*--model spice=FOLDER"):
            evaluate_predictions(ROWS, [name])


def test_the_real_program_where_corenlp_is():
    if spice.corenlp_folder() is None or not spice.spice_java():
        pytest.skip("Stanford CoreNLP 3.6.0 is not here")
    same, other = spice.score_spice([("a dog runs on grass", ("a dog runs on grass",)), ("a cat", ("a red car",))])
    assert (same, other) == (1.0, 0.0)
