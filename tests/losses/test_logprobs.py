"""Log-probs by pieces against the plain formula: values, gradients, and how much is alive at a time."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mlc_ray.losses import logprobs
from mlc_ray.losses.logprobs import response_log_probs, token_log_probs


def plain(logits, targets):
    return -F.cross_entropy(logits.float(), targets, reduction="none")


def given(rows, vocabulary, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, 16, generator=generator).to(dtype)
    head = torch.randn(vocabulary, 16, generator=generator).to(dtype)
    return hidden, head, torch.randint(vocabulary, (rows,), generator=generator), torch.randn(rows, generator=generator)


def differentiated(function, rows, vocabulary, dtype, cap=None):
    """Log-probs of a linear head, soft-capped if asked, and the gradients of hidden states and head."""
    hidden, head, targets, weight = given(rows, vocabulary, dtype)
    hidden, head = hidden.requires_grad_(), head.requires_grad_()
    logits = F.linear(hidden, head)
    if cap is not None:
        logits = torch.tanh(logits / cap) * cap
    log_probs = function(logits, targets)
    return log_probs.detach(), *torch.autograd.grad(log_probs, (hidden, head), weight)


class Sizes(TorchDispatchMode):
    """Elements of every float32 tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.seen += [tensor.numel() for tensor in tensors if tensor.dtype == torch.float32]
        return result


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("piece", [1, 101, 3 * 101, 2**20])
def test_pieces_give_the_plain_values_and_gradients(monkeypatch, piece, cap):
    monkeypatch.setitem(logprobs.CHUNK, "cpu", piece)
    ours, theirs = (differentiated(f, 8, 101, torch.float32, cap) for f in (token_log_probs, plain))
    assert torch.equal(ours[0], theirs[0])
    for found, wanted in zip(ours[1:], theirs[1:], strict=True):
        assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_bfloat16_logits_have_a_softmax_in_float32_and_a_gradient_of_their_own_type():
    ours, theirs = (differentiated(f, 64, 3000, torch.bfloat16) for f in (token_log_probs, plain))
    assert ours[0].dtype == torch.float32 and torch.equal(ours[0], theirs[0])
    assert ours[1].dtype == torch.bfloat16
    for found, wanted in zip(ours[1:], theirs[1:], strict=True):
        assert float((found - wanted).float().norm() / wanted.float().norm()) < 1e-3


def test_no_float32_copy_of_all_logits_is_ever_alive(monkeypatch):
    monkeypatch.setitem(logprobs.CHUNK, "cpu", 20 * 1000)
    with Sizes() as ours:
        differentiated(token_log_probs, 64, 1000, torch.bfloat16)
    with Sizes() as theirs:
        differentiated(plain, 64, 1000, torch.bfloat16)
    assert max(theirs.seen) == 64 * 1000
    assert max(ours.seen) == 20 * 1000


def test_the_gradient_takes_the_place_of_the_logits():
    hidden, head, targets, weight = given(8, 50)
    logits = F.linear(hidden, head).requires_grad_()
    (gradient,) = torch.autograd.grad(token_log_probs(logits, targets), logits, weight)
    assert gradient.data_ptr() == logits.data_ptr()


def test_logits_that_something_else_needs_are_refused_instead_of_spoilt():
    hidden, head, targets, _ = given(8, 50)
    logits = F.linear(hidden, head.requires_grad_())
    other = logits.square().sum()  # square's backward needs the logits themselves
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (token_log_probs(logits, targets).sum() + other).backward()
    again = token_log_probs(F.linear(hidden, head), targets).sum()
    again.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        again.backward()


def test_log_probs_and_lengths_of_answers():
    log_probs, bundles = torch.tensor([-1.0, -2.0, -3.0, -4.0, -5.0]), torch.tensor([0, 0, 0, 1, 1])
    result = response_log_probs(log_probs, bundles, 3)
    assert result.total.tolist() == [-6.0, -9.0, 0.0]
    assert result.length.tolist() == [3, 2, 0]


@pytest.mark.parametrize("piece", [1, 3 * 101, 2**20])
def test_several_targets_of_a_row_give_the_plain_values_and_gradients(monkeypatch, piece):
    monkeypatch.setitem(logprobs.CHUNK, "cpu", piece)
    several = torch.tensor([[3, 7, -1], [5, -1, -1], [100, 0, 9], [0, 1, 2], [-1, -1, -1], [1, 50, 2]])

    def asked(logits, _):
        return token_log_probs(logits, several)

    def expected(logits, _):
        shares = logits.float().log_softmax(dim=-1).gather(1, several.clamp(min=0))
        return torch.where(several < 0, 0.0, shares)

    def gradients(function):
        hidden, head, targets, _ = given(6, 101)
        hidden, head = hidden.requires_grad_(), head.requires_grad_()
        values = function(F.linear(hidden, head), targets)
        return values.detach(), *torch.autograd.grad((values * torch.arange(18.0).view(6, 3)).sum(), (hidden, head))

    for found, wanted in zip(gradients(asked), gradients(expected), strict=True):
        assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-5)
