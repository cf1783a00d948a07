import json
from pathlib import Path

import pytest

from tests import command_line
from tools.pages import settings_page


def run(*arguments, **environ):
    arguments = ["config", *map(str, arguments)]
    result = command_line.invoke(arguments, env={"COLUMNS": "200", "NO_COLOR": "1", **environ})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_show_names_every_origin(tmp_path):
    path = tmp_path / "deploy.yaml"
    path.write_text("block_size: 32\nenable_sleep_mode: true\n")
    values = json.loads(
        run("show", path, "--port", "9000", "--format", "json", PDLAUNCH_PREFILL_TP="2").stdout
    )
    assert values["port"] == {"value": 9000, "origin": "flag", "detail": "--port"}
    assert values["prefill.tensor_parallel_size"] == {
        "value": 2,
        "origin": "environment",
        "detail": "PDLAUNCH_PREFILL_TP",
    }
    assert values["block_size"] == {"value": 32, "origin": "file", "detail": f"{path}:1:13"}
    assert values["decode.enable_cumem_allocator"] == {
        "value": True,
        "origin": "derived",
        "detail": "enable_sleep_mode turns it on",
    }
    assert values["model"] == {"value": "smollm2", "origin": "default", "detail": ""}
    values = json.loads(run("show", "smollm2", "--format", "json").stdout)
    assert values["model"] == {"value": "smollm2", "origin": "argument", "detail": "MODEL"}
    assert "prefill.model" not in values


def test_show_tells_where_each_value_came_from(tmp_path):
    path = tmp_path / "deploy.yaml"
    path.write_text("block_size: 32\nmax_num_seqs: 64\ndecode:\n  tensor_parallel_size: 2\n")
    arguments = ("show", path, "--port", "9000", "--host", "127.0.0.1")
    environ = {"PDLAUNCH_ENV__UCX_TLS": "tcp", "PDLAUNCH_API_KEY": "hunter2"}
    values = json.loads(run(*arguments, "--format", "json", **environ).stdout)
    given = {name: (it["value"], it["detail"]) for name, it in values.items() if it["detail"]}
    assert (
        given.items()
        >= {
            "block_size": (32, f"{path}:1:13"),
            "decode.tensor_parallel_size": (2, f"{path}:4:25"),
            "port": (9000, "--port"),
            "env.UCX_TLS": ("tcp", "PDLAUNCH_ENV__UCX_TLS"),
            "api_key": ("**********", "PDLAUNCH_API_KEY"),
        }.items()
    )
    table = run(*arguments, **environ).stdout
    assert [line.split()[0] for line in table.splitlines()] == ["setting", *values]


@pytest.mark.parametrize("output", ["table", "json"])
def test_show_hides_secrets(output):
    result = run(
        "show", "--format", output, PDLAUNCH_API_KEY="hunter2", PDLAUNCH_ENV__AWS_SECRET="hunter2"
    )
    assert result.exit_code == 0
    assert "hunter2" not in result.output
    assert "PDLAUNCH_API_KEY" in result.stdout


def test_the_docs_are_current():
    document = Path(__file__).parents[2] / "docs" / "settings.md"
    assert document.read_text() == settings_page(), "run `make settings`"
