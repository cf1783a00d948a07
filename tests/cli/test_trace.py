import msgspec
import pytest
from typer.testing import Result

from pdlaunch.protocol.status import RequestTrace, SpanView
from tests.cli.deployment_server import DeploymentServer
from tests.command_line import invoke

HOSTILE = "x\x1b[2J\n[red]{}%s"


def span(name: str, start: float, end: float, process: str = "router", **attributes) -> SpanView:
    return SpanView(name=name, process=process, start_ms=start, end_ms=end, attributes=attributes)


SPANS = [
    span("request", 0, 100),
    span("prefill at prefill-0", 1, 50, clock_error_ms=0.1),
    span("queue", 2, 10, "prefill-0/rank-0"),
    span("prefill", 10, 45, "prefill-0/rank-0", tokens=512),
    span("pull", 46, 52, "decode-0/rank-0", bytes=25_000_000, gb_s=4.2, verified=True),
    span("read", 44, 50, "decode-0/rank-0", bytes=25_000_000, state="done"),
    span("end", 100, 100, status=200),
]


def trace(request_id: str = "r1", **fields) -> RequestTrace:
    values = {
        "id": request_id,
        "received_at": 1e9,
        "status": 200,
        "state": "done",
        "path": "/v1/completions",
        "prefill": "prefill-0",
        "decode": "decode-0",
        "route": "prefill-0->decode-0",
        "total_ms": 100.0,
        "spans": SPANS,
    }
    return RequestTrace(**values | fields)


@pytest.fixture
def router(router: DeploymentServer) -> DeploymentServer:
    router.requests = [trace()]
    return router


def run(router: DeploymentServer, *arguments: str, columns: int = 80) -> Result:
    return invoke(["trace", *arguments, "--url", router.url], env={"COLUMNS": str(columns)})


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_a_waterfall_fits_and_needs_no_colour(router: DeploymentServer, columns: int) -> None:
    result = run(router, "r1", columns=columns)
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.output
    first, *rows = result.output.splitlines()
    assert first.startswith("r1  200 /v1/completions route=prefill-0->decode-0")
    assert max(map(len, rows)) <= columns
    processes = [row for row in rows if not row.startswith(" ")]
    assert processes == ["router", "prefill-0/rank-0", "decode-0/rank-0"]
    queue = next(row for row in rows if row.startswith("  queue"))
    prefill = next(row for row in rows if row.startswith("  prefill 5"))
    assert queue.rstrip().endswith("8.0 ms")
    assert queue.rindex("█") <= prefill.index("█")
    if columns >= 80:
        assert any("pull verified, 25 MB, 4" in row for row in rows)


def test_the_one_that_is_asked_for(router: DeploymentServer) -> None:
    router.requests.append(trace("a/b?c"))
    assert run(router, "a/b?c").output.startswith("a/b?c ")
    for options in ((), ("--failed", "2")):
        assert run(router, *options).exit_code == 0
    both = run(router, "--slowest", "2").output
    assert "r1  200" in both
    assert "a/b?c  200" in both
    assert router.queries == ["last=1", "failed=2", "slowest=2"]


def test_what_cannot_be_shown_is_told(router: DeploymentServer) -> None:
    result = run(router, "r9")
    said = "error: the router answers 404: the router has no request with this id\n"
    assert (result.exit_code, result.output) == (1, said)
    router.requests.clear()
    assert "has served no request" in run(router).output
    assert "no request has failed" in run(router, "--failed", "3").output
    assert run(router, "r1", "--failed", "1").exit_code == 2


def test_json_is_what_the_router_tells(router: DeploymentServer) -> None:
    result = run(router, "r1", "--format", "json")
    assert msgspec.json.decode(result.output, type=RequestTrace) == trace()


def test_hostile_names_tell_a_terminal_nothing(router: DeploymentServer) -> None:
    hostile = trace(
        model=HOSTILE, error=HOSTILE, spans=[span(HOSTILE, 0, 5, HOSTILE, error=HOSTILE)]
    )
    router.requests = [hostile]
    result = run(router, "r1", columns=400)
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.output
    assert r"x\x1b[2J\n[red]{}%s" in result.output
