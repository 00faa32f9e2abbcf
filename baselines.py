"""What SmallKV is measured against, as policies for the same decoder and the same caches.

Where it sits: beside smallkv.py; decode.Session asks a policy for its plan and knows no more. `decode.FullPolicy` keeps
everything. `Window` keeps the newest tokens alone: the least a method must beat.
"""

import torch

from cache import TieredCache, TierPlan
from model import Decoder, Span
from smallkv import TierSizes, plan_tiers, pool_slots


class Window:
    """The last `budget` share of the tokens, K and V; nothing else is seen again."""

    name = "window"

    def __init__(self, llm: Decoder, budget: float):
        self.llm, self.budget, self.models = llm, budget, [llm]

    def sizes(self, length: int) -> TierSizes:
        kept = max(1, int(self.budget * length + 1e-9))
        return TierSizes(kept, kept, 0)

    def make_cache(self, lengths: list[int], capacity: int) -> TieredCache:
        self.lengths = list(lengths)
        slots = pool_slots(self.sizes, min(lengths), capacity)
        device, dtype = self.llm.device, self.llm.dtype
        return TieredCache(self.llm.config, len(lengths), capacity, *slots, device, dtype)

    def predict(self, lengths: list[int], capacity: int) -> dict[str, list]:
        slots = pool_slots(self.sizes, min(lengths), capacity)
        device, dtype = self.llm.device.type, self.llm.dtype
        return {"LLM": TieredCache.predict(self.llm.config, len(lengths), capacity, *slots, device, dtype)}

    def prefill(self, b: int, tokens: list[int], chunks: list[tuple[int, int]]) -> None:
        pass

    def observe(self, tokens: list[int], span: Span) -> None:
        self.lengths = [length + 1 for length in self.lengths]
        self.end = span.end

    def plan(self, layer: int) -> TierPlan:
        batch, kv_heads = len(self.lengths), self.llm.config.kv_heads
        scores = torch.zeros(batch, kv_heads, self.end, device=self.llm.device)
        sizes = [self.sizes(length) for length in self.lengths]
        return TierPlan(*plan_tiers(scores, sizes, self.lengths), None)
