"""Prints the peak of the host's memory while a network of 1 GiB in float32 is loaded in bfloat16.

    python tests/benchmarks/loading_memory.py

A fresh process loads it, so that nothing else has raised the peak (VmHWM of Linux, which counts mapped pages too).
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

MIB = 2**20
WIDTH, BLOCKS = 1536, 4


def write(folder: Path) -> None:
    """Writes an SD3 transformer with few blocks, its position table small, and values that compress to nothing."""
    import torch
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    SD3Transformer2DModel(
        num_layers=BLOCKS, attention_head_dim=64, num_attention_heads=WIDTH // 64, caption_projection_dim=WIDTH,
        pos_embed_max_size=64, sample_size=64,
    ).save_pretrained(folder, max_shard_size="20GB")  # fmt: skip


def status(field: str) -> float:
    """Returns a field of this process's status in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def load(folder: Path) -> None:
    import torch
    from diffusers import SD3Transformer2DModel

    from controlbooth.models.files.loading import empty_module, load_module

    empty_module(SD3Transformer2DModel, folder)  # what the libraries take for themselves is not the weights'
    before, begun = status("VmHWM"), time.perf_counter()
    network = load_module(SD3Transformer2DModel, folder, torch.bfloat16, "diffusion_pytorch_model")
    seconds, after = time.perf_counter() - begun, status("VmHWM")
    own = sum(tensor.nbytes for tensor in network.state_dict().values()) / MIB
    largest = 2 * max(tensor.nbytes for tensor in network.state_dict().values()) / MIB
    file = sum(one.stat().st_size for one in folder.glob("*.safetensors")) / MIB
    print(
        f"file {file:.0f} MiB, weights {own:.0f} MiB, largest tensor of the file {largest:.0f} MiB; peak RSS "
        f"{before:.0f} MiB before loading and {after:.0f} MiB after: {after - before:.0f} MiB more, in {seconds:.1f} s"
    )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        load(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as name:
            write(Path(name))
            subprocess.run([sys.executable, __file__, name], check=True)
