"""The application behind `controlbooth study serve`: the page, its pictures, and the way of answers to the disk.

Nothing that it sends names a method, an item or a file: pages get opaque names, and pictures come without the time at
which they were written, which could tell them apart.
"""

import asyncio
import contextlib
import json
import math
import re
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from controlbooth.trainer.study.answers import KEPT, STORED, Answer, Answers, Outcome
from controlbooth.trainer.study.plan import PICTURES, Plan, Shown, screens_of
from controlbooth.trainer.study.questions import CONDITION, PROMPT, QUESTIONS, REFERENCES, wording

HERE = Path(__file__).parent
FILES = {"study.css": "text/css", "study.js": "text/javascript"}
RATER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
ANSWER = re.compile(r"[A-Za-z0-9_-]{8,64}")
MOST_BYTES = 16_384
"""Of an answer that a page sends."""
MOST_SECONDS = 86_400.0
MOST_AT_ONCE = 256
"""Answers that share one transaction."""
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
FOREVER = {"Cache-Control": "private, max-age=31536000, immutable"}
NEVER = {"Cache-Control": "no-store"}


class Refused(Exception):
    """A request that cannot be answered, with its HTTP status and what is wrong."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status, self.reason = status, reason


class Writer:
    """Stores the answers of all raters one transaction after another, each with all that have come meanwhile.

    A transaction waits for the disk; a hundred raters who answer at once wait for few of them and not for a hundred.
    """

    def __init__(self, answers: Answers):
        self._answers = answers
        self._queue: asyncio.Queue[tuple[Answer, asyncio.Future[Outcome]]] = asyncio.Queue()

    async def add(self, answer: Answer) -> Outcome:
        """Returns when the answer is on the disk. Raises what storing it raises."""
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._queue.put_nowait((answer, future))
        return await future

    async def run(self) -> None:
        while True:
            waiting = [await self._queue.get()]
            while len(waiting) < MOST_AT_ONCE and not self._queue.empty():
                waiting.append(self._queue.get_nowait())
            try:
                outcomes: Sequence[Outcome | Exception] = await asyncio.to_thread(
                    self._answers.add, [answer for answer, _ in waiting]
                )
            except Exception as error:  # each page is told, keeps its answer and sends it again
                outcomes = [error] * len(waiting)
            for (_, future), outcome in zip(waiting, outcomes, strict=True):
                if future.done():  # whoever asked has gone
                    continue
                if isinstance(outcome, Exception):
                    future.set_exception(outcome)
                else:
                    future.set_result(outcome)


def application(folder: Path, plan: Plan, answers: Answers, middleware: Sequence[Middleware]) -> Starlette:
    """Makes the application of one study. middleware: who may read it, see launch/serving.py."""
    writer = Writer(answers)
    screens = lru_cache(maxsize=4096)(lambda rater: tuple(screens_of(plan, rater)))

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        task = asyncio.create_task(writer.run())
        yield
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        answers.close()

    async def index(request: Request) -> Response:
        if not request.query_params.get("rater"):
            return RedirectResponse(f"/?rater={secrets.token_hex(6)}", status_code=303, headers=NEVER)
        _rater(request.query_params["rater"])
        return Response((HERE / "index.html").read_bytes(), media_type="text/html", headers=NEVER)

    async def file(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in FILES:
            raise Refused(404, "there is no such file")
        return Response((HERE / name).read_bytes(), media_type=FILES[name], headers=NEVER)

    async def picture(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in plan.pictures:
            raise Refused(404, "there is no such picture")
        content = await asyncio.to_thread((folder / PICTURES / f"{name}.png").read_bytes)
        return Response(content, media_type="image/png", headers=FOREVER)

    async def study(request: Request) -> Response:
        rater = _rater(request.query_params.get("rater", ""))
        given = await asyncio.to_thread(answers.of_rater, rater)
        shown = [_screen(plan, one, given.get(one.trial.id)) for one in screens(rater)]
        tree = dict(study=plan.digest[:16], title=plan.title, form=plan.form, ties=plan.ties, screens=shown)
        return JSONResponse(tree, headers=NEVER)

    async def answer(request: Request) -> Response:
        tree = await _body(request)
        rater = _rater(tree.get("rater"))
        place = next((one for one in screens(rater) if one.trial.id == tree.get("trial")), None)
        if place is None:
            raise Refused(404, "there is no such trial for this rater")
        outcome = await writer.add(_checked(plan, place, rater, tree))
        told = dict(what=outcome.what, counts=_counting(outcome.counts))
        status = {STORED: 201, KEPT: 409}.get(outcome.what, 200)
        return JSONResponse(told, status_code=status, headers=NEVER)

    async def refused(_: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        return JSONResponse({"error": error.reason}, status_code=error.status, headers=NEVER)

    app = Starlette(
        routes=[
            Route("/", index),
            Route("/study", study),
            Route("/answers", answer, methods=["POST"]),
            Route("/pictures/{name}.png", picture),
            Route("/{name}", file),
        ],
        middleware=[Middleware(_WithHeaders), *middleware],
        exception_handlers={Refused: refused},
        lifespan=lifespan,
    )
    return app


class _WithHeaders:
    """Adds HEADERS to every response."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Callable[..., Any], send: Callable[..., Any]) -> None:
        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                own = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                message = message | {"headers": [*message.get("headers", ()), *own]}
            await send(message)

        await self.app(scope, receive, with_headers if scope["type"] == "http" else send)


