"""What a reader sees of a run in MLflow's own pages, as pictures: `python tests/support/screenshots.py RUN_URL OUT`.

RUN_URL is the address that `controlbooth` prints, .../#/experiments/ID/runs/RUN_ID, of a server that runs. Needs
Debian's chromium and chromium-driver.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from browser import browser, click, furnish, open_page, screenshot, settle, text

SHOWN = (".png", ".html", ".json")
"""Artifacts at the top of the run that get a picture of their own."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_url")
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", default="1600x1000", help="of the window in pixels")
    parser.add_argument("--height", type=int, default=3600, help="of the window in which all curves are shown")
    options = parser.parse_args()
    width, height = map(int, options.size.split("x"))
    with browser(width, height) as driver:
        furnish(driver, options.run_url.partition("/#/")[0])
        for name, url, words in pages(options.run_url):
            driver.set_window_size(width, options.height if name == "metrics" else height)
            open_page(driver, url, *words)
            if name == "overview" and "Show more" in text(driver):
                click(driver, "Show more")  # of the description
                settle(driver)
            print(screenshot(driver, options.out / f"{name}.png"), url, flush=True)
    return 0


def pages(run_url: str) -> Iterator[tuple[str, str, list[str]]]:
    """(name, address, words that the page shows when it has come) of the pages about a run."""
    from mlflow import MlflowClient

    found = re.fullmatch(r"(.*)/#/experiments/(\d+)/runs/(\w+)", run_url)
    if found is None:
        raise SystemExit(f"{run_url} is no address of a run: .../#/experiments/ID/runs/RUN_ID")
    server, experiment, run_id = found.groups()
    client = MlflowClient(server)
    run = client.get_run(run_id)
    name = str(run.info.run_name)
    yield "runs", f"{server}/#/experiments/{experiment}/runs", [name]
    yield "overview", run_url, [name]
    yield "metrics", f"{run_url}/model-metrics", [name]
    yield "system", f"{run_url}/system-metrics", [name]
    for file in client.list_artifacts(run_id):
        if file.path.endswith(SHOWN):
            yield f"artifact-{file.path.replace('.', '-')}", f"{run_url}/artifacts/{file.path}", [file.path]
    yield "models", f"{server}/#/experiments/{experiment}/models", []
    for model in models_of(run)[-1:]:
        yield "model", f"{server}/#/experiments/{experiment}/models/{model}", []


def models_of(run: Any) -> list[str]:
    """The ids of a run's checkpoints, in the order of their steps."""
    outputs = run.outputs.model_outputs if run.outputs else []
    return [one.model_id for one in sorted(outputs, key=lambda one: one.step)]


if __name__ == "__main__":
    sys.exit(main())
