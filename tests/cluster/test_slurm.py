"""The sbatch script on a real two-node Slurm: a whole run, a killed node, a preemption, a cancelled job."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .conftest import EXAMPLES, SMALL_RUN, rollouts_of
from .slurm_rig import ADDRESSES, SlurmRig, Unavailable, require_machine, unpack_packages

pytestmark = pytest.mark.cluster
PATIENCE = 600  # seconds; two Rays on two busy cores take a minute or two to come up


@pytest.fixture(scope="module")
def slurm(short_directory, bystander):
    try:
        require_machine()
        packages = unpack_packages(short_directory / "packages")
    except Unavailable as reason:
        pytest.skip(str(reason))
    directory = short_directory / "rig"
    directory.mkdir()
    with SlurmRig(packages, directory, str(Path(sys.executable).parent)) as rig:
        # Somebody's process in the same namespace, in no job, named like what careless scripts end by name.
        command = [sys.executable, "-c", "import time; time.sleep(3600)", "raylet gcs_server ray::"]
        inside = subprocess.Popen(["nsenter", f"--net=/proc/{rig.processes['namespace'].pid}/ns/net", *command])
        yield rig
        assert inside.poll() is None, "a process that is in no job was ended"
    inside.wait()


class Job:
    def __init__(
        self, rig: SlurmRig, directory: Path, rollouts: int, *options: str, probe: bool = False, **variables: str
    ):
        self.rig, self.save, self.directory = rig, directory / "run", directory
        self.id = rig.run(
            *("sbatch", "--parsable", "--nodes=2", "--partition=low", "--gpus-per-node=0", *options),
            str(EXAMPLES / "slurm" / "fipo.sbatch"),
            str(EXAMPLES / "run-embedded.sh"),
            *SMALL_RUN.split(),
            *("--num-rollout", str(rollouts)),
            cwd=directory,
            env={"SAVE": str(self.save), "PROBE": str(int(probe)), "RAY_JOB_STOP_WAIT_TIME_S": "10", **variables},
        ).strip()

    def log(self) -> str:
        files = list(self.directory.glob("fipo-*.out"))
        return files[0].read_text(errors="replace") if files else "(no output yet)"

    def state(self) -> str:
        return self.rig.job(self.id)["JobState"]

    def wait_for(self, condition, seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.state() not in ("FAILED", "NODE_FAIL", "TIMEOUT"), f"{what}: {self.log()}"
            daemons = "".join(f"\n== {f.name}\n{f.read_text()[-2000:]}" for f in self.rig.directory.glob("*.log"))
            assert time.monotonic() < deadline, f"{what}: {self.rig.job(self.id)}\n{self.log()}{daemons}"
            time.sleep(0.5)

    def wait_for_rollouts(self, number: int) -> None:
        self.wait_for(lambda: len(rollouts_of(self.save)) >= number, PATIENCE, f"{number} rollouts")

    def finish(self) -> None:
        self.wait_for(lambda: self.state() == "COMPLETED", PATIENCE, "the run did not finish")
        assert (self.save / "summary.json").exists()
        self.wait_for(lambda: not self.rig.processes_of_nodes(), 120, "processes of the job are left")


def test_a_run_over_both_nodes_behind_a_proxy(slurm, tmp_path):
    dead = {
        name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY")
    }
    job = Job(slurm, tmp_path, rollouts=2, probe=True, **dead)
    job.finish()
    assert "2 nodes alive" in job.log()
    probe = json.loads(re.search(r"probe_nodes: (\{.*\})", job.log())[1])
    assert probe["nodes"] == sorted(ADDRESSES.values())
    assert probe["context_parallel_size"] == 2
    assert probe["loss"] == pytest.approx(probe["unsharded_loss"], rel=1e-4)
    assert rollouts_of(job.save) == [0, 1]
    assert slurm.job(job.id)["Restarts"] == "0"


def test_a_time_limit_shorter_than_the_notice_is_no_preemption(slurm, tmp_path):
    job = Job(slurm, tmp_path, 1, "--time=20")
    job.finish()
    assert "got USR1 at once: the time limit is shorter than the notice" in job.log()
    assert slurm_restarts(job) == 0 and rollouts_of(job.save) == [0]


def test_a_killed_node_ends_in_a_resumed_run(slurm, tmp_path):
    job = Job(slurm, tmp_path, rollouts=60)
    job.wait_for_rollouts(3)
    node = slurm.job(job.id)["BatchHost"]
    slurm.kill_node(node)
    done = rollouts_of(job.save)
    assert len(done) < 60, "killed too late"
    job.wait_for(lambda: slurm.job(job.id)["Restarts"] == "1", 240, "not requeued")
    slurm.start_node(node)
    job.finish()
    check_resumed(job, 60, at_least=len(done) - 1)


def test_a_preempted_run_is_requeued_and_resumes(slurm, tmp_path):
    job = Job(slurm, tmp_path, rollouts=60)
    job.wait_for_rollouts(3)
    urgent = slurm.run(
        *("sbatch", "--parsable", "--nodes=2", "--exclusive", "--partition=high", "--wrap=sleep 5"), cwd=tmp_path
    ).strip()
    job.wait_for(lambda: "got USR1" in job.log(), 120, "the signal did not reach the script")
    job.wait_for(lambda: slurm.job(urgent)["JobState"] == "COMPLETED", 240, "the urgent job did not get the nodes")
    assert job.state() == "PENDING" or slurm.job(job.id)["Restarts"] == "1"
    done = rollouts_of(job.save)
    assert len(done) < 60, "preempted too late"
    job.finish()
    assert "stopping Ray job" in job.log() and "requeueing" in job.log()
    check_resumed(job, 60, at_least=len(done) - 1)


def check_resumed(job: Job, rollouts: int, at_least: int) -> None:
    """The second run continued from the newest checkpoint: every rollout is there once, and few were repeated."""
    assert slurm_restarts(job) == 1
    assert rollouts_of(job.save) == list(range(rollouts))
    second = job.log().rpartition("restart 1]")[0].partition("restart 1]")[2]
    assert "base training" not in second
    first_shown = re.search(r"rollouts (\d+)/", second)
    assert first_shown and int(first_shown[1]) >= at_least


def slurm_restarts(job: Job) -> int:
    return int(job.rig.job(job.id)["Restarts"])


def test_a_cancelled_job_is_not_requeued(slurm, tmp_path):
    job = Job(slurm, tmp_path, rollouts=2000)
    job.wait_for_rollouts(1)
    slurm.run("scancel", job.id)
    job.wait_for(lambda: job.state() == "CANCELLED", 240, "not cancelled")
    job.wait_for(lambda: "ended with status" in job.log(), 240, "the script did not come to its end")
    job.wait_for(lambda: not slurm.processes_of_nodes(), 240, "processes of the job are left")
    assert slurm_restarts(job) == 0 and "requeueing" not in job.log()
