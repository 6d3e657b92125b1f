"""Asks slime's own argument parser about a train command, where slime, Megatron-LM and SGLang can be imported.

The parser runs in a process of its own (``parser_process``) with a time limit, no GPU in sight and a home folder of its
own. Here: where slime is, how that process is started, and which of its ends are the command's fault.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shlex
import signal
import site
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError
from .command import Command
from .finding import Finding, error, warning
from .parser_process import FORK_FAILED

TIME_LIMIT = 180.0  # seconds; 10 to 20 are usual, most of them for imports
PACKAGE = Path(__file__).resolve().parents[2]
# A small command without a fault: where the parser crashes on this one too, the machine is to blame.
CONTROL = shlex.split("""
    --num-layers 2 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4 --seq-length 1024
    --max-position-embeddings 1024 --micro-batch-size 1 --rollout-batch-size 8 --n-samples-per-prompt 8
    --global-batch-size 8 --num-rollout 1 --tensor-model-parallel-size 2 --actor-num-gpus-per-node 8 --colocate
""")
# Not with -m, which would import from the current folder first.
_START = f"import sys; sys.path[:] = filter(None, sys.path); from {__package__}.parser_process import main; main()"
# A crash below one of these is about the checkpoint's files, the network or the hardware; `file_rules` reads the files.
_FOREIGN = re.compile(r"site-packages/(?:huggingface_hub|httpx|omegaconf|requests|torch|transformers|urllib3)/")
_MENTIONS = {
    "apex": re.compile(r"\bapex\b", re.IGNORECASE),
    "flash_attn": re.compile(r"flash.?attn", re.IGNORECASE),
    "modelopt": re.compile(r"\bmodelopt\b", re.IGNORECASE),
    "nvidia_resiliency_ext": re.compile(r"nvidia.resiliency.ext", re.IGNORECASE),
    "transformer_engine": re.compile(r"transformer.?engine|is_te_min_version|\bTE\b", re.IGNORECASE),
}
# The job has an environment of its own, which is not known here.
_VARIABLE = re.compile(r"\b(?:CUBLAS|CUDA|NCCL|NVTE|SGLANG|SLIME|TORCH)_[A-Z_]+\b")
_ENGINE_FLAGS = ("--sglang-", "--router-", "--prefill-num-servers")
_BENCHMARK_KEY = re.compile(r"EvalDatasetConfig.* unexpected keyword argument '(\w+)'")
_SLIMES_SCRIPTS = ("train.py", "train_async.py")


@dataclass(frozen=True)
class Verdict:
    """``summary``: one line on whether the parser was asked, and what it said; ``judged``: whether it could say."""

    summary: str
    findings: tuple[Finding, ...] = ()
    judged: bool = True


@dataclass(frozen=True)
class Installation:
    """``slime`` and ``megatron`` are checkouts to put on Python's path; ``missing``: what the parser lacks;
    ``stand_ins`` and ``environment``: one more folder in front of them, and what switches on what is in it."""

    slime: Path | None = None
    megatron: Path | None = None
    missing: str = ""
    stand_ins: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


# -- where slime is --


def locate(command: Command, slime_root: Path | None = None, megatron_root: Path | None = None) -> Installation:
    """The slime that the command runs: the given one, else that of its train script, else what Python imports.

    Raises:
        UserError: a given folder is no checkout.
    """
    if slime_root is not None and not _is_slime(slime_root):
        raise UserError(f"--slime-root {slime_root} is no checkout of slime (slime/utils/arguments.py is missing)")
    if megatron_root is not None and not (megatron_root / "megatron" / "training" / "arguments.py").is_file():
        raise UserError(
            f"--megatron-root {megatron_root} is no checkout of Megatron-LM (megatron/training/arguments.py is missing)"
        )
    beside = Path(command.script).resolve().parent if command.script else None
    slime = slime_root or (beside if beside and _is_slime(beside) else None) or _importable("slime", _is_slime)
    if slime is None:
        return Installation(missing="slime is not importable here (--slime-root names a checkout)")
    if megatron_root is None and _find("megatron.training.arguments") is None:
        missing = "Megatron-LM is not importable here (--megatron-root names a checkout)"
        return Installation(slime.resolve(), missing=missing)
    if _find("sglang") is None:
        return Installation(slime.resolve(), missing="SGLang is not installed here")
    return Installation(slime.resolve(), megatron_root and megatron_root.resolve())


def _is_slime(root: Path) -> bool:
    return (root / "slime" / "utils" / "arguments.py").is_file()


def _importable(package: str, is_checkout) -> Path | None:
    spec = _find(package)
    roots = (Path(folder).parent for folder in (spec and spec.submodule_search_locations) or ())
    return next(filter(is_checkout, roots), None)


def _find(module: str):
    try:
        return importlib.util.find_spec(module)
    except (ImportError, ValueError, AttributeError):  # a parent that is missing, or broken when imported
        return None


# -- the process --


def ask(command: Command, installation: Installation, time_limit: float = TIME_LIMIT) -> Verdict:
    """slime's verdict on the command; a parser that cannot be run is said in the summary, and is no finding."""
    if installation.missing:
        reason = f"{installation.missing}; our own table of flags judged alone"
        return Verdict(f"slime's parser was not asked: {reason}", judged=False)
    if command.args.rollout_external_engine_addrs and not command.args.debug_train_only:
        reason = "it would call the engines of --rollout-external-engine-addrs"
        return Verdict(f"slime's parser was not asked: {reason}", judged=False)
    cases = {
        "command": {"wrapper": command.launcher, "arguments": list(command.arguments)},
        "control": {"wrapper": False, "arguments": CONTROL},
    }
    try:
        paths = filter(None, (installation.stand_ins, installation.slime, installation.megatron))
        result = run_parser(cases, list(paths), time_limit, installation.environment)
    except (OSError, RuntimeError) as problem:
        return Verdict(f"slime's parser could not be asked: {problem}", judged=False)
    return judge(command, installation.slime, result)


