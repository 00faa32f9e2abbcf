"""Drafts: the tokens, the distribution and the caches that there are without them, or in a naive loop of rounds."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from conftest import LENGTHS, random_prompts, tiny_decoder
from decode import Policy, Sampler, generate
from naive import Naive, NaiveSmallKV, check_caches
from smallkv import Settings, SmallKV
from speculative import DraftedFull, RoundSession
from test_decode import SAMPLED, answers_of

METHODS = {
    "newest row": Settings(scores="slm", score_decay=0.0),
    "slm alone": Settings(scores="slm", marginal=True),
    "paper": Settings.paper(),
    "5 %": Settings(scores="slm", score_decay=0.9, budget=0.05, marginal=True),
    "tokens": Settings(scores="slm", budget_tokens=40, marginal=True),
    "third tier on the device": Settings.paper(offload="none", marginal=False),
}


def near_pair(device="cpu", noise=0.05, **shape):
    """An LLM and an SLM of the same weights with a little noise: drafts are accepted, not always."""
    llm, slm = tiny_decoder(**shape), tiny_decoder(**shape)
    generator = torch.Generator().manual_seed(9)
    for parameter in slm.parameters():
        parameter += noise * torch.randn(parameter.shape, generator=generator)
    return llm.to(device), slm.to(device)


def run(policy, prompts, count, sampler=Sampler(), stop=frozenset()):
    """The answers, stop tokens among them, and the session."""
    session = RoundSession(policy, prompts, count, sampler, stop)
    return answers_of(session, count, stop=stop), session


# ---- Greedy ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drafts", [1, 2, 4, 40])
def test_with_the_full_cache_answers_are_those_without_drafts(full_answers, drafts, device):
    """A batch of mixed lengths; 40 drafts are more than what is left."""
    answers, session = run(DraftedFull(*near_pair(device), drafts), random_prompts(*LENGTHS), 30)
    assert answers == full_answers
    counts = session.counts
    assert 0 < counts.accepted < counts.drafted  # both happened, or this test shows little
    assert counts.tokens == 3 * 29 and counts.accepted + counts.rounds == counts.tokens
    assert counts.tokens_per_round == counts.tokens / counts.rounds <= drafts + 1
    assert counts.acceptance == counts.accepted / counts.drafted


@pytest.mark.parametrize("drafts", [1, 4])
def test_drafts_that_are_always_or_never_right(full_answers, drafts, device):
    """The LLM drafts for itself; and one of the same attention whose words are the least likely ones."""
    llm, wrong = tiny_decoder(device=device), tiny_decoder(device=device)
    wrong.lm_head.weight.neg_()
    for slm, rounds, acceptance in ((llm, math.ceil(29 / (drafts + 1)), 1.0), (wrong, 29, 0.0)):
        answers, session = run(DraftedFull(llm, slm, drafts), random_prompts(*LENGTHS), 30)
        assert answers == full_answers
        assert (session.counts.rounds, session.counts.acceptance) == (3 * rounds, acceptance)


def greedy_round(loop, newest, allowed):
    """New tokens of a naive round: drafts that are the LLM's choice, and its choice after them."""

    def kept(tokens, logits):
        best = [row.argmax().item() for row in logits]
        right = [draft == own for draft, own in zip(tokens[1:], best)][:allowed]
        return 1 + [*right, False].index(False)

    before = len(loop.text)
    tokens, logits = loop.round([newest], allowed, kept)
    count = len(loop.text) - before
    return [*tokens[1:count], logits[count - 1].argmax().item()]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("drafts", [1, 3])
def test_smallkv_s_rounds_are_those_of_a_naive_loop(name, drafts, device):
    """Tokens, and what is in every cache after every round: refused drafts leave no trace. A batch of mixed lengths, in
    which sequences take as many drafts as others, fewer, none, or have ended; one passes the matching window."""
    settings, prompts = METHODS[name], random_prompts(*LENGTHS)
    policy = SmallKV(*near_pair(device), settings, drafts=drafts)
    loops = [NaiveSmallKV(*near_pair(), settings, prompt, drafts=drafts) for prompt in prompts]
    session = RoundSession(policy, prompts, 40)
    newest = session.prefill().argmax(-1).tolist()
    assert newest == [loop.logits.argmax().item() for loop in loops]
    for allowed in ([drafts] * 3, [drafts, 1, 0], [0, 1, drafts], [drafts, drafts, None], [drafts, None, None],
                    [1, drafts, None], [drafts, drafts, None]):  # fmt: skip
        begun = list(session.lengths)
        answers = session.round(newest, allowed)
        live = [b for b in range(3) if allowed[b] is not None]
        assert answers == [greedy_round(loops[b], newest[b], allowed[b]) if b in live else [] for b in range(3)]
        newest = [new[-1] if new else token for new, token in zip(answers, newest)]
        for b, loop in enumerate(loops):
            check_caches(session, b, loop, begun[b], tiers=b in live)
        if len(live) == 3:
            assert policy.cache.moved.sum(0).tolist() == [sum(loop.came[k] for loop in loops) for k in (0, 1)]
    assert 0 < session.counts.accepted < session.counts.drafted


