"""How a rehearsal ends when it is told to, killed, or not the only one on the machine."""

import re
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch

from slime_fipo.rehearsal import keeper

from .conftest import Loop, Run
from .test_loop import DEVIATION, DIFFERENCE, DISK, SGLANG_LOG_PROBS

GONE_S = 60.0  # what docs/rehearsal.md promises of a killed rehearsal
DUMP = ("--save-debug-rollout-data", "{folder}/rollout_{{rollout_id}}.pt")


def says(file: Path, text: str) -> bool:
    return file.exists() and text in file.read_text(errors="replace")


def wait_until(condition, unless=lambda: False, seconds: float = 1200.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline and not unless()
        time.sleep(0.5)


def processes(rehearsal: str) -> list[psutil.Process]:
    found = []
    for pid in keeper.processes(rehearsal):
        try:
            found.append(psutil.Process(pid))
        except psutil.NoSuchProcess:
            continue
    return found


def driver(rehearsal: str) -> psutil.Process:
    """The process that runs slime's train script."""
    [found] = [process for process in processes(rehearsal) if "slime_fipo" in process.cmdline()[1:3]]
    return found


def listening(rehearsal: str) -> set[tuple[str, int]]:
    """Addresses and ports on which a rehearsal's processes listen."""
    found = set()
    for process in processes(rehearsal):
        try:
            connections = process.net_connections("tcp")
        except psutil.NoSuchProcess:
            continue
        found |= {tuple(each.laddr) for each in connections if each.status == psutil.CONN_LISTEN}
    return found


def is_listened_at(places: set[tuple[str, int]]) -> bool:
    everywhere = {tuple(each.laddr) for each in psutil.net_connections("tcp") if each.status == psutil.CONN_LISTEN}
    return bool(places & everywhere)


def prompts(run: Run, rollout: int) -> list[int]:
    """Numbers of the prompts of a rollout, in the order of the data."""
    samples = torch.load(run.folder / f"rollout_{rollout}.pt", weights_only=True)["samples"]
    return sorted({sample["group_index"] for sample in samples})


def test_sigterm_in_a_rollout_saves_and_a_resumed_run_goes_on(loop):
    """``--save-interval 50`` alone would save nothing."""
    folder, save = loop.folder / "told-to-end", loop.folder / "told-to-end-checkpoint"
    held = Path(f"{save}.held")
    saving = ("--save", save, "--save-interval", 50)
    flags = (*SGLANG_LOG_PROBS, *DISK, *saving, *DUMP, "--custom-rm-path", "tests.whole.hooks.held_reward")
    run = loop.start_run(folder, 2, loop.slime / "train.py", *flags, SLIME_FIPO_SAVE_ON_SIGTERM="1")
    wait_until(held.exists, unless=lambda: run.poll() is not None)
    driver((folder / "rehearsal").read_text()).send_signal(signal.SIGTERM)
    said = "SIGTERM: finishing this rollout, saving, and stopping"
    wait_until(lambda: says(folder / "train.log", said), unless=lambda: run.poll() is not None)
    held.unlink()
    assert run.wait() == 143, (folder / "train.log").read_text(errors="replace")[-6000:]
    ended = Run(folder)
    assert list(ended.steps(DEVIATION)) == [0, 1, 2, 3]
    assert (save / "latest_checkpointed_iteration.txt").read_text().strip() == "1"
    assert ended.result["processes_left"] == 0 and not ended.result["folder_left"]

    flags = (*SGLANG_LOG_PROBS, *DISK, *DUMP, "--load", save, "--override-opt-param-scheduler")
    resumed = loop("told-to-end-resumed", 2, loop.slime / "train.py", *flags)
    assert list(resumed.steps(DEVIATION)) == [4, 5]
    assert max(resumed.first_steps(DIFFERENCE)) < 0.01
    assert [prompts(ended, 0), prompts(ended, 1), prompts(resumed, 2)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


@pytest.mark.parametrize(
    ("log", "moment"),
    [
        ("ray.log", "Ray runtime started"),
        ("train.log", "Ports for engine 0"),  # SGLang is starting
        ("train.log", "step 1: {"),
    ],
    ids=["ray", "sglang", "training"],
)
def test_kill_9_leaves_no_process_and_no_port_behind(loop, request, log, moment):
    folder = loop.folder / f"killed-{request.node.callspec.id}"
    run = loop.start_run(folder, 2, loop.slime / "train.py", *SGLANG_LOG_PROBS, *DISK)
    wait_until(
        lambda: says(folder / "rehearsal", "/") and says(folder / log, moment), unless=lambda: run.poll() is not None
    )
    rehearsal = (folder / "rehearsal").read_text()
    assert len(keeper.processes(rehearsal)) > 3  # Ray's own
    ports = listening(rehearsal)
    assert len(ports) > 5
    run.send_signal(signal.SIGKILL)
    run.wait()
    wait_until(
        lambda: not keeper.processes(rehearsal) and not Path(rehearsal).exists() and not is_listened_at(ports),
        seconds=GONE_S,
    )


def test_two_rehearsals_side_by_side_do_not_meet(loop):
    """Started in the same second. They soon have other weights, so an answer of the other's SGLang would differ."""
    loop.model("bfloat16")
    flags = (*SGLANG_LOG_PROBS, *DISK, *DUMP)
    started = {
        name: loop.start_run(loop.folder / name, 2, loop.slime / "train.py", *flags, "--lr", lr)
        for name, lr in (("side", 1e-3), ("by-side", 1e-2))
    }
    assert [run.wait() for run in started.values()] == [0, 0], ends_of_logs(loop, started)
    runs = [Run(loop.folder / name) for name in started]
    for run in runs:
        assert list(run.steps(DEVIATION)) == list(range(6))
        assert max(run.first_steps(DIFFERENCE)) < 0.01
        assert run.result["processes_left"] == 0 and not run.result["folder_left"]
    assert runs[0].steps("train/pg_loss") != runs[1].steps("train/pg_loss")
    ports = [chosen_ports(run) for run in runs]
    assert all(ports) and not ports[0] & ports[1]


def chosen_ports(run: Run) -> set[int]:
    """Ports that slime chose for SGLang's servers and their router."""
    log = (run.folder / "train.log").read_text(errors="replace")
    lines = re.findall(r"Ports for engine \d+: (.*)|Router launched at (.*)", log)
    return {int(port) for line in lines for port in re.findall(r"\b\d{5}\b", "".join(line))}


def ends_of_logs(loop: Loop, names) -> str:
    return "\n".join((loop.folder / name / "train.log").read_text(errors="replace")[-3000:] for name in names)
