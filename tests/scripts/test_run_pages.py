"""Every run has a page, and what stands on it follows from its script: the command, the files that it needs, the disk,
where log-probs come from, and each number of the estimates."""

import math
import re
import shlex
from pathlib import Path

import pytest

from .bash import EXAMPLES, LAUNCH_SCRIPTS, ROOT, dry_run, flags, train_arguments
from .published import PUBLISHED, model_of

PAGES = ROOT / "docs" / "runs"
README = (PAGES / "README.md").read_text()
by_script = pytest.mark.parametrize("script", LAUNCH_SCRIPTS, ids=lambda s: s.stem)


def page_of(script: Path) -> str:
    return (PAGES / f"{script.stem.removeprefix('run-')}.md").read_text()


def one_line(text: str) -> str:
    return " ".join(text.split())


def given(script: Path) -> dict[str, list[str]]:
    return flags(train_arguments(dry_run(script)))


def integer(found: dict[str, list[str]], flag: str) -> int:
    return int(found[flag][0])


def billions(page: str, script: Path) -> float:
    """Parameters as the page rounds them, which must be the published model's."""
    (number,) = {match for match in re.findall(r"([\d.]+) B × ", page)}
    published = PUBLISHED[model_of(Path(given(script)["--hf-checkpoint"][0]).name)].billions
    assert float(number) == pytest.approx(published, rel=0.01)
    return float(number)


@by_script
def test_the_pages_command_is_the_scripts(script):
    block = re.search(r"```bash\n(python3 -m slime_fipo .*?)```", page_of(script), re.DOTALL)[1]
    words = shlex.split(block.replace("\\\n", " "))
    assert words[:4] == ["python3", "-m", "slime_fipo", "/root/slime/train.py"]
    assert words[4:] == train_arguments(dry_run(script))
    found = given(script)
    gpus = integer(found, "--actor-num-nodes") * integer(found, "--actor-num-gpus-per-node")
    assert re.search(rf"`examples/fipo/{re.escape(script.name)}` \| {gpus} \|", README)


@by_script
def test_a_page_followed_to_the_letter_has_every_file_that_the_run_reads(script):
    page, found = page_of(script), given(script)
    commands = "\n".join(
        re.findall(r"```bash\n(.*?)```", README.partition("## What is logged")[0] + page, re.DOTALL)[:-1]
    )
    made = set(re.findall(r"(?:--local-dir|--save) (/root/[^\s\\]+)", commands))
    made |= set(re.findall(r"first step makes `(/root/[^`]+)`", page))
    read = [
        *found["--hf-checkpoint"],
        *found["--ref-load"],
        *found["--prompt-data"],
        *found["--eval-prompt-data"][1::2],
    ]
    assert len(read) >= 4
    missing = [path for path in read if not made & {path, *map(str, Path(path).parents)}]
    assert missing == [], "no command of the page fetches or makes it"


@by_script
def test_the_disk_that_a_run_takes(script):
    page, found = page_of(script), given(script)
    checkpoint = billions(page, script) * 14
    interval, rollouts = integer(found, "--save-interval"), integer(found, "--num-rollout")
    text = one_line(page)
    assert f"{script.name} " in page and f"# FIPO; SAVE needs {2 * round(checkpoint)} GB\n" in page, (
        "where the command stands"
    )
    assert f"= {checkpoint:.0f} GB, and `SAVE` needs room for two" in text
    assert f"every {interval} rollouts (`SAVE_INTERVAL={interval}`)" in text
    kept = rollouts // interval
    assert f"keeps the {kept} of {rollouts} rollouts, {kept * checkpoint / 1000:.1f} TB" in text
    assert "slime deletes none; the script has Megatron delete each when the next is complete" in text


@by_script
def test_the_page_says_where_old_log_probs_come_from_and_why(script):
    text, found = one_line(page_of(script).partition("## Old log-probs")[2].partition("\n## ")[0]), given(script)
    if "--use-rollout-logprobs" in found:
        assert text.startswith("`LOGPROBS=rollout`, SGLang's: as slime's FIPO pull request")
        for words in ("fipo/mismatch_clip_frac", "--fipo-shift-from train", "`LOGPROBS=train`", "--fipo-decay-rate 8"):
            assert words in text, "how to see that it does harm, and the ways out"
    else:
        assert text.startswith("`LOGPROBS=train`, Megatron's") and "the paper's choice" in text
    tp, vocabulary = integer(found, "--tensor-model-parallel-size"), integer(found, "--vocab-size")
    if vocabulary % (128 * tp):
        padded = math.ceil(vocabulary / 128 / tp) * 128 * tp
        (divisor,) = found["--make-vocab-size-divisible-by"]
        assert f"`--make-vocab-size-divisible-by {divisor}` keeps Megatron from padding" in text
        assert f"the vocabulary of {vocabulary:,} to {padded:,} at TP {tp}" in text
    else:
        assert f"the vocabulary of {vocabulary:,} is a multiple of 128 × TP {tp}" in text


