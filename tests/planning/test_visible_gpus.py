"""Ranks are placed on GPUs that their own CUDA_VISIBLE_DEVICES shows them, as they number them."""

from dataclasses import replace

import pytest

from pdlaunch.errors import ConfigError
from pdlaunch.launch.engines.plan import plan_processes
from tests.checks.contexts import CPU, GPU, on

TWO = replace(GPU, gpus=GPU.gpus[:2])


def show(value):
    return {"CUDA_VISIBLE_DEVICES": value}


def placed(machine=TWO, environ=None, **config):
    """Return for each rank its device, and for each GPU of the machine its roles."""
    launch = on(machine, environ=environ, **config).launch
    ranks = [process for process in plan_processes(launch).processes if process.kind == "rank"]
    roles = [
        [role for role, engines in launch.roles.items() for _ in range(engines.num_ranks_on(index))]
        for index in range(len(machine.gpus))
    ]
    return [(rank.name, *rank.devices) for rank in ranks], roles


def test_the_habit_from_vllm():
    """Each role names its GPU, of which its one rank sees that alone."""
    devices, roles = placed(prefill__env=show("0"), decode__env=show("1"))
    assert devices == [("prefill-0/rank-0", "cuda:0"), ("decode-0/rank-0", "cuda:0")]
    assert roles == [["prefill"], ["decode"]]


def test_one_role_alone_names_its_gpu():
    devices, roles = placed(decode__env=show("1"))
    assert [device for _, device in devices] == ["cuda:0", "cuda:0"]
    assert roles == [["prefill"], ["decode"]]


def test_roles_that_see_the_same_take_turns():
    devices, roles = placed(prefill__env=show("1,0"), decode__env=show("1,0"))
    assert [device for _, device in devices] == ["cuda:0", "cuda:1"]
    assert roles == [["decode"], ["prefill"]]
    devices, roles = placed(env=show("1"))
    assert [device for _, device in devices] == ["cuda:0", "cuda:0"]
    assert roles == [[], ["prefill", "decode"]]


def test_engines_of_several_ranks():
    devices, roles = placed(
        GPU,
        prefill__env=show("0,1"),
        prefill__tensor_parallel_size=2,
        decode__env=show("4,5,6,7"),
        decode__tensor_parallel_size=2,
        decode__replicas=2,
    )
    assert [device for _, device in devices] == [f"cuda:{i}" for i in (0, 1, 0, 1, 2, 3)]
    assert [len(ranks) for ranks in roles] == [1, 1, 0, 0, 1, 1, 1, 1]


def test_under_a_variable_of_the_whole_launch():
    devices, roles = placed(environ=show("2,3"))
    assert [device for _, device in devices] == ["cuda:0", "cuda:1"]
    devices, roles = placed(environ=show("2,3"), decode__env=show("2"))
    assert [device for _, device in devices] == ["cuda:0", "cuda:0"]
    assert roles == [["prefill", "decode"], []]


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_a_role_that_sees_no_gpu_computes_on_the_cpu(hidden):
    context = on(TWO, decode__env=show(hidden))
    assert [engines.device for engines in context.engines.values()] == ["cuda", "cpu"]
    context.launch.require_startable()
    with pytest.raises(ConfigError, match="no CUDA device"):
        on(TWO, device="cuda", decode__env=show(hidden)).launch.require_startable()


HIDDEN = replace(CPU, has_hidden_gpus=True)


@pytest.mark.parametrize("machine", [TWO, CPU, HIDDEN])
def test_nixl_has_cuda_wherever_there_are_gpus(machine):
    """NIXL 1.5.1 refuses a UCX_TLS without CUDA on a host with GPUs, to ranks on the CPU too."""
    context = on(machine, device="cpu")
    for engines in context.engines.values():
        assert ("cuda_copy" in engines.ucx_transports) is (machine is not CPU)


@pytest.mark.parametrize("wrong", ["2", "0,0", "x"])
def test_what_cannot_be_had_is_refused_and_does_not_turn_into_a_cpu(wrong):
    launch = on(TWO, decode__env=show(wrong)).launch
    assert launch.roles["decode"].device == "cuda"
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES of decode") as raised:
        launch.require_startable()
    assert raised.value.field == "decode.env.CUDA_VISIBLE_DEVICES"
    assert raised.value.value == wrong
