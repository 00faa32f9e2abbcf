"""Speculative decoding against decoding without drafts: the same tokens, the same distribution, the same caches."""

import copy
import itertools
import math
from dataclasses import replace

import pytest
import torch

import speculative
from conftest import by_slm, random_prompts, tiny_decoder
from decode import FullPolicy, Sampler, Session, check_positions, generate, generate_ids
from drafts import DraftedScores
from kernels import full_attention_block, full_attention_step, tiered_attention, tiered_attention_block
from model import Span
from settings import Settings
from smallkv import SmallKV
from speculative import (
    SpeculativeFull,
    SpeculativeSession,
    SpeculativeSmallKV,
    accept_greedy,
    accept_sampled,
    speculate_ids,
)

LENGTHS = (150, 97, 260, 101)
VARIANTS = {
    "default": by_slm(),
    "paper": Settings.paper(),
    "marginal": by_slm(marginal=True, score_decay=0.5),
    "late": by_slm(marginal=True, score_decay=0.9, prefetch=False),
    "tokens": by_slm(budget_tokens=40),
    "moves": by_slm(max_moves=1),
    "frugal": by_slm(slm_budget=0.4),
    "frugal, marginal": by_slm(slm_budget=0.3, score_decay=0.7, marginal=True),
}


def near_pair(device="cpu", noise=0.05, **shape):
    """An LLM and an SLM of the same weights with a little noise: drafts are accepted, not always."""
    llm, slm = tiny_decoder(device=device, **shape), tiny_decoder(device=device, **shape)
    generator = torch.Generator().manual_seed(9)
    for parameter in slm.parameters():
        parameter += noise * torch.randn(parameter.shape, generator=generator).to(parameter)
    return llm, slm


@pytest.fixture(scope="module")
def pair():
    return near_pair()


@pytest.fixture(scope="module")
def full_answers(pair):
    return generate(pair[0], FullPolicy(pair[0]), random_prompts(*LENGTHS), 30)


class AtPoints(SmallKV):
    """SmallKV without drafts, of one sequence, that plans where rounds began, from the scores foreseen there.

    points: length before a round -> the drafts of that round, accepted or not. The rows are made here anew: at a point,
    after the newest token, a copy of the SLM's cache takes the drafts one by one, and a token's score for the plan is
    the largest that it has in the copy after any of them. The tokens that the copy took are then forgotten.
    """

    points: dict[int, list[int]] = {}

    def due(self) -> bool:
        return self.lengths[0] in self.points

    def observe(self, tokens, span):
        at = self.lengths[0]
        super().observe(tokens, span)
        if not self.refreshing:
            return
        ahead = copy.deepcopy(self.slm_cache)
        ahead.begin(plans=False)
        scores = [ahead.score.clone()]
        for place, token in enumerate(self.points[at], 1):
            self.slm(torch.tensor([[token]]), Span.step([at + place], "cpu"), ahead)
            scores.append(ahead.score.clone())
        self.largest = torch.stack(scores).amax(0)

    def _ranking(self, layer):
        return self._by_kv_head(self._matched(self.largest, layer))


class Noting:
    """Mixin: remembers of every round how many drafts each sequence was allowed, and what was fed."""

    def foresee(self, allowed):
        super().foresee(allowed)
        self.noted = [*getattr(self, "noted", []), [allowed.tolist()]]

    def keep(self, fed, kept):
        super().keep(fed, kept)
        self.noted[-1].append(fed)

    def drafts_of(self, b):
        """Of each round: sequence b's own drafts."""
        return [fed[b][1 : allowed[b] + 1] for allowed, fed in self.noted]


class NotingSmallKV(Noting, SpeculativeSmallKV):
    pass


class Stub:
    """Mixin: drafts that are always right, or never, given what the answers will be."""

    def knows(self, prompts, answers, right):
        self.texts, self.right = [prompt + answer for prompt, answer in zip(prompts, answers)], right
        return self

    def draft(self, tokens, span, place, words):
        logits = super().draft(tokens, span, place, words)
        if words:
            logits = torch.zeros_like(logits)
            for b, at in enumerate(span.positions[:, 0].tolist()):
                coming = self.texts[b][at + 1] if at + 1 < len(self.texts[b]) else 0
                logits[b, coming if self.right else (coming + 1) % logits.shape[1]] = 1.0
        return logits


