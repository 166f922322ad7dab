"""The page of a study in a real browser: keys, corrections, a server that dies, two windows of one rater."""

import json
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest
import studies
from browser import browser, wait, why_no_browser

from controlbooth.trainer.study.answers import LINES, counted, read_answers
from controlbooth.trainer.study.plan import screens_of

pytestmark = pytest.mark.skipif(why_no_browser() is not None, reason=str(why_no_browser()))


@contextmanager
def served(study, port=0):
    """Starts `study serve` and yields its process and address."""
    command = [sys.executable, "-u", "-m", "controlbooth.launch.cli", "study", "serve", str(study), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip().rstrip("/")
    finally:
        process.kill()
        process.wait()


class Window:
    """A rater's window."""

    def __init__(self, driver, address, rater):
        self.driver = driver
        driver.switch_to.new_window("window")
        self.handle = driver.current_window_handle
        driver.get(f"{address}/?rater={rater}")
        wait(lambda: self.ask("!document.getElementById('intro').hidden"), "the introduction")
        self.ask("document.getElementById('start').click()")

    def ask(self, expression):
        self.driver.switch_to.window(self.handle)
        return self.driver.execute_script(f"return {expression}")

    def press(self, key):
        self.ask(f"dispatchEvent(new KeyboardEvent('keydown', {{key: {key!r}}}))")

    def at(self, place):
        card = "!document.getElementById('turn').hidden"
        wait(lambda: self.ask(f"place === {place} && !busy && (ready || {card})"), f"screen {place}")
        if self.ask(card):
            self.ask("document.getElementById('go').click()")
            wait(lambda: self.ask("ready"), f"screen {place}")
        return self

    def settled(self):
        wait(lambda: self.ask("waiting.length === 0"), "the last answer on the disk")
        return self


@pytest.fixture
def driver():
    with browser(1280, 800) as opened:
        yield opened


def test_a_rater_answers_corrects_loses_the_server_and_comes_back_and_nothing_is_lost_or_doubled(tmp_path, driver):
    study, plan = studies.make_study(tmp_path, "--items", "4")
    screens = screens_of(plan, "anna")
    with served(study) as (process, address):
        port = int(address.rpartition(":")[2])
        window = Window(driver, address, "anna")
        window.at(0).press("a")
        window.at(1).press("b")
        window.at(2).press("Backspace")
        window.at(1).press("a")  # which takes the place of b
        window.at(2).settled()
        process.send_signal(signal.SIGKILL)
        process.wait()
        window.press("0")
        wait(lambda: "1 answer not stored yet" in window.ask("document.body.innerText"), "what is not stored")
    with served(study, port) as (_, address):
        window.settled()
        # Two windows of one rater: the first answer to a screen counts, and the other window is told.
        other = Window(driver, address, "anna")
        other.at(3).press("a")
        other.at(4).settled()
        window.at(3).press("b")
        window.at(4).settled()
        assert window.ask("screens[3].answer.ranks") == [1, 2]
        for place in range(4, len(screens)):
            other.at(place).press("b")
        wait(lambda: other.ask("!document.getElementById('end').hidden"), "the end")
        other.settled()
        assert f"All {len(screens)} answers are stored." in other.ask("document.body.innerText")
        again = Window(driver, address, "ben")
        assert again.at(0).ask("screens.filter(one => one.answer).length") == 0
        assert [one for one in driver.get_log("browser") if "Content Security Policy" in one["message"]] == []
    kept = [one for one in read_answers(study, plan.digest) if one.rater == "anna"]
    assert len(kept) == len(screens) + 1 == len({one.id for one in kept})
    assert sorted(one.id for one in kept) == sorted(
        json.loads(line)["id"] for line in (study / LINES).read_text().splitlines()
    )
    ranks = {one.trial: one.ranks for one in counted(kept)}
    assert [ranks[one.trial.id] for one in screens[:5]] == [(1, 2), (1, 2), (1, 1), (1, 2), (2, 1)]


def test_a_ranking_is_picked_from_the_best_to_the_worst_by_keys_and_by_clicks(tmp_path, driver):
    study, plan = studies.make_study(tmp_path, "--items", "3", methods=("crisp", "hazy", "smeared"))
    with served(study) as (_, address):
        window = Window(driver, address, "anna").at(0)
        assert window.ask("document.getElementById('finish').disabled")
        window.press("c")
        window.press("Backspace")
        window.press("b")
        window.ask("document.querySelectorAll('.choose')[0].click()")  # the last one follows
        assert window.ask("[...document.querySelectorAll('.badge')].map(one => one.textContent)") == ["2", "1", "3"]
        window.ask("document.getElementById('finish').click()")
        window.at(1).settled()
    (kept,) = read_answers(study, plan.digest)
    assert kept.ranks == (2, 1, 3) and kept.seconds > 0
