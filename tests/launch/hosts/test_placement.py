import pytest

from pdlaunch.cli.joining import with_placed_hosts
from pdlaunch.config.sources import load_config
from pdlaunch.errors import ConfigError
from pdlaunch.launch.hosts.placement.ray_cluster import ray_bundles

SCRIPT = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURMD_NODENAME": "n1"}


@pytest.mark.parametrize(
    ("environ", "missing"),
    [({}, "SLURM_JOB_ID"), (SCRIPT, "SLURM_STEP_ID")],
    ids=["no job", "the script of a job"],
)
def test_outside_of_a_step_the_fix_is_told(environ: dict[str, str], missing: str) -> None:
    loaded = load_config(None, {}, {"placement": "slurm"})
    with pytest.raises(ConfigError, match=f"{missing} is not set") as raised:
        with_placed_hosts(loaded, environ)
    assert "srun" in str(raised.value.fix)


@pytest.mark.parametrize(
    ("flags", "prefill", "decode"),
    [
        ({"prefill.replicas": 2, "decode.tensor_parallel_size": 4}, 1, 4),
        ({"tensor_parallel_size": 8, "prefill.nnodes": 2}, 4, 8),
    ],
)
def test_each_host_of_an_engine_has_a_bundle_of_ray_with_its_room(
    flags: dict[str, int], prefill: int, decode: int
) -> None:
    config = load_config(None, {}, {"placement": "ray"} | flags).config
    bundles = ray_bundles(config, has_gpus=True)
    names = ("ray-prefill-0", "ray-prefill-1", "ray-decode-0")
    rooms = [{"CPU": number, "GPU": number} for number in (prefill, prefill, decode)]
    assert [(each.name, each.resources) for each in bundles] == [*zip(names, rooms, strict=True)]
    assert "GPU" not in ray_bundles(config)[0].resources


def test_agents_of_ray_allow_the_program_of_the_launch_and_none_that_is_not_used() -> None:
    """One that a node lacks would end its agent."""
    vllm = {"engine": "vllm", "engine_command": "/opt/vllm/bin/vllm"}
    for engine, allowed in (({}, ()), (vllm, ("/opt/vllm/bin/vllm",))):
        config = load_config(None, {}, {"placement": "ray"} | engine).config
        assert {bundle.executables for bundle in ray_bundles(config)} == {allowed}
