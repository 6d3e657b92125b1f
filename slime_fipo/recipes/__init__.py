"""What the paper's recipe needs around the loss: reward, group filter, evaluation, rollout metrics.

slime reaches everything here through its function-path flags; nothing here knows how FIPO's weights are computed or
imports another part of the package. No module imports slime before a hook of it is called.
"""
