"""Arms: what they may set, and that those shipped differ by what they say."""

import pytest

from slime_fipo.algorithm import FipoConfig
from slime_fipo.errors import UserError
from slime_fipo.local.arguments import given_arguments, parse_arguments
from slime_fipo.local.study.arms import SETS, Arm, check_arms, parse_arm
from slime_fipo.local.study.command import plan_study


def settings(arm: Arm):
    return parse_arguments(list(arm.flags))


def test_the_main_arms_differ_by_their_weights_alone():
    arms = {arm.name: settings(arm) for arm in SETS["main"]}
    assert arms.pop("DAPO").fipo == FipoConfig(
        clip_ratio_low=0, clip_ratio_high=0, safety_thresh=None, max_dual_clipped_tokens=None
    )
    assert arms["FIPO 7b"].fipo == FipoConfig.preset("7b") and arms["FIPO 32b"].fipo == FipoConfig.preset("32b")
    assert arms["FIPO unclipped"].fipo == FipoConfig.preset("7b", clip_influence=False)
    controls = {name: args for name, args in arms.items() if args.weight_control is not None}
    assert [args.weight_control for args in controls.values()] == [
        "shuffled-in-response",
        "shuffled-in-batch",
        "batch-mean",
    ]
    assert all(args.fipo == FipoConfig.preset("7b") for args in controls.values())


def test_the_ablations_differ_by_one_setting_each():
    first, *others = SETS["ablations"]
    config = settings(first).fipo.as_dict()
    changes = {a.name: set(settings(a).fipo.as_dict().items()) - set(config.items()) for a in others}
    assert changes == {
        "τ = 8": {("decay_rate", 8.0)},
        "τ = 128": {("decay_rate", 128.0)},
        "τ = 256": {("decay_rate", 256.0)},
        "no filter of extreme ratios": {("dual_clip_c", None), ("max_dual_clipped_tokens", None)},
        "weights in [1, 1.2]": {("clip_high_only", True)},
        "mini-batch halved": set(),
    }
    assert settings(others[-1]).global_batch_size * 2 == settings(first).global_batch_size


@pytest.mark.parametrize("arms", SETS.values(), ids=SETS)
def test_shipped_arms_are_ones_that_a_user_could_give(arms):
    for arm in arms:
        assert parse_arm(f"{arm.name.replace('=', 'is')}={' '.join(arm.flags)}").flags == arm.flags
    check_arms(arms, arms[0].name)


def test_an_arm_of_the_command_line():
    arm = parse_arm("Half rate = --lr 5e-5 --fipo-preset '7b'")
    assert arm == Arm("Half rate", ("--lr", "5e-5", "--fipo-preset", "7b")) and arm.folder == "half-rate"
    assert parse_arm("plain=").flags == ()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("--lr 1", "give NAME='flags'"),
        ("base=--lr 1", "'base' is not a name"),
        ("=--lr 1", "'' is not a name"),
        ("a='--lr", "No closing quotation"),
        ("a=--lr -1", "--arm 'a': .*--lr"),
        ("a=--lrr 1", "--arm 'a': .*--lr"),
        ("a=--seed 3", "--seed is the same for all arms"),
        ("a=--save x", "--save is the same for all arms"),
        ("a=--demo-steps 3", "--demo-steps is the same for all arms"),
        ("a=--rollout-shuffle", "--rollout-shuffle is the same for all arms"),
        ("a=--rollout-temperature=2", "--rollout-temperature is the same for all arms"),
        ("a=--num-layers=2", "--num-layers is the same for all arms"),
    ],
)
def test_what_an_arm_must_not_be(text, says):
    with pytest.raises(UserError, match=says):
        parse_arm(text)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--baseline", "GRPO"], "--baseline 'GRPO' is none of the arms: 'DAPO', 'FIPO 7b'"),
        (["--arm", "a=", "--arm", "A ="], "--arm 'a': another arm has the same name or folder"),
        (["--arm", "a="], "one arm is nothing to compare"),
        (["--arm", "a=", "--arm", "b=--eps-clip-c 3"], "arm 'b': --eps-clip-c belongs to"),
        (["--fipo-record", "r"], "arm '7b shuffled in response': --fipo-record records"),
        (["--seeds", "0"], "--seeds: 0 is out of range"),
        (["--seeds", "nan"], "--seeds"),
        (["--first-seed", "-1"], "--first-seed"),
        (["--first-seed", "1e3"], "--first-seed"),
        (["--workers", "0"], "--workers"),
        (["--lr", "-1"], "--lr"),
        (["--lrr", "1"], "did you mean --lr"),
        (["--arms", "all"], "--arms"),
    ],
)
def test_bad_input_is_refused_before_any_run(argv, says):
    with pytest.raises(UserError, match=says):
        plan_study(argv)


PAIRS = {"--seed": "9", "--load": "runs/other", "--rollout-seed": "1"}
OBJECTIVE = {
    "--loss-type": "policy_loss",
    "--eps-clip-c": "3",
    "--fipo-preset": "7b",
    "--fipo-decay-rate": "8",
    "--fipo-safety-thresh": "none",
    "--fipo-clip-ratio": "0.1",
    "--weight-control": "batch-mean",
    "--sampling-stream": "1",
}


@pytest.mark.parametrize("flag", PAIRS | OBJECTIVE)
def test_what_is_no_flag_for_all_arms_is_refused_in_every_spelling(flag):
    value = (PAIRS | OBJECTIVE)[flag]
    says = f"^{flag} " + ("is what pairs the arms" if flag in PAIRS else "tells one arm from another")
    for spelling in ([flag, value], [f"{flag}={value}"], ["--lr", "1e-3", f"{flag}={value}"]):
        with pytest.raises(UserError, match=says):
            plan_study(spelling)
    with pytest.raises(UserError, match=flag[:-1]):  # no abbreviation passes either
        plan_study([f"{flag[:-1]}={value}"])


def test_switches_that_are_no_flags_for_all_arms():
    for flag in ("--fipo-unclipped", "--no-fipo-unclipped", "--fipo-clip-high-only", "--rollout-shuffle"):
        with pytest.raises(UserError, match=f"^{flag.replace('--no-', '--')} (tells one|is what pairs)"):
            plan_study([flag])


def test_runs_of_a_seed_share_what_pairs_them():
    plan = plan_study(
        ["--seeds", "2", "--first-seed", "5", "--save", "s", "--lr", "1e-3", "--arm", "a=", "--arm", "b="]
    )
    jobs = plan.jobs()
    assert [str(job.save) for job in jobs] == [f"s/seed-{n}/{f}" for n in (5, 6) for f in ("base", "a", "b")]
    for number, (base, *arms) in zip((5, 6), (jobs[:3], jobs[3:]), strict=True):
        given = given_arguments(list(base.argv))
        assert (given["seed"], given["rollout_seed"], given["rollout_shuffle"]) == (number, number, True)
        assert (given["num_rollout"], given["lr"], base.after) == (0, 1e-3, None)
        for job in arms:
            own = given_arguments(list(job.argv))
            assert own["load"] == given["save"] and job.after == base.save
            assert {k for k in own if own[k] != given.get(k)} == {"load", "save", "num_rollout"}
