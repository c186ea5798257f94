"""Openings of responses in the prefix tree: values and gradients against plain forwards, and what a forward holds."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch

from mlc_ray.config import ConfigError
from mlc_ray.data.batches import collate, collate_openings
from mlc_ray.data.branches import Branch, Branches, OpeningsError, prefix_free
from mlc_ray.data.store import TokenArtifact
from mlc_ray.data.tables import rows_to_table
from mlc_ray.losses.base import refusal_log_odds
from mlc_ray.losses.logprobs import token_log_probs
from mlc_ray.storage import Place
from mlc_ray.train.entry import HeldOut
from mlc_ray.train.forward import opening_log_probs, read_tree
from mlc_ray.train.model import PolicyWithExtractor, checkpoint_blocks
from mlc_ray.train.openings import refusals_unlike
from mlc_ray.train.run import PreparedData, _announce
from tests.data.files import write_rows
from tests.train.test_model import ARCHITECTURES, build
from tests.train.tiny import LANGUAGES, VOCABULARY, random_rows, tiny_config, tiny_model, translated

# With common beginnings, one of a single token, and in one language another number of them.
ENGLISH = [[3, 4, 5], [3, 4, 6, 7], [3, 4, 6, 8, 9], [10], [11, 12, 13, 14]]
OPENINGS = {"ar": [*ENGLISH, [20, 21], [20, 22, 23]], "en": ENGLISH, "sw": [*ENGLISH, [30, 31, 32]]}
BRANCHES = Branches(OPENINGS)
ROWS = translated(random_rows(5, head=(5, 3, 8)))
ROWS[1] = replace(ROWS[1], chosen=[4])  # an answer of one token is not in the row, and numbers of segments move up


def made(rows=ROWS, **changes):
    settings = {
        "languages": LANGUAGES, "weights": [1.0] * len(rows), "needs_rejected": True, "reference": None, "tap": True,
        "scope": "all", "branches": BRANCHES,
    }  # fmt: skip
    return collate(rows, **settings | changes)


def plain(model, prompt, openings):
    """Log of the summed probabilities of openings, by a plain forward each."""
    totals = []
    for opening in openings:
        shares = model(torch.tensor([prompt + opening])).logits[0].log_softmax(-1)
        totals.append(sum(shares[len(prompt) - 1 + i, token] for i, token in enumerate(opening)))
    return torch.stack(totals).logsumexp(0)


def plain_grid(model, rows, scope):
    """{(bundle, column): log-prob} of what is read."""
    return {
        (bundle, LANGUAGES.index(code)): plain(model, prompt, OPENINGS[code])
        for bundle, row in enumerate(rows)
        for code, prompt in zip(row.languages, row.prompts, strict=True)
        if scope == "all" or row.languages.index(code) == row.response_prompt
    }


READS = [
    ("all", True, "response"),
    ("response", True, "response"),
    ("response", False, "response"),
    ("all", True, "own"),
]


@pytest.mark.parametrize(("scope", "tap", "pairing"), READS)
@pytest.mark.parametrize("layer", [1, 3])
def test_probabilities_of_refusals_and_gradients_are_those_of_plain_forwards(scope, tap, pairing, layer):
    batch = made(scope=scope, tap=tap, pairing=pairing)
    ours, theirs = tiny_model().double(), tiny_model().double()
    module = PolicyWithExtractor(ours, layer=layer, extractor_dim=16, seed=0)
    output = module(batch)
    expected = plain_grid(theirs, ROWS, scope)
    assert {tuple(cell) for cell in output.opened.nonzero().tolist()} == expected.keys()
    weights = {cell: 0.3 + index % 4 for index, cell in enumerate(sorted(expected))}
    for cell, value in expected.items():
        # The head's logits are taken in float32, as in training.
        assert float(output.refusals[cell].detach()) == pytest.approx(float(value.detach()), abs=1e-5), cell
    sum(weights[cell] * output.refusals[cell] for cell in expected).backward()
    sum(weights[cell] * value for cell, value in expected.items()).backward()
    for (name, own), their in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(own.grad, their.grad, rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("name", ["gemma2", "mistral_sliding", "qwen3"])
def test_so_they_are_of_architectures_with_windows_and_soft_caps(name):
    """By transformers' own eager attention and head; the windows are shorter than the prompts."""
    rows = ROWS[:2]
    ours, theirs = build(deepcopy(ARCHITECTURES[name])), build(deepcopy(ARCHITECTURES[name]), "eager")
    output = PolicyWithExtractor(ours, layer=2, extractor_dim=16, seed=0)(made(rows))
    expected = plain_grid(theirs, rows, "all")
    for cell, value in expected.items():
        assert float(output.refusals[cell].detach()) == pytest.approx(float(value.detach()), rel=1e-4), cell
    sum(output.refusals[cell] for cell in expected).backward()
    sum(expected.values()).backward()
    for (parameter, own), their in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        scale = float(their.grad.abs().max().clamp(min=1e-3))
        assert torch.allclose(own.grad / scale, their.grad / scale, rtol=0, atol=1e-4), parameter