class StubFull(Stub, SpeculativeFull):
    pass


class StubSmallKV(Stub, NotingSmallKV):
    pass


def run(policy, prompts, count, sampler=Sampler(), stop=frozenset()):
    """The answers, stop tokens among them, and the session."""
    session = SpeculativeSession(policy.llm, policy, prompts, count)
    answers = [[] for _ in prompts]
    for new in speculate_ids(session, sampler, count, stop):
        for answer, tokens in zip(answers, new):
            answer += tokens
    return answers, session


def without_drafts(pair, settings, prompt, count, session, b):
    """What SmallKV answers with the plans of sequence b of a drafting session (AtPoints), and the session."""
    refresh = session.policy.drafts + 1
    policy = AtPoints(*pair, replace(settings, refresh=refresh), session.policy.given_map)
    begun = [lengths[b] for lengths in session.begun]
    policy.points = dict(zip(begun, session.policy.drafts_of(b)))
    plain = Session(pair[0], policy, [prompt], count, spare=session.policy.drafts)
    answer = [step[0] for step in generate_ids(plain, Sampler(), count)]
    return answer, plain


# ---- attention of several tokens -------------------------------------------------------------------------------------


def test_a_block_of_tokens_attends_as_each_of_them_alone():
    """Both block functions against a loop of single steps, positions of their own in each sequence."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    query, key, value = random(2, 6, 3, 8), random(2, 2, 12, 8), random(2, 2, 12, 8)
    positions = torch.tensor([[4, 5, 6], [9, 10, 11]])
    out, rows = full_attention_block(query, key, value, positions)
    for t in range(3):
        expected = full_attention_step(query[:, :, t : t + 1], key, value, positions[:, t])
        torch.testing.assert_close(out[:, :, t : t + 1], expected[0])
        torch.testing.assert_close(rows[:, :, t], expected[1])
    pool, slots = random(2, 2, 15, 8), torch.stack([torch.randperm(15, generator=generator)[:12] for _ in range(4)])
    slots, seen = slots.view(2, 2, 12), torch.rand(2, 2, 3, 12, generator=generator) < 0.7
    borrowed = torch.rand(2, 6, 3, 15, generator=generator) / 30
    out, weight = tiered_attention_block(query, key, pool, seen, slots, borrowed)
    for t in range(3):
        expected = tiered_attention(query[:, :, t : t + 1], key, pool, seen[:, :, t], slots, borrowed[:, :, t])
        torch.testing.assert_close(out[:, :, t : t + 1], expected[0])
        torch.testing.assert_close(weight[:, :, t], expected[1])


def test_a_round_is_planned_by_the_largest_score_after_any_of_its_own_tokens(pair):
    """Against a loop; drafts beyond a sequence's own count nothing, whatever stands in their rows."""
    for decay, places in itertools.product((0.0, 0.5, 1.0), (1, 4)):
        cache = DraftedScores(4, pair[1].config, 3, 20, "cpu", torch.float32, decay)
        cache.score.copy_(torch.rand(cache.score.shape))
        cache.rows.copy_(torch.rand(cache.rows.shape))
        cache.at, allowed = places - 1, [min(count, places - 1) for count in (0, 3, 1)]
        found = cache.foreseen(torch.tensor(allowed))
        for b, count in enumerate(allowed):
            score, after = cache.score[:, b], []
            for t in range(count + 1):
                score = decay * score + cache.rows[:, b, :, t]
                after.append(score)
            assert torch.equal(found[:, b], torch.stack(after).amax(0))


