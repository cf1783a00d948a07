"""For each rule on torch's allocator: variables that fire it, and its fixes."""

from tests.checks.contexts import GPU
from tests.checks.firing import Case, Setup

EXPANDABLE = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
ON_NIXL = "kv_transfer: {nixl: {path: nixl}}\n"

CASES = [
    Case(
        "PD204",
        Setup(ON_NIXL, environ=EXPANDABLE, machine=GPU),
        {
            "Remove expandable_segments from the environment": Setup(ON_NIXL, machine=GPU),
            "--enable-cumem-allocator": Setup(
                flags=("--enable-cumem-allocator",), environ=EXPANDABLE, machine=GPU
            ),
            "--enable-sleep-mode": Setup(
                flags=("--enable-sleep-mode",), environ=EXPANDABLE, machine=GPU
            ),
            "kv_transfer.nixl.path: p2p": Setup(
                "kv_transfer: {nixl: {path: p2p}}\n", environ=EXPANDABLE, machine=GPU
            ),
        },
    ),
    *(
        Case(
            "PD205",
            Setup(environ={"PYTORCH_CUDA_ALLOC_CONF": refused}, machine=GPU),
            {
                "Write key:value, with commas between them": Setup(
                    environ={"PYTORCH_CUDA_ALLOC_CONF": accepted}, machine=GPU
                )
            },
        )
        for refused, accepted in (
            ("expandable_segments:yes", "expandable_segments:False"),
            ("max_split_size:128", "max_split_size_mb:128"),
        )
    ),
    Case(
        "PD216",
        Setup(environ={"PYTORCH_ALLOC_CONF": "backend:cudaMallocAsync"}, machine=GPU),
        {"Take backend:cudaMallocAsync out of the variable": Setup(machine=GPU)},
    ),
    Case(
        "PD206",
        Setup(
            environ={
                "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False",
                "PYTORCH_ALLOC_CONF": "max_split_size_mb:100",
            },
            machine=GPU,
        ),
        {
            "Keep one of them": Setup(
                environ={"PYTORCH_ALLOC_CONF": "max_split_size_mb:100"}, machine=GPU
            )
        },
    ),
]
