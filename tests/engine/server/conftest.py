"""A tiny model folder, a scripted rank 0 behind a real socket, and the engine's HTTP application in
front of it.
"""

import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web
from prometheus_client import CollectorRegistry
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from pdlaunch.config.engine_spec import EngineSpec
from pdlaunch.config.shared_settings import LimitSettings
from pdlaunch.engine.server.engine_service import EngineService
from pdlaunch.engine.server.lifecycle import make_app
from pdlaunch.engine.server.rank_link import RankLink
from pdlaunch.engine.server.served_model import load_served_model
from pdlaunch.engine.server.text import TextTokenizer
from pdlaunch.http.connections import HttpRunner
from pdlaunch.protocol.sockets import SecureContext, new_launch_keys
from tests.engine.real_steps import make_spec
from tests.engine.server.fake_rank import FakeRank

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = ["hello world, the quick brown fox stops here", "prefill and decode are two engines"] * 4
TOKEN = "launch-token"
END_TOKEN = "<|im_end|>"


def byte_level_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<|endoftext|>", "<|im_start|>", END_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def write_model(folder: Path) -> Path:
    """Write what a server needs; ranks would need weights, too."""
    tokenizer = byte_level_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "max_position_embeddings": 128,
        "eos_token_id": tokenizer.token_to_id(END_TOKEN),
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": END_TOKEN, "chat_template": TEMPLATE})
    )
    return folder


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def tokenizer(model_dir: Path) -> TextTokenizer:
    return TextTokenizer.load(model_dir)


def engine_spec(model_dir: Path, /, **changes: object) -> EngineSpec:
    limits = LimitSettings(max_queued_requests=8)
    fields = {"name": "prefill-0", "role": "prefill", "max_model_len": 100, "limits": limits}
    return make_spec(model_dir, **fields | changes)


@pytest.fixture(scope="session")
def secure() -> Iterator[SecureContext]:
    context = SecureContext(new_launch_keys())
    yield context
    context.close()


@pytest_asyncio.fixture
async def rank(secure: SecureContext, tokenizer: TextTokenizer) -> AsyncIterator[FakeRank]:
    rank = FakeRank(secure, tokenizer)
    yield rank
    await rank.close()


class Engine:
    def __init__(self, service: EngineService, url: str, session: aiohttp.ClientSession) -> None:
        self.service = service
        self.url = url
        self.session = session

    async def post(
        self, path: str, body: object, **headers: str
    ) -> tuple[int, dict, aiohttp.ClientResponse]:
        async with self.session.post(self.url + path, json=body, headers=headers) as response:
            return response.status, await response.json(), response

    async def get(self, path: str) -> tuple[int, dict]:
        async with self.session.get(self.url + path) as response:
            return response.status, await response.json()

    async def complete(self, **fields: object) -> dict:
        status, answer, _ = await self.post("/v1/completions", {"prompt": "hello"} | fields)
        assert status == 200, answer
        return answer

    async def chat(self, **fields: object) -> dict:
        body = {"messages": [{"role": "user", "content": "hello"}]} | fields
        status, answer, _ = await self.post("/v1/chat/completions", body)
        assert status == 200, answer
        return answer

    async def stream(self, path: str = "/v1/completions", **fields: object) -> list[dict]:
        """Chunks of a stream; the last entry is ``{"done": True}`` when it ended as it should."""
        body = (
            ({"prompt": "hello"} if path == "/v1/completions" else {}) | {"stream": True} | fields
        )
        async with self.session.post(self.url + path, json=body) as response:
            text = await response.text()
        assert response.status == 200, text
        data = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
        return [{"done": True} if line == "[DONE]" else json.loads(line) for line in data]

    async def refusal(self, path: str = "/v1/completions", **fields: object) -> tuple[int, dict]:
        default = {"prompt": "hello"} if path == "/v1/completions" else {}
        status, answer, _ = await self.post(path, default | fields)
        assert status >= 400
        assert set(answer["error"]) == {"message", "type", "param", "code"}
        return status, answer["error"]


@pytest_asyncio.fixture
async def make_engine(
    model_dir: Path, secure: SecureContext, rank: FakeRank
) -> AsyncIterator[object]:
    runners: list[tuple[web.AppRunner, EngineService, aiohttp.ClientSession]] = []

    async def make(clock: Callable[[], float] = time.monotonic, **changes: object) -> Engine:
        spec = engine_spec(model_dir, **changes)
        service = EngineService(spec, CollectorRegistry())
        service.loaded = load_served_model(spec, lambda text: None)
        link = RankLink(
            secure, rank.endpoint, identity=spec.name, on_message=service.receive, clock=clock
        )
        await service.use_link(link)
        app = make_app(service, keys=[TOKEN])
        runner = HttpRunner(app, max_connections=100, shutdown_timeout_s=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        session = aiohttp.ClientSession(headers={"Authorization": f"Bearer {TOKEN}"})
        runners.append((runner, service, session))
        await service.welcomed.wait()
        host, port = runner.addresses[0][:2]
        return Engine(service, f"http://{host}:{port}", session)

    yield make
    for runner, service, session in runners:
        await session.close()
        await service.use_link(None)
        await runner.cleanup()


@pytest_asyncio.fixture
async def engine(make_engine) -> Engine:
    return await make_engine()
