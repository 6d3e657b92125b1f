"""Fixtures of the embedded engine's tests."""

import pytest

from .rig import TINY, Commands


@pytest.fixture(scope="session")
def command(tmp_path_factory):
    """``command(*argv)`` runs ``slime-fipo``; see :class:`Commands`."""
    commands = Commands(tmp_path_factory.mktemp("commands"))
    yield commands
    commands.close()


@pytest.fixture(scope="session")
def local(command):
    """``slime-fipo local``, made tiny."""
    return lambda *argv, **kwargs: command("local", *TINY.split(), *argv, **kwargs)


def pytest_collection_modifyitems(items):
    """Megatron-Core warns about GPU packages that are absent and about its own deprecations."""
    for item in items:
        if "/local/" in item.path.as_posix():
            item.add_marker(pytest.mark.filterwarnings("ignore"))
