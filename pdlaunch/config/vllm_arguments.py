"""Lists the flags of ``vllm serve`` that ``engine_args`` must not give.

The tables hold long names of vLLM 0.32; ``tests/vllm/test_arguments.py`` compares them with an
installed vLLM. Users can spell a flag in several ways: ``--max_model_len``, ``tp`` for ``-tp``,
``no-enforce-eager``, ``kv-transfer-config.kv_role`` for a key of a JSON value, and any unambiguous
prefix of a name (``argparse`` completes it). ``long_name`` returns one name for all of them.
"""

import contextlib
import json
from collections.abc import Mapping

from pydantic import JsonValue

_SHORT = (
    "ac=attention-config asc=api-server-count cc=compilation-config dc=diffusion-config "
    "dcp=decode-context-parallel-size dp=data-parallel-size dpa=data-parallel-address "
    "dpb=data-parallel-backend dpe=data-parallel-external-lb dph=data-parallel-hybrid-lb "
    "dpl=data-parallel-size-local dpm=data-parallel-multi-port-external-lb dpn=data-parallel-rank "
    "dpp=data-parallel-rpc-port dpr=data-parallel-start-rank ep=enable-expert-parallel n=nnodes "
    "pcp=prefill-context-parallel-size pp=pipeline-parallel-size q=quantization r=node-rank "
    "sc=speculative-config tp=tensor-parallel-size "
)
# Short names, which vLLM takes with one dash
ALIASES = dict(pair.split("=") for pair in _SHORT.split())


def _by_flag(rows: Mapping[str, str]) -> Mapping[str, str]:
    """Turn texts with the flags they apply to into one text for each flag."""
    return {name: text for text, names in rows.items() for name in names.split()}


# Flags for which pdlaunch has a setting of the same name
_SETTINGS = (
    "async-scheduling block-size data-parallel-size dtype enable-cumem-allocator "
    "enable-prefix-caching enable-sleep-mode enforce-eager gpu-memory-utilization load-format "
    "max-model-len max-num-batched-tokens max-num-seqs model nnodes pipeline-parallel-size "
    "revision served-model-name tensor-parallel-size"
)
_KEYS = "keys never stand on a command line"

# Flags that pdlaunch sets itself, with the setting to use instead
OURS: Mapping[str, str] = {
    **{name: f"set {name.replace('-', '_')}" for name in _SETTINGS.split()},
    **_by_flag(
        {
            "clients talk to the router: use a proxy that handles CORS in front of it": (
                "allowed-headers allowed-methods allowed-origins"
            ),
            "engines listen on a socket of the launch, or on the port that {role}.port gives": (
                "host port uds"
            ),
            f"set api_key for clients, engine_api_key for another router; {_KEYS}": "api-key",
            "set gpu_memory_utilization": "device-memory-utilization",
            "set CUDA_VISIBLE_DEVICES in env; pdlaunch assigns GPUs to engines": "device-ids",
            "leave it out; it is always on": "enable-prompt-tokens-details",
            "set kv_cache_memory": "kv-cache-memory-bytes",
            "set kv_transfer": "kv-transfer-config",
            "set drain_timeout_s": "shutdown-timeout",
        }
    ),
}

# Flags with which pdlaunch cannot work, with the reason
REFUSED = _by_flag(
    {
        "data_parallel_size keeps all copies of an engine on one host, behind one server": (
            "data-parallel-address data-parallel-backend data-parallel-external-lb "
            "data-parallel-hybrid-lb data-parallel-multi-port-external-lb data-parallel-rank "
            "data-parallel-rpc-port data-parallel-size-local "
            "data-parallel-start-rank data-parallel-supervisor-port "
            "dp-supervisor-probe-failure-threshold dp-supervisor-probe-interval-s "
            "dp-supervisor-probe-timeout-s enable-elastic-ep api-server-count"
        ),
        "pdlaunch starts and ends an engine's processes; the setting nnodes gives the number of "
        "its hosts": "distributed-executor-backend headless master-addr master-port node-rank",
        "pdlaunch gives an engine one GPU for each tensor parallel rank": (
            "prefill-context-parallel-size"
        ),
        "the router talks to its engines over their sockets; a proxy in front of it ends TLS": (
            "enable-ssl-refresh ssl-ca-certs ssl-cert-reqs ssl-certfile ssl-ciphers ssl-keyfile"
        ),
        "a pair generates text from text, and nothing else": "runner convert tokens-only",
        "flags in a file would not be checked; write them into engine_args": "config",
        "pdlaunch does not start separate encoders": "ec-transfer-config",
        "no log holds texts of requests; router.log has a line for each request, and "
        "`pdlaunch trace` shows where its time went": "enable-log-outputs enable-log-requests",
        "the router talks HTTP to its engines": "grpc",
        "it opens a port without authentication": "grpc-port",
        f"{_KEYS}; set the variable HF_TOKEN": "hf-token",
        "the router calls vLLM's paths without a prefix": "root-path",
    }
)

KV_EVENTS = "kv-events-config"

# Flags that make vLLM replace the KV connector of ``kv-transfer-config``
OFFLOADING = ("kv-offloading-backend", "kv-offloading-size")

_KNOWN = (*OURS, *REFUSED, *OFFLOADING, KV_EVENTS)


def fix_of_field(name: str) -> str | None:
    """Return the fix for an unknown field that is named like a flag of vLLM; None for others."""
    flag = name.replace("_", "-")
    if flag in REFUSED:
        return REFUSED[flag]
    is_flag = flag in ALIASES.values() and flag not in OURS
    return f"flags of vLLM go into engine_args: {{{flag}: ..}}" if is_flag else None


def vllm_flag_name(key: str) -> str:
    """Return the name that follows a flag's two dashes on vLLM's command line."""
    name, dot, rest = key.lstrip("-").partition(".")
    name = name.replace("_", "-").lower()
    return f"{ALIASES.get(name, name)}{dot}{rest}"


def long_name(key: str) -> str:
    """Return the long name of a flag, without ``no-`` and keys of a JSON value. A prefix of a flag
    in the tables above becomes that flag, as ``argparse`` completes it.
    """
    name = vllm_flag_name(key).partition(".")[0]
    spellings = (name, name.removeprefix("no-"))
    whole = [each for each in spellings if each in _KNOWN]
    begun = [flag for each in spellings for flag in _KNOWN if flag.startswith(each)]
    return next(iter(whole + begun), spellings[1])


def host_tier_of(arguments: Mapping[str, JsonValue]) -> tuple[JsonValue, JsonValue]:
    """Return backend and size (GiB) of vLLM's host tier by these flags; None for unset flags."""
    found = {long_name(key): value for key, value in arguments.items()}
    backend, size = (found.get(name) for name in OFFLOADING)
    return backend, size


def value_of_text(text: str) -> JsonValue:
    """Parse the value of a flag in an environment variable: a boolean, JSON, or the text itself."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if text.startswith(("{", "[")):
        with contextlib.suppress(ValueError):
            value: JsonValue = json.loads(text)
            return value
    return text
