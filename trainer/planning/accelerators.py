"""Cards that a run can be planned for: what they reach at most, what they hold and what an hour of one costs.

Rates are those of the makers' data sheets, dense (without structured sparsity). Prices are rounded list prices of
on-demand rental from specialised clouds as of PRICES_OF, in US dollars; they differ by a factor of 2.5 between sellers,
so give your own with --price. Network speeds between nodes are those of a usual server with such cards, not a property
of the card: give your own with --network-gbit.
"""

import os
import re
import time
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING

import psutil

from controlbooth.data.errors import UserError
from controlbooth.trainer.engine.device import device_name

if TYPE_CHECKING:  # `controlbooth plan` names the cards in its help, before torch is imported
    pass

PRICES_OF = "May 2026"
STORAGE_GBIT = 40.0
"""Of the storage that all nodes read from together. An assumption; --storage-gbit."""


@dataclass(frozen=True)
class Accelerator:
    name: str
    title: str
    kind: str
    """cuda or cpu: how memory is counted. MI300X counts as cuda, whose interface PyTorch gives it."""
    half_flops: float
    """Operations a second in bf16 with fp32 accumulation, dense."""
    single_flops: float
    """The same in fp32; where PyTorch is told so, TF32 is faster."""
    memory_bytes: float
    memory_bandwidth: float
    """Bytes a second between the card and its memory."""
    node_bandwidth: float
    """Bytes a second that one card sends to others of its node."""
    network_bandwidth: float
    """Bytes a second that one card sends to other nodes."""
    cards_per_node: int
    price: float
    """Dollars an hour."""


@dataclass(frozen=True)
class Layout:
    """Cards that work together."""

    accelerator: Accelerator
    nodes: int
    processes_per_node: int

    @property
    def ranks(self) -> int:
        return self.nodes * self.processes_per_node


