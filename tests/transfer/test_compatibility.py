"""Every field that two ranks must agree on is compared, and named with both values."""

from __future__ import annotations

import msgspec
import pytest

from pdlaunch.errors import HandshakeError
from pdlaunch.protocol.side_channel import Compatibility
from pdlaunch.transfer.handshake import compare

OURS = Compatibility(
    protocol_version=1,
    pdlaunch_version="1.0",
    model_digest="m",
    dtype="float32",
    kv_dtype="float32",
    block_size=16,
    groups="full: 0-1",
    num_kv_heads=3,
    head_dim=64,
    layout="l",
    connector="nixl",
    checksum="xxh3_64",
)


def test_the_same_fits() -> None:
    compare(OURS, OURS, local="decode-0/rank-0", peer="prefill-0/rank-0")


@pytest.mark.parametrize("field", [info.name for info in msgspec.structs.fields(Compatibility)])
def test_a_field_that_differs_is_named_with_both_values(field: str) -> None:
    ours = getattr(OURS, field)
    theirs = msgspec.structs.replace(OURS, **{field: 99 if isinstance(ours, int) else "other"})
    with pytest.raises(HandshakeError) as caught:
        compare(OURS, theirs, local="decode-0/rank-0", peer="prefill-0/rank-0")
    expected = (
        f"{field}: decode-0/rank-0 has {ours!r}, prefill-0/rank-0 has {getattr(theirs, field)!r}"
    )
    assert expected in str(caught.value)
