"""FIPO through slime's real ``loss_function``, on CPU with gloo: the same numbers as the objective, in every layout."""

import pytest
import torch

from .conftest import LAYOUTS


def assert_same(actual: dict, expected: dict, tolerance: float, case: str) -> None:
    for what in ("loss", "gradient"):
        error = float((actual[what] - expected[what]).abs().max())
        limit = tolerance * max(1.0, float(expected["loss"].abs()))
        assert error <= limit, f"{case}: {what} is off by {error:.1e}"
    for name, value in expected["metrics"].items():
        assert actual["metrics"][name] == pytest.approx(value, abs=tolerance, rel=tolerance), f"{case}: {name}"


def test_data_is_what_the_cases_need(results):
    cases = results["cp1"]["cases"]
    assert cases["defaults"]["objective"]["keep"].tolist().count(False) == 1
    metrics = cases["preset_7b"]["fipo"]["metrics"]
    for share in ("clip_high_frac", "clip_low_frac", "dropped_frac", "excluded_frac", "safety_capped_frac"):
        assert 0 < metrics[f"fipo/{share}"] < 1, share
    assert all(metrics[f"fipo/neg_ratio_{band}"] > 0 for band in ("2_3", "3_4", "4_c"))
    assert cases["opsm"]["fipo"]["metrics"]["opsm_clipfrac"] > 0
    assert float((cases["defaults"]["fipo"]["gradient"] - cases["opsm"]["fipo"]["gradient"]).abs().max()) > 1e-3


def test_equals_the_objective_under_slimes_reducer(results):
    compared = 0
    for name, case in results["cp1"]["cases"].items():
        if "objective" in case:
            assert_same(case["fipo"], case["objective"], 1e-6, name)
            compared += 1
    assert compared >= 15


@pytest.mark.parametrize("world", ["cp1", *LAYOUTS])
def test_equals_policy_loss_with_the_weights_multiplied_on(results, world):
    """OPSM, TIS, custom TIS and reducer, KL, entropy, top-p replay, temperature, recomputation: each and together."""
    cases = results[world]["cases"]
    assert {"opsm", "custom_tis", "unbiased_kl_loss", "everything_tis", "everything_rollout_logprobs"} <= cases.keys()
    for name, case in cases.items():
        assert_same(case["fipo"], case["multiplied"], 1e-6, name)


@pytest.mark.parametrize("world", LAYOUTS)
def test_layout_changes_nothing(results, world):
    """Loss, gradient and every metric: context parallel, vocabulary parallel, data parallel, several micro-batches."""
    for name, case in results[world]["cases"].items():
        whole = results["cp1"]["cases"][name]["fipo"]
        assert case["fipo"]["metrics"].keys() == whole["metrics"].keys()
        assert_same(case["fipo"], whole, 1e-5, name)


def test_top_p_replay_and_all_gather_context_parallelism_ran(results, version):
    assert ("everything_top_p" in results["cp2"]["cases"]) == (version != "v0.3.0")
    assert {"allgather_cp", "allgather_cp_trained_tokens"} <= results["cp2"]["cases"].keys()


@pytest.mark.parametrize("world", ["cp1", "compiled"])
def test_unit_weights_are_bitwise_policy_loss(results, world):
    for name, case in results[world]["unit"].items():
        fipo, policy = case["fipo"], case["policy_loss"]
        assert torch.equal(fipo["loss"], policy["loss"]), name
        assert torch.equal(fipo["gradient"], policy["gradient"]), name
        assert float(policy["gradient"].abs().max()) > 0
        assert {key: fipo["metrics"][key] for key in policy["metrics"]} == policy["metrics"], name


def test_an_argument_that_slime_adds_reaches_its_function(results):
    """Unit weights against ``policy_loss`` where slime passes ``compute_policy_loss`` more than today."""
    cases = results["cp1"]["forwarding"]
    assert len(cases) == 5
    today = results["cp1"]["unit"]["defaults"]["policy_loss"]["loss"]
    for arguments, case in cases.items():
        assert float(case["policy_loss"]["loss"]) == pytest.approx(float(today) / 2, rel=1e-6), arguments
        assert torch.equal(case["fipo"]["loss"], case["policy_loss"]["loss"]), arguments
        assert torch.equal(case["fipo"]["gradient"], case["policy_loss"]["gradient"]), arguments


def test_a_response_without_a_trained_token_counts_as_0_in_a_mean(results):
    """As docs/slime.md says of ``influence_weight``: two of the ten have none."""
    metrics = results["cp1"]["unit"]["defaults"]["fipo"]["metrics"]
    assert metrics["fipo/influence_weight"] == pytest.approx(0.8)
    assert metrics["fipo/influence_deviation"] == 0.0


