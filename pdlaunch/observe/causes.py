"""Finds the cause of a process's death in its log: one error, and its fix.

All processes of an engine of vLLM write to one log, and each reports the death of its child::

    Worker      OutOfMemoryError                   the cause
    EngineCore  "see stack trace for root cause"   │
    APIServer   "see root cause above"             ▼ written later

The tests use logs of real failures: ``tests/launch/failed_starts``.
"""

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

MAX_LENGTH = 300  # characters of an error; vLLM's can list every architecture that it supports
_TAIL_BYTES = 256 * 1024
INCARNATION = "--- incarnation"  # begins the line that separates two incarnations in a log

_NAME = r"(?:\[rank\d+\]: ?|\((\w+)[^()]*\bpid=\d+[^()]*\) )"
_LEVEL = r"(?:ERROR|CRITICAL) [\d-]+ [\d:.]+ \[?([\w/.]+\.py):\d+\] ?"
_HEAD = re.compile(rf"((?:{_NAME})*)(?:{_LEVEL})?(.*)")
_ERROR = re.compile(
    r"(?:\w+\.)*\w*(?:Error|Exception)(?:\([\w, ]*\))?: +\S.*"  # the last line of a traceback
    r"|[\w.-]+(?: [\w-]+)?: error: .*"  # an error of argparse
    r"|ERROR: +\[Errno \d+\] .*"  # an error of uvicorn
    r"|.*Caught signal \d+ \(.*|Fatal Python error: .*"
)
_CHAIN = re.compile(r"During handling of the above|The above exception was the direct cause")
_POINTER = re.compile(
    r"root cause|background process|CalledProcessError|EngineDeadError|Engine core init"
    r"|Engine process failed"
)
_WORKERS, _CORES = ("Worker", "VllmWorker", "RayWorker", "multiproc"), ("EngineCore", "core.py")

_FIXES = tuple(
    (re.compile(pattern), fix)
    for pattern, fix in (
        # Resources that others have taken
        (r"less than desired GPU memory|No available memory for the cache blocks",
         "Too little GPU memory is free: end other processes on the GPU, lower gpu_memory_"
         "utilization to the free share, or raise it if the weights fill that share (PD210)."),
        (r"max seq len|larger than the available KV cache memory",
         "Lower max_model_len, or give the KV cache more memory: gpu_memory_utilization, "
         "kv_cache_memory, or more GPUs by tensor_parallel_size (PD208)."),
        (r"OutOfMemoryError|CUDA out of memory",
         "Give an engine more GPUs (tensor_parallel_size), lower gpu_memory_utilization or "
         "max_num_batched_tokens, or end what else uses the GPU (PD207)."),
        (r"Too large swap space|allocate memory|[Nn]ot enough (?:available )?memory",
         "Lower kv_cache_memory and host tiers, or take a machine with more memory (PD212)."),
        (r"No space left on device|/dev/shm|NCCL error|ncclSystemError",
         "Make /dev/shm larger (containers: --shm-size=8g) and set env: {NCCL_DEBUG: INFO}, which "
         "logs the reason (PD416)."),
        (r"[Aa]ddress already in use|EADDRINUSE|Errno 98",
         "Another process uses this port (ss -ltnp shows it): end it, or choose another port."),
        # Packages that are missing, or do not match
        (r"NIXL is not available|No module named 'nixl",
         "Install nixl into vLLM's environment: pip install nixl."),
        (r"nixlBackendError|NIXL_ERR",
         "UCX has no transport for this memory: look for UCX lines above this one in the log, and "
         "leave UCX_TLS unset."),
        (r"No module named|ModuleNotFoundError",
         "Install this module into the environment of the engine with pip."),
        (r"undefined symbol|cannot open shared object file",
         "This vLLM was built for another torch or CUDA: reinstall vllm into an environment of its "
         "own, and install nothing over its torch."),
        (r"Failed to infer device type|No CUDA GPUs are available|No CUDA runtime|NVIDIA driver",
         "vLLM sees no GPU: nvidia-smi must list one here (containers: --gpus all). For the CPU "
         "install vLLM's CPU build (PD410)."),
        (r"compute capability", "This GPU is too old for the dtype: set dtype: float16."),
        # The model
        (r"does not recognize this architecture|architectures? .* (?:are|is) not supported"
         r"|has no vLLM implementation",
         "This vLLM is older than the model: install a newer vllm, or a newer transformers beside "
         "it."),
        (r"trust_remote_code",
         "The model contains Python code. If you trust it, set engine_args: {trust-remote-code: "
         "true}."),
        (r"gated repo|401 Client Error|GatedRepoError",
         "Accept the licence on the model's page, and set HF_TOKEN to a token that may read it."),
        (r"not a valid model identifier|Repository Not Found|Can't load the configuration"
         r"|not a local folder|outgoing traffic has been disabled|couldn't connect to",
         "Correct the model: ORG/NAME of a hub that can be reached, or a directory (PD103)."),
        (r"Cannot find any model|Error while deserializing|SafetensorError|No such.*safetensors",
         "Weight files are missing or damaged: download the model again (PD119)."),
        # Settings
        (r"greater than the derived max_model_len",
         "Lower max_model_len to the model's own limit (PD106)."),
        (r"attention heads .* divisible|divisible by tensor parallel",
         "Choose a tensor_parallel_size that divides the model's attention heads (PD104)."),
        (r"number of (?:available GPUs|visible devices)|max local gpu count",
         "Lower tensor_parallel_size to the number of GPUs here (PD411)."),
        (r"unrecognized arguments",
         "This vLLM does not know the flag: remove it from engine_args."),
        (r"invalid choice|argument -|Unknown quantization|Unsupported connector type",
         "This vLLM does not accept the value: correct the setting or engine_args."),
        (r"Caught signal|Fatal Python error",
         "Native code has crashed: look at the lines above this one in the log."),
    )
)  # fmt: skip


