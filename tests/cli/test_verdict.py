"""Options, files and words of ``pdlaunch verdict``; tests/e2e/test_verdict.py measures."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.testing import Result

from pdlaunch.bench.verdict.arms import Arm, config_to_measure
from pdlaunch.bench.verdict.measure import Launches
from pdlaunch.bench.verdict.search import Findings, Probe, Race
from pdlaunch.bench.verdict.verdict import Verdict, answer
from pdlaunch.cli.html_report import verdict_page
from pdlaunch.cli.verdict import serve_yaml
from pdlaunch.config.sources import load_config
from tests.bench.verdict.test_search import ROW
from tests.command_line import invoke

GOALS = ("--slo", "ttft=1000,itl=100")
SIZES = ("--gpus", "2", "--input-tokens", "8", "--output-tokens", "4")
LINE = '{"input_length": %d, "output_length": 4, "timestamp": 0}\n'


def verdict(*arguments: object, **environ: str) -> Result:
    env = {"COLUMNS": "200", "NO_COLOR": "1", "PDLAUNCH_DEVICE": "cpu", **environ}
    return invoke(["verdict", *map(str, arguments)], env=env)


def test_a_dry_run_lists_arms_and_minutes_and_starts_nothing(model: Path, tmp_path: Path) -> None:
    flags = ("--minutes", "30", "--dry-run", "--output", tmp_path / "out")
    result = verdict(model, *GOALS, *SIZES, *flags)
    assert result.exit_code == 0, result.output
    assert "arms for 2 devices: 2 x TP1, 1P1D" in result.output
    assert "about 30 min" in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "--slo"),
        (("--slo", "speed=3"), "write ttft=200"),
        ((*GOALS, "--gpus", "4000"), "value: 4000"),
        ((*GOALS, "--gpus", "1"), "nothing to compare"),
        ((*GOALS, "--prefill", "2"), "the verdict chooses it"),
        ((*GOALS, "--port", "9000"), "free port"),
        ((*GOALS, "--input-tokens", "8", "--prefix", "8"), "value: 8"),
        ((*GOALS, "--input-tokens", "100000"), "max_model_len"),
        ((*GOALS, "--placement", "ray"), "this machine"),
        ((*GOALS, "--resume", "--output", "/nowhere"), "cannot be read"),
        ((*GOALS, "--trace", "trace.jsonl", "--output-tokens", "5"), "not with --trace"),
        ((*GOALS, "--trace", "trace.jsonl"), "longer than max_model_len"),
    ],
)
def test_wrong_input_is_one_clear_error(
    arguments: tuple[str, ...], told: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model)
    Path("trace.jsonl").write_text(LINE % 9_000_000)
    result = verdict(model, *arguments)
    assert result.exit_code == 2
    assert told in " ".join(result.output.split())


@pytest.mark.parametrize("name", ["PDLAUNCH_DATA_PARALLEL_SIZE", "PDLAUNCH_BOTH__NNODES"])
def test_settings_that_no_arm_can_have_are_refused(name: str, model: Path) -> None:
    result = verdict(model, *GOALS, **{name: "2"})
    assert (result.exit_code, "value: 2" in result.output) == (2, True)
    assert "differ only in replicas and tensor_parallel_size" in " ".join(result.output.split())


def test_no_autopilot_changes_an_arm_while_it_is_measured(model: Path) -> None:
    given = load_config(None, {}, {"model": str(model), "autopilot": "dry-run"})
    arm = Arm(1, num_both=2)
    assert config_to_measure(arm, given, on_cpu=True).config.autopilot == "off"


def measuring_nothing(monkeypatch: pytest.MonkeyPatch) -> list[Findings]:
    """Let the command find what two arms have done, without starting one; return what it found."""
    seen: list[Findings] = []

    def find(race: Race, findings: Findings, launches: Launches, save: Any, show: object) -> None:
        seen.append(msgspec.convert(msgspec.to_builtins(findings), Findings))
        findings.probes = measured(("2 x TP1", 4.0), ("1P1D", 2.0))[1].probes
        findings.broken["1 x TP2"] = "no request was answered: HTTP 500: a prompt"
        save(findings)

    monkeypatch.setattr("pdlaunch.cli.verdict.find_verdict", find)
    return seen


def test_what_is_written_and_told_and_resumed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = measuring_nothing(monkeypatch)
    mine = tmp_path / "deploy.yaml"
    mine.write_text(f"model: {model}\nhost: 0.0.0.0\nautopilot: dry-run\n")
    trace = tmp_path / "trace.jsonl"
    trace.write_text(LINE % 8 + LINE % 9_000_000)
    given = (mine, *GOALS, "--gpus", "2", "--trace", trace, "--output", tmp_path)
    result = verdict(*given, PDLAUNCH_API_KEY="hidden")
    assert result.exit_code == 0, result.output
    assert "1 request of the trace: too long" in result.stdout
    assert "winner.yaml: left out: api_key" in result.output
    assert "other hosts can reach 0.0.0.0" in result.output
    assert "replicas" not in mine.read_text(), "the user's own file"
    written = tmp_path / "winner.yaml"
    assert written.stat().st_mode & 0o777 == 0o600
    assert "autopilot: dry-run" in written.read_text()
    page = (tmp_path / "verdict.html").read_text()
    assert ("HTTP 500." in page, "a prompt" in page) == (True, False)
    result = invoke(["serve", str(written), "--port", "0", "--device", "cpu", "--dry-run"])
    assert result.exit_code == 0, result.output
    asked = ("--resume", "--minutes", "30", "--format", "json")
    result = verdict(*given, *asked, PDLAUNCH_API_KEY="hidden")
    assert result.exit_code == 0, result.output
    assert (len(seen[1].probes), seen[1].broken) == (4, {}), "an arm is tried again"
    report = json.loads(result.stdout)
    assert report.keys() == {"choice", "text", "winner", "rows", "ruled_out", "note"}
    assert report["rows"][0].keys() == {
        *("arm", "bound", "goodput", "at_least", "at_most", "a_device", "limited_by"),
        *("ttft_ms_median", "ttft_ms_p99", "itl_ms_median", "itl_ms_p99", "cached_share"),
        *("predicted", "error_percent"),
    }
    kept = (tmp_path / "verdict.json").read_text()
    result = verdict(*given, "--resume", PDLAUNCH_MAX_NUM_SEQS="3")
    assert (result.exit_code, "about another load" in result.output) == (2, True)
    assert (tmp_path / "verdict.json").read_text() == kept


def test_a_second_ctrl_c_comes_after_the_verdict(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measuring_nothing(monkeypatch)

    def stop(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Launches, "stop", stop)
    assert "Stay aggregated" in verdict(model, *GOALS, *SIZES, "--output", tmp_path).output
    assert (tmp_path / "winner.yaml").exists()


def test_a_folder_that_cannot_be_written_is_found_first(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = measuring_nothing(monkeypatch)
    (tmp_path / "file").touch()
    result = verdict(model, *GOALS, *SIZES, "--output", tmp_path / "file" / "out")
    assert ("cannot be written" in result.output, seen) == (True, [])


def test_figures_of_single_engines_are_kept_unless_resumed(model: Path, tmp_path: Path) -> None:
    figures = {"prefill": [], "steps": [], "chunk_tokens": 1, "max_batched_tokens": 1}
    findings = {"figures": {"1": figures | {"max_num_seqs": 1}}}
    (tmp_path / "verdict.json").write_text(json.dumps({"question": "", "findings": findings}))
    result = verdict(model, *GOALS, *SIZES, "--output", tmp_path)
    assert (result.exit_code, "add --resume" in result.output) == (2, True)


def test_after_a_first_arm_that_did_not_start_the_same_command_starts_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = measuring_nothing(monkeypatch)
    findings = {"broken": {"2 x TP1": "no memory"}, "spent_s": 9.0}
    (tmp_path / "verdict.json").write_text(json.dumps({"question": "", "findings": findings}))
    assert verdict(model, *GOALS, *SIZES, "--output", tmp_path).exit_code == 0
    assert (seen[0].broken, seen[0].spent_s) == ({}, 0.0)


def test_the_file_of_the_winner_is_what_was_asked_for_with_its_engines_and_no_secret(
    tmp_path: Path,
) -> None:
    file = tmp_path / "given.yaml"
    file.write_text(
        "model: /models/a\nengine: vllm\nengine_args: {max-logprobs: 5,"
        " long-prefill-token-threshold: 9,"
        " kv-transfer-config: {at: [{password: hidden, kv_port: 7}]},"
        """ hf-overrides: '{"api_key": "hidden"}', speculative-config: '{"num_tokens": 3}'}\n"""
        "port: 9001\n"
        "routing: {policy: pairs}\nprefill: {replicas: 3, max_num_seqs: 7}\n"
        "env: {HF_TOKEN: hidden, OTHER: shown, PROXY: 'http://me:hidden@host'}\n"
        "kv_cache_memory: 2GiB\n"
    )
    given = load_config(file, {"PDLAUNCH_API_KEY": "very-secret"}, {})
    text = serve_yaml(Arm(2, num_prefill=1, num_decode=2), given.config, on_cpu=False)
    assert "secret" not in text
    assert "hidden" not in text
    assert "# left out: api_key" in text
    assert "# left out: engine_args.kv-transfer-config.at.0.password" in text
    assert "kv_port: 7" in text
    assert "num_tokens" in text
    assert "long-prefill-token-threshold: " in text
    written = tmp_path / "deploy.yaml"
    written.write_text(text)
    config = load_config(written, {}, {}).config
    counts = [config.prefill.replicas, config.decode.replicas, config.both.replicas]
    assert (counts, config.tensor_parallel_size) == ([1, 2, 0], 2)
    assert (config.engine, config.engine_args["max-logprobs"], config.port) == ("vllm", "5", 9001)
    assert (config.prefill.max_num_seqs, config.kv_cache_memory) == (7, 2 << 30)
    assert config.env == {"OTHER": "shown"}
    aggregated = tmp_path / "aggregated.yaml"
    aggregated.write_text(serve_yaml(Arm(1, num_both=4), given.config, on_cpu=True))
    config = load_config(aggregated, {}, {}).config
    assert (config.both.replicas, config.prefill.replicas, config.num_threads) == (4, 0, 1)


def measured(*rates: tuple[str, float]) -> tuple[Verdict, Findings]:
    probes = [
        Probe(
            arm=arm,
            visit=1,
            rate=rate * factor,
            met=[factor < 1] * 20,
            seconds=9.0,
            row=ROW,
            limit="" if factor < 1 else "prefill queue",
        )
        for arm, rate in rates
        for factor in (0.97, 1.03)
    ]
    race = Race([Arm(1, num_both=2), Arm(1, num_prefill=1, num_decode=1)], 0.9, 60.0, 10.0)
    race.predictions.update({"2 x TP1": 4.0, "1P1D": 2.0})
    findings = Findings(probes=probes)
    return answer(race, findings, {"1 x TP2": "3 <KV> heads"}), findings


@pytest.mark.parametrize(
    ("rates", "told", "winner"),
    [
        ({"2 x TP1": 4.0, "1P1D": 2.0}, "Stay aggregated: 2 x TP1 gives 3.9 ", "2 x TP1"),
        ({"2 x TP1": 2.0, "1P1D": 4.0}, "Split: 1P1D gives 3.9 ", "1P1D"),
        ({"2 x TP1": 4.0, "1P1D": 4.01}, "No difference beyond the noise", "2 x TP1"),
        ({"2 x TP1": 4.0}, "No verdict", None),
    ],
)
def test_the_verdict_in_words(rates: dict[str, float], told: str, winner: str | None) -> None:
    found, _ = measured(*rates.items())
    assert found.text.startswith(told)
    assert found.winner == winner
    assert winner is None or f" {winner} is limited by: " in found.text
    assert {row["arm"] for row in found.rows} == set(rates)


def test_errors_of_predictions_are_told() -> None:
    found, _ = measured(("2 x TP1", 4.0), ("1P1D", 2.0))
    assert "model fits" in found.note
    found, _ = measured(("2 x TP1", 4.0), ("1P1D", 4.0))
    assert "does not fit" in found.note
    assert [row["error_percent"] for row in found.rows if row["arm"] == "1P1D"] == [-49]


def test_the_page_shows_every_arm() -> None:
    found, findings = measured(("2 x TP1", 4.0), ("1P1D", 2.0))
    page = verdict_page(found, findings, "ttft 1000 ms")
    assert page.count("<polyline") == 6
    assert "Stay aggregated" in page
    assert "3 &lt;KV&gt; heads" in page
    assert "http://" not in page
