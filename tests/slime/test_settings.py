"""FIPO's settings against slime's parsers: silence on every flag of theirs, and overrides applied as slime does."""

import argparse
import json

import pytest
import yaml

from slime_fipo.plugin.arguments import LOSS_PATH, OWN_FLAGS, fipo_settings, translate
from slime_fipo.plugin.config_files import with_overrides
from slime_fipo.plugin.spelling import correction, key_correction

from ..plugin.test_settings import SETTING_VALUES, of_effect, slime_args
from .conftest import python

OVERRIDES = [
    {},
    *({name: value} for name, values in SETTING_VALUES.items() for value in values),
    {"fipo_clip_ratio": 0.3, "fipo_preset": "32b"},
    {"fipo_unclipped": True, "fipo_decay_rate": 8},
    {"lr": "1e-5", "eps_clip_high": "3e-1", "num_nodes": 4, "num_gpus_per_node": 2, "unknown": [1]},
    {"lr": "a lot", "n_samples_per_eval": "3"},
]


@pytest.fixture(scope="module")
def theirs(slime, version, megatron, tmp_path_factory):
    """What slime makes of each of OVERRIDES, as flags have it and as we translated it; and all of its flags."""
    directory = tmp_path_factory.mktemp(f"settings-{version}")
    cases, configs = [], []
    for number, overrides in enumerate(OVERRIDES):
        path = directory / f"{number}.yaml"
        path.write_text(yaml.safe_dump({"megatron": [{"name": "a", "role": "actor", "overrides": overrides}]}))
        # What slime's function reads besides.
        args = slime_args(lr=1e-6, kl_coef=0.0, use_opd=False, n_samples_per_eval=1, megatron_config_path=str(path))
        cases.append({"path": str(path), "args": dict(vars(args))})
        try:
            configs.append(of_effect(translate(args)))
        except ValueError:
            configs.append(None)
        cases.append({"path": str(path), "args": dict(vars(args))})
    (directory / "cases.json").write_text(json.dumps(cases))
    run = python(
        ["-m", "tests.slime.settings_rig", directory / "cases.json", directory / "out.json"],
        slime,
        megatron,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    out = json.loads((directory / "out.json").read_text())
    return out["options"], cases, configs, out["actors"]


def test_overrides_are_applied_as_slime_does(theirs):
    _, cases, configs, actors = theirs
    for number, overrides in enumerate(OVERRIDES):
        given, actor = cases[2 * number], actors[2 * number]
        assert vars(with_overrides(argparse.Namespace(**given["args"]), overrides)) == actor, overrides
        if configs[number] is not None:
            translated = argparse.Namespace(**actors[2 * number + 1])
            assert translated.custom_loss_function_path == LOSS_PATH
            assert of_effect(fipo_settings(translated)) == configs[number], overrides
    assert sum(config is not None for config in configs) > len(configs) * 0.7


def test_no_flag_of_slimes_megatrons_or_sglangs_is_taken_for_one_of_ours(theirs, version):
    options = theirs[0]
    assert len(options) > (700 if version == "v0.3.0" else 1000)
    for option in options:
        for value in ("", "3", "grpo"):
            assert correction(option, OWN_FLAGS, value) == "", option
        assert key_correction(option[2:].replace("-", "_"), OWN_FLAGS) == "", option
