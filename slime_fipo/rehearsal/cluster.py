"""The processes of a rehearsal: its own Ray, the driver, and what both start; all of them ended when it is over.

A rehearsal is a folder under the temporary directory. Its processes carry the folder's name in their environment,
which switches the stand-ins on and is how ``keeper.py`` knows them.
"""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from ..errors import UserError
from . import ports

MARK = "SLIME_FIPO_REHEARSAL"
HERE = Path(__file__).resolve().parent
SITE = HERE / "site"  # in front on PYTHONPATH, it puts the stand-ins into every process that has MARK
HOST = "127.0.0.2"  # reached from this machine only; for 127.0.0.1 Ray takes the address on the network
RAY_STARTS_S = 300.0  # two busy cores need half a minute
MOST_FOLDER = 36  # characters; a socket's path has at most 107, of which Ray's names below the folder take 70
RAY_ATTEMPTS = 3  # Ray gives its own processes 30 s to come up, which a busy machine may not keep


class Rehearsal:
    """A Ray of our own with ``gpus`` logical GPUs, and the environment that turns the stand-ins on.

    Args:
        slime_root: checkout of slime.
        megatron_root: checkout of Megatron-LM, at the commit that slime's Dockerfile pins.
        gpus: logical GPUs, as many as actor and rollout ranks together.
        log: Ray's own output goes to this file.
        environment: more variables for every process.
        paths: more folders for PYTHONPATH, behind the checkouts.

    Raises:
        UserError: a GPU is visible, a checkout is not there, no ports are free, or Ray does not start.
    """

    def __init__(
        self,
        slime_root: Path,
        megatron_root: Path,
        *,
        gpus: int,
        log: Path,
        environment: dict[str, str] | None = None,
        paths: Sequence[Path] = (),
    ) -> None:
        check_machine()
        _check_checkouts(slime_root, megatron_root)
        self._gpus, self._log = gpus, log
        self._paths = [SITE, HERE.parents[1], slime_root.resolve(), megatron_root.resolve(), *paths]
        self._more = environment or {}
        self._stack = ExitStack()

    def __enter__(self) -> Rehearsal:
        with ExitStack() as stack:
            lock = stack.enter_context(ports.reserve())
            self._first_port = lock.getsockname()[1]
            self.folder = _short_folder()
            # The keeper holds the ports too: the processes of a rehearsal that was killed live a little longer.
            stack.callback(_end, _start_keeper(self.folder, lock.fileno()))
            self.environment = self._make_environment()
            self._start_ray()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_) -> None:
        self._stack.close()

    def run(self, command: Sequence[str], log: Path, timeout_s: float | None = None) -> int:
        """Run a driver inside the rehearsal, output to ``log``; its exit status.

        Raises:
            subprocess.TimeoutExpired: it took longer than ``timeout_s``.
        """
        with log.open("wb") as output:
            driver = subprocess.Popen(
                [str(part) for part in command], stdout=output, stderr=subprocess.STDOUT, env=self.environment
            )
            try:
                return driver.wait(timeout_s)
            except BaseException:
                driver.terminate()
                raise

    def _make_environment(self) -> dict[str, str]:
        # Another Ray's settings are not ours, an empty CUDA_VISIBLE_DEVICES leaves Ray no logical GPU, and Megatron
        # writes NVTE_* for the model that it builds in a process, which that of another then contradicts.
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("RAY_", "MASTER_", "NVTE_")) and name != "CUDA_VISIBLE_DEVICES"
        }
        paths = [*map(str, self._paths), *filter(None, [os.environ.get("PYTHONPATH")])]
        no_proxy = ",".join(filter(None, [os.environ.get("no_proxy"), HOST, "127.0.0.1", "localhost"]))
        return inherited | {
            MARK: str(self.folder),
            ports.VARIABLE: str(self._first_port),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONUNBUFFERED": "1",
            "SPT_NOENV": "1",  # setproctitle writes over the environment that /proc shows, and the mark with it
            "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # Megatron's argument checks ask for it
            "TORCHDYNAMO_DISABLE": "1",  # compiling for three steps costs more than it saves
            "OMP_NUM_THREADS": "1",  # several ranks share the cores
            "SLIME_ACCELERATOR": "cpu",
            "SLIME_HOST_IP": HOST,
            "GLOO_SOCKET_IFNAME": "lo",
            "SGLANG_USE_CPU_ENGINE": "1",
            "NO_PROXY": no_proxy,
            "no_proxy": no_proxy,
            "RAY_AUTH_MODE": "token",  # whoever reaches a Ray's ports can run code as its owner
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_DEDUP_LOGS": "0",
            # For two Rays on one machine; by default these are fixed ports.
            "AUTOSCALER_METRIC_PORT": "0",
            "DASHBOARD_METRIC_PORT": "0",
            "RAY_worker_niceness": "0",  # Ray's 15 starves SGLang and the trainer, its children, on a busy machine
            **self._more,
        }

    def _start_ray(self) -> None:
        for attempt in range(RAY_ATTEMPTS):
            port, client_port = _free_ports(2)
            command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
            command += ["--node-ip-address", HOST, "--port", str(port)]
            command += ["--ray-client-server-port", str(client_port), "--include-dashboard", "false"]
            # Any free ones.
            command += ["--min-worker-port", "0", "--max-worker-port", "0", "--dashboard-agent-listen-port", "0"]
            command += ["--num-gpus", str(self._gpus), "--num-cpus", str(4 + 2 * self._gpus)]
            command += ["--object-store-memory", str(200 * 1024**2), "--temp-dir", str(self.folder / f"ray{attempt}")]
            with self._log.open("wb") as output:
                ray = subprocess.Popen(
                    command, stdout=output, stderr=subprocess.STDOUT, env=self.environment, start_new_session=True
                )
            deadline = time.monotonic() + RAY_STARTS_S
            while ray.poll() is None and time.monotonic() < deadline:
                if "Ray runtime started" in self._log.read_text(errors="replace"):
                    self.environment["RAY_ADDRESS"] = f"{HOST}:{port}"
                    return
                time.sleep(0.2)
        last = self._log.read_text(errors="replace").strip().rpartition("\n")[2]
        raise UserError(f"Ray did not start: {last or 'it said nothing'}")


