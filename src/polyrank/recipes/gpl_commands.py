"""The verbs of `polyrank gpl`: their arguments, and what each does. Rooms are imported when a verb is called.

gpl run corpus=DIR      a recipe run: queries, negatives, labels, adapter
gpl evaluate RUN        an adapter (or many) against zero-shot and BM25 on judged data
gpl index CORPUS        an index on disk, by the encoder with or without an adapter
gpl search QUERY        documents from an index
gpl serve               the page that shows both rankings side by side
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError

_log = logging.getLogger("polyrank")
Type = Callable[[str], int]

VERBS: dict[str, tuple[str, tuple[str, ...]]] = {
    "run": (
        "adapt an encoder to a corpus without labels; the same command again goes on where it stopped",
        ("polyrank gpl run corpus=documents", "polyrank gpl run corpus=documents --cfg job"),
    ),
    "evaluate": (
        "an adapter, or every adapter in a folder, against zero-shot and BM25 on judged data (BEIR layout)",
        ("polyrank gpl evaluate run --data judged", "polyrank gpl evaluate run/adapter --data judged --json"),
    ),
    "index": (
        "index a corpus; the same command again goes on where it stopped",
        (
            "polyrank gpl index documents -o index --adapter run --both",
            "polyrank gpl index documents -o base-index --kind ivf",
        ),
    ),
    "search": (
        "documents for one or more queries",
        ('polyrank gpl search "a question" --index index', 'polyrank gpl search one two --index index -k 3 --json'),
    ),
    "serve": (
        "a local page: type a query, see what base and adapted encoder find, side by side",
        ("polyrank gpl serve --index index",),
    ),
}  # fmt: skip


def add_verbs(gpl: argparse.ArgumentParser, whole: Type, positive: Type) -> None:
    """Add the verbs' parsers. `whole`, `positive`: argument types of the command line."""
    verbs = gpl.add_subparsers(dest="verb", metavar="VERB", title="verbs", required=True)
    added = {name: _add(verbs, name, *VERBS[name]) for name in VERBS}

    run = added["run"]
    run.add_argument("overrides", nargs="*", metavar="key=value", help="corpus=DIR and fields of the configuration")
    run.add_argument("--multirun", "-m", action="store_true", help="one run for each combination of a=1,2 b=3,4")
    run.add_argument("--cfg", choices=["job"], help="print the configuration and stop")
    run.add_argument("--config-dir", metavar="DIR", help="a folder of your own YAML")
    run.add_argument("--fresh", action="store_true", help="start over; the earlier run is kept beside the new one")

    evaluate = added["evaluate"]
    evaluate.add_argument("source", metavar="RUN", help="a run's folder, an adapter folder, or a folder of adapters")
    evaluate.add_argument("--data", required=True, metavar="DIR", help="corpus, queries and qrels, as BEIR has them")
    evaluate.add_argument("--split", default="test", metavar="NAME", help="qrels/NAME.tsv (default: %(default)s)")
    evaluate.add_argument("--checkpoints", action="store_true", help="every adapter below RUN, not only its adapter/")
    evaluate.add_argument("--measures", metavar="A,B", help="nDCG@k, MAP, MRR, Recall@k, P@k")
    evaluate.add_argument("--depth", type=positive, default=1000, metavar="N", help="documents ranked for a query")
    evaluate.add_argument("--no-bm25", action="store_true", help="leave BM25 out (it holds the corpus in memory)")
    evaluate.add_argument("-o", "--out", metavar="DIR", help="default: RUN/evaluation/<name of the data>")
    _add_encoder(evaluate, positive)

    _add_search_arguments(added, whole, positive)
    for name, verb in added.items():
        if name != "serve":
            verb.add_argument("--json", action="store_true", help="results as JSON")
        verb.add_argument("--quiet", "-q", action="store_true", help="no progress on standard error")


