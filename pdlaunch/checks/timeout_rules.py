"""Rules PD107, PD113, PD116 and PD120 judge times that do not go together."""

from __future__ import annotations

from collections.abc import Iterator

from pdlaunch.checks.context import Context
from pdlaunch.checks.rule import Found, rule
from pdlaunch.planning.step_time import least_step_s


@rule(
    "PD107",
    "error",
    fix="Make kv_transfer.lease_s longer than kv_transfer.pull_timeout_s.",
    source=(
        "vLLM: after its lease the late read succeeds, and decode answers wrong text with HTTP 200 "
        "(measured)."
    ),
)
def lease_too_short(context: Context) -> Iterator[Found]:
    """The lease on prefill's blocks is shorter than the longest transfer.

    When a lease ends, prefill gives the blocks to other requests. Heartbeats extend it while a pull
    runs; when they do not get through, a pull that is still allowed to go on reads blocks of other
    requests, and the prompt is computed again.
    """
    transfer = context.config.kv_transfer
    if context.pair() and transfer.lease_s <= transfer.pull_timeout_s:
        yield Found(
            "kv_transfer.lease_s",
            (
                f"blocks are leased for {transfer.lease_s:g} s, but a pull may take "
                f"{transfer.pull_timeout_s:g} s"
            ),
            (
                f"set lease_s above {transfer.pull_timeout_s:g}, or pull_timeout_s below "
                f"{transfer.lease_s:g}"
            ),
        )


@rule(
    "PD113",
    "warning",
    fix="Raise limits.request_timeout_s, or lower kv_transfer.pull_timeout_s.",
    source="The life of a request.",
)
def request_shorter_than_pulls(context: Context) -> Iterator[Found]:
    """A request ends before a failed transfer can be made good.

    Decode recomputes the prompt after its pull has failed. A request that may live no longer than a
    pull may take never gets there.
    """
    transfer, limit = context.config.kv_transfer, context.config.limits.request_timeout_s
    if context.pair() and limit <= transfer.pull_timeout_s:
        message = f"a request lives {limit:g} s, its pull may take {transfer.pull_timeout_s:g} s"
        yield Found("limits.request_timeout_s", message)


@rule(
    "PD116",
    "warning",
    fix="Make startup_timeout_s longer than kv_transfer.handshake_timeout_s.",
    source="The start of a launch.",
)
def startup_shorter_than_handshake(context: Context) -> Iterator[Found]:
    """The handshake may take longer than the whole start.

    The start is given up before a slow handshake has had its time, and the reason is lost.
    """
    start, handshake = (
        context.config.startup_timeout_s,
        context.config.kv_transfer.handshake_timeout_s,
    )
    if context.pair() and start <= handshake:
        yield Found(
            "startup_timeout_s",
            f"startup_timeout_s {start:g} is not over handshake_timeout_s {handshake:g}",
        )


@rule(
    "PD120",
    "warning",
    fix="Raise hang_timeout_s (0 for never), or lower max_num_batched_tokens.",
    source=(
        "Two operations for each weight and token, at a speed that no device of its kind reaches: "
        "100 GFLOP/s a CPU thread (measured with AVX2: 43), 1 TFLOP/s where it multiplies "
        "bfloat16; on a GPU 80 TFLOP/s in float32, 2.5 PFLOP/s in 16 bits."
    ),
    needs=("model",),
)
def hang_shorter_than_step(context: Context) -> Iterator[Found]:
    """A step of the token budget takes longer than hang_timeout_s.

    A rank says that it is alive between two steps. One whose step takes longer is taken for hung
    and restarted in the middle of every prompt that fills the budget. The time that is told is the
    least that such a step can take; a real one takes longer.
    """
    limit_s = context.config.hang_timeout_s
    for engine in context.engines.values():
        step_s = least_step_s(engine)
        if step_s is not None and 0 < limit_s < step_s:
            message = (
                f"a step of {engine.max_num_batched_tokens} tokens takes a {engine.role} rank at "
                f"least {step_s:.2g} s, hang_timeout_s is {limit_s:g}"
            )
            tokens = int(engine.max_num_batched_tokens * limit_s / step_s)
            yield Found(
                "hang_timeout_s",
                message,
                f"set hang_timeout_s to several times {step_s:.2g} (0 for never), or "
                f"max_num_batched_tokens well below {tokens}",
            )
