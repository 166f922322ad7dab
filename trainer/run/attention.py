"""Chooses attention kernels once for a run and notes them in attention.json, so that every start takes the same."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict

from controlbooth.data.files.records import is_mapping, is_text, maybe, read_note
from controlbooth.models.attention import KERNELS, AttentionChoice, AttentionShape, choose_attention
from controlbooth.trainer.engine import deepspeed as engines
from controlbooth.trainer.engine.distributed import World, from_first_rank
from controlbooth.trainer.run.attempt import Attempt, write_text

ATTENTION = {
    "name": lambda name: name in ("xformers", *KERNELS),
    "reason": maybe(is_text),
    "by_shape": maybe(lambda chosen: is_mapping(chosen) and all(name in KERNELS for name in chosen.values())),
}
"""Fields of attention.json."""


def choose_once(
    request: str,
    world: World,
    precision: str,
    attempt: Attempt,
    shapes: Callable[[], Sequence[AttentionShape]],
    kernels: Sequence[str] = ("xformers", *KERNELS),
) -> AttentionChoice:
    """Chooses the attention kernels on rank 0, with `auto` only at the run's first start, since other kernels round
    otherwise. Returns the choice on every rank.

    attention.json is a note of that choice: where it is damaged, a warning is printed and the kernels are chosen anew.
    """
    remembered = attempt.run / "attention.json"
    chosen = None
    if world.rank == 0:
        before = read_note(remembered, "The kernels are chosen anew", ATTENTION) if request == "auto" else {}
        dtype = engines.DTYPES[precision]
        chosen = asdict(choose_attention(before.get("name", request), world.device, dtype, shapes(), kernels))
        if before:
            chosen |= {"by_shape": before.get("by_shape") or {}, "reason": "as at the run's first start"}
        write_text(attempt, remembered, json.dumps({**chosen, "reason": before.get("reason") or chosen["reason"]}))
    return AttentionChoice(**from_first_rank(chosen))
