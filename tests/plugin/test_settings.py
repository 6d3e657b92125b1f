"""Values of every wrong type for every setting, whole settings from files, and what an actor's overrides may change."""

from __future__ import annotations

import argparse
import datetime
import math
import re
from dataclasses import replace

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slime_fipo.algorithm import FipoConfig
from slime_fipo.check.command import parse_command
from slime_fipo.check.preflight import check_command
from slime_fipo.errors import UserError
from slime_fipo.plugin.arguments import (
    _SETTINGS,
    LOSS_PATH,
    SLIME_SETTINGS,
    actor_args,
    check_values,
    fipo_settings,
    is_on,
    translate,
)
from slime_fipo.plugin.config_files import with_overrides
from slime_fipo.plugin.parser import _check_before_slime
from slime_fipo.plugin.values import require_boolean, require_count, require_number

SLIME = dict(
    loss_type="fipo_loss",
    advantage_estimator="grpo",
    compute_advantages_and_returns=True,
    custom_config_path=None,
    custom_loss_function_path=None,
    custom_megatron_before_train_step_hook_path=None,
    custom_tis_function_path=None,
    eps_clip=0.2,
    eps_clip_c=None,
    eps_clip_high=0.28,
    get_mismatch_metrics=False,
    global_batch_size=8,
    keep_old_actor=False,
    megatron_config_path=None,
    n_samples_per_prompt=4,
    num_steps_per_rollout=None,
    rollout_batch_size=8,
    rollout_data_postprocess_path=None,
    use_rollout_logprobs=False,
    use_wandb=False,
)


def slime_args(**values) -> argparse.Namespace:
    """slime's namespace as its parser leaves it, as far as FIPO looks at it."""
    return argparse.Namespace(**{**SLIME, **dict.fromkeys(_SETTINGS), **values})


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def refusal(**values) -> str:
    with pytest.raises(ValueError) as error:
        fipo_settings(slime_args(**values))
    message = str(error.value)
    assert "\n" not in message
    return message


# -- types --

SHAPES = st.one_of(
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
    st.dates(),
    st.binary(max_size=3),
    st.sets(st.integers(), max_size=2),
)
WORDS = ("true", "yes", "on", "1", "false", "no", "off", "0")
NO_BOOLEAN = st.one_of(
    SHAPES,
    st.floats(),
    st.integers().filter(lambda n: n not in (0, 1)),
    st.text(max_size=8).filter(lambda text: text.strip().lower() not in WORDS),
)
NO_NUMBER = st.one_of(SHAPES, st.booleans(), st.text(max_size=8).filter(lambda text: text.lower() != "none"))


def wrong_values(action: argparse.Action) -> st.SearchStrategy:
    if action.nargs == 0:
        return NO_BOOLEAN
    if action.choices is not None:
        return st.one_of(SHAPES, st.integers(), st.booleans(), st.text(max_size=4)).filter(
            lambda value: not isinstance(value, str) or value not in action.choices
        )
    if action.type in (None, str):
        return st.one_of(SHAPES, st.integers(), st.booleans(), st.floats())
    return NO_NUMBER


@pytest.mark.parametrize("name", _SETTINGS)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_value_of_another_type_is_refused_with_the_flags_name(name, data):
    value = data.draw(wrong_values(_SETTINGS[name]))
    assert refusal(**{name: value}).startswith(f"{flag(name)} is ")


@pytest.mark.parametrize("name", SLIME_SETTINGS)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_a_setting_of_slimes_of_another_type_is_refused_with_the_flags_name(name, data):
    require = SLIME_SETTINGS[name]
    wrong = {
        require_boolean: st.one_of(SHAPES, st.floats(), st.integers(), st.text(max_size=5), st.sampled_from(WORDS)),
        require_number: st.one_of(SHAPES, st.booleans(), st.text(max_size=5), st.sampled_from([math.nan, math.inf])),
        require_count: st.one_of(SHAPES, st.booleans(), st.text(max_size=5), st.floats(), st.integers(max_value=0)),
    }
    value = data.draw(wrong.get(require, st.one_of(SHAPES, st.integers(), st.booleans())))
    assert refusal(**{name: value}).startswith(f"{flag(name)} is ")