@pytest.mark.parametrize("how", [True, "selective"])
def test_gradients_are_the_same_where_blocks_run_again(how):
    found = []
    for again in (False, how):
        model = tiny_model()
        checkpoint_blocks(model, again)
        module = PolicyWithExtractor(model, layer=1, extractor_dim=16, seed=0).train()
        output = module(made())
        (output.refusals.sum() + output.representations.square().sum()).backward()
        found.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.allclose(one, other, rtol=1e-5, atol=1e-6) for one, other in zip(*found, strict=True))


def test_what_else_a_forward_gives_does_not_change():
    module = PolicyWithExtractor(tiny_model(), layer=1, extractor_dim=16, seed=0)
    with torch.no_grad():
        alone, beside = (module(made(scope=scope)) for scope in ("none", "all"))
    assert alone.refusals is None
    for name in ("chosen", "rejected"):
        one, other = getattr(alone, name), getattr(beside, name)
        assert torch.allclose(one.total, other.total, atol=1e-5) and torch.equal(one.length, other.length)
    assert torch.allclose(alone.tapped, beside.tapped, atol=1e-6)
    assert torch.allclose(alone.representations, beside.representations, atol=1e-6)


def test_openings_of_one_token_add_no_token():
    first = Branches({code: [opening[:1] for opening in sequences] for code, sequences in OPENINGS.items()})
    batch, without = made(branches=first), made(scope="none")
    assert first.tokens == 0 and torch.equal(batch.tree.input_ids, without.tree.input_ids)
    model = tiny_model()
    with torch.no_grad():
        output = PolicyWithExtractor(model, layer=2, extractor_dim=16, seed=0)(batch)
        for (bundle, column), _ in plain_grid(model, ROWS, "all").items():
            code = LANGUAGES[column]
            prompt = ROWS[bundle].prompts[ROWS[bundle].languages.index(code)]
            share = model(torch.tensor([prompt])).logits[0, -1].softmax(-1)[sorted({o[0] for o in OPENINGS[code]})]
            assert float(output.refusals[bundle, column]) == pytest.approx(float(share.sum().log()), abs=1e-5)


def test_prompts_alone_have_openings_too():
    model = tiny_model()
    tree, prompts, openings = collate_openings(ROWS, LANGUAGES, BRANCHES)
    with torch.no_grad():
        logits, states, _ = read_tree(model, tree, openings.predicting, prompts.tapped, 2, all_stay=True)
        found = opening_log_probs(token_log_probs(logits, openings.targets), openings)
        expected = plain_grid(model, ROWS, "all")
        assert len(states) == len(found) == len(expected)
        for value, bundle, column in zip(
            found.tolist(), openings.bundle_of_prompt.tolist(), openings.language_of_prompt.tolist(), strict=True
        ):
            assert value == pytest.approx(float(expected[bundle, column]), abs=1e-5)


