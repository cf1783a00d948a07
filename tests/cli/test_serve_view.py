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


def console(columns: int = 80, rows: int = 24, *, terminal: bool = False) -> Console:
    return Console(
        file=io.StringIO(), width=columns, height=rows, force_terminal=terminal, color_system=None
    )


def printed(target: Console) -> str:
    assert isinstance(target.file, io.StringIO)
    return target.file.getvalue()


def table(status: LaunchStatus, columns: int = 80, rows: int = 24) -> list[str]:
    target = console(columns, rows)
    target.print(render_status(status, 12.0, columns, rows))
    return printed(target).splitlines()


@pytest.mark.parametrize("columns", [20, 40, 69, 70, 200])
@pytest.mark.parametrize("rows", [4, 10, 50])
@pytest.mark.parametrize("num_engines", [1, 40])
def test_the_table_fits_any_terminal(columns: int, rows: int, num_engines: int) -> None:
    lines = table(starting(num_engines), columns, rows)
    assert len(lines) <= rows - 1
    assert all(len(line) <= columns for line in lines)


def test_what_is_not_ready_is_shown_when_there_is_no_room_for_all() -> None:
    text = "\n".join(table(starting(5), rows=10))
    assert all(f"prefill-{n}/rank-0" in text for n in range(5))
    assert "… and 3 more" in text


def test_other_hosts_are_named() -> None:
    rows = [line.split() for line in table(serving("gpu-2"))]
    assert ["decode-0/rank-1", "on", "gpu-2", "ready"] in rows
    assert ["prefill-0", "ready"] in rows


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


def test_the_live_table_leaves_no_trace_but_the_panel() -> None:
    target = console(terminal=True)
    view = StartView(target, lambda status: list(ROWS), lambda: 0.0)
    view.changed(starting())
    view.ready(serving())
    view.close()
    last_screen = printed(target).rpartition("\x1b[2K")[2]
    assert "pdlaunch is ready" in last_screen
    assert "loading weights" not in last_screen
    assert not StartView(console(rows=3, terminal=True), lambda status: []).is_live


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
