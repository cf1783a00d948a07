"""Rules PD4xx judge systems, packages, devices, shared memory, ports and hosts."""

from collections.abc import Iterator

from pdlaunch.checks.memory_rules import cumem_setting
from pdlaunch.checks.rule import Context, Found, error, warning
from pdlaunch.config.http_names import WILDCARDS, is_loopback
from pdlaunch.config.problems import shown
from pdlaunch.config.sizes import format_size, parse_size
from pdlaunch.machine.facts import VISIBLE_DEVICES
from pdlaunch.machine.network import NOT_HERE
from pdlaunch.planning.role_engines import DEVICES_BETWEEN_HOSTS

MIN_SHM_BYTES = parse_size("256MiB")
# Variables that choose the network between the hosts of an engine
_NETWORK = (
    *DEVICES_BETWEEN_HOSTS,
    *("NCCL_IB_DISABLE", "NCCL_IB_GID_INDEX", "NCCL_IB_HCA", "UCX_NET_DEVICES"),
)
_OF_HOST = frozenset(("num_threads",))  # derived values that may differ between hosts


def _missing_extras(context: Context) -> Iterator[Found]:
    missing = context.probes.missing_extras or {}
    wanted: list[tuple[str, str]] = []
    if context.launch.conversions:
        wanted.append(("gguf", "model"))
    if context.uses("mooncake"):
        wanted.append(("mooncake", "kv_transfer.connector"))
    # The packages on other hosts are not known here.
    if not context.launch.spans_hosts:
        cumem = [each for each in context.on_cuda() if each.allocator == "cumem"]
        wanted += [("cuda", each.where(cumem_setting(each))) for each in cumem]
    for extra, where in wanted:
        if extra in missing:
            yield Found(
                f"this needs the extra {extra}: the module {missing[extra]} is missing",
                where,
                f"pip install 'pdlaunch[{extra}]', or leave it out",
            )


def _no_gpu(context: Context) -> Iterator[Found]:
    for each in context.on_cuda():
        if each.gpus or each.gpus_problem:
            continue  # PD450 reports a wrong variable.
        variable = each.given_environ.get(VISIBLE_DEVICES)
        hidden = "" if variable is None else f" ({VISIBLE_DEVICES} is {shown(variable)})"
        reason = "" if context.machine.gpus else f": {context.machine.driver_error}"
        message = f"device is cuda, but no CUDA device is visible{hidden}{reason}"
        yield Found(message, each.where("device"))


def _small_shm(context: Context) -> str:
    machine, num_ranks = context.machine, sum(each.num_ranks for each in context.engines.values())
    is_small = machine.shm_free_bytes < MIN_SHM_BYTES and num_ranks > 1
    text = f"{format_size(machine.shm_free_bytes)} of {format_size(machine.shm_bytes)} are free"
    return text if is_small else ""


def _ports(context: Context) -> Iterator[Found]:
    for listener in context.launch.listeners:
        if problem := (context.probes.ports or {}).get((listener.host, listener.port)):
            port = f"port {listener.port} of {listener.host} for the {listener.name}"
            where = "host" if problem.startswith(NOT_HERE) else listener.where
            yield Found(f"{port} cannot be used: {problem}", where)


def _local_addresses(context: Context) -> Iterator[Found]:
    hosts = {it: it.advertise_address for it in context.launch.hosts if it.advertise_address}
    local = [it for it, address in hosts.items() if address in WILDCARDS or is_loopback(address)]
    # If all hosts have such an address, they are on one machine.
    for host in local if len(local) < len(hosts) else ():
        place = "control_address" if host is context.launch.hosts[0] else "hosts.advertise_address"
        yield Found(f"{host.name} has the address {host.advertise_address} for other hosts", place)


def _too_few_hosts(context: Context) -> Iterator[Found]:
    for role in context.engines if context.config.placement != "local" else ():
        if not any(role in host.roles for host in context.launch.hosts):
            yield Found(f"no host accepts {role} engines", "hosts")


