"""Filling networks from files: the one place where a weight gets into a module of a base, or of a ControlNet.

Every tensor of the module comes from its file. The libraries' own `from_pretrained` makes up what a file lacks, with a
line in the log, and reads as numbers whatever is in it; here a tensor that is missing, is not asked for, has another
shape, no floating dtype or values that are no numbers is refused by its name.

On the device "meta" everything but the values is checked from the files' headers alone: `load_module(..., empty=True)`.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from controlbooth.data.errors import UserError
from controlbooth.models.files.stored import Stored, stored_tensors
from controlbooth.models.files.weight_files import read_json, weights_files

Weight = Tensor | Stored

SPARE = re.compile(r"(.*\.)?position_ids|logit_scale|(vision_model|visual_projection|text_projection)\..+")
"""Tensors that a file may hold and a module not ask for: a buffer of older versions, and CLIP's other half."""
REMEDY = "Its download is incomplete, or its files are of different models: fetch the folder again"
NAMED = 4
"""So many tensors are named of each fault."""


def load_module(
    kind: Any, folder: Path, dtype: torch.dtype, stem: str, *, empty: bool = False, remedy: str = REMEDY
) -> Any:
    """Reads a network from its folder, every tensor from its files, on the CPU in `dtype` and in eval mode.

    kind: a class of diffusers or transformers. stem: as `weights_files` takes it. empty: shapes without memory, on the
    device "meta". remedy: what to do about tensors that do not fit. Raises FileNotFoundError and ValueError, naming
    file or folder, and the tensors.
    """
    files = weights_files(folder, stem)
    module = empty_module(kind, folder)
    fill(module, stored_tensors(files, empty), dtype, str(folder), remedy)
    return (module.to("meta") if empty else module).eval()


def empty_module(kind: Any, folder: Path) -> Any:
    """Builds the network of a folder's config.json: its parameters take no memory yet, its buffers do.

    Raises FileNotFoundError without that file, and ValueError if no network can be made of it.
    """
    config = read_json(folder / "config.json")
    try:
        with init_empty_weights(include_buffers=False):
            if hasattr(kind, "config_class") and kind.config_class is not None:  # of transformers
                return kind(kind.config_class.from_pretrained(folder, local_files_only=True))
            return kind.from_config(config)
    except Exception as error:  # whatever a library makes of a configuration that it cannot use
        raise UserError(
            f"{folder / 'config.json'} describes no {kind.__name__} that can be made "
            f"({type(error).__name__}: {error}). Fetch it again"
        ) from error


def read_tensors(files: Sequence[Path], empty: bool = False) -> dict[str, Tensor]:
    """Reads name -> tensor of all files together, on the CPU; with `empty` only their headers, on the device "meta".

    Raises ValueError as `stored_tensors`.
    """
    return {name: stored.read() for name, stored in stored_tensors(files, empty).items()}


def fill(
    module: nn.Module, weights: Mapping[str, Weight], dtype: torch.dtype, where: str, remedy: str = REMEDY
) -> None:
    """Makes `weights` the parameters of `module`, whose own may be on the meta device, in `dtype`.

    Every name and shape must match, all values must be numbers, in `dtype` too; what is on the meta device has none.
    Names that libraries have changed since are followed. What still lies in its file is read, converted and let go one
    tensor at a time. Raises ValueError with the tensors that do not fit.
    """
    parameters = module.state_dict(keep_vars=True)
    weights = _with_tied(_renamed(module, weights, where), parameters, getattr(module, "_tied_weights_keys", None))
    faults = _misfits(parameters, weights)
    if faults:
        raise UserError(f"{where} does not fit {type(module).__name__}: {', '.join(faults)}. {remedy}")
    ready: dict[str, Tensor] = {}
    once: dict[int, str] = {}  # a weight under two names is one tensor afterwards, too
    twins: dict[str, str] = {}
    born: list[str] = []
    wild: list[str] = []
    for name, weight in weights.items():
        first = once.setdefault(id(weight), name)
        if first in ready:
            ready[name], twins[name] = ready[first], first
            for faulty in (born, wild):
                faulty += [name] if first in faulty else []
            continue
        tensor = weight.read() if isinstance(weight, Stored) else weight
        # Buffers too, such as SD3's table of positions: diffusers rounds those that a file holds, and no others, and a
        # base that is read in bf16 everywhere else would see other places here.
        ready[name] = _own(tensor.to(dtype) if parameters[name].is_floating_point() else tensor)
        if not _is_finite(ready[name]):
            (wild if _is_finite(tensor) else born).append(name)
    if born or wild:
        why = "hold values that are no finite numbers" if born else f"hold values beyond the range of {_name(dtype)}"
        raise UserError(f"{where}: {_tensors(born or wild)} {why}. {remedy if born else 'Use bf16 or fp32'}")
    module.load_state_dict(ready, assign=True)
    for name, first in twins.items():  # one parameter again: two would each take memory on another device
        owner, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(owner), attribute, module.get_parameter(first))


