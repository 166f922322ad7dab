"""Pages for browsers: who may read them, and where they are served."""

import contextlib
import socket
import threading
import urllib.error
import urllib.request
from http.cookiejar import CookieJar

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from controlbooth.data.errors import UserError
from controlbooth.launch.serving import address, middleware, serve, token_for


@contextlib.contextmanager
def served(host, token):
    """Runs a server in a thread of its own, which Python ends with the process, and yields its port."""
    import uvicorn

    async def page(request):
        return PlainTextResponse(f"page {request.query_params.get('rater', 'of nobody')}")

    app = Starlette(routes=[Route("/", page)], middleware=middleware(host, token))
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield listening.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def read(url, opener=None, **headers):
    opened = (opener or urllib.request.build_opener()).open(urllib.request.Request(url, headers=headers), timeout=10)
    return opened.read().decode()


def test_pages_of_this_machine_are_not_read_under_a_name_from_outside():
    with served("127.0.0.1", None) as port:
        assert read(f"http://127.0.0.1:{port}/") == "page of nobody"
        assert read(f"http://127.0.0.1:{port}/", Host=f"localhost:{port}") == "page of nobody"
        with pytest.raises(urllib.error.HTTPError, match="400"):
            read(f"http://127.0.0.1:{port}/", Host="elsewhere.example")


def test_a_page_for_others_needs_the_token_once_and_then_its_cookie():
    with served("0.0.0.0", "the-token") as port:
        here = f"http://127.0.0.1:{port}/"
        for wrong in (here, f"{here}?token=", f"{here}?token=the-tokem", f"{here}?token=%C3%A9"):
            with pytest.raises(urllib.error.HTTPError, match="403"):
                read(wrong)
        opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(CookieJar()))
        assert read(f"{here}?rater=one&token=the-token", opener) == "page one"
        assert read(here, opener) == "page of nobody"
        with pytest.raises(urllib.error.HTTPError, match="403"):
            read(here, Cookie='token="wrong')


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.3.2.1"])
def test_what_only_this_machine_reaches_needs_no_token(host):
    assert token_for(host) is None


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "somewhere.example", ""])
def test_anything_else_gets_a_token_of_its_own(host):
    assert token_for(host) != token_for(host)
    assert address("0.0.0.0", 80, token_for(host), "/?rater=a").count("?") == 1


def test_a_taken_port_and_an_address_of_another_machine_are_refused_with_the_remedy():
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError, match="--port 0 takes a free"):
        serve(lambda *_: None, "127.0.0.1", taken.getsockname()[1], None)
    with pytest.raises(UserError, match="cannot listen on name.invalid"):
        serve(lambda *_: None, "name.invalid", 0, None)
    for port in (-1, 70000):
        with pytest.raises(UserError, match=f"--port {port}: a port is a number"):
            serve(lambda *_: None, "127.0.0.1", port, None)