def _add_search_arguments(added: Mapping[str, Any], whole: Type, positive: Type) -> None:
    index = added["index"]
    index.add_argument("corpus", metavar="CORPUS", help="a BEIR folder, a folder of .txt/.md, a .jsonl or a .csv")
    index.add_argument("-o", "--out", required=True, metavar="DIR", help="the index")
    index.add_argument("--adapter", metavar="RUN", help="a run's folder or an adapter folder (default: base encoder)")
    index.add_argument("--both", action="store_true", help="two indexes, DIR/base and DIR/adapted, to compare")
    index.add_argument("--kind", default="flat", metavar="KIND", help="flat (exact) or ivf (inverted lists)")
    index.add_argument("--lists", type=positive, metavar="N", help="of ivf (default: root of the number of documents)")
    _add_encoder(index, positive)

    search, serve = added["search"], added["serve"]
    search.add_argument("queries", nargs="+", metavar="QUERY")
    search.add_argument("-k", type=positive, default=10, metavar="N", help="results (default: %(default)s)")
    for verb in (search, serve):
        verb.add_argument("--index", required=True, metavar="DIR", help="made by polyrank gpl index")
        verb.add_argument("--probes", type=positive, metavar="N", help="lists looked into (ivf only)")
    search.add_argument("--model", help="encoder to use instead of the index' own; refused if it did not make it")
    search.add_argument("--adapter", metavar="RUN", help="likewise")
    serve.add_argument("--base", metavar="DIR", help="the base encoder's index, where --index holds only the adapted")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s, this machine)")
    serve.add_argument("--port", type=whole, default=8765, metavar="N", help="0: any free one (default: %(default)s)")
    serve.add_argument("--name", action="append", default=[], metavar="HOST", help="a further host name to answer to")
    serve.add_argument("--title", default="", help="of the page")


def _add(verbs: Any, name: str, summary: str, examples: Sequence[str]) -> argparse.ArgumentParser:
    text = "\n".join(["example:" if len(examples) == 1 else "examples:", *(f"  {example}" for example in examples)])
    added: argparse.ArgumentParser = verbs.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    return added


def _add_encoder(parser: argparse.ArgumentParser, positive: Type) -> None:
    parser.add_argument("--model", help="encoder: hub id, folder or minilm (default: the one the adapter belongs to)")
    parser.add_argument("--batch-size", type=positive, default=64, metavar="N", help="texts encoded at a time")


def call_verb(args: argparse.Namespace) -> None:
    """Do what the verb says."""
    {"run": _run, "evaluate": _evaluate, "index": _index, "search": _search, "serve": _serve}[args.verb](args)


def _run(args: argparse.Namespace) -> None:
    from .commands import run_command

    if any(text.split("=", 1)[0].lstrip("+") == "recipe" for text in args.overrides):
        raise ConfigError("polyrank gpl run has its recipe; for another use: polyrank run recipe=NAME")
    args.overrides = ["recipe=gpl", *args.overrides]
    run_command(args)


def _evaluate(args: argparse.Namespace) -> None:
    from ._gpl.evaluation import comparison_json, evaluate_adapters, find_adapters
    from ._gpl.search import find_weights, model_of
    from .commands import _print_json, print_rows

    source = Path(args.source)
    one = any((source / name).exists() for name in ("adapter_config.json", "modules.json", "adapter", "model"))
    adapters = [find_weights(source)] if one and not args.checkpoints else find_adapters(source)
    out = Path(args.out) if args.out else source / "evaluation" / Path(args.data).resolve().name
    options = {"measures": [name.strip() for name in args.measures.split(",")]} if args.measures else {}
    done = evaluate_adapters(
        adapters,
        model_of(adapters[0], args.model),
        args.data,
        out,
        split=args.split,
        depth=args.depth,
        batch_size=args.batch_size,
        bm25=not args.no_bm25,
        quiet=args.quiet,
        **options,  # type: ignore[arg-type]
    )
    if args.json:
        rows = [{"system": row.method, **row.settings, **row.figures} for row in done.record.rows]
        comparisons = {a: {b: comparison_json(c) for b, c in row.items()} for a, row in done.comparisons.items()}
        files, notes = list(map(str, done.files)), done.record.notes
        _print_json({"systems": rows, "comparisons": comparisons, "notes": notes, "files": files})
        return
    names = list(done.record.metrics)
    rows_shown = [[row.method, *(_shown(row.figures.get(name)) for name in names)] for row in done.record.rows]
    print_rows([["system", *names], *rows_shown])
    for system in done.systems:
        for baseline, comparison in done.comparisons[system.name].items():
            if system.name not in ("zero-shot", "BM25"):
                _print_comparison(system.name, baseline, comparison, done.collection.queries)
    for note in done.record.notes:
        print(f"\n{note}")
    print(f"\nresult   {done.files[0]}\nqueries  {done.files[1]}")
    for figure in done.files[2:]:
        print(f"figure   {figure}")


