"""Answers are kept twice and counted once, whatever is repeated, replayed, cut or killed."""

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from controlbooth.data.errors import UserError
from controlbooth.data.files.records import Damaged
from controlbooth.trainer.study.answers import (
    AGAIN,
    DATABASE,
    KEPT,
    LINES,
    STORED,
    Answer,
    Answers,
    counted,
    read_answers,
)

DIGEST = "d" * 64


@pytest.fixture
def answers(tmp_path):
    opened = Answers(tmp_path, DIGEST)
    yield opened
    opened.close()


def make(identity="answer-1", rater="r", trial="t", ranks=(1, 2), replaces=""):
    return Answer(identity, rater, trial, ("a", "b"), ranks, 2.0, replaces)


def test_an_answer_is_in_both_files_when_it_is_stored(answers, tmp_path):
    (outcome,) = answers.add([make()])
    assert outcome.what == STORED and outcome.counts is not None and outcome.counts.time > 0
    assert read_answers(tmp_path, DIGEST) == [outcome.counts]
    assert json.loads((tmp_path / LINES).read_text())["id"] == "answer-1"


def test_the_same_answer_sent_again_is_stored_once_and_another_one_does_not_take_its_place(answers, tmp_path):
    answers.add([make()])
    assert answers.add([make()])[0].what == AGAIN
    replayed = answers.add([make("answer-2", ranks=(2, 1))])[0]
    assert replayed.what == KEPT and replayed.counts is not None and replayed.counts.ranks == (1, 2)
    assert answers.add([make(ranks=(2, 1))])[0].what == KEPT  # one id for two answers
    assert len(read_answers(tmp_path, DIGEST)) == len((tmp_path / LINES).read_text().splitlines()) == 1


def test_a_correction_names_what_it_replaces_and_both_are_kept(answers, tmp_path):
    answers.add([make(), make("answer-2", ranks=(2, 1), replaces="answer-1")])
    assert answers.add([make("answer-3", replaces="answer-1")])[0].what == KEPT  # that is not the last one any more
    assert answers.add([make("answer-4", trial="u", replaces="answer-1")])[0].what == KEPT
    kept = read_answers(tmp_path, DIGEST)
    assert [one.revision for one in kept] == [1, 2]
    assert [one.ranks for one in counted(kept)] == [(2, 1)] == [answers.of_rater("r")["t"].ranks]


def test_whichever_of_the_two_files_is_lost_comes_back_from_the_other(tmp_path):
    first = Answers(tmp_path, DIGEST)
    first.add([make(f"answer-{n}", trial=f"t{n}") for n in range(20)])
    kept = read_answers(tmp_path, DIGEST)
    first.close()
    for name in (DATABASE, LINES):
        (tmp_path / name).unlink()
        assert read_answers(tmp_path, DIGEST) == kept
        Answers(tmp_path, DIGEST).close()
        assert read_answers(tmp_path, DIGEST) == kept
        assert [json.loads(line)["id"] for line in (tmp_path / LINES).read_text().splitlines()] == [
            one.id for one in kept
        ]


def test_a_line_that_was_cut_is_written_whole_and_a_damaged_one_is_named(tmp_path):
    first = Answers(tmp_path, DIGEST)
    first.add([make(f"answer-{n}", trial=f"t{n}") for n in range(3)])
    first.close()
    whole = (tmp_path / LINES).read_bytes()
    (tmp_path / LINES).write_bytes(whole[:-20])
    Answers(tmp_path, DIGEST).close()
    assert (tmp_path / LINES).read_bytes() == whole
    (tmp_path / LINES).write_bytes(whole.replace(b'"answer-1"', b"no text", 1))
    with pytest.raises(Damaged, match="line 2.*Move it away"):
        Answers(tmp_path, DIGEST)


def test_a_line_that_stands_twice_costs_none_of_those_that_come_after(tmp_path):
    first = Answers(tmp_path, DIGEST)
    first.add([make()])
    first.close()
    (tmp_path / LINES).write_bytes((tmp_path / LINES).read_bytes() * 3)
    again = Answers(tmp_path, DIGEST)
    again.add([make("answer-2", trial="u")])
    again.close()
    assert [json.loads(line)["id"] for line in (tmp_path / LINES).read_text().splitlines()] == ["answer-1", "answer-2"]


def test_two_servers_of_one_study_and_answers_to_another_plan_are_refused(answers, tmp_path):
    with pytest.raises(UserError, match="is served already"):
        Answers(tmp_path, DIGEST)
    answers.add([make()])
    with pytest.raises(UserError, match="answers to another plan: dddddddddddd"):
        read_answers(tmp_path, "e" * 64)


def test_a_file_that_is_no_database_is_damaged_with_its_remedy(tmp_path):
    (tmp_path / DATABASE).write_bytes(b"no database, but long enough to be looked at" * 40)
    with pytest.raises(Damaged, match="Move it away: the next `study serve`"):
        Answers(tmp_path, DIGEST)


