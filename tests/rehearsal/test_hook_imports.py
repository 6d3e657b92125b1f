"""Import paths that lead nowhere are told from those that load, in a process of their own."""

import os
from pathlib import Path

import pytest

from slime_fipo.rehearsal.hook_imports import import_errors

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def errors(tmp_path):
    code = tmp_path / "code"
    code.mkdir()
    (code / "fine.py").write_text("print('said at import')\ndef reward(): ...\n")
    (code / "raises.py").write_text("raise OSError('no such device')\n")
    (code / "leaves.py").write_text("raise SystemExit('usage: leaves')\n")
    (code / "asks.py").write_text("import nowhere_else\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(code)])}
    return lambda *paths: import_errors(paths, environment, tmp_path)


def test_what_loads_is_left_out(errors):
    assert errors() == {}
    assert errors("fine.reward", "os.path.join") == {}


@pytest.mark.parametrize(
    ("path", "message"),
    {
        "nowhere.reward": "there is no module nowhere here; add its folder to PYTHONPATH, or correct the path",
        "fine.deeper.reward": "there is no module fine.deeper here",
        "asks.reward": "its module cannot be imported: No module named 'nowhere_else'",
        "raises.reward": "its module cannot be imported: OSError: no such device",
        "leaves.reward": "its module cannot be imported: SystemExit: usage: leaves",
        "fine.rewards": "fine.py has no rewards; correct the name",
    }.items(),
)
def test_what_does_not_load_is_said(errors, path, message):
    found = errors("fine.reward", path)
    assert found.keys() == {path}
    assert message in found[path]


def test_a_process_that_dies_says_nothing(errors, tmp_path):
    (tmp_path / "code" / "dies.py").write_text("import os; os._exit(3)\n")
    assert errors("nowhere.reward", "dies.reward") == {}
