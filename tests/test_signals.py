"""Ctrl-C and SIGTERM: once, not in the middle of what must not be cut, and never lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from gfldeploy.files import atomic_directory, write_text
from gfldeploy.signals import check_interrupted, hold_interrupts, terminate_as_interrupt, was_interrupted

NUMBERS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(autouse=True)
def heeded() -> object:
    """Handlers as a program has that nobody started in the background of a shell, which ignores Ctrl-C."""
    before = [signal.signal(signal.SIGINT, signal.default_int_handler), signal.getsignal(signal.SIGTERM)]
    yield
    for number, handler in zip(NUMBERS, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_second_signal_does_not_cut_the_unwinding(number: signal.Signals) -> None:
    unwound = False
    with pytest.raises(KeyboardInterrupt), terminate_as_interrupt():
        try:
            signal.raise_signal(number)
        finally:
            for other in NUMBERS:
                signal.raise_signal(other)
            unwound = True
    assert unwound and was_interrupted()
    with terminate_as_interrupt():
        assert not was_interrupted(), "the next command has not been"


def test_an_interruption_is_forgotten_by_the_next_command_of_a_program_with_handlers_of_its_own() -> None:
    with pytest.raises(KeyboardInterrupt), terminate_as_interrupt():
        signal.raise_signal(signal.SIGINT)
    for number in NUMBERS:
        signal.signal(number, lambda number, frame: None)
    with terminate_as_interrupt():
        check_interrupted()
        assert not was_interrupted()


def test_what_must_not_be_cut_is_not() -> None:
    steps = []
    with pytest.raises(KeyboardInterrupt), terminate_as_interrupt():
        with hold_interrupts():
            steps.append(1)
            signal.raise_signal(signal.SIGTERM)
            steps.append(2)
        steps.append(3)
    assert steps == [1, 2]


def test_nothing_is_published_after_an_interruption_that_was_swallowed(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic_directory(tmp_path / "new" / "out") as directory:
        write_text(directory / "a", "1")
        with suppress(BaseException):  # as packages do
            signal.raise_signal(signal.SIGINT)
    assert list(tmp_path.iterdir()) == []
    with terminate_as_interrupt():
        check_interrupted()


def test_what_is_ignored_or_handled_by_the_program_stays_so() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with terminate_as_interrupt(), hold_interrupts():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


@pytest.mark.parametrize(
    "command",
    [
        "class Lost:\n    def __del__(self): signal.raise_signal(signal.SIGINT)\nLost()\nwhile True: time.sleep(0.1)",
        "try: signal.raise_signal(signal.SIGTERM)\nexcept BaseException: raise ImportError('initialization failed')",
        "signal.raise_signal(signal.SIGINT)",
    ],
)
def test_wherever_it_is_raised_it_is_one_line(command: str) -> None:
    body = "\n".join(f"    {line}" for line in command.splitlines())
    code = (
        "import signal, time\nsignal.signal(signal.SIGINT, signal.default_int_handler)\nimport gfldeploy.cli\n"
        f"from gfldeploy.__main__ import main\ndef run(**options):\n{body}\ngfldeploy.cli.cli.main = run\nmain()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ})
    line = "Error: interrupted; nothing half-written was left behind\n"
    assert (done.returncode, done.stdout, done.stderr) == (130, "", line)
