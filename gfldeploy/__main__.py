"""`gfldeploy`, and `python -m gfldeploy`."""

from __future__ import annotations

import atexit
import os
import signal
import sys
from contextlib import suppress

_BUG = 70
_INTERRUPTED = "Error: interrupted; nothing half-written was left behind\n"


def main() -> None:
    """Run the command line of a process; an interruption is reported at any moment, also while modules load."""
    for number, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        if signal.getsignal(number) == default:
            signal.signal(number, _stop)
    from gfldeploy.signals import ignore_interrupts, terminate_as_interrupt

    try:
        with terminate_as_interrupt(_stop):
            code = _run()
    except KeyboardInterrupt:
        sys.stderr.write(_INTERRUPTED)
        code = 130
    ignore_interrupts()
    # Threads of engines may be at work: after an interruption Python's own exit would wait for them, or crash. It would
    # also take apart, object by object, what engines hold.
    if code != 130:
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with suppress(OSError, ValueError):
                stream.flush()
    os._exit(code)


def _stop(number: int, frame: object) -> None:
    """Before there is anything to unwind."""
    os.write(2, _INTERRUPTED.encode())
    os._exit(130)


def _run() -> int:
    from gfldeploy.cli import main as run

    try:
        run()
    except SystemExit as stopped:
        return stopped.code if isinstance(stopped.code, int) else 0
    except Exception:  # noqa: BLE001 - a bug, which the exit code tells from what a command found
        import traceback

        traceback.print_exc()
        return _BUG
    return 0


if __name__ == "__main__":
    main()
