"""Speaks the control protocol as a child and does nothing else; words on its command line make it
misbehave.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys

from pdlaunch.protocol.control import (
    Address,
    Drain,
    Drained,
    Failed,
    FromSupervisor,
    PairReady,
    Ready,
    Register,
    Registry,
    Stop,
    Suspects,
)
from pdlaunch.protocol.process.bootstrap import ControlClient, read_bootstrap
from pdlaunch.protocol.process.step_record import SUSPECT_BIT, StepRecord
from pdlaunch.protocol.sockets import SecureContext


def main(words: set[str]) -> int:
    bootstrap = read_bootstrap()
    if "crash" in words:
        raise RuntimeError("the weights are not there")
    if "ignore-term" in words:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    inbox: queue.SimpleQueue[FromSupervisor] = queue.SimpleQueue()
    control = ControlClient(
        SecureContext(bootstrap.keys), bootstrap.control, bootstrap.name, inbox.put
    )
    if "fail" in words:
        control.send(Failed(error="cannot open model.safetensors"))
        control.close()
        return 1
    info = (
        {"grandchild": str(subprocess.Popen(["sleep", "600"]).pid)} if "grandchild" in words else {}
    )
    control.send(
        Register(
            name=bootstrap.name,
            incarnation=bootstrap.incarnation,
            pid=os.getpid(),
            address=Address(http="http://fake"),
        )
    )
    control.send(Ready(info=info))
    connected: set[tuple[str, int]] = set()
    while True:
        match inbox.get():
            case Registry(serving=True) if (
                "crash-in-a-step" in words and bootstrap.incarnation == 1
            ):
                StepRecord(bootstrap.step_record).write([7, 5 | SUSPECT_BIT])
                os.kill(os.getpid(), signal.SIGSEGV)
            case Suspects(origins=origins, repeated=repeated):
                sys.stdout.write(f"suspects {origins} repeated {repeated}\n")
            case Registry() as registry if (
                bootstrap.name.startswith("decode") and "rank" in bootstrap.name
            ):
                for entry in registry.entries:
                    key = (entry.name, entry.incarnation)
                    if entry.kind == "rank" and entry.role == "prefill" and key not in connected:
                        connected.add(key)
                        control.send(connect(bootstrap.name, *key))
            case Drain() if "deaf" not in words:
                sys.stdout.write("drained\n")
                control.send(Drained())
            case Stop() if "deaf" not in words:
                sys.stdout.write("stopped\n")
                control.close()
                return 0
            case _:
                pass


def connect(local: str, peer: str, incarnation: int) -> PairReady:
    return PairReady(local=local, peer=peer, peer_incarnation=incarnation, seconds=0.0, path="fake")


if __name__ == "__main__":
    sys.exit(main(set(sys.argv[1:])))
