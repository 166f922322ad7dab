"""What is shown, as HTML in parts that each have a version, so that a browser asks only for what has changed.

Work is done only while somebody asks, and at most so often that it takes SHARE of a processor, whatever the number of
runs and of open browsers: all of them share one look at the disk.
"""

import json
import threading
import time
import uuid
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import quote

from controlbooth.data.pages.rendering import environment
from controlbooth.launch.watch.control_run import ControlRun
from controlbooth.launch.watch.finding import Finder, Run
from controlbooth.launch.watch.subject_run import SubjectRun
from controlbooth.trainer.dreambooth.measuring.overfitting import LEARNT_SHARE

SHARE = 0.005
"""Of one processor, that looking at the run folders may take while browsers ask."""
LEAST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
"""Seconds between two looks."""
FIRST_SECONDS = 0.4
"""Of a look, in which runs that were never read are read; the others' cards follow with the next look."""
READING = "reading"
"""The state of a card whose run has not been read yet."""
OPEN_PAGES = 16
"""Runs whose metrics are kept whole in memory."""
ORDER = ("failed", "silent", "running", "starting", "waiting", "stopped", "finished")
HERE = Path(__file__).parent
Parts = dict[str, str]


class View:
    """One page that is asked for again and again: its parts, each with the number of the look at which it changed."""

    def __init__(self, gather: Callable[[float], Parts], is_whole: Callable[[], bool] = lambda: True):
        """Looks at nothing yet. is_whole: tells whether the last `gather` had the time to read everything."""
        self._gather, self._is_whole = gather, is_whole
        self._boot = uuid.uuid4().hex[:8]
        self._parts: dict[str, tuple[int, str]] = {}
        self._number = 0
        self._next = 0.0
        self._is_first = True

    def look(self) -> None:
        """Looks at the disk, unless the last look is too near."""
        if time.monotonic() < self._next:
            return
        began = time.thread_time()
        gathered = self._gather(time.time())
        before, self._number = self._parts, self._number + 1
        self._parts = {}
        changed = list(gathered) != list(before)
        for key, text in gathered.items():
            same = key in before and before[key][1] == text
            self._parts[key] = before[key] if same else (self._number, text)
            changed |= not same
        if not changed:
            self._number -= 1
        if not self._is_whole():
            return  # the next one goes on
        spent = 0.0 if self._is_first else time.thread_time() - began  # what is read once does not count
        self._is_first = False
        self._next = time.monotonic() + min(max(LEAST_PAUSE, spent / SHARE), LONGEST_PAUSE)

    @property
    def version(self) -> str:
        return f"{self._boot}-{self._number}"

    def parts(self, since: str = "") -> Parts:
        """Returns the parts that have changed since a version; all of them for one that is not of this page."""
        boot, _, number = since.partition("-")
        known = int(number) if boot == self._boot and number.isdecimal() else 0
        return {key: text for key, (changed, text) in self._parts.items() if changed > known}

    def keys(self) -> list[str]:
        return list(self._parts)


