"""Keeps READs that a prefill rank was asked to write, as its connector pushes, until it answers.

The destination belongs to such a READ until then, or until the process of that rank is gone.
"""

from __future__ import annotations

from collections.abc import Iterator

from pdlaunch.errors import TransferError
from pdlaunch.protocol.side_channel import Push, PushEnded, Refused, ToDecodeSide
from pdlaunch.transfer.channel.handshake import RankIdentity
from pdlaunch.transfer.connectors.connector import BlockRead, Connector, PushedRead
from pdlaunch.transfer.decode_side.links import Channel


class AskedPushes:
    """Keeps those of one peer. Does nothing where the connector reads by itself."""

    def __init__(
        self, prefill_rank: RankIdentity, connector: Connector, call_ids: Iterator[int]
    ) -> None:
        self.old_channel: Channel | None = None
        """Channel of a connection that was given up; still brings answers."""
        self._prefill_rank = prefill_rank
        self._connector = connector
        self._call_ids = call_ids
        self._reads: dict[int, PushedRead] = {}
        """The questions that are open, by call_id."""

    def check_channel(self, channel: Channel | None) -> None:
        """Raise TransferError when answers over this connection may be lost: no write must be asked
        for then.
        """
        if self._connector.pusher is not None and (channel is None or channel.broken):
            raise TransferError(f"the connection to {self._prefill_rank.name} broke")

    def ask(self, channel: Channel | None, read: PushedRead, blocks: BlockRead) -> None:
        """Ask the prefill side to write, over a channel that has been checked."""
        assert channel is not None
        call_id = next(self._call_ids)
        self._reads[call_id] = read
        channel.send(
            Push(
                call_id=call_id,
                engine_id=self._prefill_rank.engine_id,
                lease_id=blocks.lease_id,
                reader=blocks.reader,
                block_ids=list(blocks.remote_blocks),
                first_head=blocks.remote_heads.start,
                num_heads=len(blocks.remote_heads),
                target=read.target,
            )
        )

    def take_answer(self, answer: ToDecodeSide) -> bool:
        """End the READ that the message answers; False when it answers none."""
        read = self._reads.pop(answer.call_id, None)
        if read is None:
            return False
        match answer:
            case PushEnded():
                error = answer.error if not answer.ok else ""
            case Refused():
                error = answer.reason or "refused"
            case _:
                error = f"unexpected {type(answer).__name__}"
        read.end(error)
        return True

    def end_those_of_the_dead(self, channel: Channel) -> None:
        """End all READs of a process that is gone: it writes no more."""
        if self._reads and channel.broken:
            for read in self._reads.values():
                read.end("the peer's process has ended")
            self._reads.clear()

    def retire(self, channel: Channel) -> None:
        """Close a channel, or keep it while it must bring answers about writes that are under way.
        No other channel is opened before they have come.
        """
        if self._reads:
            assert self.old_channel is None
            self.old_channel = channel
        else:
            channel.close()

    def close_old_channel(self) -> None:
        """Close the channel that was kept: no READ is left that it could bring an answer about."""
        if self.old_channel is not None:
            self.old_channel.close()
            self.old_channel = None
