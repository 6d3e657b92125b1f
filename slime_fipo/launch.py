"""Runs a slime train script as Python would, with FIPO's flags in slime's parser: ``python3 -m slime_fipo SCRIPT …``.

The script runs as ``__main__``, with the ``sys.argv`` and ``sys.path`` that Python itself would give it; the one thing
that changes is slime's argument module, whenever the script imports it. What changes in it is in ``plugin/parser.py``.
"""

from __future__ import annotations

import os
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import ModuleType, TracebackType

USAGE = "usage: python3 -m slime_fipo SCRIPT [ARGUMENTS]   (SCRIPT is slime's train.py, train_async.py or your own)"
SLIME_ARGUMENTS = "slime.utils.arguments"


class _SlimeArgumentsFinder(MetaPathFinder):
    """Finds slime's argument module as Python would, and has FIPO's flags added once it is loaded.

    It stays in place: an import that failed may be tried again, and a module may be reloaded.
    """

    def find_spec(self, name, path=None, target=None) -> ModuleSpec | None:
        if name != SLIME_ARGUMENTS:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None:
            spec.loader = _ExtendingLoader(spec.loader)
        return spec


class _ExtendingLoader(Loader):
    saves_on_sigterm = False  # what is patched for that is another module, and only once

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def __getattr__(self, name: str):
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        from .plugin.parser import extend_slime_arguments

        extend_slime_arguments(module)
        if os.environ.get("SLIME_FIPO_SAVE_ON_SIGTERM") == "1" and not _ExtendingLoader.saves_on_sigterm:
            from .plugin.preemption import save_on_sigterm

            save_on_sigterm()
            _ExtendingLoader.saves_on_sigterm = True


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
    sys.excepthook = _from_the_script_on(path, sys.excepthook)

    loader = SourceFileLoader("__main__", path)
    main = ModuleType("__main__")
    main.__dict__.update(__file__=path, __loader__=loader, __builtins__=__builtins__, __cached__=None)
    sys.modules["__main__"] = main
    exec(compile(loader.get_data(path), path, "exec", dont_inherit=True), main.__dict__)


def _from_the_script_on(path: str, hook):
    """An exception hook that shows a traceback as if Python had started the script itself."""

    def excepthook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        inner = traceback
        while inner is not None and inner.tb_frame.f_code.co_filename != path:
            inner = inner.tb_next
        hook(kind, error.with_traceback(inner), inner)

    return excepthook