def _cannot_spread(context: Context) -> Iterator[Found]:
    for each in context.engines.values():
        nnodes = each.settings.nnodes
        is_copied = each.settings.data_parallel_size > 1
        sizes = ("nnodes", "data_parallel_size", "pipeline_parallel_size")
        larger = [name for name in sizes if getattr(each.settings, name) > 1]
        where = each.where(larger[0] if larger else "nnodes")
        if larger and each.is_native:
            message = "ranks of a native engine are tensor parallel, on one host"
            yield Found(message, where, "set engine: vllm")
        elif larger and context.kv_transfer.is_stock:
            message = f"{larger[0]} needs pdlaunch's connector"
            yield Found(message, where, "leave kv_transfer.connector out")
        if each.is_native or nnodes == 1:
            continue
        if is_copied:
            message = "all data parallel ranks of an engine must be on one host"
            yield Found(message, where, f"remove nnodes or {each.where('data_parallel_size')}")
        if (ranks := each.settings.ranks_of_copy) % nnodes:
            yield Found(
                f"its number of ranks, {ranks}, is not a multiple of nnodes {nnodes}", where
            )
        there = sum(each.role in host.roles for host in context.launch.hosts)
        if there < nnodes:
            message = f"nnodes is {nnodes}, but only {there} hosts accept the role"
            yield Found(message, where, "list more hosts, with placement: hosts, ray or slurm")
        if not context.kv_transfer.trusted_network:
            message = "vLLM's ports between hosts have no authentication"
            fix = "set kv_transfer.trusted_network if no stranger can reach these ports"
            yield Found(message, where, fix)


def _unlike_networks(context: Context) -> Iterator[Found]:
    for engine in context.launch.engines if context.config.placement != "local" else ():
        for name in _NETWORK:
            has = [node.host.name for node in engine.nodes if name in node.engines.given_environ]
            without = [node.host.name for node in engine.nodes if node.host.name not in has]
            if has and without:
                message = f"{name} is set on {', '.join(has)}, but not on {', '.join(without)}"
                yield Found(message, f"environment {name}")


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
                    found = f"it is {mine[name]} on {first.host.name} and {theirs[name]} on "
                    yield Found(f"{found}{other.host}", first.engines.where(name))