def with_nodes(layout: Layout, ranks: int) -> Layout:
    """Returns a layout of the same cards in another number: full nodes, or a part of one."""
    per_node = min(ranks, layout.accelerator.cards_per_node)
    return replace(layout, nodes=-(-ranks // per_node), processes_per_node=per_node)


def _card(
    name: str,
    title: str,
    half: float,
    single: float,
    gb: float,
    bandwidth: float,
    node: float,
    network: float,
    price: float,
    cards: int = 8,
) -> Accelerator:
    """Makes a card from the units of data sheets.

    half and single are in TFLOP/s, gb in GB, bandwidth and node in GB/s, network in Gbit/s of one card, price in
    dollars an hour.
    """
    speeds = (bandwidth * 1e9, node * 1e9, network * 1e9 / 8)
    return Accelerator(name, title, "cuda", half * 1e12, single * 1e12, gb * 1e9, *speeds, cards, price)


ACCELERATORS = {
    card.name: card
    for card in (
        # NVIDIA H100 Tensor Core GPU data sheet: SXM5, 989.4 TFLOP/s in bf16, 66.9 in fp32, 80 GB at 3.35 TB/s, NVLink
        # 4 with 900 GB/s both ways. PyTorch sees 79.6 GiB of it. DGX H100: one port of 400 Gbit/s a card. Price:
        # mercatus-ai.com/blog/cloud-gpu-pricing, 2.50 to 3.50 at specialised clouds, 3.50 to 5.00 at the three large.
        _card("h100", "NVIDIA H100 SXM 80 GB", 989.4, 66.9, 85.5, 3350, 450, 400, 3.00),
        # H200 data sheet: the same chip, 141 GB at 4.8 TB/s. Price: as above, 3.50 to 4.50.
        _card("h200", "NVIDIA H200 SXM 141 GB", 989.4, 66.9, 150.7, 4800, 450, 400, 4.00),
        # A100 data sheet: 312 in bf16, 19.5 in fp32; 40 GB at 1,555 GB/s and 80 GB at 2,039 GB/s; NVLink 3 with
        # 600 GB/s both ways; DGX A100: one port of 200 Gbit/s a card. Price of 80 GB: as above, 1.10 to 1.50; of 40 GB
        # an assumption.
        _card("a100-40", "NVIDIA A100 SXM 40 GB", 312, 19.5, 42.5, 1555, 300, 200, 1.00),
        _card("a100-80", "NVIDIA A100 SXM 80 GB", 312, 19.5, 85.1, 2039, 300, 200, 1.30),
        # L40S data sheet: 362 in bf16, 91.6 in fp32, 48 GB at 864 GB/s; PCIe 4.0 x16. Price: aihardwareindex.com/blog/
        # h100-vs-a100-vs-l40s-the-cost-per-token-analysis, December 2025, 0.87.
        _card("l40s", "NVIDIA L40S 48 GB", 362, 91.6, 47.7, 864, 25, 100, 0.87),
        # Ada GPU architecture white paper, appendix A: RTX 4090, 165.2 in bf16 with fp32 accumulation, 82.6 in fp32,
        # 24 GB at 1,008 GB/s; PCIe 4.0 x16 without peer access, so that traffic goes through the host. Price: an
        # assumption.
        _card("rtx4090", "NVIDIA GeForce RTX 4090 24 GB", 165.2, 82.6, 25.4, 1008, 12, 10, 0.40),
        # AMD Instinct MI300X data sheet: 1,307.4 in bf16, 163.4 in fp32, 192 GB at 5.3 TB/s, 7 links of 64 GB/s one
        # way. Price: an assumption. xformers and our kernels have not been tried there.
        _card("mi300x", "AMD Instinct MI300X 192 GB", 1307.4, 163.4, 206, 5300, 448, 400, 2.50),
    )
}


def accelerator(name: str, precision: str = "bf16") -> Accelerator:
    """Looks a card up in the table; `cpu` is this machine, which is measured.

    Raises UserError for any other name, with the nearest known one.
    """
    plain = name.lower().replace("_", "-")
    if plain == "cpu":
        return this_processor(precision)
    if plain not in ACCELERATORS:
        names = ", ".join((*ACCELERATORS, "cpu"))
        longer = [known for known in ACCELERATORS if plain and known.startswith(plain)]
        near = longer or get_close_matches(plain, ACCELERATORS, n=1, cutoff=0.4)
        hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        raise UserError(f"accelerator {name!r} is not known; {hint}Known: {names}")
    return ACCELERATORS[plain]


CARD_OF_SIZE = {24: "rtx4090", 40: "a100-40", 48: "l40s", 80: "h100", 141: "h200", 192: "mi300x"}
"""GB by which cards are called, and the card by whose speed one of that size is planned."""
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(gib|gb)", re.IGNORECASE)


def card_to_fit(text: str, like: str | None = None, precision: str = "bf16") -> Accelerator:
    """Finds the card that a size such as 24GiB or 80GB, or a card's own name, stands for.

    A size that cards are sold by stands for what PyTorch sees of such a card; any other is taken as it is, with the
    speed of the card next to it. like: the name of the card whose speed is meant. Raises UserError for what is neither.
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        try:
            return accelerator(text, precision)
        except UserError as error:
            raise UserError(f"--fit {text} is no size such as 24GiB or 80GB, and as a card: {error}") from None
    number, unit = float(found[1]), found[2].lower()
    if number == 0:
        raise UserError(f"--fit {text} is nothing: give the memory of one card, such as 24GiB")
    nearest_size = min(CARD_OF_SIZE, key=lambda size: abs(size - number))
    card = accelerator(like or CARD_OF_SIZE[nearest_size], precision)
    size = number * (2**30 if unit == "gib" else 1e9)
    return replace(card, memory_bytes=min(size, card.memory_bytes) if nearest_size == number else size)


def is_card(card: Accelerator, device: str) -> bool:
    """Tells whether a device of this name, as `device_name` gives it, is such a card.

    For a processor, tells whether the name is that of this machine's.
    """
    import torch

    if card.kind == "cpu":
        return device == device_name(torch.device("cpu"))
    model, _, memory = card.name.partition("-")
    words = re.split(r"[^a-z0-9]+", device.lower().replace("rtx ", "rtx"))
    return model in words and (not memory or f"{memory}gb" in words)


GLOO = 2e9
"""Bytes a second from rank to rank of one machine through gloo. An assumption: on two cores of an AMD EPYC, reducing
60 MB took 34 ms and gathering them 92."""


def this_processor(precision: str) -> Accelerator:
    """Measures this machine, as one rank sees it with the threads that it may use; takes half a second."""
    import torch

    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    left = torch.randn(1024, 1024).to(dtype)
    flops = 2 * 1024**3 / _best_seconds(lambda: left @ left)
    source = torch.zeros(2**25)
    copied = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / _best_seconds(lambda: copied.copy_(source))
    memory = float(psutil.virtual_memory().total)
    title = f"this machine's processor, {torch.get_num_threads()} threads of {os.cpu_count()} cores"
    return Accelerator("cpu", title, "cpu", flops, flops, memory, bandwidth, GLOO, 1e9 / 8, 1, 0.0)


def _best_seconds(work) -> float:
    seconds = []
    for _ in range(6):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return min(seconds)
