"""The methods of pdlaunch's connector are those that each version of vLLM calls, by its source.

Versions without a build for CPUs are held against their wheels alone: ``interface.sh``.
"""

import ast
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vllm.conftest import ENVIRONMENT

OURS = Path(__file__).parents[2] / "pdlaunch" / "vllm" / "connector.py"
SOURCES = Path(os.environ.get("PDLAUNCH_TEST_VLLM_INTERFACE", f"{ENVIRONMENT}-interface"))
NEWEST = "0.33.0"
LATER = {
    "get_transfer_results": "0.30.0",
    "get_mem_pool_context": "0.31.0",
    "get_loaded_kv_cache_group_ids": "0.32.0",
    "restore_kv_caches": "0.33.0",
    "unregister_kv_caches": "0.33.0",
}
"""Methods of ours that vLLM calls from these versions on."""
DEFAULTS_FIT = {
    *("bind_connector_metadata", "clear_connector_metadata", "has_connector_metadata", "role"),
    # Decode engines find peers in the registry, and ranks report by themselves.
    *("get_handshake_metadata", "set_xfer_handshake_metadata", "get_finished_count"),
    *("set_xfer_handshake_metadata_pp_aware", "build_connector_worker_meta"),
    # Requests that hold blocks keep the engine's loop going; it publishes KV events itself.
    *("has_pending_push_work", "get_kv_connector_kv_cache_events", "take_events"),
    # Leases of a dead decode engine end late: a request that finds no block preempts another one.
    "has_pending_block_frees",
    # Nothing is kept of a forward, or of another memory.
    *("finish_forward", "reset_capture_state", "requires_piecewise_for_cudagraph"),
    *("handle_preemptions", "set_host_xfer_buffer_ops", "reset_cache"),
    *("bind_gpu_block_pool", "bind_kv_cache_manager", "register_finished_partial_tail"),
    # Not asked for: tensors of single layers hold the same pages, and 0.33 has nothing else.
    *("prefer_cross_layer_blocks", "register_cross_layers_kv_cache"),
    # True for ``kv_both``: what was preempted is computed again, and never lent.
    "requires_kv_delivery",
    *("supports_divergent_local_hybrid_hits", "get_external_cache_hit_sources"),
    "supports_sleep_mode",
}
"""Methods of vLLM's whose defaults do what pdlaunch needs."""


def sources() -> Iterator[tuple[str, Path]]:
    found = {NEWEST: SOURCES / f"{NEWEST}.py"}
    found |= {path.stem: path for path in SOURCES.glob("*.py")}
    for package in sorted(ENVIRONMENT.glob("lib/python3*/site-packages")):
        for told in package.glob("vllm-*+cpu.dist-info"):
            version = told.name.removeprefix("vllm-").partition("+")[0]
            found[version] = package / "vllm/distributed/kv_transfer/kv_connector/v1/base.py"
    return iter(sorted(found.items()))


def methods(path: Path, *classes: str) -> dict[str, ast.FunctionDef]:
    return {
        function.name: function
        for found in ast.parse(path.read_text()).body
        if isinstance(found, ast.ClassDef) and found.name in classes
        for function in found.body
        if isinstance(function, ast.FunctionDef)
    }


def decorators(function: ast.FunctionDef) -> set[str]:
    return {each.id for each in function.decorator_list if isinstance(each, ast.Name)}


def problem(ours: ast.FunctionDef, theirs: ast.FunctionDef) -> str:
    """Why vLLM cannot call ours as it calls its own; empty: it can."""
    kinds = {"classmethod", "property"}
    if decorators(ours) & kinds != decorators(theirs) & kinds:
        return f"{ours.name} is another kind of method"
    here, there = ours.args, theirs.args
    names = [each.arg for each in here.args]
    wanted = [each.arg for each in there.args]
    if names != wanted[: len(names)] or (len(names) < len(wanted) and here.vararg is None):
        return f"{ours.name} takes {names}, and gets {wanted}"
    return f"{ours.name} does not take all keywords" if there.kwarg and not here.kwarg else ""


@pytest.mark.parametrize(
    ("version", "path"), [pytest.param(*each, id=each[0]) for each in sources()]
)
def test_vllm_can_call_every_method_and_none_is_forgotten(version: str, path: Path) -> None:
    if not path.exists():
        pytest.skip(f"no wheel of vLLM {version} was to be had: tests/vllm/interface.sh")
    theirs = methods(path, "KVConnectorBase_V1", "SupportsHMA")
    ours = methods(OURS, "PdlaunchConnector")
    number = tuple(map(int, version.split(".")))
    later = {name for name, since in LATER.items() if number < tuple(map(int, since.split(".")))}
    assert "".join(problem(ours[name], theirs[name]) for name in ours.keys() & theirs) == ""
    abstract = {name for name, each in theirs.items() if "abstractmethod" in decorators(each)}
    assert abstract <= ours.keys()
    assert ours.keys() - theirs.keys() == later, "vLLM never calls these"
    public = {name for name in theirs if not name.startswith("_")}
    assert public - ours.keys() - DEFAULTS_FIT == set(), "nobody has thought about these"