@pytest.mark.parametrize(("scope", "tap", "pairing"), READS)
def test_a_forward_has_at_most_the_tokens_that_it_is_planned_with(scope, tap, pairing, tmp_path):
    write_rows(tmp_path, [rows_to_table(ROWS)], fingerprint="x", rejected={})
    tokens = TokenArtifact.open(tmp_path)
    for branches, exactly in ((BRANCHES, False), (Branches(dict.fromkeys(LANGUAGES, ENGLISH)), True)):
        own = tokens.lengths(range(len(tokens))).own_tokens(
            head=tokens.head, taps=tap, rejected=True, pairing=pairing, scope=scope, openings=branches.tokens
        )
        batch = made(tokens.table(range(len(ROWS))), scope=scope, tap=tap, pairing=pairing, branches=branches)
        planned = tokens.head + int(own.sum())
        assert batch.tree.tokens == planned if exactly else batch.tree.tokens <= planned
    # 3, 4, 6, 8 and 11, 12, 13: what openings begin with is in the row once, and last tokens are not.
    assert Branches({"en": ENGLISH}).tokens == 7 and sum(len(opening) - 1 for opening in ENGLISH) == 12


def random_openings(generator, count):
    return [generator.integers(0, 5, generator.integers(1, 6)).tolist() for _ in range(count)]


@pytest.mark.parametrize("seed", range(20))
def test_no_opening_begins_with_another_and_together_they_are_at_most_certain(seed):
    generator = np.random.default_rng(seed)
    given = random_openings(generator, 12)
    kept = prefix_free(given)
    assert not any(one != other and other[: len(one)] == one for one in kept for other in kept)
    assert all(any(tuple(one[: len(other)]) == other for other in kept) for one in given)
    branches = Branches({"en": given})
    branch = branches.of("en")
    # Any probabilities of what follows each beginning: of all openings together they are at most 1.
    logits = torch.from_numpy(generator.normal(size=(len(branch.targets), 5)) * 3)
    targets = torch.from_numpy(branch.targets)
    shares = logits.log_softmax(-1).gather(1, targets.clamp(min=0)).masked_fill(targets < 0, 0.0)
    flat = torch.cat([shares.flatten(), shares.new_zeros(1)])
    totals = flat[torch.from_numpy(np.where(branch.steps < 0, shares.numel(), branch.steps))].sum(dim=1)
    assert float(totals.exp().sum()) <= 1 + 1e-12
    for opening, total in zip(kept, totals.tolist(), strict=True):
        nodes = {(): 0}
        expected = 0.0
        for length, token in enumerate(opening):
            row = nodes[opening[:length]] if opening[:length] in nodes else row_of(branch, opening[:length])
            expected += float(logits[row].log_softmax(-1)[token])
        assert total == pytest.approx(expected)


def row_of(branch, beginning):
    """The row of `targets` behind a beginning, found by walking down the segments."""
    lengths, parents = branch.segments
    starts = np.cumsum(lengths) - lengths
    for segment in range(len(lengths)):
        path, at = [], segment
        while at >= 0:
            path.insert(0, at)
            at = parents[at]
        ids = [(int(branch.ids[starts[s] + i]), int(starts[s] + i)) for s in path for i in range(lengths[s])]
        for length in range(len(ids) + 1):
            if tuple(token for token, _ in ids[:length]) == beginning and length:
                return 1 + ids[length - 1][1]
    raise AssertionError(beginning)


def test_a_language_without_an_opening_is_refused():
    with pytest.raises(OpeningsError, match=r"'sw'.*openings\.further"):
        Branches({"en": ENGLISH, "sw": []})
    with pytest.raises(OpeningsError, match="without a token"):
        Branches({"en": [[1], []]})


def test_log_odds_are_the_logit_and_teach_where_a_refusal_is_certain():
    log_probs = torch.tensor([-20.0, -3.0, -0.7, -0.01], dtype=torch.float64).requires_grad_()
    p = log_probs.exp()
    found = refusal_log_odds(log_probs)
    assert torch.allclose(found, torch.logit(p), rtol=1e-9)
    assert torch.allclose(*(torch.autograd.grad(one.sum(), log_probs)[0] for one in (found, torch.logit(p))))
    certain = torch.tensor([0.0, -1e-9]).requires_grad_()
    bounded = refusal_log_odds(certain)
    assert bounded.tolist() == pytest.approx([13.8155] * 2, abs=1e-3)
    assert (torch.autograd.grad(bounded.sum(), certain)[0] > 1e5).all()


