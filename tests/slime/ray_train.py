"""A train script as small as slime's are at heart: parse here, run the loss in a Ray actor in another process."""

import json
import os
import tempfile

import ray
from slime.utils.arguments import parse_args


@ray.remote(num_cpus=1)
class TrainActor:
    """Holds the namespace and calls slime's loss with it, as slime's MegatronTrainRayActor does."""

    def __init__(self, args, store: str) -> None:
        import torch.distributed as dist
        from megatron.core import mpu

        self.args = args
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
        mpu.initialize_model_parallel()

    def train(self, rollout_id: int, step_id: int) -> dict:
        import torch
        from slime.backends.megatron_utils.loss import loss_function
        from slime.utils.misc import load_function

        from tests.slime import micro_batch
        from tests.slime.rig import denominators

        torch.compiler.set_stance("force_eager")
        hook = load_function(self.args.custom_megatron_before_train_step_hook_path)
        hook(self.args, rollout_id, step_id, None, None, None)
        samples = micro_batch.make_samples(shift_in_rollout=self.args.use_rollout_logprobs)
        batch, logits = micro_batch.slime_batch(self.args, samples, samples.logits, denominators(samples))
        loss, _, log = loss_function(self.args, batch, 1, len(samples.tokens), logits)
        values = (log["values"][1:] / len(samples.tokens)).tolist()
        return {"pid": os.getpid(), "loss": float(loss), "metrics": dict(zip(log["keys"], values, strict=True))}


if __name__ == "__main__":
    args = parse_args()
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as directory:
        ray.init(
            address="local",  # a cluster of our own, whatever RAY_ADDRESS says
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=100 * 1024**2,
            _temp_dir=directory,
        )
        try:
            actor = TrainActor.remote(args, os.path.join(directory, "store"))
            results = ray.get([actor.train.remote(0, 0), actor.train.remote(0, 1)])
        finally:
            ray.shutdown()
    with open(os.environ["PARSED"], "w") as file:
        json.dump({"pid": os.getpid(), "steps": results}, file)