# fmt: off
RULES = (
    warning("PD409", "Mooncake's sockets admit every process of this machine.",
        "Each rank listens on two ports without authentication. pdlaunch binds them to the "
        "loopback device, but other processes of this machine can still read and write KV blocks.",
        when=lambda context: context.uses("mooncake"), at="kv_transfer.connector",
        message="mooncake listens without authentication on this machine's loopback device",
        fix="Use connector nixl, which opens no port. A deployment in its own network namespace "
        "is safe, though the warning stays.",
        source="Listening sockets of Mooncake 0.3.13 (measured); SO_BINDTODEVICE in socket(7)."),
    error("PD410", "Engines need GPUs, but no GPU is visible.",
        "The driver shows no CUDA device to this process.",
        when=_no_gpu,
        fix="Set device: cpu, or check nvidia-smi, CUDA_VISIBLE_DEVICES and the container's GPU "
        "option.", source="cuInit and cuDeviceGetCount.", needs=("gpus",)),
    error("PD411", "An engine has more ranks than there are GPUs.",
        "Two ranks of one engine on one device would block each other in collective operations.",
        over=Context.on_cuda,
        # PD410 reports ranks that see no GPU.
        when=lambda each: (
            (there := len(each.gpus))
            and (ranks := each.settings.ranks_per_node) > there
            and Found(
                f"a {each.role} engine has {ranks} ranks on a host, but sees {there} GPUs",
                fix=f"set it to {there * each.settings.nnodes} or less",
            )
        ), at="tensor_parallel_size",
        fix="Lower tensor_parallel_size, or spread engines of vLLM over more hosts (nnodes).",
        source="NCCL: one rank a device.", needs=("gpus",)),
    warning("PD412", "There are fewer CPU cores than ranks.",
        "Ranks then take turns on a core: prefill and decode do not overlap.",
        when=lambda context: (
            (ranks := sum(each.num_ranks for each in context.on_cpu()))
            > (cores := context.machine.num_cpus)
            and f"{ranks} ranks compute on {cores} cores"
        ), at="prefill.replicas",
        fix="Use fewer engines, or more cores.", source="Measured on 2 cores.", needs=("cpus",)),
    warning("PD416", "There is little shared memory.",
        "UCX, torch, NCCL and vLLM's message queues (160 MiB for a group of ranks) exchange data "
        "through /dev/shm, which has 64 MB in a container by default. If it is full, processes "
        "die with a bus error.",
        when=_small_shm, at="/dev/shm",
        fix="docker run --shm-size=1g, or --ipc=host.",
        source="UCX posix and sysv transports, NCCL SHM transport; MessageQueue of vLLM 0.32.",
        needs=("shm",)),
    error("PD420", "The launch cannot listen at an address.",
        "Another process listens there, the port is reserved for root (below 1024), or the host "
        "is not an address of this machine.",
        when=_ports,
        fix="Choose another port from 1024 on, or stop the process that holds it (`ss -ltnp`). Set "
        "host to 127.0.0.1 for clients on this machine, or to 0.0.0.0 for all addresses.",
        source="bind() and getaddrinfo().", needs=("ports",)),
    error("PD424", "Peers on other hosts cannot reach a host.",
        "On another host, localhost and 0.0.0.0 mean that host itself, so every pull fails.",
        when=_local_addresses,
        fix="Give an address of this machine that the other hosts can reach.",
        source="vLLM: the side channel listens on localhost by default, and the first request "
        "hangs."),
    warning("PD425", "Gloo's sockets admit every process of this machine.",
        "The ranks of a tensor parallel group on a CPU exchange activations over TCP, on ports of "
        "the loopback device without authentication. Another process of this machine could take "
        "a rank's place while the group is formed.",
        over=Context.on_cpu, when=lambda each: each.tp_size > 1, at="tensor_parallel_size",
        message="each of {0.tp_size} ranks listens without authentication on this machine's "
        "loopback device",
        fix="Use one rank for each engine. A deployment in its own network namespace is safe, "
        "though the warning stays.", source="Listening sockets of torch 2.13's gloo (measured).",
        native_alone=True),
    error("PD450", "CUDA_VISIBLE_DEVICES of a role names GPUs that its ranks cannot use.",
        "CUDA ignores all entries after one that it cannot use, and shows no GPU if a GPU is "
        "named twice. The numbers are those of the machine, even if the launch itself has a "
        "CUDA_VISIBLE_DEVICES.",
        over=Context.roles, when=lambda each: bool(each.gpus_problem), at=f"${VISIBLE_DEVICES}",
        message=f"{VISIBLE_DEVICES} of {{0.role}}: {{0.gpus_problem}}",
        fix="Name GPUs that the launch itself sees, by number and each once. Or remove "
        "CUDA_VISIBLE_DEVICES: pdlaunch then gives each rank a GPU.",
        source="cuInit and cuDeviceGetCount of CUDA 13 on two H200s (measured).", needs=("gpus",)),
    warning("PD451", "Engines run on the CPU of a host with GPUs that the driver does not show.",
        "The settings do not choose the CPU. The driver is missing or broken, or the container has "
        "no access to the GPUs. GPUs that CUDA_VISIBLE_DEVICES hides are no finding.",
        over=Context.on_cpu,
        when=lambda each: each.machine.has_hidden_gpus and each.settings.device != "cpu"
        and VISIBLE_DEVICES not in each.given_environ, at="device",
        message="{0.role} runs on the CPU, though this host has NVIDIA GPUs",
        fix="Check nvidia-smi, and give the container the GPUs (docker run --gpus all); or set "
        "device: cpu.", source="The PCI bus, and cuDeviceGetCount.", needs=("gpus",),
        native_alone=True),
    error("PD452", "No host accepts the engines of a role.",
        "An engine needs a host that accepts its role.",
        when=_too_few_hosts,
        fix="List more hosts, or remove `roles` of a host so that it accepts all roles.",
        source="A host accepts only engines of its roles."),
    error("PD456", "An engine cannot be spread over hosts, or have data parallel ranks.",
        "vLLM needs the same number of ranks on each host. Its TCPStore, gloo, NCCL and message "
        "queues have no authentication, and the queues carry pickles: anyone who reaches them can "
        "run code.",
        when=_cannot_spread, at="nnodes",
        fix="Choose nnodes so that it divides the engine's ranks (tensor_parallel_size x "
        "pipeline_parallel_size), and list nnodes or more hosts.",
        source="MultiprocExecutor and MessageQueue of vLLM 0.24 to 0.33; its listening sockets "
        "with two nodes (0.32, measured)."),
    warning("PD457", "A variable that chooses the network is set on only some hosts of an engine.",
        "The ranks then use different networks. They wait for each other until a time-out at the "
        "start, or silently fall back to TCP.",
        when=_unlike_networks,
        fix="Set it in the environment of the agents on all these hosts, or on none of them. If "
        "all need the same value, set it in env.",
        source="NCCL's environment variables: NCCL_SOCKET_IFNAME, NCCL_IB_HCA, NCCL_IB_GID_INDEX; "
        "vLLM's troubleshooting of several nodes."),
    error("PD455", "A derived value of a role differs between its hosts.",
        "A request may go to any engine of a role. An engine with another dtype or device would "
        "refuse the blocks, or answer with other tokens.",
        when=_unlike_hosts,
        fix="Set this value for the role, or place its engines on similar hosts.",
        source="Values are derived on each host: dtype auto is float32 on a CPU without bfloat16."),
    error("PD460", "A setting or the model asks for an extra of pdlaunch that is not installed.",
        "The extra `gguf` has the libraries that convert a .gguf file, `mooncake` has Mooncake, "
        "and `cuda` has the bindings through which the CuMem allocator calls the driver.",
        when=_missing_extras,
        fix="Install the extra for this Python, or remove the setting that needs it.",
        source="pyproject.toml: optional-dependencies.", needs=("extras",), native_alone=True),
)
# fmt: on
