"""The application behind `controlbooth watch`: addresses, and what they answer."""

import json
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route

from controlbooth.launch.serving import middleware
from controlbooth.launch.watch.files import open_inside, suffix_of
from controlbooth.launch.watch.pictures import KINDS, WIDTHS, Pictures
from controlbooth.launch.watch.site import HERE, Site, View, fill

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Nothing of another origin is loaded, and no script or style that is part of a page runs."""
POLICY_OF_REPORTS = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; sandbox"
"""A report is one file with its own styles; its scripts, if somebody put some in, do not run."""
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
OWN_FILES = {"watch.css": "text/css; charset=utf-8", "watch.js": "text/javascript; charset=utf-8"}
GONE = "There is no such run or picture here: it may have been moved or deleted. The overview has what is there.\n"


def make_app(folders: list[Path], host: str, token: str | None) -> Starlette:
    """Makes the application. Raises UserError for what is no folder."""
    site, pictures = Site(folders), Pictures()

    def overview(request: Request) -> Response:
        view = site.overview()
        title = " · ".join(str(folder) for folder in site.folders)
        return page("overview.html", view, title=title, cards=view.parts())

    def overview_parts(request: Request) -> Response:
        return parts(request, site.overview())

    def run(request: Request) -> Response:
        view = view_of(request)
        if view is None:
            return gone()
        found = site.run(request.path_params["key"])
        above = [("/", "all runs")]
        name = found.name if found else ""
        if subject := request.path_params.get("subject"):
            above.append((f"/run/{request.path_params['key']}/", name))
            name = subject
        return page("page.html", view, title=name, above=above, parts=view.parts())

    def run_parts(request: Request) -> Response:
        view = view_of(request)
        return gone() if view is None else parts(request, view)

    def view_of(request: Request) -> View | None:
        return site.page(request.path_params["key"], request.path_params.get("subject"))

    def small(request: Request) -> Response:
        width = request.path_params["width"]
        return shown(request, width) if width in WIDTHS else gone()

    def whole(request: Request) -> Response:
        return shown(request, 0)

    def shown(request: Request, width: int) -> Response:
        found, name = site.run(request.path_params["key"]), request.path_params["name"]
        if found is None:
            return gone()
        try:
            content = pictures.small(found.folder, name, width) if width else pictures.whole(found.folder, name)
        except OSError:
            return gone()
        kind = "image/webp" if width else KINDS[suffix_of(name)]
        # The address changes with the file.
        kept = {"Cache-Control": "private, max-age=31536000, immutable"} if "v" in request.query_params else {}
        return Response(content, media_type=kind, headers=HEADERS | kept)

    def report(request: Request) -> Response:
        found = site.run(request.path_params["key"])
        if found is None:
            return gone()
        try:
            with open_inside(found.folder, "report.html") as file:
                content = file.read()
        except OSError:
            return gone()
        return HTMLResponse(content, headers=HEADERS | {"Content-Security-Policy": POLICY_OF_REPORTS})

    routes = [
        Route("/", overview),
        Route("/parts", overview_parts),
        Route("/own/{name}", own_file),
        Route("/run/{key}/", run),
        Route("/run/{key}/parts", run_parts),
        Route("/run/{key}/subject/{subject}/", run),
        Route("/run/{key}/subject/{subject}/parts", run_parts),
        Route("/run/{key}/report", report),
        Route("/run/{key}/file/{name:path}", whole),
        Route("/run/{key}/small/{width:int}/{name:path}", small),
    ]
    return Starlette(routes=routes, middleware=middleware(host, token))


def own_file(request: Request) -> Response:
    name = request.path_params["name"]
    if name not in OWN_FILES:
        return gone()
    return Response((HERE / name).read_bytes(), media_type=OWN_FILES[name], headers=HEADERS)


def page(template: str, view: View, **values: Any) -> Response:
    """Answers with a whole page, in which the parts are as they are now."""
    html = fill(template, version=view.version, **values)
    content = html.encode(errors="backslashreplace")  # for names of folders that are no text
    return HTMLResponse(content, headers=HEADERS | {"Content-Security-Policy": POLICY, "Cache-Control": "no-store"})


def parts(request: Request, view: View) -> Response:
    """Answers with the parts of a page that have changed since the version that the browser has; 304 for none."""
    mark = f'"{view.version}"'
    headers = HEADERS | {"ETag": mark, "Cache-Control": "no-cache"}
    since = request.headers.get("if-none-match", "")
    if since == mark:
        return Response(status_code=304, headers=headers)
    answer = {"version": view.version, "keys": view.keys(), "parts": view.parts(since.strip('"'))}
    return Response(json.dumps(answer, separators=(",", ":")), media_type="application/json", headers=headers)


def gone() -> Response:
    return PlainTextResponse(GONE, status_code=404, headers=HEADERS)
