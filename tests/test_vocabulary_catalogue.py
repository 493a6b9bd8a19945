"""Device types and links: enough of them, plausible, and found by the names that people and drivers use."""

import pytest

from hexgen.catalogue import DEVICE_TYPES, LINKS, canonical_name, default_link_name, lookup, lookup_link, scaled
from hexgen.errors import SpecError


def test_the_catalogue_is_wide() -> None:
    assert len(DEVICE_TYPES) >= 25
    wanted = """V100-16G V100-32G T4 A10G A40 A100-40G-SXM A100-80G-SXM H100-SXM H100-PCIe H200-SXM B200 L4 L40
        L40S A4000 A5000 A6000 RTX2080Ti RTX3090 RTX3090Ti RTX4080 RTX4090 RTX5090 MI300X cpu"""
    assert set(wanted.split()) <= set(DEVICE_TYPES)


@pytest.mark.parametrize("name", DEVICE_TYPES)
def test_figures_are_plausible(name: str) -> None:
    device = DEVICE_TYPES[name]
    assert device.name == name
    assert default_link_name(device) in LINKS
    if device.kind == "cpu":
        assert device.capability is None
        return
    assert device.memory_bytes % 10**9 == 0
    assert 6e9 <= device.memory_bytes <= 256e9
    assert 200e9 <= device.bandwidth_bytes_s <= 8000e9
    assert 15e12 <= device.fp16_flops <= 2500e12
    assert 4e12 <= device.fp32_flops <= 200e12
    assert device.fp16_flops > device.fp32_flops
    has_bf16 = device.kind == "rocm" or float(device.capability or "0") >= 8.0
    assert device.bf16_flops == (device.fp16_flops if has_bf16 else 0.0)


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("A100", "A100-40G-SXM"),
        ("a100-80g", "A100-80G-SXM"),
        ("NVIDIA A100-SXM4-80GB", "A100-80G-SXM"),
        ("NVIDIA A100-PCIE-40GB", "A100-40G-PCIe"),
        ("Tesla T4", "T4"),
        ("Tesla V100-SXM2-16GB", "V100-16G"),
        ("NVIDIA GeForce RTX 3090 Ti", "RTX3090Ti"),
        ("NVIDIA GeForce RTX 4090", "RTX4090"),
        ("NVIDIA RTX A6000", "A6000"),
        ("NVIDIA H100 80GB HBM3", "H100-SXM"),
        ("NVIDIA H200", "H200-SXM"),
        ("NVIDIA L40S", "L40S"),
        ("AMD Instinct MI300X", "MI300X"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX6000-Ada"),
        ("Quadro RTX 6000", "RTX6000"),
        ("CPU", "cpu"),
    ],
)
def test_names_as_people_and_drivers_write_them(name: str, canonical: str) -> None:
    assert canonical_name(name) == canonical
    assert lookup(name) is DEVICE_TYPES[canonical]


def test_unknown_names_get_a_suggestion() -> None:
    with pytest.raises(SpecError, match=r"here: unknown device type 'RTX3091' \(did you mean .*RTX3090"):
        lookup("RTX3091", "here")
    with pytest.raises(SpecError, match="describe your own"):
        lookup("toaster")
    with pytest.raises(SpecError, match="did you mean nvlink"):
        lookup_link("NVLink")


def test_node_figures_are_applied() -> None:
    gpu = scaled(DEVICE_TYPES["T4"], memory_bytes=8, speed=0.5, threads=None)
    assert (gpu.memory_bytes, gpu.bandwidth_bytes_s, gpu.fp16_flops) == (8, 160e9, 32.5e12)
    one, eight = (scaled(DEVICE_TYPES["cpu"], memory_bytes=None, speed=1.0, threads=n) for n in (1, 8))
    assert one == DEVICE_TYPES["cpu"]
    assert eight.fp32_flops == 8 * one.fp32_flops
    assert eight.bandwidth_bytes_s == 4 * one.bandwidth_bytes_s
