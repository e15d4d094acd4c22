import json
import os
import subprocess
import sys

import jax

from jaxllm.core.machine import describe_machine, git_revision, versions


def git(folder, *command) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    return subprocess.run(
        ["git", "-C", folder, *who, *command], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_versions_are_those_of_the_packages():
    seen = versions()
    assert seen["jax"] == jax.__version__
    assert seen["python"] == ".".join(map(str, sys.version_info[:3]))


def test_asking_for_versions_and_machine_imports_no_jax():
    code = (
        "import sys, jaxllm.core.machine as m; m.versions(); d = m.describe_machine();"
        " assert 'jax' not in sys.modules and 'devices' not in d"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_revision_is_the_commit_and_says_when_tracked_files_differ(tmp_path):
    git(tmp_path, "init", "-q")
    assert git_revision(tmp_path) is None
    (tmp_path / "a.py").write_text("1")
    git(tmp_path, "add", "a.py")
    git(tmp_path, "commit", "-qm", "one")
    commit = git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "untracked").write_text("1")
    assert git_revision(tmp_path) == commit
    (tmp_path / "a.py").write_text("2")
    assert git_revision(tmp_path) == commit + "+dirty"


def test_an_untracked_folder_inside_a_checkout_has_no_revision(tmp_path):
    git(tmp_path, "init", "-q")
    (tmp_path / "a.py").write_text("1")
    git(tmp_path, "add", "a.py")
    git(tmp_path, "commit", "-qm", "one")
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "b.py").write_text("1")
    assert git_revision(tmp_path / "venv") is None
    assert git_revision(tmp_path / "missing") is None


def test_the_machine_is_described_in_json_values():
    described = json.loads(json.dumps(describe_machine()))
    assert described["devices"]["count"] == jax.device_count()
    assert 1 <= described["cores"] <= os.cpu_count()
    assert described["memory"] > 2**28
    assert described["cpu"]
