"""What ``serve`` shows while it starts, and once it is ready."""

import io
import json
from dataclasses import dataclass, replace

from rich.console import Console

from pdlaunch.cli.serve import ServeView, ready_rows, render_status
from pdlaunch.errors import PdlaunchError
from pdlaunch.launch.status import LaunchPhase, LaunchStatus, ProcessState, ProcessStatus
from pdlaunch.protocol.control import PairReady
from pdlaunch.protocol.status import DeploymentStatus
from tests.cli.deployment_server import deployment, rates
from tests.e2e.waiting import await_true

ROWS = (("URL", "http://127.0.0.1:8000"), ("try", "curl x -d y"))
DRAINING = LaunchStatus(LaunchPhase.DRAINING, ())
STOPPING = LaunchStatus(LaunchPhase.STOPPING, ())


def process(name: str, state: ProcessState = ProcessState.READY, **fields) -> ProcessStatus:
    return ProcessStatus(name, fields.pop("host", "local"), state, **fields)


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


def test_the_line_of_a_start_says_what_is_waited_for() -> None:
    assert render_status(starting(40), 12.0, 20).cell_len <= 20
    said = render_status(starting(), 12.0, 200).plain
    doing = "prefill-0/rank-0: starting, loading weights 40%"
    assert said == f"starting · 12 s · 1 of 2 ready · {doing}"
    failed = process("decode-7", ProcessState.FAILED, host="gpu-2")
    mixed = replace(starting(5), processes=(*starting(5).processes, failed))
    assert "5 of 11 ready · decode-7 on gpu-2: failed · " in render_status(mixed, 1.0, 200).plain
    connecting = replace(serving(), num_missing_pairs=2)
    assert render_status(connecting, 1.0, 200).plain.endswith("pairs to connect: 2")


@dataclass
class Router:
    """Tells ``status``, and counts how often."""

    status: DeploymentStatus | None
    num_reads: int = 0

    def __call__(self) -> DeploymentStatus:
        self.num_reads += 1
        if self.status is None:
            raise PdlaunchError("it is restarted")
        return self.status


def idle(**fields: object) -> DeploymentStatus:
    values = {"requests": 0, "in_flight": 0, "rates": rates(0.0), "gone": []} | fields
    return deployment(**values)


def view_on(target: Console, router: Router, every_s: float = 0.01) -> ServeView:
    return ServeView(target, lambda status: list(ROWS), router, every_s)


def said(target: Console) -> list[str]:
    return [line.partition("] ")[2] or line for line in printed(target).splitlines()]


def test_plain_lines_tell_each_change_once() -> None:
    target = console()
    view = view_on(target, Router(None))
    view.changed(starting())
    view.changed(starting())
    view.note("a very long note " * 20)
    first, second, note = said(target)
    assert (first, second) == (
        "prefill-0/rank-0: starting, loading weights 40%",
        "prefill-0: ready",
    )
    assert note.startswith("a very long note")
    assert "\x1b" not in printed(target)


def test_the_line_of_a_start_leaves_no_trace() -> None:
    target = console(terminal=True)
    router = Router(idle())
    with view_on(target, router) as view:
        view.changed(starting())
        view.changed(serving())
        view.ready(serving())
        await_true(lambda: "  try        curl x -d y" in printed(target), "it is told")
    last_screen = printed(target).rpartition("\x1b[2K")[2]
    assert "pdlaunch is ready" in last_screen
    assert "loading weights" not in last_screen


def test_a_narrow_terminal_gets_whole_words_and_a_command_to_copy() -> None:
    target = console(40, terminal=True)
    command = f"curl {'x' * 60}"
    rows = [
        ("try", command),
        ("stop", "Ctrl-C waits for running requests; a second Ctrl-C does not"),
    ]
    with ServeView(target, lambda status: rows, Router(idle()), 0.01) as view:
        view.changed(serving())
        view.ready(serving())
        await_true(lambda: "does not" in printed(target), "it is told")
    assert command in printed(target)
    assert "Ctrl-C waits for running \nrequests; a second Ctrl-C does not\n" in printed(target)


def test_the_status_line_is_not_said_while_nothing_has_changed() -> None:
    target, router = console(), Router(idle())
    view = view_on(target, router)
    view.show_changes()
    assert said(target) == [], "nobody has asked for anything yet"
    for status in (deployment(), deployment(), None, idle(requests=12), idle(requests=12)):
        router.status = status
        view.show_changes()
    view.changed(DRAINING)
    view.show_changes()
    assert [line.split(",")[0] for line in said(target)] == ["4 requests/s", "0 requests/s"]


def test_status_lines_come_from_ready_to_the_end_and_count_a_drain_down() -> None:
    target, router = console(), Router(idle(state="starting"))
    with view_on(target, router) as view:
        view.ready(serving())
        await_true(lambda: router.num_reads > 1, "it is told")
        assert said(target) == [], "the router takes no requests yet"
        router.status = deployment(gone=[])
        await_true(lambda: "4 requests/s" in printed(target), "it is told")
        view.note("a death")
        view.changed(DRAINING)
        await_true(lambda: "draining: 3 requests left" in said(target), "it is told")
        router.status = deployment(in_flight=1)
        await_true(lambda: "draining: 1 request left" in said(target), "it is told")
        view.changed(STOPPING)
    firsts = [line.split()[0] for line in said(target)]
    assert firsts == ["pdlaunch", "URL", "try", "4", "a", "draining:", "draining:"]


def test_a_launch_that_stops_before_is_never_ready() -> None:
    target, router = console(), Router(idle(state="starting"))
    with view_on(target, router) as view:
        view.ready(serving())
        await_true(lambda: router.num_reads, "it is told")
        view.changed(DRAINING)
        router.status = idle()
        view.changed(STOPPING)
    assert "pdlaunch is ready" not in printed(target)


def test_who_starts_it_is_told_where_and_what_and_how_fast() -> None:
    found = {"model": "smollm2", "connector": "nixl", "log_dir": "/logs", "needs_key": True}
    rows = dict(ready_rows(serving("gpu-2"), **found))
    assert rows["URL"] == "http://127.0.0.1:8000"
    assert rows["topology"] == "1 prefill + 1 decode (tp 2) on 2 hosts"
    assert rows["pair"] == "prefill-0/rank-0 → decode-0/rank-0: nixl/UCX, 3.4 GB/s; p2p: not here"
    assert "Authorization: Bearer YOUR_KEY" in rows["try"]
    many = replace(serving(), pairs=serving().pairs * 9)
    assert ("pair", "… and 5 more pairs") in ready_rows(many, **found)
    body = rows["try"].partition("-d '")[2].removesuffix("'")
    assert json.loads(body) == {"model": "smollm2", "prompt": "Hello"}
