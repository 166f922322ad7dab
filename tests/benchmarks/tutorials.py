"""Runs every command of the tutorials that can run without a GPU or a cluster, in a smaller size.

    .venv/bin/python tests/benchmarks/tutorials.py                       all
    .venv/bin/python tests/benchmarks/tutorials.py first-controlnet      one of them

`make test` runs those of seconds; here are also those that train and draw. Each block of docs/tutorials/ says by a
comment which it is, and with which words behind it (tests/support/tutorial_blocks.py). Status 1 where one fails.
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import tutorial_blocks as tutorials  # noqa: E402


def main() -> int:
    failed = 0
    for page in tutorials.pages():
        if sys.argv[1:] and Path(page).stem not in sys.argv[1:]:
            continue
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "tutorial"
            tutorials.prepare(folder)
            for block in tutorials.blocks(page):
                if block.kind not in (*tutorials.RUNS, "slow", "file"):
                    continue
                for command, seconds, wrong in tutorials.run(block, folder):
                    print(f"{'FAILED' if wrong else 'ok':6} {seconds:6.1f} s  {command}", flush=True)
                    failed += bool(wrong)
                    if wrong:
                        print(wrong, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