class Cause(NamedTuple):
    """Holds the root error of a failure; ``fix`` is empty if no fix is known."""

    error: str
    fix: str


def known_fix(error: str) -> str:
    """Return the fix of an error; empty if no fix is known."""
    return next((fix for pattern, fix in _FIXES if pattern.search(error)), "")


class _Error(NamedTuple):
    depth: int  # 2: a worker of vLLM, 1: its engine core, 0: any other process
    text: str
    leads_on: bool  # a later exception in the log was raised because of this one


def find_cause(lines: Sequence[str]) -> Cause | None:
    """Return why the process that wrote this log died; None if no line shows a cause.

    An error message of pdlaunch comes first, then the deepest process's first error with a known
    fix, then its first error; at depth 0 its last one, as a process may survive earlier errors.
    """
    starts = [number for number, line in enumerate(lines) if line.startswith(INCARNATION)]
    lines = lines[starts[-1] + 1 :] if starts else lines
    own = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    if own:
        below = "".join(lines[own[-1] + 1 : own[-1] + 2]).strip()
        return Cause(lines[own[-1]], below.removeprefix("fix: ") if "fix: " in below else "")
    errors = list(_errors(lines))
    deepest = max((error.depth for error in errors), default=0)
    found = [error for error in errors if error.depth == deepest]
    for error in found:
        if fix := known_fix(error.text):
            return Cause(error.text, fix)
    ends = [error for error in found if not error.leads_on]
    return Cause(ends[0 if deepest else -1].text, "") if ends else None


def last_lines(log: Path, start: int = 0) -> list[str]:
    """Return the lines of a log from byte ``start`` on, at most the last 256 KiB."""
    with contextlib.suppress(OSError), log.open("rb") as file:  # or it is a pipe, or a terminal
        file.seek(max(start, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
        return file.read().decode(errors="replace").splitlines()
    return []


def _errors(lines: Sequence[str]) -> Iterator[_Error]:
    parts = [head.groups("") for line in lines if (head := _HEAD.match(line))]
    for number, (names, _, file, text) in enumerate(parts):
        if not _ERROR.fullmatch(text) or _POINTER.search(text):
            continue
        following = [part[3].strip() for part in parts[number + 1 : number + 6]]
        if "validation error" in text and following:
            # This line of pydantic names only a class; the next line says what is wrong.
            text = following[0].removeprefix("Value error, ").partition(" [type=")[0]
        process = names or file
        is_worker, is_core = (any(map(process.__contains__, each)) for each in (_WORKERS, _CORES))
        leads_on = any(map(_CHAIN.match, following))
        yield _Error(2 if is_worker else int(is_core), text[:MAX_LENGTH], leads_on)
