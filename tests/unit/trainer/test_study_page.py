"""What the pages of a study are sent and what they may send, without a browser."""

import json
import re
from collections.abc import Iterator

import pytest
import studies
from PIL import Image
from starlette.testclient import TestClient

from controlbooth.launch.serving import middleware
from controlbooth.trainer.study.answers import LINES, Answers, read_answers
from controlbooth.trainer.study.page.application import MOST_BYTES, application
from controlbooth.trainer.study.plan import screens_of

HOST = "http://127.0.0.1"
ATTACK = "<script>alert(1)</script><img src=x onerror=alert(2)>"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("page")
    studies.write_methods(root, items=4)
    prompts = json.loads((root / "prompts.yaml").read_text())
    prompts["scene0000"] = ATTACK
    (root / "prompts.yaml").write_text(json.dumps(prompts))
    return studies.make_study(root, "--questions", "fidelity", "prompt")


@pytest.fixture
def study(made, tmp_path):
    """The folder of a study without answers, and its plan."""
    folder, plan = made
    for name in ("plan.json", "pictures"):
        (tmp_path / name).symlink_to(folder / name)
    return tmp_path, plan


@pytest.fixture
def client(study) -> Iterator[TestClient]:
    folder, plan = study
    app = application(folder, plan, Answers(folder, plan.digest), middleware("127.0.0.1", None))
    with TestClient(app, base_url=HOST, follow_redirects=False) as opened:
        yield opened


def sent(plan, rater, place, ranks=(1, 2), **changes):
    """What a page sends of one of its screens."""
    shown = screens_of(plan, rater)[place]
    known = dict(id=f"{rater}-{place:08d}", rater=rater, trial=shown.trial.id, pictures=list(shown.pictures))
    return known | dict(ranks=list(ranks), seconds=2.5, replaces="") | changes


def test_nothing_that_is_sent_names_a_method_an_item_or_a_file(client, study):
    folder, plan = study
    bodies = {path: client.get(path) for path in ("/?rater=one", "/study?rater=one", "/study.js", "/study.css")}
    bodies |= {f"/pictures/{name}.png": client.get(f"/pictures/{name}.png") for name in plan.pictures}
    bodies["/answers"] = client.post("/answers", json=sent(plan, "one", 0))
    for path in ("/plan.json", "/study.yaml", "/answers.sqlite", "/pictures/../plan.json", "/nowhere"):
        bodies[path] = client.get(path)
        assert bodies[path].status_code == 404
    secret = [
        *plan.methods,
        *studies.BLUR,
        plan.secret,
        str(folder),
        "drawn by",
        "crisp/",
        "scene0",
        '"judged"',
        '"check"',
    ]
    for path, answer in bodies.items():
        everything = path.encode() + repr(answer.headers.raw).encode() + answer.content
        found = [word for word in secret if word.encode() in everything]
        assert found == [], path
        assert "last-modified" not in answer.headers and "etag" not in answer.headers


def test_pictures_are_served_as_pixels_that_may_be_kept(client, study):
    _, plan = study
    for name in plan.pictures:
        answer = client.get(f"/pictures/{name}.png")
        assert answer.headers["content-type"] == "image/png" and "immutable" in answer.headers["cache-control"]
    assert client.get(f"/pictures/{'0' * 16}.png").status_code == 404


def test_a_rater_without_a_name_gets_one_and_keeps_it_in_the_address(client):
    answer = client.get("/")
    assert answer.status_code == 303
    link = answer.headers["location"]
    assert re.fullmatch(r"/\?rater=[0-9a-f]{12}", link) and link != client.get("/").headers["location"]
    assert client.get(link).status_code == 200
    for wrong in ("a b", "../x", "<b>", "x" * 65, "."):
        assert client.get("/", params={"rater": wrong}).status_code == 400
        assert client.get("/study", params={"rater": wrong}).status_code == 400
    assert client.get("/study").status_code == 400


def test_a_page_may_load_nothing_from_elsewhere_and_run_no_text_as_a_program(client):
    for path in ("/?rater=one", "/study?rater=one", "/nowhere"):
        policy = client.get(path).headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    page = client.get("/?rater=one").text + client.get("/study.js").text + client.get("/study.css").text
    assert not re.search(r"https?://|url\(|@import", page)
    assert "<script>" not in page and " onclick=" not in page


def test_prompts_reach_the_page_as_data_and_are_put_there_as_text(client):
    answer = client.get("/study?rater=one")
    assert answer.headers["content-type"] == "application/json"
    assert ATTACK in [one["prompt"] for one in answer.json()["screens"]]
    program = client.get("/study.js").text
    assert re.findall(r"innerHTML = (\w+)", program) == ["MAGNIFIER"] and "insertAdjacentHTML" not in program


