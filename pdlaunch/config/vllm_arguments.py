"""Knows the flags of ``vllm serve`` that ``engine_args`` must not give, or that deserve a finding.

Flags of vLLM 0.32, by their long names. Each flag of its parser can be written in several ways,
which ``long_name`` brings together: ``--max_model_len``, ``tp`` for ``-tp``, ``no-enforce-eager``,
``kv-transfer-config.kv_role`` for one key of a JSON value, and any beginning of a name that fits
no other (``argparse`` completes it).
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping

from pydantic import JsonValue

_NAME = re.compile(r"-{0,2}[A-Za-z][A-Za-z0-9_-]*(\.[A-Za-z0-9_.-]+\+?)?")
_NUMBER = re.compile(r"-\d+(\.\d*)?([eE][+-]?\d+)?|-\.\d+")

ALIASES: Mapping[str, str] = {
    "ac": "attention-config",
    "asc": "api-server-count",
    "cc": "compilation-config",
    "dc": "diffusion-config",
    "dcp": "decode-context-parallel-size",
    "dp": "data-parallel-size",
    "dpa": "data-parallel-address",
    "dpb": "data-parallel-backend",
    "dpe": "data-parallel-external-lb",
    "dph": "data-parallel-hybrid-lb",
    "dpl": "data-parallel-size-local",
    "dpm": "data-parallel-multi-port-external-lb",
    "dpn": "data-parallel-rank",
    "dpp": "data-parallel-rpc-port",
    "dpr": "data-parallel-start-rank",
    "ep": "enable-expert-parallel",
    "n": "nnodes",
    "pcp": "prefill-context-parallel-size",
    "pp": "pipeline-parallel-size",
    "q": "quantization",
    "r": "node-rank",
    "sc": "speculative-config",
    "tp": "tensor-parallel-size",
}
"""Short names, which vLLM takes with one dash."""

_FILES_OF_MODEL = "set model; engines get its folder"
_WHERE = "engines listen on a socket of the launch, or on the port that {role}.port gives"

OURS: Mapping[str, str] = {
    "allowed-headers": "set cors_origins, which is for the router: clients talk to it",
    "allowed-methods": "set cors_origins, which is for the router: clients talk to it",
    "allowed-origins": "set cors_origins, which is for the router: clients talk to it",
    "api-key": "set api_key for clients, engine_api_key for another router; keys never stand on a "
    "command line",
    "async-scheduling": "set async_scheduling",
    "block-size": "set block_size",
    "device-ids": "set CUDA_VISIBLE_DEVICES in env; pdlaunch deals GPUs out to engines",
    "device-memory-utilization": "set gpu_memory_utilization",
    "dtype": "set dtype",
    "enable-cumem-allocator": "set enable_cumem_allocator",
    "enable-prefix-caching": "set enable_prefix_caching",
    "enable-prompt-tokens-details": "leave it out; it is always on",
    "enable-sleep-mode": "set enable_sleep_mode",
    "enforce-eager": "set enforce_eager",
    "gpu-memory-utilization": "set gpu_memory_utilization",
    "host": _WHERE,
    "kv-cache-memory-bytes": "set kv_cache_memory",
    "kv-transfer-config": "set kv_transfer: lease_s, on_failure",
    "load-format": "set load_format",
    "max-model-len": "set max_model_len",
    "max-num-batched-tokens": "set max_num_batched_tokens",
    "max-num-seqs": "set max_num_seqs",
    "model": _FILES_OF_MODEL,
    "port": _WHERE,
    "revision": "set revision",
    "served-model-name": "set served_model_name",
    "shutdown-timeout": "set drain_timeout_s",
    "tensor-parallel-size": "set tensor_parallel_size",
    "uds": _WHERE,
}
"""Flags that pdlaunch sets itself, with the setting to use instead."""

_REPLICAS = "prefill.replicas and decode.replicas start several engines behind one router"
_ONE_HOST = "an engine runs on one host"
_TLS = "the router talks to its engines over their sockets; a proxy in front of it ends TLS"

REFUSED: Mapping[str, str] = {
    "api-server-count": "an engine is one HTTP server, and its metrics are one page; " + _REPLICAS,
    "config": "flags of a file would not be checked; write them into engine_args",
    **dict.fromkeys(
        (
            "data-parallel-address",
            "data-parallel-backend",
            "data-parallel-external-lb",
            "data-parallel-hybrid-lb",
            "data-parallel-multi-port-external-lb",
            "data-parallel-rank",
            "data-parallel-rpc-port",
            "data-parallel-size",
            "data-parallel-size-local",
            "data-parallel-start-rank",
            "data-parallel-supervisor-port",
            "dp-supervisor-probe-failure-threshold",
            "dp-supervisor-probe-interval-s",
            "dp-supervisor-probe-timeout-s",
            "enable-elastic-ep",
        ),
        "ranks of data parallelism count up from the port of the side channel, and the next ports "
        "belong to others; " + _REPLICAS,
    ),
    "distributed-executor-backend": "pdlaunch starts and ends the processes of an engine by their "
    "parent, on this host",
    "ec-transfer-config": "encoders of their own are not started",
    "enable-log-outputs": "texts stay out of logs; with log_content the router logs them",
    "enable-log-requests": "the router logs each request; with log_content, its texts too",
    "grpc": "the router talks HTTP to its engines",
    "grpc-port": "it opens a port without authentication",
    "headless": "an engine without HTTP cannot be asked for anything",
    "hf-token": "keys never stand on a command line; set the variable HF_TOKEN",
    "master-addr": _ONE_HOST,
    "master-port": _ONE_HOST,
    "nnodes": _ONE_HOST,
    "node-rank": _ONE_HOST,
    "pipeline-parallel-size": "pdlaunch gives an engine one GPU for each of tensor_parallel_size",
    "prefill-context-parallel-size": (
        "pdlaunch gives an engine one GPU for each of tensor_parallel_size"
    ),
    "root-path": "the router asks for vLLM's own paths",
    "runner": "a pair generates text, and nothing else",
    "convert": "a pair generates text, and nothing else",
    **dict.fromkeys(
        (
            "enable-ssl-refresh",
            "ssl-ca-certs",
            "ssl-cert-reqs",
            "ssl-certfile",
            "ssl-ciphers",
            "ssl-keyfile",
        ),
        _TLS,
    ),
    "tokens-only": "clients of the router send text",
}
"""Flags with which pdlaunch cannot serve, with the reason."""

FOREIGN_CODE: Mapping[str, str] = {
    "io-processor-plugin": "runs a plugin of that name in the engine",
    "log-config-file": "may name any class of Python as a handler",
    "logging-config": "may name any class of Python as a handler",
    "logits-processors": "imports these classes into the engine",
    "middleware": "imports this into the engine's server, where it sees every request",
    "model-class-overrides": "imports these classes into the engine",
    "reasoning-parser-plugin": "runs this file in the engine",
    "scheduler-cls": "imports this class into the engine",
    "tool-parser-plugin": "runs this file in the engine",
    "tool-server": "lets a model call tools of that server, `demo` runs code that a model wrote",
    "trust-remote-code": "runs code that comes with the model's files",
    "trust-request-chat-template": "runs templates that clients send",
    "worker-cls": "imports this class into the engine",
    "worker-extension-cls": "imports this class into the engine, with routes to call it",
}
"""Flags that run other people's code in an engine."""

