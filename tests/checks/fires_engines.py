"""For each rule on engines of vLLM (PD6xx): a file or flags that fire it, and its fixes."""

from __future__ import annotations

import contextlib
import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from pdlaunch.checks.engine_variables_rules import CONTRADICTORY
from tests.checks.contexts import GB200, GPU
from tests.checks.firing import Arrange, Case, Setup

VLLM = "engine: vllm\n"
PLAIN = Setup(VLLM)
VERSION = f"{VLLM}engine_command: one/bin/vllm\n"


def arguments(text: str, *, decode: str = "") -> Setup:
    """Engines with these ``engine_args``, written as a mapping in braces."""
    own = f"decode: {{engine_args: {{{decode}}}}}\n" if decode else ""
    return Setup(f"{VLLM}engine_args: {{{text}}}\n{own}")


def variables(text: str, *, decode: str = "") -> Setup:
    own = f"decode: {{env: {{{decode}}}}}\n" if decode else ""
    return Setup(f"{VLLM}env: {{{text}}}\n{own}")


def installed(**versions: str) -> Arrange:
    """Put environments with these versions of vLLM beside the models, by folder."""

    @contextlib.contextmanager
    def arrange() -> Iterator[tuple[str, ...]]:
        for name, version in versions.items():
            root = Path.cwd() / name
            shutil.rmtree(root, ignore_errors=True)
            site = root / "lib" / "python3.11" / "site-packages"
            info = site / f"vllm-{version}.dist-info"
            for folder in (root / "bin", info, site / "vllm"):
                folder.mkdir(parents=True)
            (info / "METADATA").write_text(f"Name: vllm\nVersion: {version}\n")
            (site / "vllm" / "envs.py").write_text('"VLLM_USE_V1", "VLLM_LOGGING_LEVEL"')
            script = root / "bin" / "vllm"
            script.write_text(f"#!{root}/bin/python\n")
            script.chmod(0o755)
        yield ()

    return arrange


@contextlib.contextmanager
def with_help() -> Iterator[tuple[str, ...]]:
    """Put an executable beside the models that prints the help of a vLLM."""
    script = Path("helpful")
    text = """\
        #!/bin/sh
        [ "$1 $2" = "serve --help=all" ] || exit 2
        cat <<END
        usage: vllm serve [model_tag] [options]
          --enable-expert-parallel, --no-enable-expert-parallel, -ep
                                Spread experts (--not-a-flag). (default: False)
          --seed SEED           Random seed.
        END
        """
    script.write_text(textwrap.dedent(text))
    script.chmod(0o755)
    yield ("--engine-command", str(script.absolute()))


ONE_VERSION = installed(first="0.32.0", second="0.32.0")
TWO_VERSIONS = installed(first="0.32.0", second="0.31.1")
FIRST = "engine_command: first/bin/vllm\n"
SECOND = "decode: {engine_command: second/bin/vllm}\n"
HERE = Setup(VLLM + FIRST, machine=None, arrange=ONE_VERSION)
EXPANDABLE = {"PYTORCH_ALLOC_CONF": "expandable_segments: True"}
HALF_A_SECOND = "hang_timeout_s: 0\nkv_transfer: {lease_s: 10}\nmax_num_batched_tokens: 8192\n"

