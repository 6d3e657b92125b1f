"""Every run has a page, and the command on it is the one that its script prints."""

import re
import shlex

import pytest

from .bash import LAUNCH_SCRIPTS, ROOT, dry_run, train_arguments

PAGES = ROOT / "docs" / "runs"


@pytest.mark.parametrize("script", LAUNCH_SCRIPTS, ids=lambda s: s.stem)
def test_the_pages_command_is_the_scripts(script):
    page = (PAGES / f"{script.stem.removeprefix('run-')}.md").read_text()
    block = re.search(r"```bash\n(python3 -m slime_fipo .*?)```", page, re.DOTALL)[1]
    words = shlex.split(block.replace("\\\n", " "))
    assert words[:4] == ["python3", "-m", "slime_fipo", "/root/slime/train.py"]
    assert words[4:] == train_arguments(dry_run(script))
    assert f"examples/fipo/{script.name}" in (PAGES / "README.md").read_text()
