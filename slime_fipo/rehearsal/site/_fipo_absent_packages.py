"""Packages that slime or SGLang import and that have no build for a CPU: they can be imported here, and not called.

Standard library only; see ``sitecustomize.py``.
"""

import types
from importlib.machinery import ModuleSpec

# sgl_kernel: SGLang's CUDA kernels, imported by 146 of its modules. torchvision: PyPI's needs a CUDA torch.
# torch_memory_saver: slime's offloading, which a rehearsal leaves off.
PACKAGES = ("sgl_kernel", "torch_memory_saver", "torchvision")


class _Absent(type):
    """A class as far as importing goes (base class, annotation, decorator's argument); an error once it is called."""

    def __getattr__(cls, name):
        return _absent(cls, name)

    def __call__(cls, *args, **kwargs):
        raise RuntimeError(f"{cls.__module__}.{cls.__qualname__} has no build for a CPU; a rehearsal cannot call it")


def _absent(owner, name):
    if name.startswith("__"):  # Python's protocols ask for these; they must not seem to be there
        raise AttributeError(name)
    module = owner.__name__ if isinstance(owner, types.ModuleType) else owner.__module__
    value = _Absent(name, (), {"__module__": module})
    setattr(owner, name, value)
    return value


class _AbsentModule(types.ModuleType):
    def __getattr__(self, name):
        return _absent(self, name)


class Finder:
    """Finds :data:`PACKAGES` and everything below them, where nothing else did."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return ModuleSpec(name, cls, is_package=True) if name.partition(".")[0] in PACKAGES else None

    @staticmethod
    def create_module(spec):
        return _AbsentModule(spec.name)

    @staticmethod
    def exec_module(module):
        pass


def is_stand_in(name):
    """Whether the package ``name`` is found by nothing but :class:`Finder`."""
    from importlib.machinery import PathFinder

    return name in PACKAGES and PathFinder.find_spec(name) is None


def refuse_gpu(torch):
    """A process that could use a GPU must not be told that there is none.

    Raises:
        RuntimeError: torch sees a GPU.
    """
    count = torch.cuda.device_count()
    if count:
        raise RuntimeError(
            f"SLIME_FIPO_REHEARSAL is set, and torch sees {count} GPU(s): a rehearsal's stand-ins must never reach a"
            " training; unset it to train, or rehearse on a machine without a GPU"
        )


def not_installed_for_transformers(import_utils):
    """transformers asks whether a package can be found, and then relies on what is in it."""
    is_available = import_utils._is_package_available

    def is_package_available(name, *args, **kwargs):
        return is_available(f"{name}_stand_in" if is_stand_in(name) else name, *args, **kwargs)

    import_utils._is_package_available = is_package_available


def no_image_processors(configs_utils):
    """transformers' registry of image processors needs torchvision; SGLang registers into it at import."""
    if is_stand_in("torchvision"):
        configs_utils.register_image_processor = lambda *args: None
