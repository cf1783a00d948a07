"""A model of a hub is downloaded and served by its name."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

from pdlaunch.client.deployment import running_deployment
from tests.config.model_files.fake_hub import COMMIT, fake_hub
from tests.e2e.conftest import default_environ
from tests.e2e.tiny_models import greedy, make_tiny_model

NAME = "tiny-org/Tiny-3"
PROMPT = list(range(20, 60))


def post(url: str, body: dict[str, object]) -> dict[str, object]:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


def test_a_model_of_a_hub_is_downloaded_and_served_by_its_name(tmp_path: Path) -> None:
    published = make_tiny_model("qwen3", tmp_path)
    environ = {name: value for name, value in default_environ().items() if name[:3] != "HF_"}
    arguments = (NAME, "--dtype", "float32", "--kv-cache-memory", "16MiB")
    with fake_hub(NAME, published) as hub:
        environ |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")}
        with running_deployment(arguments, environ=environ) as deployment:
            with urllib.request.urlopen(f"{deployment.url}/v1/models", timeout=60) as response:
                assert [model["id"] for model in json.load(response)["data"]] == [NAME]
            body = {"model": NAME, "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
            body |= {"return_token_ids": True, "ignore_eos": True}
            answer = post(f"{deployment.url}/v1/completions", body)
            assert f"downloading {NAME}: " in deployment.output()
    assert answer["choices"][0]["token_ids"] == greedy(published, [PROMPT], 8)[0]
    assert hub.asked().count("model.safetensors") == 1
    snapshots = tmp_path / "hf" / "hub" / "models--tiny-org--Tiny-3" / "snapshots"
    assert [folder.name for folder in snapshots.iterdir()] == [COMMIT]
