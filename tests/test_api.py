"""The package as a library: what `import mlc_ray` costs and offers."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys

import pytest

import mlc_ray
from mlc_ray import errors
from mlc_ray.errors import MlcRayError

HEAVY = ("torch", "ray", "pydantic", "numpy", "yaml", "transformers", "pyarrow", "deepspeed", "vllm")


def test_importing_the_package_loads_nothing_and_takes_no_time() -> None:
    code = f"""
import sys, time
start = time.perf_counter()
import mlc_ray
print(time.perf_counter() - start, [name for name in {HEAVY!r} if name in sys.modules])
"""
    seconds = []
    for _ in range(5):  # the fastest counts: others are other processes'
        said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        taken, _, loaded = said.strip().partition(" ")
        assert loaded == "[]"
        seconds.append(float(taken))
    assert min(seconds) < 0.05


def test_every_public_name_is_there_and_is_the_one_of_its_module() -> None:
    from mlc_ray.losses.mlc import mlc_loss
    from mlc_ray.types import Bundle, Verdict

    assert set(mlc_ray.__all__) <= set(dir(mlc_ray))
    for name in mlc_ray.__all__:
        assert getattr(mlc_ray, name) is not None
    assert (mlc_ray.mlc_loss, mlc_ray.Bundle, mlc_ray.Verdict) == (mlc_loss, Bundle, Verdict)
    assert mlc_ray.errors is errors
    assert mlc_ray.MlcRayError is MlcRayError
    with pytest.raises(AttributeError, match=r"'mlc_ray' has no attribute 'mcl_loss'"):
        mlc_ray.mcl_loss  # noqa: B018


def test_every_error_that_a_user_can_cause_is_reachable_by_its_name() -> None:
    for module in pkgutil.walk_packages(mlc_ray.__path__, "mlc_ray."):
        if module.name != "mlc_ray.__main__":
            importlib.import_module(module.name)

    def below(base: type[MlcRayError]) -> set[type[MlcRayError]]:
        return {found for child in base.__subclasses__() for found in {child, *below(child)}}

    ours = {error for error in below(MlcRayError) if error.__module__.startswith("mlc_ray.")}
    assert len(ours) > 30
    for error in ours:
        assert getattr(errors, error.__name__) is error, f"{error} is hidden by another class of its name"
        assert error.__name__ in dir(errors)
    with pytest.raises(AttributeError, match="NoSuchError"):
        errors.NoSuchError  # noqa: B018
