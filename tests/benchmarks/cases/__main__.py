"""Prints a table of inputs that once failed: what version 0.1.0 did with each, and what is done now.

    .venv/bin/python tests/benchmarks/cases SHARED            all, in about ten minutes on 2 cores
    .venv/bin/python tests/benchmarks/cases SHARED alpha      those whose names hold this word
    .venv/bin/python tests/benchmarks/cases SHARED --list

SHARED is the folder of the scripts that make the inputs, with `inputs` and `integrity` in it; they are not part of
this repository. Exits with 1 where a case is not right.
"""

import argparse
import importlib
import subprocess
import sys
import tempfile
from pathlib import Path

from case import Case, Outcome, made  # of this folder, which is what python runs

AREAS = ("data_cases", "base_cases", "run_cases", "launch_cases")


def cases() -> list[Case]:
    """Returns all cases, in the order of the areas."""
    return [case for area in AREAS for case in importlib.import_module(area).CASES]


def outcome(shared: Path, case: Case, base: Path) -> Outcome:
    """Makes the input of a case and looks at what becomes of it now."""
    try:
        with made(shared, case, base) as place:
            return case.look(place)
    except subprocess.CalledProcessError as fault:
        return Outcome(False, f"the input could not be made: {fault}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    chosen = [case for case in cases() if not options.words or any(word in case.name for word in options.words)]
    if options.list:
        sys.exit("\n".join(f"{case.folder:10} {case.name}" for case in chosen))
    print("| case | before | now | right |\n| --- | --- | --- | --- |")
    wrong = 0
    with tempfile.TemporaryDirectory() as base:
        for case in chosen:
            seen = outcome(options.shared.resolve(), case, Path(base))
            wrong += not seen.right
            print(f"| {case.name} | {case.before} | {seen.now} | {'yes' if seen.right else '**no**'} |", flush=True)
    print(f"\n{len(chosen) - wrong} of {len(chosen)} are right")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
