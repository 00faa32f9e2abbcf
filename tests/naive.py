"""The oracles of the tests: every method as a plain loop over one sequence, with masks over a cache that keeps all.

Where it sits: beside the tests. No slots, pools, chunks, batches or kernels: a decoder written out (`Naive`), sets of
positions by layer and KV head, rankings by `sorted`. Of the product's code they use the sizes of a budget, the matched
heads and PyramidInfer's solved shares, which have tests of their own. `check_caches` holds a session's caches against
SmallKV's loop.

Shapes follow the legend in model.py, without the batch; n, the tokens so far, stands for S.
"""

import itertools
import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from baselines import answer_shares, solve_pyramid
from conftest import close
from evicting import CutCache
from match import WINDOW_MAX, WINDOW_MIN, match_heads

Head = tuple[int, int]  # layer and KV head


class Naive:
    """One sequence in a decoder of the LLaMA type, every K and V kept for ever; who is seen is a mask.

    key, value: by layer (G, n, D). rows: by layer (H, T, n), what the tokens fed last weigh in the heads' outputs.
    """

    def __init__(self, model):
        self.model, self.config, self.length = model, model.config, 0
        config = model.config
        self.key, self.value = ([torch.zeros(config.kv_heads, 0, config.head_dim)] * config.layers for _ in "kv")
        self.heads: list[Head] = [(layer, g) for layer in range(config.layers) for g in range(config.kv_heads)]

    def feed(self, tokens: list[int], see: Callable | None = None, lend: Callable | None = None) -> Tensor:
        """Tokens that come after all others -> logits (V,) of what follows the last one.

        see(layer, rows (H, T, n)) -> mask (G, n), the tokens that the heads attend to (None: all); rows: what all would
        weigh. lend(layer) -> (H, n): weights borrowed for tokens beside these (Eq. 6).
        """
        config, T = self.config, len(tokens)
        H, G, D = config.query_heads, config.kv_heads, config.head_dim
        self.length, self.rows = self.length + T, []
        n = self.length
        position = torch.arange(n - T, n)[:, None]
        turn = torch.exp(1j * position * 10000.0 ** -(torch.arange(0, D, 2) / D))  # (T, D/2)
        x = self.model.embed_tokens.weight[tokens]  # (T, hidden)
        for layer, block in enumerate(self.model.layers):
            heads = block.self_attn.qkv_proj(self._norm(x, block.input_layernorm)).view(T, -1, D).transpose(0, 1)
            query, key, value = heads.split((H, G, G))
            self.key[layer] = torch.cat((self.key[layer], self._rotated(key, turn)), 1)
            self.value[layer] = torch.cat((self.value[layer], value), 1)
            key, value = (pool[layer].repeat_interleave(H // G, 0) for pool in (self.key, self.value))  # (H, n, D)
            logits = self._rotated(query, turn) @ key.mT / math.sqrt(D)
            logits = logits.masked_fill(torch.arange(n) > position, -torch.inf)  # (H, T, n)
            if see is not None:
                mask = see(layer, logits.softmax(-1)).repeat_interleave(H // G, 0)[:, None]
                logits = logits.masked_fill(~mask, -torch.inf)
            rows = logits.softmax(-1).nan_to_num(0)  # nothing is seen: by tokens whose result nothing reads
            lent = torch.zeros(()) if lend is None else lend(layer)[:, None]
            self.rows.append((1 - lent.sum(-1, keepdim=True)) * rows if lend is not None else rows)
            x = x + block.self_attn.o_proj(((self.rows[layer] + lent) @ value).transpose(0, 1).flatten(1))
            gate, up = block.mlp.gate_up_proj(self._norm(x, block.post_attention_layernorm)).chunk(2, -1)
            x = x + block.mlp.down_proj(F.silu(gate) * up)
        return self.model.lm_head(self._norm(x[-1], self.model.norm))

    @staticmethod
    def _norm(x: Tensor, norm) -> Tensor:
        return norm.weight * x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt()

    @staticmethod
    def _rotated(x: Tensor, turn: Tensor) -> Tensor:
        """(heads, T, D): dimension i is paired with i + D/2."""
        turned = torch.complex(*x.chunk(2, -1)) * turn
        return torch.cat((turned.real, turned.imag), -1)

    def forget(self, length: int) -> None:
        """The tokens beyond `length` were never there."""
        self.length = length
        self.key, self.value = ([rows[:, :length] for rows in pool] for pool in (self.key, self.value))

    def by_kv_head(self, rows: Tensor) -> Tensor:
        """(..., H, n) summed over the query heads of each KV head: (..., G, n)."""
        return rows.unflatten(-2, (self.config.kv_heads, -1)).sum(-2)

    def only(self, held: dict[Head, object]) -> Callable:
        """`see`: of each layer and KV head these positions."""

        def see(layer: int, rows: Tensor) -> Tensor:
            mask = torch.zeros(self.config.kv_heads, self.length, dtype=torch.bool)
            for g in range(self.config.kv_heads):
                mask[g, list(held[layer, g])] = True
            return mask

        return see


def matrices(model, text: list[int]) -> Tensor:
    """Attention matrices of all heads on a text: (L * H, n, n)."""
    naive = Naive(model)
    naive.feed(text)
    return torch.cat(naive.rows)


def top(scores: dict[int, float], count: int) -> list[int]:
    """The `count` positions of highest score, in order; equal scores by position."""
    return sorted(sorted(scores, key=lambda j: (-scores[j], j))[: max(count, 0)])


# ---- Methods that evict by a rule ------------------------------------------------------------------------------------


def h2o(held: dict[int, float], n: int, kept: int) -> list[int]:
    """Of the positions held, with the attention that they have gathered, who stays before token n - 1 comes in."""
    newest = [j for j in held if j >= n - (kept - kept // 2)]
    return newest + top({j: held[j] for j in held if j not in newest}, kept - 1 - len(newest))


def streaming(held: dict[int, float], n: int, kept: int, sinks: int = 4) -> list[int]:
    first = [j for j in held if j < min(sinks, kept // 2)]
    return first + [j for j in held if j not in first][max(0, len(held) + 1 - kept) :]


def window(held: dict[int, float], n: int, kept: int) -> list[int]:
    return streaming(held, n, kept, sinks=0)


class Evicting(Naive):
    """What `rule` drops is gone; kept(n) tokens at length n. held: position -> attention that it has gathered."""

    def __init__(self, model, prompt: list[int], kept: Callable, rule: Callable):
        super().__init__(model)
        self.kept, self.rule = kept, rule
        self.logits = self.feed(prompt)
        gathered = [self.by_kv_head(rows.sum(1)).tolist() for rows in self.rows]
        self.held = {(layer, g): dict(enumerate(gathered[layer][g])) for layer, g in self.heads}
        self.evict()

    def forget(self, length: int) -> None:
        super().forget(length)
        self.held = {head: {j: held[j] for j in held if j < length} for head, held in self.held.items()}

    def evict(self) -> None:
        n = self.length + 1
        for head, held in self.held.items():
            self.held[head] = {j: held[j] for j in sorted(self.rule(held, n, self.kept(n)))}

    def step(self, token: int) -> Tensor:
        self.evict()
        for held in self.held.values():
            held[self.length] = 0.0
        logits = self.feed([token], self.only(self.held))
        for (layer, g), held in self.held.items():
            row = self.by_kv_head(self.rows[layer][:, -1])[g].tolist()
            self.held[layer, g] = {j: held[j] + row[j] for j in held}
        return logits


def naive_evicting(rule: Callable) -> Callable:
    def run(llm, prompt, fed, kept):
        naive, history = Evicting(llm, prompt, kept, rule), []
        logits = [naive.logits]
        for token in fed:
            logits.append(naive.step(token))
            history.append({head: sorted(held) for head, held in naive.held.items()})
        return logits, history

    return run


# ---- The other baselines ---------------------------------------------------------------------------------------------


def naive_snapkv(llm, prompt, fed, kept):
    naive, n, kept = Naive(llm), len(prompt), kept(len(prompt))
    logits, history, observed = [naive.feed(prompt)], [], max(1, min(32, kept // 2))
    held = {}
    for layer, g in naive.heads:
        votes = naive.by_kv_head(naive.rows[layer][:, n - observed :].sum(1))[g, : n - observed].tolist()
        pooled = {j: max(votes[max(0, j - 3) : j + 4]) for j in range(len(votes))}
        held[layer, g] = top(pooled, kept - observed) + list(range(n - observed, n))
    for token in fed:
        held = {head: [*positions, naive.length] for head, positions in held.items()}
        logits.append(naive.feed([token], naive.only(held)))
        history.append(held)
    return logits, history


def naive_oracle(llm, prompt, fed, kept, shared=False):
    """Top-k of the full attention, by the very query of the step; shared: of the heads of a layer together, the newest
    token of each first."""
    naive = Naive(llm)
    logits = [naive.feed(prompt)]

    def see(layer: int, rows: Tensor) -> Tensor:
        mass, n = naive.by_kv_head(rows[:, -1]).tolist(), naive.length
        best = {(layer, g): top(dict(enumerate(row)), kept(n)) for g, row in enumerate(mass)}
        if shared:
            cells = {(g, j): math.inf if j == n - 1 else x for g, row in enumerate(mass) for j, x in enumerate(row)}
            chosen = top(cells, len(mass) * kept(n))
            best = {(layer, g): [j for own, j in chosen if own == g] for g in range(len(mass))}
        return naive.only(best)(layer, rows)

    logits += [naive.feed([token], see) for token in fed]
    return logits, None  # a full cache: nothing is held or dropped


def naive_pyramidinfer(llm, prompt, fed, kept):
    """The prompt layer by layer, on the tokens that survive; then the legacy rule of decoding, 16 tokens at once."""
    naive, N, L, H = Naive(llm), len(prompt), llm.config.layers, llm.config.query_heads
    kept = kept(N)
    entering, size, cut = solve_pyramid(N, kept, L)
    alive, stored = list(range(N)), []

    def thin(layer: int) -> None:
        """After a layer's attention: the context that the recent queries like least leaves."""
        nonlocal alive
        context, recent = alive[:-size], alive[-size:]
        weight = [1 + 0.2 * i / max(1, size - 1) for i in range(size)]
        rows = naive.rows[layer].mean(0)  # (N, N)
        score = {j: math.inf if j in context[:4] else sum(w * rows[q, j].item() for w, q in zip(weight, recent))
                 for j in context}  # fmt: skip
        survivors = (top(score, entering[layer + 1]) if entering[layer + 1] < len(context) else context) + recent
        stored.append(survivors if cut else alive)
        alive = survivors

    def see(layer: int, rows: Tensor) -> Tensor:
        if layer:
            thin(layer - 1)
        return torch.zeros(llm.config.kv_heads, N, dtype=torch.bool).index_fill(1, torch.tensor(alive), True)

    logits, history = [naive.feed(prompt, see)], []
    thin(L - 1)
    held, settled, keep = stored, [len(positions) for positions in stored], answer_shares(kept / N, L)
    past: list[list[Tensor]] = []  # of each step the layers' rows (n,), mean over heads
    for token in fed:
        recent = int(min(0.2, kept / N / 4) * len(held[0]) + 1e-9)
        for layer in range(L):
            if len(held[layer]) - recent - settled[layer] >= 16:
                segment = held[layer][len(held[layer]) - recent - 16 : len(held[layer]) - recent]
                rows = [step[layer].tolist() for step in past[-(recent + 1) :]]
                weight = [1 + 0.2 * i / max(1, recent) for i in range(recent + 1)]
                score = {j: sum(w * row[j] for w, row in zip(weight, rows) if j < len(row)) for j in segment}
                gone = set(segment) - set(top(score, keep[layer]))
                held[layer] = [j for j in held[layer] if j not in gone]
                settled[layer] = len(held[layer]) - recent
            held[layer] = [*held[layer], naive.length]
        now = {(layer, g): held[layer] for layer, g in naive.heads}
        logits.append(naive.feed([token], naive.only(now)))
        past.append([rows[:, 0].sum(0) / H for rows in naive.rows])
        history.append(now)
    return logits, history


NAIVE = {
    "h2o": naive_evicting(h2o), "streaming": naive_evicting(streaming), "window": naive_evicting(window),
    "snapkv": naive_snapkv, "oracle": naive_oracle, "pyramidinfer": naive_pyramidinfer,
    "oracle-shared": partial(naive_oracle, shared=True),
}  # fmt: skip


# ---- SmallKV ---------------------------------------------------------------------------------------------------------


def level(score: float) -> int:
    """Scores of one level are alike between heads: eighths of an octave from 2 ** -27 on, and what is below."""
    if score < 2.0**-27:
        return 0
    fraction, exponent = math.frexp(min(score, 2.0**4 * 1.625))
    return 8 * (exponent + 26) + int(16 * fraction) - 8


def shares(levels: list[list[float]], most: int, shared: bool) -> list[int]:
    """Critical tokens of the KV heads of a layer, of which `levels` says the level of every token: `most` each; or, of
    as many together, those of the highest levels, of the last level those of the first heads."""
    if not shared:
        return [min(most, len(own)) for own in levels]
    best = sorted(((-x, g) for g, own in enumerate(levels) for x in own))[: most * len(levels)]
    return [sum(g == own for _, own in best) for g in range(len(levels))]


def naive_order(scores: list[float], recent: int) -> list[int]:
    """Tokens of one KV head, best first: the newest, then the recent ones, then by score; equals by position; a score
    below 0 is never taken."""
    n = len(scores)

    def rank(token):
        if token == n - 1:
            return -3, 0.0, token
        return (-2, 0.0, token) if token >= n - recent else (-1, -scores[token], token)

    return sorted((j for j in range(n) if rank(j)[0] < -1 or scores[j] >= 0), key=rank)


def naive_tiers(scores: list[list[float]], size: tuple[int, int, int], shared: bool) -> list[tuple[set[int], set[int]]]:
    """Critical and marginal tokens of each KV head of a layer. size: critical, recent and marginal ones."""
    critical, recent, marginal = size
    orders = [naive_order(own, recent) for own in scores]
    levels = [[level(own[j]) if j < len(own) - recent else math.inf for j in order]
              for own, order in zip(scores, orders)]  # fmt: skip
    first, both = (shares(levels, most, shared) for most in (critical, critical + marginal))
    return [(set(order[:one]), set(order[one:two])) for order, one, two in zip(orders, first, both)]


class NaiveSmallKV:
    """One sequence under SmallKV, with or without drafts, by masks over caches that keep everything.

    critical, marginal: layer and KV head -> positions, as the newest plan has them, accepted drafts among them. came:
    rows brought so far, critical and marginal. score (L', H', n): the SLM's, after the newest token. memory (L, G, n):
    what the LLM's own attention says; -1: dropped, without saliency shift.
    """

    def __init__(self, llm, slm, settings, prompt: list[int], head_map: Tensor | None = None, drafts: int = 0):
        self.settings, self.text, self.drafts, self.map = settings, list(prompt), drafts, head_map
        self.models, self.prompt = (llm, slm), len(prompt)
        self.llm = Naive(llm)
        self.slm = Evicting(slm, prompt, lambda n: max(1, int(settings.slm_budget * n + 1e-9)), h2o)
        self.logits = self.llm.feed(prompt)
        age = torch.arange(len(prompt) - 1, -1, -1)
        faded = torch.tensor(settings.score_decay) ** age[:, None]
        self.score = (faded * torch.stack(self.slm.rows)).sum(2)
        self.memory = self.llm.by_kv_head((faded * torch.stack(self.llm.rows)).sum(2))
        self.critical, self.marginal = ({head: set() for head in self.llm.heads} for _ in range(2))
        self.came = [0, 0]

    def step(self, token: int) -> Tensor:
        """Logits (V,) of what follows the token."""
        return self.round([token])[1][0]

    def round(self, tokens: list[int], allowed: int = 0, kept: Callable = lambda tokens, logits: 1) -> tuple:
        """The newest token and its drafts, the SLM's own where none are given. Returns all of them and the LLM's logits
        after each. allowed: how many drafts count for the plan; kept(tokens, logits): how many of the tokens stay."""
        n, d, settings, rows, logits = len(self.text) + 1, self.settings.score_decay, self.settings, [], []
        tokens = list(tokens)
        self._match([*self.text, tokens[0]])
        for t in range(self.drafts + 1):
            rows.append(self._observe(tokens[t]))  # (L', H', n + t)
            if t < self.drafts and len(tokens) == t + 1:
                tokens.append(self.words.argmax().item())
        came = self._plan(self._rank(rows[: allowed + 1], n), settings.sizes(n, self.drafts), n)
        self.came = [before + now for before, now in zip(self.came, came)]
        for t, token in enumerate(tokens):
            held = {head: {*critical, *range(n, n + t)} for head, critical in self.critical.items()}
            logits.append(self.llm.feed([token], self.llm.only(held), lambda layer: self._lend(rows[t], layer, n + t)))
        if not self.drafts:
            self._remember(rows[0])
        count = kept(tokens, logits)
        for row in rows[:count]:
            self.score = d * F.pad(self.score, (0, row.shape[-1] - self.score.shape[-1])) + row
        self.text += tokens[:count]
        for model in (self.llm, self.slm):
            model.forget(len(self.text))
        for critical in self.critical.values():
            critical |= set(range(n, len(self.text)))  # accepted drafts stay until the next plan
        return tokens, logits

    def _match(self, text: list[int]) -> None:
        """f(i), on the prompt's first tokens or, if it is too short, on the first text that is long enough."""
        if self.map is None and len(text) >= WINDOW_MIN:
            seen = min(max(self.prompt, WINDOW_MIN), WINDOW_MAX)
            self.map = match_heads(*self.models, text[:seen], self.settings.matcher, self.settings.reach).index

    def _observe(self, token: int) -> Tensor:
        """The SLM's attention row (L', H', n); what it has dropped has no score any more."""
        self.words = self.slm.step(token)
        see, config = self.slm.only(self.slm.held), self.slm.config
        held = torch.stack([see(layer, None) for layer in range(config.layers)])  # (L', G', n)
        held = held.repeat_interleave(config.query_heads // config.kv_heads, 1)[..., : self.score.shape[-1]]
        self.score = self.score.masked_fill(~held, 0)
        return torch.stack(self.slm.rows)[:, :, -1]

    def _matched(self, rows: Tensor, n: int) -> Tensor:
        """(L', H', n') -> of each LLM head the matched row, cut to n: (L, H, n)."""
        config = self.llm.config
        index = torch.zeros(config.layers, config.query_heads).long() if self.map is None else self.map
        return rows.flatten(0, 1)[index][..., :n]

    def _rank(self, rows: list[Tensor], n: int) -> Tensor:
        settings, d = self.settings, self.settings.score_decay
        self.memory = F.pad(self.memory, (0, n - self.memory.shape[-1]))
        if not settings.saliency_shift:
            return self.memory
        if settings.fused:
            return d * self.memory + self.llm.by_kv_head(self._matched(rows[0], n))
        running, after = F.pad(self.score, (0, n - self.score.shape[-1])), []
        for row in rows:
            running = d * running + row[..., :n]
            after.append(running)
        return self.llm.by_kv_head(torch.stack([self._matched(scores, n) for scores in after]).amax(0))

    def _plan(self, rank: Tensor, size, n: int) -> list[int]:
        """The newest token, the recent ones, then by score, then by position: cut in three. Rows that come, by tier."""
        came, sizes = [0, 0], (size.critical, size.recent, size.marginal)
        for layer, scores in enumerate(rank[..., :n].tolist()):
            for g, cuts in enumerate(naive_tiers(scores, sizes, not self.settings.uniform)):
                for tier, (table, wanted) in enumerate(zip((self.critical, self.marginal), cuts)):
                    came[tier] += len(wanted - table[layer, g] - {n - 1})
                    table[layer, g] = wanted
        return came

    def _lend(self, row: Tensor, layer: int, n: int) -> Tensor:
        """The matched heads' weights on marginal tokens (H, n)."""
        weights, mask = self._matched(row, n)[layer], self.llm.only(self.marginal)(layer, None)
        return weights * mask.repeat_interleave(len(weights) // len(mask), 0)

    def _remember(self, row: Tensor) -> None:
        """Critical tokens gather what they weigh in the LLM, the others the SLM's row; or are gone."""
        rows = torch.stack(self.llm.rows)[:, :, -1], self._matched(row, self.llm.length)
        own, borrowed = (self.settings.score_decay * self.memory + self.llm.by_kv_head(x) for x in rows)
        masks = (self.llm.only(table) for table in (self.critical, self.marginal))
        critical, marginal = (torch.stack([see(layer, None) for layer in range(len(own))]) for see in masks)
        lends = marginal | self.settings.saliency_shift
        self.memory = own.where(critical, borrowed.where(lends, -1))


def check_caches(session, b: int, loop: NaiveSmallKV, begun: int, tiers: bool = True) -> None:
    """Sequence b of a session against its loop: which tokens have slots, and what is in them; the offloaded tier, which
    has the `begun` tokens that stood there when the step began; the SLM's cache and its scores.

    tiers: False for a sequence that has ended, whose slots nothing reads.
    """
    cache, slm, n = session.policy.cache, session.policy.slm_cache, len(loop.text)
    assert session.lengths[b] == n == session.length[b]
    if cache.key.is_cuda:
        torch.cuda.synchronize()
    made = [torch.stack(rows) for rows in (loop.llm.key, loop.llm.value)]  # (L, G, n, D)
    for kind, rows in enumerate(made):
        close(cache.offloaded[:, b, :, :begun, kind], rows[:, :, :begun], 1e-4)
    critical, marginal = (cache.critical_slots, loop.critical), (cache.marginal_slots, loop.marginal)
    pools = [(cache.key, *critical, 0), (cache.value, *critical, 1)]
    pools += [(cache.marginal, *marginal, 1)] if cache.marginal is not None else []
    for tier, held in (("critical", loop.critical), ("marginal", loop.marginal)):
        mean = sum(map(len, held.values())) / len(held)
        assert not tiers or math.isclose(cache.tokens(b)[tier], mean, rel_tol=1e-6)
    for (layer, g), (pool, table, held, kind) in itertools.product(loop.llm.heads if tiers else (), pools):
        tokens, rows = in_places(table.layer(layer), b, g, held[layer, g], pool[layer, b])
        close(rows, made[kind][layer, g, tokens], 1e-4)
        old = tokens < begun  # what came back is the same to the bit
        assert torch.equal(rows[old], cache.offloaded[layer, b, g, :, kind].cpu()[tokens[old]])
    if isinstance(slm, CutCache):
        for (layer, g), held in loop.slm.held.items():
            pools = [pool[layer][b, g] for pool in (slm.key, slm.value, slm.heavy)]
            tokens, key, value, heavy = in_slots(slm.position[layer][b, g], held, *pools)
            close(key, loop.slm.key[layer][g, tokens], 1e-4)
            close(value, loop.slm.value[layer][g, tokens], 1e-4)
            close(heavy, torch.tensor([held[j] for j in tokens.tolist()]), 1e-4)
    else:
        close(slm.key[:, b, :, :n], torch.stack(loop.slm.key), 1e-4)
        close(slm.value[:, b, :, :n], torch.stack(loop.slm.value), 1e-4)
    if slm.score is not None:
        close(slm.score[:, b, :, :n], loop.score, 1e-4)
        assert not slm.score[:, b, :, n:].any()


def in_places(slots, b: int, g: int, held, pool: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens of one KV head, which must be those held, and their rows of a pool (N, D); a slot has one place."""
    slot, token, begin = (table[b].cpu().long() for table in slots)
    assert slot.sort().values.tolist() == list(range(len(slot)))
    assert begin[0] == 0 and begin[-1] == len(slot) and (token[begin[-2] :] == -1).all()
    own = slice(begin[g], begin[g + 1])
    return in_slots(token[own], held, pool.cpu()[slot[own]])


def in_slots(position: Tensor, held, *pools: Tensor) -> tuple[Tensor, ...]:
    """The tokens of a table of slots (N,), which must be those held, and the pools' rows of the same slots."""
    taken = position.cpu() >= 0
    tokens = position.cpu()[taken].long()
    assert sorted(tokens.tolist()) == sorted(held)
    return tokens, *(pool.cpu()[taken] for pool in pools)