SWITCHES = [name for name, action in _SETTINGS.items() if action.nargs == 0]


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize("word", WORDS)
def test_a_word_for_a_boolean_means_what_it_says(name, word):
    meant = word in ("true", "yes", "on", "1")
    if name == "fipo_allow_single_step":  # needs more than itself
        check_values({name: word})
        return
    needed = dict(fipo_record="/records", use_wandb=True) if name == "fipo_record_wandb" else {}
    for text in (word, word.upper(), word.title()):
        plain, spoken = slime_args(**needed, **{name: meant}), slime_args(**needed, **{name: text})
        assert translate(plain) == translate(spoken)
        assert vars(plain) == vars(spoken) and getattr(spoken, name) is meant


@pytest.mark.parametrize(("value", "detail"), [("false", False), ("true", True), (0, False), (1, True), (None, False)])
def test_detail_is_not_a_matter_of_truthiness(value, detail):
    assert is_on(slime_args(fipo_log_detail=value), "fipo_log_detail") is detail


SPELT = {
    "eps_clip_high": ("28e-2", "eps_clip_high: 0.28"),
    "eps_clip": ("2e-1", "eps_clip: 0.2"),
    "global_batch_size": ("'64'", "global_batch_size: 64"),
    "rollout_batch_size": ("1e2", "rollout_batch_size: 100"),
    "fipo_decay_rate": ("64e0", "fipo_decay_rate: 64"),
    "fipo_chunk_size": ("1e2", "fipo_chunk_size: 100"),
    "fipo_safety_thresh": ("'3.5'", "fipo_safety_thresh: 3.5"),
    "fipo_max_dual_clipped_tokens": ("'2'", "fipo_max_dual_clipped_tokens: 2"),
    "use_rollout_logprobs": ("'false'", "use_rollout_logprobs: false"),
    "keep_old_actor": ("'no'", "keep_old_actor: false"),
}


@pytest.mark.parametrize("name", SPELT)
def test_a_number_that_yaml_takes_for_a_text_is_refused_with_the_right_spelling(name, tmp_path):
    written, right = SPELT[name]
    value = yaml.safe_load(f"{name}: {written}")[name]
    assert isinstance(value, str)
    message = refusal(**{name: value}, custom_config_path="fipo.yaml")
    assert message.startswith(f"{flag(name)} is the text {value!r}")
    assert message.endswith(f"write {right} in --custom-config-path fipo.yaml")
    key, _, text = right.partition(": ")
    check_values({key: yaml.safe_load(text)})


def test_none_turns_off_and_is_no_text_elsewhere():
    assert fipo_settings(slime_args(fipo_safety_thresh="none", fipo_dual_clip_c="None")).safety_thresh is None
    assert refusal(fipo_decay_rate="none").startswith("--fipo-decay-rate is the text 'none'; it must be a number")


@pytest.mark.parametrize("size", ["global_batch_size", "n_samples_per_prompt", "rollout_batch_size"])
@pytest.mark.parametrize("value", [0, -8, 2.5, datetime.date(2026, 1, 1)])
def test_sizes_are_whole_and_positive(size, value):
    assert refusal(**{size: value}) == f"{flag(size)} is {value!r}; it must be a whole number of at least 1"


# -- names --


@pytest.mark.parametrize(
    ("key", "right"),
    [
        ("fipo_decayrate", "fipo_decay_rate"),
        ("fipo-decay-rate", "fipo_decay_rate"),
        ("FIPO_decay_rate", "fipo_decay_rate"),
        ("fipo_safety_threshold", "fipo_safety_thresh"),
        ("fipo_clip_range", "fipo_clip_ratio"),
    ],
)
def test_a_misspelt_key_is_refused_on_every_call(key, right):
    args = slime_args()
    fipo_settings(args)
    setattr(args, key, 3)  # the same namespace again, as a role's overrides or a hook may leave it
    with pytest.raises(UserError, match=f"^{key} is not a setting; write {right}$"):
        fipo_settings(args)


# -- overrides of --megatron-config-path --


def role_file(tmp_path, overrides: dict, role: str = "actor", **entry) -> str:
    path = tmp_path / "roles.yaml"
    path.write_text(yaml.safe_dump({"megatron": [{"role": role, "overrides": overrides, **entry}]}))
    return str(path)


