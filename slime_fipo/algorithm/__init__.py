"""The FIPO objective (arXiv:2603.19835): torch only, no host framework. Everything else in the package calls this."""

from .arguments import add_fipo_arguments, fipo_config_from_args, fipo_dests
from .config import FipoConfig
from .context_parallel import ContextParallel
from .future_kl import future_kl
from .policy_loss import fipo_policy_loss
from .weights import FipoWeights, fipo_weights

__all__ = [
    "ContextParallel",
    "FipoConfig",
    "FipoWeights",
    "add_fipo_arguments",
    "fipo_config_from_args",
    "fipo_dests",
    "fipo_policy_loss",
    "fipo_weights",
    "future_kl",
]
