"""What vLLM's scheduler is answered: which blocks are lent and pulled, and when a lease ends."""

from typing import Any

import pytest
from msgspec import structs

from pdlaunch.config.kv_transfer import KVTransferSettings
from pdlaunch.protocol.engine_link import KVSetup
from pdlaunch.protocol.sockets import LaunchKeys
from pdlaunch.protocol.transfer import CancelPull, GrantLease, StartPull
from pdlaunch.vllm.scheduling import GroupShape, Scheduling

FULL, SLIDING = GroupShape(4, None), GroupShape(4, 6)
STATE = GroupShape(4, None, is_state=True)


class Request:
    lora_request: Any = None
    mm_features: Any = ()
    skip_reading_prefix_cache = False

    def __init__(self, name: str, num_tokens: int, params: Any = None, **fields: Any) -> None:
        self.request_id, self.kv_transfer_params = name, params
        self.prompt_token_ids: list[int] | None = list(range(num_tokens))
        self._all_token_ids = list(range(num_tokens))
        self.num_prompt_tokens = num_tokens
        self.output_token_ids = [77]
        self.__dict__ |= fields


def kv_setup(role: Any = "decode", **changes: Any) -> KVSetup:
    setup = KVSetup(
        name=f"{role}-0",
        engine_id=role[0] * 32,
        incarnation=1,
        role=role,
        bind_address="127.0.0.1",
        advertise_address="127.0.0.1",
        keys=LaunchKeys("", "", ""),
        link="",
        kv_transfer="",
        by_head=False,
        model_digest="m",
    )
    return structs.replace(setup, **changes)


def scheduling(*groups: GroupShape, digest: str = "d", grant: Any = repr) -> Scheduling:
    setup, settings = kv_setup(model_digest=digest), KVTransferSettings()
    return Scheduling(setup, settings, groups or (FULL,), grant, dp_rank=0, tp_size=2)


PREFILL = {"do_remote_decode": True}


def lent(num_tokens: int = 10, *groups: GroupShape, tables: Any = ([3, 1, 2],)) -> Any:
    """The params of a prompt that a prefill engine has computed."""
    return scheduling(*groups).finished(
        Request("p", num_tokens, PREFILL), tables, is_prefilled=True
    )


def test_a_prompt_is_lent_with_its_own_blocks_alone() -> None:
    """vLLM 0.24 also names blocks for tokens to come; those that left a window are null."""
    granted: list[GrantLease] = []
    prefill = scheduling(FULL, SLIDING, grant=granted.append)
    tables = [3, 1, 2, 9], [0, 5, 6, 8]
    params = prefill.finished(Request("p", 10, PREFILL), tables, is_prefilled=True)
    (grant,) = prefill.take_commands()
    assert granted == [grant], "sent at once, too"
    assert isinstance(grant, GrantLease)
    assert (grant.block_ids, grant.first_block_index) == ([[3, 1, 2], [5, 6]], [0, 1])
    assert (grant.lease_id, grant.num_tokens, len(grant.block_hashes)) == ("p", 10, 3)
    assert params is not None
    assert params["remote_engine_id"] == "d" * 32
    assert params["remote_block_ids"] == grant.block_ids
    assert params["pdlaunch"]["first_tokens"] == [{"token_id": 77}]
    assert (params["tp_size"], params["do_remote_prefill"]) == (2, True)
    assert prefill.take_commands() == []


OTHERS = {
    "ended with its first token": (Request("p", 10, PREFILL), False, [3, 1, 2]),
    "preempted before": (Request("p", 10, PREFILL), True, []),
    "nobody asked": (Request("p", 10), True, [3, 1, 2]),
    "embeddings": (Request("p", 10, PREFILL, prompt_token_ids=None), True, [3, 1, 2]),
    "nonsense": (Request("p", 10, {"do_remote_decode": "nonsense"}), True, [3, 1, 2]),
}


@pytest.mark.parametrize(("request_", "is_prefilled", "table"), OTHERS.values(), ids=OTHERS)
def test_other_requests_keep_nothing(
    request_: Request, is_prefilled: bool, table: list[int]
) -> None:
    prefill = scheduling()
    assert prefill.finished(request_, (table,), is_prefilled=is_prefilled) is None
    assert prefill.take_commands() == []


