"""Puts the stand-ins into each process of a rehearsal: Python runs this at start-up where this folder is on PYTHONPATH.

Ray's workers and SGLang's spawned servers inherit the environment, so they need no other way in. Nothing happens unless
the rehearsal's variable is set. Standard library only: some of these processes never import torch. What a stand-in does
is in ``slime_fipo.rehearsal``, imported at the moment when the module that it completes has been loaded.
"""

import importlib
import os
import sys
from importlib.machinery import PathFinder, SourceFileLoader

MARK = "SLIME_FIPO_REHEARSAL"  # the rehearsal's folder; slime_fipo.rehearsal.cluster sets it

# Module -> what to call with it once it is loaded, as module:function.
_COMPLETE = {
    "torch": "_fipo_absent_packages:refuse_gpu",
    "transformers.utils.import_utils": "_fipo_absent_packages:not_installed_for_transformers",
    "sglang.srt.configs.utils": "_fipo_absent_packages:no_image_processors",
    "slime.utils.http_utils": "slime_fipo.rehearsal.ports:keep_to_own_range",
    "slime.utils.accelerator": "slime_fipo.rehearsal.cpu_accelerator:register",
    "slime.utils.reloadable_process_group": "slime_fipo.rehearsal.process_groups:forward_new_names",
    "megatron.core": "slime_fipo.rehearsal.megatron_on_cpu:answer_for_cuda",
    "megatron.core.optimizer.distrib_optimizer": "slime_fipo.rehearsal.megatron_on_cpu:keep_adam_step",
    "megatron.training.utils": "slime_fipo.rehearsal.megatron_on_cpu:answer_architecture",
}
if os.environ.get("SLIME_FIPO_WATCH"):  # slime-fipo rehearse writes down what the user's code does
    _COMPLETE |= {
        "slime.utils.misc": "slime_fipo.rehearsal.watch:count_hooks",
        "slime.rollout.rm_hub": "slime_fipo.rehearsal.reward_trial:plant_answers",
    }


class _CompletingFinder:
    """Finds the modules above as Python would, and completes each after it was executed."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name not in _COMPLETE:
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            place, function = _COMPLETE[name].split(":")
            getattr(importlib.import_module(place), function)(module)

        spec.loader.exec_module = exec_module
        return spec


def _run_the_next_sitecustomize() -> None:
    """The one that this file hides, such as a distribution's."""
    here = os.path.dirname(os.path.abspath(__file__))
    others = [folder for folder in sys.path if os.path.abspath(folder) != here]
    spec = PathFinder.find_spec("sitecustomize", others)
    if spec is not None and isinstance(spec.loader, SourceFileLoader):
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)


if os.environ.get(MARK):
    import _fipo_absent_packages

    sys.meta_path.insert(0, _CompletingFinder)
    sys.meta_path.append(_fipo_absent_packages.Finder)  # last: what is installed is used
_run_the_next_sitecustomize()
