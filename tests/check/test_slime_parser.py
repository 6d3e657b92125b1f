"""How ``slime-fipo check`` asks slime's parser: where slime is looked for, a process that is ended, and what its ends
mean. The parser here is a stand-in; the real one is asked in ``tests/slime/test_check.py``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from slime_fipo.check.command import parse_command
from slime_fipo.check.finding import error
from slime_fipo.check.preflight import main, merged
from slime_fipo.check.slime_parser import Installation, Verdict, ask, judge, locate, run_parser
from slime_fipo.cli import app
from slime_fipo.errors import UserError

from ..scripts.bash import dry_run
from .commands import QWEN3_4B

ARGUMENTS = ["--rollout-batch-size", "8", "--colocate"]
ARGUMENTS_MODULE = """
import argparse

def get_slime_extra_args_provider(add_custom_arguments=None):
    return lambda parser: parser

def parse_args(add_custom_arguments=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--rollout-batch-size", type=int)
    parser.add_argument("--colocate", action="store_true")
    parser.add_argument("--loss-type", default="policy_loss")
    parser.add_argument("--do", default="")
    args, _ = parser.parse_known_args()
    exec(args.do)
    return args
"""


def checkout(root: Path, **changed: str) -> Path:
    """slime, Megatron-LM and SGLang as far as the process imports them; slime's parser does what ``--do`` says."""
    files = {
        "slime/utils/arguments.py": ARGUMENTS_MODULE,
        "megatron/training/arguments.py": "",
        "megatron/training/utils.py": "",
        "sglang/__init__.py": "",
        "sglang/srt/server_args.py": "",
        "transformers.py": "class AutoConfig:\n    from_pretrained = None\n",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(changed.get(Path(name).parts[0], text) if text else text)
    return root


def asked(root: Path, *arguments: str, time_limit: float = 300.0) -> Verdict:
    return ask(parse_command(["python3", str(root / "train.py"), *arguments]), Installation(root, root), time_limit)


# -- what its ends mean: one process for all of them --

REFUSED = {
    "an error of the parser's": ("parser.error('no such thing')", "no such thing"),
    "an assertion": ("assert not args.colocate, 'one is\\n too many'", "one is too many"),
    "an assertion without a message": ("assert not args.colocate", "AssertionError (at `"),
    "a value": ("raise ValueError('Only one of a and b')", "Only one of a and b"),
    "a missing file": ("open('/does/not/exist')", "'/does/not/exist'"),
    "a crash": ("{}['x']", "KeyError: 'x' (at `"),
}
CRASHED = {
    "a package": ("import does_not_exist", "ModuleNotFoundError: No module named 'does_not_exist'"),
    "Transformer Engine": ("raise AssertionError('Transformer Engine >= 2.7 is needed')", "Transformer Engine"),
    "the job's environment": ("assert False, 'NCCL_ALGO must be one of'", "NCCL_ALGO"),
    "memory": ("raise MemoryError('no memory')", "no memory"),
    "life": ("import os; os.kill(os.getpid(), 9)", "ended with -9"),
}
IGNORED = ["--rollout-batch-size", "8", "8", "--lr-x", "8", "--colocate", "a.b=c", "--foo=8", "-x"]
SURROUNDINGS = (
    "import os, pathlib; pathlib.Path.home().joinpath('x').write_text('');"
    " assert os.environ['CUDA_VISIBLE_DEVICES'] == '' and os.environ['HF_HUB_OFFLINE'] == '1'"
)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Of every case, from a folder with a module that shadows one of Python's; the home folder must stay empty."""
    root, home, here = (tmp_path_factory.mktemp(name) for name in ("slime", "home", "here"))
    checkout(root)
    (here / "json.py").write_text("raise SystemExit('taken')")
    does = {name: code for name, (code, _) in {**REFUSED, **CRASHED}.items()} | {"surroundings": SURROUNDINGS}
    cases = {name: {"wrapper": False, "arguments": [*ARGUMENTS, "--do", code]} for name, code in does.items()}
    cases |= {
        "control": {"wrapper": False, "arguments": ARGUMENTS},
        "launched": {"wrapper": True, "arguments": ARGUMENTS},
        "help": {"wrapper": False, "arguments": ["--help"]},
        "ignored": {"wrapper": False, "arguments": IGNORED},
    }
    before = sorted(root.rglob("*"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        patch.setenv("XDG_CACHE_HOME", str(home / "cache"))
        patch.chdir(here)
        result = run_parser(cases, [root])
    assert sorted(root.rglob("*")) == before, "no byte code either"
    assert list(home.iterdir()) == [] and list(here.iterdir()) == [here / "json.py"]
    return root, result


def verdict_of(outcomes, name: str, arguments=ARGUMENTS, control: str = "control") -> Verdict:
    root, result = outcomes
    cases = {"command": result["cases"][name], "control": result["cases"][control]}
    return judge(parse_command(["python3", str(root / "train.py"), *arguments]), root, {**result, "cases": cases})


@pytest.mark.parametrize("name", ["control", "launched", "surroundings"])
def test_a_command_that_it_takes(name, outcomes):
    verdict = verdict_of(outcomes, name)
    assert "takes the command" in verdict.summary and str(outcomes[0]) in verdict.summary
    assert verdict.findings == ()


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_refuses(name, outcomes):
    verdict = verdict_of(outcomes, name)
    assert "refuses the command" in verdict.summary
    assert [(f.severity, REFUSED[name][1] in f.message) for f in verdict.findings] == [("error", True)]
    assert "\n" not in verdict.findings[0].message


@pytest.mark.parametrize("name", CRASHED)
def test_a_crash_for_want_of_something_is_no_finding(name, outcomes):
    verdict = verdict_of(outcomes, name)
    assert verdict.findings == ()
    assert CRASHED[name][1] in verdict.summary and "\n" not in verdict.summary


def test_a_crash_on_a_sound_command_too_is_no_finding(outcomes):
    verdict = verdict_of(outcomes, "a crash", control="a crash")
    assert verdict.findings == () and "KeyError" in verdict.summary


def test_a_command_that_asks_for_help(outcomes):
    assert verdict_of(outcomes, "help").findings == ()


def test_what_it_ignores(outcomes):
    messages = [f.message for f in verdict_of(outcomes, "ignored", IGNORED).findings]
    assert [message.split()[0] for message in messages] == ["'8'", "--lr-x", "'a.b=c'", "--foo", "-x"]


def test_a_train_script_of_ones_own_has_flags_of_its_own(outcomes, tmp_path):
    root, result = outcomes
    cases = {"command": result["cases"]["ignored"], "control": result["cases"]["control"]}
    (script := tmp_path / "mine.py").write_text('parser.add_argument("--lr-x")')

    def named() -> str:
        verdict = judge(parse_command(["python3", str(script), *IGNORED]), root, {**result, "cases": cases})
        return " ".join(f.message for f in verdict.findings)

    assert "--foo" in named() and "--lr-x" not in named()
    script.unlink()
    assert named() == ""  # nobody knows what it reads


def test_flags_of_the_images_megatron(outcomes, tmp_path):
    _, result = outcomes
    (patch := tmp_path / "docker" / "patch" / "v1" / "megatron.patch").parent.mkdir(parents=True)
    patch.write_text("+    group.add_argument('--lr-x')\n")
    cases = {"command": result["cases"]["ignored"], "control": result["cases"]["control"]}
    verdict = judge(parse_command(["python3", "train.py", *IGNORED]), tmp_path, {**result, "cases": cases})
    assert not any("--lr-x" in f.message for f in verdict.findings) and verdict.findings


# -- the process --


def test_packages_that_cannot_be_imported(tmp_path):
    (checkout(tmp_path) / "sglang" / "srt" / "server_args.py").write_text("raise RuntimeError('no driver')")
    verdict = asked(tmp_path, *ARGUMENTS)
    assert verdict.findings == () and "could not be asked: RuntimeError: no driver" in verdict.summary


def test_a_slime_that_cannot_be_imported(tmp_path):
    verdict = asked(checkout(tmp_path, slime="import does_not_exist"), *ARGUMENTS)
    assert verdict.findings == () and "No module named 'does_not_exist'" in verdict.summary


def test_a_process_that_hangs_is_ended_with_its_forks(tmp_path):
    pids = tmp_path / "pids"
    hang = (
        f"import os, time\nos.fork()\nprint(os.getpid(), file=open({str(pids)!r}, 'a'), flush=True)\ntime.sleep(3600)"
    )
    (checkout(tmp_path) / "sitecustomize.py").write_text(hang)
    verdict = asked(tmp_path, *ARGUMENTS, time_limit=4)
    assert verdict.findings == ()
    assert verdict.summary == "slime's parser could not be asked: it did not end within 4 s"
    found = [int(pid) for pid in pids.read_text().split()]
    assert len(found) == 2 and not any(map(running, found))


def running(pid: int) -> bool:
    """Whether the process is there, and no zombie of another parent's."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_external_engines_are_not_called(tmp_path):
    verdict = asked(checkout(tmp_path), *ARGUMENTS, "--rollout-external-engine-addrs", "10.0.0.1:3000")
    assert "was not asked" in verdict.summary and verdict.findings == ()


# -- where slime is --


def test_where_slime_is(tmp_path, monkeypatch):
    one, other = checkout(tmp_path / "one"), checkout(tmp_path / "other")
    command = parse_command(["python3", str(one / "train.py"), *ARGUMENTS])
    assert locate(command).slime == one
    assert locate(command, slime_root=other).slime == other
    assert locate(command, one, other) in (
        Installation(one, other),
        Installation(one, missing="SGLang is not installed here"),
    )
    monkeypatch.setattr(sys, "path", [str(other), *sys.path])
    for name in [name for name in sys.modules if name.partition(".")[0] in ("slime", "megatron")]:
        monkeypatch.delitem(sys.modules, name)
    assert locate(parse_command(ARGUMENTS)).slime == other


def test_slime_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"--slime-root .* is no checkout of slime"):
        locate(parse_command(ARGUMENTS), slime_root=tmp_path)
    with pytest.raises(UserError, match=r"--megatron-root .* is no checkout of Megatron-LM"):
        locate(parse_command(ARGUMENTS), checkout(tmp_path / "slime"), tmp_path)
    verdict = ask(parse_command(ARGUMENTS), Installation(missing="slime is not importable here"))
    assert verdict.summary.startswith("slime's parser was not asked: slime is not importable") and not verdict.findings


def test_what_is_said_twice_is_printed_once():
    ours = [error("--lr is 3; use 1")]
    verdict = Verdict("", (error("slime's parser refuses the command: --lr is 3; use 1"), error("another")))
    assert merged(ours, verdict) == [ours[0], error("another")]


def test_an_engines_flag_is_a_warning_as_versions_differ(tmp_path):
    output = "usage: x\nx.py: error: ambiguous option: --sglang-x could match --sglang-x-a, --sglang-x-b\n"
    case = {"status": 2, "started": True, "error": None, "ignored": [], "namespace": None, "output": output}
    result = {"missing": [], "cases": {"command": case, "control": case}}
    verdict = judge(parse_command(ARGUMENTS), tmp_path, result)
    assert [f.severity for f in verdict.findings] == ["warning"]


def test_a_process_that_dies_says_so(tmp_path):
    (checkout(tmp_path) / "sitecustomize.py").write_text("import os; os._exit(3)")
    with pytest.raises(RuntimeError, match="its process ended with 3"):
        run_parser({}, [tmp_path])


# -- as a command --


@pytest.mark.parametrize("command", [[], ["check"], ["patch"], ["patch", "apply"], ["local"], ["compare"]])
def test_help_is_help(command):
    run = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "200"})
    assert run.exit_code == 0, run.output
    assert "usage:" in run.output.lower() and "--help" in run.output
    assert "?" not in run.output
    for needed in ("Exit codes: 0", "slime-fipo check -- python3 -m slime_fipo", "--slime-root") * (
        command == ["check"]
    ):
        assert needed in run.output


def test_help_of_the_train_command_is_not_ours(tmp_path):
    run = CliRunner().invoke(app, ["check", "--no-slime-parser", "--", "train.py", "--help"])
    assert run.exit_code == 1 and "--rollout-batch-size is missing" in run.output


def test_the_roots_are_flags_and_variables(tmp_path, monkeypatch):
    root = checkout(tmp_path)
    (tmp_path / "packages" / "sglang").mkdir(parents=True)  # found, as on a machine that has it
    (tmp_path / "packages" / "sglang" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path / "packages")
    variables = {"SLIME_ROOT": str(root), "MEGATRON_ROOT": str(root)}
    run = CliRunner().invoke(app, ["check", "--", *ARGUMENTS, "--foo", "3"], env=variables)
    assert f"slime's parser ({root}" in run.output and "warning: --foo is no flag" in run.output
    wrong = CliRunner().invoke(app, ["check", "--slime-root", "/nowhere", "--", *ARGUMENTS])
    assert wrong.exit_code == 2 and "--slime-root /nowhere is no checkout" in wrong.output


PARTS = """-- - --= train.py --rm-type boxed_ --hf-checkpoint / --apply-chat-template-kwargs [] --prompt-data /dev/null
--eval-interval 1 --custom-config-path -x --lr= --beta python3 --input-key --eval-prompt-data --moe-layer-freq"""
words = st.text(max_size=12) | st.sampled_from(PARTS.split())


@given(st.lists(words, max_size=8), st.booleans())
@settings(max_examples=150, deadline=None)
def test_no_words_give_a_traceback(given_words, behind):
    assert main([*(dry_run(QWEN3_4B) if behind else []), *given_words]) in (0, 1, 2)
