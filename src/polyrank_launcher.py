"""What the command `polyrank` starts: the import of polyrank, which brings torch and PEFT, and then its command line.

It stands outside the package because whatever lies in the package is reached through that import, which takes seconds,
can be interrupted, and refuses versions outside the declared ranges. Each of these is one line on standard error here
as everywhere else (--debug shows the traceback).
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType


def main() -> int:
    """Run the process's own command line. Returns the exit status: 2 where this installation cannot run polyrank."""
    debug = "--debug" in sys.argv[1:]
    # a process in a shell's background ignores Ctrl-C, and goes on doing so
    handled = not debug and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if handled:
        signal.signal(signal.SIGINT, _interrupted)
    try:
        from polyrank import cli
    except Exception as error:
        if debug:
            raise
        print(f"polyrank: error: {_one_line(error)}", file=sys.stderr)
        return 2
    finally:
        if handled:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    return cli.main()


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if type(error).__name__ == "VersionError":  # which names its own remedy; its class may not be importable here
        return text
    kind = "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
    return f"{kind}{text:.2000} (is everything installed that polyrank needs? --debug shows where)"


def _interrupted(number: int, frame: FrameType | None) -> None:
    """Nothing was begun, so nothing is lost by ending here; an exception could be swallowed by a library that tries an
    import and goes on without it."""
    os.write(2, b"polyrank: interrupted\n")
    os._exit(130)