SETTING_VALUES = {
    "fipo_preset": ["7b", "32b"],
    "fipo_decay_rate": [8, 64.0],
    "fipo_clip_ratio": [0.1, 0.3],
    "fipo_clip_ratio_low": [0.1, 0.3],
    "fipo_clip_ratio_high": [0.1, 0.3],
    "fipo_clip_high_only": [True, False],
    "fipo_unclipped": [True, False],
    "fipo_safety_thresh": [3, "none"],
    "fipo_dual_clip_c": [3.0, "none"],
    "fipo_max_dual_clipped_tokens": [2, "none"],
    "fipo_decay_over": ["trained_tokens"],
    "fipo_shift_from": ["train", "ratio"],
    "fipo_log_detail": [True, False],
    "eps_clip": [0.1],
    "eps_clip_high": [0.3, 4.0],
    "eps_clip_c": [3.0, 10.0],
    "use_rollout_logprobs": [True, False],
    "advantage_estimator": ["grpo", "gspo", "ppo"],
    "lr": [1e-5, "1e-5"],
}
SOME_SETTINGS = st.fixed_dictionaries({}, optional={k: st.sampled_from(v) for k, v in SETTING_VALUES.items()})


def effective(args: argparse.Namespace) -> FipoConfig | None:
    try:
        return of_effect(translate(args))
    except ValueError:
        return None


def of_effect(config: FipoConfig) -> FipoConfig:
    """The settings without what the others make idle."""
    unset = FipoConfig()
    if config.clip_high_only:
        config = replace(config, clip_ratio_low=unset.clip_ratio_low)
    if config.dual_clip_c is None:
        config = replace(config, max_dual_clipped_tokens=unset.max_dual_clipped_tokens)
    if not config.clip_influence:
        config = replace(config, clip_high_only=False, clip_ratio_low=0.2, clip_ratio_high=0.2)
    return config


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flags=SOME_SETTINGS, overrides=SOME_SETTINGS)
def test_what_the_launcher_checked_is_what_the_actor_computes_with(flags, overrides, tmp_path):
    """With overrides: the same settings, or the same refusal, as if they had been in ``--custom-config-path``."""
    args = slime_args(**{"lr": 1e-6, **flags}, megatron_config_path=role_file(tmp_path, overrides))
    merged = slime_args(**{"lr": 1e-6, **flags, **overrides})
    config = effective(args)
    assert config == effective(merged)
    if config is None:
        return
    actor = with_overrides(args, overrides)  # slime does it on the translated namespace
    assert actor.loss_type == "custom_loss" and actor.custom_loss_function_path == LOSS_PATH
    assert of_effect(fipo_settings(actor)) == config
    assert is_on(actor, "fipo_log_detail") == is_on(merged, "fipo_log_detail")


@pytest.mark.parametrize("preset", ["7b", "32b"])
def test_translated_presets_can_be_read_again(preset):
    args = slime_args(fipo_preset=preset)
    assert translate(args) == fipo_settings(args) == FipoConfig.preset(preset)


