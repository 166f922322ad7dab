import json
import re

import cv2
import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from controlbooth.launch import submit
from controlbooth.launch.commands import dreambooth_run
from controlbooth.launch.preflight import subjects
from controlbooth.trainer.config.section import ConfigError
from controlbooth.trainer.config.subjects import load_run
from controlbooth.trainer.dreambooth.manifest import load_subjects, settle, share_of_rank

RUN = dict(name="r", model=dict(base="miniature"), identifiers=["kcz", "bcf", "bpd"], resolution=64, steps=100)


@pytest.fixture
def folder(tmp_path):
    for name in ("rex", "mug", "cup"):
        (tmp_path / name).mkdir()
        for number in (2, 0, 1):
            cv2.imwrite(str(tmp_path / name / f"{number}.png"), np.full((64, 64, 3), number, np.uint8))
    (tmp_path / "rex" / "notes.txt").write_text("no picture")
    return tmp_path


def run_of(folder, **changes):
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(RUN | changes))
    return load_run(path)


def manifest(folder, rows, name="subjects.yaml"):
    path = folder / name
    path.write_text(yaml.safe_dump(rows))
    return path


def row(name, **changes):
    return dict(name=name, images=name, class_noun="dog") | changes


def test_what_a_subject_leaves_out_comes_from_the_run(folder):
    path = manifest(folder, [row("rex"), row("mug", class_noun="mug", identifier="bcf", steps=7, rank=2), row("cup")])
    subjects, faults = load_subjects(path)
    tasks, more = settle(subjects, run_of(folder))
    assert faults == more == {}
    assert [(t.identifier, t.instance_prompt, t.class_prompt, t.steps, t.rank) for t in tasks] == [
        ("kcz", "a kcz dog", "a dog", 100, 4),
        ("bcf", "a bcf mug", "a mug", 7, 2),
        ("bpd", "a bpd dog", "a dog", 100, 4),
    ]
    assert [path.name for path in tasks[0].images] == ["0.png", "1.png", "2.png"]


