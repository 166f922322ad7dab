"""Ways to damage the folder of a base model, for tests and for longer searches.

python tests/support/damaged_bases.py --examples 3000      # prints what was neither refused by name nor harmless
"""

import json
import shutil
from pathlib import Path
from typing import Any

from hypothesis import strategies as st


def files_of(base: Path) -> list[str]:
    return sorted(path.relative_to(base).as_posix() for path in base.rglob("*") if path.is_file())


def damages(base: Path) -> st.SearchStrategy[tuple[str, str, Any]]:
    """(file, what is done to it, with what) for files of this folder."""
    weights = [name for name in files_of(base) if name.endswith(".safetensors")]
    trees = [name for name in files_of(base) if name.endswith(".json")]
    return st.one_of(
        st.tuples(st.sampled_from(files_of(base)), st.just("delete"), st.none()),
        st.tuples(st.sampled_from(files_of(base)), st.just("cut"), st.floats(0.0, 0.999)),
        st.tuples(
            st.sampled_from(files_of(base)), st.just("byte"), st.tuples(st.floats(0.0, 0.999), st.integers(1, 255))
        ),
        st.tuples(
            st.sampled_from(files_of(base)), st.just("zeros"), st.tuples(st.floats(0.0, 0.999), st.integers(1, 64))
        ),
        st.tuples(st.sampled_from(weights), st.sampled_from(TENSOR_DAMAGES), st.integers(0, 10**6)),
        st.tuples(st.sampled_from(trees), st.just("field"), st.tuples(st.integers(0, 10**6), VALUES)),
        st.tuples(st.sampled_from(trees), st.just("no field"), st.integers(0, 10**6)),
    )


TENSOR_DAMAGES = ("drop", "rename", "extra", "transpose", "shorten", "integer", "nan", "infinite", "huge")
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 2000),
    st.floats(allow_nan=False),
    st.text(max_size=5),
    st.lists(st.integers(0, 64), max_size=3),
    st.just({}),
)


def apply(base: Path, damage: tuple[str, str, Any]) -> None:
    """Damages a folder in place."""
    name, kind, value = damage
    file = base / name
    if kind == "delete":
        file.unlink()
    elif kind == "cut":
        data = file.read_bytes()
        file.write_bytes(data[: int(value * len(data))])
    elif kind == "byte":
        data = bytearray(file.read_bytes())
        data[int(value[0] * len(data))] ^= value[1]
        file.write_bytes(data)
    elif kind == "zeros":
        data = bytearray(file.read_bytes())
        begin = int(value[0] * len(data))
        end = min(len(data), begin + value[1])
        data[begin:end] = bytes(end - begin)
        file.write_bytes(data)
    elif kind in TENSOR_DAMAGES:
        damage_tensor(file, kind, value)
    else:
        tree = json.loads(file.read_text())
        keys = sorted(tree) if isinstance(tree, dict) else []
        if keys:
            key = keys[(value if kind == "no field" else value[0]) % len(keys)]
            tree.pop(key) if kind == "no field" else tree.update({key: value[1]})
            file.write_text(json.dumps(tree))


def damage_tensor(file: Path, kind: str, number: int) -> None:
    """Damages one tensor of a safetensors file, the one of this number, counted around."""
    import torch
    from safetensors.torch import load_file, save_file

    weights = load_file(file)
    name = sorted(weights)[number % len(weights)]
    tensor = weights[name].clone()
    if kind == "drop":
        del weights[name]
    elif kind == "rename":
        weights[f"{name}.other"] = weights.pop(name)
    elif kind == "extra":
        weights["another.weight"] = torch.zeros(3)
    elif kind == "transpose":
        weights[name] = tensor[None]
    elif kind == "shorten":
        weights[name] = tensor[:-1].contiguous()
    elif kind == "integer":
        weights[name] = tensor.to(torch.int32)
    else:
        value = {"nan": float("nan"), "infinite": float("inf"), "huge": 1e30}[kind]
        weights[name] = tensor.float()
        weights[name].view(-1)[number % tensor.numel()] = value
    save_file(weights, file, metadata={"format": "pt"})


def outcome(original: Any, base: Path) -> str | None:
    """What is wrong with how a damaged copy of a base is taken; None where it is right.

    original: the Base of the folder before it was damaged. Right is a refusal by ValueError or OSError that names the
    folder, or a base with the weights of the original, or one whose identity says that it is another.
    """
    import torch

    from controlbooth.models.identity import differences
    from controlbooth.models.pretrained import load_base, parts_of

    try:
        loaded = load_base(base)
    except (ValueError, OSError) as error:
        return None if str(base) in str(error) else f"refused without a name: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if differences(original.identity, loaded.identity):
        return None
    for part, module in parts_of(loaded).items():
        expected = parts_of(original)[part].state_dict()
        found = module.state_dict()
        if found.keys() != expected.keys() or not all(torch.equal(found[name], expected[name]) for name in found):
            return f"other weights of {part} under the same identity"
    return None


def main() -> None:
    import argparse
    import logging
    import tempfile

    from bases import write_base
    from hypothesis import HealthCheck, Phase, given, settings

    from controlbooth.models.pretrained import load_base

    parser = argparse.ArgumentParser()
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--family", default="sdxl")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        whole = write_base(Path(place) / "whole", options.family)
        original = load_base(whole)

        @settings(max_examples=options.examples, deadline=None, phases=[Phase.generate], database=None,
                  suppress_health_check=list(HealthCheck))  # fmt: skip
        @given(damages(whole))
        def search(damage: tuple[str, str, Any]) -> None:
            base = Path(place) / "base"
            shutil.rmtree(base, ignore_errors=True)
            shutil.copytree(whole, base)
            apply(base, damage)
            wrong = outcome(original, base)
            if wrong:
                found.setdefault(f"{damage[0]} {damage[1]}: {wrong[:200]}", damage)

        search()
    for wrong, damage in found.items():
        print(wrong, damage)
    print(f"{len(found)} kinds of findings in {options.examples} examples")


if __name__ == "__main__":
    main()