@pytest.mark.parametrize(("gap", "taught"), [(5.0, 1.0), (10.0, 1.0), (14.0, 0.83), (20.0, 0.002)])
def test_how_much_a_certain_refusal_is_taught_falls_from_14_nats_on(gap, taught):
    logits = torch.tensor([gap, 0.0, -3.0]).requires_grad_()  # float32, as from a model; the refusal against the others
    log_odds = refusal_log_odds(logits.log_softmax(0)[0])
    (gradient,) = torch.autograd.grad(log_odds, logits)
    assert -float(gradient[1:].sum()) == pytest.approx(taught, abs=0.06 if taught > 0.1 else 2e-3)


def test_the_tiny_vocabulary_holds_the_openings():
    assert max(token for sequences in OPENINGS.values() for one in sequences for token in one) < VOCABULARY
    assert isinstance(BRANCHES.of("ar"), Branch)


def test_the_start_warns_of_refusals_that_the_decision_counts_as_help(tmp_path):
    rows = translated(random_rows(8))
    rows = [
        replace(row, chosen=[3, 4, 6, 7, 1], answers=[{**one, "chosen": [20, 22, 23, 1]} for one in row.answers])
        for row in rows
    ]  # as openings of English and Arabic go on; of Swahili none is so
    write_rows(tmp_path, [rows_to_table(rows)], fingerprint="x", rejected={})
    tokens = TokenArtifact.open(tmp_path)
    harmful = [row for row in rows if row.kind == "harmful"]
    number = sum("sw" in row.languages for row in harmful)
    assert 0 < number < len(harmful)
    answered = {"objective": {"loss": "sft", "answers": "all"}, "mlc": {"weight": 0}}
    config = tiny_config(**answered, terms={"decision": {"weight": 1, "languages": "all"}})
    said = refusals_unlike(config, [tokens], BRANCHES)
    assert said is not None and f"({number} of {number} in sw): objective.loss='sft' teaches them" in said
    assert "terms.decision" in said and "openings.further" in said
    known = Branches({**OPENINGS, "sw": [[20, 22]]})
    assert refusals_unlike(config, [tokens], known) is None
    for unread in (  # where the loss, or the term, reads English alone
        tiny_config(mlc={"weight": 0}, terms={"decision": {"weight": 1, "languages": "all"}}),
        tiny_config(**answered, terms={"decision": {"weight": 1}}),
    ):
        assert refusals_unlike(unread, [tokens], BRANCHES) is None
    without = tiny_config(mlc={"weight": 0}, terms={"consistency": {"weight": 1}})  # it labels no kind
    assert refusals_unlike(without, [tokens], BRANCHES) is None


def test_the_start_reads_openings_in_the_languages_of_held_out_bundles_too(tmp_path, smollm2, caplog):
    own, held_out = tmp_path / "own", tmp_path / "held-out"
    english = [replace(row, languages=["en"], prompts=row.prompts[:1], tapped=row.tapped[:1], response_prompt=0)
               for row in random_rows(4)]  # fmt: skip
    for folder, rows in ((own, english), (held_out, random_rows(4))):
        folder.mkdir()
        write_rows(folder, [rows_to_table(rows)], fingerprint="x", rejected={})
    config = tiny_config(
        model={"path": str(smollm2)}, objective={"loss": "sft"}, mlc={"weight": 0}, terms={"decision": {"weight": 1}},
        openings={"further": {"sw": ["Samahani, siwezi"]}},
        data={"train": [{"path": "x"}], "validation": {"sources": [{"path": "y"}]}},
    )  # fmt: skip
    data = PreparedData(TokenArtifact.open(own), None, {}, HeldOut(Place(held_out), None))
    _announce(config, data, 1, gpu=False)
    assert "2 of 2 in en" in caplog.text  # of random answers none is a refusal
    with pytest.raises(ConfigError, match=r"openings\.further has 'sw', which no bundle is in"):
        _announce(config, replace(data, held_out=None), 1, gpu=False)
