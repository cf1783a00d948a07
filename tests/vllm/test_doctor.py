"""``pdlaunch doctor`` beside real engines, through their sockets."""

from __future__ import annotations

import json

from typer.testing import CliRunner

from pdlaunch.cli.app import build_app
from pdlaunch.cli.doctor import MEASURABLE_BYTES
from pdlaunch.launch.client.api import Api
from pdlaunch.launch.client.deployment import Deployment
from tests.e2e.api import complete
from tests.vllm.test_pair import bytes_read, prompt_of


def test_a_pair_of_vllm_is_examined_and_proven(pair: Deployment) -> None:
    # A speed is told from 64 MiB on; each prompt has some 20.
    seeds = iter(range(300, 310))
    while bytes_read(pair.url) < MEASURABLE_BYTES:
        assert complete(pair.url, prompt_of(next(seeds), 450), 2)
    _, status = Api(pair.url).get_object("/pdlaunch/status")
    urls = {engine["role"]: engine["url"] for engine in status["engines"]}
    flags = [f"--{role}={url}" for role, url in urls.items()]
    arguments = ["doctor", *flags, "--exact", "--format", "json"]
    result = CliRunner().invoke(build_app(arguments), arguments)
    assert result.exit_code == 0, result.output
    deployment = json.loads(result.stdout)["resolved"]["deployment"]
    assert [engine["role"] for engine in deployment["engines"]] == ["prefill", "decode"]
    assert all(engine["version"].startswith("0.") for engine in deployment["engines"])
    assert all(engine["block_size"] == "128" for engine in deployment["engines"])
    decode = deployment["engines"][1]
    assert decode["gigabytes_per_s"] > 0
    (proven,) = deployment["pairs"]
    assert proven["num_bytes"] > 0
    assert not proven["problem"]
