"""A round of drafts with fixed shapes, so that on a GPU it is one CUDA graph: K + 1 steps of the SLM, one of the LLM.

Where it sits: in place of `SpeculativeSession.round` (speculative.py), after the same prefill, on the same caches, as
graph.py's `Step` is in place of `Session.step`. The round is an ordinary function (`Round.body`) that runs eagerly
anywhere; on CUDA it is captured once and replayed:

    SLM: newest token, then K drafts, unrolled; their rows wait           kernels_decode.py
    rows -> the scores that the round foresees                            kernels_verify.py
    first side stream: scores -> plan -> slots                            kernels_scores.py, kernels_plan.py
    the drafts take free ones                                             kernels_verify.py
    second side stream, layer by layer: rows from the host                kernels_move.py
    LLM layers on B * T rows: attention of T queries, Eq. 6 for each      kernels_verify.py
    first side stream again: K and V of the round to the host             kernels_move.py
    logits -> drafts accepted, the token after them, stop tokens          speculative.py
    kept rows into the scores, slots of refused drafts free, lengths      kernels_verify.py

What the eager round asks of the host is a tensor here: how many drafts each sequence may take (`allowed`, -1 for one
that has ended), the random numbers, the stop tokens. All K drafts are made in every round; those beyond a sequence's
own are never accepted and have no say in its plan. The host reads the answers once a round, to stream them.

**What a refused draft leaves behind**: nothing that is read. Its row is not folded into the scores; its slots are free.
Its K and V stay in the full cache of the SLM, and on the host, where the whole round is stored: both lie at or beyond
the sequence's length, which nothing reads, and the next round's tokens are written there first. The rows that wait are
not wiped either: of row t only what stands up to its own token is folded.

Shapes follow the legend in model.py; T = K + 1 tokens of a round. Rows of the LLM's layers count B * T, a sequence's
own one after the other.
"""

import gc

import torch
import torch.nn.functional as F
from torch import Tensor

from backend import Backend
from decode import Sampler
from full_cache import FullCache
from graph_sides import FullSide, TieredSide
from kernels_scores import CRITICAL
from layers import Layers
from quantize import run_on
from speculative import SpeculativeSession, accept_greedy, accept_sampled, draw


class WaitingSide:
    """The SLM at one place of a round: append, attend, and its row waits."""

    def __init__(self, cache, backend: Backend, length: Tensor, place: int):
        self.cache, self.backend, self.length, self.place = cache, backend, length, place

    def attend(self, layer: int, qkv: Tensor, rope, norms) -> Tensor:
        key, value = self.cache.key[layer], self.cache.value[layer]
        query = self.backend.rope_append(qkv, *rope, self.length, norms, key, value)
        row = self.cache.rows[layer, :, :, self.place]  # (B, H, S)
        # With decay 0 a score is the newest row, so the table takes the row itself.
        return self.backend.scored_attention(query, key, value, self.length, row, 0.0)


class VerifyFull(FullSide):
    """The LLM on its full cache, T tokens a sequence."""

    def __init__(self, cache: FullCache, backend: Backend, length: Tensor, tokens: int):
        super().__init__(cache, backend, length)
        self.tokens = tokens

    def attend(self, layer: int, qkv: Tensor, rope, norms) -> Tensor:
        key, value = self.cache.key[layer], self.cache.value[layer]
        query = self.backend.rope_append(qkv, *rope, self.length, norms, key, value, tokens=self.tokens)
        query = query.unflatten(0, (-1, self.tokens))  # (B, T, H, D)
        return self.backend.verify_attention(query, key, value, self.length).flatten(0, 1)


