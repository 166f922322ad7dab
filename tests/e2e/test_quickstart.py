import subprocess
import sys

COMMAND = [sys.executable, "-m", "controlbooth.launch.cli"]


def test_quickstart_dry_run_names_every_command_and_starts_nothing(tmp_path):
    done = subprocess.run([*COMMAND, "quickstart", "--dry-run"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0
    verbs = [line.split()[1] for line in done.stdout.splitlines()]
    assert verbs == ["data", "data", "train", "fidelity", "export"]
    assert not list(tmp_path.iterdir())


def test_fidelity_refuses_a_folder_that_is_no_run(tmp_path):
    done = subprocess.run([*COMMAND, "fidelity", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2
    assert "holds no config.yaml, so it is no run" in done.stderr and "Traceback" not in done.stderr