# ---- greedy ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drafts", [1, 2, 4, 7, 40])
def test_full_cache_answers_are_those_without_drafts(pair, full_answers, drafts, device):
    """A batch of mixed lengths; 40 drafts are more than what is left."""
    llm, slm = (model.to(device) for model in pair)
    answers, session = run(SpeculativeFull(llm, slm, drafts), random_prompts(*LENGTHS), 30)
    for model in pair:
        model.to("cpu")
    assert answers == full_answers
    counts = session.counts
    assert 0 < counts.accepted < counts.drafted  # both happened, or this test shows little
    assert counts.tokens == 4 * 29 and counts.accepted + counts.rounds == counts.tokens
    assert 1 < counts.tokens_per_round <= drafts + 1


def test_one_prompt_is_verified_too(pair, full_answers):
    for prompt, answer in zip(random_prompts(*LENGTHS), full_answers):
        assert run(SpeculativeFull(*pair, 3), [prompt], 30)[0] == [answer]


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("drafts", [1, 3])
def test_smallkv_answers_are_those_with_the_plan_at_the_same_points(pair, full_answers, name, drafts):
    """Each sequence of a batch against SmallKV without drafts; one prompt passes the matching window on its way."""
    prompts = random_prompts(*LENGTHS)
    answers, session = run(NotingSmallKV(*pair, VARIANTS[name], drafts), prompts, 30)
    assert 0 < session.counts.accepted < session.counts.drafted
    assert answers != full_answers  # the budget bites
    for b, prompt in enumerate(prompts):
        assert without_drafts(pair, VARIANTS[name], prompt, 30, session, b)[0] == answers[b]


@pytest.mark.parametrize("name", ["default", "marginal", "frugal, marginal"])
def test_a_batch_changes_nothing(pair, name):
    prompts = random_prompts(*LENGTHS)
    for sampler in (Sampler(), Sampler(0.8, top_k=20, top_p=0.9, seed=5)):
        for make in (lambda: SpeculativeSmallKV(*pair, VARIANTS[name], 3), lambda: SpeculativeFull(*pair, 3)):
            together = run(make(), prompts, 12, sampler)[0]
            assert together == [run(make(), [prompt], 12, sampler)[0][0] for prompt in prompts]


def test_the_device_changes_nothing(pair, device):
    """On a GPU: side stream and the host's memory, against the same run on the CPU."""
    settings, prompts = VARIANTS["marginal"], random_prompts(*LENGTHS)
    expected = run(SpeculativeSmallKV(*pair, settings, 3), prompts, 20)[0]
    assert run(SpeculativeSmallKV(*near_pair(device), settings, 3), prompts, 20)[0] == expected


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("drafts", [1, 4])
def test_drafters_that_are_always_or_never_right(pair, full_answers, right, drafts):
    prompts = random_prompts(*LENGTHS)
    answers, session = run(StubFull(*pair, drafts).knows(prompts, full_answers, right), prompts, 30)
    assert answers == full_answers
    assert session.counts.acceptance == float(right)
    rounds = math.ceil(29 / (drafts + 1)) if right else 29
    assert session.counts.rounds == 4 * rounds
    settings = VARIANTS["marginal"]
    known = generate(pair[0], SmallKV(*pair, settings), prompts, 30)
    if not right:  # a plan in every step, then: but for the places that are kept free, SmallKV as it is
        answers, session = run(StubSmallKV(*pair, settings, drafts).knows(prompts, known, right), prompts, 30)
        assert session.counts.accepted < session.counts.drafted / 10
    for b, prompt in enumerate(prompts):
        policy = StubSmallKV(*pair, settings, drafts).knows([prompt], [known[b]], right)
        answers, session = run(policy, [prompt], 30)
        assert answers[0] == without_drafts(pair, settings, prompt, 30, session, 0)[0]


