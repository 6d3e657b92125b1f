"""The embedded engine: a real RL loop at toy scale, on one machine without a GPU.

A small Qwen3-shaped Megatron-Core model is trained from demonstrations, then with GRPO/DAPO and the FIPO objective,
and everything a run leaves behind stands in one run directory. The objective itself lives in ``slime_fipo.algorithm``.
"""