# ---- Acceptance ------------------------------------------------------------------------------------------------------


def middle(distribution, token):
    """A uniform number that draws this token: the middle of its share."""
    return (sum(distribution[:token]) + distribution[token] / 2) / sum(distribution)


def outcomes(vocabulary, drafts, allowed, believed, wanted):
    """Everything that a round can come to: (probability, drafts, chances, new tokens), by the rule of arXiv 2211.17192.

    believed(given) -> q after these drafts; wanted(given, place) -> p after the first `place` of these drafts, all of
    which a plan may have seen. chances: uniform numbers that lead there, K to draft, K to accept, one to add a token.
    """
    for given in itertools.product(range(vocabulary), repeat=drafts):
        q = [believed(given[:place]) for place in range(drafts)]
        drawn = math.prod(row[token] for row, token in zip(q, given))
        if drawn == 0:
            continue
        p = [wanted(given, place) for place in range(drafts + 1)]
        chance = [middle(row, token) for row, token in zip(q, given)]
        stays = [min(1.0, p[i][given[i]] / q[i][given[i]]) for i in range(allowed)]
        for count in range(allowed + 1):
            refused = [1 - stays[count]] if count < allowed else []
            rest = [max(0.0, a - b) for a, b in zip(p[count], q[count])] if refused else p[count]
            accept = [share / 2 for share in stays[:count]] + [1 - share / 2 for share in refused]
            accept += [0.5] * (drafts - len(accept))
            for token, share in enumerate(rest):
                weight = drawn * math.prod(stays[:count]) * math.prod(refused) * share / (sum(rest) or 1)
                if weight > 1e-7 and share > 1e-6:
                    yield weight, given, [*chance, *accept, middle(rest, token)], [*given[:count], token]


def check_distribution(found, vocabulary, wanted):
    """(probability, new tokens) of all outcomes: at each place the LLM's distribution, given what stands before it."""
    assert sum(weight for weight, _ in found) == pytest.approx(1, abs=1e-4)
    before = {tuple(new[:place]) for _, new in found for place in range(len(new))}
    for start in before:
        at = len(start)
        after = [sum(w for w, new in found if len(new) > at and tuple(new[: at + 1]) == (*start, token))
                 for token in range(vocabulary)]  # fmt: skip
        if sum(after) > 1e-2:  # of less the outcomes that were left out would be felt
            expected = wanted(start, at)
            assert [x / sum(after) for x in after] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("method, sampler, allowed", [
    ("full", Sampler(1.5), 2), ("full", Sampler(1.0, top_k=4, top_p=0.9), 2), ("full", Sampler(1.5), 1),
    ("full", Sampler(1.5), 0), ("smallkv", Sampler(2.0, top_k=3, top_p=0.95), 2),
], ids=str)  # fmt: skip
@torch.inference_mode()
def test_sampled_rounds_come_to_every_outcome_as_they_should(method, sampler, allowed, device):
    """All outcomes of a round of two drafts, of which so many are allowed, among five tokens, one sequence each.

    With the full cache new tokens are distributed as the LLM's, exactly. What SmallKV's LLM would draw depends on the
    plan, which has seen the drafts: each outcome is that of a naive round of these drafts.
    """
    V, newest, settings = 5, 3, Settings(scores="slm", budget=0.3)
    (prompt,) = random_prompts(105 if method == "smallkv" else 12, vocab=V)
    head_map, (llm, slm) = torch.zeros(2, 6, dtype=torch.long), near_pair(noise=0.1, vocab=V)
    cached = {}

    def probabilities(logits):
        return sampler.probabilities(logits).tolist()

    def after(model, start):
        if (model, start) not in cached:
            cached[model, start] = probabilities(Naive(model).feed([*prompt, newest, *start]))
        return cached[model, start]

    def wanted(given, place):
        if method == "full":
            return after(llm, tuple(given[:place]))
        if given not in cached:
            loop = NaiveSmallKV(llm, slm, settings, prompt, head_map, drafts=2)
            cached[given] = [probabilities(row) for row in loop.round([newest, *given], allowed)[1]]
        return cached[given][place]

    found = list(outcomes(V, 2, allowed, lambda start: after(slm, tuple(start)), wanted))
    pair = near_pair(device, noise=0.1, vocab=V)
    policy = DraftedFull(*pair, 2) if method == "full" else SmallKV(*pair, settings, head_map, drafts=2)
    session = RoundSession(policy, [prompt] * len(found), 10, sampler)
    session.prefill()
    session.tokens.fill_(newest), session.allowed.fill_(allowed)
    session.chance.copy_(torch.tensor([chances for _, _, chances, _ in found]))
    session.run()
    new = [answer[:count] for answer, count in zip(session.answer.tolist(), session.kept.tolist())]
    assert new == [expected for *_, expected in found]
    assert {len(tokens) for tokens in new} == set(range(1, allowed + 2))
    if method == "full":
        check_distribution([(weight, tokens) for weight, *_, tokens in found], V, wanted)


