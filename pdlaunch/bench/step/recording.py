"""Measure the CPU time that the recording of spans takes: ``python -m
pdlaunch.bench.step.recording --batch-size 64 --step-ms 4.6``.

Rank 0 pays for each step (``steps``: with and without recording, by turns) and for each request.
Servers and the router pay for each request, beside the steps; the router also writes its line into
a log file, and with ``--otlp-endpoint`` sends its spans to a collector. A request is taken to have
``--output-tokens`` tokens, so that a step carries batch size / output tokens of one.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from pdlaunch.bench.step.host import HostStep
from pdlaunch.engine.request_spans import RequestSpans
from pdlaunch.observe.logs import setup_logging
from pdlaunch.observe.metrics import RequestClock
from pdlaunch.observe.spans import Span, SpanLog, SpanReport
from pdlaunch.protocol.engine import Outputs, RequestFinished, from_rank
from pdlaunch.protocol.ids import HttpRequestId, PullId, RequestId
from pdlaunch.protocol.openai.responses import Usage
from pdlaunch.protocol.transfer import PullFinished
from pdlaunch.router.engine_stream import REPORT_BEGINNING, read_report
from pdlaunch.router.metrics import RouterMetrics
from pdlaunch.router.otlp import OtlpExporter
from pdlaunch.router.policy import Route
from pdlaunch.router.request_lines import RequestLines
from pdlaunch.router.request_record import RequestRecord
from pdlaunch.router.transcript import Transcript

_NUM_REQUESTS = 1000
_NUM_TURNS = 5
_FLUSH_EVERY = 50
"""Requests: fewer spans than the queue of those that wait to be sent has room for."""
_NUM_CHUNKS = 4
_ROUTE = Route(reason="least work")
_REQUEST, _PULL = RequestId("request/0"), PullId("pull")
_READ = SpanReport(elapsed_s=0.01, spans=[Span("read", 0.0, 0.01, {"bytes": 1, "gb_s": 1.0})] * 2)


def rank_reports() -> list[SpanReport]:
    """Record in rank 0 a request that pulls, computes some chunks and decodes."""
    spans = RequestSpans(True)
    spans.enter("pulling")
    event = PullFinished(pull_id=_PULL, ok=True, num_bytes=10**7, read_s=0.01, reports={0: _READ})
    spans.pulled(event, num_tokens=100, verifies=True)
    spans.enter("queue")
    spans.enter("run")
    spans.seated(device=0, host=0, remote=100)
    for chunk in range(_NUM_CHUNKS + 1):
        spans.launched()
        spans.computed(16, of_prompt=chunk < _NUM_CHUNKS, step_id=chunk)
    told = [spans.first_news(), spans.end("length", 64)]
    from_rank.encode(
        Outputs(
            items=[RequestFinished(request_id=_REQUEST, reason="length", spans=one) for one in told]
        )
    )
    return [one for one in told if one is not None]


def server_report(of_rank: list[SpanReport]) -> bytes:
    """Record a request in a server, and write the report that its router gets."""
    log = SpanLog()
    log.add("receive", log.start_at, bytes=1000)
    with log.measure("tokenize", tokens=100):
        pass
    for report in of_rank:
        log.take(report, sent_at=log.start_at, received_at=log.clock())
    return msgspec.json.encode(log.report())


def router_record(
    of_server: bytes,
    times: RequestClock,
    transcript: Transcript,
    exporter: OtlpExporter | None = None,
) -> RequestRecord:
    """Record a request of two engines in the router, and give its spans to ``exporter``.

    ``times`` and ``transcript`` are those of an answer, which the router has without recording.
    """
    # Both answers are streams, as those of a pair of engines of ours.
    event = b"%s%s}" % (REPORT_BEGINNING, of_server)
    record = RequestRecord(HttpRequestId("id"), "/v1/completions")
    if exporter is not None:
        exporter.begin(record, {})
    record.times(times)
    record.understood("model", 1)
    record.counts(transcript)
    record.routed("prefill", _ROUTE)
    with record.leg("prefill", "prefill-0") as leg:
        leg.hear(read_report(event))
    record.routed("decode", _ROUTE)
    with record.leg("decode", "decode-0") as leg:
        leg.hear(read_report(event))
    record.count(Usage(prompt_tokens=100, completion_tokens=transcript.num_tokens))
    record.end(200)
    if exporter is not None:
        exporter.end(record)
    return record


def answered(num_tokens: int) -> tuple[RequestClock, Transcript]:
    """Return what the router knows anyway of an answer of so many tokens."""
    times, transcript = RequestClock(RouterMetrics("model").requests), Transcript(1)
    for token_id in range(num_tokens):
        times.tokens(0, 1)
        transcript.admit({"choices": [{"index": 0, "text": " a", "token_ids": [token_id]}]})
    return times, transcript


def _us_each(work: Callable[[], object], flush: Callable[[], object] = lambda: None) -> float:
    """Return the microseconds of CPU time of one call, of all threads, in the least disturbed of
    some turns. ``flush`` is called now and then, and has its part in it.
    """
    turns = []
    for _ in range(_NUM_TURNS):
        start = time.process_time()
        for number in range(_NUM_REQUESTS):
            work()
            if number % _FLUSH_EVERY == _FLUSH_EVERY - 1:
                flush()
        turns.append((time.process_time() - start) / _NUM_REQUESTS * 1e6)
    return min(turns)


def _step_us(batch_size: int, num_steps: int) -> tuple[float, float]:
    """Return the median of what rank 0 does for a decode step without and with recording."""
    sides = [
        HostStep(batch_size, 256, num_steps + 1, records_spans=records) for records in (False, True)
    ]
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(num_steps):
        for side, taken in zip(sides, seconds, strict=True):
            side.run()
            taken.append(sum(times[-1] for times in side.seconds.values()))
    # The first steps compute prompts.
    without, with_spans = (statistics.median(taken[num_steps // 4 :]) * 1e6 for taken in seconds)
    return without, with_spans


def _line_us(record: RequestRecord) -> float:
    """Return what it takes to write the line of a record into the log, as the router does."""
    with tempfile.TemporaryDirectory() as folder:
        handler = setup_logging("router", "info", file=Path(folder) / "router.log")
        try:
            return _us_each(lambda: RequestLines().write(record))
        finally:
            logging.getLogger().removeHandler(handler)
            handler.close()


def main() -> None:
    """Print the CPU time of each part, and its share of a step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--step-ms", type=float, default=4.6, help="Duration of a decode step.")
    parser.add_argument("--num-steps", type=int, default=300)
    parser.add_argument("--otlp-endpoint", help="URL of a collector, to measure what OTLP takes.")
    arguments = parser.parse_args()
    of_rank = rank_reports()
    of_server = server_report(of_rank)
    without, with_spans = _step_us(arguments.batch_size, arguments.num_steps)
    of_answer = answered(arguments.output_tokens)
    requests_a_step = arguments.batch_size / arguments.output_tokens
    record_us = _us_each(lambda: router_record(of_server, *of_answer))
    line_us = _line_us(router_record(of_server, *of_answer))
    parts = {
        "rank 0, a step": (with_spans - without, 1.0),
        "rank 0, a request": (_us_each(rank_reports), requests_a_step),
        "server, a request": (_us_each(lambda: server_report(of_rank)), requests_a_step),
        "router, a request": (record_us, requests_a_step),
        "router, its line in the log": (line_us, requests_a_step),
    }
    if arguments.otlp_endpoint is not None:
        exporter = OtlpExporter(arguments.otlp_endpoint, sample=1.0)
        traced_us = _us_each(lambda: router_record(of_server, *of_answer, exporter), exporter.flush)
        exporter.close()
        parts["router, its spans over OTLP"] = (traced_us - record_us, requests_a_step)
    lines = [f"host work of a step without recording: {without:.0f} us"]
    for name, (cost_us, times) in parts.items():
        share = cost_us * times / (arguments.step_ms * 1e3)
        lines.append(f"{name:>27} {cost_us:8.1f} us  {share:7.3%} of a step")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
