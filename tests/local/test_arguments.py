"""Every number that a flag of ``slime-fipo local`` takes: it is used, or refused in one line that names the flag."""

from __future__ import annotations

import argparse
import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from slime_fipo.errors import UserError
from slime_fipo.local.arguments import build_parser, given_arguments, parse_arguments
from slime_fipo.local.random_streams import seeded_generator

from .rig import CPU, MICRO, micro_flags


def takes_a_number(action: argparse.Action) -> bool:
    if action.type is None or action.nargs == 0:
        return False
    try:
        return isinstance(action.type("1"), (int, float))
    except argparse.ArgumentTypeError:  # 1 is out of its range
        return True


NUMERIC = {action.option_strings[0]: action for action in build_parser()._actions if takes_a_number(action)}
EXTREMES = (
    *("0", "-0.0", "-1", "1", "2", "0.5", "1e-45", "1e-320", "1e39", "1e308", "1e400", "-1e400", "nan", "inf", "-inf"),
    *("99999999999999999999", "-99999999999999999999", str(2**31), str(2**63), "9" * 5000, "1e9", "0x10", "١", "½"),
    *("", " ", "none", "None", "true", "[]", "1,5", "1\n2", "%", "%s", "{}", "\ud800"),
)


def outcome(*argv: str) -> UserError | argparse.Namespace:
    """What parsing gives; anything but a namespace and a one-line ``UserError`` is raised."""
    try:
        return parse_arguments([*MICRO.split(), *argv])
    except UserError as error:
        assert len(str(error).splitlines()) == 1, str(error)
        return error


def test_the_kinds_are_all_there():
    assert len(NUMERIC) > 35 and {"--seed", "--lr", "--fipo-decay-rate", "--fipo-record-samples"} <= set(NUMERIC)


@pytest.mark.parametrize("flag", NUMERIC)
def test_extremes_are_parsed_or_named(flag):
    refused = 0
    for value in EXTREMES:
        found = outcome(f"{flag}={value}")
        if isinstance(found, UserError):
            refused += 1
            assert "--" in str(found)
        else:
            number = getattr(found, NUMERIC[flag].dest)
            assert number in ("none", None) or math.isfinite(number)
    assert refused > 10


_TEXTS = st.one_of(
    st.integers().map(str),
    st.integers(-(10**40), 10**40).map(str),
    st.floats().map(repr),
    st.text(max_size=8),
    st.sampled_from(EXTREMES),
)


@settings(deadline=None, max_examples=300)
@given(flags=st.lists(st.tuples(st.sampled_from(sorted(NUMERIC)), _TEXTS), min_size=1, max_size=4))
@example(flags=[("--seed", "99999999999999999999")])
@example(flags=[("--num-query-groups", "999999"), ("--num-attention-heads", "999999")])
def test_any_numbers_together(flags):
    outcome(*(f"{flag}={value}" for flag, value in flags))


def limits(action: argparse.Action) -> list:
    """The smallest and largest values that the flag's own type takes."""
    whole = isinstance(action.type("1" if _accepts(action, "1") else "0.5"), int)
    if whole:
        candidates = [str(sign * 10**k) for k in range(20) for sign in (1, -1)] + ["0", "1024", str(2**63 - 1)]
    else:
        candidates = [f"{sign}1e{k}" for k in range(-45, 40) for sign in ("", "-")] + ["0", "0.999999"]
    accepted = sorted((float(text), text) for text in candidates if _accepts(action, text))
    return [accepted[0][1], accepted[-1][1]]


def _accepts(action: argparse.Action, text: str) -> bool:
    try:
        action.type(text)
    except (argparse.ArgumentTypeError, ValueError):
        return False
    return True


# Values at the end of their range that are accepted but would take longer, or more memory, than a test should.
_TOO_LARGE = (
    *("--num-threads", "--num-rollout", "--demo-steps", "--demo-batch-size", "--rollout-batch-size", "--num-layers"),
    *("--n-samples-per-eval-prompt", "--rollout-max-response-len", "--max-sampling-rounds", "--n-samples-per-prompt"),
    *("--hidden-size", "--ffn-hidden-size", "--kv-channels", "--num-attention-heads"),
)
_RANGED = [flag for flag in NUMERIC if not flag.startswith("--fipo-")]


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """``short_run(*flags)``: one rollout without the report, in this process; returns the error's text or ''."""
    from slime_fipo.local.engine import Engine, Progress

    data = micro_flags(tmp_path_factory.mktemp("data"))

    def short_run(*flags: str) -> str:
        folder = tmp_path_factory.mktemp("run")
        try:
            argv = [*data, "--num-rollout", "2", "--demo-steps", "1", "--eval-interval", "9", *flags]
            engine = Engine(parse_arguments([*argv, "--save", str(folder / "run")]))
            engine.run(Progress())
            engine.directory.close()
        except UserError as error:
            assert len(str(error).splitlines()) == 1
            return str(error)
        return ""

    return short_run


@pytest.mark.parametrize("flag", [flag for flag in _RANGED if flag not in _TOO_LARGE])
def test_the_ends_of_every_range_run(monkeypatch, short_run, flag):
    """To the end, or until divergence is said; an error of torch or numpy would be raised here."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, **options: path.write_bytes(b""))
    for value in limits(NUMERIC[flag]):
        more = ["--loss-type", "policy_loss"] if flag in ("--eps-clip-c", "--num-steps-per-rollout") else []
        said = short_run(f"{flag}={value}", *more)
        assert not said or flag in said or "diverged" in said


def test_seeds_of_any_accepted_size():
    for seed in (0, 2**63 - 1):
        seeded_generator(CPU, seed, 0, 0)


def test_given_arguments_sees_every_spelling():
    assert given_arguments(["--seed=9", "--no-dynamic-sampling", "--fipo-preset", "7b"]) == {
        "seed": 9,
        "dynamic_sampling": False,
        "fipo_preset": "7b",
    }
    assert given_arguments([]) == {}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("--fipo_decay_rate", "did you mean --fipo-decay-rate?"),
        ("--num-rollouts=3", "did you mean --num-rollout?"),
        ("--nonsense", "--help lists the flags"),
        ("word", "--help lists the flags"),
    ],
)
def test_a_flag_that_does_not_exist_is_named_with_what_to_write(given, says):
    with pytest.raises(UserError) as refusal:
        parse_arguments([given])
    assert str(refusal.value) == f"unrecognized arguments: {given}; {says}"


@pytest.mark.parametrize("name", ["step", "", "a/step", "a\nb", "\x1b[31m", "\udcff"])
def test_names_that_no_metric_can_have(name):
    with pytest.raises(UserError, match="not a name for metrics"):
        parse_arguments([*MICRO.split(), "--eval-prompt-data", name, "file"])


def test_a_model_or_a_rollout_that_no_machine_holds():
    for flags in (
        ["--hidden-size", "1000000", "--ffn-hidden-size", "10000"],
        ["--rollout-batch-size", "1000000", "--n-samples-per-prompt", "1000"],
    ):
        assert flags[0] in str(outcome(*flags))