def test_acceptance_can_be_forced():
    """For benchmarks of random weights: drafts stay by chance, whatever the models say."""
    shares = []
    for forced in (0.0, 0.5, 1.0):
        session = RoundSession(DraftedFull(*near_pair(), 2), random_prompts(*[30] * 40), 20)
        session.forced = forced
        answers_of(session, 20)
        shares.append(session.counts.acceptance)
    assert shares[0] == 0 and shares[2] == 1 and 0.2 < shares[1] < 0.6  # of two drafts (0.5 + 0.25) / 2


# ---- Where answers end -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", [Sampler(), SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", ["full", "slm alone"])
def test_a_stop_token_inside_a_draft_ends_the_answer(name, sampler, device):
    """Nothing comes after it, and the caches hold what stands before it."""
    prompts, pair = random_prompts(*LENGTHS), near_pair(device, noise=0.01)

    def answer(stop=frozenset()):
        settings = replace(METHODS["slm alone"], uniform=True)
        policy = DraftedFull(*pair, 7) if name == "full" else SmallKV(*pair, settings, drafts=7)
        return run(policy, prompts, 30, sampler, stop)

    text, session = answer()
    assert session.counts.tokens_per_round > 1.5  # stop tokens do stand inside drafts
    for b in range(3):
        stop = {text[b][12]}
        answers, session = answer(stop)
        ends = [min((i for i, token in enumerate(own) if token in stop), default=29) + 1 for own in text]
        assert answers == [own[:end] for own, end in zip(text, ends)]
        assert session.lengths == [n + end - 1 for n, end in zip(LENGTHS, ends)] == session.length.tolist()


def test_drafts_never_pass_the_end(full_answers):
    """1 new token drafts nothing; 2 and 3 draft what can still be kept; the models' last position is reached."""
    prompts = random_prompts(*LENGTHS)
    for count in (1, 2, 3, 8):
        answers, session = run(DraftedFull(*near_pair(), 5), prompts, count)
        assert answers == [answer[:count] for answer in full_answers]
        assert session.counts.drafted <= 3 * max(0, count - 2) * 5
    short = near_pair(max_position_embeddings=230)
    expected = generate(Policy(short[0]), prompts, 20)
    assert run(DraftedFull(*short, 4), prompts, 20)[0] == expected  # 210 + 20 positions


# ---- What drafts do not go with --------------------------------------------------------------------------------------


@pytest.mark.parametrize("make, message", [
    (lambda pair: DraftedFull(*pair, 0), "0 drafts a step are too few"),
    (lambda pair: RoundSession(SmallKV(*pair, Settings()), [[1]], 5), "0 drafts a step are too few"),
    (lambda pair: SmallKV(*pair, Settings(), drafts=3), "drafts need scores slm"),
    (lambda pair: SmallKV(*pair, Settings(scores="slm", saliency_shift=False), drafts=3), "drafts need saliency shift"),
    (lambda pair: SmallKV(*pair, Settings(scores="slm", slm_budget=0.4), drafts=3), "SLM budget 0.4 cuts it"),
])  # fmt: skip
def test_what_drafts_do_not_go_with(make, message):
    with pytest.raises(ValueError, match=message):
        make(near_pair())
