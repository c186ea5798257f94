"""Has every Python process take this machine for one whose CPU has AVX2 and nothing newer; of the tests alone.

    make test-avx2, or: source tests/avx2/environment

puts this folder on PYTHONPATH and sets MLC_RAY_TEST_NO_AVX512, beside ONEDNN_MAX_CPU_ISA=AVX2 and
ATEN_CPU_CAPABILITY=avx2. Those two hold back the kernels of oneDNN and PyTorch, but what torch says of the CPU stays
as it is, and vLLM and others choose their kernels by that: it is patched here, as soon as torch is imported.
"""

import importlib.abc
import importlib.util
import os
import sys

NEWER = ("avx512", "amx")


def patch_torch(module):
    """No process sees AVX-512 or AMX, whichever function it asks."""
    capabilities = module.get_capabilities
    module.get_capabilities = lambda: {
        name: value and not name.startswith(NEWER) for name, value in capabilities().items()
    }
    for name in dir(module):
        if name.startswith(tuple(f"_is_{newer}" for newer in NEWER)):
            setattr(module, name, lambda *_: False)


def patch_device(module):
    """What mlc_ray reads from /proc/cpuinfo."""
    flags = module.cpu_flags
    module.cpu_flags = lambda *given: frozenset(name for name in flags(*given) if not name.startswith(NEWER))


PATCHES = {"torch.cpu": patch_torch, "mlc_ray.device": patch_device}


class Patching(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Loads a module as anybody would, then patches it."""

    def find_spec(self, name, path=None, target=None):
        if name not in PATCHES:
            return None
        for finder in sys.meta_path:
            if finder is not self and (spec := finder.find_spec(name, path, target)) is not None:
                self.loader, spec.loader = spec.loader, self
                return spec
        return None

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        self.loader.exec_module(module)
        PATCHES[module.__name__](module)


if os.environ.get("MLC_RAY_TEST_NO_AVX512"):
    sys.meta_path.insert(0, Patching())
