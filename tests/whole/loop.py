"""``python -m tests.whole.loop SLIME MEGATRON MODEL OUT GPUS SCRIPT FLAGS…``: one run of slime's whole loop, small.

Runs in the environment of ``make test-whole``. MODEL is a checkpoint that ``tests.whole.model`` wrote. SCRIPT is
slime's train script or ours; FLAGS come after the common ones and win over them. OUT gets ``train.log``, ``ray.log``,
``rehearsal`` (its folder's name), and ``metrics.json``: slime's TensorBoard scalars, what wandb wrote to ``OUT/wandb``,
and what the end left behind.
"""

import json
import os
import sys
from pathlib import Path

from slime_fipo.rehearsal import keeper
from slime_fipo.rehearsal.cluster import Rehearsal
from slime_fipo.rehearsal.flags import MEGATRON_FLAGS, SGLANG_FLAGS
from slime_fipo.rehearsal.metrics import read_scalars, read_wandb
from tests.whole.model import slime_model_flags

REPOSITORY = Path(__file__).resolve().parents[2]
TIMEOUT_S = 3000.0  # the machine may be busy; nothing asserts a time


def flags(model: Path, out: Path) -> list[str]:
    """Three rollouts of 16 samples, two steps each; what every variant shares."""
    data = REPOSITORY / "slime_fipo/local/data/sums"
    text = f"""
    --hf-checkpoint {model} --load {model} --actor-num-nodes 1 --actor-num-gpus-per-node 1 --num-gpus-per-node 4
    --rollout-num-gpus 1 --prompt-data {data}/train.jsonl --input-key prompt --label-key label --rollout-shuffle
    --custom-rm-path tests.whole.hooks.reward --num-rollout 3 --rollout-batch-size 4 --n-samples-per-prompt 4
    --global-batch-size 8 --rollout-max-response-len 24 --rollout-temperature 1 --advantage-estimator grpo
    --micro-batch-size 1 --use-dynamic-batch-size --max-tokens-per-gpu 512 --attention-dropout 0 --hidden-dropout 0
    --accumulate-allreduce-grads-in-fp32 --attention-softmax-in-fp32 --optimizer adam --lr 1e-3
    --lr-decay-style constant --weight-decay 0.01 --clip-grad 1.0 --eps-clip 0.2 --eps-clip-high 0.28
    --loss-type fipo_loss --fipo-log-detail --use-tensorboard --tb-project-name whole --tb-experiment-name {out.name}
    """
    return [*text.split(), *slime_model_flags(model), *MEGATRON_FLAGS, *SGLANG_FLAGS]


def main(slime: str, megatron: str, model: str, out: str, gpus: str, script: str, *more: str) -> int:
    folder = Path(out).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    environment = {"TENSORBOARD_DIR": str(folder / "tensorboard"), "HF_HUB_OFFLINE": "1"}
    with Rehearsal(
        Path(slime), Path(megatron), gpus=int(gpus), log=folder / "ray.log", environment=environment
    ) as rehearsal:
        (folder / "rehearsal").write_text(str(rehearsal.folder))
        train = [sys.executable, "-m", "slime_fipo", script, *flags(Path(model), folder), *more]
        status = rehearsal.run(train, folder / "train.log", TIMEOUT_S)
    result = {
        "metrics": read_scalars(folder / "tensorboard"),
        "wandb": read_wandb(folder / "wandb"),
        "processes_left": len(keeper.processes(str(rehearsal.folder))),
        "folder_left": os.path.exists(rehearsal.folder),
    }
    (folder / "metrics.json").write_text(json.dumps(result))
    return status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
