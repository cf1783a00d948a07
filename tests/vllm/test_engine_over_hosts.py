"""A vLLM prefill engine has ranks or stages on two hosts (namespaces); decode runs on host a."""

import contextlib
import itertools
import json
from collections.abc import Iterator

import msgspec
import psutil
import pytest
import zmq

from tests.e2e.api import greedy_body
from tests.e2e.faults import lives
from tests.e2e.tiny_models import TWO_HEADS, make_tiny_model
from tests.netns.hosts import new_network, signal_inner, why_not
from tests.netns.launch import FarLaunch, far_launch, shared_folder, wait_for
from tests.vllm.conftest import START_TIMEOUT_S
from tests.vllm.kv_memory import FAILED
from tests.vllm.test_far_hosts import metric, tokens_of
from tests.vllm.test_models import Model

pytestmark = pytest.mark.vllm_long
PROMPTS = [[(seed * 7 + place * 3) % 200 + 40 for place in range(150)] for seed in range(3)]


@pytest.fixture(scope="module", params=["tensor_parallel_size", "pipeline_parallel_size"])
def launch(vllm_command: str, request: pytest.FixtureRequest) -> Iterator[FarLaunch]:
    if reason := why_not():
        pytest.skip(reason)
    has_stages = request.param == "pipeline_parallel_size"
    with (
        shared_folder() as folder,
        pytest.MonkeyPatch.context() as patch,
        new_network("a", "b") as network,
    ):
        config = {
            "model": str(make_tiny_model("llama", folder, **TWO_HEADS)),
            "engine": "vllm",
            "engine_command": vllm_command,
            "max_model_len": 512,
            "enforce_eager": True,
            "prefill": {request.param: 2, "nnodes": 2},
            # Each stage pulls from the stage with the same layers.
            "decode": {request.param: 2} if has_stages else {},
            "routing": {"policy": "pairs"},
            "hosts": [{"name": "local"}, {"name": "b", "roles": ["prefill"]}],
            "kv_transfer": {"trusted_network": True},
            # The first request has vLLM compile kernels, which a host of namespaces has not kept.
            "env": {"TORCHINDUCTOR_CACHE_DIR": str(folder / "kernels")},
            # An idle engine counts as hung after twice this time. Requests must wait longer.
            "hang_timeout_s": 90,
            "startup_timeout_s": START_TIMEOUT_S,
        }
        model = Model("llama", plugin="cpu_stages" if has_stages else "")
        for name, value in model.environ(folder).items():
            patch.setenv(name, value)
        allowed, timeout_s = [vllm_command], START_TIMEOUT_S
        with far_launch(network, config, ["b"], allow=allowed, timeout_s=timeout_s) as launch:
            yield launch


def tokens(launch: FarLaunch, prompt: list[int], engine: str = "") -> list[int]:
    question = greedy_body(prompt, 12) | {"model": "llama"}
    (answer,) = launch.ask_alone(engine, question) if engine else launch.ask(question)
    return tokens_of(answer)


def test_tokens_equal_those_of_one_rank_and_the_other_host_sends_its_part_of_the_blocks(
    launch: FarLaunch,
) -> None:
    for prompt in PROMPTS:
        passed = launch.network.num_bytes("b", "a")
        found = tokens(launch, prompt)
        assert launch.network.num_bytes("b", "a") - passed > 100_000
        assert found == tokens(launch, prompt, "decode-0")
    assert metric(launch, *FAILED) == 0
    assert metric(launch, "pdlaunch_router_silent_recomputes_total") == 0


def test_its_first_host_publishes_what_its_ranks_have_cached(launch: FarLaunch) -> None:
    (server,) = launch.network["a"].find("--nnodes", "--uds", "--kv-events-config", "serve")
    words = server.cmdline()
    config = json.loads(words[words.index("--kv-events-config") + 1])
    path = launch.network["a"].file(config["endpoint"].removeprefix("ipc://"))
    with zmq.Context() as context, context.socket(zmq.SUB) as events:
        events.setsockopt(zmq.LINGER, 0)
        events.subscribe(b"")
        events.connect(f"ipc://{path}")
        seeds = itertools.count(100)

        def is_reported() -> bool:
            """Subscribers get only the events after they connect."""
            tokens(launch, [next(seeds), *PROMPTS[0]])
            return bool(events.poll(1_000))

        wait_for(is_reported, launch, "no events", START_TIMEOUT_S)
        batch = msgspec.msgpack.decode(events.recv_multipart()[-1])
    assert "BlockStored" in {event["type"] for event in batch[1]}


@contextlib.contextmanager
def comes_back(launch: FarLaunch) -> Iterator[None]:
    """In this block the whole engine restarts, and requests are answered."""
    old = [each for name in ("a", "b") for each in ranks(launch, name)]
    assert len(old) == 2
    num_starts = launch.output().count("prefill-0 is ready again")
    right = tokens(launch, PROMPTS[0], "decode-0")
    yield
    assert tokens(launch, PROMPTS[0]) == right
    is_back = lambda: launch.output().count("prefill-0 is ready again") > num_starts  # noqa: E731
    wait_for(is_back, launch, "it is not back", START_TIMEOUT_S)
    assert not any(map(lives, old))
    passed = launch.network.num_bytes("b", "a")
    assert tokens(launch, PROMPTS[0]) == right
    assert launch.network.num_bytes("b", "a") - passed > 100_000


def ranks(launch: FarLaunch, name: str) -> list[psutil.Process]:
    """The engine's worker on a host."""
    found = []
    for server in launch.network[name].find("--nnodes", "--master-port"):
        with contextlib.suppress(psutil.Error):  # It has ended.
            inner = server.children(recursive=True)
            found += [each for each in inner if "VLLM::Worker" in "".join(each.cmdline())]
    return found


def test_the_rank_of_the_other_host_is_killed(launch: FarLaunch) -> None:
    with comes_back(launch):
        for each in ranks(launch, "b"):
            each.kill()


def test_the_rank_of_the_other_host_is_stopped(launch: FarLaunch) -> None:
    with comes_back(launch):
        for each in ranks(launch, "b"):
            each.suspend()


def test_the_agent_is_killed(launch: FarLaunch) -> None:
    with comes_back(launch):
        signal_inner(launch.agents["b"])
        assert psutil.wait_procs(launch.network["b"].processes(), START_TIMEOUT_S)[1] == []
        wait_for(lambda: not ranks(launch, "a"), launch, "a rank is left")
        launch.start_agent("b")


def test_the_network_is_cut(launch: FarLaunch) -> None:
    num_losses = launch.output().count("b is lost")
    with comes_back(launch):
        launch.network.set_link("b", is_cut=True)
        assert launch.agents["b"].wait(START_TIMEOUT_S) == 1
        assert launch.network["b"].processes() == []
        is_lost = lambda: launch.output().count("b is lost") > num_losses  # noqa: E731
        wait_for(is_lost, launch, "its host is not taken for lost")
        wait_for(lambda: not ranks(launch, "a"), launch, "a rank is left")
        launch.network.set_link("b")
        launch.start_agent("b")
