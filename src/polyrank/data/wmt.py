"""newstest2014 with ten extra human references: 500 English sentences, German or French (tab separated, plain or .gz).

    S-<i>     the source          T-<i>     the official reference          R<j>-<i>  extra reference j, j = 1..10

Source: facebookresearch/analyzing-uncertainty-nmt (Ott et al. 2018), `wmt14-en-de.extra_refs`.
"""

from __future__ import annotations

import re
from pathlib import Path

from ..core.errors import DataError
from .e2e import MultiReference
from .text_files import read_text

_KEY = re.compile(r"(S|T|R(\d+))-(\d+)")


def read_extra_references(path: str | Path, official: bool = False) -> list[MultiReference]:
    """Every source with its extra references, in their order.

    Args:
        official: put the official reference (T) before the extra ones; as LoRA-MCL scores, it is left out.
    Raises: DataError for a line that is no such entry or comes twice, a text that is empty, ids without source or
        without a reference, or ids that lack references which others have (which, and how many).
    """
    path, entries = Path(path), {}
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        key, tab, text = line.rstrip("\r").partition("\t")
        match = _KEY.fullmatch(key)
        if match is None or not tab or not text.strip():
            raise DataError(f"{str(path)!r}, line {number}: expected S-<i>, T-<i> or R<j>-<i>, a tab and a text")
        place = (int(match[3]), 0 if match[1] == "T" else -1 if match[1] == "S" else int(match[2]))
        if place in entries:
            raise DataError(f"{str(path)!r}, line {number}: {key} appears twice")
        entries[place] = text.strip()
    ids = sorted({i for i, _ in entries})
    if not ids:
        raise DataError(f"{str(path)!r} holds no sentences")
    wanted = sorted({j for _, j in entries if j > 0 or (official and j == 0)})
    for j, name in [(-1, "the source S"), *((j, f"reference {f'R{j}' if j else 'T'}") for j in wanted)]:
        missing = [i for i in ids if (i, j) not in entries]
        if missing:
            raise DataError(
                f"{str(path)!r}: {name} is missing for {len(missing)} of {len(ids)} ids (first: {missing[0]})"
            )
    if not wanted:
        raise DataError(f"{str(path)!r} holds no reference")
    return [MultiReference(f"wmt14-{i:04d}", entries[i, -1], tuple(entries[i, j] for j in wanted)) for i in ids]
