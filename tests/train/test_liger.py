"""Liger's kernels in the prefix tree's forward, computed by Triton's interpreter, against PyTorch's."""

import json
import os
import subprocess
import sys

import pytest
import torch

from mlc_ray.config import ModelSection
from mlc_ray.train.forward import ModelError
from mlc_ray.train.model import load_policy, use_liger
from tests.train.tiny import tiny_model

COMPARED = """
import json
import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter

# What compiled kernels may do and interpreted ones may not: a float among the arguments is a tensor in the kernel; and
# libdevice's functions.
convert = interpreter._implicit_cvt
def converted(value):
    if isinstance(value, float):
        return tl.tensor(interpreter.TensorHandle(np.array([value], dtype=np.float32), tl.float32), tl.float32)
    return convert(value)
interpreter._implicit_cvt = converted
import liger_kernel.ops.geglu as geglu
import liger_kernel.ops.rms_norm as rms_norm
rms_norm.rsqrt = lambda value: tl.math.rsqrt(value)
geglu.tanh = lambda value: 2 * tl.sigmoid(2 * value) - 1

from mlc_ray.train.model import PolicyWithExtractor, checkpoint_blocks, use_liger
from tests.train.test_model import ARCHITECTURES, ROWS, batch, build, gradients

# Liger replaces functions for the whole process: what is compared with comes first, and rotary embeddings last.
models = {
    name: PolicyWithExtractor(build(ARCHITECTURES[name]), layer=2, extractor_dim=16, seed=0).train()
    for name in ("llama_tied", "qwen2", "gemma2")
}


def outcome(module):
    output = module(batch(ROWS["one bundle"]))  # interpreted row by row: three bundles take three times as long
    loss = output.chosen.total.sum() - 0.5 * output.rejected.total.sum() + output.representations.square().sum()
    return float(loss), gradients(loss, module)


plain = {name: outcome(module) for name, module in models.items()}
found = {}
for how in ("selective", False, True):
    for name, module in models.items():
        module.language_model.gradient_checkpointing_disable()
        checkpoint_blocks(module.language_model, how)
        use_liger(module.language_model, rotary=how != "selective")
        (before, own), (after, theirs) = plain[name], outcome(module)
        found[f"{name} {how}"] = {
            "kernels": sorted({part for part in (m._get_name() for m in module.modules()) if "Liger" in part}),
            "loss": abs(after / before - 1),
            "gradient": max(float((theirs[key] - own[key]).norm() / own[key].norm()) for key in own),
        }
print(json.dumps(found))
"""


def test_the_tree_is_forwarded_by_them_as_by_pytorch(repository):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", COMPARED], cwd=repository, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for name, numbers in json.loads(done.stdout.splitlines()[-1]).items():
        assert any("RMSNorm" in kernel for kernel in numbers["kernels"]), name
        assert any("MLP" in kernel for kernel in numbers["kernels"]), name
        assert numbers["loss"] < 1e-5 and numbers["gradient"] < 1e-4, (name, numbers)


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is refused without a GPU")
def test_without_a_gpu_they_are_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"model\.kernels='liger' needs a GPU, and there is none here; use"):
        load_policy(ModelSection(path=str(tmp_path), kernels="liger"))


def test_without_the_package_and_for_an_unknown_architecture_they_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    model = tiny_model()
    model.config.model_type = "new"
    with pytest.raises(ModelError, match=r"Liger has nothing for LlamaForCausalLM; use model\.kernels='torch'"):
        use_liger(model)
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", None)
    with pytest.raises(ModelError, match=r"pip install 'mlc_ray\[liger\]' on every node"):
        use_liger(model)
