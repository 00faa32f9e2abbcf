"""The SLM's side of a static step when it keeps a share of its cache alone (`--slm-budget`, appendix A.3).

Where it sits: beside `graph_sides.ScoredSide`, in place of it when `Settings.slm_budget` is below 1: tokens -> **SLM ->
scores** -> tier plan. The rule of who leaves is frugal.py's, done on the device for all layers at the start of a step
that plans (kernels_frugal.py): it asks for nothing that the step itself finds out.

The plan of a static step reads scores by position, so here they lie so, (L, B, H, S), 0 for what is not held, and the
table by slot is given up: K and V shrink to the share, the scores stay those of a whole cache. With Qwen2-0.5B these
are 56 bytes a token and layer, beside 512 of K and V. The ledger of the cache counts what is held then, and
`SmallKV.predict(..., static=True)` foretells it.

Shapes follow the legend in model.py; decode drops the T dimension. N is the number of slots.
"""

import torch
from torch import Tensor

from backend import Backend
from frugal import FrugalCache, kept_tokens


class FrugalSide:
    """The SLM on the slots of its `FrugalCache`: make room, attend, and the row goes into the scores.

    From here on score and row of the cache lie by position, for `capacity` of them: its own steps are over.
    """

    def __init__(self, cache: FrugalCache, backend: Backend, length: Tensor, capacity: int, keep_row: bool):
        cache.lay_by_position(capacity)
        self.cache, self.backend, self.length = cache, backend, length
        self.row = cache.row if keep_row else None
        kept = [kept_tokens(cache.share, n) for n in range(capacity + 1)]
        self.kept = torch.tensor(kept, dtype=torch.int32, device=length.device)  # (S + 1,)
        self.slot = torch.zeros(cache.position.shape[:3], dtype=torch.int32, device=length.device)  # of the newest

    def tensors(self) -> list[Tensor]:
        """What this object holds beside the cache, for the ledger."""
        return [self.kept, self.slot]

    def begin(self, plan: bool) -> None:
        """A slot for the newest token in every layer; in a step that plans, who does not stay leaves before."""
        cache = self.cache
        self.backend.make_room(
            cache.position, cache.heavy, cache.score, self.row, self.length, self.kept if plan else None, self.slot
        )

    def attend(self, layer: int, qkv: Tensor, rope, norms) -> Tensor:
        cache, slot = self.cache, self.slot[layer]
        key, value, row = cache.key[layer], cache.value[layer], None if self.row is None else self.row[layer]
        query = self.backend.rope_append(qkv, *rope, self.length, norms, key, value, slot, slot)
        return self.backend.slot_attention(
            query, key, value, cache.position[layer], cache.heavy[layer], cache.score[layer], cache.decay, row
        )
