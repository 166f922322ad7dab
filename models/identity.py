"""What a base is, by name: all of it that decides on a result, so that a change can be told and nothing stale is used.

A run's checkpoints, class pictures, latent caches and evaluations keep it, and compare. It is JSON: {"family": ...,
"scheduler": {...}, "tokenizer": {...}, "unet": {field: value, "weights": digest}, "vae": {...}, ...}.
"""

import hashlib
import importlib.metadata
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from controlbooth.models.families import Family

ORIGIN = ("transformers_version", "dtype", "torch_dtype")
"""Where a network was loaded from, by which version and as what dtype is not what it is."""


def weights_digests(root: Path, files: Mapping[str, Iterable[Path]]) -> tuple[str, dict[str, str]]:
    """Computes SHA-256 in hex over names and bytes of all files, and part -> the same over the files of that part.

    root: the names are relative to it, so a base may be moved. files: part -> its files.
    """
    one = {file: _file_digest(file) for group in files.values() for file in group}

    def total(paths: Iterable[Path]) -> str:
        digest = hashlib.sha256()
        for path in sorted(paths):
            digest.update(f"{path.relative_to(root).as_posix()} ".encode())
            digest.update(one[path])
        return digest.hexdigest()

    return total(one), {part: total(group) for part, group in files.items()}


def _file_digest(file: Path) -> bytes:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def base_identity(
    family: Family,
    modules: Mapping[str, nn.Module],
    tokenizers: Iterable[Any],
    process: Any,
    scheduler_class: str,
    zero_empty_prompt: bool,
    digests: Mapping[str, str],
) -> dict[str, Any]:
    """Returns all that the results of a base depend on, as a tree of JSON values.

    modules: by the names of their folders. digests: of their weights, by the same names, or "file" for a single file.
    scheduler_class: as its file names it, "" where there is none.
    """
    identity: dict[str, Any] = {
        "family": family.name,
        "scheduler": {"class": scheduler_class, **process.facts()},
        "force_zeros_for_empty_prompt": zero_empty_prompt,
    }
    for name, tokenizer in zip(family.tokenizers, tokenizers, strict=True):
        identity[name] = tokenizer_facts(tokenizer)
    for name, module in modules.items():
        identity[name] = module_config(module) | ({"weights": digests[name]} if name in digests else {})
    if "file" in digests:
        identity["file"] = {"weights": digests["file"]}
    return json.loads(json.dumps(identity, default=str))  # as it will be read again: tuples are lists


def module_config(module: Any) -> dict[str, Any]:
    """Returns a network's configuration, with the defaults of what its file leaves out, and without its origin."""
    config = module.config
    tree = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    return {name: value for name, value in tree.items() if not name.startswith("_") and name not in ORIGIN}


def module_digest(module: nn.Module) -> str:
    """Computes blake2b in hex, 16 digits, of a module's configuration and of its weights as they are loaded.

    Names, dtypes and shapes of the weights are part of it.
    """
    digest = hashlib.blake2b(digest_size=8)
    digest.update(json.dumps(module_config(module), sort_keys=True, default=str).encode())
    for name, tensor in sorted(module.state_dict().items()):
        data = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(f"{name} {data.dtype} {tuple(tensor.shape)}".encode())
        digest.update(data.view(torch.uint8).numpy())
    return digest.hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """Computes blake2b in hex, 16 digits, of a tokenizer's rules, maximum length, padding token and sides.

    Sides are those of padding and truncation. The padding that its last call left behind is not part of it.
    """
    tree = json.loads(tokenizer.backend_tokenizer.to_str())
    tree |= {"truncation": None, "padding": None, "length": tokenizer.model_max_length}
    filling = (tokenizer.pad_token_id, tokenizer.padding_side, tokenizer.truncation_side)
    if filling != (tokenizer.eos_token_id, "right", "right"):  # the usual one was not noted before this was
        tree["filling"] = filling
    return hashlib.blake2b(json.dumps(tree, sort_keys=True).encode(), digest_size=8).hexdigest()


def tokenizer_facts(tokenizer: Any) -> dict[str, Any]:
    """Returns what decides on the tokens of a prompt: the rules, the length, the padding token, and the sides.

    The sides say at which end a short prompt is padded and a long one is cut.
    """
    return {
        "rules": tokenizer_digest(tokenizer),
        "model_max_length": tokenizer.model_max_length,
        "pad_token": tokenizer.pad_token,
        "pad_token_id": tokenizer.pad_token_id,
        "padding_side": tokenizer.padding_side,
        "truncation_side": tokenizer.truncation_side,
    }


def libraries() -> dict[str, str]:
    """Returns name -> version of the libraries that compute the results; another version may round otherwise."""
    return {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers", "tokenizers")}


def identity_digest(identity: Mapping[str, Any]) -> str:
    """Computes SHA-256 in hex of an identity, to name a folder or a file by."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Lists (name, value before, value now) of everything that both identities of a base state and that differs.

    What only one of them states is passed over: a field that a newer library has added, or weights that were not read.
    A part that only one of them has is of another family, and that is told; except T5, which SD3 may do without, and
    the precision of a frozen base, which is that of the engine where it is not stated.
    """
    found = []
    for name in before.keys() & now.keys() - {FROZEN}:
        one, other = before[name], now[name]
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            shared = [field for field in one if field in other]
            found += [
                (_field_title(name, field), one[field], other[field]) for field in shared if one[field] != other[field]
            ]
        elif one != other:
            found.append((name, one, other))
    if before and now and (T5 in before) != (T5 in now):
        found.append((T5, *("there" if T5 in one else "left out" for one in (before, now))))
    if before and now and before.get(FROZEN, "engine") != now.get(FROZEN, "engine"):
        found.append((FROZEN, *(one.get(FROZEN, "engine") for one in (before, now))))
    return sorted(found, key=lambda difference: (difference[0] not in FIRST, difference[0]))


T5 = "text_encoder_3"
FROZEN = "model.frozen.precision"
"""Stated where it is not that of the engine."""
FIRST = ("family", "prediction_type")
"""What is told first."""


def _field_title(part: str, field: str) -> str:
    """Gives a field's name in messages: "prediction_type", "scheduler class", "vae scaling_factor", "unet weights"."""
    if field == "weights":
        return "weights" if part == "file" else f"{part} weights"
    if part == "scheduler" and field != "class":
        return field
    return f"{part} {field}"


def describe_differences(found: Iterable[tuple[str, Any, Any]], when: str, now: str = "is") -> str:
    """Describes differences in words for a message.

    Such as "the base's prediction_type was v_prediction at step 2 and is epsilon; its vae scaling_factor ...". At most
    four are described, and the others counted. when: such as "at step 2". now: what is said before the present values.
    """
    told = [f"{name} was {_shown(before)} {when} and {now} {_shown(value)}" for name, before, value in found]
    more = f"; and {len(told) - 4} more" if len(told) > 4 else ""
    return f"the base's {'; its '.join(told[:4])}{more}"


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) < 64 and not _is_hex(text) else f"{text[:12]}…"


def _is_hex(text: str) -> bool:
    return len(text) == 64 and set(text) <= set("0123456789abcdef")