@pytest.mark.parametrize("world", ["cp1", *LAYOUTS])
def test_weights_that_follow_engine_noise_are_warned_of_once(results, world):
    """By the rank that logs alone; again when the share doubles; never with the trainer's log-probs."""
    main, *others = results[world]["noise"]
    assert not any(rollout["messages"] for rank in others for rollout in rank)
    few, first, same, most, trainer = main
    assert few["share"] < 0.05 < first["share"] == same["share"] < most["share"] / 2
    assert [len(rollout["messages"]) for rollout in main] == [0, 1, 0, 1, 0]
    assert trainer["share"] is None
    [message] = first["messages"]
    for way_out in ("--fipo-shift-from train", "LOGPROBS=train", "--fipo-decay-rate 32", "pads 30 to 32"):
        assert way_out in message
    assert "\n" not in message
    percent = int(message.split("%")[0].split()[-1])
    if world in ("cp1", "tp2", "micro_batches"):  # one rank has all responses; two of ten have no trained token
        assert percent == pytest.approx(100 * first["share"] * 10 / 8, abs=0.51)
    assert int(most["messages"][0].split("%")[0].split()[-1]) >= 2 * percent


@pytest.mark.parametrize("world", ["cp2", "cp4"])
def test_one_collective_more_than_policy_loss(results, world):
    for rank, cases in enumerate(results[world]["collectives"]):
        for name, case in cases.items():
            extra = list(case["fipo"])
            for call in case["policy_loss"]:
                extra.remove(call)
            assert len(case["fipo"]) == len(case["policy_loss"]) + 1, (rank, name)
            # Three numbers per sample, and a row by which ranks see that they agree on lengths and settings.
            assert extra == [("c10d::_allgather_base_", 3 * (case["samples"] + 1))], (rank, name)


def test_at_most_eight_metrics_by_default(results):
    cases = results["cp1"]["cases"]

    def names(case):
        return [name for name in cases[case]["fipo"]["metrics"] if name.startswith("fipo/")]

    assert len(names("defaults")) <= 6  # and two fipo/mismatch_… at a rollout's first step
    assert len(names("preset_7b")) > 8  # with --fipo-log-detail


def test_memory(results):
    for name, floats_per_token in results["cp1"]["extra_floats_per_token"].items():
        assert 0 < floats_per_token <= 20, name


def test_mismatch_metrics_at_a_rollouts_first_step_alone(results):
    steps = results["cp1"]["mismatch"]
    assert steps["user_hook"] == [3, 0]
    names = {"fipo/mismatch_future_kl_abs", "fipo/mismatch_clip_frac"}
    first = steps["first"]
    assert names <= first.keys()
    assert len([name for name in first if name.startswith("fipo/")]) == 8
    assert first["fipo/mismatch_future_kl_abs"] == pytest.approx(steps["expected_future_kl_abs"], rel=1e-5)
    clipped = first["fipo/clip_high_frac"] + first["fipo/clip_low_frac"]
    assert first["fipo/mismatch_clip_frac"] == pytest.approx(clipped, rel=1e-6)
    for step in ("second", "trainer_log_probs", "shift_from_train"):
        assert not names & steps[step].keys(), step


def test_shift_from_train_reports_the_engines_mismatch(results):
    metrics = results["cp1"]["cases"]["shift_from_train"]["fipo"]["metrics"]
    assert {"mismatch_kl", "mismatch_k3_kl", "ois"} <= metrics.keys()
    assert 0 < metrics["mismatch_k3_kl"] < 0.01


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("no_rollout_log_probs", "--use-rollout-logprobs asks for"),
        ("no_log_probs", "the batch has no log_probs"),
        ("shift_from_train", "--get-mismatch-metrics --custom-tis-function-path slime_fipo.plugin.loss.mismatch"),
        ("single_step", "--global-batch-size 32 of 32 samples"),
        ("gspo", "--advantage-estimator gspo"),
        ("cispo", "--advantage-estimator cispo"),
        ("no_advantages", "--disable-compute-advantages-and-returns"),
        ("eps_clip_c", "--eps-clip-c 3.0 contradicts --fipo-dual-clip-c 10"),
        ("eps_clip_high", "--fipo-dual-clip-c is 2; it must be above 1 + --eps-clip-high = 5"),
        ("decay_rate", "--fipo-decay-rate is 0"),
        ("misspelt", "fipo_decayrate is not a setting; write fipo_decay_rate"),
        ("list", "--fipo-decay-rate is [32]"),
    ],
)
def test_without_the_wrapper_mistakes_are_named_at_the_first_batch(results, setting, message):
    error = results["cp1"]["errors"][setting]
    assert message in error and "\n" not in error


def test_a_slime_without_the_names_is_refused(results):
    for name, error in results["cp1"]["refused"].items():
        assert name in error and "v0.3.0, v0.3.1 and main 624b824a" in error
