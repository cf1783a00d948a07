"""What people see of a deployment: ``pdlaunch status``, the screen of ``top``, the status line."""

import io
import json

import msgspec
import pytest
from rich.console import Console
from typer.testing import Result

from pdlaunch.cli.status import page, status_line
from pdlaunch.protocol.status import DeploymentStatus
from tests.cli.deployment_server import HOSTILE, DeploymentServer, deployment, engine
from tests.command_line import invoke


def run(*arguments: str, **environ: str) -> Result:
    return invoke(["status", *arguments], env={"COLUMNS": "80", "NO_COLOR": "1", **environ})


def test_it_shows_engines_pairs_rates_and_events(router: DeploymentServer) -> None:
    result = run("--url", router.url)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0].startswith("tiny  ok  up 1 h 6 min  2 engines, 1 down  pdlaunch 0.1.0")
    assert lines[1].startswith("4 requests/s  40 tokens/s  3 in flight")
    assert "TTFT 11.4 ms (p95 26 ms)" in lines[2]
    (row,) = (" ".join(line.split()) for line in lines if line.startswith("decode-0 "))
    assert row == "decode-0 decode ready 4 3 1 50% 30%/10%/20% 1.5 GB/s"
    assert "prefill-0 -> decode-0 p2p/posix_fd/batch1 392 GB/s" in " ".join(result.output.split())
    assert "decode-7 has been gone for 1 min" in lines
    assert "routes of the last prompts: 75% pair (" in result.output


def test_engines_and_pairs_that_get_nothing_new_are_told(router: DeploymentServer) -> None:
    why = "3 requests in a row have failed"
    out, trial = engine("decode-0", "decode", health="open", left_out=why), {"health": "half_open"}
    router.status = deployment(out, engine("decode-1", "decode", **trial))
    changed = {"health": "open", "slow": "PD504 nixl/UCX moves 0.6 GB/s"}
    pairs = [msgspec.structs.replace(pair, **changed) for pair in router.status.pairs]
    router.status = msgspec.structs.replace(router.status, pairs=pairs)
    output = run("--url", router.url).output
    (row,) = [line for line in output.splitlines() if "decode-1 " in line]
    assert " on trial " in row
    assert "decode-0 gets no new work: 3 requests in a row have failed" in output
    assert "left out" in output
    assert "no new pulls for a while" in output
    assert "prefill-0 -> decode-0 is slow: PD504 nixl/UCX moves 0.6 GB/s" in output


def test_json_is_what_the_router_says(router: DeploymentServer) -> None:
    told = run("--url", router.url, "--format", "json").output
    assert json.loads(told) == msgspec.to_builtins(router.status)


def test_the_key_comes_from_the_flag_or_the_environment(router: DeploymentServer) -> None:
    router.key = "the-key"
    refused = run("--url", router.url)
    assert refused.exit_code == 1
    assert "--api-key" in refused.output
    assert run("--url", router.url, "--api-key", "the-key").exit_code == 0
    assert run(PDLAUNCH_URL=router.url, PDLAUNCH_API_KEY="the-key").exit_code == 0


def test_what_cannot_be_asked_is_said(router: DeploymentServer) -> None:
    assert "name another router with --url" in run().output
    nobody = run("--url", "http://127.0.0.1:9")
    assert nobody.exit_code == 1
    assert "cannot be reached" in nobody.output
    router.answer = lambda path, key: (200, b'{"engines": []}')  # type: ignore[method-assign]
    stranger = run("--url", router.url)
    assert stranger.exit_code == 1
    assert "not answer like this version" in stranger.output


def shown(status: DeploymentStatus, columns: int = 80, rows: int = 24) -> list[str]:
    # As a terminal that knows no Unicode.
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    console = Console(file=file, width=columns, height=rows, color_system=None)
    lines = console.render_lines(page(status, "Ctrl-C ends", columns, rows), pad=False)
    assert all(sum(segment.cell_length for segment in line) <= columns for line in lines)
    return ["".join(segment.text for segment in line).rstrip() for line in lines]


def test_a_narrow_screen_has_fewer_columns_and_cuts_no_word() -> None:
    lines = shown(deployment(engine("decode-0", "decode")), columns=50)
    headings = next(line.split() for line in lines if line.startswith("engine"))
    assert headings == ["engine", "role", "state", "load", "run", "wait", "KV"]
    assert not any("…" in line for line in lines)


@pytest.mark.parametrize(("columns", "rows"), [(80, 24), (132, 50), (400, 200)])
@pytest.mark.parametrize("number", [1, 1000])
def test_top_fits_any_screen_and_says_what_it_leaves_out(
    columns: int, rows: int, number: int
) -> None:
    status = deployment(*(engine(f"decode-{n}", "decode") for n in range(number)))
    lines = shown(status, columns, rows)
    assert len(lines) <= rows
    assert lines[0] == "Ctrl-C ends"
    text = "\n".join(lines)
    assert text.isascii()
    assert "prefill-0 -> decode-0" in text
    assert "dev/host/pull" in text
    assert ("... and" in text) == (number == 1000)


def test_hosts_are_named_where_there_are_several() -> None:
    one, other = engine("prefill-0", "prefill"), engine("decode-0", "decode", host="gpu-17.far")
    lines = shown(deployment(one, other))
    assert any(line.split()[:3] == ["decode-0", "decode", "gpu-17.far"] for line in lines)
    assert not any(" host " in line for line in shown(deployment()))


def test_a_dead_engine_is_told_without_colour_and_sorted_to_the_top() -> None:
    dead = engine("decode-9", "decode", state="starting", is_down=True)
    lines = shown(deployment(engine("decode-0", "decode"), dead))
    rows = [line for line in lines if line.startswith("decode-")]
    assert "DOWN" in rows[0]
    assert "2 down" in lines[1]


def test_names_of_others_are_no_commands_and_no_markup(router: DeploymentServer) -> None:
    router.status = deployment(
        engine(HOSTILE, "decode", state="failed", reason=HOSTILE), model=HOSTILE
    )
    for text in (run("--url", router.url).output, "\n".join(shown(router.status, 200))):
        assert not {"\x1b", "\x07"} & set(text)
        assert r"[red]x[/red]\x1b[31m\x07\n<b>" in text


def test_the_line_says_rates_load_caches_pulls_and_errors() -> None:
    status = deployment(
        engine("decode-0", "decode", kv_usage=0.5),
        engine("decode-1", "decode", kv_usage=0.1),
        engine("prefill-0", "prefill", is_down=True, state="starting"),
        errors=5,
    )
    assert status_line(status, 3) == (
        "4 requests/s, 40 tokens/s, 9 running, 3 waiting, KV prefill 25% decode 30%, "
        "pulls 3 GB/s, 2 errors, down: prefill-0, decode-7"
    )