class Site:
    """All pages over some folders. Its methods may be called by any thread."""

    def __init__(self, folders: list[Path]):
        """Raises UserError for what is no folder."""
        self._finder = Finder(folders)
        self.folders = folders
        self._lock = threading.RLock()
        self._unread = 0
        self._overview = View(self._cards, lambda: not self._unread)
        self._pages: dict[tuple[str, ...], View] = {}
        self._filled: dict[str, tuple[dict[str, Any], str]] = {}
        """By run: what its card was filled from, and the HTML."""

    def run(self, key: str) -> Run | None:
        """Finds a run by its name in addresses; None where it is none, or has gone."""
        with self._lock:
            run = self._finder.runs().get(key)
            return run if run is not None and run.folder.is_dir() else None

    def overview(self) -> View:
        with self._lock:
            self._overview.look()
            return self._overview

    def page(self, key: str, subject: str | None = None) -> View | None:
        """Returns the page of a run, or of one of its subjects; None where there is no such one."""
        with self._lock:
            run = self.run(key)
            if run is None or (subject is not None and not has_subject(run, subject)):
                return None
            address = (key,) if subject is None else (key, subject)
            view = self._pages.pop(address, None) or View(
                lambda now: self._page(key, subject, now), lambda: self._is_read(key, subject)
            )
            self._pages[address] = view
            while len(self._pages) > OPEN_PAGES:
                self._forget(next(iter(self._pages)))
            view.look()
            return view if view.keys() else None  # it has gone meanwhile

    def _is_read(self, key: str, subject: str | None) -> bool:
        """Tells whether the metrics of a page have been read to their end."""
        run = self._finder.runs().get(key)
        whole = run.subject(subject).whole if subject is not None and isinstance(run, SubjectRun) else run and run.whole
        return whole is None or not whole.is_left

    def _forget(self, address: tuple[str, ...]) -> None:
        """Gives back the memory of a page that nobody has asked for lately."""
        del self._pages[address]
        run = self._finder.runs().get(address[0])
        if run is not None and len(address) == 1:
            run.whole = None
        elif isinstance(run, SubjectRun):
            run.subject(address[1]).whole = None

    def _cards(self, now: float) -> Parts:
        cards, until = [], time.monotonic() + FIRST_SECONDS
        self._unread = 0
        for key, run in self._finder.runs().items():
            was_read = key in self._filled and self._filled[key][0]["state"] != READING
            if was_read or time.monotonic() < until:
                card = run.card(now)
            else:
                self._unread += 1
                card = {"name": run.name, "state": READING, "news": None, "pictures": []}
            place = ORDER.index(card["state"]) if card["state"] in ORDER else len(ORDER)
            cards.append((place, card, key, run))
        cards.sort(key=lambda one: (one[0], -round((one[1]["news"] or 0.0) / 60), one[1]["name"]))
        before, self._filled = self._filled, {}
        for _, card, key, run in cards:
            known = before.get(key)
            self._filled[key] = known if known is not None and known[0] is card else (card, fill_card(run, key, card))
        return {key: html for key, (_, html) in self._filled.items()}

    def _page(self, key: str, subject: str | None, now: float) -> Parts:
        run = self.run(key)
        if run is None:
            return {}
        if subject is not None and isinstance(run, SubjectRun):
            facts = run.subject(subject).page(run.rows().get(subject, {}))
            template, folder = "subject.html", f"subjects/{subject}/"
        else:
            facts = run.page(now)
            template, folder = ("run.html" if isinstance(run, ControlRun) else "gallery.html"), ""

        def picture(name: str, width: int = 0) -> str:
            return address_of(run, key, f"{folder}{name}", width)

        blocks = environment(HERE).get_template(template).blocks
        values = dict(
            run=facts,
            key=key,
            picture=picture,
            folder=str(run.folder),
            player=player(facts, picture),
            learnt_share=LEARNT_SHARE,
            address=address,
        )
        parts = {name: fill_block(template, name, values) for name in blocks if name.startswith("part_")}
        return {name.removeprefix("part_"): text for name, text in parts.items()} | {
            "charts": json.dumps(facts["charts"], separators=(",", ":"))
        }


def fill_card(run: Run, key: str, card: dict[str, Any]) -> str:
    """Returns the HTML of a run's card."""
    if card["state"] == READING:
        return fill("reading.html", run=card, key=key)
    pictures = [address_of(run, key, name, 320) for name in card["pictures"]]
    return fill("card.html", run=card, key=key, pictures=pictures)


def has_subject(run: Run, name: str) -> bool:
    return isinstance(run, SubjectRun) and name in run.rows()


def player(facts: dict[str, Any], picture: Callable[..., str]) -> str:
    """Returns what the page's script needs to show pictures step by step, as JSON; empty where there are none."""
    told = facts.get("player")
    steps = told["steps"] if told else facts.get("steps", [])
    if not steps:
        return ""
    rows = [{"step": one["step"], "picture": picture(one["name"], 1280)} for one in steps]
    return json.dumps({"steps": rows, "mark": told and told["announced"]})


def address(name: str) -> str:
    """Returns the name of a file or folder as it stands in an address."""
    return quote(name, safe="", errors="surrogateescape")


def address_of(run: Run, key: str, name: str, width: int = 0) -> str:
    """Returns the address of a picture, with what tells this version of it from others. width: 0 for the whole one."""
    stamp = run.files.stamp(name)
    version = sha256(repr(stamp).encode()).hexdigest()[:10]
    return f"/run/{key}/{f'small/{width}' if width else 'file'}/{quote(name, errors='surrogateescape')}?v={version}"


def fill(template: str, **values: Any) -> str:
    return environment(HERE).get_template(template).render(values | {"m": macros()})


def fill_block(template: str, name: str, values: dict[str, Any]) -> str:
    """Fills one block of a template by itself."""
    found = environment(HERE).get_template(template)
    return "".join(found.blocks[name](found.new_context(values | {"m": macros()}))).strip()


def macros() -> Any:
    """Returns what the templates call as `m`."""
    return environment(HERE).get_template("macros.html").module