@by_script
def test_the_memory_that_a_page_estimates(script):
    page, found = page_of(script), given(script)
    size = billions(page, script)
    tp, pp = (integer(found, f"--{kind}-model-parallel-size") for kind in ("tensor", "pipeline"))
    cp = integer(found, "--context-parallel-size")
    gpus = integer(found, "--actor-num-nodes") * integer(found, "--actor-num-gpus-per-node")
    longest = integer(found, "--rollout-max-prompt-len") + integer(found, "--rollout-max-response-len")
    tokens, vocabulary = integer(found, "--max-tokens-per-gpu"), integer(found, "--vocab-size")
    assert tokens * cp >= longest
    layers, hidden = integer(found, "--num-layers"), integer(found, "--hidden-size")
    states = size * 6 / (tp * pp), size * 12 / gpus
    logits, inputs = tokens * vocabulary * 12 / tp / 1e9, tokens * hidden * 2 * layers / (tp * pp) / 1e9
    rows = dict(re.findall(r"^\| ([^|]+) \| ([\d.]+) \|$", page, re.MULTILINE))
    expected = {
        f"weights and fp32 gradients, {size:g} B × 6 / (TP {tp} × PP {pp})": f"{states[0]:.1f}",
        f"optimizer, {size:g} B × 12 / {gpus} GPUs": f"{states[1]:.1f}",
        f"logits, {tokens:,} tokens × {vocabulary:,} × 12 / TP {tp}": f"{logits:.1f}",
        "layer inputs kept for recomputation": f"{inputs:.1f}",
        "together": f"{sum(states) + logits + inputs:.0f}",
    }
    assert rows == expected


PROMPT = 200  # tokens, as docs/runs/README.md says
BANDWIDTH, MEMORY = 3.35e12 / 2, 0.7 * 80e9


@by_script
def test_the_time_that_a_page_estimates(script):
    """The arithmetic of docs/runs/README.md, row by row."""
    page, found = page_of(script), given(script)
    size = billions(page, script)
    shape = PUBLISHED[model_of(Path(found["--hf-checkpoint"][0]).name)]
    gpus = integer(found, "--actor-num-nodes") * integer(found, "--actor-num-gpus-per-node")
    per_engine = integer(found, "--rollout-num-gpus-per-engine")
    engines = gpus // per_engine
    samples = integer(found, "--rollout-batch-size") * integer(found, "--n-samples-per-prompt")
    flops = 8 if "--use-rollout-logprobs" in found else 10
    attention_layers = shape.layers / (4 if "--spec" in found else 1)  # Qwen3.5: every fourth
    cache_per_token = attention_layers * 2 * shape.groups * shape.head_dim * 2
    weights = size * 2e9

    header = f"training, {flops} × {size:g} B × tokens | generation ({engines} engines, 2 × {samples:,} responses)"
    assert header in page
    rows = re.findall(r"^\| ([\d,]+) tokens \| (.*) \|$", page, re.MULTILINE)
    assert len(rows) == 2
    for mean_text, row in rows:
        mean = int(mean_text.replace(",", ""))
        tokens = samples * (mean + PROMPT)
        training = flops * size * 1e9 * tokens / (gpus * 400e12)
        responses = 2 * samples / engines
        at_once = min(512, responses, (MEMORY * per_engine - weights) / (cache_per_token * mean / 2))
        step = (weights + at_once * cache_per_token * mean / 2) / (BANDWIDTH * per_engine)
        generation = responses / at_once * mean * step
        last = integer(found, "--rollout-max-response-len") * weights / (BANDWIDTH * per_engine) * 1.5
        rollout = max(generation, last) + training + 60
        assert row.split(" | ") == [
            f"{tokens / 1e6:.1f} M tokens, {training:.0f} s",
            f"{at_once:.0f} at once, {step * 1000:.0f} ms a step, {generation:.0f} s",
            f"{last:.0f} s",
            f"{rollout / 60:.0f} min",
            f"{rollout * integer(found, '--num-rollout') / 3600:.0f} h",
        ]


def test_the_readme_names_the_scripts_defaults():
    text = one_line(README)
    intervals = {script.stem.removeprefix("run-"): given(script)["--save-interval"][0] for script in LAUNCH_SCRIPTS}
    papers = {"qwen2.5-32B", "qwen2.5-math-7B"}
    assert {intervals[name] for name in papers} == {"10"} and {intervals[n] for n in intervals.keys() - papers} == {
        "20"
    }
    assert "every `SAVE_INTERVAL` rollouts (20; the paper's runs 10)" in text
    assert f"prompts of {PROMPT} tokens" in text
    default = re.search(r"RAY_JOB_STOP_WAIT_TIME_S:-(\d+)", (EXAMPLES / "common.sh").read_text())[1]
    assert f"`RAY_JOB_STOP_WAIT_TIME_S` seconds ({default})" in text
    notice = re.search(r"--signal=B:USR1@(\d+)", (EXAMPLES / "slurm" / "fipo.sbatch").read_text())[1]
    assert f"At USR1 ({notice} s before" in text and int(default) < int(notice)


# -- every page --

ALL_PAGES = [path for path in ROOT.rglob("*.md") if not {".venv", "patches"} & set(path.relative_to(ROOT).parts)]


def test_nothing_says_to_install_the_project_from_an_index_that_has_it_not():
    for path in [*ALL_PAGES, *(ROOT / "slime_fipo").rglob("*.py")]:
        assert not re.search(r"pip install\s+(-\S+\s+)*'?slime-fipo", path.read_text()), path


def test_the_cost_in_slimes_loss_is_one_figure():
    told = {}
    for path in [*ALL_PAGES, ROOT / "patches" / "README.md"]:
        text = path.read_text()
        for line in re.split(r"\n\n|\n\|", text):
            if "benchmarks.slime_loss" in line or "loss_function`, 8,192" in line:
                told |= {(path, figure): line for figure in re.findall(r"([\d.]+) ?%", line)}
    assert {figure for _, figure in told} == {"0.16"} and len(told) >= 2, told


def test_every_flag_in_a_command_of_ours_is_in_a_table():
    """Flags that slime-fipo adds to slime's, as the scripts pass them."""
    tables = (ROOT / "docs" / "slime.md").read_text()
    used = {flag for script in LAUNCH_SCRIPTS for flag in given(script) if flag.startswith(("--fipo-", "--overlong-"))}
    assert len(used) >= 5
    for flag in used:
        assert re.search(rf"^\| `{flag}\b", tables, re.MULTILINE), flag