def run_parser(
    cases: dict[str, Any],
    paths: Sequence[Path],
    time_limit: float = TIME_LIMIT,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """What ``parser_process`` says of ``cases``, with ``paths`` in front of Python's own and more variables.

    Raises:
        RuntimeError: it did not end in time, or died; one line.
    """
    with tempfile.TemporaryDirectory(prefix="slime-fipo-check-") as directory:
        given, out, home = (os.path.join(directory, name) for name in ("cases.json", "out.json", "home"))
        os.mkdir(home)
        Path(given).write_text(json.dumps(cases), encoding="utf-8")
        arguments = [sys.executable, "-c", _START, given, out]
        process = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=_environment(paths, home) | dict(environment or {}),
            start_new_session=True,  # its forks end with it
        )
        try:
            _, errors = process.communicate(timeout=time_limit)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"it did not end within {time_limit:g} s") from None
        finally:
            _end(process)
        try:
            return json.loads(Path(out).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            last = _one_line(errors.decode(errors="replace").strip().rpartition("\n")[2])
            raise RuntimeError(f"its process ended with {process.returncode} ({last or 'no output'})") from None


def _environment(paths: Sequence[Path], home: str) -> dict[str, str]:
    path = [*map(str, paths), str(PACKAGE), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return environment | {
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONWARNINGS": "ignore",
        # SGLang's and Torch's caches go where nothing is kept; what the user installed or downloaded is still found
        "HOME": home,
        "XDG_CACHE_HOME": home,
        "PYTHONUSERBASE": site.getuserbase(),
        "HF_HOME": os.environ.get("HF_HOME", os.path.expanduser("~/.cache/huggingface")),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # which Megatron asserts, and launch scripts set for the workers
        "COLUMNS": "100",
    }


def _end(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


# -- what its end means --


def judge(command: Command, slime: Path, result: dict[str, Any]) -> Verdict:
    """Errors for what the parser refuses, warnings for what it ignores; crashes for want of something here are neither.

    Args:
        result: of :func:`run_parser`, with the cases ``command`` and ``control``.
    """
    if "unavailable" in result:
        return Verdict(f"slime's parser could not be asked: {_crash(result['unavailable'])}", judged=False)
    case, control = result["cases"]["command"], result["cases"]["control"]
    sglang = f"SGLang {result['sglang']}" if "sglang" in result else "SGLang"  # each version has other flags
    name = f"slime's parser ({slime}, {sglang})"
    if case["namespace"] is not None:
        findings = tuple(warning(message) for message in _ignored(command, slime, case["ignored"], sglang))
        return Verdict(f"{name} takes the command" + (", but not all of it" if findings else ""), findings)
    crash = case["error"]
    if case["status"] < 0 or case["status"] == FORK_FAILED:
        return Verdict(f"{name} could not be asked: its process ended with {case['status']}", judged=False)
    if crash is None:
        if case["status"] == 0:  # --help, --version
            return Verdict(f"{name} was asked: the command ends before it trains")
        refusal = _last_error(case["output"])
    elif _is_environment(case, control, result["missing"]):
        return Verdict(f"{name} cannot judge the command on this machine: {_crash(crash)}", judged=False)
    elif key := _BENCHMARK_KEY.search(crash["message"]):
        refusal = (
            f"--eval-config {command.args.eval_config} gives a benchmark the key {key[1]}, which slime does not have;"
            " correct or drop it"
        )
    elif {"AssertionError", "ValueError", "OSError", "NotImplementedError"} & set(crash["types"]) and crash["message"]:
        refusal = _one_line(crash["message"])
    else:
        refusal = _crash(crash)
    # Engine flags come and go with SGLang's versions, and the job's may be another one.
    severity = warning if any(prefix in refusal for prefix in _ENGINE_FLAGS) else error
    return Verdict(f"{name} refuses the command", (severity(f"slime's parser refuses the command: {refusal}"),))


def _is_environment(case: dict[str, Any], control: dict[str, Any], missing: Sequence[str]) -> bool:
    crash = case["error"]
    if not case["started"] or control["namespace"] is None or {"ImportError", "MemoryError"} & set(crash["types"]):
        return True
    if any(_FOREIGN.search(file) for file, _, _ in crash["frames"]):
        return True
    said = f"{crash['message']} {crash['frames'][-1][2] if crash['frames'] else ''}"
    if _VARIABLE.search(said):
        return True
    return any(_MENTIONS[package].search(said) for package in missing)


def _last_error(output: str) -> str:
    lines = [line for line in output.splitlines() if line.strip()]
    errors = [line.partition(": error: ")[2] for line in lines if re.match(r"\S+: error: ", line)]
    return _one_line((errors or lines or ["no reason given"])[-1])


def _crash(crash: dict[str, Any]) -> str:
    """``TypeError: … at `the line of slime or Megatron-LM that raised it` ``."""
    code = next((line for _, _, line in reversed(crash["frames"]) if line), "")
    text = f"{crash['types'][0]}: {crash['message']}" if crash["message"] else crash["types"][0]
    return _one_line(f"{text} (at `{code}`)" if code else text)


def _one_line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 600 else f"{text[:597]}..."


def _ignored(command: Command, slime: Path, positions: Sequence[int], sglang: str) -> Iterator[str]:
    known = _other_flags(command, slime)
    if known is None:
        return
    reported = {flag for flag, _ in (*command.misspelt, *command.foreign)}
    reported |= {word for message in command.misspelt_own for word in message.split()}
    before = None  # position of the last ignored word that belongs to an ignored flag
    for position in positions:
        word = command.arguments[position]
        flag = word.partition("=")[0]
        if re.match(r"--?[A-Za-z]", word):
            before = position
            engines = command.args.debug_train_only and flag.startswith(_ENGINE_FLAGS)
            if not engines and flag not in known and flag not in reported:
                yield f"{flag} is no flag of slime's, Megatron-LM's or {sglang}'s, and is ignored; check the spelling"
        elif before == position - 1:
            before = position
        else:
            yield f"{_one_line(word)!r} belongs to no flag, and slime ignores it silently; drop it"


def _other_flags(command: Command, slime: Path) -> set[str] | None:
    """Flags that are read by what the parser process did not run: a train script of the user's own, and the patch to
    Megatron-LM in slime's image. None if that script cannot be read here."""
    texts = [path.read_text(errors="replace") for path in (slime / "docker" / "patch").glob("*/megatron.patch")]
    if command.script is not None:
        script = Path(command.script)
        if script.is_file():
            texts.append(script.read_text(errors="replace"))
        elif script.name not in _SLIMES_SCRIPTS:
            return None
    return {flag for text in texts for flag in re.findall(r"""['"](--[A-Za-z][\w-]*)['"]""", text)}