def _own(tensor: Tensor) -> Tensor:
    """Copies a tensor that is a view of a larger storage, which would stay in memory; returns others unchanged."""
    return tensor if tensor.is_meta or tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _misfits(expected: Mapping[str, Tensor], found: Mapping[str, Weight]) -> list[str]:
    """Describes in phrases what is wrong with names, shapes and dtypes; of each fault it names at most NAMED
    tensors."""
    missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    both = [name for name in expected if name in found]
    shapes = [
        f"{name} has shape {tuple(found[name].shape)}, and {tuple(expected[name].shape)} is needed"
        for name in both
        if found[name].shape != expected[name].shape
    ]
    dtypes = [
        f"{name} has the dtype {_name(found[name].dtype)}, where numbers with a fraction belong"
        for name in both
        if expected[name].is_floating_point() and not found[name].is_floating_point()
    ]
    faults = [f"{_tensors(missing)} {_is(missing)} missing"] if missing else []
    faults += [f"{_tensors(unknown)} {_is(unknown)} unknown"] if unknown else []
    for group in (shapes, dtypes):
        faults += group[:NAMED] + ([f"and so with {len(group) - NAMED} others"] if len(group) > NAMED else [])
    return faults


def _renamed(module: Any, weights: Mapping[str, Weight], where: str) -> dict[str, Weight]:
    """Returns the weights under the names that the libraries use today, without those that the module does not need.

    diffusers has renamed the projections of a VAE's attention; transformers 5.6 took the prefix `text_model.` from one
    of CLIP's classes and left it to the other. Raises ValueError for a tensor that is there under two names.
    """
    renamed = dict(weights)
    if hasattr(module, "_fix_state_dict_keys_on_load"):
        module._fix_state_dict_keys_on_load(renamed)
    expected = module.state_dict().keys()
    ignored = [re.compile(one) for one in getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()]
    result: dict[str, Weight] = {}
    for name, tensor in renamed.items():
        names = (name, f"text_model.{name}", name.removeprefix("text_model."))
        known = next((one for one in names if one in expected), name)
        spare = SPARE.fullmatch(names[2]) is not None or any(one.search(name) for one in ignored)
        if known not in expected and spare:
            continue
        if known in result:
            raise UserError(f"{where} holds {known} twice, under two names: delete one of them")
        result[known] = tensor
    return result


def _with_tied(weights: dict[str, Weight], parameters: Mapping[str, Tensor], declared: Any) -> dict[str, Weight]:
    """Adds the missing name of each parameter that a module has under two names and a file under only one of them.

    declared: what a class of transformers says of it, name -> the other name. It is needed because both are separate
    parameters while they have no memory.
    """
    for name, other in declared.items() if isinstance(declared, Mapping) else ():
        one = next((one for one in (name, other) if one in weights), None)
        if one is not None and {name, other} <= parameters.keys():
            weights |= {each: weights[one] for each in (name, other) if each not in weights}
    names: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        names.setdefault(id(parameter), []).append(name)
    for tied in names.values():
        given = next((name for name in tied if name in weights), None)
        if given is not None:
            weights |= {name: weights[given] for name in tied if name not in weights}
    return weights


def _is_finite(tensor: Tensor) -> bool:
    """Tells whether all values are finite, without a copy of the tensor, except of 8-bit floats.

    Returns True for tensors that have no values, on the meta device, and for integers.
    """
    if tensor.is_meta or not tensor.numel() or not tensor.is_floating_point():
        return True
    if tensor.element_size() == 1:  # 8-bit floats have no arithmetic of their own
        tensor = tensor.float()
    return all(bool(end.isfinite()) for end in torch.aminmax(tensor))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _tensors(names: Sequence[str]) -> str:
    """Returns a phrase that names tensors, such as "the tensor a" or "3 tensors (a, b, c)"; NAMED of them at most."""
    if len(names) == 1:
        return f"the tensor {names[0]}"
    return f"{len(names)} tensors ({', '.join(names[:NAMED])}{', ...' if len(names) > NAMED else ''})"


def _is(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"