def test_an_answer_is_stored_once_and_shown_to_a_rater_who_comes_back(client, study):
    folder, plan = study
    body = sent(plan, "one", 0)
    first, again = client.post("/answers", json=body), client.post("/answers", json=body)
    assert (first.status_code, first.json()["what"]) == (201, "stored")
    assert (again.status_code, again.json()["what"]) == (200, "again")
    replayed = client.post("/answers", json=body | {"id": "another-id", "ranks": [2, 1]})
    assert replayed.status_code == 409 and replayed.json()["counts"] == {"id": body["id"], "ranks": [1, 2]}
    corrected = client.post("/answers", json=body | {"id": "corrected", "ranks": [2, 1], "replaces": body["id"]})
    assert corrected.status_code == 201
    screens = client.get("/study?rater=one").json()["screens"]
    assert [one["answer"] for one in screens[:2]] == [{"id": "corrected", "ranks": [2, 1]}, None]
    assert [one["answer"] for one in client.get("/study?rater=two").json()["screens"]] == [None] * len(screens)
    assert len(read_answers(folder, plan.digest)) == 2 == len((folder / LINES).read_text().splitlines())


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        (dict(trial="0" * 16), 404),
        (dict(trial=None), 404),
        (dict(rater="somebody else"), 400),
        (dict(rater=7), 400),
        (dict(ranks=[1]), 422),
        (dict(ranks=[1, 3]), 422),
        (dict(ranks=[2, 2]), 422),
        (dict(ranks=[True, 2]), 422),
        (dict(ranks=[1.0, 2]), 422),
        (dict(ranks="12"), 422),
        (dict(ranks=[[1], 2]), 422),
        (dict(seconds=-1), 422),
        (dict(seconds="2"), 422),
        (dict(seconds=1e9), 422),
        (dict(pictures=["0" * 16, "1" * 16]), 422),
        (dict(id="short"), 422),
        (dict(id="x" * 65), 422),
        (dict(id="<script>"), 422),
        (dict(replaces=3), 422),
        (dict(replaces="not there"), 422),
        (dict(replaces="not-there-at-all"), 409),
    ],
    ids=str,
)
def test_what_is_no_answer_is_refused_and_not_stored(client, study, changes, status):
    folder, plan = study
    answer = client.post("/answers", json=sent(plan, "one", 0) | changes)
    assert answer.status_code == status
    assert read_answers(folder, plan.digest) == []


def test_a_trial_of_another_raters_screens_is_refused(made, tmp_path):
    folder, plan = made
    from dataclasses import replace

    few = replace(plan, judged_each=1, checks_each=0, repeats_each=0)
    (tmp_path / "pictures").symlink_to(folder / "pictures")
    app = application(tmp_path, few, Answers(tmp_path, few.digest), ())
    own = {one.trial.id for one in screens_of(few, "one")}
    other = next(name for name in "abcdefgh" if {one.trial.id for one in screens_of(few, name)} - own)
    place = next(n for n, one in enumerate(screens_of(few, other)) if one.trial.id not in own)
    with TestClient(app, base_url=HOST) as client:
        assert client.post("/answers", json=sent(few, other, place) | {"rater": "one"}).status_code == 404


def test_bodies_that_are_no_json_too_long_or_from_a_form_are_refused(client, study):
    _, plan = study
    kind = {"Content-Type": "application/json"}
    for content in (b"", b"{", b"[1]", b"nul", b"\xff", b"[" * 9000):
        assert client.post("/answers", content=content, headers=kind).status_code == 400
    assert client.post("/answers", content=b" " * (MOST_BYTES + 1), headers=kind).status_code == 413
    assert client.post("/answers", data={"rater": "one"}).status_code == 415
    text = json.dumps(sent(plan, "one", 0))
    assert client.post("/answers", content=text, headers={"Content-Type": "text/plain"}).status_code == 415
    assert client.get("/answers").status_code == 404


def test_equal_pictures_may_be_said_of_pairs_and_not_in_rankings(client, study, tmp_path_factory):
    folder, plan = study
    assert client.post("/answers", json=sent(plan, "one", 1, (1, 1))).status_code == 201
    root = tmp_path_factory.mktemp("rankings")
    folder, plan = studies.make_study(root, methods=("crisp", "hazy", "smeared"))
    with TestClient(application(folder, plan, Answers(folder, plan.digest), ()), base_url=HOST) as other:
        assert other.get("/study?rater=one").json()["ties"] is False
        assert other.post("/answers", json=sent(plan, "one", 0, (1, 1, 1))).status_code == 422
        assert other.post("/answers", json=sent(plan, "one", 0, (3, 1, 2))).status_code == 201


def test_a_disk_that_fails_is_told_to_the_page_and_the_same_answer_is_taken_later(study, monkeypatch):
    folder, plan = study
    answers = Answers(folder, plan.digest)
    app = application(folder, plan, answers, ())
    with TestClient(app, base_url=HOST, raise_server_exceptions=False) as client:
        with monkeypatch.context() as broken:

            def full(*_):
                raise OSError(28, "No space left on device")

            broken.setattr("controlbooth.trainer.study.answers.os.fsync", full)
            assert client.post("/answers", json=sent(plan, "one", 0)).status_code == 500
        assert client.post("/answers", json=sent(plan, "one", 0)).status_code == 200
        assert client.post("/answers", json=sent(plan, "one", 1)).status_code == 201
    assert [json.loads(line)["id"] for line in (folder / LINES).read_text().splitlines()] == [
        one.id for one in read_answers(folder, plan.digest)
    ]
    assert len(read_answers(folder, plan.digest)) == 2


def test_the_other_name_of_a_machine_and_a_missing_token_are_refused_with_the_same_headers(study):
    folder, plan = study
    app = application(folder, plan, Answers(folder, plan.digest), middleware("0.0.0.0", "the-token"))
    with TestClient(app, base_url="http://elsewhere.example", follow_redirects=False) as client:
        assert client.get("/study?rater=one").status_code == 403
        assert client.post("/answers", json=sent(plan, "one", 0)).status_code == 403
        assert "content-security-policy" in client.get("/").headers
        assert client.get("/?rater=one&token=the-token").headers["location"] == "/?rater=one"
        assert client.get("/?rater=one").status_code == 200


def test_pictures_in_the_study_are_the_ones_that_are_served(client, study):
    folder, plan = study
    name = plan.trials[0].pictures[0]
    answer = client.get(f"/pictures/{name}.png")
    assert answer.content == (folder / "pictures" / f"{name}.png").read_bytes()
    assert Image.open(folder / "pictures" / f"{name}.png").size == (64, 64)
