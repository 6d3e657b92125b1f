"""FipoConfig's bounds, the paper's presets, and the argument group that every host shares."""

import argparse
import dataclasses

import pytest

from slime_fipo import FipoConfig
from slime_fipo.algorithm import add_fipo_arguments, fipo_config_from_args, fipo_dests


def parse(line="", **host):
    args = add_fipo_arguments(argparse.ArgumentParser()).parse_args(line.split())
    for name, value in host.items():
        setattr(args, name, value)
    return fipo_config_from_args(args)


def test_presets_are_the_papers():
    seven, thirty_two = FipoConfig.preset("7b"), FipoConfig.preset("32b")
    assert seven.influence_bounds == (0.8, 1.2) and seven.safety_thresh == 3.0
    assert thirty_two.influence_bounds == (1.0, 1.2) and thirty_two.safety_thresh == 10.0
    for preset in (seven, thirty_two):
        assert (preset.decay_rate, preset.dual_clip_c, preset.chunk_size) == (32.0, 10.0, 128)
    assert FipoConfig.preset("7b", decay_rate=8.0).decay_rate == 8.0
    with pytest.raises(ValueError, match="preset '70b' is unknown; it must be one of '7b', '32b'"):
        FipoConfig.preset("70b")


def test_unclipped_bounds():
    assert FipoConfig(clip_influence=False).influence_bounds == (0.0, 10.0)


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        FipoConfig().decay_rate = 1.0


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        ("decay_rate", (0, -1.0, float("nan"), float("inf"), "32", None, True, 10**400, 10**5000)),
        ("clip_ratio_low", (-0.1, 1.0, 1.5, float("nan"), None, 10**400)),
        ("clip_ratio_high", (-0.1, float("inf"), None, 1e39, 10**400)),
        ("clip_high_only", (0, "yes", None)),
        ("clip_influence", (1, None)),
        ("safety_thresh", (0.0, -3.0, float("nan"), "none", 10**400)),
        ("dual_clip_c", (1.0, 0.5, float("inf"), "none", 1e39, 10**400)),
        ("max_dual_clipped_tokens", (-1, 1.5, True, 2**31, 10**5000)),
        ("decay_over", ("tokens", None)),
        ("impl", ("fast", None)),
        ("chunk_size", (0, -1, 1.5, None)),
    ],
)
def test_every_field_is_validated(field, bad):
    for value in bad:
        with pytest.raises(ValueError, match=f"^{field} is .*; it must be ") as raised:
            FipoConfig(**{field: value})
        assert len(str(raised.value)) < 200


def test_no_flags_are_the_defaults():
    assert parse() == FipoConfig()


def test_every_flag_reaches_its_field():
    config = parse(
        "--fipo-decay-rate 8 --fipo-chunk-size 64 --fipo-clip-ratio-low 0.1 --fipo-clip-ratio-high 0.3"
        " --fipo-safety-thresh 3 --fipo-dual-clip-c 5 --fipo-max-dual-clipped-tokens 2"
        " --fipo-decay-over trained_tokens --fipo-impl chunked"
    )
    assert config == FipoConfig(
        decay_rate=8.0,
        chunk_size=64,
        clip_ratio_low=0.1,
        clip_ratio_high=0.3,
        safety_thresh=3.0,
        dual_clip_c=5.0,
        max_dual_clipped_tokens=2,
        decay_over="trained_tokens",
        impl="chunked",
    )
    assert parse("--fipo-clip-high-only") == FipoConfig(clip_high_only=True)
    assert parse("--fipo-unclipped") == FipoConfig(clip_influence=False)
    off = parse("--fipo-safety-thresh none --fipo-dual-clip-c NONE --fipo-max-dual-clipped-tokens none")
    assert off == FipoConfig(safety_thresh=None, dual_clip_c=None, max_dual_clipped_tokens=None)


def test_given_flags_win_over_the_preset():
    assert parse("--fipo-preset 32b") == FipoConfig.preset("32b")
    config = parse("--fipo-preset 32b --no-fipo-clip-high-only --fipo-decay-rate 64")
    assert config == FipoConfig.preset("32b", clip_high_only=False, decay_rate=64.0)
    # Also a flag whose value is the default.
    assert parse("--fipo-preset 7b --fipo-safety-thresh 10").safety_thresh == 10.0
    assert parse("--fipo-preset 32b --fipo-unclipped").influence_bounds == (0.0, 10.0)


def test_clip_ratio_is_shorthand_for_both_sides():
    assert parse("--fipo-clip-ratio 0.3") == FipoConfig(clip_ratio_low=0.3, clip_ratio_high=0.3)


