"""The audit log: appended, whole after a torn line, said once, and readable."""

from controlbooth.deploy.retrain import audit


def test_entries_come_back_in_order_with_their_facts(tmp_path):
    audit.append(tmp_path, 1, 1, "started", "no round was decided yet", samples=10, dataset_fingerprint="ab")
    audit.append(tmp_path, 2, 1, "promoted", "better", figures={"edge_f1": {"a": 0.1}}, version=1)
    first, second = audit.read(tmp_path)
    assert (first["lease"], first["round"], first["decision"], first["samples"]) == (1, 1, "started", 10)
    assert second["figures"] == {"edge_f1": {"a": 0.1}} and second["time"] >= first["time"]


def test_what_was_said_last_is_not_said_again(tmp_path):
    for _ in range(3):
        audit.append(tmp_path, 1, None, "nothing", "growth: 0 new samples")
    audit.append(tmp_path, 2, None, "nothing", "growth: 5 new samples")
    audit.append(tmp_path, 3, None, "nothing", "growth: 0 new samples")
    assert [one["reason"][8] for one in audit.read(tmp_path)] == ["0", "5", "0"]


def test_a_line_that_a_full_disk_cut_off_hides_no_other(tmp_path):
    audit.append(tmp_path, 1, 1, "started", "first")
    with open(tmp_path / audit.NAME, "a") as file:
        file.write('{"time": 3, "decis')
    audit.append(tmp_path, 2, 1, "promoted", "second")
    assert [one["reason"] for one in audit.read(tmp_path)] == ["first", "second"]


def test_it_is_told_to_people_with_versions_and_fingerprints(tmp_path):
    audit.append(tmp_path, 1, 3, "refused", "edge_f1 " + "word " * 60, version=4, dataset_fingerprint="abcdef")
    shown = audit.describe(audit.read(tmp_path))
    assert "round 3   refused" in shown and "dataset fingerprint abcdef, version 4" in shown
    assert max(map(len, shown.splitlines())) <= audit.WIDTH
