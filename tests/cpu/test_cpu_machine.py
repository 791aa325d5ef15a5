"""The default model answers, and answers the same, on machines with less: one core, AVX2 only, no compiler."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from martlet import hub
from martlet.runners import machine

ANSWER = "The capital of France is Paris.\n"
ASK = (
    "from martlet.cli import main; main(['infer', '--prompt', 'What is the capital of France?', '--temperature', '0'])"
)

MACHINES = {
    "as it is": ("", "C++"),
    "one core": ("import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])", "1 threads"),
    "AVX2 only": (
        "from martlet.kernels.cpu import library as l; l.Executor.__init__ = "
        "(lambda f: lambda self, n, **more: f(self, n, **{**more, 'isa': 'avx2'}))(l.Executor.__init__)",
        "C++ (avx2)",
    ),
    "portable kernels": (
        "from martlet.kernels.cpu import library as l; l.Executor.__init__ = "
        "(lambda f: lambda self, n, **more: f(self, n, **{**more, 'isa': 'generic'}))(l.Executor.__init__)",
        "C++ (generic)",
    ),
    "more threads than cores": (
        "import os; from martlet.runners import machine; machine.usable_cores = lambda: 8",
        "8 threads",
    ),
    "no library and no compiler": (
        "from martlet.kernels.cpu import build; build.find = lambda: None; os = build.os; os.environ['PATH'] = ''",
        "no C++ compiler found",
    ),
}


@pytest.mark.parametrize("name", MACHINES)
def test_the_default_model_answers(name):
    hub.resolve("smollm2-135m-instruct")
    change, told = MACHINES[name]
    done = subprocess.run([sys.executable, "-c", f"{change}\n{ASK}"], capture_output=True, text=True, timeout=120)
    assert done.stdout == ANSWER and told in done.stderr, done.stderr
    assert done.stderr.count("torch runs the model instead") == (name == "no library and no compiler")


@pytest.mark.parametrize(("quota", "cores"), [("max 100000", 4), ("100000 100000", 1), ("150000 100000", 2), ("", 4)])
def test_cores_follow_the_control_groups_quota(quota, cores, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    files = {"cpu.max": quota, "cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"}
    monkeypatch.setattr(machine, "_cgroup_file", lambda name, controller="": files.get(name, ""))
    assert machine.usable_cores() == cores


def test_own_group_of_a_controller_is_read(tmp_path):
    """Version 1 has a group for each controller; another controller's root is not ours."""
    for folder, quota in (("cpu", "-1"), ("cpu/ours", "100000")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "cpu.cfs_quota_us").write_text(quota)
    groups = tmp_path / "groups"
    groups.write_text("9:pids:/\n4:memory:/other\n1:cpu,cpuacct:/ours\n0::/\n")
    assert machine._cgroup_file("cpu.cfs_quota_us", "cpu", tmp_path, groups) == "100000"
    assert machine._cgroup_file("cpu.max", "", tmp_path, groups) == ""
