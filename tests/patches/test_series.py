"""The patches themselves, without slime: are they what the sources make, and how much of slime do they change."""

import importlib.util
import math
import sys
import types
from pathlib import Path

import pytest
import torch

from slime_fipo.plugin import patch
from tests.algorithm.test_golden import CASES, GoldenCase, close


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
    close(result.future_kl, case.packed("future_kl"), mask)
    close(result.weights, case.packed("influence_weights"), final_mask)
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
