from pdlaunch.machine.facts import Gpu, LinkedGpus
from pdlaunch.machine.gpu_links import NvmlError
from pdlaunch.machine.probe import NvmlFacts, read_nvml_facts
from tests.machine.test_gpu_links import A, B, Card, FakeNvml

GPUS = (Gpu(0, "NVIDIA H200", pci_bus_id=A), Gpu(1, "NVIDIA H200", pci_bus_id=B))


def read(nvml, gpus=GPUS, folder=None):
    return (
        read_nvml_facts(gpus, lambda: nvml, folder)
        if folder
        else read_nvml_facts(gpus, lambda: nvml)
    )


def test_what_nvml_says(tmp_path):
    for address, node in ((A, "0\n"), (B, "-1\n")):
        (tmp_path / address).mkdir()
        (tmp_path / address / "numa_node").write_text(node)
    nvml = FakeNvml({A: Card(free_bytes=5 << 30), B: Card()})
    found = read(nvml, folder=tmp_path)
    assert [gpu.free_memory_bytes for gpu in found.gpus] == [5 << 30, 130 << 30]
    assert [gpu.numa_node for gpu in found.gpus] == [0, None]
    assert found.driver_version == "580.82.07"
    ((link),) = found.links
    assert link == LinkedGpus(0, 1, "NVLink", link.gigabytes_per_s)
    assert 478 < link.gigabytes_per_s < 479
    assert nvml.open_count == 0


def test_a_slice_has_no_free_memory_of_its_own():
    (gpu,) = read(FakeNvml(), (Gpu(0, "NVIDIA H200 MIG 1g.18gb", pci_bus_id=A),)).gpus
    assert gpu.free_memory_bytes is None


def test_without_nvml_the_gpus_are_as_they_were():
    def load():
        raise NvmlError("no NVML")

    assert read_nvml_facts(GPUS, load) == NvmlFacts(GPUS)


def test_old_drivers_say_less():
    missing = ("nvmlDeviceGetMemoryInfo", "nvmlSystemGetDriverVersion")
    found = read(FakeNvml(missing=missing))
    assert found.driver_version is None
    assert [gpu.free_memory_bytes for gpu in found.gpus] == [None, None]
    assert len(found.links) == 1


def test_a_gpu_that_nvml_does_not_know():
    found = read(FakeNvml({A: Card()}))
    assert [gpu.free_memory_bytes for gpu in found.gpus] == [130 << 30, None]
    assert found.links == ()
