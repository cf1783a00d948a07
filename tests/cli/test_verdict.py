"""Options, files and words of ``pdlaunch verdict``; tests/e2e/test_verdict.py measures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import Result

from pdlaunch.bench.verdict.queueing import Arm
from pdlaunch.bench.verdict.search import Findings, Probe, Race
from pdlaunch.bench.verdict.verdict import Verdict, answer
from pdlaunch.cli.html_report import verdict_page
from pdlaunch.cli.verdict import serve_yaml
from pdlaunch.config.sources import load_config
from tests.bench.verdict.test_search import ROW
from tests.command_line import invoke

GOALS = ("--slo", "ttft=1000,itl=100")


def verdict(*arguments: object, **environ: str) -> Result:
    env = {"COLUMNS": "200", "NO_COLOR": "1", "PDLAUNCH_DEVICE": "cpu", **environ}
    return invoke(["verdict", *map(str, arguments)], env=env)


def test_a_dry_run_lists_arms_and_minutes_and_starts_nothing(model: Path, tmp_path: Path) -> None:
    result = verdict(
        model,
        *GOALS,
        "--gpus",
        "2",
        "--input-tokens",
        "8",
        "--output-tokens",
        "4",
        "--minutes",
        "30",
        "--dry-run",
        "--output",
        tmp_path / "out",
    )
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
    ],
)
def test_wrong_input_is_one_clear_error(arguments: tuple[str, ...], told: str, model: Path) -> None:
    result = verdict(model, *arguments)
    assert result.exit_code == 2
    assert told in " ".join(result.output.split())


def test_a_trace_gives_the_lengths(model: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"input_length": 9000000, "output_length": 4, "timestamp": 0}\n')
    result = verdict(model, *GOALS, "--trace", trace, "--output-tokens", "5")
    assert result.exit_code == 2
    assert "not with --trace" in result.output
    result = verdict(model, *GOALS, "--trace", trace)
    assert "longer than max_model_len" in result.output


def test_measurements_are_kept(model: Path, tmp_path: Path) -> None:
    (tmp_path / "verdict.json").write_text('{"question": "another", "findings": {}}')
    sizes = ("--gpus", "2", "--input-tokens", "8", "--output-tokens", "4", "--output", tmp_path)
    result = verdict(model, *GOALS, *sizes)
    assert (result.exit_code, "--resume" in result.output) == (2, True)
    result = verdict(model, *GOALS, *sizes, "--resume")
    assert (result.exit_code, "another load" in result.output) == (2, True)
    assert json.loads((tmp_path / "verdict.json").read_text())["question"] == "another"


def test_the_file_of_the_winner_is_what_was_asked_for_with_its_engines_and_no_secret(
    tmp_path: Path,
) -> None:
    file = tmp_path / "given.yaml"
    file.write_text(
        "model: /models/a\nengine: vllm\nengine_args: {max-logprobs: 5}\nport: 9001\n"
        "routing: {policy: pairs}\nprefill: {replicas: 3, max_num_seqs: 7}\n"
        "env: {HF_TOKEN: hidden, OTHER: shown}\nkv_cache_memory: 2GiB\n"
    )
    given = load_config(file, {"PDLAUNCH_API_KEY": "very-secret"}, {})
    text = serve_yaml(Arm(2, num_prefill=1, num_decode=2), given.config, on_cpu=False)
    assert "secret" not in text
    assert "hidden" not in text
    assert "# left out: api_key" in text
    written = tmp_path / "deploy.yaml"
    written.write_text(text)
    config = load_config(written, {}, {}).config
    counts = [config.prefill.replicas, config.decode.replicas, config.both.replicas]
    assert (counts, config.tensor_parallel_size) == ([1, 2, 0], 2)
    assert (config.engine, config.engine_args, config.port) == (
        "vllm",
        given.config.engine_args,
        9001,
    )
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