@pytest.mark.parametrize("value", ["policy_loss", "custom_loss", "sft_loss", None])
def test_the_custom_config_does_not_turn_fipo_off(value, tmp_path):
    """slime puts the file's ``loss_type`` over the command line's; the launcher and check say so beforehand."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"loss_type": value}))
    words = ["--loss-type", "fipo_loss", "--custom-config-path", str(path)]
    says = rf"loss_type: {value} in --custom-config-path {path} wins over --loss-type fipo_loss and turns FIPO off"
    with pytest.raises(UserError, match=says):
        _check_before_slime(words)
    if value is not None:  # which check reports as no value of the flag
        assert any(re.match(says, error) for error in parse_command(words).errors)


def test_the_custom_config_may_name_fipo_by_its_path(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"loss_type": "custom_loss", "custom_loss_function_path": LOSS_PATH}))
    words = ["--loss-type", "fipo_loss", "--custom-config-path", str(path)]
    _check_before_slime(words)
    assert parse_command(words).errors == ()


@pytest.mark.parametrize("value", ["fipo_loss", "policy_loss", "custom_loss", "sft_loss"])
def test_loss_type_is_refused_there(value, tmp_path):
    path = role_file(tmp_path, {"loss_type": value})
    for args in (
        slime_args(megatron_config_path=path),
        slime_args(megatron_config_path=path, loss_type="custom_loss", custom_loss_function_path=LOSS_PATH),
    ):
        with pytest.raises(UserError, match=r"loss_type of the actor in .* put --loss-type fipo_loss on the command"):
            actor_args(args)


@pytest.mark.parametrize("role", ["actor", "critic"])
@pytest.mark.parametrize("overrides", [{"loss_type": "fipo_loss"}, {"loss_type": "fipo"}])
def test_fipo_cannot_be_turned_on_there(role, overrides, tmp_path):
    args = slime_args(loss_type="policy_loss", megatron_config_path=role_file(tmp_path, overrides, role))
    with pytest.raises(UserError, match=f"loss_type of the {role} in "):
        actor_args(args)


def test_settings_do_not_stand_idle_there(tmp_path):
    args = slime_args(loss_type="policy_loss", megatron_config_path=role_file(tmp_path, {"fipo_decay_rate": 8}))
    with pytest.raises(
        UserError, match=r"fipo_decay_rate of the actor in .* needs --loss-type fipo_loss; it is policy"
    ):
        actor_args(args)


def test_without_fipo_the_overrides_are_slimes(tmp_path):
    overrides = {"loss_type": "sft_loss", "global_batch_size": 32, "num_nodes": 3, "anything": [1]}
    args = slime_args(loss_type="policy_loss", megatron_config_path=role_file(tmp_path, overrides))
    actor = actor_args(args)
    assert (actor.loss_type, actor.global_batch_size, actor.anything) == ("sft_loss", 32, [1])
    assert not hasattr(actor, "num_nodes") and args.loss_type == "policy_loss"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"global_batch_size": 32}, "global_batch_size of the actor in .* use --global-batch-size"),
        ({"custom_loss_function_path": "my.loss"}, "custom_loss_function_path of the actor in "),
        ({"custom_megatron_before_train_step_hook_path": "my.hook"}, "before_train_step_hook_path of the actor in "),
        ({"fipo_decayrate": 3}, "fipo_decayrate is not a setting; write fipo_decay_rate in --megatron-config-path"),
        ({"use_rollout_logprobs": "false"}, "use_rollout_logprobs is the text 'false', .* in --megatron-config-path"),
        ({"fipo_decay_rate": "64"}, "write fipo_decay_rate: 64.* in --megatron-config-path"),
        ({"eps_clip_c": "1e1"}, "write eps_clip_c: 10.* in --megatron-config-path"),
        ({"advantage_estimator": "gspo"}, "--advantage-estimator gspo has no per-token PPO ratio"),
        (
            {"fipo_shift_from": "train", "use_rollout_logprobs": True, "get_mismatch_metrics": False},
            "--fipo-shift-from",
        ),
    ],
)
def test_overrides_that_would_break_the_run_are_refused(overrides, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        translate(slime_args(megatron_config_path=role_file(tmp_path, overrides)))


FILES = {
    "missing": (None, "cannot be read"),
    "not YAML": ("megatron: [", "not valid YAML; fix the syntax in line"),
    "binary": ("\x00\x01", "not valid YAML; fix the syntax"),
    "no mapping": ("- a", "holds no mapping"),
    "no list": ("megatron: {role: actor}", "has no list of roles"),
    "empty": ("", "has no list of roles"),
    "entries": ("megatron: [actor]", "has no list of roles"),
    "role": ("megatron: [{role: Actor}]", "use actor or critic"),
    "twice": ("megatron: [{role: actor}, {role: actor}]", "two entries with role actor"),
    "overrides": ("megatron: [{role: actor, overrides: [1]}]", "overrides for actor that are not a mapping"),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("loss", ["fipo_loss", "policy_loss"])
def test_a_file_that_slime_would_stop_at_is_named_with_what_to_do(name, loss, tmp_path):
    text, message = FILES[name]
    path = tmp_path / "roles.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=f"^--megatron-config-path {path} .*{message}") as error:
        actor_args(slime_args(loss_type=loss, megatron_config_path=str(path)))
    findings, _ = check_command(parse_command(["--loss-type", loss, "--megatron-config-path", str(path)]))
    assert [f.message for f in findings if f.severity == "error"].count(str(error.value)) == 1


@pytest.mark.parametrize("key", ["overrides", "args"])
def test_check_judges_what_the_actor_gets(key, tmp_path):
    path = tmp_path / "roles.yaml"
    path.write_text(
        yaml.safe_dump({"megatron": [{"role": "actor", key: {"fipo_decay_rate": 48, "eps_clip_high": 9.5}}]})
    )
    words = ["--rollout-batch-size", "8", "--n-samples-per-prompt", "4", "--global-batch-size", "8"]
    by_path = ["--loss-type", "custom_loss", "--custom-loss-function-path", LOSS_PATH]
    for loss in (["--loss-type", "fipo_loss"], by_path):
        findings, _ = check_command(parse_command([*words, *loss, "--megatron-config-path", str(path)]))
        assert [f for f in findings if "it must be above 1 + --eps-clip-high = 10.5" in f.message]
        findings, config = check_command(
            parse_command([*words, *loss, "--megatron-config-path", str(path), "--fipo-dual-clip-c", "11"])
        )
        assert loss is by_path or config.decay_rate == 48
