"""What FIPO costs inside slime's loss: ``SLIME_ROOT=… python -m benchmarks.slime_loss``, on a CPU. With
slime-fipo's patches in that slime it measures what is built in, else the plugin.

8,192 tokens and a vocabulary of 32k through slime's real ``loss_function``, as ``policy_loss`` and with FIPO. FIPO's
own part is too small to show in the difference of the two, so it is timed with slime's vocabulary-wide part replaced
by its result. So are token records: what asking whether to record costs a step that is not recorded, and what a step
costs whose 8 responses all are, file and fsync included. Prints one table; a bound that is missed makes the command
exit with 1.
"""

import os
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from benchmarks.bench import best_seconds
from tests.algorithm.memory import peak_extra_bytes

TOKENS, VOCABULARY, RESPONSES, PROMPT = 8192, 32768, 8, 64


def single_rank():
    from megatron.core import mpu

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mpu.initialize_model_parallel()


def micro_batch():
    generator = torch.Generator().manual_seed(0)
    total = TOKENS // RESPONSES
    response = total - PROMPT

    def per_token(scale, mean=0.0):
        return [scale * torch.randn(response, generator=generator) + mean for _ in range(RESPONSES)]

    masks = [torch.ones(response, dtype=torch.int)] * RESPONSES
    log_vocabulary = -torch.tensor(float(VOCABULARY)).log().item()
    return {
        "unconcat_tokens": [torch.randint(VOCABULARY, (total,), generator=generator) for _ in range(RESPONSES)],
        "total_lengths": [total] * RESPONSES,
        "response_lengths": [response] * RESPONSES,
        "loss_masks": masks,
        "rollout_mask_sums": [mask.sum().float() for mask in masks],
        "group_mask_sums": [mask.sum().float() for mask in masks],
        "advantages": per_token(1.0),
        "log_probs": per_token(0.5, log_vocabulary),
    }


def record_seconds(args, batch, step):
    """Seconds that a step takes longer for asking whether it is recorded, and for being recorded."""
    from slime_fipo.plugin import recorder
    from slime_fipo.records import StepHeader, step_file

    responses = [
        recorder.Response(tokens, PROMPT, i, 0, 1.0, recorded=True) for i, tokens in enumerate(batch["unconcat_tokens"])
    ]
    header = StepHeader(0, 0, 1, {}, "slime")

    with tempfile.TemporaryDirectory() as folder:
        on = Namespace(**{**vars(args), "fipo_record": folder, "fipo_step_id": 0})

        def records():
            recorder._steps = {0: recorder.StepRecorder(Path(folder), header, responses, None)}
            step(on)
            recorder._steps = {}

        def asks():
            for _ in range(1000):
                recorder.recorder_of_step(on)

        recorder._steps = {}
        off_seconds, on_seconds = best_seconds(lambda: step(args), records, repeats=30, warm_up=3)
        assert step_file(Path(folder), header).stat().st_size > TOKENS
        [asking] = best_seconds(asks)
    return asking / 1000, on_seconds - off_seconds


def main():
    root = os.environ.get("SLIME_ROOT")
    if not root:
        sys.exit("SLIME_ROOT is not set; git clone https://github.com/THUDM/slime and give its directory")
    sys.path.insert(0, root)
    from slime.backends.megatron_utils import loss as slime_loss

    from tests.patches.rig import built_in_namespace
    from tests.slime.cases import SLIME_DEFAULTS

    plain, fipo = (Namespace(**{**SLIME_DEFAULTS, "loss_type": name}) for name in ("policy_loss", "custom_loss"))
    built_in = "compute_fipo_weights" in vars(slime_loss)
    if built_in:
        fipo = built_in_namespace(fipo)

    torch.set_num_threads(2)
    single_rank()
    batch = micro_batch()
    logits = torch.randn(1, TOKENS, VOCABULARY, generator=torch.Generator().manual_seed(1))
    logits.requires_grad_()

    def step(args, backward=True):
        loss, _, _ = slime_loss.loss_function(args, batch, 1, RESPONSES, logits)
        if backward:
            loss.backward()
            logits.grad = None

    whole, with_fipo = best_seconds(lambda: step(plain), lambda: step(fipo), repeats=3, warm_up=1)
    peaks = [peak_extra_bytes(lambda a=a: step(a, backward=False)) for a in (plain, fipo)]

    # slime's part over the vocabulary, replaced by its result; what is left is the per-token arithmetic.
    with torch.no_grad():
        _, result = slime_loss.get_log_probs_and_entropy(
            logits,
            args=Namespace(**SLIME_DEFAULTS),
            unconcat_tokens=batch["unconcat_tokens"],
            total_lengths=batch["total_lengths"],
            response_lengths=batch["response_lengths"],
            with_entropy=True,
        )
    for log_probs in result["log_probs"]:
        log_probs.requires_grad_()
    slime_loss.get_log_probs_and_entropy = lambda *args, **kwargs: (None, result)
    bare, bare_with_fipo = best_seconds(lambda: step(plain), lambda: step(fipo), repeats=30, warm_up=3)
    bare_peaks = [peak_extra_bytes(lambda a=a: step(a, backward=False)) for a in (plain, fipo)]

    asking, recording = (0.0, 0.0) if built_in else record_seconds(fipo, batch, step)

    share = (bare_with_fipo - bare) / whole
    floats = max(peaks[1] - peaks[0], bare_peaks[1] - bare_peaks[0]) / 4 / TOKENS
    table = Table(
        "measured", "value", "bound", title=f"FIPO in slime's loss, {TOKENS:,} tokens, vocabulary {VOCABULARY:,}"
    )
    table.add_row("policy_loss, forward and backward", f"{whole * 1e3:.0f} ms", "")
    table.add_row("with FIPO", f"{with_fipo * 1e3:.0f} ms", "")
    table.add_row("FIPO's own part", f"{(bare_with_fipo - bare) * 1e3:.2f} ms", "")
    table.add_row("… of policy_loss", f"{100 * share:.2f} %", "≤ 1 %")
    table.add_row("extra memory at the peak, floats per token", f"{floats:.1f}", "≤ 20")
    off, on = 1 + asking / with_fipo, 1 + recording / with_fipo
    if not built_in:
        table.add_row("a step of which nothing is recorded", f"{off:.6f}× ({asking * 1e6:.1f} µs more)", "≤ 1.001×")
        table.add_row("a step that is recorded whole", f"{on:.4f}× ({recording * 1e3:.2f} ms more)", "≤ 1.02×")
    Console().print(table)
    sys.exit(int(share > 0.01 or floats > 20 or off > 1.001 or on > 1.02))


if __name__ == "__main__":
    main()
