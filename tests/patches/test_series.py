"""The patches themselves, without slime: are they what the sources make, and how much of slime do they change."""

import datetime
import difflib
import email.utils
import functools
import importlib.util
import json
import math
import re
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch

from slime_fipo.plugin import patch
from tests.algorithm.test_golden import CASES, GoldenCase


@functools.cache
def generator():
    path = Path(__file__).resolve().parents[2] / "patches" / "build.py"
    spec = importlib.util.spec_from_file_location("patches_build", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.added_file = functools.cache(module.added_file)
    return module


# What slime's generator of workflows makes of the one line that goes into its template.
WORKFLOW = ".github/workflows/pr-test.yml"
WORKFLOW_LINES = [
    "+            {",
    '+              "num_gpus": 0,',
    '+              "test_file": "test_fipo_loss.py"',
    "+            },",
]
HUNK = re.compile(r"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")


def changed_lines(hook) -> list[str]:
    """The lines of a diff that a hook makes, without context."""
    old, new = hook.anchor.splitlines(), (hook.text if hook.replace else hook.anchor + hook.text).splitlines()
    lines = []
    for _, i, j, k, m in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if old[i:j] != new[k:m]:
            lines += [f"-{line}" for line in old[i:j]] + [f"+{line}" for line in new[k:m]]
    return lines


def check_file(text: str, path: str, ids: dict, expected: list[str], build) -> tuple[int, int]:
    """One file's part of a mail, to the last character; returns how many lines it adds and removes."""
    header, at, body = text.partition("\n@@")
    if ids["before"] is None:
        lines = build.added_file(path).splitlines()
        assert ids["after"] == patch._blob_id(build.added_file(path).encode()), path
        mode = f"new file mode {ids['mode']}\nindex {'0' * 40}..{ids['after']}\n--- /dev/null"
        expected = [f"+{line}" for line in lines]
        assert body.startswith(f" -0,0 +1,{len(lines)} @@\n"), path
    else:
        mode = f"index {ids['before']}..{ids['after']} {ids['mode']}\n--- a/{path}"
    assert header == f"diff --git a/{path} b/{path}\n{mode}\n+++ b/{path}", path

    found, shift = [], 0
    for hunk in re.split(r"^(?=@@ )", at[1:] + body, flags=re.MULTILINE)[1:]:
        old_start, old_count, start, count = (int(n or 1) for n in HUNK.match(hunk).groups())
        lines = hunk.splitlines()[1:]
        assert {line[:1] for line in lines} <= set(" +-"), path
        kept, added, removed = (sum(line[0] == sign for line in lines) for sign in " +-")
        assert (kept + removed, kept + added) == (old_count, count), f"{path}: {hunk}"
        assert ids["before"] is None or start - old_start == shift, f"{path}: {hunk}"
        shift += added - removed
        found += [line for line in lines if line[0] != " "]
    assert found == expected, path
    return sum(line[0] == "+" for line in found), sum(line[0] == "-" for line in found)


def check_series(series: patch.Series, build) -> None:
    """Everything in the mails and in series.json but what only slime's files can tell: the context of the changes, and
    the ids of slime's files and trees, which test_built_in.py compares with a rebuilt series."""
    assert series.commit == build.BASES[series.name]
    assert len(series.results) == len(series.patches) == len(build.SERIES)
    assert sorted(path.name for path in (patch.PATCHES / series.name).iterdir()) == series.patches
    seen = []
    for number, (path, commit) in enumerate(zip(series.paths, build.SERIES, strict=True), 1):
        header, stat, *files = re.split(
            r"^---\n|^(?=diff --git )", path.read_text(encoding="utf-8"), flags=re.MULTILINE
        )
        date = email.utils.format_datetime(datetime.datetime.fromisoformat(build.DATE.replace("+0000", "+00:00")))
        date = date.replace(" 01 ", " 1 ")  # as git writes it
        assert header == (
            f"From {'0' * 40} Mon Sep 17 00:00:00 2001\nFrom: {build.AUTHOR} <{build.EMAIL}>\nDate: {date}\n"
            f"Subject: [PATCH {number}/{len(build.SERIES)}] {commit.message}"
        )
        expected = {name: [] for name in commit.added}
        for hook in commit.hooks:
            if series.name in hook.bases:
                expected.setdefault(hook.path, []).extend(changed_lines(hook))
        if commit.workflows:
            expected[WORKFLOW] = WORKFLOW_LINES
        assert len(files) == len(expected)
        counts = [
            check_file(text, name, series.files[name], expected[name], build)
            for text, name in zip(files, sorted(expected), strict=True)
        ]
        seen += expected
        total = re.search(
            r"^ (\d+) files? changed(?:, (\d+) insertions?...)?(?:, (\d+) deletions?...)?$", stat, re.MULTILINE
        )
        assert [int(n or 0) for n in total.groups()] == [len(files), *map(sum, zip(*counts, strict=True))]
        assert [line.split(" | ")[0].strip() for line in stat.splitlines() if " | " in line] == sorted(expected)
    assert sorted(seen) == sorted(series.files), "a file in two patches, or one in series.json that is in none"


@pytest.mark.parametrize("name", [series.name for series in patch.all_series()])
def test_patches_are_what_the_sources_generate(name):
    """If this fails: python patches/build.py --slime-root PATH makes them anew."""
    series = next(series for series in patch.all_series() if series.name == name)
    check_series(series, generator())


def replace_in_patch(number: int, old: str, new: str):
    def tamper(folder: Path) -> None:
        path = sorted((folder / "main-624b824a").iterdir())[number - 1]
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new, 1), encoding="utf-8")

    return tamper


