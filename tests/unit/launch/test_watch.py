"""`controlbooth watch`: what its pages say of run folders, and what they never serve."""

import contextlib
import json
import os
import shutil
import socket
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import uvicorn
import yaml
from browser import browser, live_page, text, wait, why_no_browser
from PIL import Image

from controlbooth.data.errors import UserError
from controlbooth.launch.cli import main as controlbooth
from controlbooth.launch.watch import site as sites
from controlbooth.launch.watch.app import make_app
from controlbooth.launch.watch.facts import attempts
from controlbooth.launch.watch.failures import sentences
from controlbooth.launch.watch.files import open_inside
from controlbooth.launch.watch.finding import Finder, key_of
from controlbooth.launch.watch.metrics import Metrics
from controlbooth.launch.watch.site import Site
from controlbooth.launch.watch.subject_run import category
from controlbooth.trainer.dreambooth.measuring.overfitting import Course
from controlbooth.trainer.evaluation.strips import write_strip

NAMED = "<script>alert(1)</script>"


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


def strip(path, shade):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_strip(path, np.full((2, 8, 8, 3), shade, np.uint8))


def control_run(folder, state="running", age=1.0):
    """A ControlNet run at step 40 of 100, 0.5 s a step, validated at step 20 and 40."""
    now = time.time() - age
    steps = [
        dict(step=step, time=now - (40 - step) / 2, metrics={"loss": 1 / step, "samples_per_second": 16.0})
        for step in range(1, 41)
    ]
    figures = {"edge_f1": 0.62, "edge_f1_chance": 0.1, "edge_f1_real": 0.9, "edge_f1_share": 0.65}
    figures |= {"edge_f1_share_low": 0.5, "edge_f1_share_high": 0.7}
    validated = [
        dict(step=step, time=now, metrics={f"validation/{name}": value for name, value in figures.items()})
        for step in (20, 40)
    ]
    start = dict(time=now - 30, status="RUNNING")
    write(folder / "metrics.jsonl", lines(start, *steps[:20], validated[0], *steps[20:], validated[1]))
    write(
        folder / "config.yaml",
        yaml.safe_dump(dict(max_steps=100, model=dict(base="miniature"), data=dict(condition="edges"))),
    )
    write(folder / "status.json", dict(state=state, step=20, time=now))
    write(folder / "attempt.json", dict(number=1, host="elsewhere", process=7, time=now - 40))
    write(folder / "samples" / "strips" / "captions.json", ["a cat", NAMED])
    for name, shade in (("conditions", 0), ("targets", 250), ("step-00000020", 100), ("step-00000040", 200)):
        strip(folder / "samples" / "strips" / f"{name}.png", shade)
    os.utime(folder / "metrics.jsonl", (now, now))
    os.utime(folder / "status.json", (now, now))
    os.utime(folder / "attempt.json", (now, now))
    return folder


def subject_run(folder):
    """A batch of five subjects: learnt, copied, not learnt, failed, waiting."""
    names = ("rex", "mug", "cup", "hat", "sun")
    write(folder / "subjects.json", [dict(name=name, steps=20, instance_prompt=f"a xyz {name}") for name in names])
    write(folder / "config.yaml", yaml.safe_dump(dict(model=dict(base="/models/sd15"))))
    write(folder / "attempt.json", dict(number=1, time=time.time()))
    first = dict(step=0, fidelity=0.4, nearest=0.5, real=0.8, real_nearest=0.85)
    last = {
        "rex": dict(step=20, fidelity=0.75, nearest=0.8, real=0.8, real_nearest=0.85),
        "mug": dict(step=20, fidelity=0.85, nearest=0.95, real=0.8, real_nearest=0.85),
        "cup": dict(step=20, fidelity=0.45, nearest=0.6, real=0.8, real_nearest=0.85),
    }
    for name, one in last.items():
        own = folder / "subjects" / name
        write(own / "validation.json", [first, one])
        write(own / "status.json", dict(state="finished", step=20))
        write(own / "metrics.jsonl", lines(dict(step=20, time=1.0, metrics={"train/instance_loss": 0.1})))
        strip(own / "samples" / f"{name}-step-00000000.png", 50)
        strip(own / "samples" / f"{name}-step-00000020.png", 150)
    write(
        folder / "subjects" / "hat" / "status.json",
        dict(state="failed", error="ConfigError: it has no pictures. Put some there"),
    )
    return folder


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """A folder with both kinds of run. Pages look at the disk as often as they are asked."""
    monkeypatch.setattr(sites, "LEAST_PAUSE", 0.0)
    monkeypatch.setattr(sites, "LONGEST_PAUSE", 0.0)
    monkeypatch.setattr("controlbooth.launch.watch.finding.LEAST_PAUSE", 0.0)
    control_run(tmp_path / "runs" / "first")
    subject_run(tmp_path / "runs" / "pets")
    return tmp_path / "runs"


