"""The environment that a job gets (proxies, passed variables), and what a script says where a tool is missing."""

from __future__ import annotations

import json
import re
import socket
import subprocess
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from .bash import EXAMPLES, LAUNCH_SCRIPTS, ROOT, clean, dry_run, machine

RAY_JOB = EXAMPLES / "ray_job.sh"
ALL_RUNS = [*LAUNCH_SCRIPTS, EXAMPLES / "run-embedded.sh"]
HERE = ("localhost", "127.0.0.1", socket.gethostname())


def sourced(program: str, *words: str, **variables: str) -> subprocess.CompletedProcess:
    """A bash program after sourcing ray_job.sh."""
    command = ["bash", "-c", f'set -euo pipefail; source "$1"; shift; {program}', "-", str(RAY_JOB), *words]
    return subprocess.run(command, env=clean(DRY_RUN="1", **variables), capture_output=True, text=True)


def dry_environment(script: Path, **variables: str) -> dict[str, str]:
    words = dry_run(script, **variables)
    return json.loads(words[words.index("--runtime-env-json") + 1])["env_vars"]


# -- proxies --


@pytest.mark.parametrize("script", ALL_RUNS, ids=lambda s: s.stem)
def test_a_job_reaches_its_own_node_without_the_proxy(script):
    proxy = {"http_proxy": "http://proxy.example:3128", "no_proxy": "mine.example", "NO_PROXY": ".theirs.example, a.b"}
    found = dry_environment(script, RAY_ADDRESS="http://10.0.0.9:8265", MASTER_ADDR="10.0.0.8", **proxy)
    assert found["no_proxy"] == found["NO_PROXY"]
    hosts = found["no_proxy"].split(",")
    assert hosts[:3] == ["mine.example", ".theirs.example", "a.b"], "the user's stay, and stay first"
    assert {*HERE, "10.0.0.9", "10.0.0.8"} <= set(hosts) and len(set(hosts)) == len(hosts)
    addresses = subprocess.run(["hostname", "-I"], capture_output=True, text=True).stdout.split()
    assert set(addresses) <= set(hosts)


hosts = st.lists(st.sampled_from(["a.example", ".b.example", "10.0.0.1", "10.0.0.0/8", "::1", "localhost", "*"]))


@settings(max_examples=15, deadline=None)
@given(hosts, hosts, st.sampled_from([",", ", ", " ", ",,"]))
def test_every_host_once_and_an_asterisk_alone(lower, upper, separator):
    result = sourced('no_proxy_with "$(own_hosts)"', no_proxy=separator.join(lower), NO_PROXY=separator.join(upper))
    found = result.stdout.removesuffix("\n").split(",")
    if "*" in lower + upper:
        assert found == ["*"]
    else:
        assert "" not in found and len(found) == len(set(found)) and set(found) >= {*lower, *upper, *HERE}


# -- variables of the submitter's --


def test_pass_env_hands_on_names_and_patterns():
    mine = {"WANDB_API_KEY": "secret", "NCCL_DEBUG": "INFO", "NCCL_IB_HCA": "mlx5", "HF_TOKEN": "other secret"}
    script = EXAMPLES / "run-qwen3-4B.sh"
    passed = {"WANDB_API_KEY", "NCCL_DEBUG", "NCCL_IB_HCA"}
    assert not mine.keys() & dry_environment(script, **mine).keys(), "nothing is passed unasked"
    for spelling in ("WANDB_API_KEY NCCL_*", "WANDB_API_KEY,NCCL_[DI]*", " NCCL_*, WANDB_*  NO_SUCH_* "):
        found = dry_environment(script, **mine, PASS_ENV=spelling)
        assert mine.keys() & found.keys() == passed
        assert {found[name] for name in passed} == {"***"}, "a dry run shows no value"


def test_pass_env_changes_nothing_that_the_run_needs():
    mine = {"PYTHONPATH": "/mine", "RAY_ADDRESS": "http://10.0.0.9:8265", "CUDA_DEVICE_MAX_CONNECTIONS": "8"}
    script = EXAMPLES / "run-qwen3-4B.sh"
    everything = dry_environment(script, **mine, PASS_ENV="*")
    assert "RAY_ADDRESS" not in everything
    ours = dry_environment(script, **mine)
    assert {name: everything[name] for name in ours} == ours


def test_a_name_in_pass_env_that_is_not_set_is_refused():
    result = subprocess.run(
        ["bash", str(EXAMPLES / "run-qwen3-4B.sh")],
        env=clean(DRY_RUN="1", PASS_ENV="HOME WANDB_API_KEY"),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr == "PASS_ENV names WANDB_API_KEY, which is not set: export it, or take it out of PASS_ENV\n"


values = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))


