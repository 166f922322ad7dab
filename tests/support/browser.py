"""A real browser without a window: Debian's Chromium, driven by Selenium through its own driver.

It fetches nothing but the pages that it is told to open: neither a browser nor a driver is downloaded.
"""

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAMS = ("chromium", "chromedriver")
FLAGS = (
    "--headless",
    "--no-sandbox",  # which root may not have
    "--disable-gpu",
    "--disable-dev-shm-usage",  # of 64 MB in containers
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
SETTINGS = {
    "mlflow.workflowType_v1": '"machine_learning"',
    "mlflow.assistant.fab.autoOpenedOnFirstLoad_v1": "true",
    "mlflow.assistant.panelOpen_v1": "false",
}
"""What MLflow 3.17 keeps in a browser."""
QUIET_SECONDS = 1.0
"""A page whose text has not changed for so long has arrived."""


def why_no_browser() -> str | None:
    """What is missing, for a test that is skipped; None where everything is there."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    return f"{' and '.join(missing)} not on the PATH: apt-get install chromium chromium-driver" if missing else None


@contextmanager
def browser(width: int = 1600, height: int = 1000) -> Iterator[Any]:
    """A selenium.webdriver.Chrome with a window of so many pixels and a profile of its own.

    Raises RuntimeError where Chromium or its driver is not installed.
    """
    from selenium import webdriver

    if missing := why_no_browser():
        raise RuntimeError(missing)
    with tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = str(shutil.which("chromium"))
        for flag in (*FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}"):
            options.add_argument(flag)
        driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
        try:
            driver.set_page_load_timeout(180)  # on a machine that is busy with other things
            driver.set_script_timeout(180)
            yield driver
        finally:
            driver.quit()


def text(driver: Any) -> str:
    """What a reader of the page sees of words."""
    return driver.execute_script("return document.body ? document.body.innerText : ''")


def wait(condition: Callable[[], Any], what: str, seconds: float = 60.0) -> Any:
    """-> the first value of `condition` that counts as true. Raises TimeoutError, which names `what`."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > end:
            raise TimeoutError(f"{what} did not appear within {seconds:.0f} s")
        time.sleep(0.1)
    return value


def open_page(driver: Any, url: str, *words: str, seconds: float = 60.0) -> str:
    """Opens an address afresh and waits until its text has these words and stands still; -> the text.

    Raises TimeoutError, with the words that did not come.
    """
    driver.get("about:blank")  # an address that differs only after its # would not be loaded anew
    driver.get(url)
    return settle(driver, *words, seconds=seconds)


def live_page(driver: Any, url: str, *words: str, seconds: float = 60.0) -> None:
    """Opens an address and waits for words, on a page that never stands still, as it counts seconds."""
    driver.get(url)
    for word in words:
        wait(lambda word=word: word in text(driver), f"{word!r} on {url}", seconds)


def settle(driver: Any, *words: str, seconds: float = 60.0) -> str:
    """Waits until the page's text has these words and stands still, and its pictures are there; -> the text."""
    for word in words:
        wait(lambda word=word: word in text(driver), f"{word!r} on {driver.current_url}", seconds)
    end, before, since = time.monotonic() + seconds, "", time.monotonic()
    while time.monotonic() - since < QUIET_SECONDS and time.monotonic() < end:
        time.sleep(0.1)
        loaded = driver.execute_script("return [...document.images].every(one => one.complete)")
        if (now := text(driver)) != before or not loaded:
            before, since = now, time.monotonic()
    return before


def furnish(driver: Any, server: str) -> None:
    """Sets MLflow's pages up as a reader has them after a while: in the mode for training, without the assistant."""
    open_page(driver, server)
    for name, value in SETTINGS.items():
        driver.execute_script("localStorage.setItem(arguments[0], arguments[1])", name, value)


def click(driver: Any, label: str, seconds: float = 30.0) -> None:
    """Clicks the innermost visible element whose whole text is `label`. Raises TimeoutError where there is none."""
    find = """
        const found = [...document.querySelectorAll('*')].filter(
            one => one.innerText !== undefined && one.innerText.trim() === arguments[0] && one.offsetParent !== null);
        return found.length ? found[found.length - 1] : null;"""
    found = wait(lambda: driver.execute_script(find, label), f"something called {label!r}", seconds)
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", found)
    found.click()


def screenshot(driver: Any, path: Path) -> Path:
    """What the window shows, as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(driver.get_screenshot_as_png())
    return path
