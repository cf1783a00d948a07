from pathlib import Path

import pytest

from pdlaunch.config.problems import InvalidConfigError
from pdlaunch.config.sources import load_config
from pdlaunch.config.vllm_arguments import long_name


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("max_model_len", "max-model-len"),
        ("--max-model_len", "max-model-len"),
        ("Enforce_Eager", "enforce-eager"),
        ("-tp", "tensor-parallel-size"),
        ("no-enable-prefix-caching", "enable-prefix-caching"),
        ("no_enable_prefix", "enable-prefix-caching"),
        ("kv-transfer-config.kv_connector_extra_config.backends+", "kv-transfer-config"),
        ("kv-tr", "kv-transfer-config"),
        ("enable_log_req", "enable-log-requests"),
        ("reasoning-parser", "reasoning-parser"),
        ("seed", "seed"),
        ("nothing-of-the-kind", "nothing-of-the-kind"),
    ],
)
def test_every_spelling_of_a_flag_is_that_flag(written: str, name: str) -> None:
    assert long_name(written) == name


def test_a_file_gives_switches_lists_and_mappings(tmp_path: Path) -> None:
    path = tmp_path / "deploy.yaml"
    path.write_text(
        "engine_args:\n"
        "  enable-lora: on\n"
        "  seed: 007\n"
        "  lora-modules: [a=b, {name: c, rank: 8, scale: 0.5}]\n"
        "  compilation-config.level: 0\n"
    )
    environ = {"PDLAUNCH_ENGINE_ARGS__ENABLE_LORA": "false", "PDLAUNCH_ENGINE_ARGS__X": '{"a": 1}'}
    assert load_config(path, environ, {}).config.engine_args == {
        "enable-lora": True,
        "seed": "007",
        "lora-modules": ["a=b", {"name": "c", "rank": 8, "scale": 0.5}],
        "compilation-config.level": "0",
        "ENABLE_LORA": False,
        "X": {"a": 1},
    }


@pytest.mark.parametrize("line", ["a b: 1", "'x=1': 2", "seed:", "---seed: 1", "é: 1", "seed;x: 1"])
def test_what_is_no_flag_is_refused_with_its_place(tmp_path: Path, line: str) -> None:
    path = tmp_path / "deploy.yaml"
    path.write_text(f"engine_args:\n  {line}\n")
    with pytest.raises(InvalidConfigError) as caught:
        load_config(path, {}, {})
    assert all(f"{path}:2:" in str(problem.where) for problem in caught.value.problems)
