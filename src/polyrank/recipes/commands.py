"""What each command of the command line does; rooms are imported when their command is called.

Every function takes the parsed arguments, prints its result on standard output (JSON with --json) and may return an
exit status. Errors are raised; the command line turns them into one line.
"""

from __future__ import annotations

import json
import logging
import math
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError, DataError, printable, unknown_name

_log = logging.getLogger("polyrank")


def demo_command(args: Namespace) -> None:
    from .markov import run_demo

    seed = {} if args.seed is None else {"seed": args.seed}
    made = run_demo(Path(args.out), quick=args.quick, **seed)
    if args.json:
        rows = [dict(zip(made["header"], row, strict=True)) for row in made["table"]]
        files = [made["page"], made["result"], *made["figures"]]
        _print_json({"table": rows, "notes": list(made["notes"]), "files": list(map(str, files))})
        return
    print_rows([made["header"], *made["table"]])
    for note in made["notes"]:
        print(f"\n{note}")
    print(f"\npage     {made['page']}\nresult   {made['result']}")
    for figure in made["figures"]:
        print(f"figure   {figure}")


def run_command(args: Namespace) -> None:
    config_dir = Path(args.config_dir) if args.config_dir else None
    if args.cfg:
        from ._frame.compose import check_overrides, compose
        from .run import to_yaml

        config = compose(check_overrides(args.overrides, config_dir), config_dir).config
        print(json.dumps(config, indent=1) if args.json else to_yaml(config), end="")
        return
    from .run import run_recipe, run_sweep

    if args.multirun:
        done = run_sweep(args.overrides, config_dir=config_dir, fresh=args.fresh)
    else:
        done = [run_recipe(args.overrides, config_dir=config_dir, fresh=args.fresh)]
    if args.json:
        _print_json([{"run_dir": str(item.run_dir), "recipe": item.recipe, "ran": item.ran} for item in done])
    for item in () if args.json else done:
        print(item.run_dir)


def train_command(args: Namespace) -> None:
    from ._train.command import train_overrides

    run_command(
        Namespace(**{**vars(args), "overrides": train_overrides(args.overrides), "config_dir": None, "multirun": False})
    )


def list_command(args: Namespace) -> None:
    from ._commands import catalogue

    config_dir = Path(args.config_dir) if args.config_dir else None
    entries = getattr(catalogue, args.what)(config_dir)
    if args.json:
        _print_json(entries)
    elif entries:
        print_rows([[str(value) for value in entry.values()] for entry in entries])
    else:
        _log.info("no %s yet", args.what)


def evaluate_command(args: Namespace) -> None:
    from ..evaluation.metrics import METRICS, evaluate
    from ._commands.evaluate_folder import evaluate_folder_command, is_folder_of_runs

    if args.out is not None or is_folder_of_runs(args.source):
        return evaluate_folder_command(args)
    names = [name.strip() for name in args.metrics.split(",") if name.strip()] if args.metrics else None
    models, skipped = _models(getattr(args, "model", None) or ()), getattr(args, "skipped", None)
    found = evaluate(args.source, names, models=models, skipped=skipped, progress=not getattr(args, "quiet", False))
    for reason in dict.fromkeys(found.left_out.values()):
        metrics = [name for name, why in found.left_out.items() if why == reason]
        _log.warning("left out %s: needs %s", ", ".join(metrics), reason)
    if found.skipped:
        _log.warning("skipped %d incomplete inputs; they are listed in %s", len(found.skipped), skipped)
    if args.json:
        more = {"left_out": found.left_out} if found.left_out else {}
        more |= {"num_skipped": len(found.skipped)} if skipped is not None else {}
        _print_json({"source": args.source, **found.figures, **more})
        return
    rows = [["metric", "value", "unit", "better"]]
    for name, value in found.figures.items():
        metric = METRICS.get(name) if name in METRICS else None
        shown = ", ".join(f"{item:.4f}" for item in value) if isinstance(value, Sequence) else f"{value:g}"
        rows.append([name, shown, metric.unit if metric else "", metric.better if metric else ""])
    print_rows(rows)


def _models(given: Sequence[str]) -> dict[str, str]:
    """KIND=PLACE, several times, as a mapping. Raises ConfigError for anything else."""
    for text in given:
        if "=" not in text:
            raise ConfigError(f"--model {text}: write KIND=FOLDER, for instance sbert=models/paraphrase-TinyBERT-L6-v2")
    return dict(text.split("=", 1) for text in given)


def generate_command(args: Namespace) -> None:
    from ..evaluation.decoding import decode
    from ._commands.opened import open_model
    from ._train.template import prompt_ids

    if args.sample and args.num_beams > 1:
        raise ConfigError("--sample and --num-beams exclude each other")
    opened = open_model(args.source, args.model, args.hypothesis)
    K, kind = opened.num_hypotheses or 1, opened.template
    method = "mcl" if opened.num_hypotheses else "sample" if args.sample else "beam"
    options = {"do_sample": True, "top_k": 0} if args.sample and method == "mcl" else {}
    decoded = decode(
        opened.model,
        opened.tokenizer,
        args.prompt if kind is None else prompt_ids(opened.tokenizer, kind, args.prompt),
        method,
        num_candidates=K,
        budget=K * args.num_beams,
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
        **options,
    )
    chosen = range(K) if args.hypothesis is None else [args.hypothesis]
    if args.json:
        texts = [[texts[k] for k in chosen] for texts in decoded.candidates]
        _print_json([{"prompt": p, "candidates": t} for p, t in zip(args.prompt, texts, strict=True)])
        return
    for prompt, texts in zip(args.prompt, decoded.candidates, strict=True):
        if len(args.prompt) > 1:
            print(f"# {printable(prompt)}")
        for k in chosen:
            print(printable(f"{k}: {texts[k]}" if K > 1 else texts[k]))


