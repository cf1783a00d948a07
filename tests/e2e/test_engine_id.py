"""Ranks of one engine that were started as if on two hosts, each of which has drawn an engine_id:
rank 0's is the engine's.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch
import zmq

from pdlaunch.protocol.control import (
    Entry,
    Failed,
    Register,
    Registry,
    Stop,
    from_supervisor,
    to_supervisor,
)
from pdlaunch.protocol.process.bootstrap import Bootstrap
from pdlaunch.protocol.side_channel import (
    Handshake,
    HandshakeReply,
    Refused,
    ToDecodeSide,
    to_decode_side,
    to_prefill_side,
)
from pdlaunch.protocol.sockets import LaunchKeys, SecureContext, new_launch_keys
from pdlaunch.transfer.handshake import compatibility_of
from tests.engine.hand_scheduler import make_spec
from tests.engine.models.tiny import save_tiny_model
from tests.transfer.fakes import layout_of, spec_of

ROOT = Path(__file__).parents[2]
TIMEOUT_MS = 120_000
DRAWN = {"prefill-0/rank-0": "a" * 32, "prefill-0/rank-1": "b" * 32}
ENGINE_ID, UNUSED_ID = DRAWN.values()


class TwoHosts:
    """A supervisor by hand: starts the ranks and shows them to each other."""

    def __init__(self, folder: Path) -> None:
        self.keys: LaunchKeys = new_launch_keys()
        self.context = SecureContext(self.keys)
        self._folder = folder
        self._socket, self._control = self.context.listen(zmq.ROUTER, "tcp://127.0.0.1:0")
        self._socket.rcvtimeo = TIMEOUT_MS
        self.said: dict[str, list[Register]] = {name: [] for name in DRAWN}
        self.ranks: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, model: Path) -> None:
        spec = make_spec(model, name="prefill-0", role="prefill", tensor_parallel_size=len(DRAWN))
        for tp_rank, (name, engine_id) in enumerate(DRAWN.items()):
            bootstrap = Bootstrap(
                name=name,
                incarnation=1,
                control=self._control,
                keys=self.keys,
                run_dir=str(self._folder),
                log_level="debug",
                engine_json=spec.model_dump_json(),
                tp_rank=tp_rank,
                rendezvous=f"file://{self._folder}/rendezvous",
            )
            command = [
                sys.executable,
                "-m",
                "tests.e2e.rank_of_host",
                "--name",
                name,
                "--engine-id",
                engine_id,
            ]
            with (self._folder / f"{tp_rank}.log").open("wb") as log:
                self.ranks[name] = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=log, stderr=log, cwd=ROOT
                )
            stdin = self.ranks[name].stdin
            assert stdin is not None
            stdin.write(msgspec.json.encode(bootstrap) + b"\n")
            stdin.flush()

    def await_addresses(self) -> None:
        """Until both ranks can be asked on their side channels."""
        while not all(said and said[-1].address.side_channel for said in self.said.values()):
            identity, frame = self._socket.recv_multipart()
            message = to_supervisor.decode(frame)
            assert not isinstance(message, Failed), message
            if isinstance(message, Register):
                self.said[identity.decode()].append(message)
        self._say(
            Registry(version=1, entries=[self._entry(said[-1]) for said in self.said.values()])
        )

    def ask(self, name: str, expected_engine_id: str) -> ToDecodeSide:
        """What a rank answers to a handshake with the engine of this id."""
        socket = self.context.connect(zmq.DEALER, self.said[name][-1].address.side_channel)
        socket.rcvtimeo = TIMEOUT_MS
        compatibility = compatibility_of(
            spec_of("decode"),
            layout_of(),
            torch.float32,
            model_digest="",
            total_kv_heads=2,
            connector="nixl",
        )
        question = Handshake(
            call_id=1,
            engine_id="d" * 32,
            rank_name="decode-0/rank-0",
            incarnation=1,
            expected_engine_id=expected_engine_id,
            compatibility=compatibility,
            agent_metadata=b"",
        )
        socket.send(to_prefill_side.encode(question))
        answer = to_decode_side.decode(socket.recv())
        socket.close()
        return answer

    def stop(self) -> list[int]:
        self._say(Stop())
        return [rank.wait(TIMEOUT_MS / 1000) for rank in self.ranks.values()]

    def shown(self) -> bytes:
        """All that others on the hosts could see of the ranks: arguments, environment, logs."""
        processes = [Path(f"/proc/{rank.pid}") for rank in self.ranks.values()]
        files = [process / name for process in processes for name in ("cmdline", "environ")]
        return b"".join(file.read_bytes() for file in [*files, *self._folder.glob("*.log")])

    def close(self) -> None:
        for rank in self.ranks.values():
            rank.kill()
            rank.wait()
            assert rank.stdin is not None
            rank.stdin.close()
        self._socket.close()
        self.context.close()

    def _entry(self, said: Register) -> Entry:
        return Entry(
            name=said.name,
            kind="rank",
            incarnation=said.incarnation,
            engine="prefill-0",
            role="prefill",
            tp_rank=int(said.name[-1]),
            tp_size=len(DRAWN),
            engine_id=said.engine_id,
            address=said.address,
        )

    def _say(self, message: Registry | Stop) -> None:
        for name in DRAWN:
            self._socket.send_multipart([name.encode(), from_supervisor.encode(message)])


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[TwoHosts]:
    hosts = TwoHosts(tmp_path)
    yield hosts
    hosts.close()


def test_the_id_of_rank_0_is_that_of_all_and_no_key_shows(hosts: TwoHosts, tmp_path: Path) -> None:
    hosts.start(save_tiny_model("llama", tmp_path))
    hosts.await_addresses()
    for name, messages in hosts.said.items():
        assert [message.engine_id for message in messages] == ["", ENGINE_ID], (
            "known before there is an address"
        )
        # The connector was made with it: what the rank says of itself over the side channel does
        # not change any more.
        answer = hosts.ask(name, ENGINE_ID)
        assert isinstance(answer, HandshakeReply)
        assert (answer.rank_name, answer.engine_id, answer.tp_rank) == (
            name,
            ENGINE_ID,
            int(name[-1]),
        )
        refusal = hosts.ask(name, UNUSED_ID)
        assert isinstance(refusal, Refused)
        assert refusal.reason == f"{name}: it belongs to engine_id {ENGINE_ID}, not to {UNUSED_ID}"
    shown = hosts.shown()
    assert b"handshake with decode-0/rank-0" in shown
    for secret in (hosts.keys.secret, hosts.keys.public, hosts.keys.http_token):
        assert secret.encode() not in shown
    assert hosts.stop() == [0, 0]
