"""``python3 -m slime_fipo train.py …``: run a slime train script with ``--loss-type fipo_loss`` in its parser.

The script runs as ``__main__``, with the ``sys.argv`` and ``sys.path`` that Python itself would give it; the one thing
that changes is slime's argument module, at the moment the script imports it.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import ModuleType, TracebackType

USAGE = "usage: python3 -m slime_fipo SCRIPT [ARGUMENTS]   (SCRIPT is slime's train.py, train_async.py or your own)"
SLIME_ARGUMENTS = "slime.utils.arguments"


class _SlimeArgumentsFinder(MetaPathFinder):
    """Finds slime's argument module as Python would, and has FIPO's flags added once it is loaded."""

    def find_spec(self, name, path=None, target=None) -> ModuleSpec | None:
        if name != SLIME_ARGUMENTS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None:
            spec.loader = _ExtendingLoader(spec.loader)
        return spec


class _ExtendingLoader(Loader):
    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def __getattr__(self, name: str):
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        from .plugin.arguments import extend_slime_arguments

        extend_slime_arguments(module)
        if os.environ.get("SLIME_FIPO_SAVE_ON_SIGTERM") == "1":
            from .plugin.preemption import save_on_sigterm

            save_on_sigterm()


def run_script(path: str, arguments: list[str]) -> None:
    """Run a Python file as ``__main__``, as ``python3 path arguments…`` does."""
    package_root = str(Path(__file__).resolve().parents[1])
    sys.argv = [path, *arguments]
    if not getattr(sys.flags, "safe_path", False):  # with -P or -I, Python leaves the script's directory out
        sys.path[0] = str(Path(path).resolve().parent)
    if not any(finder.find_spec(__package__, None) for finder in sys.meta_path):
        # Found through the current directory alone, which a script does not have on its path. Ray hands the driver's
        # path to its workers, and they must find the loss.
        sys.path.append(package_root)
    sys.meta_path.insert(0, _SlimeArgumentsFinder())
    sys.excepthook = _without_our_frames(sys.excepthook)

    loader = SourceFileLoader("__main__", path)
    main = ModuleType("__main__")
    main.__dict__.update(__file__=path, __loader__=loader, __builtins__=__builtins__, __cached__=None)
    sys.modules["__main__"] = main
    exec(compile(loader.get_data(path), path, "exec", dont_inherit=True), main.__dict__)


def _without_our_frames(hook):
    """An exception hook that shows a traceback as if Python had started the script itself."""

    def excepthook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        inner = traceback
        while inner is not None and inner.tb_frame.f_globals.get("__name__") != "__main__":
            inner = inner.tb_next
        while inner is not None and inner.tb_frame.f_code.co_filename == __file__:
            inner = inner.tb_next
        hook(kind, error.with_traceback(inner), inner)

    return excepthook


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        print(USAGE, file=sys.stderr if len(sys.argv) < 2 or sys.argv[1] not in ("-h", "--help") else sys.stdout)
        sys.exit(0 if sys.argv[1:2] in (["-h"], ["--help"]) else 2)
    script = sys.argv[1]
    if not Path(script).is_file():
        print(f"{USAGE}\nerror: can't open {script}: no such file", file=sys.stderr)
        sys.exit(2)
    run_script(script, sys.argv[2:])


if __name__ == "__main__":
    main()
