"""Know what accelerators have: memory, arithmetic in bfloat16 and float32, memory and link speed. From data sheets.

Arithmetic is dense (without sparsity), on tensor cores; float32 is TF32 where torch uses it only on request, so that
plain float32 is meant. Links are one direction: half of what a data sheet calls bidirectional.
"""

from __future__ import annotations

from dataclasses import dataclass

from trainer.plan.checkpoint_configs import PlanError

_GB, _T = 10**9, 10**12
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Accelerator:
    """A GPU, or the CPUs of a host. memory_bytes: what a process can use of it, after the driver's part.

    link: to the other GPUs of a host, network: to other hosts; bytes/s of each GPU in one direction.
    """

    name: str
    memory_bytes: int
    bfloat16_flops: float
    float32_flops: float
    hbm_bytes: float
    link_bytes: float
    network_bytes: float
    source: str

    def flops(self, itemsize: int) -> float:
        return self.bfloat16_flops if itemsize < 4 else self.float32_flops


_NETWORK = 50.0  # GB/s: one 400 Gbit/s port for each GPU, as in DGX H100, H200 and B200

# fmt: off
_ROWS = (
    # name, torch's name has, GiB usable, TFLOP/s bf16, TFLOP/s fp32, HBM GB/s, link GB/s, network GB/s, source
    ("h100", "H100", 79.1, 989.5, 66.9, 3350, 450, _NETWORK, "NVIDIA H100 SXM5 data sheet"),
    ("h200", "H200", 139.8, 989.5, 66.9, 4800, 450, _NETWORK, "NVIDIA H200 SXM data sheet"),
    ("b200", "B200", 178.0, 2250, 75, 8000, 900, _NETWORK, "NVIDIA DGX B200 data sheet, an eighth of it"),
    ("a100-80", "A100", 79.2, 312, 19.5, 2039, 300, 25.0, "NVIDIA A100 80GB SXM data sheet; 200 Gbit/s a GPU"),
    ("l40s", "L40S", 44.4, 362, 91.6, 864, 32, 12.5, "NVIDIA L40S data sheet; PCIe 4.0 x16, 100 Gbit/s"),
    ("rtx-4090", "4090", 23.5, 165.2, 82.6, 1008, 32, 1.25, "NVIDIA Ada whitepaper; PCIe 4.0 x16, 10 Gbit/s"),
)
# fmt: on
ACCELERATORS = {
    name: Accelerator(name, int(gib * GIB), bf16 * _T, fp32 * _T, hbm * _GB, link * _GB, net * _GB, source)
    for name, _, gib, bf16, fp32, hbm, link, net, source in _ROWS
}
_CORE_FLOPS = 100e9  # of a core with AVX-512: two multiply-adds of 16 float32 a cycle, at some 1.6 GHz
_CORE_BYTES = 5e9


def accelerator(name: str) -> Accelerator:
    """Return the accelerator of this name. Raise PlanError with the names that there are."""
    if name not in ACCELERATORS:
        raise PlanError(f"accelerator {name!r} is unknown; there are: {', '.join(ACCELERATORS)}")
    return ACCELERATORS[name]


def named_by_torch(device_name: str) -> Accelerator | None:
    """Return the accelerator that torch calls so, None if the table has none.

    >>> named_by_torch("NVIDIA H100 80GB HBM3").name
    'h100'
    """
    return next((ACCELERATORS[name] for name, part, *_ in _ROWS if part in device_name), None)


def host(memory_bytes: int, num_threads: int) -> Accelerator:
    """Return what a worker on a CPU has, as an accelerator; its memory is the whole host's."""
    flops, moved = num_threads * _CORE_FLOPS, num_threads * _CORE_BYTES
    return Accelerator("cpu", memory_bytes, flops, flops, moved, moved, moved, "this host; 100 GFLOP/s a core assumed")