@settings(max_examples=5, deadline=None)
@given(st.lists(values, min_size=30, max_size=30))
def test_any_value_arrives_as_it_is(many):
    passed = {f"MINE_{i}": value for i, value in enumerate(many)}
    ours = {f"OURS_{i}": value for i, value in enumerate(many)}
    words = [f"{name}={value}" for name, value in ours.items()]
    result = sourced('runtime_env yaml "$@"', *words, **passed, PASS_ENV="MINE_*")
    found = yaml.safe_load(result.stdout)["env_vars"]  # as `ray job submit --runtime-env` reads it
    assert found.items() >= (passed | ours).items()


def test_a_submitted_value_is_on_no_command_line_and_in_no_log(tmp_path):
    """What `ray` is given, told by a program in its place: the real one is in tests/cluster."""
    env = machine(tmp_path, TMPDIR=str(tmp_path), KEY="secret", PASS_ENV="KEY")
    Path(env["PATH"], "ray").write_text(
        f'#!/bin/bash\nprintf "%s\\n" "$@" >>{tmp_path}/words\n'
        "while [[ $1 != --runtime-env ]]; do shift; done\n"
        f'stat -c %a "$2" >{tmp_path}/mode; cat "$2" >{tmp_path}/file\n'
    )
    program = 'set -euo pipefail; source "$1"; check_ray() { :; }; submit 0 A=b -- true'
    result = subprocess.run(["bash", "-c", program, "-", str(RAY_JOB)], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    words = (tmp_path / "words").read_text()
    assert "secret" not in words + result.stdout + result.stderr
    assert yaml.safe_load((tmp_path / "file").read_text())["env_vars"].items() >= {"KEY": "secret", "A": "b"}.items()
    assert (tmp_path / "mode").read_text() == "600\n"
    assert not list(tmp_path.glob("tmp.*")), "the file is gone with the script"


# -- ports --


def test_default_ports_are_below_those_of_any_connection():
    ports = [
        int(port)
        for port in re.findall(r"RAY_\w+_PORT:-(\d+)|RAY_PORT:-(\d+)", RAY_JOB.read_text())
        for port in port
        if port
    ]
    assert len(set(ports)) == 4 and all(1024 < port < 32768 for port in ports)


# -- a machine that lacks something --


def run_lacking(script: Path, env: dict[str, str], directory: Path) -> str:
    """What a script says on stderr; it must fail, print nothing else, and have no traceback."""
    result = subprocess.run(["bash", str(script)], env=env, cwd=directory, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr


@pytest.mark.parametrize("program", ["python3", "ray"])
@pytest.mark.parametrize("script", ALL_RUNS, ids=lambda s: s.stem)
def test_a_missing_program_is_one_line(script, program, tmp_path):
    said = run_lacking(script, machine(tmp_path, without=(program,)), tmp_path)
    assert said.startswith(f"{program} is not on PATH: ") and said.count("\n") == 1


@pytest.mark.parametrize("script", ALL_RUNS, ids=lambda s: s.stem)
def test_a_python_without_ray_is_one_line(script, tmp_path):
    said = run_lacking(script, machine(tmp_path, python_flags="-S", CHECK="0"), tmp_path)
    assert "cannot import Ray's job API (No module named 'ray')" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("variable", "message"),
    [("SLIME_DIR", "no slime in {}: set SLIME_DIR"), ("MEGATRON_DIR", "no Megatron-LM in {}: set")],
)
@pytest.mark.parametrize("script", LAUNCH_SCRIPTS, ids=lambda s: s.stem)
def test_a_missing_checkout_is_one_line(script, variable, message, tmp_path):
    nowhere = str(tmp_path / "no where")
    said = run_lacking(script, machine(tmp_path, **{variable: nowhere}), tmp_path)
    assert said.splitlines()[-1].startswith(message.format(nowhere)) and said.count("\n") == 1


@pytest.mark.parametrize("script", LAUNCH_SCRIPTS, ids=lambda s: s.stem)
def test_a_python_without_our_packages_is_one_line(script, tmp_path):
    said = run_lacking(script, machine(tmp_path, python_flags="-S"), tmp_path)
    assert f"/bin/python3 has no torch, numpy, yaml, safetensors, jinja2, typer, rich: pip install {ROOT}\n" in said
    assert said.count("\n") == 1


def test_the_packages_that_are_looked_for_are_the_projects():
    declared = re.search(
        r"^dependencies = \[(.*?)\]$", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE
    )[1]
    names = {re.split("[^a-z0-9-]", word)[0] for word in re.findall('"(.*?)"', declared)}
    looked_for = re.search(r"found\(m\)\)\)' \\\n +(.*?)\)\"", (EXAMPLES / "common.sh").read_text())[1].split()
    assert {{"yaml": "pyyaml"}.get(name, name.replace("_", "-")) for name in looked_for} == names


def test_a_dry_run_needs_no_ray(tmp_path):
    for script in ALL_RUNS:
        env = machine(tmp_path / script.stem, without=("ray",), DRY_RUN="1")
        result = subprocess.run(["bash", str(script)], env=env, capture_output=True, text=True)
        assert result.returncode == 0 and result.stderr == "" and result.stdout.startswith("ray job submit")
