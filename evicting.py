"""What the baselines that evict have in common: a budget, a pool of slots that forgets for good, a rule of who stays.

Where it sits: between a baseline's rule (baselines.py, pyramid.py) and the model (model.py), which knows of a cache
only `attend`. There is no host tier: what is not kept is gone, and memory for it was never allocated.

Per step (decode.py): `Evicting.observe` counts the tokens, then each layer asks `Evicting.plan` who stays, drops the
rest, puts the newest token into a free slot and attends to the slots. A prompt is prefilled in a staging cache of one
sequence, which is given up once `EvictingCache.load` has picked from it.

Shapes follow the legend in model.py; N, the slots of a layer, may differ between layers here.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cache import column
from full_cache import Entry, FullCache
from kernels import tiered_attention
from model import Config, Decoder, Span


@dataclass(frozen=True)
class Budget:
    """How many tokens stay. ValueError names what is out of range.

    share: of the tokens at the current length, in (0, 1]. tokens: instead, that many whatever the length. of_prompt: a
    share of the prompt, which does not grow with the answer, as H2O was published; with it 1.0 is not the full cache.
    """

    share: float = 0.2
    tokens: int | None = None
    of_prompt: bool = False

    def __post_init__(self):
        if not 0 < self.share <= 1:
            raise ValueError(f"budget {self.share} is outside (0, 1]; 0.2 keeps a fifth of the full cache's bytes")
        if self.tokens is not None and self.tokens < 1:
            raise ValueError(f"budget of {self.tokens} tokens is too small; at least 1")

    def kept(self, length: int, prompt: int | None = None) -> int:
        """Tokens kept of a sequence of `length`, whose first `prompt` tokens were given."""
        if self.tokens is not None:
            return min(self.tokens, length)
        of = prompt if self.of_prompt and prompt is not None else length
        return max(1, int(self.share * of + 1e-9))


# ---- Slots that forget -----------------------------------------------------------------------------------------------


class EvictingCache:
    """K and V of what a method keeps, in slots; a list over layers, for methods that keep less in deeper ones.

    The policy says who stays: `staging(b, length)` where its prompt is prefilled, `keep_prompt(layer, b, staged)` which
    of its tokens are kept, (G, k) indices in order; and at every step `plan(layer)`, a mask of slots (B, G, N), which
    leaves a free slot for the newest token. Spare slots, of shorter sequences, may hold anything.
    """

    def __init__(self, config: Config, batch: int, slots: list[int], device, dtype: torch.dtype, policy):
        self.config, self.policy = config, policy
        shapes = [(batch, config.kv_heads, count) for count in slots]
        self.key = [torch.empty(*shape, config.head_dim, device=device, dtype=dtype) for shape in shapes]
        self.value = [torch.empty(*shape, config.head_dim, device=device, dtype=dtype) for shape in shapes]
        self.position = [torch.full(shape, -1, dtype=torch.int32, device=device) for shape in shapes]

    def staging(self, b: int, length: int):
        return self.policy.staging(b, length)

    def load(self, b: int, staged, length: int) -> None:
        """Take what is kept of a prefilled prompt; the rest is gone with the staging cache."""
        for layer in range(self.config.layers):
            self._take(layer, b, staged, self.policy.keep_prompt(layer, b, staged))

    def _take(self, layer: int, b: int, staged, kept: Tensor) -> None:
        count = kept.shape[1]
        rows = kept[..., None].expand(-1, -1, self.config.head_dim)  # (G, k, D)
        self.key[layer][b, :, :count] = staged.key[layer][0].gather(1, rows)
        self.value[layer][b, :, :count] = staged.value[layer][0].gather(1, rows)
        self.position[layer][b, :, :count] = kept.int()

    def migrate(self, plan, span: Span) -> None:
        """Begin a step; nothing moves, and who leaves does so when its layer's turn comes."""
        self._plan = plan

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, span: Span) -> Tensor:
        """Drop who does not stay, put key, value (B, G, 1, D) into the first free slot, attend with query."""
        position = self.position[layer]
        position.masked_fill_(~self._plan(layer), -1)
        slot = (position < 0).byte().argmax(-1, keepdim=True)  # (B, G, 1); the same whatever the pool's size
        position.scatter_(2, slot, span.positions[:, None].int().expand_as(slot))
        for pool, row in ((self.key[layer], key), (self.value[layer], value)):
            pool.scatter_(2, slot[..., None].expand_as(row), row)
        own = torch.arange(position.shape[2], device=position.device).expand_as(position)
        nothing = torch.zeros(*query.shape[:2], position.shape[2], device=query.device)  # no marginal tier: (B, H, N)
        out, weight = tiered_attention(query, self.key[layer], self.value[layer], position >= 0, own, nothing)
        self._remember(layer, slot, weight)
        return out

    def _remember(self, layer: int, slot: Tensor, weight: Tensor) -> None:
        """Called with the newest token's slot (B, G, 1) and the weight of every slot (B, H, N) in its attention."""

    def tokens(self, b: int) -> float:
        """Tokens of sequence b that are in the slots now, mean over layers and KV heads."""
        held = [(position[b] >= 0).sum(-1).float().mean().item() for position in self.position]
        return sum(held) / len(held)

    def ledger(self) -> list[Entry]:
        device = self.position[0].device.type
        pools = sum(pool.nbytes for pool in self.key + self.value)
        return [
            Entry("kept K, V", device, pools),
            Entry("slot tables", device, sum(position.nbytes for position in self.position)),
        ]

    @staticmethod
    def predict(config: Config, batch: int, slots: list[int], device: str, dtype: torch.dtype) -> list[Entry]:
        rows = batch * config.kv_heads * sum(slots)
        pools = 2 * rows * config.head_dim * dtype.itemsize
        return [Entry("kept K, V", device, pools), Entry("slot tables", device, rows * torch.int32.itemsize)]


