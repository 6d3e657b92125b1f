"""FIPO (Future-KL Influenced Policy Optimization, arXiv:2603.19835) for slime: the objective, exact and linear-time."""

from .algorithm import FipoConfig, FipoWeights, fipo_policy_loss, fipo_weights, future_kl
from .version import __version__

__all__ = ["FipoConfig", "FipoWeights", "__version__", "fipo_policy_loss", "fipo_weights", "future_kl"]