class VerifyTiers(TieredSide):
    """The LLM on its tiers, T tokens a sequence: planned by what the whole round foresees, the drafts in free slots."""

    def __init__(self, policy, backend: Backend, length: Tensor, tokens: int):
        if policy.settings.slm_budget < 1:
            share = policy.settings.slm_budget
            raise ValueError(f"no graph of drafts with {share} of the SLM's cache: use the plain rounds")
        super().__init__(policy, backend, length)
        self.tokens = tokens
        L, B, G = self.key_slot.shape
        device, shape = self.key_slot.device, policy.slm_cache.score.shape
        self.foreseen = torch.zeros(shape, device=device)
        self.key_slots = torch.zeros(L, B, tokens, G, dtype=torch.int32, device=device)
        self.value_slots = torch.zeros_like(self.key_slots) if self.marginal else self.key_slots
        # The bytes of the eager table in the order in which the rows come: a sequence's tokens, then KV heads.
        self.newest = self.cache.newest.view(2, L, B, tokens, G, -1)
        if self.marginal:
            self.borrowed = torch.zeros(tokens, *self.borrowed.shape, device=device)  # (T, L, B, H, N)

    @property
    def ranking(self) -> Tensor:
        return self.foreseen

    def foresee(self, count: Tensor) -> None:
        """The scores to plan by, from the rows of each sequence's newest token and count - 1 drafts."""
        slm = self.policy.slm_cache
        self.backend.fold_rows(slm.score, slm.rows, self.length, count, slm.decay, self.foreseen, True)

    def keep(self, kept: Tensor) -> None:
        """End the round: kept (B,) int32 rows go into the scores, and the slots of all tokens after them are free."""
        slm = self.policy.slm_cache
        self.backend.fold_rows(slm.score, slm.rows, self.length, kept, slm.decay, slm.score, False)
        end = (self.length - 1 + kept)[:, None, None]  # (B, 1, 1)
        for table in (self.cache.key_position, self.cache.value_position)[: 1 + self.marginal]:
            table.masked_fill_(table >= end, -1)
        token = torch.arange(self.tier.shape[3], device=end.device)  # the next plan must find there who is held
        self.tier.masked_fill_(token >= self.length[:, None, None], CRITICAL).masked_fill_(token >= end, 0)

    def _plan(self, layers: slice) -> None:
        super()._plan(layers)
        if not self.marginal:
            self._admit_drafts(layers)

    def _lend(self, layers: slice) -> None:
        """Each token of the round lends its own row."""
        self._admit_drafts(layers)
        cache = self.cache
        for t, borrowed in enumerate(self.borrowed):
            self.backend.lend_rows(
                self.policy.slm_cache.rows[:, :, :, t], self.policy.index[:, layers], self.tier[layers],
                cache.key_position[layers], cache.value_position[layers], cache.value_slot[layers], borrowed[layers],
            )  # fmt: skip

    def _admit_drafts(self, layers: slice) -> None:
        """The drafts are critical while they are verified: the plan has left slots for them."""
        cache, admit = self.cache, self.backend.admit_drafts
        admit(cache.key_position[layers], self.length, self.key_slot[layers], self.key_slots[layers])
        if self.marginal:
            admit(cache.value_position[layers], self.length, self.new_value_slot[layers], self.value_slots[layers])

    def attend(self, layer: int, qkv: Tensor, rope, norms) -> Tensor:
        cache = self.cache
        if self.arrived:
            torch.cuda.current_stream().wait_event(self.arrived[layer])
        key, value = cache.key[layer], cache.value[layer]
        scales = cache.scales(layer)
        slots = [table[layer].flatten(0, 1) for table in (self.key_slots, self.value_slots)]  # (B * T, G)
        query = self.backend.rope_append(
            qkv, *rope, self.length, norms, key, value, *slots, newest=self.newest[:, layer].flatten(1, 2),
            tokens=self.tokens, scales=scales,
        )  # fmt: skip
        self.store(layer)
        tables = (cache.value_slot[layer], self.borrowed[:, layer]) if self.marginal else (None, None)
        query = query.unflatten(0, (-1, self.tokens))  # (B, T, H, D)
        position = cache.key_position[layer]
        out = self.backend.verify_attention(query, key, value, self.length, position, *tables, scales)
        return out.flatten(0, 1)


