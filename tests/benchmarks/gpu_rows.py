"""The rows of gpu.py: which there are, how they are kept in a file, and how they are shown. Without torch."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """What one row measures."""

    family: str
    """A name of architectures.PUBLISHED; in small the built-in miniature, or a tiny base of tests/support/bases.py."""
    resolution: int
    micro_batch_size: int
    precision: str = "bf16"
    attention: str = "auto"
    gradient_checkpointing: bool = False
    cached: bool = True
    """Latents and text from a latent cache instead of encoders in the step."""
    settings: str = "default"
    """A name of gpu_settings.SETTINGS."""
    work: str = "speed"
    """`speed`, or `waits`: where the host waits for the device in a step."""
    seconds: float = 45.0
    """It may take so long; the first of its base also START_SECONDS more."""

    @property
    def name(self) -> str:
        """Returns what it measures, in words: rows of one name are one row."""
        words = [self.precision, f"micro-batch {self.micro_batch_size}", "cached" if self.cached else "encoders"]
        words += ["gradient checkpointing"] * self.gradient_checkpointing
        words += [f"attention {self.attention}"] * (self.attention != "auto")
        words += [self.settings] * (self.settings != "default")
        words += ["waits"] * (self.work == "waits")
        return f"{self.family} {self.resolution} px, {', '.join(words)}"


START_SECONDS = 120.0
"""For the libraries, a base with random weights and its engine."""

SD15 = Case("sd15", 512, 8)
SDXL = Case("sdxl", 1024, 4, seconds=75.0)
AIMS = {replace(SD15, micro_batch_size=1): 12.0, SD15: 105.0, replace(SD15, micro_batch_size=32): 122.0}
"""Samples/s on one H200."""
FOOTNOTES = (
    "Aims hold for an H200 with deterministic kernels: at least 12 samples/s at micro-batch 1, 105 at 8 and 122 at 32 "
    "(30 and 35 % of the 790 TFLOP/s that it reaches in one large product), then 157 (45 %). NVIDIA's MLPerf Training "
    "4.0, Stable Diffusion 2, cached, each of 8 H200: 128.3 samples/s of 2.41 TFLOP, 39 %.\n\n"
    "`of GEMM`, `of peak`: products that training asks for (ControlNet and base, without encoders and without any done "
    "twice) as a share of one large product, and of the card's data sheet. `planned`: what `controlbooth plan` counts "
    "for the tensors of one rank."
)


def sized(case: Case, *sizes: int) -> list[Case]:
    return [replace(case, micro_batch_size=size) for size in sizes]


def cases() -> list[Case]:
    """Lists all rows, the most telling first; within that, those of one base beside each other."""
    online, large, fp32 = (
        replace(SD15, cached=False),
        replace(SD15, micro_batch_size=32),
        replace(SD15, precision="fp32", seconds=60.0),
    )
    switched = ("not deterministic", "channels_last", "compile", "all of these")
    return [
        *sized(SD15, 8, 32, 1),
        replace(SD15, work="waits"),
        *sized(online, 8, 32, 1),
        *(replace(case, settings=name) for name in switched for case in (SD15, large)),
        *(replace(fp32, settings=name) for name in ("default", "TF32")),
        SDXL,
        Case("sd35-medium", 1024, 4, seconds=90.0),
        Case("flux-dev", 1024, 1, gradient_checkpointing=True, seconds=120.0),
        *sized(SDXL, 1, 8),
        replace(SDXL, cached=False),
        replace(SDXL, settings="all of these"),
        replace(online, work="waits"),
        *sized(SD15, 16, 4, 64),
        replace(SD15, gradient_checkpointing=True),
        *sized(replace(SD15, gradient_checkpointing=True), 16, 64),
        *(replace(SD15, attention=name) for name in ("flash", "cudnn", "efficient", "xformers", "math")),
        *sized(replace(SDXL, resolution=512), 8, 16, 32),
    ]


def small_cases() -> list[Case]:
    """Lists the rows of a machine without a GPU: each kind once, on bases that a CPU runs in no time."""
    tiny = Case("miniature", 64, 2, precision="fp32", seconds=120.0)
    return [
        *sized(tiny, 2, 4, 1),
        replace(tiny, work="waits"),
        replace(tiny, cached=False),
        *(
            replace(tiny, settings=name)
            for name in ("not deterministic", "channels_last", "compile", "all of these", "TF32")
        ),
        replace(tiny, attention="cudnn"),
        replace(tiny, attention="math", gradient_checkpointing=True),
        replace(tiny, family="sd3", micro_batch_size=1),
        replace(tiny, family="flux", micro_batch_size=1, gradient_checkpointing=True),
        replace(tiny, family="flux", micro_batch_size=1, cached=False),
        replace(tiny, precision="bf16", micro_batch_size=1),
    ]


def is_larger(case: Case, other: Case) -> bool:
    """Tells whether a case is the other with a larger micro-batch, so that it needs more memory."""
    return case.micro_batch_size > other.micro_batch_size and case == replace(
        other, micro_batch_size=case.micro_batch_size
    )


def read_whole_rows(path: Path) -> list[Row]:
    """Reads the rows of a file, one JSON object a line, and takes away a last line that was cut off."""
    if not path.exists():
        return []
    kept = path.read_bytes()
    if kept and not kept.endswith(b"\n"):
        kept = kept[: kept.rfind(b"\n") + 1]
        path.write_bytes(kept)
    return [json.loads(line) for line in kept.splitlines()]


def append(path: Path, row: Row) -> None:
    """Adds a row, with one write to the disk's cache: what is cut off is no row before it."""
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


COLUMNS = ("row", "samples/s", "aim", "step, ms", "of GEMM", "of peak", "GiB", "planned", "remarks")


def markdown(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def head() -> str:
    return markdown(COLUMNS) + "\n" + markdown(["---"] * len(COLUMNS))


def line(row: Row) -> str:
    """Makes a row a line of the Markdown table."""
    aims = {case.name: aim for case, aim in AIMS.items()}
    share = {name: row.get(f"share_of_{name}") for name in ("gemm", "peak")}
    return markdown(
        [
            row["name"],
            _number(row.get("samples_per_second"), ".2f"),
            _number(aims.get(row["name"]), ".0f"),
            _number(row.get("step_seconds"), ".1f", 1000.0),
            *(_number(one, ".1f", 100.0, " %") for one in share.values()),
            _number(row.get("peak_memory_gib"), ".2f"),
            _number(row.get("planned_memory_gib"), ".2f"),
            _remarks(row),
        ]
    )


def table(rows: Iterable[Row]) -> str:
    return "\n".join([head(), *map(line, rows)])


def _number(value: float | None, form: str, times: float = 1.0, unit: str = "") -> str:
    return "" if value is None else f"{value * times:{form}}{unit}"


def _remarks(row: Row) -> str:
    remarks = [row["error"]] if "error" in row else []
    if "waits" in row:
        found = sorted(row["waits"].items(), key=lambda one: -one[1])
        remarks.append(f"{sum(row['waits'].values())} waits")
        remarks += [f"{count} at {place}" for place, count in found]
    if "passed" in row:
        remarks.append(f"{row['passed']} passed, {row['failed']} failed, {row['skipped']} skipped")
    if row.get("which"):
        remarks.append(f"failed: {', '.join(row['which'])}")
    if row.get("attention") == "auto" and "kernel" in row:
        remarks.append(f"attention {row['kernel']}")
    if row.get("skipped_steps"):
        remarks.append(f"{row['skipped_steps']} steps skipped")
    if "plan_error" in row:
        remarks.append(f"no plan: {row['plan_error']}")
    return "; ".join(remarks)
