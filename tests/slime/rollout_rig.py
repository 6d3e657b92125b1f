"""slime's own ``generate_rollout`` with our reward and filter: ``python -m tests.slime.rollout_rig OUT.json``.

A program of its own, with one slime version on the path. Real are slime's sampling loop in its event-loop thread, data
source, reward hub, filter call and conversion to training data; only the engine is a function that returns text.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
from argparse import Namespace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from megatron.core import mpu
from slime.ray.rollout import RolloutManager
from slime.rollout.data_source import RolloutDataSource
from slime.rollout.sglang_rollout import generate_rollout
from slime.utils.http_utils import init_http_client
from slime.utils.types import Sample
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from slime_fipo.check.derived import OUR_FILTER, OUR_REWARD
from slime_fipo.recipes.filters import most_drops_in_a_row
from slime_fipo.recipes.rollout_metrics import verdict_shares

from . import micro_batch
from .cases import Case
from .rig import World, train_step

PROMPTS_PER_ROLLOUT, SAMPLES_PER_PROMPT, DRAWN_AT_ONCE, RESPONSE_LENGTH = 4, 2, 8, 10


async def generate(args: Namespace, sample: Sample, sampling_params: dict) -> Sample:
    """In place of the engine: what the scenario answers to a sample."""
    sample.response = args.answer(sample)
    sample.tokens = [0] * (2 + RESPONSE_LENGTH)
    sample.response_length = RESPONSE_LENGTH
    sample.status = Sample.Status.COMPLETED
    return sample


def wrong_form(sample: Sample) -> str:
    """Half of the responses right, none in the form that the prompt asks for."""
    return f"Therefore the final result is $\\boxed{{{34 + sample.index % 2}}}$"


def varied(sample: Sample) -> str:
    return f"Answer: {34 + sample.index % 2}"


def one_group_in_three(sample: Sample) -> str:
    return varied(sample) if sample.group_index % 3 == 0 else "Answer: 35"


def all_right(sample: Sample) -> str:
    return "**Answer:** 034"


class Router(BaseHTTPRequestHandler):
    """What slime asks when a rollout is full: the engines to abort, of which there are none."""

    def do_GET(self):
        body = json.dumps({"workers": [], "urls": []}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


class Counted(RolloutDataSource):
    drawn = 0

    def get_samples(self, num_samples):
        self.drawn += num_samples
        return super().get_samples(num_samples)


class Warnings(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


def arguments(folder: Path, port: int) -> Namespace:
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"[UNK]": 0}, unk_token="[UNK]")), unk_token="[UNK]"
    ).save_pretrained(folder / "tokenizer")
    data = folder / "data.jsonl"
    data.write_text('{"prompt": "What is 17 + 17? End with Answer: $Answer", "label": "34"}\n' * 50)
    return Namespace(
        advantage_estimator="grpo",
        apply_chat_template=False,
        apply_chat_template_kwargs=None,
        ci_test=False,
        custom_generate_function_path="tests.slime.rollout_rig.generate",
        custom_rm_path=OUR_REWARD,
        dump_details=None,
        dynamic_sampling_filter_path=OUR_FILTER,
        global_batch_size=PROMPTS_PER_ROLLOUT * SAMPLES_PER_PROMPT,
        group_rm=False,
        grpo_std_normalization=True,
        hf_checkpoint=str(folder / "tokenizer"),
        input_key="prompt",
        label_key="label",
        mask_offpolicy_in_partial_rollout=False,
        metadata_key="metadata",
        multimodal_keys=None,
        n_samples_per_prompt=SAMPLES_PER_PROMPT,
        over_sampling_batch_size=DRAWN_AT_ONCE,
        overlong_buffer_len=5,
        partial_rollout=False,
        prompt_data=str(data),
        reward_key="score",
        rewards_normalization=True,
        rollout_all_samples_process_path=None,
        rollout_batch_size=PROMPTS_PER_ROLLOUT,
        rollout_global_dataset=True,
        rollout_max_prompt_len=None,
        rollout_max_response_len=20,
        rollout_num_gpus=1,
        rollout_num_gpus_per_engine=1,
        rollout_sample_filter_path=None,
        rollout_seed=42,
        rollout_shuffle=False,
        rollout_skip_special_tokens=True,
        rollout_stop=None,
        rollout_stop_token_ids=None,
        rollout_temperature=1.0,
        rollout_top_k=-1,
        rollout_top_p=1.0,
        sglang_dp_size=1,
        sglang_enable_deterministic_inference=False,
        sglang_router_ip="127.0.0.1",
        sglang_router_port=port,
        sglang_server_concurrency=64,
        tool_key=None,
        use_distributed_post=False,
    )


def train_data(args: Namespace, samples: list[Sample]) -> dict:
    manager = RolloutManager.__ray_metadata__.modified_class
    holder = SimpleNamespace(
        args=args, custom_reward_post_process_func=None, custom_convert_samples_to_train_data_func=None
    )
    holder._post_process_rewards = lambda samples: manager._post_process_rewards(holder, samples)
    return manager._convert_samples_to_train_data(holder, samples)


def gradients_of_removed_samples(folder: Path) -> dict[str, list[float]]:
    """Largest gradient and metric of a step of ``remove_sample`` alone, through slime's loss, by loss and mode."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    mpu.initialize_model_parallel()
    torch.compiler.set_stance("force_eager")
    samples = micro_batch.make_samples()
    for mask in samples.loss_masks:
        mask.zero_()
    found = {}
    for loss_type in ("policy_loss", "custom_loss"):
        for per_token in (False, True):
            args = Case(dict(fipo_preset="7b")).namespace(loss_type=loss_type, calculate_per_token_loss=per_token)
            step = train_step(args, samples, World())
            loss = abs(float(step["metrics"]["loss"]))
            found[f"{loss_type}, per token {per_token}"] = [float(step["gradient"].abs().max()), loss]
    return found


def main() -> None:
    out = Path(sys.argv[1])
    router = ThreadingHTTPServer(("127.0.0.1", 0), Router)
    threading.Thread(target=router.serve_forever, daemon=True).start()
    args = arguments(out.parent, router.server_port)
    init_http_client(args)
    logging.getLogger("slime_fipo").addHandler(warnings := Warnings())
    source = Counted(args)
    results = {
        "most": most_drops_in_a_row(PROMPTS_PER_ROLLOUT),
        "prompts": PROMPTS_PER_ROLLOUT,
        "drawn_at_once": DRAWN_AT_ONCE,
        "tokens": PROMPTS_PER_ROLLOUT * SAMPLES_PER_PROMPT * RESPONSE_LENGTH,
    }
    scenarios = {
        "ordinary": one_group_in_three,
        "unread": wrong_form,
        "still unread": wrong_form,
        "recovered": varied,
        "ordinary again": one_group_in_three,
        "all right": all_right,
    }
    for rollout_id, (name, answer) in enumerate(scenarios.items()):
        args.answer, source.drawn, warnings.messages = answer, 0, []
        output = generate_rollout(args, rollout_id, source)
        samples = [sample for group in output.samples for sample in group]
        trained = train_data(args, samples)
        results[name] = {
            "drawn": source.drawn,
            "groups": len(output.samples),
            "warnings": warnings.messages,
            "metrics": output.metrics,
            "trained_tokens": sum(map(sum, trained["loss_masks"])),
            "largest_advantage": max(map(abs, trained["rewards"])),
            "raw_rewards": trained["raw_reward"],
            "shares": verdict_shares(samples),
        }
    results["gradients"] = gradients_of_removed_samples(out.parent)
    out.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
