"""Defines the ids of the package. Each kind of id is one type, with one name everywhere.

::

    type            made by                         ends with                on the wire
    HttpRequestId   client, else router             the router's answer      X-Request-Id, cmpl-ID
    PromptOrigin    router, for each prompt         the prompt's answer      X-Pdlaunch-Origin
    HopId           router, for each call of an     the engine's answer      X-Request-Id
                    engine (or another caller)
    RequestId       engine's server, for each       RequestFinished          request_id
                    choice: HOP-RANDOM/INDEX
    LeaseId         prefill engine (its RequestId)  last reader's PullEnd,   remote_request_id
                                                    or expiry
    PullId          rank 0 of a decode engine       PullFinished, Drained    pull_id
    ReaderId        decode rank, for each pull:     PullEnd                  reader
                    ENGINE/RANK/DIGEST
    EngineId        rank 0, at each start           the engine's ranks       engine_id

An HttpRequestId and a HopId are different ids because two clients may send the same id, and because
an engine may still hold blocks for the previous attempt.
"""

from typing import NewType

HttpRequestId = NewType("HttpRequestId", str)
PromptOrigin = NewType("PromptOrigin", int)
HopId = NewType("HopId", str)
RequestId = NewType("RequestId", str)
LeaseId = NewType("LeaseId", str)
PullId = NewType("PullId", str)
ReaderId = NewType("ReaderId", str)
EngineId = NewType("EngineId", str)

NO_ORIGIN = PromptOrigin(0)  # the origin of a request whose router sends none


def lease_of(request_id: RequestId) -> LeaseId:
    """Return the lease on the blocks of this request, which may outlive the request."""
    return LeaseId(request_id)