def _short_folder() -> Path:
    """A new temporary folder, also where ``TMPDIR`` is long: Ray's sockets are below it."""
    folder = Path(tempfile.mkdtemp(prefix="rehearsal-"))
    if len(str(folder)) <= MOST_FOLDER:
        return folder
    folder.rmdir()
    return Path(tempfile.mkdtemp(prefix="rehearsal-", dir="/tmp"))


def _start_keeper(folder: Path, *holds: int) -> subprocess.Popen:
    """Start ``keeper.py``, which keeps the file descriptors ``holds`` open as long as it runs."""
    keeper = subprocess.Popen(
        [sys.executable, "-I", str(HERE / "keeper.py"), str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
        pass_fds=holds,
        cwd="/",
    )
    keeper.stdout.readline()  # from here on it is deaf to signals that end us
    return keeper


def _end(keeper: subprocess.Popen) -> None:
    keeper.stdin.close()
    keeper.wait()
    keeper.stdout.close()


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("", 0))
        return [each.getsockname()[1] for each in sockets]


def check_machine() -> None:
    """Raises UserError where a GPU is visible."""
    found = [f"torch sees {torch.cuda.device_count()} GPU(s)"] if torch.cuda.device_count() else []
    found += map(str, Path("/dev").glob("nvidia[0-9]*"))
    if found:
        raise UserError(
            f"this machine has a GPU ({found[0]}): a rehearsal runs where there is none, such as a container without"
            " --gpus; hiding it with CUDA_VISIBLE_DEVICES is not enough, since Ray's workers set that anew"
        )


def _check_checkouts(slime_root: Path, megatron_root: Path) -> None:
    for flag, root, file in (
        ("--slime-root", slime_root, "slime/backends/megatron_utils/actor.py"),
        ("--megatron-root", megatron_root, "megatron/training/training.py"),
    ):
        if not (root / file).is_file():
            raise UserError(f"{flag} {root}: no such checkout (it has no {file})")
