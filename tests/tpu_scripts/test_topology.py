"""Accelerator types, against tables of Google's documentation."""

import doctest

import pytest

# https://cloud.google.com/tpu/docs/v5p, "most common single-slice shapes": shape, TensorCores (the number of the type), chips, machines.
V5P = [
    ("2x2x1", 8, 4, 1),
    ("2x2x2", 16, 8, 2),
    ("2x4x4", 64, 32, 8),
    ("4x4x4", 128, 64, 16),
    ("4x4x8", 256, 128, 32),
    ("4x8x8", 512, 256, 64),
    ("8x8x8", 1024, 512, 128),
    ("8x8x16", 2048, 1024, 256),
    ("8x16x16", 4096, 2048, 512),
    ("16x16x16", 8192, 4096, 1024),
    ("16x16x24", 12288, 6144, 1536),
]
# Accelerator type, VMs, chips a VM: GoogleCloudPlatform/applied-ai-engineering-samples, tpu-training-on-gke, table of v5e slices.
V5E = [
    (4, "2x2", 1, 4),
    (8, "2x4", 1, 8),
    (16, "4x4", 4, 4),
    (32, "4x8", 8, 4),
    (64, "8x8", 16, 4),
    (128, "8x16", 32, 4),
    (256, "16x16", 64, 4),
]


@pytest.mark.parametrize(("shape", "cores", "chips", "machines"), V5P)
def test_v5p_is_as_documented(modules, shape, cores, chips, machines):
    found = modules.topology.topology(f"v5p-{cores}")
    assert (found.shape, found.chips, found.hosts, found.chips_per_host) == (shape, chips, machines, 4)


@pytest.mark.parametrize(("chips", "shape", "hosts", "each"), V5E)
@pytest.mark.parametrize("prefix", ["v5litepod", "v6e"])
def test_v5e_and_v6e_are_as_documented(modules, prefix, chips, shape, hosts, each):
    found = modules.topology.topology(f"{prefix}-{chips}")
    assert (found.shape, found.chips, found.hosts, found.chips_per_host) == (shape, chips, hosts, each)


def test_runtime_versions_are_as_documented(modules):
    # https://cloud.google.com/tpu/docs/runtimes
    documented = {
        "v6e-8": "v2-alpha-tpuv6e",
        "v5p-8": "v2-alpha-tpuv5",
        "v5litepod-8": "v2-alpha-tpuv5-lite",
        "v4-8": "tpu-ubuntu2204-base",
    }
    assert {name: modules.topology.topology(name).runtime_version for name in documented} == documented


def test_tpu7x_is_of_gke_only_and_shows_two_devices_a_chip(modules):
    found = modules.topology.topology("tpu7x-128")
    assert (found.gke_only, found.chips, found.hosts, found.devices, found.mesh) == (True, 64, 16, 128, "sweep=16,data=8")
    assert found.machine_type == "tpu7x-standard-4t"


def test_all_sizes_fit_together(modules):
    topology = modules.topology
    for generation in topology.GENERATIONS:
        for chips, shape in topology._shapes(generation.cubes).items():
            found = topology.topology(f"{generation.prefix}-{chips * generation.cores_per_chip}")
            sides = [int(side) for side in shape.split("x")]
            sweep, data = (int(axis.partition("=")[2]) for axis in found.mesh.split(","))
            assert found.hosts * found.chips_per_host == chips == _product(sides)
            assert sweep * data == found.devices
            assert all(side <= 4 or side % 4 == 0 for side in sides) or generation.cubes == 0


def _product(numbers):
    product = 1
    for number in numbers:
        product *= number
    return product


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("v5litepod-12", "Nearest: v5litepod-8 (8 chips), v5litepod-16 (16 chips)."),
        ("v5litepod-512", "Nearest: v5litepod-256 (256 chips)."),
        ("v4-10", "Nearest: v4-8 (4 chips), v4-16 (8 chips)."),
        ("v4-2", "Nearest: v4-8 (4 chips)."),
        ("v5p-9", "9 TensorCores"),
        # 67 cubes have no box with sides of at most 256 chips.
        ("tpu7x-8576", "Nearest: tpu7x-8448 (4224 chips), tpu7x-8704 (4352 chips)."),
        ("v5e-16", "Did you mean v5litepod-16?"),
        ("ironwood-8", "Did you mean tpu7x-8?"),
        ("V6E-8", "Did you mean v6e-8?"),
        ("v3-8", "Known: v4-N (v4)"),
        ("v5p", "Known: "),
        ("v5p-0", "v5p-0"),
        ("v5p--8", "v5p--8"),
        ("", "''"),
    ],
)
def test_what_cannot_be_had_is_refused_with_what_can(modules, name, words):
    with pytest.raises(ValueError, match=r".") as refused:
        modules.topology.topology(name)
    assert words in str(refused.value)


def test_checking_gke_types_or_nowhere_is_refused(script):
    assert "not a type of the Cloud TPU API" in script("topology.py", "tpu7x-8", "--check", "--zone", "z", "--project", "p").stderr
    assert "--zone and --project" in script("topology.py", "v4-8", "--check").stderr


@pytest.mark.parametrize("name", ["topology", "configuration", "signs", "cost", "babysit", "worker_main"])
def test_examples_in_docstrings_run(modules, name):
    failed, _ = doctest.testmod(getattr(modules, name), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert failed == 0
