"""What ``serve`` shows while it starts, and once it is ready."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace

import pytest
from rich.console import Console

from pdlaunch.cli.live import StartView, ready_rows, render_ready, render_status
from pdlaunch.launch.status import LaunchPhase, LaunchStatus, ProcessState, ProcessStatus
from pdlaunch.protocol.control import PairReady

ROWS = (("URL", "http://127.0.0.1:8000"), ("try", "curl x \\\n  -d y"))


def process(name: str, state: ProcessState = ProcessState.READY, **fields) -> ProcessStatus:
    kind = "rank" if "/" in name else "server"
    return ProcessStatus(name, kind, fields.pop("host", "local"), state, 1, **fields)


def starting(num_engines: int = 1) -> LaunchStatus:
    loading = {"doing": "loading weights", "fraction": 0.4}
    processes = [
        each
        for n in range(num_engines)
        for each in (
            process(f"prefill-{n}/rank-0", ProcessState.STARTING, **loading),
            process(f"prefill-{n}"),
        )
    ]
    return LaunchStatus(LaunchPhase.STARTING, tuple(processes), num_missing_pairs=1)


def serving(decode_host: str = "local") -> LaunchStatus:
    here, there = "prefill-0/rank-0 prefill-0 router", "decode-0/rank-0 decode-0/rank-1 decode-0"
    processes = [process(name) for name in here.split()]
    processes += [process(name, host=decode_host) for name in there.split()]
    pair = PairReady(
        local="decode-0/rank-0",
        peer="prefill-0/rank-0",
        peer_incarnation=1,
        seconds=0.1,
        path="nixl/UCX",
        gigabytes_per_s=3.4,
        other_paths={"p2p": "not here"},
    )
    return LaunchStatus(
        LaunchPhase.READY, tuple(processes), pairs=(pair,), url="http://127.0.0.1:8000"
    )


def console(columns: int = 80, *, terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), width=columns, force_terminal=terminal, color_system=None)


def printed(target: Console) -> str:
    assert isinstance(target.file, io.StringIO)
    return target.file.getvalue()


@pytest.mark.parametrize("columns", [20, 40, 80])
def test_the_line_of_a_start_fits_any_terminal(columns: int) -> None:
    assert render_status(starting(40), 12.0, columns).cell_len <= columns


def test_the_line_of_a_start_says_what_is_waited_for() -> None:
    said = render_status(starting(), 12.0, 200).plain
    doing = "prefill-0/rank-0: starting, loading weights 40%"
    assert said == f"starting · 12 s · 1 of 2 ready · {doing}"
    failed = process("decode-7", ProcessState.FAILED, host="gpu-2")
    mixed = replace(starting(5), processes=(*starting(5).processes, failed))
    assert "5 of 11 ready · decode-7 on gpu-2: failed · " in render_status(mixed, 1.0, 200).plain
    connecting = replace(serving(), num_missing_pairs=2)
    assert render_status(connecting, 1.0, 200).plain.endswith("pairs to connect: 2")


def test_plain_lines_tell_each_change_once() -> None:
    target = console()
    view = StartView(target, lambda status: list(ROWS), lambda: 0.0)
    view.changed(starting())
    view.changed(starting())
    view.note("a very long note " * 20)
    view.ready(serving())
    lines = printed(target).splitlines()
    assert lines[:2] == [
        "[   0.0 s] prefill-0/rank-0: starting, loading weights 40%",
        "[   0.0 s] prefill-0: ready",
    ]
    assert len(lines) == 6
    assert lines[-1] == "  try        curl x -d y"
    assert "\x1b" not in printed(target)


def test_notes_break_between_words_on_a_terminal_and_not_at_all_in_a_file() -> None:
    note = "running requests get up to 30 s, a second Ctrl-C skips that"
    narrow, file = console(40, terminal=True), console(40)
    for target in (narrow, file):
        view = StartView(target, lambda status: [], lambda: 0.0)
        view.close()
        view.note(note)
    (shown,) = re.findall(r"\[\d\d:.*", printed(narrow), re.DOTALL)
    assert shown.split()[1:] == note.split()
    assert max(len(line) for line in shown.splitlines()) <= 40
    assert re.fullmatch(rf"\[\d\d:\d\d:\d\d\] {note}\n", printed(file))


def test_the_line_of_a_start_leaves_no_trace_but_the_panel() -> None:
    target = console(terminal=True)
    view = StartView(target, lambda status: list(ROWS), lambda: 0.0)
    view.changed(starting())
    view.ready(serving())
    view.close()
    last_screen = printed(target).rpartition("\x1b[2K")[2]
    assert "pdlaunch is ready" in last_screen
    assert "loading weights" not in last_screen


def test_the_panel_says_where_and_what_and_how_fast() -> None:
    found = {"model": "smollm2", "connector": "nixl", "log_dir": "/logs", "needs_key": True}
    rows = dict(ready_rows(serving("gpu-2"), **found))
    assert rows["URL"] == "http://127.0.0.1:8000"
    assert rows["topology"] == "1 prefill + 1 decode (tp 2) on 2 hosts"
    assert rows["pair"] == "prefill-0/rank-0 → decode-0/rank-0: nixl/UCX, 3.4 GB/s; p2p: not here"
    assert "Authorization: Bearer YOUR_KEY" in rows["try"]
    many = replace(serving(), pairs=serving().pairs * 9)
    assert ("pair", "… and 5 more pairs") in ready_rows(many, **found)


@pytest.mark.parametrize("columns", [40, 60, 80])
def test_the_curl_line_of_the_panel_can_be_copied(columns: int) -> None:
    target = console(columns)
    found = {"model": "smollm2", "connector": "nixl", "log_dir": "/logs", "needs_key": False}
    target.print(render_ready(ready_rows(serving(), **found)))
    text = printed(target)
    assert "│" not in text
    body = text.partition("-d '")[2].partition("'")[0]
    assert json.loads(body) == {"model": "smollm2", "prompt": "Hello"}
