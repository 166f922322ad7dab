"""Two starts of one run in one folder, in processes and threads, and what each may still do."""

import contextlib
import json
import multiprocessing
import os
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from controlbooth.data.files.locks import NotALock
from controlbooth.data.files.records import Damaged
from controlbooth.models.attention import AttentionShape
from controlbooth.models.denoisers.unet import build_controlnet
from controlbooth.trainer.config.run import ValidationConfig
from controlbooth.trainer.config.section import ConfigError
from controlbooth.trainer.controlnet.validation import validate
from controlbooth.trainer.dreambooth import stack, stack_state, status
from controlbooth.trainer.engine.distributed import World, join, leave
from controlbooth.trainer.evaluation.held_out import HeldOutSet
from controlbooth.trainer.evaluation.strips import STRIPS, read_strips
from controlbooth.trainer.run import attempt as attempts
from controlbooth.trainer.run import checkpoint, saving
from controlbooth.trainer.run.attempt import GIVEN, RECORD, Attempt, Superseded, check_still_ours, only_run, write_text
from controlbooth.trainer.run.attention import choose_once
from controlbooth.trainer.tracking.spool import Spool, read_metrics

ALONE = World(0, 1, 0, torch.device("cpu"))


@pytest.fixture(autouse=True)
def world(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", GIVEN):
        monkeypatch.delenv(name, raising=False)
    join()
    yield
    leave()


@contextlib.contextmanager
def two_starts(run, monkeypatch):
    """The engine's starts 1 and 2, the second of which takes over while the first is still there."""
    monkeypatch.setenv(GIVEN, "1")
    with contextlib.ExitStack() as stack:
        old = stack.enter_context(only_run(run, ALONE))
        monkeypatch.setenv(GIVEN, "2")
        yield old, stack.enter_context(only_run(run, ALONE))


def notice(attempt):
    """Waits until the attempt has had time to see that it was replaced, and asks."""
    for _ in range(100):
        check_still_ours(attempt)
        time.sleep(0.05)


def made(attempt, step):
    """A checkpoint that is ready to be committed."""
    partial = attempt.folder / f"step-{step:08d}"
    partial.mkdir()
    (partial / "state.json").write_text(json.dumps({"step": step, "metrics": {}, "by": attempt.number}))
    return partial


def commit(attempt, step):
    final = checkpoint.folder_of(attempt.run, step)
    saving._commit(made(attempt, step), final, attempt)
    return final


def tree(run):
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_starts_are_numbered_and_leave_no_folder_behind(tmp_path):
    for number in (1, 2, 3):
        with only_run(tmp_path, ALONE) as attempt:
            assert attempt.number == number and attempt.folder.is_dir()
        assert not attempt.folder.exists()
        record = json.loads((tmp_path / RECORD).read_text())
        assert record["number"] == number and record["given"] is None and record["process"] > 0


def test_the_engines_number_is_taken_where_it_is_larger_and_a_wrong_one_is_refused(tmp_path, monkeypatch):
    for text, number in (("7", 7), ("7", 8), ("9", 9), ("3", 10)):
        monkeypatch.setenv(GIVEN, text)
        with only_run(tmp_path, ALONE) as attempt:
            assert attempt.number == number
    monkeypatch.setenv(GIVEN, "1.5")
    with pytest.raises(ConfigError, match="CONTROLBOOTH_ATTEMPT='1.5' is no whole number"), only_run(tmp_path, ALONE):
        pass


@pytest.mark.parametrize("first, second", [("", ""), ("", "1"), ("1", ""), ("1", "1"), ("2", "1")])
def test_a_second_training_is_refused_unless_the_engine_numbers_it_higher(tmp_path, monkeypatch, first, second):
    def number(text):
        monkeypatch.setenv(GIVEN, text) if text else monkeypatch.delenv(GIVEN, raising=False)

    number(first)
    with only_run(tmp_path, ALONE):
        before = tree(tmp_path)
        number(second)
        with pytest.raises(ConfigError, match=r"by another training \(process \d+ on .+, since 2\d{3}-"):
            with only_run(tmp_path, ALONE):
                pass
        assert tree(tmp_path) == before


def test_a_stale_start_commits_prunes_and_writes_nothing_once_a_newer_one_has_taken_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv(GIVEN, "1")
    with contextlib.ExitStack() as stack:
        old = stack.enter_context(only_run(tmp_path, ALONE))
        for step in (2, 4):
            commit(old, step)
        half_made = made(old, 6)
        spool = Spool(tmp_path, "uri", "tests", old.folder)
        spool.append({"step": 4, "metrics": {"loss": 4.0}})
        monkeypatch.setenv(GIVEN, "2")
        new = stack.enter_context(only_run(tmp_path, ALONE))
        theirs = Spool(tmp_path, "uri", "tests", new.folder)
        theirs.append({"step": 5, "metrics": {"loss": 5.0}})
        commit(new, 6)
        before = tree(tmp_path)

        for forbidden in (
            lambda: saving._commit(half_made, checkpoint.folder_of(tmp_path, 6), old),
            lambda: commit(old, 8),
            lambda: checkpoint.prune(tmp_path, 1, 0, old, checkpoint.folder_of(tmp_path, 10**6)),
            lambda: write_text(old, tmp_path / "status.json", "{}"),
            lambda: spool.update(run_id="stale"),
            lambda: notice(old),
        ):
            with pytest.raises((Superseded, FileNotFoundError)):
                forbidden()
        spool.append({"step": 99, "metrics": {"loss": 99.0}})  # into a file that has no name any more
        assert not spool.is_ours() and tree(tmp_path) == before
        assert [step for step, _, _ in read_metrics(tmp_path)] == [4, 5]
        check_still_ours(new)
        checkpoint.prune(tmp_path, 1, 0, new, checkpoint.folder_of(tmp_path, 10**6))
        assert [path.name for path in checkpoint.complete_checkpoints(tmp_path)] == ["step-00000006"]


def test_a_stale_task_of_an_array_puts_no_subject_or_state_over_those_of_its_successor(tmp_path, monkeypatch):
    lora, state = tmp_path / "subjects" / "rex" / stack.LORA_FILE, tmp_path / "rows" / "0-2" / "state" / "rank-0"

    def writes(attempt, value):
        yield lambda: stack.save_lora(attempt, {"lora": torch.full((2,), value)}, lora)
        yield lambda: status.write_status(attempt, tmp_path, "rex", state="finished", step=value)
        yield lambda: stack_state.write_state(attempt, state, stack_state.State({}, ["max"], {}))

    with two_starts(tmp_path / "rows" / "0-2", monkeypatch) as (old, new):
        for write in writes(new, 2):
            write()
        before = tree(tmp_path)
        for forbidden in writes(old, 1):
            with pytest.raises(Superseded, match="start 2 .* has taken .*0-2 over from this one, start 1"):
                forbidden()
        assert tree(tmp_path) == before and status.status_of(tmp_path, "rex")["step"] == 2


def test_whatever_fails_because_of_a_newer_start_is_told_in_one_message(tmp_path, monkeypatch):
    monkeypatch.setenv(GIVEN, "1")
    with pytest.raises(Superseded, match=r"start 2 \(process \d+ on .*\) has taken .* over from this one, start 1"):
        with only_run(tmp_path, ALONE) as old:
            monkeypatch.setenv(GIVEN, "2")
            with only_run(tmp_path, ALONE):
                (old.folder / "shard").write_bytes(b"")  # as DeepSpeed does, deep inside a save


def test_an_error_of_its_own_stays_what_it_is(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"), only_run(tmp_path, ALONE):
        (tmp_path / "missing").read_text()


def test_the_lock_of_a_successor_counts_while_the_old_process_still_holds_its_own(tmp_path, monkeypatch):
    with two_starts(tmp_path, monkeypatch):
        monkeypatch.delenv(GIVEN)
        with pytest.raises(ConfigError, match="is in use by another training"), only_run(tmp_path, ALONE):
            pass


def test_a_start_that_was_killed_leaves_nothing_that_stands_in_the_way(tmp_path):
    with only_run(tmp_path, ALONE):
        pass
    dead = Attempt(tmp_path, 5, "dead")
    dead.folder.mkdir()
    (made(dead, 3) / "big").write_bytes(bytes(1000))
    with only_run(tmp_path, ALONE) as attempt:
        assert attempt.number == 6 and not dead.folder.exists() and list(attempt.folder.iterdir()) == []


@pytest.mark.parametrize("content", ["{", "[]", '{"number": 1e400}', '{"number": null}', ""])
def test_a_record_that_cannot_be_read_names_the_way_out(tmp_path, content):
    (tmp_path / RECORD).write_text(content)
    with pytest.raises(Damaged, match="Delete it if no other training is in"), only_run(tmp_path, ALONE):
        pass


def test_a_lock_that_is_a_link_is_refused_and_what_it_leads_to_keeps_its_contents(tmp_path):
    precious = tmp_path / "precious.txt"
    precious.write_text("a file of somebody else")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(precious)
    with pytest.raises(NotALock, match=".lock is a symbolic link"), only_run(tmp_path / "run", ALONE):
        pass
    assert precious.read_text() == "a file of somebody else"


@settings(max_examples=8, deadline=None)
@given(pause=st.integers(0, 60))
def test_a_commit_is_before_the_successor_looks_or_never(tmp_path_factory, pause):
    """The old start commits as fast as it can, while a new one claims the run at some moment."""
    run = tmp_path_factory.mktemp("run")
    old = attempts._claim(run, True, None)
    started, refused = threading.Event(), []

    def stale():
        try:
            for step in range(1, 10_000):
                commit(old, step)
                if step > pause:
                    started.set()
        except (Superseded, FileNotFoundError) as error:
            refused.append(error)
        finally:
            started.set()

    thread = threading.Thread(target=stale)
    thread.start()
    started.wait()
    new = attempts._claim(run, True, None)
    seen = [path.name for path in checkpoint.complete_checkpoints(run)]
    thread.join()
    assert refused and attempts.is_superseded(old) and not attempts.is_superseded(new)
    assert [path.name for path in checkpoint.complete_checkpoints(run)] == seen


def claim(run, barrier, answers):
    barrier.wait()
    try:
        attempt = attempts._claim(run, True, None)
        answers.put((attempt.number, attempt.folder.is_dir()))
    except (Superseded, ConfigError):
        answers.put((0, False))


def test_of_starts_at_the_same_instant_one_has_the_run_in_the_end(tmp_path):
    context = multiprocessing.get_context("fork")
    for round_number in range(5):
        barrier, answers = context.Barrier(4), context.Queue()
        processes = [context.Process(target=claim, args=(tmp_path, barrier, answers)) for _ in range(4)]
        for process in processes:
            process.start()
        told = [answers.get(timeout=60) for _ in processes]
        for process in processes:
            process.join()
        (left,) = attempts._starts(tmp_path)
        record = attempts.read_record(tmp_path)
        assert left.order == (record["number"], record["identity"]), (round_number, told)
        assert record["number"] == max(number for number, _ in told)


def test_a_start_that_was_slow_does_not_bring_back_the_folder_of_one_that_was_removed(tmp_path):
    first, second = Attempt(tmp_path, 1, "a"), Attempt(tmp_path, 2, "b")
    for attempt in (first, second):
        attempt.folder.mkdir()
    attempts._remove(first, second)
    Attempt(tmp_path, 1, "c").folder.mkdir()  # it had read the numbers before the first was there
    with pytest.raises(Superseded):
        write_text(first, tmp_path / "status.json", "{}")


def test_nothing_moves_out_of_a_folder_that_a_library_has_made_anew(tmp_path, monkeypatch):
    with two_starts(tmp_path, monkeypatch) as (old, new):
        assert not old.folder.exists()
        partial = old.folder / "step-00000004"
        (partial / "controlnet").mkdir(parents=True)  # as diffusers' save_pretrained does
        with pytest.raises(Superseded):
            saving._commit(partial, checkpoint.folder_of(tmp_path, 4), old)
        with pytest.raises(Superseded):
            write_text(old, tmp_path / "status.json", "{}")
        with pytest.raises(Superseded):
            notice(old)
        check_still_ours(new)
        assert not checkpoint.folder_of(tmp_path, 4).exists() and not (tmp_path / "status.json").exists()


def test_a_stale_start_draws_no_validation_and_chooses_no_attention_over_those_of_the_newer_one(
    tmp_path, monkeypatch, load_tiny
):
    base = load_tiny("sd15")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    held = HeldOutSet("gray", ["a", "b"], [(0, 0), (0, 1)], ["a cat", "a dog"], pixels, pixels, None, None)
    config = ValidationConfig(samples=2, grid=2, sampling_steps=1, guidance_scale=1.0)
    grid = tmp_path / "samples" / "step-00000003.png"

    def write_all(attempt, steps):
        validate(
            base, build_controlnet(base.denoiser), held, config.model_copy(update=steps), ALONE, grid, None, attempt
        )

    def choose(attempt):
        choose_once("math", ALONE, "fp32", attempt, lambda: (AttentionShape(1, 2, 4, 4, 8),))

    with two_starts(tmp_path, monkeypatch) as (old, new):
        before = tree(tmp_path)
        for forbidden in (lambda: write_all(old, {}), lambda: choose(old)):
            with pytest.raises((Superseded, FileNotFoundError)):
                forbidden()
        assert tree(tmp_path) == before
        write_all(new, {})
        choose(new)
        before = tree(tmp_path)
        names = {name for name in before if not name.startswith((".", "samples/."))}
        strips = {f"samples/strips/{name}" for name in ("captions.json", "conditions.png", "targets.png", grid.name)}
        assert names == {RECORD, "attention.json", f"samples/{grid.name}", *strips}
        assert read_strips(tmp_path / STRIPS).captions == held.captions
        config = config.model_copy(update=dict(guidance_scale=3.0))  # another picture without control
        for steps in ({}, dict(guidance_scale=1.0)):
            with pytest.raises((Superseded, FileNotFoundError)):
                write_all(old, steps)
        with pytest.raises(Superseded):
            choose(old)
        assert tree(tmp_path) == before and not old.folder.exists()


def test_after_a_step_no_disk_is_asked_whether_the_run_is_still_ours(tmp_path, monkeypatch):
    with only_run(tmp_path, ALONE) as own:
        asked = []

        def noted(real):
            def call(*what, **how):
                asked.append(threading.get_ident())
                return real(*what, **how)

            return call

        for name in ("stat", "fstat", "open", "listdir", "scandir"):
            monkeypatch.setattr(os, name, noted(getattr(os, name)))
        time.sleep(1.5 * attempts.ASK_EVERY_SECONDS)
        for _ in range(1000):
            check_still_ours(own)
        assert asked and threading.get_ident() not in asked


def test_one_rank_of_a_machine_asks_whether_a_run_is_still_ours(tmp_path, monkeypatch):
    monkeypatch.setattr(attempts, "from_first_rank", lambda answer: made_by_first)
    made_by_first = attempts.Attempt(tmp_path, 1, "id")
    made_by_first.folder.mkdir()
    for local_rank, asks in ((0, 1), (1, 0)):
        with only_run(tmp_path, World(8 + local_rank, 16, local_rank, torch.device("cpu"), 8)):
            assert sum(thread.name == "fence" for thread in threading.enumerate()) == asks
        for thread in threading.enumerate():
            if thread.name == "fence":
                thread.join(5.0)