@contextlib.contextmanager
def served(*folders):
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(make_app(list(folders), "127.0.0.1", None), log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def ask(url, **headers):
    """-> status, headers and body of an answer."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


def page(url):
    status, _, body = ask(url)
    assert status == 200, body
    return body.decode()


def card(runs, name):
    return Site([runs]).overview().parts()[key_of(runs / name)]


def test_a_card_tells_state_step_speed_time_left_loss_figure_beside_chance_and_the_newest_picture(runs):
    shown = card(runs, "first")
    for words in ('badge running', "step <b>40</b> of 100", "16 samples/s", "<b>30 s</b> left", "loss <b>0.025</b>",
                  "edge F1 0.620", "chance 0.100", "real 0.900", "65 percent of the way", "edges on miniature",
                  "strips/step-00000040.png"):  # fmt: skip
        assert words in shown


def test_a_card_of_subjects_counts_what_became_of_them(runs):
    shown = card(runs, "pets")
    for words in ("<b>1</b> failed", "<b>1</b> overfits", "<b>1</b> learnt", "<b>1</b> not learnt", "<b>1</b> waiting",
                  "hat: it has no pictures", "Put some there", "5 subjects on sd15"):  # fmt: skip
        assert words in shown


def test_a_failed_run_says_why_and_what_to_do_and_a_later_start_takes_that_back(runs):
    run = runs / "first"
    write(run / "status.json", dict(state="failed", error="x", time=time.time()))
    lost = "RankLost: rank 1 has lost another rank. Started again, it goes on"
    cause = "StorageError: s3://shards/a.tar?X-Amz-Signature=abc cannot be read (403). Check the rights"
    for rank, error in enumerate((lost, cause)):
        write(run / f"failed-{rank}.json", dict(rank=rank, error=error, time=time.time()))
    shown = card(runs, "first")
    assert "badge failed" in shown and "rank 1: s3://shards/a.tar cannot be read (403)" in shown
    assert "Check the rights" in shown and "abc" not in shown
    write(run / "attempt.json", dict(number=2, time=time.time() + 1))
    assert "badge running" in card(runs, "first")


def test_starts_are_listed_with_their_ends_and_the_settings_that_each_changed(runs):
    own = runs / "pets" / "subjects" / "rex" / "metrics.jsonl"
    statuses = [(1.0, "SCHEDULED"), (100.0, "RUNNING"), (100.2, "RUNNING"), (200.0, "RUNNING"), (300.0, "FINISHED")]
    changed = dict(time=201.0, tags={"changed.steps": "40", "state": "running"})
    write(own, lines(*(dict(time=when, status=status) for when, status in statuses), changed))
    metrics = Metrics(own.parent)
    metrics.update()
    assert attempts(metrics) == [
        dict(number=2, begin=200.0, end=300.0, came_to="finished", changed=["steps=40"]),
        dict(number=1, begin=100.0, end=None, came_to="", changed=[]),
    ]


def test_a_run_without_news_is_silent_and_says_where_to_look(runs):
    shutil.rmtree(runs / "first")
    control_run(runs / "first", age=700.0)
    shown = card(runs, "first")
    assert "badge silent" in shown and "no news for 11 min" in shown
    assert "Look whether process 7 on elsewhere lives" in shown
    write(runs / "first" / "attempt.json", dict(number=1, host=socket.gethostname(), process=2**22 + 1))
    os.utime(runs / "first" / "attempt.json", (0, 0))
    assert "has ended without a word" in card(runs, "first")


@pytest.mark.parametrize(
    ("error", "what", "remedy"),
    [
        ("ConfigError: no such base. Give another", "no such base", "Give another"),
        ("OSError: [Errno 28] No space left", "[Errno 28] No space left", "The end of its log tells more"),
        ("KeyError: 'a'", "KeyError: 'a'", "The end of its log tells more"),
        ("RankFailed: x at 0.5 GiB is gone. Lower micro_batch_size=2, or wait", "x at 0.5 GiB is gone", "Lower micro"),
    ],
)
def test_errors_are_split_into_what_went_wrong_and_what_to_do(error, what, remedy):
    found = sentences(error)
    assert found[0] == what and found[1].startswith(remedy)


@pytest.mark.parametrize(
    ("state", "told", "word"),
    [
        ("failed", Course(5, None, 5), "failed"),
        ("finished", Course(5, 10, 5), "overfits"),
        ("training", Course(5, None, 5), "learnt"),
        ("finished", Course(None, None, None), "untold"),
        ("training", Course(None, None, None), "training"),
        (None, Course(None, None, None), "waiting"),
    ],
)
def test_what_became_of_a_subject_is_told_by_its_state_and_its_course(state, told, word):
    assert category(state, told, []) == word


def test_the_pages_of_a_run_of_a_batch_and_of_a_subject_tell_what_their_files_say(runs):
    write(
        runs / "first" / "bad-samples-0.jsonl",
        lines(dict(position=3, attempt=0, byte=512, shard="/d/a.tar", key="k7", part="image", error="cut")),
    )
    with served(runs) as here:
        one = page(f"{here}/run/{key_of(runs / 'first')}/")
        for words in ("edge F1", "0.620", "a.tar, byte 512", "k7", "image: cut", "controlbooth data quarantine",
                      "controlbooth train", "max_steps: 100", "strips/step-00000020.png", "training loss"):  # fmt: skip
            assert words in one
        batch = page(f"{here}/run/{key_of(runs / 'pets')}/")
        for words in ('data-category="learnt"', 'data-category="overfits"', "copies its pictures from step 20 on",
                      "60% of the way", "likeness 0.750"):  # fmt: skip
            assert words in batch
        subject = page(f"{here}/run/{key_of(runs / 'pets')}/subject/rex/")
        for words in ("a xyz rex", "learnt at step 20", "rex-step-00000020.png", "training loss", "0.750"):
            assert words in subject


def test_only_what_has_changed_is_sent_again(runs):
    with served(runs) as here:
        status, headers, body = ask(f"{here}/parts")
        assert status == 200 and len(json.loads(body)["parts"]) == 2
        time.sleep(0.1)
        mark = headers["ETag"]
        assert ask(f"{here}/parts", **{"If-None-Match": mark})[0] == 304
        write(runs / "pets" / "subjects" / "sun" / "status.json", dict(state="failed", error="gone"))
        status, headers, body = ask(f"{here}/parts", **{"If-None-Match": mark})
        assert status == 200 and list(json.loads(body)["parts"]) == [key_of(runs / "pets")]
        assert json.loads(body)["keys"] != [] and headers["ETag"] != mark
        assert len(json.loads(ask(f"{here}/parts", **{"If-None-Match": '"of-another-start"'})[2])["parts"]) == 2


def test_the_first_page_comes_at_once_and_cards_that_take_longer_follow(runs, monkeypatch):
    monkeypatch.setattr(sites, "FIRST_SECONDS", -1.0)
    site = Site([runs])
    first = site.overview().parts()
    assert len(first) == 2 and all("badge reading" in card for card in first.values())
    monkeypatch.setattr(sites, "FIRST_SECONDS", 60.0)
    version = site.overview().version
    assert all("badge reading" not in card for card in site.overview().parts().values())
    assert site.overview().parts(version) == {}


def test_the_card_of_a_run_that_is_over_is_made_again_only_when_a_file_of_it_changes(runs):
    run = control_run(runs / "done", state="finished", age=100.0)
    for path in [*run.rglob("*"), run]:
        os.utime(path, (1e9, 1e9))
    (made,) = (one for one in Finder([runs]).runs().values() if one.name == "done")
    card = made.card(time.time())
    assert card["state"] == "finished" and made.card(time.time()) is card
    write(run / "status.json", dict(state="failed", error="it is gone. Put it back", time=time.time()))
    assert made.card(time.time())["failure"]["remedy"] == "Put it back"


def test_runs_are_found_as_they_come_and_vanish_without_an_error(runs):
    with served(runs) as here:
        assert page(here).count("<article") == 2
        control_run(runs / "deep" / "er" / "third")
        assert page(here).count("<article") == 3 and "deep/er/third" in page(here)
        gone = f"{here}/run/{key_of(runs / 'first')}/"
        page(gone)
        shutil.rmtree(runs / "first")
        assert ask(gone)[0] == 404 and ask(f"{gone}parts")[0] == 404
        assert page(here).count("<article") == 2


def test_a_run_called_like_a_script_is_shown_as_text(runs):
    run = control_run(runs / NAMED.replace("/", "-"))
    write(run / "status.json", dict(state="failed", error=NAMED, time=time.time()))
    write(run / "subjects" / NAMED.replace("/", "-"), "")
    pets = runs / "pets" / "subjects.json"
    pets.write_text(json.dumps([*json.loads(pets.read_text()), dict(name="<img src=x>", steps=3)]))
    with served(runs) as here:
        for url in (here, f"{here}/run/{key_of(run)}/", f"{here}/run/{key_of(runs / 'pets')}/"):
            _, headers, body = ask(url)
            assert b"<script>alert" not in body and b"<img src=x>" not in body
            assert "script-src 'self'" in headers["Content-Security-Policy"]


def test_folders_whose_names_are_no_text_are_shown_too(runs):
    odd = os.fsdecode(b"caf\xe9")
    control_run(runs / odd)
    pets = runs / "pets" / "subjects"
    (pets / "rex").rename(pets / odd)
    with served(runs) as here:
        assert page(here).count("<article") == 3 and json.loads(ask(f"{here}/parts")[2])["keys"]
        for name in (odd, "pets"):
            page(f"{here}/run/{key_of(runs / name)}/")
            json.loads(page(f"{here}/run/{key_of(runs / name)}/parts"))


HOSTILE = (
    "../secret.png", "..%2fsecret.png", "%2e%2e/secret.png", "/etc/passwd", "samples/../../secret.png", "link.png",
    "linked/inner.png", "status.json", "config.yaml", ".", "samples", "pipe.png", "a%00.png", "samples/strips/none.png",
)  # fmt: skip


def test_nothing_but_pictures_of_the_run_itself_is_served(runs):
    run = runs / "first"
    strip(runs / "secret.png", 1)
    strip(runs / "elsewhere" / "inner.png", 1)
    (run / "link.png").symlink_to(runs / "secret.png")
    (run / "linked").symlink_to(runs / "elsewhere")
    os.mkfifo(run / "pipe.png")
    with served(runs) as here:
        for way in ("file", "small/320"):
            assert ask(f"{here}/run/{key_of(run)}/{way}/samples/strips/step-00000040.png")[0] == 200
            for name in HOSTILE:
                assert ask(f"{here}/run/{key_of(run)}/{way}/{name}")[0] == 404, name


def test_a_link_inside_a_run_is_not_read_for_the_page_either(runs):
    write(runs / "private.yaml", "password: opensesame")
    (runs / "first" / "config.yaml").unlink()
    (runs / "first" / "config.yaml").symlink_to(runs / "private.yaml")
    with served(runs) as here:
        assert "opensesame" not in page(f"{here}/run/{key_of(runs / 'first')}/")
    with pytest.raises(OSError):
        open_inside(runs / "first", "config.yaml")


def test_secrets_of_a_configuration_are_not_shown(runs):
    tree = dict(
        max_steps=100,
        tracking=dict(uri="postgresql://me:opensesame@host/db"),
        data=dict(shards="https://h/a?token=abcd1"),
    )
    write(runs / "first" / "config.yaml", yaml.safe_dump(tree))
    with served(runs) as here:
        shown = page(f"{here}/run/{key_of(runs / 'first')}/")
    assert "max_steps" in shown and "opensesame" not in shown and "abcd1" not in shown


CUT = ("", "{", "[]", "null", '{"state": 5}', "\udcff", "[" * 5000, "x: [", "a: &a [*a]")


def test_files_that_are_cut_or_of_another_kind_are_told_and_never_an_error(runs):
    names = [
        "first/status.json",
        "first/config.yaml",
        "first/control.json",
        "first/attempt.json",
        "first/metrics.jsonl",
    ]
    names += [
        "first/failed-0.json",
        "first/bad-samples-0.jsonl",
        "first/samples/strips/captions.json",
        "first/job/job.json",
    ]
    names += ["pets/subjects.json", "pets/measures.json", "pets/config.yaml", "first/samples/strips/step-00000040.png"]
    names += [f"pets/subjects/rex/{name}" for name in ("status.json", "validation.json", "best.json", "metrics.jsonl")]
    one, batch = (f"run/{key_of(runs / name)}" for name in ("first", "pets"))
    with served(runs) as here:
        for content in CUT:
            for name in names:
                (runs / name).parent.mkdir(parents=True, exist_ok=True)
                (runs / name).write_bytes(content.encode(errors="surrogateescape"))
            assert page(here).count("<article") == 2
            for address in (one, batch, f"{batch}/subject/rex"):
                page(f"{here}/{address}/")
            assert ask(f"{here}/{one}/small/320/samples/strips/step-00000040.png")[0] == 404


def test_what_cannot_be_read_is_named_on_the_page(runs):
    write(runs / "first" / "status.json", '{"state": "runn')
    with served(runs) as here:
        assert "status.json cannot be read" in page(f"{here}/run/{key_of(runs / 'first')}/")
        write(runs / "first" / "status.json", dict(state="stopped", time=time.time()))
        assert "cannot be read" not in page(f"{here}/run/{key_of(runs / 'first')}/")


def everything(folder):
    return {
        path: (path.lstat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in [folder, *folder.rglob("*")]
    }


def test_watching_changes_nothing_in_the_run_folders(runs):
    (runs / "first" / ".lock").touch()
    before = everything(runs)
    with served(runs) as here:
        for url in (here, *(f"{here}/run/{key_of(runs / name)}/" for name in ("first", "pets"))):
            page(url)
        ask(f"{here}/run/{key_of(runs / 'first')}/small/320/samples/strips/step-00000040.png")
    assert everything(runs) == before


def test_pictures_are_made_no_wider_than_they_are_shown_and_kept_by_the_browser(runs):
    wide = runs / "first" / "samples" / "step-00000040.png"
    Image.new("RGB", (2000, 500), "red").save(wide)
    with served(runs) as here:
        address = f"{here}/run/{key_of(runs / 'first')}"
        _, headers, body = ask(f"{address}/small/640/samples/step-00000040.png?v=1")
        assert "immutable" in headers["Cache-Control"] and headers["Content-Type"] == "image/webp"
        (runs / "shown.webp").write_bytes(body)
        assert Image.open(runs / "shown.webp").size == (640, 160)
        assert ask(f"{address}/small/641/samples/step-00000040.png")[0] == 404


def test_a_report_is_shown_without_its_scripts(runs):
    write(runs / "first" / "report.html", "<h1>report</h1>")
    with served(runs) as here:
        _, headers, body = ask(f"{here}/run/{key_of(runs / 'first')}/report")
    assert body == b"<h1>report</h1>" and "sandbox" in headers["Content-Security-Policy"]


def test_what_is_inside_a_run_is_no_run_and_hidden_folders_and_deep_ones_are_not_searched(tmp_path):
    for name in ("a", "a/checkpoints/step-00000001", ".hidden/b", "1/2/3/4/5/c", "1/2/3/d"):
        write(tmp_path / name / "config.yaml", "max_steps: 1")
    found = [run.name for run in Finder([tmp_path]).runs().values()]
    assert found == ["a", "1/2/3/d"]
    with pytest.raises(UserError, match="is no folder: give the folder of a run"):
        Finder([tmp_path / "none"])


def test_the_command_refuses_what_is_no_folder_in_a_line(tmp_path, capsys):
    assert controlbooth(["watch", str(tmp_path / "none")]) == 2
    assert "is no folder: give the folder of a run" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(why_no_browser() is not None, reason=str(why_no_browser()))
def test_a_browser_shows_a_run_live_draws_its_curves_and_plays_its_pictures(runs):
    run = runs / "first"
    with served(runs) as here, browser(1280, 800) as driver:
        live_page(driver, f"{here}/", "first", "1 running", "edge F1", "5 subjects")
        driver.find_element("id", "words").send_keys("pets")
        wait(lambda: "first" not in text(driver), "the filter")
        live_page(driver, f"{here}/run/{key_of(run)}/", "training loss", "Pictures over the steps", "step 40")
        assert len(driver.find_elements("css selector", ".chart svg polyline")) >= 4
        driver.execute_script("document.querySelector('[data-play]').click()")
        wait(lambda: "step 20" in text(driver), "the first frame")
        wait(lambda: "step 40" in driver.find_element("css selector", "[data-step]").text, "the last frame")
        with (run / "metrics.jsonl").open("a") as file:
            record = dict(step=77, time=time.time(), metrics={"loss": 0.0123, "samples_per_second": 16.0})
            file.write(lines(record))
        wait(lambda: "step 77 of 100" in text(driver), "the new step, without a reload", 20)
        assert driver.get_log("browser") == []


def test_pages_come_with_the_package():
    folder = Path(sites.__file__).parent
    assert {"watch.css", "watch.js", "page.html", "card.html"} <= {path.name for path in folder.iterdir()}


def test_a_long_error_keeps_its_remedy():
    what, remedy = sentences(f"TrainingStopped: the loss of {'sample-7, ' * 200} is not finite. Lower the rate")
    assert len(what) == 300 and what.endswith("…") and remedy == "Lower the rate"
