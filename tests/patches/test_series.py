"""The patches themselves, without slime: are they what the sources make, and how much of slime do they change."""

import importlib.util
import sys
from pathlib import Path

from slime_fipo.plugin import patch


def generator():
    path = Path(__file__).resolve().parents[2] / "patches" / "build.py"
    spec = importlib.util.spec_from_file_location("patches_build", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_patches_are_what_the_sources_generate():
    """Every added file, and every line that goes into one of slime's; test_slime.py rebuilds them whole."""
    build = generator()
    again = "python patches/build.py --slime-root PATH makes them anew"
    for series in patch.all_series():
        mails = [path.read_text(encoding="utf-8") for path in series.paths]
        assert len(mails) == len(build.SERIES)
        for mail, commit in zip(mails, build.SERIES, strict=True):
            for path in commit.added:
                assert patch._blob_id(build.added_file(path).encode()) == series.files[path]["after"], (
                    f"{path}: {again}"
                )
                added = "".join(f"+{line}\n" for line in build.added_file(path).splitlines())
                assert f"+++ b/{path}\n" in mail and added in mail, f"{path}: {again}"
            for hook in commit.hooks:
                if series.name in hook.bases:
                    new = [line for line in hook.text.splitlines() if line and line not in hook.anchor]
                    assert all(line in mail for line in new), f"{hook.path}: {again}"
            assert commit.message.splitlines()[0] in mail


def test_few_lines_change_in_files_of_slimes():
    for series in patch.all_series():
        changed = 0
        for path in series.paths:
            for line in path.read_text(encoding="utf-8").split("\n---\n", 1)[1].splitlines():
                if line.startswith("diff --git"):
                    existing = series.files[line.split(" b/")[1]]["before"] is not None
                changed += line[:1] in "+-" and line[:3] not in ("+++", "---") and line != "" and existing
        assert 0 < changed <= 30, f"{series.name}: {changed}"
