"""Caches that take several new tokens at once and give back those that are not kept.

Where it sits: under speculative.py, in place of the caches of cache.py and frugal.py. A round: the SLM takes the newest
token and then its own drafts one by one, the LLM takes all of them in one forward; then `keep` is told how many of each
sequence count. What a run without drafts would not have is gone after it:

- scores: the rows of a round wait in a table and are added for the kept tokens alone, one after the other, as the
  plain cache adds them, so the sums are the same to the bit;
- tiers and slots: the slots of the others are free again; the host is written for the kept ones alone;
- K and V of a full cache: what lies at or beyond a sequence's length is never seen, and overwritten once it is reached.

Shapes follow the legend in model.py; T counts the tokens of a round, the newest one and its drafts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from cache import TieredCache
from frugal import FrugalCache
from full_cache import Entry, ScoredCache
from kernels import tiered_attention_block
from model import Span


class Waiting:
    """What both SLM caches add: rows (L, B, H, T, S) fp32 of a round's tokens wait until it is known who is kept.

    at: the place in the round of the token that is being taken; None outside a round, as in a prefill.
    """

    def __init__(self, drafts: int, *shape):
        super().__init__(*shape)
        self.rows = torch.zeros(*self.score.shape[:3], drafts + 1, self.score.shape[3], device=self.score.device)
        self.at: int | None = None

    def _remember(self, layer: int | slice, row: Tensor) -> None:
        if self.at is None:
            super()._remember(layer, row)
        else:  # what an earlier round left behind the end of this one is no attention
            self.rows[layer, :, :, self.at] = F.pad(row, (0, self.rows.shape[-1] - row.shape[-1]))

    def foreseen(self, allowed: Tensor) -> Tensor:
        """Scores to plan a round by, (L, B, H, S): each token's largest one after any token of the round.

        allowed (B,): how many of a sequence's drafts count; the newest token always does.
        """
        score = self.score
        best = torch.zeros_like(score)
        for t in range(self.at + 1):
            score = self.decay * score + self.rows[:, :, :, t]  # as `_remember` would add them one after the other
            own = (allowed >= t)[:, None, None]
            best = best.maximum(score.where(own, 0))
        return best

    def keep(self, positions: list[int], kept: list[int]) -> None:
        """End the round: of sequence b, whose round began at positions[b], the first kept[b] tokens count."""
        self.at = None
        for b, count in enumerate(kept):
            view = self.sequence(b)
            for t in range(count):
                view._remember(slice(None), view.rows[..., t, :])

    def sequence(self, b: int, count: int = 1):
        view = super().sequence(b, count)
        view.rows = self.rows[:, b : b + count]
        return view

    def ledger(self) -> list[Entry]:
        return super().ledger() + [Entry("rows of drafts", self.rows.device.type, self.rows.nbytes)]


class DraftedScores(Waiting, ScoredCache):
    """The SLM's whole cache."""


class DraftedFrugal(Waiting, FrugalCache):
    """The SLM's cache with a budget."""

    def keep(self, positions: list[int], kept: list[int]) -> None:
        super().keep(positions, kept)
        free_from(self.position, [p + k for p, k in zip(positions, kept)])  # no score has reached these slots


def free_from(table: Tensor, ends: list[int]) -> None:
    """Free the slots, table (L, B, G, slots) of positions, of tokens that stand at or beyond a sequence's end."""
    end = torch.tensor(ends, device=table.device)[:, None, None]  # (B, 1, 1)
    table.masked_fill_(table >= end, -1)


class DraftedTiers(TieredCache):
    """The LLM's three tiers, T new tokens of each sequence at a time: all of them critical while they are verified.

    newest (2, L, B, G, T, D): K and V of the round's tokens, from which the host gets those that are kept.
    """

    def __init__(self, drafts: int, *shape):
        super().__init__(*shape)
        self.newest = torch.empty(*self.newest.shape[:-1], drafts + 1, self.newest.shape[-1],
                                  device=self.newest.device, dtype=self.newest.dtype)  # fmt: skip

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, span: Span) -> Tensor:
        """Put key, value (B, G, T, D) into their slots, then attend with query (B, H, T, D), Eq. 6 for each of them."""
        T = query.shape[2]
        borrowed = self._arrived(layer)  # (B, H * T, N), or (B, H, N) zeros
        key, value = self._put(layer, key, value, span)
        self.newest[0, layer, :, :, :T], self.newest[1, layer, :, :, :T] = key, value
        token = self.key_position[layer][:, :, None]  # (B, G, 1, C)
        seen = (token >= 0) & (token <= span.positions[:, None, :, None])  # (B, G, T, C)
        borrowed = borrowed.unflatten(1, (query.shape[1], -1)).expand(-1, -1, T, -1)  # (B, H, T, N)
        slots = self.value_slot[layer].long()
        out, _ = tiered_attention_block(query, *self._pools(layer), seen, slots, borrowed)
        if self.prefetch:
            self._prefetch(layer + 1)
        return out

    def keep(self, positions: list[int], kept: list[int]) -> None:
        """End the round: the kept tokens' K and V go to the host, the slots of the others are free."""
        for b, (at, count) in enumerate(zip(positions, kept)):
            for host, made in zip((self.host_key, self.host_value), self.newest):
                host[:, b, :, at : at + count] = made[:, b, :, :count]  # (L, G, count, D)
        ends = [at + count for at, count in zip(positions, kept)]
        free_from(self.key_position, ends)
        free_from(self.value_position, ends)