@pytest.mark.parametrize("preset", ["", "--fipo-preset 7b ", "--fipo-preset 32b "])
@pytest.mark.parametrize(
    ("idle", "why", "otherwise"),
    [
        ("--fipo-clip-ratio-low 0.1", "--fipo-clip-high-only", ""),
        ("--fipo-clip-ratio-low 0", "--fipo-clip-high-only", "--no-fipo-clip-high-only"),
        ("--fipo-max-dual-clipped-tokens 1", "--fipo-dual-clip-c none", "--fipo-dual-clip-c 3"),
        ("--fipo-max-dual-clipped-tokens 0", "--fipo-dual-clip-c none", ""),
        ("--fipo-clip-ratio-low 0", "--fipo-unclipped", ""),
        ("--fipo-clip-ratio-high 0", "--fipo-unclipped", "--no-fipo-unclipped"),
        ("--fipo-clip-ratio 0.3", "--fipo-unclipped", "--fipo-clip-high-only"),
        ("--fipo-clip-high-only", "--fipo-unclipped", ""),
    ],
)
def test_a_flag_that_would_do_nothing_is_refused(preset, idle, why, otherwise):
    """Named with the flag that makes it idle. Each of the two is fine without the other, whatever the preset says."""
    with pytest.raises(ValueError, match=f"{why}.* so {idle.split()[0]} would do nothing"):
        parse(f"{preset}{idle} {why}")
    parse(f"{preset}{idle} {otherwise}")
    parse(f"{preset}{why}")


def test_what_is_off_on_both_sides_does_not_contradict():
    assert parse("--fipo-dual-clip-c none --fipo-max-dual-clipped-tokens none").max_dual_clipped_tokens is None
    assert parse("--fipo-unclipped --no-fipo-clip-high-only").influence_bounds == (0.0, 10.0)


def test_a_lower_bound_that_was_given_wins_over_a_presets_high_only():
    assert parse("--fipo-preset 32b --fipo-clip-ratio-low 0.1").influence_bounds == (0.9, 1.2)
    assert parse("--fipo-preset 32b --fipo-clip-ratio 0.3").influence_bounds == (1.0, 1.3)


@pytest.mark.parametrize(
    ("argv", "host", "message"),
    [
        ("--fipo-clip-ratio 0", {}, "--fipo-clip-ratio 0 means.*--fipo-unclipped, or --fipo-clip-ratio-low 0"),
        ("--fipo-clip-ratio 0.1 --fipo-clip-ratio-low 0.2", {}, "--fipo-clip-ratio-low was given too; drop one"),
        ("--fipo-clip-ratio 1", {}, r"--fipo-clip-ratio is 1.0; it must be a number in \[0, 1\)"),
        ("--fipo-clip-ratio-low 1", {}, r"--fipo-clip-ratio-low is 1.0; it must be a number in \[0, 1\)"),
        ("--fipo-decay-rate 0", {}, "--fipo-decay-rate is 0.0; it must be"),
        (
            "--fipo-dual-clip-c 1",
            {},
            r"--fipo-dual-clip-c is 1.0; it must be a finite number above 1 and at most 1e\+38, or 'none'",
        ),
        (
            "--fipo-unclipped --fipo-clip-ratio-high 0.3",
            {},
            "--fipo-unclipped.*--fipo-clip-ratio-high would do nothing",
        ),
        ("--fipo-dual-clip-c 1.2", {"eps_clip_high": 0.28}, r"--fipo-dual-clip-c is 1.2; it must be above .* = 1.28"),
        ("--fipo-dual-clip-c 1.2", {"eps_clip": 0.2, "eps_clip_high": None}, "--fipo-dual-clip-c is 1.2"),
    ],
)
def test_errors_name_the_flag(argv, host, message):
    with pytest.raises(ValueError, match=message):
        parse(argv, **host)


def test_what_argparse_itself_refuses(capsys):
    for argv in ("--fipo-decay-rate x", "--fipo-safety-thresh off", "--fipo-impl fast", "--fipo-preset 70b"):
        with pytest.raises(SystemExit) as exit_info:
            parse(argv)
        assert exit_info.value.code == 2
        assert argv.split()[0] in capsys.readouterr().err


def test_a_namespace_without_the_flags_means_the_defaults():
    """Hosts that fill a namespace from a file set only what the file names."""
    assert fipo_config_from_args(argparse.Namespace()) == FipoConfig()
    filled = argparse.Namespace(fipo_decay_rate=8, fipo_dual_clip_c="none")
    assert fipo_config_from_args(filled) == FipoConfig(decay_rate=8, dual_clip_c=None)


def test_every_setting_has_a_flag_and_help_tells_its_default():
    help_text = " ".join(add_fipo_arguments(argparse.ArgumentParser()).format_help().split())
    assert "(default: 32.0)" in help_text and "(default: none)" not in help_text
    namespace = add_fipo_arguments(argparse.ArgumentParser()).parse_args([])
    assert set(vars(namespace)) == set(fipo_dests())
    assert len(fipo_dests()) == len(dataclasses.fields(FipoConfig)) + 2  # the preset, and the shorthand