class Round:
    """Rounds of one prefilled session. `run` is one round; its last tokens are fed to the next by the round itself.

    tokens (B,): each sequence's newest token, in no cache yet. allowed (B,) int32: how many drafts it takes, -1 if it
    has ended. chance (B, 2K + 1): see `SpeculativeSession.chances`; not read where the sampler is greedy. After a round
    fed (B, T) holds what was fed, answer (B, T) the new tokens and kept (B,) int32 how many of them count.
    """

    warm = 2  # rounds before a capture: the first plan fills the pools without a limit on moves, the second has it

    def __init__(self, session: SpeculativeSession, backend: Backend, sampler: Sampler, stop: set[int] = frozenset()):
        """session: prefilled, in no round yet."""
        self.session, self.backend, self.sampler, self.stop = session, backend, sampler, stop
        policy, device, B = session.policy, session.llm.device, len(session.lengths)
        self.drafts, T = policy.drafts, policy.drafts + 1
        integers = {"dtype": torch.int32, "device": device}
        self.tokens = torch.zeros(B, dtype=torch.long, device=device)
        self.length = torch.tensor(session.lengths, **integers)  # (B,), the newest token not included
        self.allowed = torch.full((B,), self.drafts, **integers)
        self.chance = torch.zeros(B, 2 * self.drafts + 1, device=device)
        self.ends = torch.zeros(session.vocab, dtype=torch.bool, device=device)  # which tokens are stop tokens
        self.ends[[token for token in stop if token < session.vocab]] = True
        self.fed, self.answer = torch.zeros(2, B, T, dtype=torch.long, device=device)
        self.kept = torch.zeros(B, **integers)
        self.place = torch.arange(T, **integers)
        self.at = self.length + 1 + self.place[:, None]  # (T, B): lengths with the token of each place
        self.llm, self.slm = (Layers(model, session.capacity, backend) for model in (session.llm, policy.slm))
        self.tiered = not isinstance(session.cache, FullCache)
        if self.tiered:
            self.side, self.moves = VerifyTiers(policy, backend, self.at[0], T), policy.settings.max_moves
            self.drafting = [WaitingSide(policy.slm_cache, backend, self.at[t], t) for t in range(T)]
        else:
            self.side = VerifyFull(session.cache, backend, self.at[0], T)
            self.drafting = [FullSide(policy.slm_cache, backend, self.at[t]) for t in range(T)]
        self.rounds, self.graph = 0, None

    @torch.inference_mode()
    def body(self) -> None:
        """One round: everything on the device, nothing returned; the same function is run eagerly and captured."""
        self.at.copy_(self.length + 1 + self.place[:, None])
        believed = self._draft()
        if self.tiered:
            self.side.foresee(self.allowed.clamp(min=0) + 1)
        self.side.begin(plan=True)
        hidden = self.llm.run(self.fed.flatten(), self.side.attend)  # (B * T, hidden)
        logits = self.session.llm.lm_head(hidden)[:, : self.session.vocab].unflatten(0, self.fed.shape)
        self._settle(*self.accept(logits, believed))
        self.side.join()

    def _draft(self) -> list[Tensor]:
        """K drafts, and the SLM's step on the last of them; what each was drawn from, (B, V), if they are sampled."""
        self.fed[:, 0] = self.tokens
        believed = []
        for t, side in enumerate(self.drafting):
            hidden = self.slm.run(self.fed[:, t], side.attend)
            if t == self.drafts:
                break
            logits = self.session.policy.slm.lm_head(hidden)[:, : self.session.vocab]
            if self.sampler.temperature == 0:
                self.fed[:, t + 1] = logits.argmax(-1)
            else:
                believed.append(self.sampler.probabilities(logits))
                self.fed[:, t + 1] = draw(believed[-1], self.chance[:, t])
        return believed

    def accept(self, logits: Tensor, believed: list[Tensor]) -> tuple[Tensor, Tensor]:
        """logits (B, T, V) of the LLM: how many drafts stay, and the token after them."""
        drafts = self.fed[:, 1:]
        if self.sampler.temperature == 0:
            return accept_greedy(drafts, logits.argmax(-1), self.allowed)
        wanted = self.sampler.probabilities(logits)
        return accept_sampled(drafts, torch.stack(believed, 1), wanted, self.allowed, self.chance[:, self.drafts :])

    def _settle(self, count: Tensor, after: Tensor) -> None:
        """The answers end at the first stop token; what is kept of the round is kept, and nothing else."""
        count = count[:, None]
        self.answer.copy_(F.pad(self.fed[:, 1:], (0, 1)).where(self.place < count, after[:, None]))
        ends = self.ends[self.answer] & (self.place <= count)  # (B, T)
        last = torch.where(ends, self.place, count).amin(-1)
        self.kept.copy_((last + 1).where(self.allowed >= 0, 0))
        self.tokens.copy_(self.answer.gather(1, last[:, None])[:, 0])
        if self.tiered:
            self.side.keep(self.kept)
        self.length += self.kept

    def run(self) -> None:
        """One round, replayed if it was captured."""
        if self.graph is not None:
            self.graph.replay()
        else:
            self.body()
        self.rounds += 1
        if self.tiered:
            self.side.moves = self.moves

    def capture(self) -> None:
        """Record the body as a CUDA graph, once `warm` rounds have compiled the kernels and filled the pools."""
        gc.collect()  # as in graph.Step.capture
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        # Recording runs nothing: the state stays as it is. thread_local: NCCL's own thread may go on meanwhile.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.body()


class StaticSpeculativeSession(SpeculativeSession):
    """A session for speculate_ids whose rounds are static ones: captured on CUDA, run eagerly elsewhere."""

    def __init__(self, backend: Backend, *args, **options):
        super().__init__(*args, **options)
        self.backend, self.static = backend, None
        for model in self.policy.models:
            run_on(model, backend)

    @torch.inference_mode()
    def round(
        self, newest: list[int], allowed: list[int | None], sampler: Sampler, generators: list[torch.Generator],
        stop: set[int] = frozenset(),
    ) -> list[list[int]]:  # fmt: skip
        """As SpeculativeSession.round; sampler and stop tokens are those of the first round (ValueError)."""
        if self.static is None:
            self.static = Round(self, self.backend, sampler, set(stop))
        static, policy = self.static, self.policy
        if (static.sampler, static.stop) != (sampler, set(stop)):
            raise ValueError("a captured round cannot change its sampler or stop tokens; make a new session")
        self.begun.append(list(self.lengths))
        static.tokens.copy_(torch.tensor(newest))
        static.allowed.copy_(torch.tensor([-1 if count is None else count for count in allowed]))
        static.chance.copy_(self.chances(generators))
        if static.tiered:
            policy.begin(newest)
        if static.rounds == static.warm and static.tokens.is_cuda:
            static.capture()
        static.run()
        kept = static.kept.tolist()
        answers = [row[:count] for row, count in zip(static.answer.tolist(), kept)]
        if static.tiered:
            policy.settle(static.fed.tolist(), kept)
            static.side.report(static.rounds)
        self._count(allowed, kept)
        return answers