def test_accepting_by_hand():
    drafts = torch.tensor([[5, 6], [5, 6], [4, 6], [5, 6], [5, 6]])
    best = torch.tensor([[5, 6, 7], [5, 8, 7], [5, 6, 7], [5, 6, 7], [5, 6, 7]])
    count, after = accept_greedy(drafts, best, torch.tensor([2, 2, 2, 1, 0]))
    assert (count.tolist(), after.tolist()) == ([2, 1, 0, 1, 0], [7, 8, 5, 6, 5])
    drafts, q, p = torch.tensor([[1]]), torch.tensor([[[0.2, 0.8, 0.0]]]), torch.tensor([[[0.5, 0.4, 0.1], [0, 0, 1]]])
    for chance, allowed, expected in (
        ((0.49, 0.0), 1, (1, 2)),  # 0.49 < 0.4 / 0.8: accepted, and the LLM's next token
        ((0.51, 0.74), 1, (0, 0)), ((0.51, 0.76), 1, (0, 2)),  # refused: 0.3 and 0.1 are left, of tokens 0 and 2
        ((0.49, 0.49), 0, (0, 0)), ((0.49, 0.51), 0, (0, 1)), ((0.49, 0.91), 0, (0, 2)),  # not allowed: p itself
    ):  # fmt: skip
        count, after = accept_sampled(drafts, q, p, torch.tensor([allowed]), torch.tensor([chance]))
        assert (count.item(), after.item()) == expected
    same = torch.tensor([[[0.25, 0.75]]])
    given = torch.tensor([[0]]), same, torch.cat((same, same), 1), torch.tensor([1])
    assert accept_sampled(*given, torch.tensor([[0.999, 0.3]]))[0].item() == 1  # p = q: never refused


# ---- what is rejected leaves no trace --------------------------------------------------------------------------------


def by_position(table, position, end):
    """Rows (L, B, G, slots, ...) of a pool put in order of their tokens; NaN where there is none."""
    out = torch.full((*table.shape[:3], end, *table.shape[4:]), torch.nan)
    for layer, b, g, slot in itertools.product(*map(range, position.shape)):
        if (at := position[layer, b, g, slot]) >= 0:
            out[layer, b, g, at] = table[layer, b, g, slot]
    return out


def equal(one, other):
    return torch.equal(one.nan_to_num(-7.0), other.nan_to_num(-7.0))


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("drafts", [1, 4])
@torch.inference_mode()
def test_after_every_round_the_caches_are_those_of_a_run_without_drafts(pair, name, drafts):
    """Scores, tables of slots, pools and host, round by round, to the bit where the arithmetic is the same.

    The SLM takes one token at a time with and without drafts: its K, V and scores are equal to the bit. The LLM's K and
    V come from a forward of several tokens, whose products are summed in another order.
    """
    settings = VARIANTS[name]
    (prompt,) = random_prompts(150)
    policy = NotingSmallKV(*pair, settings, drafts)
    session = SpeculativeSession(pair[0], policy, [prompt], 40)
    newest = session.prefill().argmax(-1).item()
    plain_policy = AtPoints(*pair, replace(settings, refresh=drafts + 1))
    plain = Session(pair[0], plain_policy, [prompt], 40, spare=drafts)
    plain.prefill()
    rejected = 0
    for _ in range(12):
        begun = session.lengths[0]
        (new,) = session.round([newest], [drafts], Sampler(), Sampler().generators(1))
        plain_policy.points = {begun: policy.drafts_of(0)[-1]}
        for token in [newest, *new[:-1]]:
            plain.step([token])
        newest = new[-1]
        rejected += drafts + 1 - len(new)
        n = session.lengths[0]
        assert n == plain.lengths[0] == policy.lengths[0] == plain_policy.lengths[0]
        assert policy.tokens == plain_policy.tokens
        slm, other = policy.slm_cache, plain_policy.slm_cache
        assert torch.equal(slm.score, other.score)
        if settings.slm_budget < 1:
            assert torch.equal(slm.position, other.position) and torch.equal(slm.heavy, other.heavy)
            for table in ("key", "value"):
                one, two = (by_position(getattr(c, table), c.position, n) for c in (slm, other))
                assert equal(one, two)
        else:
            assert torch.equal(slm.key[:, :, :, :n], other.key[:, :, :, :n])
            assert torch.equal(slm.value[:, :, :, :n], other.value[:, :, :, :n])
        tiers, same = session.cache, plain.cache
        assert torch.equal(tiers.key_position, same.key_position)
        assert torch.equal(tiers.value_position, same.value_position)
        held = tiers.key_position >= 0
        assert torch.equal(tiers.value_slot[held], same.value_slot[held])
        same._store_newest()  # a run without drafts does so as its next step begins
        for table in ("key", "value"):
            one, two = (getattr(c, f"host_{table}")[:, :, :, :n] for c in (tiers, same))
            torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)
            where = getattr(tiers, f"{table}_position") >= 0
            one, two = (getattr(c, table)[where] for c in (tiers, same))
            torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)
    assert rejected > 0


