"""How well a model decides, by language: do its own odds of opening with a refusal tell harmful prompts from benign?

Greedy decoding shows on which side of a threshold a prompt falls, and the threshold differs by language: refusals share
an opening, other responses do not. The AUC of the log-odds is of the judgement apart from that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mlc_ray.losses.measures import MIN_PER_KIND
from mlc_ray.report.decisions import LanguageDecision
from mlc_ray.stats.auc import auc_interval


def decisions(
    log_odds: Tensor, present: Tensor, harmful: Tensor, languages: Sequence[str]
) -> tuple[LanguageDecision, ...]:
    """Of log-odds [N, L] of N bundles in L languages, `present` [N, L], `harmful` [N].

    Languages with less than `MIN_PER_KIND` bundles of either kind are left out.
    """
    found = []
    for column, language in enumerate(languages):
        ups, downs = ((present[:, column] & kind).nonzero()[:, 0] for kind in (harmful, ~harmful))
        if min(len(ups), len(downs)) < MIN_PER_KIND:
            continue
        up, down = log_odds[ups, column].double(), log_odds[downs, column].double()
        difference = up.unsqueeze(1) - down
        wins = torch.where(difference == 0, 0.5, (difference > 0).double())
        shares = [100 * float((values > 0).double().mean()) for values in (up, down)]
        found.append(LanguageDecision(language, auc_interval(float(wins.mean()), len(up), len(down)), *shares))
    return tuple(found)
