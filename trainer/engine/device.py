"""Names the device that a rank computes on."""

import platform
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch  # takes seconds, and plans of other machines do without


def device_name(device: "torch.device") -> str:
    """Returns what PyTorch calls a GPU, as `NVIDIA A100-SXM4-80GB`, or what Linux calls a processor, as `AMD EPYC
    9B14`."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text().splitlines() if listed.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