@torch.inference_mode()
def test_a_sequence_that_has_ended_keeps_its_caches(pair):
    """It stands in the batch while others go on: nothing of it changes but the tiers, which nobody reads."""
    prompts = random_prompts(150, 140)
    policy = SpeculativeSmallKV(*pair, VARIANTS["marginal"], 3)
    session = SpeculativeSession(pair[0], policy, prompts, 10)
    newest = session.prefill().argmax(-1).tolist()
    score, length = policy.slm_cache.score[:, 0].clone(), session.lengths[0]
    host = session.cache.host_key[:, 0].clone()
    for _ in range(3):
        answers = session.round(newest, [None, 3], Sampler(), Sampler().generators(2))
        newest[1] = answers[1][-1]
        assert answers[0] == [] and session.lengths[0] == policy.lengths[0] == length == len(policy.tokens[0])
    assert torch.equal(policy.slm_cache.score[:, 0], score)
    assert equal(session.cache.host_key[:, 0], host)


# ---- where answers end -----------------------------------------------------------------------------------------------


def test_a_stop_token_inside_a_draft_ends_the_answer(pair, full_answers):
    prompts = random_prompts(*LENGTHS)
    drafter = StubFull(*pair, 7).knows(prompts, full_answers, True)
    for b, answer in enumerate(full_answers):
        stop = {answer[12]}
        expected = answer[: answer.index(answer[12]) + 1]
        answers, session = run(drafter, prompts, 30, stop=stop)
        assert answers[b] == expected
        for n, given, text in zip(LENGTHS, answers, full_answers):
            ends = [i for i, token in enumerate(text) if token in stop]
            assert given == text[: min(ends, default=29) + 1]
        assert session.lengths == [n + len(given) - 1 for n, given in zip(LENGTHS, answers)]
    assert speculative.generate(pair[0], drafter, prompts, 30, stop)[b] == expected[:-1]


def test_a_drafter_never_passes_the_end(pair, full_answers):
    """max_new_tokens 1 drafts nothing; 2 and 3 draft what can still be kept; positions are those of the models."""
    prompts = random_prompts(*LENGTHS)
    for count in (1, 2, 3, 8):
        answers, session = run(SpeculativeFull(*pair, 5), prompts, count)
        assert answers == [answer[:count] for answer in full_answers]
        assert session.counts.drafted <= 4 * max(0, count - 2) * 5
    short = near_pair(max_position_embeddings=280)
    expected = generate(short[0], FullPolicy(short[0]), prompts, 20)
    assert run(SpeculativeFull(*short, 4), prompts, 20)[0] == expected  # 260 + 20 positions
    with pytest.raises(ValueError, match="longer than the 280 positions"):
        run(SpeculativeFull(*short, 4), prompts, 21)
    with pytest.raises(ValueError, match="longer than the 280 positions"):  # the SLM's count as well
        check_positions(SpeculativeFull(pair[0], short[1], 4), list(LENGTHS), 21)


@pytest.mark.parametrize(
    "make, message",
    [(lambda pair: SpeculativeFull(*pair, 0), "0 drafts a step are too few"),
     (lambda pair: SpeculativeSmallKV(*pair, by_slm(refresh=2), 3), "a plan every 2 steps"),
     (lambda pair: SpeculativeSmallKV(*pair, by_slm(saliency_shift=False), 3), "drafts need saliency shift")],
)  # fmt: skip
def test_what_drafts_do_not_go_with(pair, make, message):
    with pytest.raises(ValueError, match=message):
        make(pair)
