"""GPUs by name: memory, peak bf16 arithmetic (dense) and memory bandwidth, as their makers print them."""

from __future__ import annotations

from dataclasses import dataclass

from laavit.registry import UserError, nearest


@dataclass(frozen=True)
class Machine:
    """One GPU. memory: bytes. flops: peak bf16 FLOP/s without sparsity. bandwidth: of its memory, bytes/s."""

    memory: float
    flops: float
    bandwidth: float


#: a name -> what its data sheet says; figures "with sparsity" there are halved here
MACHINES = {
    # NVIDIA A100 Tensor Core GPU datasheet (2021): 312 TFLOPS, 40 GB at 1,555 GB/s, 80 GB (SXM) at 2,039 GB/s
    "a100-40gb": Machine(40e9, 312e12, 1.555e12),
    "a100": Machine(80e9, 312e12, 2.039e12),
    "a100-80gb": Machine(80e9, 312e12, 2.039e12),
    # NVIDIA H100 Tensor Core GPU datasheet (2023): SXM 1,979 TFLOPS with sparsity, 80 GB at 3.35 TB/s; PCIe 1,513
    # and 2 TB/s
    "h100": Machine(80e9, 989.5e12, 3.35e12),
    "h100-pcie": Machine(80e9, 756.5e12, 2.0e12),
    # NVIDIA H200 Tensor Core GPU datasheet (2024): as H100 SXM, 141 GB at 4.8 TB/s
    "h200": Machine(141e9, 989.5e12, 4.8e12),
    # NVIDIA DGX B200 datasheet (2025), a GPU of eight: 2,250 TFLOPS dense, 180 GB, 8 TB/s
    "b200": Machine(180e9, 2250e12, 8.0e12),
    # NVIDIA L40S datasheet (2023): 733 TFLOPS with sparsity, 48 GB at 864 GB/s
    "l40s": Machine(48e9, 366e12, 0.864e12),
    # NVIDIA L4 datasheet (2023): 242 TFLOPS with sparsity, 24 GB at 300 GB/s
    "l4": Machine(24e9, 121e12, 0.3e12),
    # NVIDIA A10G as AWS offers it (NVIDIA A10 datasheet, 2021, 125 TFLOPS; A10G 70): 24 GB at 600 GB/s
    "a10g": Machine(24e9, 70e12, 0.6e12),
    # NVIDIA Ada GPU architecture whitepaper (2022), RTX 4090: 165.2 TFLOPS with float32 accumulation, 24 GB, 1,008 GB/s
    "rtx4090": Machine(24e9, 165.2e12, 1.008e12),
    # AMD Instinct MI300X data sheet (2023): 1,307.4 TFLOPS, 192 GB at 5.3 TB/s
    "mi300x": Machine(192e9, 1307.4e12, 5.3e12),
}


def machine(name: str) -> Machine:
    """A GPU by name, capitals or not.

    Raises:
        UserError: it is none of the table's.
    """
    if name.lower() not in MACHINES:
        raise UserError(f"--gpu: no GPU is called '{name}' here; {nearest(name.lower(), MACHINES)}")
    return MACHINES[name.lower()]
