"""Commands that serve on, whatever becomes of their terminal."""

import contextlib
import io
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import pytest
from rich.console import Console

from pdlaunch.cli.output import print_line
from pdlaunch.cli.steady_output import MAX_WRITES, steady_output
from tests.cli.terminal import ROOT

FINE_S = 60.0
"""Seconds for a healthy reader on a busy machine."""


@contextlib.contextmanager
def full_pipe() -> Iterator[tuple[int, int]]:
    """A pipe whose reader stands still: both ends, of which the reader's is closed at the end."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    for size in (4096, 1):
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writer, b"x" * size)
    os.set_blocking(writer, True)
    with os.fdopen(reader, "rb"), os.fdopen(writer, "wb", buffering=0):
        yield reader, writer


def gone_terminal() -> TextIO:
    ours, theirs = pty.openpty()
    os.close(ours)
    return os.fdopen(theirs, "w")


def test_what_takes_nothing_any_more_raises_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with gone_terminal() as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with pytest.raises(OSError):
            os.write(stream.fileno(), b"x")
        with steady_output(FINE_S):
            for n in range(MAX_WRITES + 10):
                sys.stdout.write(f"{n}\n")


def test_a_terminal_stays_one_and_gets_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pty.openpty()
    with (
        os.fdopen(ours, "rb", buffering=0) as screen,
        os.fdopen(theirs, "w", encoding="ascii") as stream,
    ):
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", stream)
        with steady_output(FINE_S):
            Console(stderr=True).print("error")
            assert sys.stdout.isatty()
            assert sys.stdout.fileno() == theirs
            sys.stdout.write("prefill → decode\n")
            late = sys.stderr
        late.write("after the end")
        text = b""
        while not text.endswith(b"decode\r\n"):
            text += screen.read(100)
        assert text == b"error\r\nprefill \\u2192 decode\r\n"


def test_output_that_nobody_reads_keeps_no_error_back(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "errors"
    with full_pipe() as (_, stuck), os.fdopen(os.dup(stuck), "w") as out, path.open("w") as err:
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        with steady_output(1.0):
            sys.stdout.write("x")
            sys.stderr.write("why")
        assert path.read_text() == "why"


def run(*arguments: str, **streams: Any) -> subprocess.CompletedProcess[str]:
    command, environ = [sys.executable, "-P", *arguments], os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environ, text=True, timeout=300, check=False, **streams)


INTERRUPTED = """
import signal, sys
from pdlaunch.cli.steady_output import steady_output
with steady_output(60.0):
    signal.signal(signal.SIGALRM, lambda *_: sys.stdout.write("interrupts\\n"))
    for _ in range(30_000):
        signal.setitimer(signal.ITIMER_REAL, 5e-6)
        sys.stdout.write("x")
    signal.setitimer(signal.ITIMER_REAL, 0)
"""


@pytest.mark.processes
def test_what_interrupts_a_print_may_print_too() -> None:
    """As finalizers do, of which a collection of garbage finds some at any place."""
    ended = run("-c", INTERRUPTED, stdout=subprocess.PIPE)
    assert ended.returncode == 0
    assert "interrupts\n" in ended.stdout


@pytest.mark.processes
@pytest.mark.parametrize(
    "command",
    [("serve", "--model", "/none"), ("agent", "--join", "/none"), ("router", "--prefill", "none")],
)
def test_commands_end_with_their_code_whatever_they_print_to(command: tuple[str, ...]) -> None:
    with full_pipe() as (_, stuck):
        assert run("-m", "pdlaunch", *command, stdout=stuck, stderr=stuck).returncode == 2


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_terminal_gets_long_lines_broken_between_words_and_a_file_gets_them_whole(
    is_terminal: bool,
) -> None:
    file, text = io.StringIO(), "engines are compatible " * 5
    print_line(text, console=Console(file=file, force_terminal=is_terminal, width=20))
    lines = file.getvalue().splitlines()
    assert (max(map(len, lines)) <= 20) == is_terminal
    assert " ".join(file.getvalue().split()) == text.strip()
