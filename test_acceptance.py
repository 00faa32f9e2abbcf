"""Acceptance-rejection: what comes out is distributed as the LLM's own tokens, by chi-square with fixed seeds."""

import math
from dataclasses import replace

import pytest
import torch

from conftest import by_slm, random_prompts
from decode import FullPolicy, Sampler, Session
from speculative import SpeculativeFull, SpeculativeSession, SpeculativeSmallKV
from test_speculative import AtPoints, near_pair


def chi_square(counts, probabilities):
    """Statistic and degrees of freedom; what is expected less than five times is put together."""
    n = counts.sum()
    small = probabilities * n < 5
    pairs = [(counts[~small], probabilities[~small])]
    if small.any() and probabilities[small].sum() > 0:
        pairs.append((counts[small].sum()[None], probabilities[small].sum()[None]))
    assert counts[probabilities == 0].sum() == 0  # what top-k and top-p exclude never comes
    counts, probabilities = (torch.cat(parts) for parts in zip(*pairs))
    expected = probabilities * n
    return ((counts - expected) ** 2 / expected).sum().item(), len(counts) - 1


def limit(freedom):
    """The 99.9th percentile of chi-square, by Wilson and Hilferty's cube."""
    return freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3


@pytest.mark.parametrize(
    "method, sampler",
    [("full", Sampler(1.5)), ("full", Sampler(1.5, top_k=8, top_p=0.9)), ("smallkv", Sampler(2.0, top_k=8, top_p=0.9))],
    ids=["full", "full, top-k and top-p", "smallkv, top-k and top-p"],
)
@torch.inference_mode()
def test_sampling_leaves_the_distribution_of_the_llm(method, sampler):
    """20,000 rounds from one state: first tokens, and second tokens after each first one, against the LLM's own.

    The state is the same in every round because each is taken back as a whole: 250 equal sequences, 80 rounds. For
    SmallKV, whose rounds take longer, 4,000; what its LLM would draw depends on the plan, which has seen the drafts, so
    its tokens are held against what `mixture` calculates from every pair of drafts and its plan.
    """
    llm, slm = near_pair(noise=0.02, vocab=13)
    (prompt,) = random_prompts(120 if method == "smallkv" else 20, vocab=13)
    copies, rounds, newest = *((250, 80) if method == "full" else (50, 80)), 3
    head_map = torch.zeros(2, 6, dtype=torch.long)
    settings = by_slm(budget=0.3, marginal=True)

    def policy():
        if method == "full":
            return SpeculativeFull(llm, slm, 2)
        return SpeculativeSmallKV(llm, slm, settings, 2, head_map)

    session = SpeculativeSession(llm, policy(), [prompt] * copies, 10)
    session.prefill()
    generators = [torch.Generator().manual_seed(seed) for seed in range(copies)]
    keep = session.policy.keep
    session.policy.keep = lambda fed, kept: keep(fed, [0] * copies)
    first, second = torch.zeros(13), torch.zeros(13, 13)
    for _ in range(rounds):
        for new in session.round([newest] * copies, [2] * copies, sampler, generators):
            first[new[0]] += 1
            if len(new) > 1:
                second[new[0], new[1]] += 1
        session.lengths = [len(prompt)] * copies
    assert first.sum() == copies * rounds and 0.2 < session.counts.acceptance < 0.9

    def own(tokens, drafts=()):
        """The LLM's distributions after each of these tokens, fed to a session without drafts, with one plan."""
        plain = FullPolicy(llm)
        if method == "smallkv":
            plain = AtPoints(llm, slm, replace(settings, refresh=3), head_map)
            plain.points = {len(prompt): list(drafts)}
        alone = Session(llm, plain, [prompt], 10)
        alone.prefill()
        return [sampler.probabilities(alone.step([token]))[0] for token in tokens]

    def believed(tokens):
        return sampler.probabilities(slm(torch.tensor([prompt + tokens]))[0, -1])

    def outcome(draft, p, q):
        """Where a draft ends: the chance that it is accepted, and the distribution of what comes if it is not."""
        rest = (p - q).clamp(min=0)
        return (p[draft] / q[draft]).clamp(max=1), rest / rest.sum()

    def mixture():
        """Of SmallKV: first tokens (13,), and second ones where there are any (13, 13), unnormalised."""
        first, second, q = torch.zeros(13), torch.zeros(13, 13), believed([newest])
        for one in q.nonzero()[:, 0].tolist():
            after = believed([newest, one])
            for two in after.nonzero()[:, 0].tolist():
                p, then = own([newest, one], [one, two])
                stays, rest = outcome(one, p, q)
                weight = q[one] * after[two]
                first[one] += weight * stays
                first += weight * (1 - stays) * rest
                stays_too, rest = outcome(two, then, after)
                second[one, two] += weight * stays * stays_too
                second[one] += weight * stays * (1 - stays_too) * rest
        return first, second

    if method == "smallkv":
        expected, after = mixture()
        torch.testing.assert_close(expected.sum(), torch.ones(()))
    else:
        expected, after = own([newest])[-1], {token: own([newest, token])[-1] for token in range(13)}
    statistic, freedom = chi_square(first, expected)
    assert statistic < limit(freedom), (statistic, freedom)
    for token in first.argsort(descending=True)[:3].tolist():
        statistic, freedom = chi_square(second[token], after[token] / after[token].sum())
        assert statistic < limit(freedom), (token, statistic, freedom)
