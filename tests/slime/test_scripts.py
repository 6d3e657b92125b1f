"""Every launch script's command through slime's real parser: taken, and each flag in the namespace with its value."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from slime_fipo.check.slime_parser import run_parser

from ..check.commands import provide_files
from ..scripts.bash import LAUNCH_SCRIPTS, LOSSES, dry_run, flags, train_arguments

# Flags whose name in the namespace is not their own.
DESTS = {
    "--disable-bias-linear": ("add_bias_linear", False),
    "--apply-layernorm-1p": ("layernorm_zero_centered_gamma", True),
    "--norm-epsilon": ("layernorm_epsilon", None),
    "--no-rope-fusion": ("apply_rope_fusion", False),
    "--attention-backend": ("attention_backend", None),
    "--use-rotary-position-embeddings": ("position_embedding_type", "rope"),
}
# Flags that the launcher turns into something else, and what it turns them into.
TRANSLATED = {"--loss-type": {"fipo_loss": "custom_loss"}, "--fipo-preset": {}}
# slime's Docker image patches Megatron-LM with it; unpatched Megatron ignores it and reads --attention-output-gate.
PATCHED = {"--use-gated-attention"}
ARCHITECTURES = {
    "qwen2.5": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
    "qwen3.5": ("Qwen3ForCausalLM", "qwen3"),
}


@pytest.fixture(scope="module")
def commands(tmp_path_factory) -> dict[str, list[str]]:
    """Every script's train arguments for either loss, with the files that they name."""
    found = {}
    for script in LAUNCH_SCRIPTS:
        for loss in LOSSES:
            root = tmp_path_factory.mktemp(f"{script.stem}-{loss}")
            words = dry_run(script, MODEL_ROOT=f"{root}/models", DATA_ROOT=f"{root}/data", LOSS=loss)
            provide_files(words)
            arguments = train_arguments(words)
            (run := Path(flags(arguments)["--load"][0])).mkdir()  # to be continued; else slime puts --ref-load there
            (run / "latest_checkpointed_iteration.txt").write_text("4")
            config = Path(flags(arguments)["--hf-checkpoint"][0]) / "config.json"
            declared = json.loads(config.read_text())
            declared = declared.get("text_config", declared)
            rope = declared.pop("rope_parameters", {})
            family = script.stem.removeprefix("run-").partition("-")[0]
            architecture, model_type = ARCHITECTURES[family]
            declared |= {"architectures": [architecture], "model_type": model_type, **rope}
            config.write_text(json.dumps(declared))
            found[f"{script.stem}-{loss}"] = arguments
    return found


@pytest.fixture(scope="module")
def parsed(slime, version, megatron, commands) -> dict[str, dict]:
    # v0.3.0 wants an SGLang older than the installed one; without rollouts no version reads SGLang's flags.
    extra = ["--debug-train-only"] if version == "v0.3.0" else []
    cases = {name: {"wrapper": True, "arguments": [*words, *extra]} for name, words in commands.items()}
    return run_parser(cases, [slime, megatron], time_limit=900)["cases"]


def same(given: list[str], value) -> bool:
    """Whether a namespace's value is what a flag's words say."""
    if not given:
        return value is True
    if isinstance(value, list | tuple):
        return len(given) == len(value) and all(same([word], item) for word, item in zip(given, value, strict=True))
    if isinstance(value, bool) or len(given) != 1:
        return False
    return float(given[0]) == value if isinstance(value, int | float) else given[0] == value


@pytest.mark.parametrize("name", [f"{script.stem}-{loss}" for script in LAUNCH_SCRIPTS for loss in LOSSES])
def test_slime_takes_every_flag(parsed, commands, name, version, slime):
    run = parsed[name]
    assert run["status"] == 0, run["output"][-3000:]
    missing = {}
    for flag, given in flags(commands[name]).items():
        if version == "v0.3.0" and flag.startswith("--sglang"):
            continue
        dest, value = DESTS.get(flag, (flag[2:].replace("-", "_"), None))
        if flag in PATCHED:
            patches = (slime / "docker" / "patch").glob("*/megatron.patch")
            assert any(f"'{flag}'" in patch.read_text() for patch in patches)
            continue
        if dest not in run["namespace"]:
            missing[flag] = "not in the namespace"
            continue
        text = run["namespace"][dest]
        if flag == "--attention-backend":
            assert given[0] in text
            continue
        found = literal(text)
        wanted = TRANSLATED.get(flag, {}).get(given[0] if given else None, None)
        fits = found == value if value is not None else same([wanted] if wanted else given, found)
        if not fits:
            missing[flag] = f"{given} became {text}"
    assert missing == {}


def literal(text: str):
    """The value behind a namespace's repr; what is no literal stays text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
