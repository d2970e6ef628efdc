"""The command line: arguments in, one call into the rooms, an exit status out.

Status 0; 1 for a failure of the run; 2 for a mistake of the user; 130 for Ctrl-C. Either error is one line on standard
error (--debug shows the traceback). Results go to standard output, progress to standard error.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import re
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from .core.errors import ConfigError, DataError, PolyrankError, UserError, name_message, nearest, printable
from .recipes.gpl_commands import VERBS, add_verbs

_BAD_PATHS = {errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR}
LISTS = ("methods", "recipes", "data", "objectives", "metrics")

COMMANDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "demo": (
        "the main job, on data it makes: two Markov chains, one hypothesis against two",
        ("polyrank demo", "polyrank demo --quick --out runs/demo-quick"),
    ),
    "train": (
        "any method on your own file of chats, prompts and answers, or text; the same command goes on where it stopped",
        (
            "polyrank train data=train.jsonl model=Qwen/Qwen3-0.6B method=lsr",
            "polyrank train data=train.jsonl model=Qwen/Qwen3-0.6B method=mcl method.options.num_hypotheses=3",
        ),
    ),
    "run": (
        "a recipe, with key=value overrides; the same command again goes on where it stopped",
        (
            "polyrank run recipe=markov/setup",
            "polyrank run recipe=markov/setup num_steps=42 --cfg job",
            "polyrank run recipe=markov/setup --multirun num_steps=10,20",
        ),
    ),
    "list": ("what can be named: " + ", ".join(LISTS), ("polyrank list methods", "polyrank list metrics --json")),
    "evaluate": (
        "metrics of a run's predictions, or of any predictions.jsonl",
        ("polyrank evaluate predictions.jsonl", "polyrank evaluate predictions.jsonl --metrics oracle_bleu --json"),
    ),
    "generate": (
        "text from a run or an adapter folder, one for each hypothesis",
        ('polyrank generate adapter --prompt "Once upon a time" --max-new-tokens 8',),
    ),
    "export": (
        "an adapter as ordinary LoRA folders that PEFT loads without polyrank",
        ("polyrank export adapter -o loras",),
    ),
    "merge": ("an adapter folded into its base model", ("polyrank merge adapter --hypothesis 0 -o merged",)),
    "inspect": (
        "parameters, norms, effective rank and intruder dimensions of an adapter folder",
        ("polyrank inspect adapter", "polyrank inspect adapter --layers --json"),
    ),
    "report": (
        "tables and plots of result files, as one HTML page or Markdown",
        ("polyrank report results -o report.html", "polyrank report results -o report.md"),
    ),
    "gpl": (
        "a retriever for your own documents, without labels: run, evaluate, index, search, serve",
        (
            "polyrank gpl run corpus=documents",
            "polyrank gpl index documents -o index --adapter run --both",
            "polyrank gpl serve --index index",
        ),
    ),
    "bench": (
        "a benchmark of the checkout, side by side with the peer; its own arguments follow the name",
        ("polyrank bench", "polyrank bench --json", "polyrank bench markov --help"),
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (default: the process's own). Returns the exit status and never raises."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    own = [text for text in arguments if text != "--debug"]  # it may stand anywhere
    debug = own != arguments
    try:
        args = _parse(own)
        if args.command is None:
            _parser().print_help()
            return 0
        _log_to_stderr(args.quiet)
        from .recipes import commands

        with warnings.catch_warnings():
            if not debug:  # what other packages say to their own callers is no news to a user
                warnings.filterwarnings("ignore", category=FutureWarning)
            return int(getattr(commands, f"{args.command}_command")(args) or 0)
    except SystemExit as error:  # argparse after --help and --version
        return int(error.code or 0)
    except KeyboardInterrupt:
        if debug:
            raise
        resumable = own[:1] in (["run"], ["train"]) or own[:2] in (["gpl", "run"], ["gpl", "index"])
        after = "; the same command goes on from what is saved" if resumable else ""
        print(f"polyrank: interrupted{after}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug:
            raise
        if isinstance(error, OSError) and error.errno in _BAD_PATHS:
            error = DataError(f"{str(error.filename)!r:.200}: {(error.strerror or '').lower()}")
        hint = "" if isinstance(error, PolyrankError) else " (--debug shows where)"
        print(f"polyrank: error: {_one_line(error)}{hint}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    text = text if isinstance(error, PolyrankError) else f"{type(error).__name__}: {text}"
    text = printable(text)
    return text if len(text) <= 2000 else text[:2000] + " ..."


def _log_to_stderr(quiet: bool) -> None:
    if quiet:
        from transformers.utils import logging as bars

        bars.disable_progress_bar()
    logger = logging.getLogger("polyrank")
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    for handler in logger.handlers:
        if type(handler) is logging.StreamHandler:
            handler.stream = sys.stderr  # which may be another one than at the first call in this process
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_Lines())
        logger.addHandler(handler)
        logger.propagate = False


class _Lines(logging.Formatter):
    """Messages alone, without what a terminal would obey."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(record.getMessage())


