"""PyramidInfer (arXiv 2405.12532): deeper layers keep less, a baseline of SmallKV.

Where it sits: beside baselines.py, on the slots of evicting.py. The rule is that of the published code
(`modeling_llama_pyramidinfer_legacy.py`; the later port compresses by the wrong length once it has begun). Three parts:

- prefill: after each layer's attention the context that the recent queries attend to least leaves, for good;
- decode: 16 tokens of the answer at a time are thinned, once they are older than the recent block;
- how many tokens that is in each layer, for a given budget: `solve_pyramid`, which is ours.

Shapes follow the legend in model.py; N, the slots of a layer, differs between layers here.
"""

import math

import torch
from torch import Tensor

from evicting import Budget, Evicting, EvictingCache
from full_cache import Entry
from kernels import SCORE_BLOCK, attention_rows, causal_attention
from model import Config, Span

SINKS = 4  # first tokens that rank before all others, as shipped
DISTANCE_WEIGHT = 1.2  # the newest query counts that much, the oldest of the recent ones 1, as shipped
RECENT_RATIO = 0.2  # recent block as a share of the prompt, as shipped; small budgets have less
LAST_SHARE = 0.1  # of what the first layer keeps of the answer, the last layer keeps this, as shipped
SEGMENT = 16  # tokens of the answer that are thinned at once, as shipped


# ---- How many tokens a layer keeps -----------------------------------------------------------------------------------


def cosine(layer: int, layers: int, last: float) -> float:
    """PyramidInfer's schedule, from 1 at the first layer to about `last` at the last one."""
    return (1 - last) * (math.cos(math.pi * layer / layers) + 1) / 2 + last


def contexts(schedule: str, p: float, layers: int, context: int) -> list[int]:
    """Tokens before the recent block that enter each layer, and what leaves the last: layers + 1 numbers.

    Of `context` tokens layer l leaves int(r_l * its own), never none: the ratios compound. r_l is p or `cosine`.
    """
    entering = [context]
    for layer in range(layers):
        ratio = p if schedule == "constant" else cosine(layer, layers, p)
        entering.append(max(min(1, entering[-1]), int(ratio * entering[-1] + 1e-9)))
    return entering


def solve_pyramid(length: int, kept: int, layers: int) -> tuple[list[int], int, bool]:
    """Layer budgets whose mean is at most `kept`, as close as whole tokens allow: contexts, recent block, cut.

    The shipped schedule (cosine to p = 0.9) cannot keep less than about 0.4, as its ratios begin near 1; the paper that
    this is compared in gives 5 to 30 % and no rule. Ours: the recent block is a quarter of the budget, at most the
    shipped fifth of the prompt; the minimum context of 64 tokens goes; the cosine's p is solved while it can reach the
    budget, else one constant ratio is; then, as layer 0 alone would take a small budget, the ratio of a layer also cuts
    its own cache (`cut`), right after its attention.
    """
    recent = int(min(RECENT_RATIO, kept / length / 4) * length + 1e-9) + 1
    for schedule, cut in (("cosine", False), ("constant", True)):

        def stored(p: float) -> int:
            entering = contexts(schedule, p, layers, length - recent)
            return sum(entering[1:] if cut else entering[:-1]) + layers * recent

        if stored(0.0) <= layers * kept or cut:
            break
    low, high = 0.0, 1.0
    if stored(high) <= layers * kept:
        low = high
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if stored(middle) <= layers * kept else (low, middle)
    return contexts(schedule, low, layers, length - recent), recent, cut


def answer_shares(share: float, layers: int) -> list[int]:
    """Of SEGMENT generated tokens, how many each layer keeps: cosine to 0.1 as shipped, scaled so that the mean is the
    budget's share (the shipped 0.9 is a mean of one half); above what that reaches, the last share rises until 1 keeps
    all."""
    falling = [cosine(layer, layers, 0.0) for layer in range(layers)]
    mean = sum(falling) / layers
    last = max(LAST_SHARE, (share - mean) / (1 - mean) if mean < 1 else 0.0)
    shape = [cosine(layer, layers, last) for layer in range(layers)]
    scale = min(1.0, share * layers / sum(shape))
    return [max(1, int(SEGMENT * scale * ratio + 1e-6)) for ratio in shape]