def _shown(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{int(value)}" if value == int(value) and abs(value) >= 10 else f"{value:.4g}"


def _print_comparison(name: str, baseline: str, comparison: Any, queries: Mapping[str, str], most: int = 5) -> None:
    """Difference, p, and the largest wins and losses; result.json lists all."""
    wins, losses = comparison.wins, comparison.losses
    print(
        f"\n{name} against {baseline}: {comparison.measure} {comparison.difference:+.4f}, p = {comparison.p_value:.4g};"
        f" {len(wins)} wins, {len(losses)} losses, {comparison.ties} ties"
    )
    for query, change in (*wins[:most], *reversed(losses[:most])):
        text = " ".join(queries[query].split())
        print(f"  {change:+.3f}  {query}: {text if len(text) <= 80 else text[:79] + '…'}")


def _index(args: argparse.Namespace) -> None:
    from ._gpl.search import find_weights, index_corpus, model_of
    from .commands import _print_json

    adapter = find_weights(args.adapter) if args.adapter else None
    if args.both and adapter is None:
        raise ConfigError("--both compares an adapter with its base; give --adapter")
    model, out = model_of(adapter, args.model), Path(args.out)
    todo = {out / "base": None, out / "adapted": adapter} if args.both else {out: adapter}
    made = []
    for folder, used in todo.items():
        index = index_corpus(
            args.corpus,
            folder,
            model,
            used,
            kind=args.kind,
            num_lists=args.lists,
            batch_size=args.batch_size,
            quiet=args.quiet,
        )
        entry = {"index": str(folder), "documents": len(index), "kind": args.kind, "bytes": index.size_bytes}
        made.append({**entry, "lists": index.manifest.num_lists, "encoder": index.manifest.encoder.describe()})
    if args.json:
        _print_json(made)
    for entry in () if args.json else made:
        print(f"{entry['index']}: {entry['documents']} documents, {entry['bytes']} bytes, {entry['encoder']}")


def _search(args: argparse.Namespace) -> None:
    import dataclasses

    import transformers

    from ..retrieval.search import open_searcher
    from ._gpl.search import find_adapter, search_folder
    from .commands import _print_json

    transformers.utils.logging.disable_progress_bar()
    adapter = find_adapter(args.adapter) if args.adapter else None
    searcher = open_searcher(search_folder(args.index), args.model, adapter, args.probes)
    found = searcher.search(args.queries, args.k)
    if args.json:
        rows = zip(args.queries, found, strict=True)
        _print_json([{"query": query, "hits": [dataclasses.asdict(hit) for hit in hits]} for query, hits in rows])
        return
    for query, hits in zip(args.queries, found, strict=True):
        if len(args.queries) > 1:
            print(f"# {_plain(query)}")
        for hit in hits:
            print(f"{hit.rank:>3}  {hit.score:.3f}  {_plain(hit.id)}  {_plain(hit.title or hit.snippet, 90)}")


def _plain(text: str, limit: int = 200) -> str:
    """One line for a terminal: no control characters, not endless."""
    text = " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _serve(args: argparse.Namespace) -> None:
    from ..retrieval.serve import LOOPBACK, SearchServer, serve
    from ._gpl.search import searchers

    both, title = searchers(args.index, args.base, args.probes), args.title or Path(args.index).name
    server = SearchServer(both, args.host, args.port, args.name, title)
    if args.host not in LOOPBACK:
        _log.warning("%s can be reached from other machines; there is no password and no encryption", args.host)
    print(server.url, flush=True)
    _log.info("Ctrl-C ends it")
    serve(server)
