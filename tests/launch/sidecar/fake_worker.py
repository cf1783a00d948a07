"""Stands for pdlaunch's KV connector in a worker of vLLM, as its sidecar sees it."""

import asyncio
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from pdlaunch.protocol.control import Entry, PairFailed, PairReady
from pdlaunch.protocol.engine_link import (
    FromEngine,
    KVSetup,
    Peers,
    RankUp,
    ToWorker,
    dp_engine,
    from_engine,
    rank_name,
    to_worker,
)
from pdlaunch.protocol.ids import EngineId
from pdlaunch.protocol.sockets import SecureContext


def read_setup(path: Path) -> KVSetup:
    return msgspec.json.decode(path.read_bytes(), type=KVSetup)


class FakeWorker:
    """Says what a test says, and with ``shake_hands`` what a rank whose handshakes succeed says."""

    def __init__(
        self,
        setup: KVSetup,
        tp_rank: int = 0,
        tp_size: int = 1,
        dp_rank: int = 0,
        *,
        is_scheduler: bool = False,
    ) -> None:
        self.setup = setup
        self.tp_rank, self.tp_size, self.dp_rank = tp_rank, tp_size, dp_rank
        self.name = rank_name(dp_engine(setup.name, dp_rank, setup.dp_size), tp_rank)
        if is_scheduler:
            self.name = f"{dp_engine(setup.name, dp_rank, setup.dp_size)}/scheduler"
        self._context = SecureContext(setup.keys)
        self._socket = self._context.connect(
            zmq.DEALER, setup.link, identity=self.name.encode(), socket_class=zmq.asyncio.Socket
        )

    async def say(self, message: FromEngine) -> None:
        await self._socket.send(from_engine.encode(message))

    async def be_up(self, engine_id: str = "") -> None:
        await self.say(
            RankUp(
                tp_rank=self.tp_rank,
                tp_size=self.tp_size,
                engine_id=EngineId(engine_id) or self.setup.id_of(self.dp_rank),
                side_channel=f"tcp://{self.setup.advertise_address}:{7000 + self.tp_rank}",
                dp_rank=self.dp_rank,
            )
        )

    async def peers(self) -> list[Entry]:
        told = await self.told()
        assert isinstance(told, Peers)
        return told.entries

    async def told(self) -> ToWorker:
        return to_worker.decode(await asyncio.wait_for(self._socket.recv(), 180))

    async def prove(
        self, peer: str, gigabytes_per_s: float = 1.0, num_peers: int = 1, incarnation: int = 1
    ) -> None:
        await self.say(
            PairReady(
                local=self.name,
                peer=peer,
                peer_incarnation=incarnation,
                path="p2p",
                gigabytes_per_s=gigabytes_per_s,
                num_peers=num_peers,
            )
        )

    async def shake_hands(self, error: str = "", gigabytes_per_s: float = 2.0) -> None:
        """Be up, and from then on prove each prefill rank once; with ``error`` refuse it."""
        await self.be_up()
        proven: set[tuple[str, int]] = set()
        while True:
            entries = to_worker.decode(await self._socket.recv()).entries
            there = {
                (entry.name, entry.incarnation): entry
                for entry in entries
                if self.setup.role == "decode"
                and entry.role == "prefill"
                and entry.state != "sleeping"
            }
            for name, incarnation in there.keys() - proven:
                if error:
                    failed = PairFailed(local=self.name, peer=name, error=error, fatal=True)
                    await self.say(failed)
                else:
                    tp_size = there[name, incarnation].tp_size
                    await self.prove(name, gigabytes_per_s, tp_size, incarnation)
            proven = {*there}

    def close(self) -> None:
        self._socket.close()
        self._context.close()
