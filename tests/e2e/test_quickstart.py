import subprocess
import sys

COMMAND = [sys.executable, "-m", "controlbooth.launch.cli"]


def test_quickstart_dry_run_names_every_command_and_starts_nothing(tmp_path):
    done = subprocess.run([*COMMAND, "quickstart", "--dry-run"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0
    verbs = [line.split()[1] for line in done.stdout.splitlines()]
    assert verbs == ["data", "data", "train", "evaluate", "export"]
    assert not list(tmp_path.iterdir())


def test_evaluate_refuses_a_folder_that_is_no_run(tmp_path):
    done = subprocess.run([*COMMAND, "evaluate", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2
    assert (
        "holds neither a run's config.yaml nor a ControlNet's config.json" in done.stderr
        and "Traceback" not in done.stderr
    )
