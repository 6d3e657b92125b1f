"""``python3 -m slime_fipo SCRIPT``: the script runs as if Python had started it, with or without a slime beside it."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

# Stands in for slime's argument module where the test is about the script around it; the real one: test_parser.py.
SLIME_ARGUMENTS = """
import argparse

def get_slime_extra_args_provider(add_custom_arguments=None):
    def add_slime_arguments(parser):
        parser.add_argument("--loss-type", choices=["policy_loss", "custom_loss"], default="policy_loss")
        return parser
    return add_slime_arguments

def parse_args(add_custom_arguments=None):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    return get_slime_extra_args_provider(add_custom_arguments)(parser).parse_known_args()[0]
"""


@pytest.fixture
def directory(tmp_path):
    """A slime-like root: a train script beside the package."""
    package = tmp_path / "slime" / "utils"
    package.mkdir(parents=True)
    (tmp_path / "slime" / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "arguments.py").write_text(SLIME_ARGUMENTS)
    return tmp_path


def start(prefix, script: Path, *arguments, cwd=REPOSITORY, **environment) -> subprocess.CompletedProcess:
    command = [sys.executable, *prefix, str(script), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), **environment}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=120)


def both(script: Path, *arguments, **options):
    """The same script alone and under the launcher: exit code, output and error output must agree."""
    alone = start([], script, *arguments, **options)
    launched = start(["-m", "slime_fipo"], script, *arguments, **options)
    assert launched.returncode == alone.returncode
    assert launched.stdout == alone.stdout
    assert launched.stderr == alone.stderr
    return launched


def write(directory: Path, text: str, name: str = "train.py") -> Path:
    (directory / name).write_text(textwrap.dedent(text))
    return directory / name


def test_what_a_script_sees(directory):
    script = write(
        directory,
        """
        import pickle, sys
        import __main__
        class Made: pass
        made = pickle.loads(pickle.dumps(Made()))
        print(__name__, __file__, __spec__, __package__, __doc__, sys.argv, sys.path[0], __main__.Made is type(made))
        print([name for name in sys.modules if name.partition(".")[0] in ("slime", "megatron", "ray")])
        """,
    )
    assert "--num-rollout" in both(script, "--num-rollout", "3", "--", "-x").stdout


@pytest.mark.parametrize(
    "ending",
    [
        "def load():\n    1 / 0\ntry:\n    load()\nexcept ZeroDivisionError as e:\n    raise OSError('later') from e",
        "raise SystemExit(3)",
        "raise SystemExit('out of rollouts')",
        "raise KeyboardInterrupt",
        "print('unfinished'",
        "import atexit; atexit.register(print, 'closed'); import does_not_exist",
    ],
)
def test_tracebacks_and_exit_codes(directory, ending):
    both(write(directory, ending))


def test_interrupt_ends_it_with_the_signal(directory):
    script = write(directory, "import time\nprint('ready', flush=True)\ntime.sleep(60)")
    command = [sys.executable, "-m", "slime_fipo", str(script)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in a shell's background job
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT
    assert errors.strip().endswith("KeyboardInterrupt")
    assert "__main__.py" not in errors and "launch.py" not in errors


def test_multiprocessing_finds_the_script(directory):
    both(
        write(
            directory,
            """
            import multiprocessing
            def square(x): return x * x
            if __name__ == "__main__":
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    print(pool.map(square, [2, 3]))
            """,
        )
    )


def test_a_relative_script_from_its_own_directory(directory):
    write(directory, "import helper, sys\nprint(helper.__file__, sys.argv)")
    write(directory, "", "helper.py")
    both(Path("train.py"), cwd=directory)


def test_found_through_the_current_directory_alone_it_stays_importable(directory):
    script = write(directory, "import slime_fipo.version, sys\nprint(sys.path[0], slime_fipo.version.__file__)")
    run = start(["-m", "slime_fipo"], script, PYTHONPATH="")
    assert run.stdout.split() == [str(directory), str(REPOSITORY / "slime_fipo" / "version.py")], run.stderr


def test_parser_is_extended_whenever_the_script_imports_it(directory):
    script = write(
        directory,
        """
        import sys
        assert "slime.utils.arguments" not in sys.modules
        from slime.utils.arguments import parse_args
        import slime.utils.arguments as module
        print(type(module.__loader__).__name__, type(module.__spec__.loader).__name__, parse_args())
        """,
    )
    assert both(script).stdout.startswith("SourceFileLoader SourceFileLoader Namespace(loss_type='policy_loss')")
    assert both(script, "--loss-type", "custom_loss").returncode == 0
    refused = start(["-m", "slime_fipo"], script, "--fipo-decay-rate", "3")
    assert refused.returncode == 2
    assert refused.stderr == "train.py: error: --fipo-decay-rate needs --loss-type fipo_loss; it is policy_loss\n"
    group = start(["-m", "slime_fipo"], script, "--help")
    assert "FIPO:" in group.stdout and "policy_loss,custom_loss,fipo_loss" in group.stdout


RETRY = """
    try:
        import slime.utils.arguments
    except ImportError as error:
        print("first:", error)
    from slime.utils.arguments import parse_args
    print(sorted(name for name in vars(parse_args()) if name.startswith("fipo_d")))
    """


def test_an_import_that_failed_is_extended_when_it_is_tried_again(directory):
    """As where a package of slime's is not there at first, or a file system comes late."""
    arguments = directory / "slime" / "utils" / "arguments.py"
    once = (
        'import os\nif not os.path.exists("tried"):\n    open("tried", "w").close()\n    raise ImportError("not yet")\n'
    )
    arguments.write_text(once + SLIME_ARGUMENTS)
    script = write(directory, RETRY)
    refused = start(["-m", "slime_fipo"], script, "--fipo_decay_rate", "3", cwd=directory)
    assert refused.stdout == "first: not yet\n"
    assert (
        refused.stderr
        == "train.py: error: --fipo_decay_rate is not a flag, and slime ignores it; write --fipo-decay-rate\n"
    )
    (directory / "tried").unlink()
    found = start(["-m", "slime_fipo"], script, "--help", cwd=directory)
    assert found.stdout.startswith("first: not yet\n") and "--fipo-decay-rate" in found.stdout