def _rater(name: Any) -> str:
    if not isinstance(name, str) or not RATER.fullmatch(name):
        raise Refused(400, "a rater's name has 1 to 64 letters, digits, dots, hyphens and underscores")
    return name


async def _body(request: Request) -> dict[str, Any]:
    """Reads the JSON object that a page sends. The type of content is one that no form of another site can send."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise Refused(415, "an answer is application/json")
    content = b""
    async for part in request.stream():
        content += part
        if len(content) > MOST_BYTES:
            raise Refused(413, f"an answer has at most {MOST_BYTES} bytes")
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):
        raise Refused(400, "an answer is JSON") from None
    if not isinstance(tree, dict):
        raise Refused(400, "an answer is a JSON object")
    return tree


def _checked(plan: Plan, place: Shown, rater: str, tree: dict[str, Any]) -> Answer:
    """Makes an Answer of what a page sent. Raises Refused, which names what is wrong."""
    count = len(place.pictures)
    ranks: Any = tree.get("ranks")
    seconds: Any = tree.get("seconds")
    allowed = [list(range(1, count + 1))] + ([[1] * count] if plan.ties else [])
    whole = isinstance(ranks, list) and all(type(one) is int for one in ranks)
    if not whole or sorted(ranks) not in allowed:
        raise Refused(422, f"ranks are the numbers 1 to {count}, each once" + (", or all 1" if plan.ties else ""))
    if type(seconds) not in (int, float) or not (math.isfinite(seconds) and 0 <= seconds <= MOST_SECONDS):
        raise Refused(422, f"seconds are a number from 0 to {MOST_SECONDS:.0f}")
    if tree.get("pictures") != list(place.pictures):
        raise Refused(422, "pictures are those of the trial, from left to right as they were shown")
    identity, replaces = tree.get("id"), tree.get("replaces", "")
    if not isinstance(identity, str) or not ANSWER.fullmatch(identity):
        raise Refused(422, "an id has 8 to 64 letters, digits, hyphens and underscores")
    if not isinstance(replaces, str) or not (replaces == "" or ANSWER.fullmatch(replaces)):
        raise Refused(422, "replaces is the id of an answer, or empty")
    return Answer(identity, rater, place.trial.id, place.pictures, tuple(ranks), float(seconds), replaces)


def _screen(plan: Plan, shown: Shown, answer: Answer | None) -> dict[str, Any]:
    """Tells a page what it needs of a trial, and nothing else."""
    trial, item = shown.trial, plan.item_of[shown.trial.item]
    given = QUESTIONS[trial.question].given
    beside = given if given != PROMPT else None
    return dict(
        trial=trial.id,
        asks=wording(trial.question, plan.form),
        pictures=list(shown.pictures),
        given=list(item.given.get(beside, ())) if beside else [],
        overlay=beside == CONDITION,
        photographs=beside == REFERENCES,
        prompt=item.prompt if given == PROMPT else "",
        answer=_counting(answer),
    )


def _counting(answer: Answer | None) -> dict[str, Any] | None:
    return None if answer is None else dict(id=answer.id, ranks=list(answer.ranks))
