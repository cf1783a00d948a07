"""Rules PD40x, PD41x, PD42x and PD45x judge systems, packages, devices, limits, ports and hosts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from pdlaunch.checks.context import Context, engines, on_cpu, on_cuda
from pdlaunch.checks.memory_rules import cumem_setting
from pdlaunch.checks.rule import Found, error, warning
from pdlaunch.config.http_names import WILDCARDS, is_loopback
from pdlaunch.config.problems import shown
from pdlaunch.config.sizes import format_size, parse_size
from pdlaunch.machine.facts import UNLIMITED
from pdlaunch.machine.visible_gpus import VISIBLE_DEVICES

MIN_SHM_BYTES = parse_size("256MiB")
_FILES_OF_A_PROCESS = 64
_FILES_OF_A_PAIR = 4
_OF_HOST = frozenset(("num_threads",))  # derived values that may differ between engines of one role


def _cuda_generation(context: Context) -> str:
    """Return the generation of torch's CUDA as NIXL's builds are named: ``cu13``; empty: none."""
    built = context.machine.libraries.torch_cuda
    return "" if built is None else f"cu{built.partition('.')[0]}"


def _nixl_missing(context: Context) -> Found | None:
    libraries = context.machine.libraries
    if not context.uses_ucx or libraries.nixl_backends:
        return None
    if libraries.nixl is None:
        return Found("nixl is not installed for this Python")
    message = f"nixl {libraries.nixl} has no build beside it"
    return Found(message, fix="pip install nixl-cu12, or nixl-cu13")


def _mixed_generations(context: Context) -> Found | None:
    libraries, wanted = context.machine.libraries, _cuda_generation(context)
    there = libraries.nixl_backends
    if not context.uses_ucx or not wanted or not there or wanted in there:
        return None
    message = (
        f"torch {libraries.torch} is built for CUDA {libraries.torch_cuda}, NIXL is there as "
        + ", ".join(f"nixl-{name}" for name in sorted(there))
    )
    return Found(message, fix=f"pip install nixl-{wanted}")


def _old_driver(context: Context) -> str:
    driver, built = context.machine.driver_cuda, context.machine.libraries.torch_cuda
    is_old = driver and built and int(built.partition(".")[0]) > driver[0]
    if not driver or not is_old or not any(on_cuda(context)):
        return ""
    runs = f"the driver runs up to CUDA {driver[0]}.{driver[1]}"
    return f"torch is built for CUDA {built}, {runs}"


def _mooncake(context: Context) -> Iterator[Found]:
    if not context.uses("mooncake"):
        return
    if not context.machine.libraries.mooncake:
        fix = "pip install mooncake-transfer-engine"
        yield Found("mooncake is not installed for this Python", fix=fix)
    for name in context.machine.libraries.missing_for_mooncake:
        yield Found(f"the loader does not find {name}")


def _missing_extras(context: Context) -> Iterator[Found]:
    missing, config = context.probes.missing_extras or {}, context.config
    wanted: list[tuple[str, str]] = []
    if config.tracing.otlp_endpoint is not None:
        wanted.append(("otel", "tracing.otlp_endpoint"))
    if context.launch.conversions:
        wanted.append(("gguf", "model"))
    # Of other hosts it is not known here.
    if not context.launch.spans_hosts:
        cumem = [each for each in on_cuda(context) if each.allocator == "cumem"]
        wanted += [("cuda", each.where(cumem_setting(each))) for each in cumem]
    for extra, where in wanted:
        if extra in missing:
            yield Found(
                f"it needs the extra {extra}: there is no module {missing[extra]}",
                where,
                f"pip install 'pdlaunch[{extra}]', or leave it out",
            )


def _no_gpu(context: Context) -> Iterator[Found]:
    for each in on_cuda(context):
        if each.gpus or each.gpus_problem:
            continue  # PD450 speaks of a variable that is wrong.
        variable = each.given_environ.get(VISIBLE_DEVICES)
        hidden = "" if variable is None else f" ({VISIBLE_DEVICES} is {shown(variable)})"
        reason = "" if context.machine.gpus else f": {context.machine.driver_error}"
        message = f"device is cuda, but no CUDA device is visible{hidden}{reason}"
        yield Found(message, each.where("device"))


def _low_open_files(context: Context) -> str:
    limit = context.machine.num_open_files
    # A bound from above: sockets of clients, of engines, and pipes of each pair of ranks.
    needed = (
        _FILES_OF_A_PROCESS
        + 4 * context.config.limits.max_queued_requests
        + _FILES_OF_A_PAIR * math.prod(each.num_ranks for each in engines(context))
    )
    if limit in (UNLIMITED, 0) or limit >= needed:
        return ""
    return f"{limit} files may be open, a process of this set-up can need {needed}"


def _small_shm(context: Context) -> str:
    machine, num_ranks = context.machine, sum(each.num_ranks for each in engines(context))
    is_small = machine.shm_free_bytes < MIN_SHM_BYTES and num_ranks > 1
    text = f"{format_size(machine.shm_free_bytes)} of {format_size(machine.shm_bytes)} are free"
    return text if is_small else ""


def _ports(
    problems: tuple[str, ...], message: str, at: str = ""
) -> Callable[[Context], Iterator[Found]]:
    def find(context: Context) -> Iterator[Found]:
        for listener in context.launch.listeners:
            state = (context.probes.ports or {}).get((listener.host, listener.port))
            if state is not None and state.problem in problems:
                text = message.format(listener, state.detail)
                yield Found(text, at or listener.where)

    return find


def _local_addresses(context: Context) -> Iterator[Found]:
    hosts = [host for host in context.launch.hosts if host.advertise_address]
    local = [
        host
        for host in hosts
        if host.advertise_address in WILDCARDS or is_loopback(host.advertise_address)
    ]
    # Where all hosts have such an address they are one machine.
    for host in local if len(local) < len(hosts) else ():
        place = "control_address" if host is context.launch.hosts[0] else "hosts.advertise_address"
        yield Found(f"others are told to reach {host.name} at {host.advertise_address}", place)


def _too_few_hosts(context: Context) -> Iterator[Found]:
    for role in context.engines if context.config.placement != "local" else ():
        there = sum(role in host.roles for host in context.launch.hosts)
        if not there:
            yield Found(f"none of the hosts takes {role} engines", "hosts")


def _unlike_hosts(context: Context) -> Iterator[Found]:
    for role in context.engines:
        placed = [engine for engine in context.launch.engines if engine.engines.role == role]
        first = placed[0]
        mine = first.engines.derived()
        others = {each.engines.host: each.engines for each in placed}
        for other in others.values():
            theirs = other.derived()
            for name in mine.keys() - _OF_HOST:
                if mine[name] != theirs[name]:
                    yield Found(
                        f"it is {mine[name]} on {first.host.name} and {theirs[name]} on "
                        f"{other.host}",
                        first.engines.where(name),
                    )


# fmt: off
RULES = (
    error("PD400", "This system is not Linux.",
        "Processes, shared memory and devices are handled in ways that only Linux has; "
        "check-config works everywhere.",
        over=lambda context: [context.machine], when=lambda machine: machine.system != "Linux",
        at="system", message="serve needs Linux, this is {0.system}",
        fix="Run serve on Linux, in a container or a virtual machine.",
        source="Supported platforms.", needs=("system",), on_vllm=True),
    error("PD401", "torch or transformers is not installed.",
        "The ranks compute with them.",
        over=lambda context: [context.machine.libraries],
        when=lambda libraries: (
            Found(f"{name} is not installed for this Python", f"package {name}")
            for name in ("torch", "transformers")
            if getattr(libraries, name) is None
        ),
        fix="pip install pdlaunch, without --no-deps.", source="The dependencies of pdlaunch.",
        needs=("libraries",)),
    error("PD402", "NIXL is not installed.",
        "The nixl connector moves every KV block with it.",
        when=_nixl_missing, at="package nixl",
        fix="pip install nixl", source="The dependencies of the nixl connector.",
        needs=("libraries",)),
    error("PD404", "NIXL cannot be imported.",
        "A shared library that it needs is missing or of another version; every rank would end "
        "with this error.",
        over=lambda context: (context.probes.nixl or {}).values() if context.uses_ucx else (),
        when=lambda answer: answer.import_error is not None, at="package nixl",
        message="import of nixl fails: {0.import_error}",
        fix="Read the error; often a CUDA library of another generation stands first in "
        "LD_LIBRARY_PATH.", source="The import, tried in a process of its own.", needs=("nixl",)),
    error("PD405", "torch and NIXL are built for different CUDA generations.",
        "Two CUDA runtimes of different generations meet in one process, and the import fails or "
        "copies end in errors.",
        when=_mixed_generations, at="package nixl",
        fix="Install the nixl build of torch's CUDA generation.",
        source="nixl 1.5.1: the meta package asks torch for its CUDA version.",
        needs=("libraries",)),
    error("PD406", "torch is built without CUDA, and engines are to run on GPUs.",
        "A CPU build of torch does not see any GPU.",
        over=lambda context: [
            (each, context.machine.libraries)
            for each in on_cuda(context)
            if context.machine.gpus and context.machine.libraries.torch_cuda is None
        ], when=lambda it: it[1].torch is not None, at="device",
        message="torch {1.torch} is built without CUDA",
        fix="Install a CUDA build of torch, or set device: cpu.", source="torch/version.py.",
        needs=("libraries", "gpus")),
    error("PD407", "The CUDA driver is too old for torch.",
        "A driver runs programs of its own CUDA generation and older ones.",
        when=_old_driver, at="CUDA driver",
        fix="Update the driver, or install a torch build for an older CUDA.",
        source="CUDA compatibility: minor versions of one generation fit, later generations do "
        "not.", needs=("libraries", "gpus", "driver")),
    error("PD408", "A library that Mooncake needs is missing.",
        "The transfer engine is linked against it, whatever protocol is used: its import fails.",
        when=_mooncake, at="package mooncake",
        fix="On Debian and Ubuntu: apt-get install libibverbs1",
        source="mooncake-transfer-engine: works over tcp on a CPU once libibverbs1 is there "
        "(measured).", needs=("libraries",)),
    warning("PD409", "Mooncake's sockets admit every process of this machine.",
        "Each rank listens on two ports without authentication. pdlaunch binds them to the "
        "loopback device; a process of this machine could still read and write KV blocks.",
        when=lambda context: context.uses("mooncake"), at="kv_transfer.connector",
        message="mooncake listens without authentication on this machine's loopback device",
        fix="Use connector nixl, which listens nowhere. In a network namespace of its own a "
        "deployment is safe, though the warning stays.",
        source="Listening sockets of Mooncake 0.3.13 (measured); SO_BINDTODEVICE in socket(7)."),
    error("PD410", "Engines are to run on GPUs, but there is none.",
        "The driver shows no CUDA device to this process.",
        when=_no_gpu,
        fix="Set device: cpu, or check nvidia-smi, CUDA_VISIBLE_DEVICES and the container's GPU "
        "option.", source="cuInit and cuDeviceGetCount.", needs=("gpus",), on_vllm=True),
    error("PD411", "There are fewer GPUs than one engine has ranks.",
        "Two ranks of one engine on a device would wait for each other in collective operations.",
        over=on_cuda,
        # PD410 speaks of ranks that see no GPU.
        when=lambda each: (
            (there := len(each.gpus))
            and each.tp_size > there
            and Found(
                f"a {each.role} engine has {each.tp_size} ranks, which see {there} GPUs",
                fix=f"set it to {there} or less",
            )
        ), at="tensor_parallel_size",
        fix="Lower tensor_parallel_size.", source="NCCL: one rank a device.", needs=("gpus",),
        on_vllm=True),
    warning("PD412", "There are fewer CPU cores than ranks.",
        "Ranks then take turns on a core: prefill and decode do not overlap.",
        when=lambda context: (
            (ranks := sum(each.num_ranks for each in on_cpu(context)))
            > (cores := context.machine.num_cpus)
            and f"{ranks} ranks compute on {cores} cores"
        ), at="prefill.replicas",
        fix="Use fewer engines, or more cores.", source="Measured on 2 cores.", needs=("cpus",),
        on_vllm=True),
    warning("PD413", "A 16-bit dtype is computed on a CPU that emulates it.",
        "Prefill takes six times as long as in float32, and greedy answers depend on the shape of "
        "the batch.",
        over=on_cpu,
        when=lambda each: (
            each.settings.dtype == "float16"
            or (each.settings.dtype == "bfloat16" and not each.machine.has_native_bf16)
        ), at="dtype", message="dtype is {0.settings.dtype}, which this CPU emulates",
        fix="Set dtype: auto or float32.",
        source="SmolLM2-135M on an AVX2 machine: 2.8 s for 128 tokens in bfloat16, 0.4 s in "
        "float32 (measured).", needs=("native_bf16",), on_vllm=True),
    warning("PD415", "The limit of open files is low.",
        "Every request, pair of ranks and shared-memory segment takes descriptors. Processes "
        "raise their soft limit to the hard one, which is what counts.",
        when=_low_open_files, at="limit nofile",
        fix="ulimit -n 65536; in containers --ulimit nofile=65536.", source="RLIMIT_NOFILE.",
        needs=("limits",), on_vllm=True),
    warning("PD416", "There is little shared memory.",
        "UCX, torch and NCCL exchange data through /dev/shm; containers give it 64 MB unless told "
        "otherwise. A full one ends processes with a bus error.",
        when=_small_shm, at="/dev/shm",
        fix="docker run --shm-size=1g, or --ipc=host.",
        source="UCX posix and sysv transports, NCCL SHM transport.", needs=("shm",)),
    error("PD419", "The folder of connector file cannot be written to.",
        "The ranks put their KV blocks there and would refuse to start. All hosts must have the "
        "folder; only this machine is checked.",
        over=lambda context: (context.probes.folder_problems or {}).items(),
        when=lambda it: Found(it[1], it[0]),
        fix="Name a folder that the user of the launch may write to, or may create "
        "(--kv-file-directory).",
        source="A file is written there and removed; the ranks make the folder at their start.",
        needs=("folders",)),
    error("PD420", "A port is busy.",
        "Another process listens there.",
        when=_ports(("busy",), "port {0.port} of {0.host} for the {0.name} is busy"),
        fix="Choose another port, or stop that process (ss -ltnp shows it).", source="bind().",
        needs=("ports",), on_vllm=True),
    error("PD421", "A port needs privileges.",
        "Ports below net.ipv4.ip_unprivileged_port_start (1024) are for root.",
        when=_ports(("privileged",), "port {0.port} for the {0.name} needs privileges"),
        fix="Choose a port from 1024 on.", source="bind().", needs=("ports",), on_vllm=True),
    error("PD422", "The host to listen on is no address of this machine.",
        "A server listens on its own machine's addresses only.",
        when=_ports(
            ("not here", "unknown host", "other"),
            "the {0.name} cannot listen on {0.host!a}: {1}",
            "host",
        ),
        fix="Use 127.0.0.1 for this machine alone, or 0.0.0.0 for every address that it has.",
        source="bind() and getaddrinfo().", needs=("ports",), on_vllm=True),
    error("PD424", "Peers on other hosts cannot reach a host.",
        "To a peer on another host, localhost and 0.0.0.0 mean its own machine: every pull fails.",
        when=_local_addresses,
        fix="Give an address of this machine that the other hosts can reach.",
        source="vLLM: the side channel listens on localhost by default, and the first request "
        "hangs.", on_vllm=True),
    warning("PD425", "Gloo's sockets admit every process of this machine.",
        "The ranks of a tensor parallel group on a CPU exchange activations over TCP, on ports of "
        "the loopback device without authentication: a process of this machine could take a "
        "rank's place while a group is formed.",
        over=on_cpu, when=lambda each: each.tp_size > 1, at="tensor_parallel_size",
        message="each of {0.tp_size} ranks listens without authentication on this machine's "
        "loopback device",
        fix="Use one rank an engine. In a network namespace of its own a deployment is safe, "
        "though the warning stays.", source="Listening sockets of torch 2.13's gloo (measured)."),
    error("PD437", "The connector of another package cannot be imported.",
        "Its entry point in the group `pdlaunch.connectors` names a spec, and the spec names what "
        "the ranks import. Every rank would end with this error.",
        over=lambda context: (context.probes.connector_errors or {}).values(),
        when=lambda reason: reason, at="kv_transfer.connector",
        fix="Install the connector's package and what it needs, or name another connector.",
        source="The import, tried in a process of its own.", needs=("connector",)),
    error("PD450", "CUDA_VISIBLE_DEVICES of a role names GPUs that its ranks cannot have.",
        "CUDA forgets what comes after an entry that it cannot use, and shows no GPU where one is "
        "named twice. The numbers are those of the machine, whatever the launch's own variable "
        "lists.",
        over=engines, when=lambda each: bool(each.gpus_problem), at=f"${VISIBLE_DEVICES}",
        message=f"{VISIBLE_DEVICES} of {{0.role}}: {{0.gpus_problem}}",
        fix="Name GPUs that the launch itself sees, by number or UUID and each once; or leave "
        "CUDA_VISIBLE_DEVICES out, and pdlaunch gives each rank a GPU.",
        source="CUDA 13 on two H200s: what cuInit and cuDeviceGetCount make of the variable.",
        needs=("gpus",), on_vllm=True),
    warning("PD451", "The engines run on the CPU of a host whose GPUs the driver does not show.",
        "Nobody chose the CPU: the driver is missing or broken, or the container was not given "
        "the GPUs. A CUDA_VISIBLE_DEVICES that hides them is a choice.",
        over=on_cpu,
        when=lambda each: each.machine.has_hidden_gpus and each.settings.device != "cpu"
        and VISIBLE_DEVICES not in each.given_environ, at="device",
        message="{0.role} runs on the CPU, though this host has NVIDIA GPUs",
        fix="Check nvidia-smi, and give the container the GPUs (docker run --gpus all); or set "
        "device: cpu.", source="The PCI bus, and cuDeviceGetCount.", needs=("gpus",)),
    error("PD452", "Too few hosts take the engines of a role.",
        "An engine needs a host that takes its role.",
        when=_too_few_hosts,
        fix="List more hosts, or leave roles of hosts out.",
        source="Hosts take engines of their roles alone.", on_vllm=True),
    error("PD455", "Engines of one role come to different values on different hosts.",
        "A request may go to any engine of a role: with another dtype or device an engine would "
        "refuse the blocks, or answer with other tokens.",
        when=_unlike_hosts,
        fix="Set these for the role, or place its engines on hosts that are alike.",
        source="Values are derived on each host: dtype auto is float32 on a CPU without bfloat16.",
        on_vllm=True),
    error("PD460", "A setting or the model asks for an extra of pdlaunch that is not installed.",
        "Spans are sent with the libraries of `otel`, a .gguf file is converted with those of "
        "`gguf`, and the CuMem allocator calls the driver through `cuda`.",
        when=_missing_extras,
        fix="Install the extra for this Python, or leave out what asks for it.",
        source="pyproject.toml: optional-dependencies.", needs=("extras",)),
)
# fmt: on
