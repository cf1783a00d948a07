"""A model of a hub is downloaded, and served under its name."""

import json
from pathlib import Path

from tests.config.model_files.fake_hub import COMMIT, fake_hub
from tests.e2e.api import complete_all
from tests.e2e.client import Api, running_deployment
from tests.e2e.conftest import clean_environ
from tests.e2e.test_tokens import CHUNKS, PROMPTS
from tests.e2e.tiny_models import greedy, make_tiny_model

NAME = "tiny-org/Tiny-3"


def test_a_model_of_a_hub_is_downloaded_and_served_by_its_name(tmp_path: Path) -> None:
    published = make_tiny_model("qwen3", tmp_path)
    environ = CHUNKS | {name: value for name, value in clean_environ().items() if name[:3] != "HF_"}
    arguments = (NAME, "--dtype", "float32", "--kv-cache-memory", "16MiB")
    with fake_hub(NAME, published) as hub:
        environ |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")}
        with running_deployment(arguments, environ=environ) as deployment:
            models = json.loads(Api(deployment.url).get("/v1/models")[1])["data"]
            assert [model["id"] for model in models] == [NAME]
            answers = complete_all(deployment.url, PROMPTS, 24, 4, model=NAME)
            assert f"downloading {NAME}" in deployment.output()
    assert answers == greedy(published, PROMPTS, 24)
    assert sum(each.startswith("GET") and "model.safe" in each for each in hub.requests) == 1
    snapshots = tmp_path / "hf" / "hub" / "models--tiny-org--Tiny-3" / "snapshots"
    assert [folder.name for folder in snapshots.iterdir()] == [COMMIT]
