"""What the run pages say of slime and Megatron-LM: which checkpoints are deleted, what a continued run is in W&B."""

from __future__ import annotations

import json

import pytest

from ..scripts.bash import EXAMPLES, dry_run, flags, train_arguments
from .conftest import python

SCRIPT = EXAMPLES / "run-qwen3-4B.sh"
TRACK = """
import importlib, json, sys
from argparse import Namespace
import wandb

given = dict(use_wandb=True, wandb_mode="offline", wandb_key=None, wandb_host=None, wandb_team=None, rank=0)
args = Namespace(**given, wandb_dir=sys.argv[1], **json.loads(sys.argv[2]))
importlib.import_module(sys.argv[3]).init_wandb_primary(args)
run = wandb.run
print(json.dumps({"id": run.id, "in_args": args.wandb_run_id, "name": run.name, "group": run.group}))
run.finish()
"""


@pytest.mark.parametrize("version", ["main"], indirect=True)  # one Megatron-LM for all of them
def test_a_checkpoint_is_deleted_when_the_next_is_complete(slime, megatron, tmp_path):
    """Megatron's own saving, at the rollouts at which slime's loop saves, with what the script passes."""
    found = flags(train_arguments(dry_run(SCRIPT, NUM_ROLLOUT="47")))
    given = [found[name][0] for name in ("--num-rollout", "--save-interval", "--save-retain-interval")]
    run = python(["tests/slime/save_checkpoints.py", tmp_path, *given], slime, megatron)
    assert run.returncode == 0, run.stderr[-4000:]
    assert json.loads(run.stdout.splitlines()[-1]) == {
        "newest": {"most": 1, "left": [46]},
        "all": {"most": 3, "left": [19, 39, 46]},
    }


def test_a_continued_run_is_a_new_one_in_wandb(slime, tmp_path):
    pytest.importorskip("wandb", reason="needs wandb: pip install '.[slime]'")
    found = flags(train_arguments(dry_run(SCRIPT, WANDB_PROJECT="p", SAVE="/runs/a")))
    wanted = {
        "wandb_project": found["--wandb-project"][0],
        "wandb_group": found["--wandb-group"][0],
        "wandb_random_suffix": "--disable-wandb-random-suffix" not in found,
        "wandb_run_id": "first",
    }
    (module,) = {path.parent.name for path in (slime / "slime").glob("*/wandb_utils.py")}
    arguments = ["-c", TRACK, tmp_path, json.dumps(wanted), f"slime.{module}.wandb_utils"]
    run = python(arguments, slime, WANDB_SILENT="true", HOME=str(tmp_path))
    assert run.returncode == 0, run.stderr[-4000:]
    seen = json.loads(run.stdout.splitlines()[-1])
    assert seen["id"] == seen["in_args"] != "first", "slime passes no id"
    assert seen["name"] == seen["group"] == "a"
