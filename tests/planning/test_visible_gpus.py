"""Ranks are placed on GPUs that their own CUDA_VISIBLE_DEVICES shows them, as they number them."""

from dataclasses import replace

import pytest

from pdlaunch.launch.engines import plan_processes
from tests.checks.contexts import CPU, GPU, on, show

TWO = replace(GPU, gpus=GPU.gpus[:2])
HIDDEN = replace(CPU, has_hidden_gpus=True)


@pytest.mark.parametrize(
    ("machine", "outer", "config", "devices", "roles"),
    [
        # The habit from vLLM: each role names its GPU, of which its one rank sees that alone.
        (TWO, {}, {"prefill__env": show("0"), "decode__env": show("1")}, [0, 0], ["p", "d"]),
        # Roles that see the same take turns.
        (TWO, {}, {"prefill__env": show("1,0"), "decode__env": show("1,0")}, [0, 1], ["d", "p"]),
        (TWO, show("2,3"), {"decode__env": show("2")}, [0, 0], ["pd", ""]),
        (
            GPU,
            {},
            {
                "tensor_parallel_size": 2,
                "prefill__env": show("0,1"),
                "decode__env": show("4,5,6,7"),
                "decode__replicas": 2,
            },
            [0, 1, 0, 1, 2, 3],
            ["p", "p", "", "", "d", "d", "d", "d"],
        ),
    ],
)
def test_each_rank_gets_a_gpu_that_it_sees(machine, outer, config, devices, roles):
    """``devices``: of each rank; ``roles``: those on each GPU of the machine."""
    launch = on(machine, environ=outer, **config).launch
    ranks = [process for process in plan_processes(launch).processes if process.kind == "rank"]
    assert [rank.devices for rank in ranks] == [(f"cuda:{device}",) for device in devices]
    assert roles == [
        "".join(role[0] * engines.num_ranks_on(index) for role, engines in launch.roles.items())
        for index in range(len(machine.gpus))
    ]


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_a_role_that_sees_no_gpu_computes_on_the_cpu(hidden):
    context = on(TWO, decode__env=show(hidden))
    assert [engines.device for engines in context.engines.values()] == ["cuda", "cpu"]


@pytest.mark.parametrize("machine", [TWO, CPU, HIDDEN])
def test_nixl_has_cuda_wherever_there_are_gpus(machine):
    """NIXL 1.5.1 refuses a UCX_TLS without CUDA on a host with GPUs, to ranks on the CPU too."""
    for engines in on(machine, device="cpu").engines.values():
        assert ("cuda_copy" in engines.ucx_transports) is (machine is not CPU)


@pytest.mark.parametrize("wrong", ["2", "0,0", "x"])
def test_what_cannot_be_had_does_not_turn_into_a_cpu(wrong):
    assert on(TWO, decode__env=show(wrong)).launch.roles["decode"].device == "cuda"
