"""A launch script, a real Ray, and the embedded engine as its job."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .conftest import EXAMPLES, SMALL_RUN, rollouts_of

pytestmark = pytest.mark.cluster
LAUNCH = ["bash", str(EXAMPLES / "run-embedded.sh"), *SMALL_RUN.split()]


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def environment(directory: Path, save: Path, **more) -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    env |= {"PATH": f"{Path(sys.executable).parent}:{env['PATH']}", "RAY_TMPDIR": str(directory), "SAVE": str(save)}
    env["RAY_raylet_start_wait_time_s"] = "300"  # for busy machines
    names = ("RAY_PORT", "RAY_DASHBOARD_PORT", "RAY_AGENT_PORT", "RAY_CLIENT_PORT")
    return env | dict(zip(names, map(str, free_ports(4)), strict=True)) | more


def rays_below(directory: Path) -> list[int]:
    """Processes whose Ray keeps its files below ``directory``."""
    pids = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if f"{directory}/" in command and ("raylet" in command or "gcs_server" in command):
                pids.append(int(entry.name))
    return pids


@pytest.fixture(scope="module")
def standing_cluster(short_directory):
    """Somebody's Ray, which was there before: its job API's address, and a way to see that it still stands."""
    directory = short_directory / "standing"
    directory.mkdir()
    env = environment(directory, short_directory, RAY_AUTH_MODE="disabled")
    command = (
        "ray start --head --block --disable-usage-stats --num-gpus 0 --num-cpus 4 --dashboard-host 127.0.0.1"
        f" --node-ip-address 127.0.0.1 --port {env['RAY_PORT']} --dashboard-port {env['RAY_DASHBOARD_PORT']}"
        f" --dashboard-agent-listen-port {env['RAY_AGENT_PORT']} --ray-client-server-port {env['RAY_CLIENT_PORT']}"
        " --min-worker-port 0 --max-worker-port 0"
    )
    ray = subprocess.Popen(command.split(), env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    for port in (env["RAY_DASHBOARD_PORT"], env["RAY_AGENT_PORT"]):
        while True:
            try:
                socket.create_connection(("127.0.0.1", int(port)), 1).close()
                break
            except OSError:
                assert ray.poll() is None and time.monotonic() < deadline, "ray start did not come up"
                time.sleep(0.5)
    yield f"http://127.0.0.1:{env['RAY_DASHBOARD_PORT']}", ray
    ray.terminate()
    ray.wait(60)


def test_a_given_cluster_runs_the_job(standing_cluster, short_directory, bystander, tmp_path):
    address, ray = standing_cluster
    save = tmp_path / "run $HOME 'of' 1; true"  # every expansion is quoted, also by Ray
    env = environment(short_directory, save, RAY_ADDRESS=address, RAY_AUTH_MODE="disabled")
    result = subprocess.run(
        [*LAUNCH, "--num-rollout", "2"], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert rollouts_of(save) == [0, 1] and (save / "summary.json").exists()
    assert "succeeded" in result.stdout, "the job's end comes from Ray's job API"
    assert ray.poll() is None


def test_a_failing_job_fails_the_script(standing_cluster, short_directory, tmp_path):
    env = environment(short_directory, tmp_path / "run", RAY_ADDRESS=standing_cluster[0], RAY_AUTH_MODE="disabled")
    result = subprocess.run(
        [*LAUNCH, "--fipo-decay-rate", "-1"], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert result.returncode not in (0, 143)
    assert "--fipo-decay-rate" in result.stdout, "the job's log is streamed"


SLOW_TO_END = """
import signal, sys, time
from pathlib import Path

def end(*_):
    time.sleep(8)
    Path(sys.argv[1], "saved").touch()
    sys.exit(143)

signal.signal(signal.SIGTERM, end)
Path(sys.argv[1], "started").touch()
time.sleep(600)
"""


def test_a_stopped_job_has_its_time_to_end(standing_cluster, short_directory, tmp_path):
    """On a cluster that knows nothing of RAY_JOB_STOP_WAIT_TIME_S, where Ray by itself leaves 3 s."""
    (tmp_path / "slow.py").write_text(SLOW_TO_END)
    env = environment(short_directory, tmp_path, RAY_ADDRESS=standing_cluster[0], RAY_AUTH_MODE="disabled")
    program = 'source "$1"; submit 0 -- python3 "$2" "$3"'
    words = [str(EXAMPLES / "ray_job.sh"), str(tmp_path / "slow.py"), str(tmp_path)]
    launch = subprocess.Popen(["bash", "-c", program, "-", *words], env=env, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not (tmp_path / "started").exists():
        assert launch.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    launch.terminate()
    errors = launch.communicate(timeout=300)[1]
    assert launch.returncode == 143 and "which has 60 s to end" in errors
    assert (tmp_path / "saved").exists(), errors


REACHES_ITS_NODE = """
import http.server, json, os, sys, threading
from pathlib import Path

