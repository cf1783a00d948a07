from __future__ import annotations

import json

from pdlaunch.launch.sidecar.process import with_events_at


def test_events_are_published_at_a_socket_of_the_launch() -> None:
    command = ("vllm", "--kv-events-config", '{"enable_kv_cache_events":true}', "--seed", "1")
    changed = with_events_at(command, "ipc:///run/decode-0.events")
    assert changed[3:] == command[3:]
    assert json.loads(changed[2]) == {
        "enable_kv_cache_events": True,
        "endpoint": "ipc:///run/decode-0.events",
    }
    own = ("vllm", "--kv-events-config", '{"endpoint":"ipc:///mine"}')
    assert json.loads(with_events_at(own, "ipc:///other")[2]) == {"endpoint": "ipc:///mine"}
    assert with_events_at(("vllm", "--seed", "1"), "ipc:///x") == ("vllm", "--seed", "1")
