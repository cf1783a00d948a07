from dataclasses import replace

import pytest

from tests.checks.contexts import CPU, GPU, SHAPE, on

BIG = (SHAPE, SHAPE)


def step_s(machine, **settings):
    return on(machine, shapes=BIG, **settings).engines["prefill"].least_step_s


def test_a_step_takes_two_operations_for_each_weight_of_a_layer_and_token():
    embeddings = 2 * SHAPE.vocab_size * SHAPE.hidden_size
    operations = 2 * (SHAPE.num_parameters - embeddings) * 512
    threads = CPU.num_cpus // 2
    assert step_s(CPU, dtype="float32") == pytest.approx(operations / (threads * 100e9))


def test_more_hands_and_less_work_take_less_time():
    slow = step_s(CPU, dtype="float32")
    assert step_s(CPU, dtype="bfloat16") == pytest.approx(slow / 10)
    assert step_s(CPU, dtype="float32", num_threads=4) == pytest.approx(slow * 2)
    assert step_s(CPU, dtype="float32", num_threads=16) == pytest.approx(slow / 2)
    assert step_s(CPU, dtype="float32", max_num_batched_tokens=64) == pytest.approx(slow / 8)
    assert step_s(CPU, dtype="float32", max_model_len=1) == pytest.approx(slow / 8)
    assert step_s(GPU, prefill__tensor_parallel_size=2) == pytest.approx(step_s(GPU) / 2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_emulated_type_is_no_faster_than_float32(dtype):
    emulating = replace(CPU, has_native_bf16=False)
    assert step_s(emulating, dtype=dtype) == step_s(emulating, dtype="float32")


def test_without_a_model_nobody_knows():
    assert on(CPU, shapes=(None, None)).engines["prefill"].least_step_s is None
