"""Pairs of vLLM over the connectors that are not the default, and with a host tier behind ours."""

import importlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.api import complete
from tests.e2e.client import Api, Deployment, admin_api
from tests.mooncake import mooncake_problem
from tests.vllm.conftest import running_engines
from tests.vllm.kv_memory import FAILED, total
from tests.vllm.test_pair import NUM_TOKENS, assert_pulled, bytes_read, prompt_of

pytestmark = pytest.mark.vllm_long

TRANSFERS = "pdlaunch_kv_transfers_total"
RECOMPUTES = "pdlaunch_router_silent_recomputes_total"
LOADED = "vllm:external_prefix_cache_hits_total"
LENGTH = 300
NUM_BLOCKS = 40
"""Of 32 tokens: four prompts fill the KV cache."""


@pytest.fixture(params=["file", "mooncake"])
def launch(
    request: pytest.FixtureRequest, vllm_command: str, tmp_path: Path
) -> Iterator[Deployment]:
    settings: dict[str, object] = {"kv_transfer": {"connector": request.param}}
    if request.param == "file":
        settings["kv_transfer"] = {"connector": "file", "file": {"directory": str(tmp_path / "kv")}}
    elif problem := mooncake_problem():
        pytest.skip(f"mooncake: {problem}")
    else:
        (tmp_path / "mooncake").symlink_to(importlib.import_module("mooncake").__path__[0])
        settings["env"] = {"PYTHONPATH": str(tmp_path)}
    with running_engines(tmp_path, vllm_command, settings) as deployment:
        yield deployment


def test_tokens_are_those_of_one_engine_and_every_block_is_proven(launch: Deployment) -> None:
    alone = admin_api(launch.url).engine("prefill-0")
    before = Api(launch.url).metrics().get(TRANSFERS, 0)
    assert_pulled(launch.url, alone, *range(600, 604))
    metrics = Api(launch.url).metrics()
    assert metrics[TRANSFERS] == before + 4
    assert total(metrics, FAILED) == 0
    assert metrics[RECOMPUTES] == 0


def program_with_host_tier(folder: Path, vllm_command: str) -> Path:
    """A ``vllm`` that says that it is 0.33, of which there is no build for CPUs, and whose host
    tier copies between tensors of a CPU.
    """
    real = Path(vllm_command).parent.parent
    (packages,) = real.glob("lib/python3*/site-packages")
    own = folder / packages.relative_to(real)
    own.mkdir(parents=True)
    (own / "real.pth").write_text(f"import site; site.addsitedir({str(packages)!r})\n")
    (own / "vllm-0.33.0+cpu.dist-info").mkdir()
    (own / "vllm-0.33.0+cpu.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: vllm\nVersion: 0.33.0+cpu\n"
    )
    shutil.copy(Path(__file__).with_name("host_tier.py"), own)
    shutil.copy(real / "pyvenv.cfg", folder)
    (folder / "bin").mkdir()
    (folder / "bin" / "python").symlink_to((real / "bin" / "python").resolve())
    program = folder / "bin" / "vllm"
    program.write_text(
        f"#!{folder}/bin/python\n"
        "import json, sys\n"
        "at = sys.argv.index('--kv-transfer-config') + 1\n"
        "config = json.loads(sys.argv[at])\n"
        "tier = config['kv_connector_extra_config']['connectors'][1]['kv_connector_extra_config']\n"
        "tier |= {'spec_name': 'HostTier', 'spec_module_path': 'host_tier'}\n"
        "sys.argv[at] = json.dumps(config)\n"
        "from vllm.entrypoints.cli.main import main\n"
        "if __name__ == '__main__':\n"
        "    sys.exit(main())\n"
    )
    program.chmod(0o755)
    return program


def test_a_host_tier_behind_our_connector_keeps_blocks_and_ours_still_proves_them(
    vllm_command: str, tmp_path: Path
) -> None:
    program = program_with_host_tier(tmp_path / "env", vllm_command)
    settings = {
        "block_size": 32,
        "engine_args": {"num-gpu-blocks-override": NUM_BLOCKS, "kv-offloading-size": 0.25},
    }
    with running_engines(tmp_path, str(program), settings) as deployment:
        alone = admin_api(deployment.url).engine("prefill-0")
        prompts = [prompt_of(seed, LENGTH) for seed in range(700, 708)]
        # Each prompt drives the ones before it out of the KV caches.
        first = [complete(deployment.url, prompt, NUM_TOKENS) for prompt in prompts]
        loaded, num_bytes = alone.metrics()[LOADED], bytes_read(deployment.url)
        again = [complete(deployment.url, prompt, NUM_TOKENS) for prompt in prompts]
        assert alone.metrics()[LOADED] > loaded, "prefill has blocks back from the host"
        assert bytes_read(deployment.url) > num_bytes, "decode has them from prefill"
        assert again == first
        assert [complete(alone, prompt, NUM_TOKENS, model="smollm2") for prompt in prompts] == first
        metrics = Api(deployment.url).metrics()
        assert metrics[TRANSFERS] >= 2 * len(prompts)
        assert total(metrics, FAILED) == 0
        assert metrics[RECOMPUTES] == 0
