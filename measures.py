"""What the paper's figures measure of attention, as functions of two decoders and token ids.

Where it sits: under experiments.py, which feeds it texts and shows what comes back; above match.py (accumulated scores,
Eq. 1, and the head map, Eq. 3) and baselines.py (H2O, the "real drop" of Fig. 1). Nothing here reads or writes files.

Sets of tokens are per layer and KV head, as they are kept; similarities are cosines of accumulated scores without the
first SINKS tokens ("we removed the first few tokens", Appendix B). Shapes follow the legend in model.py.
"""

import torch
from torch import Tensor

from baselines import BASELINES, Evicting
from cache import CutCache, Prompt, ScoredCache, heavy_order
from decode import Policy, Session
from match import SINKS, WINDOW_MAX, WINDOW_MIN, head_scores, match_heads
from model import Decoder, Span
from tasks import Sample, converse, open_session

BANDS = (0.05, 0.10, 0.15)  # Fig. 2: the top 5 %, the two marginal bands, the rest


def check_length(ids: list[int]) -> None:
    if len(ids) < WINDOW_MIN:
        raise ValueError(f"a text of {len(ids)} tokens is too short: heads are matched on at least {WINDOW_MIN}")


def kv_head_scores(scores: Tensor, llm: Decoder) -> Tensor:
    """Scores of every head to one for each KV head, by sum: (L * H, n) -> (L, G, n)."""
    config = llm.config
    return scores.view(config.layers, config.kv_heads, -1, scores.shape[-1]).sum(2)


def scores_of(model: Decoder, ids: list[int]) -> Tensor:
    """Accumulated scores of every head over a text: (L * H, n) fp32."""
    return head_scores(model, torch.tensor([ids], device=model.device))


# ---- Fig. 1b: saliency shift -----------------------------------------------------------------------------------------


def top_mask(scores: Tensor, count: int) -> Tensor:
    """Membership of the `count` largest, ties by position: (..., n) -> (..., n) bool."""
    best = scores.argsort(dim=-1, descending=True, stable=True)[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)


def jaccard(one: Tensor, other: Tensor) -> float:
    """Mean over layers and KV heads of the Jaccard similarity of two sets of tokens, (L, G, n) bool each."""
    return ((one & other).sum(-1) / (one | other).sum(-1)).mean().item()


class TwoDrops(Evicting):
    """Fig. 1a: the prompt is compressed once to its heavy hitters, all that comes after stays until the second drop."""

    name = "two-drops"

    def slots(self, lengths: list[int], capacity: int) -> list[int]:
        return [max(map(self.kept, lengths)) + capacity - max(lengths)] * self.llm.config.layers

    def keep(self, layer: int, prompt: Prompt) -> Tensor:
        scores = prompt.by_kv_head(1.0)[layer]  # (G, n)
        return top_mask(scores, self.kept(prompt.capacity)).nonzero()[:, 1].view(len(scores), -1)  # (G, k)

    def plan(self, layer: int, span: Span) -> None:
        self.cache.make_room(layer, self.cache.position[layer] >= 0, span.length)


def feed(policy: Evicting, ids: list[int]) -> None:
    """The first half of a text as the prompt, the second half token by token."""
    half = len(ids) // 2
    session = Session(policy, [ids[:half]], len(ids) - half)
    session.prefill()
    for token in ids[half:]:
        session.step([token])


def held(policy: Evicting, n: int) -> tuple[Tensor, Tensor]:
    """Which of n tokens the policy still has, and their scores (-inf: dropped): (L, G, n) bool and fp32."""
    scores = []
    for position, score in zip(policy.cache.position, policy.cache.heavy):
        row = torch.full((position.shape[1], n + 1), -torch.inf, device=position.device)  # column n takes free slots
        slot = torch.where(position[0] >= 0, position[0], n).long()
        scores.append(row.scatter_(1, slot, score[0])[:, :n])
    scores = torch.stack(scores)
    return scores > -torch.inf, scores