class _Parser(argparse.ArgumentParser):
    """Mistakes become ConfigErrors that name the nearest option, in one line."""

    def error(self, message: str) -> NoReturn:
        command = self.prog.removeprefix("polyrank").strip()
        raise ConfigError(f"{message} (see polyrank {f'{command} ' if command else ''}--help)")

    def options(self) -> list[str]:
        return [option for action in self._actions for option in action.option_strings]


def _parse(arguments: list[str]) -> argparse.Namespace:
    command = next((text for text in arguments if not text.startswith("-")), None)
    if command is not None and command not in COMMANDS and arguments.index(command) == 0:
        raise ConfigError(name_message("command", command, COMMANDS))
    after = next(iter(arguments[arguments.index("gpl") + 1 :]), "-") if command == "gpl" else "-"
    if not after.startswith("-") and after not in VERBS:
        raise ConfigError(name_message("verb", after, VERBS))
    parser = _parser()
    args, rest = parser.parse_known_args(arguments)
    if args.command == "bench":
        args.arguments += rest
        return args
    if (
        args.command in ("run", "train") or getattr(args, "verb", None) == "run"
    ):  # overrides may stand on both sides of an option
        args.overrides += [text for text in rest if not text.startswith("-")]
        rest = [text for text in rest if text.startswith("-")]
    if rest:
        command = _subparser(parser, args.command)
        known = (_subparser(command, args.verb) if args.command == "gpl" else command).options()
        near = nearest(rest[0].split("=", 1)[0], known)
        hint = f"; did you mean {near!r}?" if near else ""
        raise ConfigError(f"unknown argument {rest[0]!r}{hint} (see polyrank {args.command or ''} --help)")
    return args


def _subparser(parser: _Parser, command: str | None) -> _Parser:
    actions = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return actions[0].choices.get(command, parser)  # type: ignore[arg-type]