def test_a_reloaded_module_is_extended_once(directory):
    script = write(
        directory,
        """
        import importlib, slime.utils.arguments as module
        module = importlib.reload(module)
        print(module.parse_args(), module.parse_args.__wrapped__.__code__.co_filename == module.__file__)
        """,
    )
    run = start(["-m", "slime_fipo"], script)
    assert run.stdout == "Namespace(loss_type='policy_loss') True\n", run.stderr


def test_a_slime_with_fipo_built_in_is_refused(directory):
    arguments = directory / "slime" / "utils" / "arguments.py"
    arguments.write_text(SLIME_ARGUMENTS.replace('"custom_loss"]', '"custom_loss", "fipo_loss"]'))
    run = start(["-m", "slime_fipo"], write(directory, "import slime.utils.arguments as a; a.parse_args()"))
    assert run.returncode == 2
    assert run.stderr.startswith("train.py: error: this slime has fipo_loss built in")


def test_a_slime_without_the_seams_is_refused(directory):
    arguments = directory / "slime" / "utils" / "arguments.py"
    arguments.write_text(SLIME_ARGUMENTS.replace("get_slime_extra_args_provider", "provider"))
    run = start(["-m", "slime_fipo"], write(directory, "import slime.utils.arguments"))
    assert run.returncode == 1
    assert "has no get_slime_extra_args_provider; slime v0.3.0, v0.3.1 and main 624b824a have" in run.stderr


@pytest.mark.parametrize(("arguments", "code"), [([], 2), (["--help"], 0), (["--loss-type", "fipo_loss"], 2)])
def test_usage(arguments, code):
    run = subprocess.run(
        [sys.executable, "-m", "slime_fipo", *arguments], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert run.returncode == code
    assert "usage: python3 -m slime_fipo SCRIPT [ARGUMENTS]" in run.stdout + run.stderr


def test_missing_script(tmp_path):
    run = start(["-m", "slime_fipo"], tmp_path / "train.py")
    assert run.returncode == 2
    assert f"can't open {tmp_path / 'train.py'}" in run.stderr


def test_importing_the_package_imports_no_host():
    code = (
        "import sys, slime_fipo, slime_fipo.plugin, slime_fipo.plugin.arguments;"
        "print([m for m in ('slime', 'megatron', 'ray', 'triton') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert run.stdout.strip() == "[]", run.stderr
