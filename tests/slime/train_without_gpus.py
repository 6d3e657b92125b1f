"""slime's real train script with stand-ins for what needs GPUs: ``train_without_gpus.py TRAIN_SCRIPT EVENTS FLAGS…``.

The loop, its questions and its order are slime's own, and Ray is real; generating takes a moment in a Ray actor.
"""

import runpy
import sys

TRAIN_SCRIPT, EVENTS = sys.argv[1:3]
sys.argv = [TRAIN_SCRIPT, *sys.argv[3:]]

import ray  # noqa: E402
from slime.ray import placement_group  # noqa: E402
from slime.utils.arguments import parse_args  # noqa: E402,F401  where the launcher steps in, as in slime's script


def note(event: str) -> None:
    with open(EVENTS, "a") as file:
        file.write(event + "\n")


@ray.remote(num_cpus=0)
class RolloutManager:
    def generate(self, rollout_id):
        import time

        time.sleep(0.5)
        note(f"generate {rollout_id}")

    def save(self, rollout_id):
        note(f"save data {rollout_id}")

    def eval(self, rollout_id):
        note(f"eval {rollout_id}")

    def dispose(self):
        note("dispose")

    def get_metrics_router_addr(self):
        return None


class Model:
    def update_weights(self):
        pass

    def clear_memory(self):
        pass

    def async_train(self, rollout_id, data, **_):
        return []

    def save_model(self, rollout_id, force_sync=False):
        note(f"save {rollout_id}")


def create_placement_groups(args):
    ray.init("local", num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False)
    args.start_rollout_id = 0
    return {"actor": None, "rollout": None, "critic": None}


placement_group.create_placement_groups = create_placement_groups
placement_group.create_rollout_manager = lambda args, pg: (RolloutManager.remote(), None)
placement_group.create_training_models = lambda args, pgs, rollout_manager: (Model(), None)
runpy.run_path(TRAIN_SCRIPT, run_name="__main__")
