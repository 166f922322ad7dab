"""Pictures of a report's page as a browser shows it: of each run alone, and of all side by side.

    .venv/bin/python tests/benchmarks/report_pictures.py RUN [RUN ...] --out DIR [--width 1400]

For looking at, e.g. at two runs of tests/benchmarks/verdicts.py: one without control beside one with. Needs Debian's
chromium and chromium-driver.
"""

import argparse
import sys
from pathlib import Path

from controlbooth.trainer.evaluation.report import write_report

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from browser import browser, open_page, screenshot  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--out", type=Path, required=True, help="folder for pages and pictures")
    parser.add_argument("--width", type=int, default=1400, help="of the window, in pixels")
    options = parser.parse_args()
    out = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    pages = {run.resolve().name: [run] for run in options.runs}
    if len(options.runs) > 1:
        pages["side-by-side"] = options.runs
    for name, runs in pages.items():
        page = out / f"{name}.html"
        write_report(runs, page)
        with browser(options.width, 1000) as driver:
            open_page(driver, page.as_uri(), "Does it obey?")
            driver.set_window_size(options.width, driver.execute_script("return document.body.scrollHeight") + 60)
            print(screenshot(driver, page.with_suffix(".png")))


if __name__ == "__main__":
    main()
