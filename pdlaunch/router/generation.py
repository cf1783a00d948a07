"""Takes one prompt through the engines: prefill, hand over, decode; another engine where one fails.

::

    prefill(max_tokens=1) ── first tokens ──> client
         └ kv_transfer_params ──> decode ── chunks ──> client
                                     └ died: another engine resumes after the tokens so far

A request that only one engine can or need serve goes there at once. All that is sent to the client
went through the transcript, so that nothing is told twice whichever engine says it.
"""

from __future__ import annotations

from pdlaunch.router.client_request import PromptRequest
from pdlaunch.router.decode_hop import DecodeHop
from pdlaunch.router.prefill_hop import PrefillHop
from pdlaunch.router.prompt_progress import ChunkSink, PromptProgress
from pdlaunch.router.request_record import RequestRecord
from pdlaunch.router.state import RouterState
from pdlaunch.router.transcript import Transcript


async def generate(
    prompt: PromptRequest,
    state: RouterState,
    sink: ChunkSink,
    record: RequestRecord,
    wanted_at: float | None,
) -> Transcript:
    """Answer one prompt. Raises RequestError, EngineRefusal or EngineFailure.

    Cancelling it ends the work of both engines. ``wanted_at``: the deadline that its
    client has stated, on the loop's clock.
    """
    progress = PromptProgress(prompt, state, sink, record, wanted_at)
    with state.suspects.watch(prompt.origin):
        try:
            await PrefillHop(progress).run()
            await DecodeHop(progress).run()
            num_tokens = progress.transcript.usage().completion_tokens
            state.pool.answer_lengths.add(num_tokens / prompt.num_choices)
        finally:
            progress.end()
    return progress.transcript