import ray
import requests

@ray.remote(num_cpus=0)
class Engine:
    def fetch(self, port):
        session = requests.Session()
        statuses = [session.get(f"http://{host}:{port}", timeout=30).status_code
                    for host in (ray.util.get_node_ip_address(), os.uname().nodename, "localhost", "127.0.0.1")]
        names = [name for name in os.environ if "proxy" in name.lower() or "TEST" in name]
        return statuses, {name: os.environ[name] for name in names}

class Here(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass

server = http.server.ThreadingHTTPServer(("0.0.0.0", 0), Here)
threading.Thread(target=server.serve_forever, daemon=True).start()
ray.init()
Path(sys.argv[1]).write_text(json.dumps(ray.get(Engine.remote().fetch.remote(server.server_address[1]))))
"""


@pytest.mark.parametrize("cluster", ["own", "given"])
def test_behind_a_proxy_that_reaches_no_node(cluster, standing_cluster, short_directory, tmp_path):
    (tmp_path / "job.py").write_text(REACHES_ITS_NODE)
    dead = f"http://127.0.0.1:{free_ports(1)[0]}"
    proxies = {
        name: dead for scheme in ("http", "https", "all") for name in (f"{scheme}_proxy", f"{scheme}_PROXY".upper())
    }
    directory = short_directory / "proxy"
    directory.mkdir(exist_ok=True)
    given = {"RAY_ADDRESS": standing_cluster[0], "RAY_AUTH_MODE": "disabled"} if cluster == "given" else {}
    secrets = {"TEST_KEY": 'se"cret', "TEST_B": "é😀"}
    env = environment(directory, tmp_path, **proxies, **given, **secrets, no_proxy="mine.example", TMPDIR=str(tmp_path))
    program = 'set -euo pipefail; source "$1"; submit 0 -- python3 "$2" "$3"'
    words = [str(EXAMPLES / "ray_job.sh"), str(tmp_path / "job.py"), str(tmp_path / "seen.json")]
    result = subprocess.run(
        ["bash", "-c", program, "-", *words],
        env=env | {"PASS_ENV": "TEST_KEY TEST_[AB] *_proxy *_PROXY"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    statuses, seen = json.loads((tmp_path / "seen.json").read_text())
    assert statuses == [200] * 4
    assert seen["http_proxy"] == dead and seen["TEST_KEY"] == 'se"cret' and seen["TEST_B"] == "é😀"
    assert seen["no_proxy"] == seen["NO_PROXY"] and "mine.example" in seen["no_proxy"].split(",")
    assert "cret" not in result.stdout + result.stderr
    assert not list(tmp_path.glob("tmp.*"))


def test_its_own_ray_ends_with_the_script_and_no_other_does(standing_cluster, short_directory, bystander, tmp_path):
    own = short_directory / "own"
    own.mkdir()
    env = environment(own, tmp_path / "run", PROBE="1")
    launch = subprocess.Popen(
        [*LAUNCH, "--num-rollout", "400"],
        env=env,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 600
    while len(rollouts_of(tmp_path / "run")) < 2:
        assert launch.poll() is None and time.monotonic() < deadline, launch.communicate(timeout=60)[0]
        time.sleep(0.5)
    assert rays_below(own), "the script runs a Ray of its own"
    launch.terminate()
    output = launch.communicate(timeout=300)[0]
    assert launch.returncode == 143, output
    assert '"context_parallel_size": 1' in output, "one node, one rank"
    assert not rays_below(own)
    assert standing_cluster[1].poll() is None and rays_below(short_directory / "standing")

    # Its port is taken by the standing cluster: refused, rather than submitted to somebody else's Ray.
    port = standing_cluster[0].rpartition(":")[2]
    env = environment(own, tmp_path / "other", RAY_DASHBOARD_PORT=port)
    refused = subprocess.run(LAUNCH, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert refused.returncode == 1
    assert f"port {port} is taken" in refused.stderr and "RAY_ADDRESS" in refused.stderr
    assert not (tmp_path / "other").exists()