# ---- The policy -----------------------------------------------------------------------------------------------------


class Evicting:
    """What the baselines that evict have in common: `Budget.kept(n)` slots, filled by `priority`, highest first.

    One rule serves the prompt and every step. Before a token comes in, kept - 1 of those that are there stay, and it
    takes the last slot.
    """

    whole_prompt = False
    cache_type = EvictingCache

    def __init__(self, llm: Decoder, budget: Budget):
        self.llm, self.budget, self.models = llm, budget, [llm]

    def priority(self, position: Tensor, score: Tensor | None, length: Tensor, kept: Tensor) -> Tensor:
        """Who stays first, as numbers like position (B, G, N); length and kept (B, 1, 1) count the coming token."""
        raise NotImplementedError

    def slots(self, lengths: list[int], capacity: int) -> list[int]:
        """Slots of each layer: the most that any sequence asks for at the end."""
        most = max(self.budget.kept(capacity, prompt) for prompt in lengths)
        return [most] * self.llm.config.layers

    def make_cache(self, lengths: list[int], capacity: int) -> EvictingCache:
        self.prompts, self.lengths = list(lengths), list(lengths)
        shape = (self.llm.config, len(lengths), self.slots(lengths, capacity), self.llm.device, self.llm.dtype)
        self.cache = self.cache_type(*shape, self)
        return self.cache

    def predict(self, lengths: list[int], capacity: int) -> dict[str, list[Entry]]:
        shape = (self.llm.config, len(lengths), self.slots(lengths, capacity))
        return {"LLM": self.cache_type.predict(*shape, self.llm.device.type, self.llm.dtype)}

    def prefill(self, b: int, prompts, ids, chunks) -> None:
        pass

    def staging(self, b: int, length: int) -> FullCache:
        return FullCache(self.llm.config, 1, length, self.llm.device, self.llm.dtype)

    def prompt_scores(self, layer: int, staged) -> Tensor | None:
        """What the prefill says of every token of the prompt, (G, n); None where nothing is asked."""

    def kept_scores(self, layer: int) -> Tensor | None:
        """The same of every slot by now, (B, G, N)."""

    def keep_prompt(self, layer: int, b: int, staged) -> Tensor:
        n, device = self.prompts[b], self.llm.device
        kept = self.budget.kept(n + 1, n)
        position = torch.arange(n, device=device).expand(self.llm.config.kv_heads, n)
        length = torch.tensor(n + 1, device=device)
        rank = self.priority(position, self.prompt_scores(layer, staged), length, torch.tensor(kept, device=device))
        return rank.argsort(dim=-1, descending=True, stable=True)[:, : kept - 1].sort().values  # (G, kept - 1)

    def observe(self, tokens: list[int], span: Span) -> None:
        self.lengths = [length + 1 for length in self.lengths]
        kept = [self.budget.kept(length, prompt) for length, prompt in zip(self.lengths, self.prompts)]
        self.length, self.kept = column(self.lengths, self.llm.device), column(kept, self.llm.device)

    def plan(self, layer: int) -> Tensor:
        position = self.cache.position[layer]
        used = position >= 0
        priority = self.priority(position, self.kept_scores(layer), self.length, self.kept)
        rank = priority.masked_fill(~used, -torch.inf).argsort(dim=-1, descending=True, stable=True).argsort(-1)
        return used & (rank < self.kept - 1)