def test_behind_a_lent_prompt_may_stand_the_token_of_prefill() -> None:
    decode, request = scheduling(), Request("d", 11, lent(10))
    assert decode.num_matched(request, 4) == 6
    decode.allocated(request, ([7, 8, 9],), 6)
    (pull,) = decode.take_commands()
    assert isinstance(pull, StartPull)
    assert (pull.block_ids, pull.num_tokens) == ([[8, 9]], 10)
    alone = scheduling()
    alone.allocated(Request("d", 10, lent(10)), ([7, 8, 9],), 6)
    assert alone.take_commands()[0].block_hashes == pull.block_hashes  # type: ignore[union-attr]


def test_decode_pulls_what_it_has_not_cached_once_and_is_not_asked_again() -> None:
    decode, request = scheduling(), Request("d", 10, lent())
    assert decode.num_matched(request, 4) == 6
    assert decode.num_matched(request, 4) == 6, "no room yet: vLLM asks again"
    decode.allocated(request, ([7, 8, 9],), 6)
    (pull,) = decode.take_commands()
    assert isinstance(pull, StartPull)
    assert (pull.block_ids, pull.first_block_index) == ([[8, 9]], [1])
    assert (pull.pull_id, pull.remote.lease_id) == ("d", "p")
    # Preempted, or the load has failed: it is computed here.
    assert decode.num_matched(request, 0) == 0
    decode.allocated(request, ([7, 8, 9],), 0)
    assert decode.take_commands() == []
    decode.received(["d"])
    assert decode.finished(request, ([7, 8, 9],), is_prefilled=True) is None
    assert decode.take_commands() == []


def test_both_sides_hash_the_same_prompt_alike_and_nothing_else() -> None:
    def hashes(request: Request, digest: str = "d") -> list[bytes]:
        side = scheduling(digest=digest)
        request.kv_transfer_params = PREFILL
        side.finished(request, ([3, 1, 2],), is_prefilled=True)
        return side.take_commands()[0].block_hashes  # type: ignore[union-attr]

    prompt = hashes(Request("a", 10))
    assert prompt == hashes(Request("b", 10))

    class Adapter:
        lora_name = "adapter"

    class Image:
        identifier = "picture"
        mm_position = type("Place", (), {"offset": 1})

    others = [
        hashes(Request("b", 10), digest="other weights"),
        hashes(Request("b", 10, prompt_token_ids=[1, *range(1, 10)])),
        hashes(Request("b", 10, lora_request=Adapter())),
        hashes(Request("b", 10, mm_features=[Image()])),
    ]
    assert len({each[-1] for each in [prompt, *others]}) == 5


@pytest.mark.parametrize("is_known", [True, False])
def test_a_lease_ends_where_nothing_is_pulled(is_known: bool) -> None:
    """All is cached, or the request was aborted before it got blocks."""
    decode, request = scheduling(), Request("d", 10, lent())
    if is_known:
        assert decode.num_matched(request, 10) == 0
        decode.allocated(request, ([7, 8, 9],), 0)
    else:
        assert decode.finished(request, ([],), is_prefilled=False) is None
    (visit,) = decode.take_commands()
    assert isinstance(visit, StartPull)
    assert visit.block_ids == [[]]


def test_requests_that_vllm_refuses_under_one_id_end_a_lease_each() -> None:
    """It tells of them under the id that the client chose, which may come again at once."""
    decode = scheduling()
    for _ in range(2):
        decode.finished(Request("chosen", 1, lent()), ([],), is_prefilled=False)
    visits = decode.take_commands()
    assert len({each.pull_id for each in visits if isinstance(each, StartPull)}) == 2


def test_an_abort_cancels_the_pull_under_way_and_no_other() -> None:
    decode, request = scheduling(), Request("d", 10, lent())
    decode.num_matched(request, 0)
    decode.allocated(request, ([7, 8, 9],), 10)
    decode.take_commands()
    assert decode.finished(request, ([7, 8, 9],), is_prefilled=False) is None
    assert decode.take_commands() == [CancelPull(pull_id="d")]


