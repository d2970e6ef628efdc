"""SPICE's Java program (Anderson et al. 2016), as pycocoevalcap carries it, with the parser that it does not carry.

It needs Stanford CoreNLP 3.6.0 with its models: stanford-corenlp-3.6.0.jar and stanford-corenlp-3.6.0-models.jar, in
the folder given as the model "spice" or in pycocoevalcap's spice/lib.

Differs from pycocoevalcap: nothing is downloaded, nothing is written beside the package, parses are not kept in a
database (the scores are, by pair). The program prints its result by a JavaScript engine, which Java has no more since
version 15: there its scorer is called by a few lines of Java, which a JDK compiles as it starts.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from ...core.errors import ConfigError, RunError
from ._score_files import Pair
from ._session import current

SPICE_VERSION = "1.0-corenlp-3.6.0"
CORENLP = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
MEMORY = "8G"

_CALLER = """
import java.nio.file.*;
public class CallSpice {
    public static void main(String[] args) throws Exception {
        Class<?> type = Class.forName("edu.anu.spice.SpiceScorer");
        Class<?> options = Class.forName("edu.anu.spice.SpiceArguments");
        var constructor = type.getDeclaredConstructor();
        constructor.setAccessible(true);
        Object scorer = constructor.newInstance();
        var parse = options.getDeclaredConstructor(String[].class);
        parse.setAccessible(true);
        Object given = parse.newInstance((Object) new String[] {args[0], "-silent"});
        type.getMethod("scoreBatch", options).invoke(scorer, given);
        Object stats = type.getField("stats").get(scorer);
        Files.writeString(Path.of(args[1]), (String) stats.getClass().getMethod("toJSONString").invoke(stats));
    }
}
"""


def corenlp_folder() -> Path | None:
    """Where both CoreNLP files lie; None where they are missing."""
    given = current().models.get("spice")
    packaged = _package()
    for folder in [Path(given)] if given else [packaged / "lib"] if packaged else []:
        if all((folder / name).is_file() for name in CORENLP):
            return folder
    return None


def spice_java() -> bool:
    """Whether the Java on the PATH can run SPICE: version 8 to 14, or a later JDK (a runtime has no compiler)."""
    version = _java_version()
    return version is not None and (version < 15 or _has_compiler())


def score_spice(pairs: Sequence[Pair]) -> list[float]:
    """SPICE of each pair, 0 to 1. Raises: RunError if the program fails, with the last line that it printed."""
    folder, package = corenlp_folder(), _package()
    if folder is None or package is None:
        raise ConfigError("SPICE needs pycocoevalcap and Stanford CoreNLP 3.6.0")
    classes = ":".join(map(str, (package / "spice-1.0.jar", package / "lib" / "*", folder / "*")))
    with tempfile.TemporaryDirectory(prefix="polyrank-spice-") as place:
        given, out, caller = (Path(place) / name for name in ("in.json", "out.json", "CallSpice.java"))
        items = [{"image_id": i, "test": text, "refs": list(refs)} for i, (text, refs) in enumerate(pairs)]
        given.write_text(json.dumps(items), encoding="utf-8")
        command = ["java", f"-Xmx{MEMORY}", "-Dfile.encoding=UTF-8", "-cp", classes]
        if (_java_version() or 0) < 15:
            command += ["edu.anu.spice.SpiceScorer", str(given), "-out", str(out), "-silent"]
        else:
            caller.write_text(_CALLER, encoding="utf-8")
            command += [str(caller), str(given), str(out)]
        ended = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
        if ended.returncode or not out.exists():
            raise RunError(f"SPICE's Java program failed with status {ended.returncode}: {_reason(ended.stderr)}")
        return _read_scores(out, len(pairs))


def _read_scores(out: Path, count: int) -> list[float]:
    try:
        found = {item["image_id"]: item["scores"]["All"]["f"] for item in json.loads(out.read_text(encoding="utf-8"))}
        scores = [float(found[i]) for i in range(count)]
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"SPICE's Java program wrote no scores that can be read: {error!r}") from None
    return [0.0 if math.isnan(score) else score for score in scores]


def _reason(printed: str) -> str:
    causes = [line.strip() for line in printed.splitlines() if re.match(r"\s*(Caused by|Exception|Error|java\.)", line)]
    return causes[-1] if causes else (printed.strip().splitlines() or ["nothing was printed"])[-1]


def _package() -> Path | None:
    spec = find_spec("pycocoevalcap")
    return (
        Path(next(iter(spec.submodule_search_locations))) / "spice"
        if spec and spec.submodule_search_locations
        else None
    )


def _java_version() -> int | None:
    """Major version of the Java on the PATH (8 for 1.8), None where there is none."""
    program = shutil.which("java")
    return _version_of(program) if program else None


@lru_cache(maxsize=8)
def _version_of(program: str) -> int | None:
    printed = subprocess.run([program, "-version"], capture_output=True, text=True, timeout=60).stderr
    found = re.search(r'version "(?:1\.)?(\d+)', printed)
    return int(found[1]) if found else None


@lru_cache(maxsize=1)
def _has_compiler() -> bool:
    listed = subprocess.run(["java", "--list-modules"], capture_output=True, text=True, timeout=60).stdout
    return "jdk.compiler" in listed