def export_command(args: Namespace) -> None:
    from ._commands.saved import find_adapter, load_adapter

    saved, out = find_adapter(args.source, args.model), _new_folder(args.out)
    saved.check_base("export")
    if saved.num_hypotheses:
        from ..hypotheses import export_hypotheses

        folders = export_hypotheses(load_adapter(saved), out)
    else:
        folders = [_as_lora(saved, out / "lora0", args.rank)]
    if args.json:
        _print_json({"folders": [str(folder) for folder in folders]})
    for folder in () if args.json else folders:
        print(folder)


def _as_lora(saved: Any, folder: Path, rank: int | None) -> Path:
    from peft import save_as_lora

    from ._commands.saved import load_adapter

    if saved.method == "LORA":
        raise ConfigError(f"{saved.folder} is an ordinary LoRA already")
    if rank is None:
        raise ConfigError("give --rank: the LoRA is the best approximation of that rank")
    model = load_adapter(saved)
    if not model.supports_lora_conversion():
        raise ConfigError(f"{saved.folder}: {saved.method} is no sum of the base weight and an update; use merge")
    save_as_lora(str(folder), model, rank=rank)
    return folder


def merge_command(args: Namespace) -> None:
    from ..compression._quantised_linear import make_dense
    from ._commands.saved import find_adapter, load_adapter, load_tokenizer

    saved, out = find_adapter(args.source, args.model), _new_folder(args.out)
    saved.check_base("merge")
    K, chosen = saved.num_hypotheses, args.hypothesis
    if K is None and chosen is not None:
        raise ConfigError(f"--hypothesis: {saved.method} has no hypotheses")
    if K is not None and ((chosen is None and K > 1) or (chosen or 0) >= K):
        raise ConfigError(f"the adapter has {K} hypotheses; say which one: --hypothesis 0 to {K - 1}")
    model = load_adapter(saved)
    if K is not None:
        model.base_model.set_hypothesis(chosen or 0)
    if saved.kind == "lq_lora":
        make_dense(model)
    merged = model.merge_and_unload(safe_merge=True)
    merged.save_pretrained(str(out))
    try:
        load_tokenizer(saved.folder, saved.base).save_pretrained(str(out))
    except ConfigError:
        _log.warning("no tokenizer beside the adapter or the base model: only the model was saved")
    _print_json({"folder": str(out)}) if args.json else print(out)


def inspect_command(args: Namespace) -> None:
    from ._commands.inspection import inspect

    value, blocks, notes = inspect(args)
    if args.json:
        _print_json(value)
        return
    for block in blocks:
        print_rows(block)
        print()
    for note in notes:
        _log.warning("note: %s", note)


def report_command(args: Namespace) -> None:
    from ..report import write_report

    written = write_report(args.results, args.out, args.title)
    if args.json:
        _print_json({"files": [str(path) for path in written]})
    for path in () if args.json else written[:1]:
        print(path)


def gpl_command(args: Namespace) -> None:
    from .gpl_commands import call_verb

    call_verb(args)


def bench_command(args: Namespace) -> int:
    from ..core.provenance import checkout

    root = checkout()
    folder = root / "benchmarks" if root is not None else Path("benchmarks")
    files = {file.stem.replace("_", "-"): file for file in sorted(folder.glob("[a-z]*.py"))}
    if root is None and not files:
        raise DataError("benchmarks are part of the repository, not of the installed package; run this in a checkout")
    if args.name is None:
        unknown = [text for text in args.arguments if text != "--json"]
        if unknown:
            raise ConfigError(f"unknown argument {unknown[0]!r} (see polyrank bench --help)")
        entries = [{"name": name, "summary": _first_words(file)} for name, file in files.items()]
        _print_json(entries) if args.arguments else print_rows([list(entry.values()) for entry in entries])
        return 0
    if args.name not in files:
        raise unknown_name("benchmark", args.name, files)
    module = _load_file(files[args.name], folder)
    return int(module.main(args.arguments) or 0)


def _first_words(file: Path) -> str:
    """First sentence of a module's docstring; nothing is imported for it."""
    import ast

    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return text.split("\n\n")[0].replace("\n", " ").split(". ")[0].rstrip(".")


def _load_file(file: Path, folder: Path) -> Any:
    """A benchmark's module; what it shares with the others is found beside it."""
    import importlib

    for place in (str(folder), str(folder.parent)):
        if place not in sys.path:
            sys.path.insert(0, place)
    return importlib.import_module(f"benchmarks.{file.stem}")


def _new_folder(name: str) -> Path:
    """A folder that is empty or does not exist yet. Raises ConfigError otherwise: nothing is overwritten."""
    path = Path(name)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"{path} exists already and is not empty; give another folder")
    return path


def print_rows(rows: Sequence[Sequence[str]]) -> None:
    """Columns of text, numbers to the right; what a terminal would obey is shown as a question mark."""
    rows = [[printable(text).replace("\n", " ") for text in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    right = [all(_is_number(text) for text in column[1:]) and len(column) > 1 for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [t.rjust(w) if r else t.ljust(w) for t, w, r in zip(row, widths, right, strict=True)]
        print("  ".join(cells).rstrip())


def _is_number(text: str) -> bool:
    return not text or text in ("-", "–") or text.replace(",", "")[:1].isdigit() or text[:1] in "-−" or text == "nan"


def _print_json(value: Any) -> None:
    """One JSON value; what is not finite becomes null."""
    print(json.dumps(_finite(value), indent=1, ensure_ascii=False, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
