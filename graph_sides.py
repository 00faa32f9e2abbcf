"""What each model attends to in a step with fixed shapes, and on which stream: full cache, scores, tiers.

Where it sits: under graph.py, which runs both models' layers and hands each of them one of these as what attends; the
LLM's plan and movement are begun here, on side streams: SLM -> scores -> **tier plan -> migration** -> LLM.

Shapes follow the legend in model.py; decode drops the T dimension.
"""

import torch
from torch import Tensor

from backend import Backend
from full_cache import FullCache
from kernels_move import Moves
from kernels_plan import row_warps
from kernels_scores import CRITICAL, MARGINAL
from kernels_tiers import admit_newest

STORE = 4  # layers whose newest rows go to the host in one launch
HURRY = 2  # layers at a step's beginning whose plans the LLM waits for
WARPS = 132 * 16  # of a plan in one launch: 16 for each of an H100's multiprocessors, the largest program


def layers_together(rows: int, capacity: int) -> int:
    """How many LLM layers may share the launch of their plans; rows: of one layer, one for a sequence and KV head."""
    return max(1, WARPS // (rows * row_warps(capacity)))


def plan_groups(needed: list[int], together: int) -> list[slice]:
    """LLM layers whose plans share a launch: at most `together`, all with the same need of SLM layers (L,)."""
    groups = [slice(0, 1)]
    for layer in range(1, len(needed)):
        first = groups[-1].start
        if needed[layer] == needed[first] and layer - first < together:
            groups[-1] = slice(first, layer + 1)
        else:
            groups.append(slice(layer, layer + 1))
    return groups


class FullSide:
    """The LLM on its full cache: append, attend."""

    def __init__(self, cache: FullCache, backend: Backend, length: Tensor):
        self.cache, self.backend, self.length = cache, backend, length

    def begin(self, plan: bool) -> None:
        """Nothing to plan."""

    def join(self) -> None:
        """Nothing to wait for."""

    def attend(self, layer: int, qkv: Tensor, rope, norms) -> Tensor:
        key, value = self.cache.key[layer], self.cache.value[layer]
        scales = self.cache.scales(layer)
        query = self.backend.rope_append(qkv, *rope, self.length, norms, key, value, scales=scales)
        return self.backend.decode_attention(query, key, value, self.length, scales)


class ScoredSide:
    """The SLM on its full cache: append, attend, and the row goes into the scores.

    With decay 0 and no rows to lend (the default: fused scores) the score of the cache holds logits from the first step
    on, up to each length, fp16 for 16-bit models, else fp32. The attention row is 2 ** (score - lse), lse (L', B, H')
    fp32: `sum_scores` takes both. Both are less anchor (L', B, H') fp32, the log of each head's sum in the step before;
    the first step makes its own, by attending twice. Else lse and anchor are None, and the score is what ScoredCache
    says.
    """

    def __init__(self, cache, backend: Backend, length: Tensor, keep_row: bool):
        self.cache, self.backend, self.length, self.keep_row = cache, backend, length, keep_row
        self.lse = self.anchor = None
        self.steps = 0
        if cache.decay == 0 and not keep_row:
            cache.hold_logits()
            self.lse, self.anchor = torch.zeros(2, *cache.score.shape[:3], device=length.device)

    def tensors(self) -> list[Tensor]:
        """What this object holds beside the cache, for the ledger."""
        return [] if self.lse is None else [self.lse, self.anchor]

    def begin(self, plan: bool) -> None:
        """Nobody leaves."""
        self.steps += 1

    def attend(self, layer: int, qkv: Tensor, rope, norms) -> Tensor:
        key, value = self.cache.key[layer], self.cache.value[layer]
        scales = self.cache.scales(layer)
        query = self.backend.rope_append(qkv, *rope, self.length, norms, key, value, scales=scales)
        row = self.cache.row[layer] if self.keep_row else None
        logs = (None, None) if self.lse is None else (self.lse[layer], self.anchor[layer])
        asked = query, key, value, self.length, self.cache.score[layer], self.cache.decay, row, *logs, scales
        if self.steps == 1 and self.lse is not None:
            self.backend.scored_attention(*asked)
        return self.backend.scored_attention(*asked)


class TieredSide:
    """The LLM on its tiers; the plan of its layers and the movement it asks for run on side streams.

    moves: at most that many tokens enter a critical set at a plan (`--max-moves`); None is no limit, and what the first
    plan has, which fills the pools. `prior` (B, S) fp32, if set, is added to the scores: bench.py drives the turnover
    of the tiers with it. lse (L', B, H') fp32: the SLM's scores are logits, see ScoredSide; None: they are scores.
    """

    def __init__(self, policy, backend: Backend, length: Tensor, lse: Tensor | None = None):
        settings = policy.settings
        if not settings.static:
            raise ValueError("no graph without saliency shift (its plan needs the weights of the step before) nor with "
                             "a gate: use the plain steps")  # fmt: skip
        self.policy, self.cache, self.backend, self.length, self.lse = policy, policy.cache, backend, length, lse
        self.cache.finish_loading()
        self.marginal, self.fused, self.decay = settings.marginal, settings.fused, settings.score_decay
        self.moves, self.prior = None, None
        L, B, G, _ = self.cache.key_position.shape
        N, S = self.cache.value_position.shape[3], self.cache.capacity
        device = self.cache.key.device
        table = [settings.planned(n) for n in range(S + 1)]
        rows = [(size.critical, size.recent, size.marginal) for size in table]
        self.sizes = torch.tensor(rows, dtype=torch.int32, device=device)  # (S + 1, 3)
        # The LLM may be layers behind the side streams: everything is kept for each layer.
        self.key_slot = torch.zeros(L, B, G, dtype=torch.int32, device=device)
        self.new_value_slot = torch.zeros_like(self.key_slot) if self.marginal else self.key_slot
        self.tier = torch.zeros(L, B, G, S, dtype=torch.int8, device=device)
        self.cut = torch.zeros_like(self.key_slot)  # where the last critical set ended, see plan_layers
        self.key_moves = Moves.none(self.cache.key_position)
        self.value_moves = Moves.none(self.cache.value_position) if self.marginal else self.key_moves
        self.moved = torch.zeros(2, 1, dtype=torch.int64, device=device)  # keys and values brought from the host
        self.newest = self.cache.newest.unsqueeze(3)  # (2, L, B, 1, G, D)
        self.borrowed = None
        if not self.marginal:
            self.cache.value_position = self.cache.key_position  # both pools hold the same tokens in the same slots
        else:
            self.borrowed = torch.zeros(L, B, self.policy.llm.config.query_heads, N, device=device)
        self.needed = policy.needed
        self.groups = plan_groups(self.needed, layers_together(B * G, S))
        # First in the queue: the LLM's layer waits for them, and they leave room for the LLM's kernels beside them.
        cuda = device.type == "cuda"
        self.planner, self.mover = (torch.cuda.Stream(device, priority=-1) if cuda else None for _ in range(2))
        self.arrived: list[torch.cuda.Event] = []  # by layer, in a step that plans

    def tensors(self) -> list[Tensor]:
        """What this object holds beside the caches, for the ledger; `newest` is a view of the cache's."""
        held = [value for name, value in vars(self).items() if torch.is_tensor(value) and name != "newest"]
        held += [*self.key_moves, *self.value_moves]
        return list({tensor.data_ptr(): tensor for tensor in held}.values())

    def moved_rows(self) -> tuple[int, int]:
        """Keys and values that came from the host so far; without a marginal tier they come together."""
        keys, values = self.moved.flatten().tolist()
        return keys, values if self.marginal else keys

    def report(self, steps: int) -> None:
        """Write into the cache what the eager one counts itself, after `steps` steps or rounds."""
        cache = self.cache
        cache.keys_moved, cache.values_moved = self.moved_rows()
        cache.steps = steps
        if steps == 1:
            cache.filled = cache.keys_moved + cache.values_moved

    @property
    def ranking(self) -> Tensor:
        """What the plan ranks by, (L', B, H', S) fp32; logits if there is an lse, which may be fp16."""
        return self.policy.slm_cache.score

    def begin(self, plan: bool, done: list[torch.cuda.Event] | None = None) -> None:
        """Plan and move every layer, on the side streams where there are any; or take in the newest token alone.

        done: by SLM layer, when its rows are there, if the SLM runs beside; None: it is through.
        """
        self.arrived = []
        if not plan:
            if done is not None:
                torch.cuda.current_stream().wait_event(done[-1])
            self._admit()
            return
        if self.planner is not None:
            self.planner.wait_stream(torch.cuda.current_stream())
            self.mover.wait_stream(torch.cuda.current_stream())  # the last step read the slots there
        with torch.cuda.stream(self.planner):  # None: where we are
            self.key_moves.count.zero_()
            if self.marginal:  # else both are the same lists
                self.value_moves.count.zero_()
        for layers in self.groups:
            if done is not None:
                self.planner.wait_event(done[self.needed[layers.start] - 1])
            with torch.cuda.stream(self.planner):
                self._plan(layers)
            if self.mover is not None:
                self.mover.wait_stream(self.planner)
            with torch.cuda.stream(self.mover):
                for layer in range(layers.start, layers.stop):
                    self._bring(layer)
                    if self.mover is not None:
                        self.arrived.append(self.mover.record_event())

    def store(self, layer: int) -> None:
        """The newest rows up to this layer go to the host, STORE layers at a time, after all plans of the step."""
        layers = slice(layer // STORE * STORE, layer + 1)
        if layer + 1 < len(self.cache.key) and layers.stop - layers.start < STORE:
            return
        if self.planner is not None:
            self.planner.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.planner):
            cache = self.cache
            self.backend.store_rows(self.newest[:, layers], cache.host[layers], self.length)

    def _plan(self, layers: slice) -> None:
        """Tiers and slots of these layers, and what their marginal slots borrow."""
        cache, tier, rows = self.cache, self.tier[layers], self.cache.host.shape[3]
        total = torch.empty(tier.shape, device=tier.device)
        memory = cache.score[layers] if self.fused else None
        index = self.policy.index[:, layers]
        self.backend.sum_scores(self.ranking, index, self.length, total, self.lse, memory, self.decay)
        self.backend.plan_layers(
            total, self.length, self.sizes, tier, cache.key_position[layers], self.moves, memory,
            (rows, self.key_moves.of(layers), self.key_slot[layers], self.moved[0]), self.prior,
            layers.start < HURRY, self.cut[layers],
        )  # fmt: skip
        if self.marginal:
            values, slot = cache.value_position[layers], self.new_value_slot[layers]
            moves = self.value_moves.of(layers)
            self.backend.assign_slots(values, tier, MARGINAL, self.length, rows, moves, slot, self.moved[1])
            self._lend(layers)

    def _admit(self) -> None:
        admit_newest(self.cache.key_position, self.length, self.key_slot)
        if self.marginal:
            admit_newest(self.cache.value_position, self.length, self.new_value_slot)
            self._lend(slice(None))
        newest = (self.length - 1).long()[:, None, None].expand(*self.tier.shape[:3], 1)  # (L, B, G, 1)
        self.tier.scatter_(-1, newest, CRITICAL)
        if self.fused:
            row, index = self.policy.slm_cache.score, self.policy.index
            memory = self.cache.score
            self.backend.sum_scores(row, index, self.length, memory, self.lse, memory, self.decay, self.tier)

    def _lend(self, layers: slice) -> None:
        cache = self.cache
        self.backend.lend_rows(
            self.policy.slm_cache.row, self.policy.index[:, layers], self.tier[layers], cache.key_position[layers],
            cache.value_position[layers], cache.value_slot[layers], self.borrowed[layers],
        )  # fmt: skip

    def _bring(self, layer: int) -> None:
        cache = self.cache
        self.backend.bring_rows(
            cache.key[layer], cache.value[layer], cache.host[layer], self.key_moves.of(layer),
            self.value_moves.of(layer) if self.marginal else None,
        )  # fmt: skip

    def attend(self, layer: int, qkv: Tensor, rope, norms) -> Tensor:
        cache = self.cache
        if self.arrived:
            torch.cuda.current_stream().wait_event(self.arrived[layer])
        key, value, position = cache.key[layer], cache.value[layer], cache.key_position[layer]
        slots, scales = (self.key_slot[layer], self.new_value_slot[layer]), cache.scales(layer)
        query = self.backend.rope_append(
            qkv, *rope, self.length, norms, key, value, *slots, newest=cache.newest[:, layer], scales=scales
        )
        self.store(layer)
        lent = (cache.value_slot[layer], self.borrowed[layer]) if self.marginal else (None, None)
        memory = cache.score[layer] if self.fused else None
        return self.backend.tiered_attention(query, key, value, position, *lent, memory, self.decay, scales)

    def join(self) -> None:
        """The side streams' last work belongs to this step: a captured graph must end on one stream."""
        if self.mover is not None:
            torch.cuda.current_stream().wait_stream(self.planner)
            if self.arrived:
                torch.cuda.current_stream().wait_stream(self.mover)