def test_csv_jsonl_and_parquet_say_the_same_as_yaml(folder):
    import pyarrow
    import pyarrow.parquet

    rows = [row("rex"), row("mug", identifier="xyz", steps=7, learning_rate=1e-3)]
    expected = load_subjects(manifest(folder, {"subjects": rows}))
    header = "name,images,class_noun,identifier,steps,learning_rate"
    (folder / "s.csv").write_text(f"{header}\nrex,rex,dog,,,\nmug,mug,dog,xyz,7,1e-3\n")
    (folder / "s.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    whole = [dict.fromkeys(rows[1]) | one for one in rows]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(whole), folder / "s.parquet")
    for name in ("s.csv", "s.jsonl", "s.parquet"):
        assert load_subjects(folder / name) == expected, name


@pytest.mark.parametrize(
    ("rows", "name", "message"),
    [
        ([row("rex"), row("rex")], "rex", "2 subjects are named 'rex'; give each its own name"),
        ([row("mug"), row("rex", images="nowhere")], "rex", "nowhere is no folder"),
        ([row("mug", identifier="kcz"), row("rex", identifier="kcz")], "rex", "'kcz' is another subject's too"),
        ([row("mug"), row("rex", prompt="a mug")], "rex", "unknown key 'prompt'; did you mean 'instance_prompt'?"),
        ([row("mug"), row("rex", stepz=3)], "rex", "unknown key 'stepz'; did you mean 'steps'?"),
        ([row("mug"), {"name": "rex", "images": "rex"}], "rex", "'class_noun' is missing"),
        ([row("mug"), row("rex", steps=-1)], "rex", "'steps' is -1"),
        ([row("mug"), row("rex", images="x" * 300)], "rex", "cannot be read: File name too long"),
        (
            [row("mug"), row("rex", instance_prompt="a {foo}")],
            "rex",
            "instance_prompt='a {foo}' is no template ({foo} is",
        ),
        ([row("mug"), row("rex", class_prompt="a {class_noun.x}")], "rex", "may hold {identifier} and {class_noun}"),
        ([row("mug"), "rex"], "row 2", "no mapping with name, images and class_noun"),
        ([row("mug"), row("n" * 300)], "row 2", "should have at most 200 characters"),
        ([row("mug"), row("..")], "row 2", "'name' is '..'"),
        ([row("mug"), row("../../x")], "row 2", "'name' is '../../x'"),
        ([row("mug"), row("x\ny")], "row 2", "'name' is 'x\\ny'"),
        ([row("mug"), row("caf\u00e9")], "row 2", "'name' is 'café'"),
        ([row("mug"), row(7)], "row 2", "'name' is 7"),
        ([row("ok"), row("OK")], "ok", "subjects are named 'ok', 'OK', which some disks take for one folder"),
        ([row("ok"), row("OK")], "OK", "give them other names"),
        ([row("rex"), row("rex.")], "rex.", "subjects are named 'rex', 'rex.'"),
        ([row("rex"), row("rex", steps=-1)], "rex", "2 subjects are named 'rex'"),
    ],
)
def test_what_is_wrong_with_one_subject_is_said_of_it_alone(folder, rows, name, message):
    subjects, faults = load_subjects(manifest(folder, rows))
    tasks, more = settle(subjects, run_of(folder))
    assert message in (faults | more)[name]
    assert {task.name for task in tasks}.isdisjoint(faults | more)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(names=st.lists(st.one_of(st.text(max_size=5), st.sampled_from(["rex", "REX", "..", "a/b", "n" * 201]))))
def test_what_becomes_a_folder_is_called_so_that_any_disk_takes_it_and_no_other_is(tmp_path_factory, names):
    folder = tmp_path_factory.mktemp("rows")
    subjects, faults = load_subjects(manifest(folder, [row(name) for name in names]))
    assert len(subjects) + len(faults) <= len(names) and bool(subjects or faults) == bool(names)
    folders = [*faults, *(subject.name for subject in subjects)]
    assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*|row \d+", name) and len(name) <= 200 for name in folders)
    kept = [subject.name.lower() for subject in subjects]
    assert len(set(kept)) == len(kept)


def test_identifiers_that_run_out_are_asked_for(folder):
    subjects, _ = load_subjects(manifest(folder, [row("rex"), row("mug")]))
    tasks, faults = settle(subjects, run_of(folder, identifiers=["one"]))
    assert [task.name for task in tasks] == ["rex"]
    assert "controlbooth dreambooth identifiers" in faults["mug"]


def test_a_subject_that_is_added_at_the_end_changes_no_other(folder):
    few, _ = settle(load_subjects(manifest(folder, [row("rex"), row("mug")]))[0], run_of(folder))
    more, _ = settle(load_subjects(manifest(folder, [row("rex"), row("mug"), row("cup")]))[0], run_of(folder))
    assert more[:2] == few


def test_ranks_share_the_subjects_evenly_and_without_a_word(folder):
    subjects, _ = load_subjects(manifest(folder, [row("rex", steps=900), row("mug", steps=400), row("cup", steps=500)]))
    tasks, _ = settle(subjects, run_of(folder))
    shares = [[task.name for task in share_of_rank(tasks, rank, 2)] for rank in (0, 1)]
    assert shares == [["rex"], ["cup", "mug"]]
    assert share_of_rank(tasks, 0, 1) == sorted(tasks, key=lambda task: -task.steps)


@pytest.mark.parametrize(
    "template",
    ["a {identifer} dog", "a {} dog", "a {identifier", "a {identifier.foo}", "a {class_noun[x]}", "{identifier!x}"],
)
def test_a_template_of_other_words_is_refused(folder, template):
    with pytest.raises(ConfigError, match="is no template.*may hold {identifier} and {class_noun}"):
        run_of(folder, instance_prompt=template)


@pytest.mark.parametrize(
    "changes",
    [{"learning_rate": float("inf")}, {"prior": {"weight": float("inf")}}, {"prior": {"guidance_scale": float("inf")}}],
)
def test_numbers_that_are_not_finite_are_refused(folder, changes):
    with pytest.raises(ConfigError, match="is inf: Input should be a finite number"):
        run_of(folder, **changes)


def test_a_manifest_that_cannot_be_read_is_named(folder):
    with pytest.raises(ConfigError, match="nothing.yaml does not exist"):
        load_subjects(folder / "nothing.yaml")
    (folder / "text.yaml").write_text("just words")
    with pytest.raises(ConfigError, match="text.yaml holds no list of subjects"):
        load_subjects(folder / "text.yaml")


def test_a_dry_run_shows_the_plan_and_every_fault(folder, capsys):
    path = manifest(folder, [row("rex"), row("mug"), row("cup", images="nowhere")])
    run_of(folder)
    assert dreambooth_run.main([str(path), str(folder / "run.yaml"), "--processes", "2", "--dry-run"]) == 2
    shown = capsys.readouterr()
    assert "subjects   2, 8 together on each of 2 ranks" in shown.out and "'a kcz dog', 100 steps" in shown.out
    assert "cup: " in shown.err and "nowhere is no folder" in shown.err
    (folder / "rex" / "1.png").write_text("no picture")
    (folder / "rex" / "3.png").symlink_to("nowhere")
    (folder / "mug" / "1.png").unlink()
    (folder / "mug" / "1.png").mkdir()
    (folder / "cup" / "1.png").write_bytes((folder / "cup" / "0.png").read_bytes())
    path = manifest(folder, [row("rex"), row("mug"), row("cup"), row("dot", images="dot")])
    (folder / "dot").mkdir()
    cv2.imwrite(str(folder / "dot" / "0.png"), np.zeros((64, 64, 3), np.uint8))
    assert (
        dreambooth_run.main([str(path), str(folder / "run.yaml"), "identifiers=[kcz, bcf, bpd, red]", "--dry-run"]) == 2
    )
    shown = capsys.readouterr()
    assert re.search("rex: .*1.png: .*cannot be decoded", shown.err)
    assert re.search("mug: .*1.png cannot be read: Is a directory", shown.err)
    assert "cup: 1 of its 3 pictures are copies" in shown.err and "subjects   1, " in shown.out
    with pytest.raises(ValueError, match="model.base is 'no/model', which does not exist"):
        dreambooth_run.main([str(path), str(folder / "run.yaml"), "model.base=no/model", "--dry-run"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["output=FILE"], "output is 'FILE', but FILE is a file. Give another folder"),
        (["output=FILE/below"], "output is 'FILE/below', but FILE is a file"),
        (["output=FOLDER", "name=run.yaml"], "output is 'FOLDER', but FILE is a file"),
        (["prior.cache=FILE"], "prior.cache is 'FILE', but FILE is a file"),
        (["resolution=8"], "resolution is 8, and the base draws 64 x 64: .*Set resolution to 64, or prior.weight to 0"),
    ],
)
@pytest.mark.parametrize("arguments", [[], ["--dry-run"]])
def test_what_would_stop_every_subject_is_refused_before_anything_starts(folder, changes, message, arguments):
    path, run = manifest(folder, [row("rex"), row("mug")]), folder / "run.yaml"
    run_of(folder, output=str(folder / "runs"))

    def placed(text):
        return text.replace("FILE", str(run)).replace("FOLDER", str(folder))

    overrides = [placed(one) for one in changes]
    with pytest.raises(ValueError, match=placed(message)):
        dreambooth_run.main([str(path), str(run), *overrides, *arguments])
    with pytest.raises(ValueError, match=placed(message)):
        submit.local_main([str(run), *overrides, "--subjects", str(path), *arguments])
    assert not (folder / "runs").exists()


def test_without_class_pictures_their_folder_and_their_size_do_not_matter(folder):
    config = run_of(folder, resolution=8, prior=dict(weight=0.0, cache=str(folder / "run.yaml")))
    assert list(dreambooth_run.run_problems(config)) == []
    assert not [one for one in subjects.folder_problems(config) if "prior" in one]


def test_a_dry_run_of_a_job_opens_the_pictures_of_all_subjects_too(folder, capsys):
    (folder / "mug" / "1.png").write_bytes(b"no picture")
    path = manifest(folder, [row("rex"), row("mug")])
    run_of(folder, output=str(folder / "runs"))
    arguments = [str(folder / "run.yaml"), "--subjects", str(path), "--dry-run"]
    assert submit.local_main(arguments) == 2
    shown = capsys.readouterr()
    assert re.search("controlbooth launch local: mug: .*1.png: .*cannot be decoded", shown.err) and shown.out
    (folder / "mug" / "1.png").unlink()
    assert submit.local_main(arguments) == 0
    assert capsys.readouterr().err == "" and not (folder / "runs").exists()
