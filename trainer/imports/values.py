"""Turns values of other trainers into those of fields. Raises ValueError, saying why, where there is no counterpart."""

import re
from collections.abc import Callable
from typing import Any

from controlbooth.data.errors import UserError

TRUE, FALSE = ("true", "1", "yes"), ("false", "0", "no", "none", "")


def switch(value: Any) -> bool:
    text = str(value).lower()
    if text not in (*TRUE, *FALSE):
        raise UserError("it is neither true nor false")
    return text in TRUE


def number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise UserError("it is no number") from None


def whole(value: Any) -> int:
    if (found := number(value)) != int(found):
        raise UserError("it is no whole number")
    return int(found)


def text(value: Any) -> str:
    return str(value)


def run_name(value: Any) -> str:
    """Makes a name that folders can have."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", str(value)).strip("-._")
    if not name:
        raise UserError("no folder can have such a name")
    return name


def side(value: Any) -> int:
    """Reads 512, "512,512" or [512, 512]; other shapes are of data.max_aspect_ratio."""
    sides = value if isinstance(value, list) else re.split(r"[,x ]+", str(value))
    found = {whole(one) for one in sides}
    if len(found) != 1:
        raise UserError("it is no square: set the side whose square has as many pixels, and data.max_aspect_ratio")
    return found.pop()


def one_of(**names: Any) -> Callable[[Any], Any]:
    """Makes a reader of names; those that are not listed have no counterpart."""

    def read(value: Any) -> Any:
        key = re.sub(r"[^a-z0-9]", "", str(value).lower())
        if key not in names:
            raise UserError(f"there is no counterpart; known are {', '.join(names)}")
        return names[key]

    return read


def where_on(on: Any) -> Callable[[Any], Any]:
    """Makes a reader of a switch: a value where it is on, None where it is off."""
    return lambda value: on if switch(value) else None


def prompts(value: Any) -> list[str]:
    return [str(one) for one in value] if isinstance(value, list) else [str(value)]


_OPTIMIZERS = dict(
    adamw="adamw", adamwbf16="adamw", adamw8bit="adamw8bit", bnbadamw8bit="adamw8bit", adafactor="adafactor",
    prodigy="prodigy", muon="muon",
)  # fmt: skip
READERS: dict[str, Callable[[Any], Any]] = {
    "switch": switch,
    "number": number,
    "whole": whole,
    "text": text,
    "path": text,
    "base": text,
    "output": text,
    "name": run_name,
    "side": side,
    "inverted": lambda value: not switch(value),
    "precision": one_of(no="fp32", fp16="fp16", bf16="bf16", fp32="fp32"),
    "schedule": one_of(constant="constant", constantwithwarmup="constant", linear="linear", cosine="cosine"),
    "optimizer": one_of(**_OPTIMIZERS),
    "adam8bit": where_on("adamw8bit"),
    "adafactor": where_on("adafactor"),
    "xformers": where_on("xformers"),
    "sdpa": where_on("auto"),
    "bucket": where_on(2.0),
    "density": one_of(none="uniform", uniform="uniform", logitnormal="logit-normal", mode="mode"),
    "threads": lambda value: max(1, whole(value)),
    "offload": one_of(cpu=True, none=False),
    "family": one_of(sd1x="sd15", sd2x="sd21", sdxl="sdxl", sd3="sd3", flux="flux"),
    "method": one_of(lora="lora", full="full"),
    "network": one_of(networkslora="lora"),
    "loratype": one_of(standard="lora"),
    "dynamo": lambda value: one_of(no=False, inductor=True)(value),
    "prompts": prompts,
    "preservation": lambda value: None if switch(value) else 0.0,
}
"""How a table says that a value is read -> the function. None stands for nothing to set."""
JOINT = ("beta1", "beta2", "blocks", "accumulation", "epochs")
"""Values of which several make one field: these are joined in runs.py."""
