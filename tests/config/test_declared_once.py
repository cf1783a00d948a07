"""A line in a model is a whole setting: its flag, variables, overrides, schema and docs follow."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.processes

FIELD = 'num_sparks: Annotated[int, Flag()] = Field(3, gt=0, description="Sparks of a rank.")'

CHILD = """
import contextlib, importlib.util, io, json, pathlib, sys

spec = importlib.util.find_spec("pdlaunch.config.engine_settings")
source = pathlib.Path(spec.origin).read_text()
mark = "    block_size: "
assert source.count(mark) == 1
models = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = models
changed = source.replace(mark, f"    {sys.argv[1]}\\n{mark}")
exec(compile(changed, spec.origin, "exec"), vars(models))

from pdlaunch.cli.app import build_app
from pdlaunch.config.engine_spec import EngineSpec
from pdlaunch.config.problems import InvalidConfigError
from pdlaunch.config.sources import load_config
from tools.pages import settings_page

def run(*arguments):
    with contextlib.redirect_stdout(io.StringIO()) as output:
        build_app(arguments)(arguments, standalone_mode=False)
    return output.getvalue()

def sparks(path=None, environ={}, flags={}):
    config = load_config(path, environ, flags).config
    return {role: config.engine_settings(role).num_sparks for role in ("prefill", "decode")}

def given(config):
    derived = dict(name="decode-0", model_dir=".", served_model_name="m", dtype="float32",
        max_model_len=1, enable_cumem_allocator=False, max_num_batched_tokens=1, device="cpu",
        device_indices=(), tensor_parallel_size=1, num_threads=1)
    return EngineSpec.of(config, "decode", **derived).num_sparks

file = pathlib.Path("deploy.yaml")
file.write_text("num_sparks: 5\\ndecode:\\n  num_sparks: 0\\n")
try:
    load_config(file, {}, {})
except InvalidConfigError as error:
    problem = str(error)
file.write_text("num_sparks: 5\\ndecode:\\n  num_sparks: 7\\n")
json.dump({
    "help": run("serve", "--help"),
    "shown": run("config", "show", "--num-sparks", "9", "--format", "json"),
    "schema": run("config", "schema"),
    "docs": settings_page(),
    "flag": sparks(flags={"num_sparks": 4}),
    "variable": sparks(environ={"PDLAUNCH_NUM_SPARKS": "4", "PDLAUNCH_PREFILL__NUM_SPARKS": "6"}),
    "file": sparks(file),
    "problem": problem,
    "spec": given(load_config(file, {}, {}).config),
}, sys.stdout)
"""


def test_a_line_in_a_model_is_a_whole_setting(tmp_path):
    child = subprocess.run(
        [sys.executable, "-c", CHILD, FIELD],
        cwd=tmp_path,
        env={"PYTHONPATH": ":".join(sys.path), "COLUMNS": "200", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert child.returncode == 0, child.stderr
    found = json.loads(child.stdout)
    (line,) = [line for line in found["help"].splitlines() if "--num-sparks" in line]
    assert "Sparks of a rank. Default: 3." in line
    assert found["flag"] == {"prefill": 4, "decode": 4}
    shown = {"value": 9, "origin": "flag", "detail": "--num-sparks"}
    assert json.loads(found["shown"])["num_sparks"] == shown
    assert found["variable"] == {"prefill": 6, "decode": 4}
    assert found["file"] == {"prefill": 5, "decode": 7}
    assert "deploy.yaml:3:15: decode.num_sparks: 0 is wrong" in found["problem"]
    assert "greater than 0" in found["problem"]
    schema = json.loads(found["schema"])
    assert schema["properties"]["num_sparks"]["default"] == 3
    override = schema["$defs"]["RoleSettings"]["properties"]["num_sparks"]
    assert override["anyOf"] == [{"exclusiveMinimum": 0, "type": "integer"}, {"type": "null"}]
    assert override["description"] == "Sparks of a rank."
    row = "| `num_sparks` | `N` | `3` | Sparks of a rank. | `--num-sparks` `PDLAUNCH_NUM_SPARKS` |"
    assert row in found["docs"].splitlines()
    assert found["spec"] == 7
