"""A two-node Slurm on one machine: munged, slurmctld and two slurmd, in a network namespace of their own.

Debian's packages are unpacked into the rig's directory, so nothing is installed, no service is started, and all that
runs is a child of the test. Ray's nodes run inside the namespace too, each with an address of its own.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

PACKAGES = ("munge", "libmunge2", "slurm-client", "slurmctld", "slurmd", "slurm-wlm-basic-plugins")
LIBRARIES = ("libhwloc15", "liblua5.1-0")
ADDRESSES = {"node1": "10.77.0.1", "node2": "10.77.0.2"}


class Unavailable(Exception):
    """The machine cannot carry the rig; the message says why."""


def require_machine() -> None:
    """
    Raises:
        Unavailable: not root, or a tool is missing.
    """
    if os.geteuid() != 0:
        raise Unavailable("Slurm's rig needs root (network namespace, munged)")
    for tool in ("unshare", "nsenter", "ip", "apt-get", "dpkg"):
        if shutil.which(tool) is None:
            raise Unavailable(f"Slurm's rig needs {tool}")
    if subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode:
        raise Unavailable("this machine allows no network namespace")


def unpack_packages(directory: Path) -> Path:
    """Download and unpack Slurm and munge below ``directory`` and return the root they lie in."""
    root, archives = directory / "root", directory / "archives"
    if root.exists():
        return root
    archives.mkdir(parents=True, exist_ok=True)
    for attempt in range(2):
        download = subprocess.run(
            ["apt-get", "download", *PACKAGES, *LIBRARIES], cwd=archives, capture_output=True, text=True
        )
        if download.returncode == 0:
            break
        if attempt == 0:
            subprocess.run(["apt-get", "update"], capture_output=True)
    else:
        raise Unavailable(f"apt-get cannot download Slurm: {download.stderr.strip().splitlines()[-1]}")
    unpacked = directory / "unpacked"
    for archive in archives.glob("*.deb"):
        subprocess.run(["dpkg", "-x", archive, unpacked], check=True)
    unpacked.rename(root)
    return root


class SlurmRig:
    """A running two-node cluster; ``with SlurmRig(...) as slurm``.

    Args:
        packages: what :func:`unpack_packages` returned.
        directory: short path for configuration, sockets, spools and logs; removed by the caller.
        path: directories that jobs find ``python3`` and ``ray`` in.
    """

    def __init__(self, packages: Path, directory: Path, path: str):
        self.packages, self.directory = packages, directory
        self.processes: dict[str, subprocess.Popen] = {}
        libraries = packages / "usr/lib/x86_64-linux-gnu"
        self.plugins = libraries / "slurm-wlm"
        self.env = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "RAY_"))},
            "PATH": f"{path}:{packages / 'usr/bin'}:{packages / 'usr/sbin'}:{os.environ['PATH']}",
            "LD_LIBRARY_PATH": f"{libraries}:{self.plugins}",
            "SLURM_CONF": str(directory / "slurm.conf"),
            "RAY_TMPDIR": str(directory / "ray"),
            "RAY_raylet_start_wait_time_s": "300",  # for busy machines
        }

    def __enter__(self) -> SlurmRig:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    # -- daemons --

    def _start(self) -> None:
        for name in ("state", "ray", "node1", "node2", "munge"):
            (self.directory / name).mkdir(mode=0o700)
        self._write_configuration()
        self._spawn("namespace", ["unshare", "--net", "sleep", "infinity"], inside=False)
        self._until(lambda: self._namespace_is_new(), 10, "the network namespace did not come up")
        self.run("ip", "link", "set", "lo", "up")
        for address in ADDRESSES.values():
            self.run("ip", "addr", "add", f"{address}/32", "dev", "lo")

        munge = self.directory / "munge"
        (munge / "key").write_bytes(os.urandom(128))
        (munge / "key").chmod(0o600)
        files = {f"--{name}-file": munge / name for name in ("key", "pid", "log", "seed")}
        options = [f"{flag}={file}" for flag, file in files.items()]
        self._spawn("munged", ["munged", "--foreground", "--force", f"--socket={munge / 'socket'}", *options])
        self._until((munge / "socket").exists, 10, "munged did not come up")
        self._spawn("slurmctld", ["slurmctld-wlm", "-D", "-i"])
        for node in ADDRESSES:
            self.start_node(node)
        self._until(
            lambda: self.node_states() == {"node1": "idle", "node2": "idle"}, 30, "the nodes did not become idle"
        )

    def start_node(self, node: str) -> None:
        """Start a node's slurmd, with an empty spool as after a boot."""
        shutil.rmtree(self.directory / node)
        (self.directory / node).mkdir(mode=0o700)
        slurmstepd = self.packages / "usr/sbin/slurmstepd-wlm"
        self._spawn(node, ["slurmd-wlm", "-D", "-N", node, "-d", str(slurmstepd)])

    def kill_node(self, node: str) -> None:
        """End a node as a power cut does: its slurmd and every process of its job steps, at once."""
        self.processes[node].kill()
        self.processes.pop(node).wait()
        for pid in self.processes_of_nodes([node]):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def processes_of_nodes(self, nodes=tuple(ADDRESSES)) -> list[int]:
        """Processes that Slurm started on these nodes, and the step daemons above them."""
        wanted = {f"SLURMD_NODENAME={node}".encode() for node in nodes}
        pids = set()
        for pid in self.processes_inside():
            try:
                if wanted & set(Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")):
                    pids.add(pid)
                    parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
                    if b"slurmstepd" in Path(f"/proc/{parent}/cmdline").read_bytes():
                        pids.add(parent)
            except OSError:  # it has ended since
                continue
        return sorted(pids)

    def processes_inside(self) -> list[int]:
        """Every process in the rig's network namespace."""
        holder = self.processes.get("namespace")
        if holder is None:
            return []
        ours = os.stat(f"/proc/{holder.pid}/ns/net").st_ino
        pids = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    if os.stat(entry / "ns/net").st_ino == ours:
                        pids.append(int(entry.name))
                except OSError:
                    continue
        return pids

    def stop(self) -> None:
        """End the daemons and whatever still runs inside the namespace, and nothing else."""
        holder = self.processes.get("namespace")
        for name in [n for n in self.processes if n != "namespace"]:
            process = self.processes.pop(name)
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if holder is not None:
            for _ in range(20):
                left = [pid for pid in self.processes_inside() if pid != holder.pid]
                if not left or not self._namespace_is_new():
                    break
                for pid in left:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                time.sleep(0.2)
            holder.kill()
            self.processes.pop("namespace").wait()

    def _namespace_is_new(self) -> bool:
        holder = self.processes["namespace"]
        return os.stat(f"/proc/{holder.pid}/ns/net").st_ino != os.stat("/proc/self/ns/net").st_ino

    def _spawn(self, name: str, command: list, inside: bool = True) -> None:
        with open(self.directory / f"{name}.log", "ab") as log:
            self.processes[name] = subprocess.Popen(
                [*(self._inside() if inside else []), *command],
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _inside(self) -> list[str]:
        return ["nsenter", f"--net=/proc/{self.processes['namespace'].pid}/ns/net"]

    def _write_configuration(self) -> None:
        host, d = socket.gethostname(), self.directory
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr={address} Port={17000 + i} CPUs=4 RealMemory=4000"
            for i, (node, address) in enumerate(ADDRESSES.items(), 1)
        )
        (d / "slurm.conf").write_text(
            f"""ClusterName=rig
SlurmctldHost={host}({ADDRESSES["node1"]})
SlurmctldPort=17000
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={d}/munge/socket,cred_expire=5
CredType=cred/munge
PluginDir={self.plugins}
StateSaveLocation={d}/state
SlurmdSpoolDir={d}/%n
SlurmctldPidFile={d}/slurmctld.pid
SlurmdPidFile={d}/slurmd.%n.pid
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=10
KillWait=120
MessageTimeout=90
SchedulerParameters=sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=120 MaxTime=INFINITE
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE
""",
            encoding="utf-8",
        )

    # -- clients --

    def run(self, *command: str, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
        """A command inside the namespace; its output."""
        result = subprocess.run(
            [*self._inside(), *command],
            env={**self.env, **(env or {})},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=120,
            restore_signals=False,  # SIGPIPE stays ignored: Slurm's clients mend a broken connection themselves
        )
        if result.returncode:
            raise RuntimeError(f"{' '.join(map(str, command))}: exit {result.returncode}, {result.stderr.strip()}")
        return result.stdout

    def node_states(self) -> dict[str, str]:
        try:
            rows = self.run("sinfo", "--noheader", "--Node", "--partition=low", "--format=%N %T").split("\n")
        except RuntimeError:
            return {}
        return dict(row.split() for row in rows if row)

    def job(self, job_id: str) -> dict[str, str]:
        """``scontrol show job`` as a dictionary."""
        text = self.run("scontrol", "show", "job", "--oneliner", job_id)
        return dict(field.split("=", 1) for field in text.split() if "=" in field)

    def _until(self, condition, seconds: float, otherwise: str) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                logs = "\n".join(
                    f"{log.name}: {log.read_text(errors='replace')[-1500:]}" for log in self.directory.glob("*.log")
                )
                raise RuntimeError(f"{otherwise}\n{logs}")
            time.sleep(0.2)
