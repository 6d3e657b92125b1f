"""slime's real train script with stand-ins for what needs GPUs: ``train_without_gpus.py TRAIN_SCRIPT EVENTS FLAGS…``.

The loop, its questions and its order are slime's own, and Ray is real; generating takes a moment in a Ray actor.
"""

import runpy
import sys

TRAIN_SCRIPT, EVENTS = sys.argv[1:3]
sys.argv = [TRAIN_SCRIPT, *sys.argv[3:]]

import ray  # noqa: E402
from slime.ray import placement_group  # noqa: E402
from slime.ray.actor_group import RayTrainGroup  # noqa: E402
from slime.utils.arguments import parse_args  # noqa: E402,F401  where the launcher steps in, as in slime's script


def note(event: str) -> None:
    with open(EVENTS, "a") as file:
        file.write(event + "\n")


@ray.remote(num_cpus=0)
class RolloutManager:
    def generate(self, rollout_id):
        import time

        note(f"generate {rollout_id}")
        time.sleep(1)

    def save(self, rollout_id):
        note(f"save data {rollout_id}")

    def eval(self, rollout_id):
        note(f"eval {rollout_id}")

    def dispose(self):
        note("dispose")

    def get_metrics_router_addr(self):
        return None


@ray.remote(num_cpus=0)
class TrainActor:
    """slime's own ``save_model`` over Megatron's own queue of asynchronous saves; the checkpoint is an event."""

    def __init__(self, args):
        import types

        import torch
        import torch.distributed as dist
        from megatron.training.global_vars import set_args

        self.args = args
        if not args.async_save:
            return
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        torch.cuda.synchronize, torch.cuda.current_device = (lambda *_: None), (lambda: "cpu")
        set_args(args)
        sys.modules["torch_memory_saver"] = types.SimpleNamespace(torch_memory_saver=None)
        from slime.backends.megatron_utils import actor

        actor.save = self.schedule
        self.save = actor.MegatronTrainRayActor.save_model

    def schedule(self, rollout_id, *_):
        import time

        from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
        from megatron.training.async_utils import schedule_async_save

        schedule_async_save(AsyncRequest(time.sleep, (1,), [lambda: note(f"checkpoint {rollout_id}")]))

    def save_model(self, rollout_id, force_sync=False):
        note(f"save {rollout_id}")
        if self.args.async_save:
            self.model = self.optimizer = self.opt_param_scheduler = self.role = None
            self.save(self, rollout_id, force_sync)

    def train(self, rollout_id, data, external_data=None):
        pass

    def update_weights(self):
        import time

        note("update")  # between the loop's two questions
        time.sleep(1)

    def clear_memory(self):
        pass


def training_model(args) -> RayTrainGroup:
    group = RayTrainGroup.__new__(RayTrainGroup)  # its constructor takes GPUs
    group.args, group.role, group._actor_handlers = args, "actor", [TrainActor.remote(args)]
    return group


def create_placement_groups(args):
    ray.init("local", num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False)
    args.start_rollout_id = 0
    return {"actor": None, "rollout": None, "critic": None}


placement_group.create_placement_groups = create_placement_groups
placement_group.create_rollout_manager = lambda args, pg: (RolloutManager.remote(), None)
placement_group.create_training_models = lambda args, pgs, rollout_manager: (training_model(args), None)
runpy.run_path(TRAIN_SCRIPT, run_name="__main__")