CASES = [
    *(
        Case("PD601", arguments(written), {"Remove it from engine_args": PLAIN})
        for written in (
            "kv_transfer_config.kv_role: kv_producer",
            "--max_model-len: 100",
            "tp: 2",
            "no-enable-prefix-caching: true",
            "api-key: [k]",
            "block-s: 64",
            "enforce-eager: off",
        )
    ),
    Case(
        "PD601",
        arguments("seed: 1", decode="port: 8000"),
        {"use the setting that the finding names": arguments("seed: 1")},
    ),
    *(
        Case("PD602", arguments(written), {"Remove it from engine_args": PLAIN})
        for written in ("dp: 2", "pipeline-parallel-size: 2", "grpc: true", "data-par: 2", "r: 1")
    ),
    *(
        Case("PD603", arguments(written), {"Remove it from engine_args": PLAIN})
        for written in ("trust_remote_code: true", "middleware: [my.Class]", "trust-rem: true")
    ),
    Case(
        "PD604",
        arguments("profiler-config.profiler: torch"),
        {"Remove it from engine_args": PLAIN},
    ),
    *(
        Case(
            "PD605",
            arguments(f"kv-events-config: {config}"),
            {
                "Leave endpoint and replay_endpoint out": arguments(
                    "kv-events-config: {enable_kv_cache_events: true}"
                )
            },
        )
        for config in (
            '{enable_kv_cache_events: true, endpoint: "tcp://*:5557"}',
            '\'{"replay_endpoint": "tcp://127.0.0.1:1"}\'',
        )
    ),
    Case(
        "PD605",
        arguments("kv-events-config.enable_kv_cache_events: true"),
        {"Leave endpoint and replay_endpoint out": PLAIN},
    ),
    Case(
        "PD606",
        arguments("seed: --trust-remote-code"),
        {"values that begin with no dash": arguments("seed: -1")},
    ),
    Case(
        "PD606",
        arguments("seed: 1, --seed: 2"),
        {"Give each flag once": arguments("seed: 1")},
    ),
    # vLLM's CPU build has no sleep mode either.
    Case(
        "PD203",
        Setup(f"{VLLM}enable_sleep_mode: true\n"),
        {
            "Switch enable_sleep_mode off": PLAIN,
            "run on a CUDA device": Setup(f"{VLLM}enable_sleep_mode: true\n", machine=GPU),
        },
    ),
    Case(
        "PD303",
        Setup(f"{VLLM}decode: {{dtype: bfloat16}}\n"),
        {"Set dtype once, at the top level": Setup(f"{VLLM}dtype: bfloat16\n")},
    ),
    Case(
        "PD303",
        Setup(f"{VLLM}dtype: float16\nprefill: {{dtype: bfloat16}}\n", machine=GPU),
        {"Set dtype once, at the top level": Setup(f"{VLLM}dtype: float16\n", machine=GPU)},
    ),
    Case(
        "PD610",
        Setup("decode: {engine: vllm}\n"),
        {"Set engine once, at the top level": PLAIN},
    ),
    Case(
        "PD611",
        Setup(f"{VLLM}engine_command: ./no-such-vllm\n", machine=None),
        {"set engine_command to its executable": HERE},
    ),
    Case(
        "PD612",
        Setup(VLLM + FIRST + SECOND, machine=None, arrange=TWO_VERSIONS),
        {
            "Use the same vLLM on both sides": Setup(
                VLLM + FIRST + SECOND, machine=None, arrange=ONE_VERSION
            ),
            "set engine_command once, at the top level": HERE,
        },
    ),
    Case(
        "PD613",
        Setup(f"{VLLM}block_size: 16\n"),
        {
            "Use a multiple of 32": Setup(f"{VLLM}block_size: 64\n"),
            "leave block_size out": PLAIN,
        },
    ),
    Case(
        "PD614",
        Setup(VLLM, flags=("--kv-connector", "mooncake")),
        {"Set kv_transfer.connector to nixl": Setup(VLLM, flags=("--kv-connector", "nixl"))},
    ),
    *(
        Case("PD615", Setup(f"{VLLM}{setting}\n"), {"Remove it": PLAIN})
        for setting in (
            "kv_offload: {host_memory: 1GiB}",
            "kv_transfer: {pull_attempts: 3}",
            "kv_cache_memory: 1536MiB",
        )
    ),
    Case("PD615", Setup("engine_args: {seed: 1}\n"), {"Remove it": Setup()}),
    Case(
        "PD616",
        PLAIN,
        {
            "a vLLM whose KV pdlaunch verifies": Setup(VERSION, arrange=installed(one="0.32.0")),
            "use engine: native": Setup(),
        },
    ),
    Case(
        "PD629",
        Setup(VERSION, arrange=installed(one="0.31.0")),
        {
            "Have engine_command name a vLLM 0.32": Setup(VERSION, arrange=installed(one="0.32.0")),
            "engine: native": Setup(),
        },
    ),
    Case(
        "PD629",
        Setup(
            f"{VERSION}engine_args: {{speculative-config: {{method: ngram}}}}\n",
            arrange=installed(one="0.32.0"),
        ),
        {"take the argument out": Setup(VERSION, arrange=installed(one="0.32.0"))},
    ),
    Case(
        "PD629",
        Setup(VERSION, model="qwen-sliding", arrange=installed(one="0.32.0")),
        {"serve the model with engine: native": Setup(model="qwen-sliding")},
    ),
    Case(
        "PD617",
        Setup(f"{VLLM}kv_transfer: {{on_failure: fail}}\n"),
        {"Set kv_transfer.on_failure to recompute": PLAIN},
    ),
    Case(
        "PD618",
        Setup(
            f"{VLLM}enable_sleep_mode: true\ndecode: {{port: 8200}}\nengine_api_key: k\n",
            machine=GPU,
        ),
        {
            "Set prefill.port and decode.port to 0": Setup(
                f"{VLLM}enable_sleep_mode: true\nengine_api_key: k\n", machine=GPU
            ),
            "switch enable_sleep_mode off": Setup(
                f"{VLLM}decode: {{port: 8200}}\nengine_api_key: k\n", machine=GPU
            ),
        },
    ),
    *(
        Case(
            "PD619",
            Setup(f"{VLLM}kv_transfer: {{lease_s: {lease_s}}}\n"),
            {"Make kv_transfer.lease_s longer": Setup(f"{VLLM}kv_transfer: {{lease_s: 2}}\n")},
        )
        for lease_s in (0.5, 1.9)
    ),
    Case(
        "PD619",
        Setup(f"{VLLM}{HALF_A_SECOND}", model="llama-8b"),
        {
            "lower max_num_batched_tokens": Setup(
                f"{VLLM}{HALF_A_SECOND.replace('8192', '512')}", model="llama-8b"
            )
        },
    ),
    Case(
        "PD620",
        Setup(f"{VLLM}decode: {{model: tiny-copy}}\n"),
        {"Set model once, at the top level": Setup(VLLM, model="tiny-copy")},
    ),
    Case(
        "PD621",
        arguments("kv-cache-dtype: auto", decode="kv_cache_dtype: fp8"),
        {"Set kv-cache-dtype once": arguments("kv-cache-dtype: fp8")},
    ),
    Case(
        "PD622",
        Setup(f"{VLLM}decode: {{block_size: 64}}\n"),
        {"Set block_size once, at the top level": Setup(f"{VLLM}block_size: 64\n")},
    ),
    Case(
        "PD622",
        Setup(f"{VLLM}block_size: 32\nprefill: {{block_size: 64}}\n", machine=GPU),
        {
            "Set block_size once, at the top level": Setup(
                # Decode may have larger blocks, on a GPU.
                f"{VLLM}block_size: 32\ndecode: {{block_size: 64}}\n",
                machine=GPU,
            )
        },
    ),
    Case(
        "PD623",
        arguments("seed: 1", decode="sc: {method: ngram}"),
        {"Give both sides the same speculative": arguments("speculative-config: {method: ngram}")},
    ),
    Case(
        "PD624",
        arguments("enable-lora: true", decode="lora-modules: [a=/a]"),
        {"Give both sides the same adapters": arguments("enable-lora: true, lora-modules: [a=/a]")},
    ),
    Case(
        "PD625",
        arguments("seed: 1", decode="dcp: 2"),
        {"Give both sides the same value": arguments("decode-context-parallel-size: 2")},
    ),
    Case(
        "PD626",
        Setup(VLLM, model="tiny-12-heads", flags=("--prefill-tp", "2", "--decode-tp", "3")),
        {
            "Choose tensor-parallel sizes of which one divides the other": Setup(
                VLLM, model="tiny-12-heads", flags=("--prefill-tp", "2", "--decode-tp", "4")
            )
        },
    ),
    Case(
        "PD626",
        Setup(VLLM, flags=("--prefill-tp", "4")),
        {
            "no larger one for prefill than there are KV heads": Setup(
                VLLM, flags=("--prefill-tp", "2", "--decode-tp", "2")
            )
        },
    ),
    *(
        Case(
            "PD627",
            Setup(f"{VLLM}{name}: true\n", machine=GPU),
            {f"Switch {words}": Setup(VLLM, machine=GPU)},
        )
        for name, words in (
            ("enable_sleep_mode", "enable_sleep_mode"),
            ("enable_cumem_allocator", "enable_sleep_mode and enable_cumem_allocator off"),
        )
    ),
    Case(
        "PD628",
        Setup(VLLM, environ=EXPANDABLE, machine=GPU),
        {"Remove expandable_segments from the variable": Setup(VLLM, machine=GPU)},
    ),
    *(
        Case(
            "PD630",
            variables(f"VLLM_NIXL_SIDE_CHANNEL_HOST: {host}"),
            {"Unset VLLM_NIXL_SIDE_CHANNEL_HOST": PLAIN},
        )
        for host in ("0.0.0.0", "'::'", "''")
    ),
    Case(
        "PD631",
        variables("VLLM_NIXL_SIDE_CHANNEL_HOST: 10.0.0.7"),
        {"Unset VLLM_NIXL_SIDE_CHANNEL_HOST": variables("VLLM_NIXL_SIDE_CHANNEL_HOST: localhost")},
    ),
    Case(
        "PD632",
        variables("VLLM_NIXL_SIDE_CHANNEL_PORT: '5600'"),
        {"Unset it": PLAIN},
    ),
    Case("PD632", Setup(VLLM, environ={"VLLM_API_KEY": "k"}), {"Unset it": PLAIN}),
    *(
        Case("PD633", variables(f"{name}: '1'"), {"Unset it": PLAIN})
        for name in sorted(CONTRADICTORY)
    ),
    Case(
        "PD634",
        variables("VLLM_SERVER_DEV_MODE: '1'"),
        {
            "Unset VLLM_SERVER_DEV_MODE": Setup(VLLM, environ={"VLLM_SERVER_DEV_MODE": "1"}),
            "enable_sleep_mode switches it on": Setup(
                f"{VLLM}enable_sleep_mode: true\nenv: {{VLLM_SERVER_DEV_MODE: '1'}}\n",
                machine=GB200,
            ),
        },
    ),
    Case(
        "PD635",
        Setup(VLLM, environ={"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}),
        {"Unset it": Setup(VLLM, environ={"VLLM_ALLOW_INSECURE_SERIALIZATION": "0"})},
    ),
    Case(
        "PD636",
        variables("VLLM_CPU_KVCACHE_SPACE: '4'"),
        {"the setting that the finding names": Setup(f"{VLLM}kv_cache_memory: 4GiB\n")},
    ),
    Case(
        "PD637",
        replace(HERE, environ={"VLLM_LOGING_LEVEL": "DEBUG"}),
        {"Correct the name": replace(HERE, environ={"VLLM_LOGGING_LEVEL": "DEBUG"})},
    ),
    Case(
        "PD638",
        variables("VLLM_USE_V1: '1'", decode="VLLM_KV_CACHE_LAYOUT: NHD"),
        {"Set the variables once, in env at the top level": variables("VLLM_KV_CACHE_LAYOUT: NHD")},
    ),
]

ASKED = [
    Case(
        "PD607",
        Setup(f"{VLLM}engine_args: {{sead: 1}}\n", measured=(), arrange=with_help),
        {
            "Correct the name": Setup(
                # argparse completes what fits one flag alone.
                f"{VLLM}engine_args: {{see: 1, ep: true}}\n",
                measured=(),
                arrange=with_help,
            )
        },
    ),
]
"""Cases in which an executable is asked for its flags."""