@pytest.mark.parametrize(("num_tokens", "matched"), [(7, 7), (8, 0), (9, 9), (16, 0)])
def test_a_prompt_that_fills_its_chunk_is_computed_here(num_tokens: int, matched: int) -> None:
    """The next token sees none of a full chunk, so that both engines give its blocks back."""
    chunks = GroupShape(4, 8, in_chunks=True)
    params = lent(num_tokens, FULL, chunks, tables=([1, 2, 3, 4], [0, 0, 5, 6]))
    decode = scheduling(FULL, chunks)
    assert decode.num_matched(Request("d", num_tokens, params), 0) == matched


@pytest.mark.parametrize(("num_tokens", "matched"), [(6, 6), (9, 0), (10, 10), (12, 12), (13, 0)])
def test_a_last_token_that_sees_a_block_that_is_gone_is_computed_here(
    num_tokens: int, matched: int
) -> None:
    """Token 9 of 10 with a window of 6 sees 4 to 9, and block 1 holds 4: it stays. Of 9 tokens the
    last one sees 3, and the next one none of block 0.
    """
    params = lent(num_tokens, SLIDING, tables=([0, 5, 6, 7],))
    assert scheduling(SLIDING).num_matched(Request("d", num_tokens, params), 0) == matched
    with_first_token = Request("d", num_tokens + 1, params)
    assert scheduling(SLIDING).num_matched(with_first_token, 0) == num_tokens


def test_params_that_cannot_be_read_leave_the_prompt_to_this_engine(caplog: Any) -> None:
    decode = scheduling()
    broken = lent() | {"remote_block_ids": "all"}
    assert decode.num_matched(Request("d", 10, broken), 0) == 0
    assert "request d is computed here: kv_transfer_params" in caplog.text


def state_of(num_tokens: int, tables: Any, *, has_stopped: bool = False) -> Any:
    """The params of a prompt that a prefill engine with states has computed, and its grant."""
    prefill, request = scheduling(FULL, STATE), Request("p", num_tokens, PREFILL)
    prefill.added(request)
    assert request.prompt_token_ids == request._all_token_ids == list(range(num_tokens - 1))
    params = prefill.finished(
        request, tables, is_prefilled=not has_stopped, has_stopped=has_stopped
    )
    (grant,) = prefill.take_commands()
    return params, grant


@pytest.mark.parametrize("has_stopped", [False, True])
def test_a_state_stands_in_front_of_the_last_token_which_decode_computes(has_stopped: bool) -> None:
    """Whatever prefill draws behind a prompt without its last token ends nothing. The block before
    may still hold the state of an earlier step.
    """
    params, grant = state_of(10, ([3, 1, 2], [0, 5, 6]), has_stopped=has_stopped)
    assert (grant.block_ids, grant.first_block_index) == ([[3, 1, 2], [6]], [0, 2])
    assert grant.num_tokens == 9
    decode, request = scheduling(FULL, STATE), Request("d", 10, params)
    assert decode.num_matched(request, 4) == 5
    decode.allocated(request, ([7, 8, 9], [0, 0, 4]), 5)
    (pull,) = decode.take_commands()
    assert isinstance(pull, StartPull)
    assert (pull.block_ids, pull.first_block_index) == ([[8, 9], [4]], [1, 2])
    assert (pull.num_tokens, pull.block_hashes) == (9, grant.block_hashes)


def test_the_state_of_a_longer_prompt_does_not_fit() -> None:
    """Its blocks of tokens do."""
    _, grant = state_of(13, ([3, 1, 2], [0, 0, 6]))
    _, longer = state_of(14, ([3, 1, 2, 4], [0, 0, 0, 6]))
    assert len(grant.block_hashes) == 3
    assert grant.block_hashes[0] != longer.block_hashes[0]


def test_a_prompt_that_was_not_shortened_has_no_state_to_lend() -> None:
    """Decode computes a prompt whole whose log probabilities are asked for."""
    prefill = scheduling(FULL, STATE)
    request = Request("p", 10, PREFILL, skip_reading_prefix_cache=True)
    prefill.added(request)
    assert request.num_prompt_tokens == 10
    assert prefill.finished(request, ([3, 1, 2], [0, 5, 6]), is_prefilled=True) is None
    assert prefill.take_commands() == []