@torch.inference_mode()
def saliency_shift(llm: Decoder, slm: Decoder, ids: list[int], budget: float) -> dict[str, float]:
    """Jaccard of the important tokens of several views with those of the global view, an uncompressed cache (Fig. 1b).

    two_drops: the paper's mimicry. Half of the text, a drop to the budget, the other half, the second drop, by
    accumulated scores alone; the second drop chooses among what the first one left.
    h2o, h2o_heavy: the real method, which drops at every step; by its own rule, half of the set is the newest tokens,
    which both views share, so its heavy half is compared alone, too.
    slm: top tokens by the matched heads of the SLM, which drops nothing (Section 4): what SmallKV sees instead.
    """
    check_length(ids)
    twice, h2o = TwoDrops(llm, budget, heavy=True), BASELINES["h2o"](llm, budget)
    n, kept = len(ids), h2o.kept(len(ids))
    scores = kv_head_scores(scores_of(llm, ids), llm)  # (L, G, n)
    important = top_mask(scores, kept)
    feed(twice, ids)
    feed(h2o, ids)
    # H2O chose before the newest token attended to anything: the global view is that of the n - 1 tokens before it.
    before = torch.nn.functional.pad(kv_head_scores(scores_of(llm, ids[:-1]), llm), (0, 1))
    position = torch.arange(n, device=before.device)
    sizes = [torch.tensor(size, device=before.device) for size in (n, kept)]
    stays, recent = top_mask(heavy_order(position, before, *sizes), kept), position >= n - (kept - kept // 2)
    kept_by_h2o = held(h2o, n)[0]
    chosen = match_heads(llm, slm, ids[:WINDOW_MAX], "jaccard").index.flatten()
    borrowed = kv_head_scores(scores_of(slm, ids).to(llm.device)[chosen], llm)
    heavy = {"h2o_heavy": jaccard(kept_by_h2o & ~recent, stays & ~recent)} if kept > 1 else {}
    return {
        "two_drops": jaccard(top_mask(held(twice, n)[1], kept), important),
        "h2o": jaccard(kept_by_h2o, stays),
        **heavy,
        "slm": jaccard(top_mask(borrowed, kept), important),
    }


# ---- Table 5: a smaller cache of the SLM -----------------------------------------------------------------------------


def kept_scores(slm: Decoder, ids: list[int], share: float) -> Tensor:
    """Accumulated scores of every SLM head when its cache keeps a share, 0 for what it has dropped: (L' * H', n).

    The first half of the text is a prompt, the second half is fed token by token, as SmallKV does it.
    """
    n, half = len(ids), len(ids) // 2
    shape = slm.config, 1, n, slm.device, slm.dtype, 1.0
    cache = CutCache(*shape, share) if share < 1 else ScoredCache(*shape)
    tokens = torch.tensor([ids], device=slm.device)
    staged = cache.staging(0, half)
    slm(tokens[:, :half], Span.chunk(0, half, slm.device), staged, logits="scores")
    cache.load(0, staged)
    for length in torch.arange(half + 1, n + 1, dtype=torch.int32, device=slm.device)[:, None]:
        slm(tokens[:, length - 1], Span.step(length), cache, logits="scores")
        cache.fold(length)
    return cache.score[:, 0].flatten(0, 1)


@torch.inference_mode()
def cut_view(llm: Decoder, slm: Decoder, ids: list[int], share: float, budget: float) -> dict[str, float]:
    """What an SLM that keeps a share of its cache still says of the LLM's attention (heads matched by whole rows).

    similarity: mean cosine of matched heads' accumulated scores. jaccard: of the LLM's important tokens, a budget of
    them for each KV head, with those that the matched heads name; with the whole cache Fig. 1b's `slm`, other matcher.
    """
    check_length(ids)
    scores, chosen = scores_of(llm, ids), match_heads(llm, slm, ids[:WINDOW_MAX], "cosine").index.flatten()
    matched = kept_scores(slm, ids, share).to(llm.device)[chosen]  # (L * H, n)
    kept = Evicting(llm, budget).kept(len(ids))
    named, important = (top_mask(kv_head_scores(one, llm), kept) for one in (matched, scores))
    return {"similarity": cosine(scores, matched).mean().item(), "jaccard": jaccard(named, important)}


# ---- Fig. 2: attention by rank ---------------------------------------------------------------------------------------


@torch.inference_mode()
def mass_by_rank(llm: Decoder, ids: list[int]) -> tuple[dict[str, list[float]], list[float]]:
    """Shares of all accumulated attention that bands of tokens have, by rank: of BANDS' top 5 %, 5-10 %, 10-15 %, rest.

    all_heads: tokens ranked by their score summed over all heads and layers, as in the paper. each_head: ranked in
    every head by itself, mean over heads, which is what a method sees that keeps tokens per head. Also the curve of the
    first, the share of each token from the largest on.
    """
    scores = scores_of(llm, ids)  # (L * H, n)
    n = scores.shape[-1]
    edges = [0, *(round(share * n) for share in BANDS), n]

    def bands(shares: Tensor) -> list[float]:
        return [shares[start:end].sum().item() for start, end in zip(edges, edges[1:])]

    together = scores.sum(0).sort(descending=True).values / scores.sum()
    apart = (scores.sort(dim=-1, descending=True).values / scores.sum(-1, keepdim=True)).mean(0)
    return {"all_heads": bands(together), "each_head": bands(apart)}, together.tolist()


# ---- Fig. 1c and 9, Table 9: similarity ------------------------------------------------------------------------------


def cosine(one: Tensor, other: Tensor) -> Tensor:
    """Cosine of scores without the sinks: (..., n) x (..., n) -> (...)."""
    return torch.cosine_similarity(one[..., SINKS:], other[..., SINKS:], dim=-1)


@torch.inference_mode()
def typical_heads(llm: Decoder, slm: Decoder, ids: list[int], matcher: str) -> tuple[float, dict]:
    """Fig. 1c: mean cosine of matched heads, and scores by token of the LLM head of median cosine and of its match."""
    check_length(ids)
    scores, chosen = scores_of(llm, ids), match_heads(llm, slm, ids[:WINDOW_MAX], matcher).index.flatten()
    matched = scores_of(slm, ids).to(llm.device)[chosen]  # (L * H, n)
    similar = cosine(scores, matched)
    head = similar.argsort(stable=True)[len(similar) // 2].item()
    H, theirs = llm.config.query_heads, slm.config.query_heads
    example = {"layer": head // H, "head": head % H, "slm_layer": chosen[head].item() // theirs,
               "slm_head": chosen[head].item() % theirs, "cosine": similar[head].item(),
               "llm": scores[head].tolist(), "slm": matched[head].tolist()}  # fmt: skip
    return similar.mean().item(), example


@torch.inference_mode()
def all_heads(model: Decoder, ids: list[int]) -> Tensor:
    """Fig. 9: the score of every token across all heads (their mean, so that models of any size compare), (n,)."""
    return scores_of(model, ids).mean(0).cpu()


def conversation(pair, sample: Sample, stops: tuple[str, ...]) -> tuple[list[int], list[int]]:
    """A sample with the answers that the full cache gives: token ids, and where the prompt and each turn end."""
    answers = converse(open_session(Policy(pair.llm), [sample]), [sample], pair.text, stops)[0]
    ids, ends = list(sample.prompt), [len(sample.prompt)]
    for turn, answer in zip(sample.turns, answers, strict=True):
        ids += [*turn, *pair.text.encode(answer)]
        ends.append(len(ids))
    return ids, ends


@torch.inference_mode()
def turn_similarity(llm: Decoder, slm: Decoder, ids: list[int], ends: list[int]) -> list[float]:
    """Table 9: mean cosine of matched heads on the whole text, on its prompt and on each turn; heads stay as matched.

    A turn's scores are what its own queries give to all tokens so far: the difference of two accumulated scores.
    """
    check_length(ids)
    chosen = match_heads(llm, slm, ids[:WINDOW_MAX], "jaccard").index.flatten()
    before = [torch.zeros(1, 0), torch.zeros(1, 0)]
    found = []
    for end in ends:
        now = [scores_of(llm, ids[:end]).cpu(), scores_of(slm, ids[:end])[chosen].cpu()]  # (L * H, end) each
        own = [b - torch.nn.functional.pad(a, (0, end - a.shape[1])) for a, b in zip(before, now)]
        found.append(cosine(*own).mean().item())
        before = now
    return [cosine(*before).mean().item(), *found]
