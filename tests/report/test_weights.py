"""The page's own F and f, computed in a browser, against Python's ``fipo_weights`` in float64."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import replace

import numpy as np
import pytest
import torch

from slime_fipo.algorithm import FipoConfig
from slime_fipo.algorithm.arguments import add_fipo_arguments, fipo_config_from_args
from slime_fipo.records import Fate, StepHeader, write_step
from slime_fipo.report.command import write_report

from .rig import CONFIG, make_records, python_weights, recorded_fates

SETTINGS = 50
RECOMPUTE = """config => {
  const { F, f, fate } = recompute(config);
  return { F: Array.from(F), f: Array.from(f), fate: Array.from(fate) };
}"""


def drawn_settings() -> list[FipoConfig]:
    rng = np.random.default_rng(7)

    def one() -> FipoConfig:
        return FipoConfig(
            decay_rate=float(2 ** rng.uniform(-1, 10)),
            clip_ratio_low=float(rng.uniform(0, 0.9)),
            clip_ratio_high=float(rng.uniform(0, 1)),
            clip_high_only=bool(rng.random() < 0.4),
            clip_influence=bool(rng.random() < 0.8),
            safety_thresh=None if rng.random() < 0.2 else float(rng.uniform(0.9, 12)),
            dual_clip_c=None if rng.random() < 0.2 else float(rng.uniform(1.1, 12)),
            max_dual_clipped_tokens=None if rng.random() < 0.2 else int(rng.integers(0, 4)),
            decay_over=str(rng.choice(["positions", "trained_tokens"])),
        )

    return [CONFIG, FipoConfig.preset("32b"), *(one() for _ in range(SETTINGS - 2))]


@pytest.fixture(scope="module")
def records():
    found = make_records(range(6), lengths=(1, 400), rare=0.02, noise=0.03, drift=0.05)
    found[0] = replace(found[0], shift=np.full_like(found[0].shift, np.nan))
    found[1] = replace(found[1], loss_mask=np.zeros_like(found[1].loss_mask))
    found[2] = replace(found[2], shift=np.float32([25.0, -30.0]).repeat(len(found[2].shift))[: len(found[2].shift)])
    empty = {name: getattr(found[3], name)[:0] for name in ("tokens", "loss_mask", "shift", "advantages", "fate")}
    empty |= {"future_kl": found[3].future_kl[:0], "influence": found[3].influence[:0], "mismatch": None}
    return [*found, replace(found[3], position=99, present=None, **empty)]


def write(folder, records, **header):
    write_step(folder, StepHeader(0, 0, 1, CONFIG.as_dict(), "local", **header), records)
    path, _ = write_report([folder])
    return path


def test_the_pages_weights_equal_pythons(open_page, tmp_path, records):
    page = open_page(write(tmp_path, records))
    order = sorted(records, key=lambda record: record.position)
    seen = Fate(0)
    for config in drawn_settings():
        found = page.evaluate(RECOMPUTE, config.as_dict())
        wanted = python_weights(order, config, torch.float64)
        np.testing.assert_allclose(found["F"], wanted.future_kl.numpy(), rtol=0, atol=1e-6)
        np.testing.assert_allclose(found["f"], wanted.metrics["influence_weight"].numpy(), rtol=0, atol=1e-6)
        fates = recorded_fates(order, wanted)
        np.testing.assert_array_equal(found["fate"], fates)
        dropped = np.where(np.array(found["fate"]) & Fate.DROPPED, 0, found["f"])
        np.testing.assert_allclose(dropped, wanted.weights.numpy(), rtol=0, atol=1e-6)
        seen |= Fate(int(np.bitwise_or.reduce(fates)))
    assert seen == Fate(127)  # every fate was met


def test_before_is_what_was_recorded(open_page, tmp_path):
    page = open_page(write(tmp_path, make_records(range(4), rare=0.02)))
    difference = page.evaluate("""() => {
      const { F, f } = recompute(null);
      const largest = (a, b) => a.reduce((size, value, t) => Math.max(size, Math.abs(value - b[t])), 0);
      return [largest(F, report.arrays.F), largest(f, report.arrays.f)];
    }""")
    assert max(difference) < 2e-6  # the record is float32


def test_pasted_flags_give_the_same_settings(open_page, tmp_path, records):
    page = open_page(write(tmp_path, records))
    names = ["decay_rate", "safety_thresh", "dual_clip_c", "decay_over", "influence_bounds"]
    for config in drawn_settings():
        flags = shlex.split(page.evaluate("config => launchFlags(config).join(' ')", config.as_dict()))
        parsed = add_fipo_arguments(argparse.ArgumentParser()).parse_args(["--fipo-preset", "32b", *flags])
        effective = fipo_config_from_args(parsed)
        # Without c there is no sequence filter, whatever its setting.
        compared = names + ["max_dual_clipped_tokens"] * (config.dual_clip_c is not None)
        assert {n: getattr(effective, n) for n in compared} == {n: getattr(config, n) for n in compared}
