"""What the paper's recipe needs around the loss: reward, group filter, evaluation, rollout metrics, preflight checks.

Everything here is reached by slime through its function-path flags, or by a user through ``slime-fipo check``; nothing
here knows how FIPO's weights are computed. No module imports slime before a hook of it is called.
"""
