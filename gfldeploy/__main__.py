"""`gfldeploy`, and `python -m gfldeploy`."""

from __future__ import annotations

import os
import sys

from gfldeploy.signals import ignore_interrupts, terminate_as_interrupt

__all__ = ["main"]

_BUG = 70


def main() -> None:
    """Run the command line in a process of its own: interrupted at any moment, while it loads too, it says so."""
    try:
        with terminate_as_interrupt():
            code = _run()
    except KeyboardInterrupt:
        sys.stderr.write("Error: interrupted; nothing half-written was left behind\n")
        code = 130
    ignore_interrupts()
    if code == 130:
        # Threads of engines may be in the middle of something, which Python's own end would wait for, or crash on.
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        os._exit(code)
    sys.exit(code)


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
