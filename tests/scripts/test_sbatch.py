"""The sbatch script's parts that need no Slurm: ports for every job number, proxies, and what it refuses at once."""

from __future__ import annotations

import re
import shutil
import subprocess
from itertools import pairwise

import pytest

from .bash import EXAMPLES, clean

SBATCH = EXAMPLES / "slurm" / "fipo.sbatch"


def functions(*names: str) -> str:
    """The text of these functions of the script."""
    text = SBATCH.read_text()
    return "\n".join(re.search(rf"^{name}\(\) {{\n.*?^}}$", text, re.DOTALL | re.MULTILINE)[0] for name in names)


def bash(program: str, **variables: str) -> list[str]:
    command = ["bash", "-c", f"set -euo pipefail\n{program}"]
    result = subprocess.run(command, env=clean(**variables), capture_output=True, text=True, check=True)
    return result.stdout.split()


def blocks(jobs: range, attempts: range) -> dict[int, list[int]]:
    """First port per job number and attempt, as the script computes it."""
    program = f"""{functions("ports_of")}
    for ((SLURM_JOB_ID = {jobs.start}; SLURM_JOB_ID < {jobs.stop}; SLURM_JOB_ID += {jobs.step})); do
       for ((attempt = {attempts.start}; attempt < {attempts.stop}; attempt++)); do ports_of "${{attempt}}"; done
    done"""
    ports = iter(map(int, bash(program)))
    return {job: [next(ports) for _ in attempts] for job in jobs}


@pytest.mark.parametrize("jobs", [range(1, 1001), range(4_000_000_001, 4_000_000_400), range(7, 70_000_000, 654_321)])
def test_every_job_and_attempt_has_ports_that_are_free_to_choose(jobs):
    for job, starts in blocks(jobs, range(48)).items():
        assert set(starts) <= set(range(20000, 32768 - 49)), job
        assert len(set(starts)) == len(starts), "attempts, also after restarts, take other ports"


def test_jobs_near_each_other_have_other_ports_at_every_attempt():
    """Jobs that may share a node: none of ten numbers meets another, whichever of three attempts either is at, before
    or after its first restart (attempts 16 to 18)."""
    found = {
        job: {starts[i] for i in (0, 1, 2, 16, 17, 18)} for job, starts in blocks(range(1, 600), range(19)).items()
    }
    for job in range(1, 590):
        assert all(found[job].isdisjoint(found[other]) for other in range(job + 1, job + 10)), job


def test_the_ports_of_one_ray_are_distinct_and_in_the_jobs_block():
    program = f'{functions("agent_port")}\nPORT=20000; for i in {{0..63}}; do agent_port "$i"; done'
    agents = [int(port) for port in bash(program)]
    head = {20000, 20001, 20002}
    assert head.isdisjoint(agents) and max(agents) < 20050
    assert all(len(set(agents[i : i + 47])) == 47 for i in range(64 - 47))
    used = set(re.findall(r'"\$\(\(PORT \+ (\d+)\)\)"|\$\(\(PORT \+ (\d+)\)\)', SBATCH.read_text()))
    assert {int(a or b) for a, b in used} <= {1, 2}, "what else the script takes of the block"


def test_attempts_are_counted_over_restarts():
    """The numbers that the script's loop goes through, restart by restart, never meet."""
    loop = re.search(
        r"^for \(\((attempt = .*?; attempt % .*?) && started < 3; attempt\+\+\)\); do$", SBATCH.read_text(), re.M
    )
    start, condition = loop[1].split("; ")
    program = f"""for SLURM_RESTART_COUNT in {{0..8}}; do
       for (({start}; {condition}; attempt++)); do echo "$attempt"; done
       echo end
    done"""
    runs = " ".join(bash(program)).split("end")[:-1]
    numbers = [[int(n) for n in run.split()] for run in runs]
    assert all(len(run) == 15 for run in numbers)
    assert all(a[-1] < b[0] for a, b in pairwise(numbers))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "localhost,node1,10.77.0.1"),
        ({"no_proxy": "a,.b"}, "a,.b,localhost,node1,10.77.0.1"),
        ({"no_proxy": "a", "NO_PROXY": "c"}, "a,c,localhost,node1,10.77.0.1"),
        ({"NO_PROXY": "a,*"}, "*"),
    ],
)
def test_the_allocations_nodes_are_reached_without_the_proxy(given, expected):
    program = f"{functions('bypass_proxy')}\nbypass_proxy localhost node1 10.77.0.1; env | grep -i ^no_proxy="
    assert sorted(bash(program, **given)) == [f"NO_PROXY={expected}", f"no_proxy={expected}"]
    assert 'bypass_proxy localhost 127.0.0.1 "${NODES[@]}" "${ADDRESSES[@]}"' in SBATCH.read_text()


def test_mistakes_are_one_line(tmp_path):
    def say(*words: str, **variables: str) -> str:
        result = subprocess.run(["bash", str(SBATCH), *words], env=clean() | variables, capture_output=True, text=True)
        assert result.returncode == 2 and result.stdout == "" and result.stderr.count("\n") == 1
        return result.stderr

    script = str(EXAMPLES / "run-qwen3-4B.sh")
    assert say().startswith("usage: sbatch")
    assert "submit this script with sbatch" in say(script)
    (tmp_path / "uname").symlink_to(shutil.which("uname"))
    (tmp_path / "bash").symlink_to(shutil.which("bash"))
    assert "has no python3 on PATH" in say(script, SLURM_JOB_ID="1", PATH=str(tmp_path))
    (tmp_path / "python3").symlink_to(shutil.which("python3"))
    assert "has no ray on PATH" in say(script, SLURM_JOB_ID="1", PATH=str(tmp_path))