class Lengths:
    """How many tokens each layer holds of one sequence: known on the host, whatever the attention says."""

    def __init__(self, budget: Budget, prompt: int, layers: int):
        kept = budget.kept(prompt)
        self.contexts, block, self.cut = solve_pyramid(prompt, kept, layers)
        self.block = block
        self.ratio = min(RECENT_RATIO, kept / prompt / 4)
        self.held = [context + block for context in (self.contexts[1:] if self.cut else self.contexts[:-1])]
        self.settled = list(self.held)  # the prompt, and what has been thinned of the answer
        self.keep = answer_shares(kept / prompt, layers)

    def step(self) -> tuple[int, list[bool]]:
        """Make room for one more token: the recent block R', and in which layers SEGMENT tokens are thinned."""
        recent = int(self.ratio * self.held[0] + 1e-9)
        due = [held - recent - settled >= SEGMENT for held, settled in zip(self.held, self.settled)]
        for layer, thinned in enumerate(due):
            if thinned:
                self.held[layer] -= SEGMENT - self.keep[layer]
                self.settled[layer] = self.held[layer] - recent
            self.held[layer] += 1
        return recent, due


# ---- Caches ----------------------------------------------------------------------------------------------------------


def recent_weights(count: int, device) -> Tensor:
    """PyramidInfer's weights of the newest `count` queries, oldest first, (count,) fp32."""
    return torch.linspace(1.0, DISTANCE_WEIGHT, count, device=device)


class PyramidPrefill:
    """PyramidInfer's prefill of one whole prompt: after a layer's attention, the context that matters least leaves.

    contexts (layers + 1): tokens before the recent block that layer l attends to; the last entry is what leaves the
    last layer. recent: the tokens of the recent block, which are never pruned. cut: keep in layer l's cache what leaves
    the layer, not what enters it.

    Published code takes the hidden states of the dropped tokens out. Here they go on, as rows that no other token
    attends to and whose attention is not computed: the same numbers and the same cache; what is not saved is the MLP.
    """

    def __init__(self, contexts: list[int], recent: int, cut: bool, device):
        self.contexts, self.recent, self.cut = contexts, recent, cut
        self.alive = torch.arange(contexts[0] + recent, device=device)  # positions that enter the layer at hand
        self.key: list[Tensor] = []  # a layer: (1, G, kept, D)
        self.value: list[Tensor] = []
        self.position: list[Tensor] = []  # a layer: (kept,)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, span: Span) -> Tensor:
        if query.shape[2] != self.contexts[0] + self.recent:
            raise ValueError("PyramidInfer prunes a prompt as a whole: it cannot be prefilled in chunks")
        query_in, key_in, value_in = (x[:, :, self.alive] for x in (query, key, value))
        out = torch.zeros_like(query)
        out[:, :, self.alive] = causal_attention(query_in, key_in, value_in)
        context, wanted = self.contexts[layer], self.contexts[layer + 1]
        stays = torch.arange(context + self.recent, device=query.device)
        if wanted < context:
            best = self._weights(query_in, key_in)[:context].argsort(descending=True, stable=True)[:wanted]
            stays = torch.cat((best.sort().values, stays[context:]))
        stored = stays if self.cut else slice(None)
        self.key.append(key_in[:, :, stored])
        self.value.append(value_in[:, :, stored])
        self.position.append(self.alive[stored])
        self.alive = self.alive[stays]
        return out

    def _weights(self, query: Tensor, key: Tensor) -> Tensor:
        """What the recent queries attend to, mean over heads, newer queries more: (m,); sinks rank first."""
        m = query.shape[2]
        weight = recent_weights(self.recent, query.device)
        total = torch.zeros(m, device=query.device)
        first = m - self.recent
        for start in range(first, m, SCORE_BLOCK):
            end = min(m, start + SCORE_BLOCK)
            rows = attention_rows(query[:, :, start:end], key[:, :, :end], start)[0].mean(0)  # (T, end)
            total[:end] += weight[start - first : end - first] @ rows
        total[:SINKS] = torch.inf
        return total