DOORS: Mapping[str, str] = {
    "allow-credentials": "lets pages of other origins use a browser's credentials",
    "allowed-local-media-path": "lets clients read files of that folder as images",
    "enable-prompt-embeds": "takes tensors from clients, and a wrong one ends the engine",
    "enable-mm-embeds": "takes tensors from clients, and a wrong one ends the engine",
    "enable-scale-out": "adds routes by which tokens and KV blocks are handed on",
    "enable-server-load-tracking": "adds /load, which asks for no key",
    "enable-tokenizer-info-endpoint": "adds /tokenizer_info, which tells the chat template",
    "profiler-config": "adds /start_profile, which asks for no key and slows the engine down",
    "trust-request-mm-kwargs": "lets clients set arguments of the model's processor",
    "weight-transfer-config": "lets a trainer replace the weights",
}
"""Flags that open an engine to more than its router needs, with their effect."""

KV_EVENTS = "kv-events-config"

_BEGIN_OTHERS = frozenset({"reasoning-parser"})
"""Flags of vLLM that are not in the tables and with which the name of one there begins."""


def is_name(key: str) -> bool:
    """Return whether this can be the name of a flag, in any of its spellings."""
    return _NAME.fullmatch(key) is not None


def vllm_flag_name(key: str) -> str:
    """Return the name by which a flag is given, behind its two dashes."""
    name, dot, rest = key.lstrip("-").partition(".")
    name = name.replace("_", "-").lower()
    return f"{ALIASES.get(name, name)}{dot}{rest}"


def long_name(key: str) -> str:
    """Return the long name of a flag, without ``no-`` and keys of its value.

    A beginning of a flag in the tables above is that flag, as ``argparse`` completes it.
    """
    name = vllm_flag_name(key).partition(".")[0]
    tables = (OURS, REFUSED, FOREIGN_CODE, DOORS, {KV_EVENTS: ""})
    for candidate in (name, name.removeprefix("no-")):
        if candidate in _BEGIN_OTHERS or any(candidate in table for table in tables):
            return candidate
    for candidate in (name, name.removeprefix("no-")):
        for table in tables:
            for flag in table:
                if flag.startswith(candidate):
                    return flag
    return name.removeprefix("no-")


def values_like_flags(value: JsonValue) -> Iterator[str]:
    """Yield the strings that vLLM would take for flags of their own, not for values."""
    for each in value if isinstance(value, list) else [value]:
        if isinstance(each, str) and each.startswith("-") and not _NUMBER.fullmatch(each):
            yield each


def value_of_text(text: str) -> JsonValue:
    """Return the value of a flag that a variable gives: a switch, JSON, or the text."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if text.startswith(("{", "[")):
        with contextlib.suppress(ValueError):
            value: JsonValue = json.loads(text)
            return value
    return text