def replace_id(key: str):
    def tamper(folder: Path) -> None:
        described = json.loads((folder / "series.json").read_text())
        described["main-624b824a"]["files"]["slime/backends/megatron_utils/loss.py"][key] = "f" * 40
        (folder / "series.json").write_text(json.dumps(described))

    return tamper


WEIGHTED = "+        pg_loss = pg_loss * fipo_weights\n"
TAMPERED = {
    "an added line": replace_in_patch(1, WEIGHTED, WEIGHTED + "+        pg_loss = pg_loss * 2\n"),
    "an added line, counted": replace_in_patch(
        1,
        "+1052,4 @@ def policy_loss_function(\n         pg_loss = pg_loss * opsm_mask\n",
        "+1052,5 @@ def policy_loss_function(\n         pg_loss = pg_loss * opsm_mask\n+        pg_loss *= 2\n",
    ),
    "an added import": replace_in_patch(1, "+from .fipo import", "+import os\n+from .fipo import"),
    "a missing line": replace_in_patch(1, WEIGHTED, ""),
    "a removed line": replace_in_patch(1, " def policy_loss_function(\n ", " def policy_loss_function(\n-"),
    "a number in a hunk": replace_in_patch(1, "@@ -1047,2 +1052,4 @@", "@@ -1047,2 +1053,4 @@"),
    "a line of an added file": replace_in_patch(1, "+MAX_SHIFT = 20.0", "+MAX_SHIFT = 2.0"),
    "a line of the workflow": replace_in_patch(2, '+              "num_gpus": 0', '+              "num_gpus": 8'),
    "an id in a patch": replace_in_patch(1, "index e7ac97c19e", "index 0000000000"),
    "an id before": replace_id("before"),
    "an id after": replace_id("after"),
    "the message": replace_in_patch(1, "evaluated in time linear", "evaluated in time quadratic"),
    "an empty file": replace_in_patch(4, "diff --git", "diff --git a/x b/x\nnew file mode 100644\ndiff --git"),
    "a patch more": lambda folder: (folder / "main-624b824a/0005-more.patch").write_text("From x\n"),
}


@pytest.mark.parametrize("tamper", TAMPERED.values(), ids=TAMPERED.keys())
def test_tampering_is_noticed(tamper, tmp_path, monkeypatch):
    for series in patch.all_series():
        shutil.copytree(patch.PATCHES / series.name, tmp_path / series.name)
    shutil.copy(patch.PATCHES / "series.json", tmp_path)
    monkeypatch.setattr(patch, "PATCHES", tmp_path)
    tamper(tmp_path)
    with pytest.raises(AssertionError):
        check_series(patch.all_series()[0], generator())


def test_few_lines_change_in_files_of_slimes():
    for series in patch.all_series():
        changed = 0
        for path in series.paths:
            for line in path.read_text(encoding="utf-8").split("\n---\n", 1)[1].splitlines():
                if line.startswith("diff --git"):
                    existing = series.files[line.split(" b/")[1]]["before"] is not None
                changed += line[:1] in "+-" and line[:3] not in ("+++", "---") and line != "" and existing
        assert 0 < changed <= 30, f"{series.name}: {changed}"


@pytest.fixture(scope="module")
def built_in():
    """slime/utils/fipo.py as the patches add it; it needs torch alone."""
    module = sys.modules["built_in_fipo"] = types.ModuleType("built_in_fipo")
    exec(compile(generator().added_file("slime/utils/fipo.py"), "slime/utils/fipo.py", "exec"), vars(module))
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_built_in_module_gives_the_authors_numbers(built_in, name, dtype):
    case = GoldenCase(name)
    mask, final_mask = case.packed("mask").bool(), case.packed("final_mask").bool()
    log_ratio = case.packed("log_probs", dtype) - case.packed("old_log_probs", dtype)
    result = built_in.fipo_weights(
        log_ratio,
        case.packed("advantages", dtype),
        mask,
        case.lengths,
        built_in.FipoConfig(**case.config),
    )
    # Just above the largest differences there are, 2.0e-7 and 2.7e-15 in the weights.
    bound = {torch.float32: 3e-7, torch.float64: 4e-15}[dtype]
    expected = case.packed("influence_weights")[final_mask]
    assert (result.weights.double()[final_mask] - expected).abs().max() < bound
    expected = case.packed("future_kl")[mask]
    assert (result.future_kl.double()[mask] - expected).abs().max() < 10 * bound * expected.abs().max()
    rows = torch.from_numpy(case.arrays["mask"]), torch.from_numpy(case.arrays["final_mask"])
    assert result.keep.tolist() == ((rows[0].sum(1) == 0) | (rows[1].sum(1) > 0)).tolist()


def test_built_in_module_takes_what_slime_may_hand_it(built_in):
    """No token on this rank, responses of length 0 and 1, everything masked, a NaN."""
    config = built_in.FipoConfig()
    for lengths, masked in (([], 0), ([0], 0), ([0, 1, 0, 3], 0), ([2, 1], 3)):
        count = sum(lengths)
        log_ratio = torch.full((count,), 0.1)
        mask = torch.arange(count) >= masked
        result = built_in.fipo_weights(log_ratio, torch.ones(count), mask, lengths, config)
        assert result.weights.shape == (count,) and result.keep.tolist() == [True] * len(lengths)
        assert result.weights.isfinite().all()
    log_ratio = torch.tensor([0.1, math.nan, 0.1])
    result = built_in.fipo_weights(log_ratio, torch.ones(3), torch.ones(3), [3], config)
    assert result.weights.isfinite().all() and result.metrics["nonfinite_frac"].tolist() == [0.0, 1.0, 0.0]