class PyramidCache(EvictingCache):
    """Slots with the newest attention rows (B, R, N) a layer, mean over all heads: what PyramidInfer ranks by.

    All KV heads of a layer keep the same tokens. The row of step t is row t % R.
    """

    def __init__(self, config: Config, batch: int, slots: list[int], rows: int, device, dtype: torch.dtype, policy):
        super().__init__(config, batch, slots, device, dtype, policy)
        self.rows = [torch.zeros(batch, rows, count, device=device) for count in slots]
        self.step = -1  # the one at hand

    def load(self, b: int, staged: PyramidPrefill, length: int) -> None:
        """The prefill has pruned already: take all that it kept."""
        for layer, position in enumerate(staged.position):
            count = len(position)
            self.key[layer][b, :, :count] = staged.key[layer][0]
            self.value[layer][b, :, :count] = staged.value[layer][0]
            self.position[layer][b, :, :count] = position.int()

    def migrate(self, plan, span: Span) -> None:
        super().migrate(plan, span)
        self.step += 1

    def newest_rows(self, layer: int, b: int, count: int) -> Tensor:
        """The rows of the `count` steps before the one at hand, oldest first: (count, N)."""
        rows = self.rows[layer]
        step = torch.arange(self.step - count, self.step, device=rows.device)
        return rows[b, step % rows.shape[1]]

    def _remember(self, layer: int, slot: Tensor, weight: Tensor) -> None:
        # A slot's older entries speak of whoever had it before; nobody reads them, as only rows of queries that came
        # after a token rank it.
        self.rows[layer][:, self.step % self.rows[layer].shape[1]] = weight.mean(1)

    def ledger(self) -> list[Entry]:
        return super().ledger() + [
            Entry("recent rows", self.rows[0].device.type, sum(rows.nbytes for rows in self.rows))
        ]

    @staticmethod
    def predict(
        config: Config, batch: int, slots: list[int], rows: int, device: str, dtype: torch.dtype
    ) -> list[Entry]:  # fmt: skip
        size = batch * rows * sum(slots) * torch.float32.itemsize
        return EvictingCache.predict(config, batch, slots, device, dtype) + [Entry("recent rows", device, size)]


# ---- The policy ------------------------------------------------------------------------------------------------------


class PyramidInfer(Evicting):
    """Deeper layers keep less: in the prefill each layer drops the context that the recent queries do not attend to.

    One token set a layer, for all its heads. In decoding, by the legacy rule of the published code: once 16 tokens of
    the answer are older than the recent block, the best of them stay, by the weighted rows of the recent queries; the
    prompt is not touched again. The budget is the mean over layers of the share of the prompt that is kept
    (`solve_pyramid`), and about the same share of the answer beside its recent block.
    """

    name = "pyramidinfer"
    whole_prompt = True
    cache_type = PyramidCache

    def _shape(self, lengths: list[int], capacity: int) -> tuple[list[int], int]:
        """Slots of every layer and attention rows to remember, by counting through all steps."""
        layers = self.llm.config.layers
        slots, rows = [1] * layers, 1
        for prompt in lengths:
            count = Lengths(self.budget, prompt, layers)
            slots = [max(pair) for pair in zip(slots, count.held)]
            for _ in range(capacity - max(lengths)):
                recent, _ = count.step()
                slots, rows = [max(pair) for pair in zip(slots, count.held)], max(rows, recent + 1)
        return slots, rows

    def make_cache(self, lengths: list[int], capacity: int) -> PyramidCache:
        self.counts = [Lengths(self.budget, prompt, self.llm.config.layers) for prompt in lengths]
        shape = (self.llm.config, len(lengths), *self._shape(lengths, capacity), self.llm.device, self.llm.dtype)
        self.cache = PyramidCache(*shape, self)
        return self.cache

    def predict(self, lengths: list[int], capacity: int) -> dict[str, list[Entry]]:
        shape = (self.llm.config, len(lengths), *self._shape(lengths, capacity))
        return {"LLM": PyramidCache.predict(*shape, self.llm.device.type, self.llm.dtype)}

    def staging(self, b: int, length: int) -> PyramidPrefill:
        count = self.counts[b]
        return PyramidPrefill(count.contexts, count.block, count.cut, self.llm.device)

    def observe(self, tokens: list[int], span: Span) -> None:
        self.steps = [count.step() for count in self.counts]

    def plan(self, layer: int) -> Tensor:
        position = self.cache.position[layer]
        stays = position >= 0
        for b, (recent, due) in enumerate(self.steps):
            if not due[layer]:
                continue
            newest_first = position[b, 0].argsort(descending=True)
            segment = newest_first[recent : recent + SEGMENT]  # slots of the 16 just older than the recent block
            rows = self.cache.newest_rows(layer, b, recent + 1)[:, segment]  # (recent + 1, 16)
            order = (recent_weights(recent + 1, rows.device) @ rows).argsort(descending=True)
            stays[b, :, segment[order[self.counts[b].keep[layer] :]]] = False
        return stays