def _parser() -> _Parser:
    parser = _Parser(
        prog="polyrank",
        description="Low-rank adaptation of pretrained models, past plain LoRA.",
        epilog="Status: 0 done, 1 the run failed, 2 a mistake in what was given. --debug shows tracebacks.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version")
    parser.set_defaults(quiet=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    added = {name: _add(commands, name) for name in COMMANDS}

    demo = added["demo"]
    demo.add_argument("--out", default="runs/demo", help="folder for figures, page and result (default: %(default)s)")
    demo.add_argument("--seed", type=_whole, default=None, metavar="N", help="of data and training")
    demo.add_argument("--quick", action="store_true", help="fewer steps: to see that it runs")

    run = added["run"]
    run.add_argument("overrides", nargs="*", metavar="key=value", help="recipe=NAME and fields of the configuration")
    run.add_argument("--multirun", "-m", action="store_true", help="one run for each combination of a=1,2 b=3,4")
    run.add_argument("--cfg", choices=["job"], help="print the configuration and stop")
    run.add_argument("--config-dir", metavar="DIR", help="a folder of your own YAML: recipe/, method/, data/, model/")
    run.add_argument("--fresh", action="store_true", help="start over; the earlier run is kept beside the new one")

    train = added["train"]
    train.add_argument(
        "overrides", nargs="*", metavar="key=value", help="data=, model=, method=, training.max_steps= …"
    )
    train.add_argument("--cfg", choices=["job"], help="print the configuration and stop")
    train.add_argument("--fresh", action="store_true", help="start over; the earlier run is kept beside the new one")

    added["list"].add_argument("what", type=_one_of(LISTS), metavar="WHAT", help=", ".join(LISTS))
    added["list"].add_argument("--config-dir", metavar="DIR", help="a folder of your own YAML")

    evaluate = added["evaluate"]
    evaluate.add_argument("source", metavar="RUN|FOLDER|predictions.jsonl")
    evaluate.add_argument(
        "-o",
        "--out",
        metavar="FOLDER",
        help="of a folder of runs: tables, figure, checkpoint list (default: FOLDER/evaluation)",
    )
    evaluate.add_argument(
        "--metrics",
        metavar="A,B",
        help="only these, or presets: caption, translation, diversity, likelihood, e2e, webnlg"
        " (default: all that the predictions allow)",
    )
    evaluate.add_argument(
        "--model",
        action="append",
        metavar="KIND=FOLDER",
        help="model of a metric: sbert, bertscore, fluency, spice; may be given several times",
    )
    evaluate.add_argument(
        "--skipped", metavar="FILE", help="leave incomplete inputs out and list them there (default: an error)"
    )

    generate = added["generate"]
    _add_source(generate)
    generate.add_argument("--prompt", action="append", required=True, metavar="TEXT", help="may be given several times")
    generate.add_argument("--hypothesis", type=_whole, metavar="K", help="only this one (default: all)")
    generate.add_argument("--num-beams", type=_positive, default=1, metavar="N", help="beams of each hypothesis")
    generate.add_argument("--max-new-tokens", type=_positive, default=64, metavar="N", help="default: %(default)s")
    generate.add_argument("--sample", action="store_true", help="sample instead of the most likely text")
    generate.add_argument("--seed", type=_whole, default=0, metavar="N", help="of sampling")

    export = added["export"]
    _add_source(export)
    export.add_argument("-o", "--out", required=True, metavar="FOLDER", help="lora0, lora1, ... are made in it")
    export.add_argument("--rank", type=_positive, metavar="R", help="of the LoRA that another method is fitted by")

    merge = added["merge"]
    _add_source(merge)
    merge.add_argument("-o", "--out", required=True, metavar="FOLDER", help="model and tokenizer, as safetensors")
    merge.add_argument("--hypothesis", type=_whole, metavar="K", help="which one (needed if there are several)")

    inspect = added["inspect"]
    inspect.add_argument("source", metavar="ADAPTER", help="adapter folder, run folder or safetensors file")
    inspect.add_argument(
        "--base",
        "--model",
        dest="model",
        metavar="MODEL",
        help="base model: for --intruder, and for methods whose update is no product of two factors",
    )
    inspect.add_argument("--layers", action="store_true", help="every layer, not only sums")
    inspect.add_argument("--intruder", action="store_true", help="singular vectors that are new against the base")
    inspect.add_argument("--top-k", type=_positive, default=10, metavar="K", help="strongest vectors looked at")
    inspect.add_argument("--epsilon", type=_share, default=0.5, metavar="E", help="cosine below which one is new")
    inspect.add_argument("--plot", metavar="FILE", help="spectra, or with --intruder cosines, of each layer (.png)")
    inspect.add_argument("--allow-bin", action="store_true", help="read torch's old format too: tensors, nothing else")

    report = added["report"]
    report.add_argument("results", nargs="+", metavar="RESULT", help="result files, or folders of them")
    report.add_argument("-o", "--out", required=True, metavar="FILE", help="FILE.html, .md, .tex or .csv")
    report.add_argument("--title", default="", help="of the page")

    add_verbs(added["gpl"], _whole, _positive)

    bench = added["bench"]
    bench.add_argument("name", nargs="?", metavar="NAME", help="default: list them")
    bench.set_defaults(arguments=[])

    for name in ("demo", "train", "run", "list", "evaluate", "generate", "export", "merge", "inspect", "report"):
        added[name].add_argument("--json", action="store_true", help="results as JSON")
    for name, command in added.items():
        if name not in ("bench", "gpl"):  # gpl's verbs have their own
            command.add_argument("--quiet", "-q", action="store_true", help="no progress on standard error")
    return parser


def _add(commands: Any, name: str) -> _Parser:
    summary, examples = COMMANDS[name]
    text = "\n".join(["example:" if len(examples) == 1 else "examples:", *(f"  {example}" for example in examples)])
    added: _Parser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=name != "bench",
    )
    if name == "bench":  # --help after a name is the benchmark's own
        added.add_argument("--help", "-h", action=_BenchHelp, nargs=0, help="show this message, or the benchmark's")
    return added


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="RUN", help="a run's folder, or an adapter folder")
    parser.add_argument("--model", help="base model: hub id or folder (default: the one that the adapter names)")


class _BenchHelp(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option: str | None = None) -> None:
        if getattr(namespace, "name", None) is None:
            parser.print_help()
            parser.exit()
        namespace.arguments = [*namespace.arguments, "--help"]


class _Version(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option: str | None = None) -> None:
        from importlib.metadata import version

        print(f"polyrank {version('polyrank')}")
        parser.exit()


def _one_of(allowed: Sequence[str]) -> Any:
    def check(text: str) -> str:
        if text not in allowed:
            raise argparse.ArgumentTypeError(name_message("name", text, allowed))
        return text

    return check


def _whole(text: str) -> int:
    if not re.fullmatch(r"\d{1,18}", text):
        raise argparse.ArgumentTypeError(f"must be a whole number >= 0, got {text!r}")
    return int(text)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"must be a number in [0, 1], got {text!r}")
    return value


def _positive(text: str) -> int:
    if _whole(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