def test_many_threads_at_once_lose_and_double_nothing(answers, tmp_path):
    def rate(rater):
        for number in range(20):
            for _ in range(2):  # each answer is sent twice
                answers.add([make(f"{rater}-{number:04d}", rater=rater, trial=f"t{number}")])

    threads = [threading.Thread(target=rate, args=(f"rater{n}",)) for n in range(6)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    kept = read_answers(tmp_path, DIGEST)
    assert len(kept) == 120 == len({(one.rater, one.trial) for one in kept})
    assert sorted(json.loads(line)["id"] for line in (tmp_path / LINES).read_text().splitlines()) == sorted(
        one.id for one in kept
    )


PROGRAM = """
import sys
from pathlib import Path
from controlbooth.trainer.study.answers import Answer, Answers
answers = Answers(Path(sys.argv[1]), "d" * 64)
for number in range(10**6):
    answers.add([Answer(f"{sys.argv[2]}-{number:06d}", sys.argv[2], f"t{number}", ("a", "b"), (1, 2), 1.0)])
    print(number, flush=True)
"""


def test_what_a_page_was_told_is_stored_survives_kill_9(tmp_path):
    for life in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(tmp_path), f"life{life}"], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        told = [int(process.stdout.readline()) for _ in range(25)]
        os.kill(process.pid, signal.SIGKILL)
        told += [int(line) for line in process.stdout.read().splitlines() if line]
        process.wait()
        own = {one.id for one in read_answers(tmp_path, DIGEST) if one.rater == f"life{life}"}
        assert {f"life{life}-{number:06d}" for number in told} <= own
    Answers(tmp_path, DIGEST).close()
    lines = [json.loads(line)["id"] for line in (tmp_path / LINES).read_text().splitlines()]
    assert len(lines) == len(set(lines)) and set(lines) == {one.id for one in read_answers(tmp_path, DIGEST)}


class Interleavings(RuleBasedStateMachine):
    """Pages that answer, correct, retry and replay, and a server that is stopped with its files cut or lost.

    The model holds, of each rater and trial, the answers that were acknowledged.
    """

    sent = Bundle("sent")

    def __init__(self):
        super().__init__()
        import tempfile
        from pathlib import Path

        self.folder = Path(tempfile.mkdtemp(prefix="answers-"))
        self.answers = Answers(self.folder, DIGEST)
        self.model: dict[tuple[str, str], list[Answer]] = {}
        self.number = 0

    def teardown(self):
        import shutil

        self.answers.close()
        shutil.rmtree(self.folder)

    def give(self, answer):
        (outcome,) = self.answers.add([answer])
        own = self.model.setdefault((answer.rater, answer.trial), [])
        known = [one for one in own if one.id == answer.id]
        if known:
            assert outcome.what == AGAIN
        elif answer.replaces == (own[-1].id if own else ""):
            assert outcome.what == STORED
            own.append(answer)
        else:
            assert outcome.what == KEPT
        assert (outcome.counts.id if outcome.counts else None) == (own[-1].id if own else None)
        return answer

    @rule(target=sent, rater=st.sampled_from("ab"), trial=st.sampled_from("xyz"), first=st.booleans())
    def answer(self, rater, trial, first):
        self.number += 1
        return self.give(make(f"answer-{self.number:04d}", rater, trial, (1, 2) if first else (2, 1)))

    @rule(target=sent, before=sent)
    def correct(self, before):
        self.number += 1
        return self.give(replace(before, id=f"answer-{self.number:04d}", ranks=(2, 1), replaces=before.id))

    @rule(before=sent)
    def retry(self, before):
        own = self.model[before.rater, before.trial]
        if any(one.id == before.id for one in own):
            self.give(before)

    @rule(cut=st.sampled_from(["nothing", "half a line", "lines", "database"]))
    def restart(self, cut):
        self.answers.close()
        if cut == "half a line":
            content = (self.folder / LINES).read_bytes()
            (self.folder / LINES).write_bytes(content[: max(0, len(content) - 9)])
        if cut == "lines":
            (self.folder / LINES).unlink()
        if cut == "database":
            for path in self.folder.glob(f"{DATABASE}*"):
                path.unlink()
        self.answers = Answers(self.folder, DIGEST)

    @invariant()
    def nothing_is_lost_and_nothing_is_doubled(self):
        wanted = sorted(one.id for own in self.model.values() for one in own)
        assert sorted(one.id for one in read_answers(self.folder, DIGEST)) == wanted
        assert sorted(json.loads(line)["id"] for line in (self.folder / LINES).read_text().splitlines()) == wanted
        counting = {(one.rater, one.trial): one.id for one in counted(read_answers(self.folder, DIGEST))}
        assert counting == {key: own[-1].id for key, own in self.model.items() if own}


Interleavings.TestCase.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
test_no_interleaving_loses_or_doubles_an_answer = Interleavings.TestCase
