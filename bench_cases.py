"""What bench_kernels.py times: each kernel of a decode step as a call on random inputs, and the bytes it cannot avoid.

Where it sits: under bench_kernels.py. `CASES` is the table: kernel -> what of it is timed -> a function that makes one
call for a setting. Bytes are those of the tensors themselves, cut to what must be read or written of them.

Shapes follow the legend in model.py; decode drops the T dimension.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench_clock import random_decoder
from bench_count import layer_bytes, layer_products, observed_bytes
from bench_shapes import FP32, Call, Shape
from full_cache import FullCache, ScoredCache, logits_dtype
from graph_sides import STORE, FullSide, ScoredSide
from host_memory import host_rows
from kernels_move import Moves
from kernels_scores import CRITICAL
from layers import Layers
from model import Config
from settings import Settings

NONE = (None, None)
FEW = 64  # positions of a pool where a call writes one row of each head: how many lie around costs nothing


# ---- Attention -------------------------------------------------------------------------------------------------------


def pools(at: Shape, config: Config, key_slots: int, value_slots: int, int8: bool) -> tuple[Tensor, Tensor, tuple]:
    """K and V of one layer; in 8 bits, and then their scales."""
    key, value = (at.pool(config, slots, int8=int8) for slots in (key_slots, value_slots))
    scales = ()
    if int8:
        scales = tuple(at.draw(2, at.batch, config.kv_heads, 2, config.head_dim, dtype=torch.float32, scale=0.01))
    return key, value, scales


def decode_attention(at: Shape, int8: bool = False) -> Call:
    query, (key, value, scales) = at.query(at.llm), pools(at, at.llm, at.capacity, at.capacity, int8)
    seen = [pool[:, :, : at.tokens] for pool in (key, value)]
    return Call(lambda: at.backend.decode_attention(query, key, value, at.length, scales or NONE),
                [query, *seen, at.length, *scales], [query])  # fmt: skip


def scored_attention(at: Shape, decay: float, logits: bool = False, int8: bool = False) -> Call:
    """logits: they are the scores, with one log of their sum a head, as in a step with fused scores."""
    query, (key, value, scales) = at.query(at.slm), pools(at, at.slm, at.capacity, at.capacity, int8)
    score = torch.rand(at.batch, at.slm.query_heads, at.capacity, device=at.device)
    score, logs = score.to(logits_dtype(at.dtype) if logits else score.dtype), []
    row, seen = score[..., : at.tokens], [pool[:, :, : at.tokens] for pool in (key, value)]
    if logits:
        logs = list(torch.zeros(2, *score.shape[:2], device=at.device))
    more = *(logs or NONE), scales or NONE
    return Call(lambda: at.backend.scored_attention(query, key, value, at.length, score, decay, None, *more),
                [query, *seen, at.length, *scales, *[row] * (decay > 0), *logs[1:]], [query, row, *logs])  # fmt: skip


def tiered_attention(at: Shape, marginal: bool, remembered: bool, int8: bool = False) -> Call:
    """remembered: what each token weighs is added to the score memory."""
    size, (slots, value_slots) = at.sizes[marginal], at.slots[marginal]
    tokens = size.critical + size.marginal
    query, (key, value, scales) = at.query(at.llm), pools(at, at.llm, slots, value_slots, int8)
    position, lent = at.positions(size.critical, slots), []
    memory, added = at.memory() if remembered else None, remembered * at.remembered.itemsize * at.pairs * size.critical
    if marginal:
        where = at.pick(tokens, tokens)
        value_slot = F.pad(where[..., : size.critical], (0, slots - size.critical)).contiguous()
        share = torch.zeros(at.batch, at.llm.kv_heads, value_slots, device=at.device)
        share.scatter_(-1, where[..., size.critical :].long(), 0.5 / at.tokens)
        lent = [value_slot, share.repeat_interleave(at.llm.query_heads // at.llm.kv_heads, 1)]
    read = [query, key[:, :, : size.critical], value[:, :, :tokens], position, *scales, *lent]
    more = *(lent or NONE), memory, Settings.score_decay, scales or NONE
    return Call(lambda: at.backend.tiered_attention(query, key, value, position, *more),
                [*read, added], [query, added])  # fmt: skip


# ---- Plan, slots, memory ---------------------------------------------------------------------------------------------


class Slots:
    """Empty slots of the K pool of L layers, and what `assign_slots` writes."""

    def __init__(self, at: Shape, L: int):
        shape = L, at.batch, at.llm.kv_heads, at.slots[0][0]
        self.position = torch.full(shape, -1, dtype=torch.int32, device=at.device)
        self.moves, self.newest = Moves.none(self.position), torch.zeros_like(self.position[..., 0])
        self.moved = torch.zeros(1, dtype=torch.int64, device=at.device)
        self.given = at.capacity, self.moves, self.newest, self.moved

    def written(self, moving: int) -> list[Tensor | int]:
        """moving: tokens a KV head that come; two lists say where from and to."""
        lists = 2 * self.moves.source.itemsize * self.newest.numel() * moving
        return [self.position, lists, self.moves.count, self.newest, self.moved]


def sum_scores(at: Shape, single: bool) -> Call:
    """By logits, as in a step with fused scores. single: of one layer, as where the next needs more of the SLM."""
    L = 1 if single else at.together
    score, memory, (index, rows) = at.ranking().log2_().to(logits_dtype(at.dtype)), at.memory(L), at.matched(L)
    total = torch.empty(memory.shape, device=at.device)
    lse = torch.zeros(score.shape[:3], device=at.device)
    seen, made = memory[..., : at.tokens], total[..., : at.tokens]
    return Call(lambda: at.backend.sum_scores(score, index, at.length, total, lse, memory, Settings.score_decay),
                [rows, lse, index, at.length, seen], [made], layers=L)  # fmt: skip


def plan_layers(at: Shape, share: float, single: bool) -> Call:
    """With slots and a memory, as in a step with fused scores. From one critical set to another and back: `share` of it
    enters. A step clears the counts once; here each launch does, which is timed with it."""
    L, recent = 1 if single else at.together, at.sizes[0].recent
    memory, slots, older = at.memory(L), Slots(at, L), at.tokens - recent
    moving = min(round(share * at.critical), older - at.critical + recent)
    order, totals = at.pick(at.critical - recent + moving, older, L).long(), []
    for first in (0, moving):
        among = order[..., first : first + at.critical - recent]
        totals.append(at.memory(L).float().scatter_add_(-1, among, torch.ones_like(among, dtype=torch.float32)))
    tier = torch.zeros(memory.shape, dtype=torch.int8, device=at.device)
    sizes = torch.zeros(at.capacity + 1, 3, dtype=torch.int32, device=at.device)
    sizes[at.tokens, 0], sizes[at.tokens, 1] = at.critical, recent
    cut, others = torch.zeros_like(slots.newest), memory.itemsize * slots.newest.numel() * (at.tokens - at.critical)

    def work():
        for total in totals:
            slots.moves.count.zero_()
            at.backend.plan_layers(total, at.length, sizes, tier, slots.position, None, memory, slots.given, cut=cut)

    read = [totals[0][..., : at.tokens], at.length, sizes[at.tokens], tier, slots.position, slots.moved, cut]
    return Call(work, read, [tier, others, cut, *slots.written(moving)], launches=2, layers=L)


def assign_slots(at: Shape, share: float, single: bool) -> Call:
    """From one critical set to another and back: `share` of it enters, the newest token stays. A step clears the counts
    once; here each launch does, which is timed with it."""
    L, older = 1 if single else at.together, at.tokens - 1
    moving, slots, tiers = min(round(share * at.critical), at.tokens - at.critical), Slots(at, L), []
    order = at.pick(at.critical - 1 + moving, older, L).long()
    for first in (0, moving):
        tier = torch.zeros(*order.shape[:3], at.capacity, dtype=torch.int8, device=at.device)
        tier.scatter_(-1, order[..., first : first + at.critical - 1], CRITICAL)[..., older] = CRITICAL
        tiers.append(tier)

    def work():
        for tier in tiers:
            slots.moves.count.zero_()
            at.backend.assign_slots(slots.position, tier, CRITICAL, at.length, *slots.given)

    return Call(work, [tiers[0][..., : at.tokens], slots.position, at.length, slots.moved], slots.written(moving),
                launches=2, layers=L)  # fmt: skip


def fade_memory(at: Shape) -> Call:
    """As in a step without a plan: the sum is the memory, and the critical get no score."""
    memory, (index, rows) = at.memory(at.llm.layers), at.matched(at.llm.layers)
    row = at.ranking().log2_().to(logits_dtype(at.dtype))
    lse = torch.zeros(row.shape[:3], device=at.device)
    tier = torch.where(torch.rand_like(memory) < at.critical / at.tokens, CRITICAL, 0).to(torch.int8)
    seen = memory[..., : at.tokens]
    return Call(lambda: at.backend.sum_scores(row, index, at.length, memory, lse, memory, Settings.score_decay, tier),
                [rows, lse, index, at.length, tier[..., : at.tokens], seen], [seen], layers=at.llm.layers)  # fmt: skip


# ---- Movement --------------------------------------------------------------------------------------------------------


def bring_rows(at: Shape, share: float, beside: bool = False, int8: bool = False) -> Call:
    """`share` of the critical set of one layer. beside: on a stream of its own, beside the LLM's two large products."""
    slots, count = at.slots[0][0], max(1, round(share * at.critical))
    name, rows = "pools" + ", in 8 bits" * int8, host_rows(at.capacity)
    key, value = at.shared(name, lambda: [at.pool(at.llm, slots, int8=int8) for _ in range(2)])
    host = at.on_host(at.batch, at.llm.kv_heads, rows, 2, at.llm.head_dim, dtype=key.dtype)
    pair = torch.arange(at.pairs, device=at.device).view(at.batch, -1, 1)
    moves = Moves(*((pair * step + at.pick(count, among).sort(-1).values).flatten().int()
                    for step, among in ((rows, at.tokens - 1), (slots, at.critical))),
                  *(torch.tensor(n, dtype=torch.int32, device=at.device) for n in (at.pairs * count, 0)))  # fmt: skip
    size, lists = 2 * at.pairs * count * at.llm.head_dim * key.itemsize, [*moves.lists]  # of K and V

    def bring():
        at.backend.bring_rows(key, value, host, moves)

    if not beside:
        return Call(bring, lists, [size], pcie=size)
    products = [gate_product(at, "llm"), split_product(at, "llm")]
    stream = torch.cuda.Stream(priority=-1) if at.device.type == "cuda" else None

    def both():
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            bring()
        for call in products:
            call.work()
        if stream is not None:
            torch.cuda.current_stream().wait_stream(stream)

    return Call(both, [*lists, *(part for call in products for part in call.read)],
                [size, *(part for call in products for part in call.written)], pcie=size)  # fmt: skip


def store_rows(at: Shape) -> Call:
    newest = at.draw(2, STORE, at.batch, 1, at.llm.kv_heads, at.llm.head_dim)
    host = at.on_host(*newest.shape[1:3], at.llm.kv_heads, host_rows(FEW), 2, at.llm.head_dim, dtype=at.dtype)
    length = torch.full_like(at.length, FEW)
    return Call(lambda: at.backend.store_rows(newest, host, length), [newest, length], [], pcie=newest.nbytes,
                layers=STORE)  # fmt: skip


# ---- Between and inside the products; `of`: llm or slm ---------------------------------------------------------------


def add_norm(at: Shape, of: str, after: str) -> Call:
    """after: the product before it, o, or down, whose sum comes in parts."""
    config = getattr(at, of)
    hidden, inner = config.hidden_size, config.intermediate_size
    x, weight = at.draw(at.batch, hidden), at.draw(hidden)
    if after == "down":
        matrix = at.shared("down", lambda: [at.draw(hidden, inner, scale=0.02)])[0]
        update = at.backend.split_product(at.draw(at.batch, inner), matrix)
    else:
        update = at.draw(at.batch, hidden)
    return Call(lambda: at.backend.add_norm(x, update, weight, config.norm_eps), [x, update, weight], [x, x])


def rope_append(at: Shape, of: str, int8: bool = False) -> Call:
    """Of the LLM into slots of its tiers, and the rows that wait to be stored; of the SLM at the token's position."""
    config = getattr(at, of)
    G, D = config.kv_heads, config.head_dim
    qkv, length = at.draw(at.batch, (config.query_heads + 2 * G) * D), torch.full_like(at.length, FEW)
    cos, sin = (at.draw(FEW, D // 2, dtype=torch.float32) for _ in range(2))
    (key, value, scales), options, more = pools(at, config, FEW, FEW, int8), {}, []
    made = at.batch * (config.query_heads * D * at.dtype.itemsize + 2 * G * D * key.itemsize)
    if of == "llm":
        slot, newest = at.pick(1, FEW)[..., 0].contiguous(), at.draw(2, at.batch, G, D).to(key.dtype)
        options, more = {"key_slot": slot, "value_slot": slot, "newest": newest}, [slot, newest]
    options["scales"] = scales or NONE
    return Call(lambda: at.backend.rope_append(qkv, cos, sin, length, None, key, value, **options),
                [qkv, length, cos[0], sin[0], *scales, *more[:1]], [made, *more[1:]])  # fmt: skip


def linear(at: Shape, of: str, which: int) -> Call:
    """The library's product: qkv is 0 and o 1 of bench_count.layer_products."""
    config = getattr(at, of)
    inputs, outputs = layer_products(config)[which]
    x, weight = at.draw(at.batch, inputs), at.draw(outputs, inputs, scale=0.02)
    bias = at.draw(outputs) if (config.qkv_bias, config.o_bias)[which] else None
    made = at.batch * outputs * x.itemsize
    return Call(lambda: F.linear(x, weight, bias), [x, weight, *[bias] * (bias is not None)], [made])


def gate_product(at: Shape, of: str) -> Call:
    inputs, outputs = layer_products(getattr(at, of))[2]
    x, weight = at.draw(at.batch, inputs), at.draw(outputs, inputs, scale=0.02)
    return Call(lambda: at.backend.gate_product(x, weight), [x, weight], [at.batch * outputs // 2 * x.itemsize])


def split_product(at: Shape, of: str) -> Call:
    inputs, outputs = layer_products(getattr(at, of))[3]
    x, weight = at.draw(at.batch, inputs), at.draw(outputs, inputs, scale=0.02)
    return Call(lambda: at.backend.split_product(x, weight), [x, weight], [at.batch * outputs * FP32])


# ---- A model's layers, as a step runs them ---------------------------------------------------------------------------


def layers(at: Shape, of: str, attention: str) -> Call:
    """All layers and norms for one token a sequence. attention: none, full (LLM), scored (SLM) or tiers (LLM)."""
    config = getattr(at, of)
    if of not in at.decoders:
        at.decoders[of] = random_decoder(config, at.device, at.dtype)
    stack, ids = Layers(at.decoders[of], at.capacity, at.backend), torch.zeros_like(at.length).long()
    read, written = [(layer_bytes if of == "llm" else observed_bytes)(config, at.dtype.itemsize, False)], []
    if attention == "none":
        out = at.query(config)
        attend = lambda *_: out  # noqa: E731
    elif attention == "tiers":
        attend, reached = tiers(at)
        read, written = read + reached, reached[-1:]
    else:
        shape = config, at.batch, at.capacity, at.device, at.dtype
        cache = FullCache(*shape) if attention == "full" else ScoredCache(*shape, 0.0)
        cache.key.normal_(), cache.value.normal_()
        side = FullSide(cache, at.backend, at.length)
        if attention == "scored":
            side, written = ScoredSide(cache, at.backend, at.length, False), [cache.score[..., : at.tokens]]
        attend = side.attend
        read += [pool[:, :, :, : at.tokens] for pool in (cache.key, cache.value)]
    return Call(lambda: stack.run(ids, attend, of == "llm"), read, written, layers=config.layers)


def tiers(at: Shape) -> tuple[Callable, list[Tensor | int]]:
    """`TieredSide.attend` without its plan and host, and what it reads: K, V, positions, and the scores it adds to."""
    L, slots = at.llm.layers, at.slots[0][0]
    key, value, position = at.pool(at.llm, slots, L), at.pool(at.llm, slots, L), at.positions(at.critical, slots, L)
    memory, newest = at.memory(L), at.draw(2, L, at.batch, at.llm.kv_heads, at.llm.head_dim)
    slot = torch.zeros_like(position[0, :, :, 0]).contiguous()

    def attend(layer, qkv, rope, norms):
        pools = key[layer], value[layer]
        query = at.backend.rope_append(qkv, *rope, at.length, norms, *pools, slot, slot, newest=newest[:, layer])
        more = None, None, memory[layer], Settings.score_decay
        return at.backend.tiered_attention(query, *pools, position[layer], *more)

    held = [pool[:, :, :, : at.critical] for pool in (key, value)]
    return attend, [*held, position, at.remembered.itemsize * L * at.pairs * at.critical]


# ---- All of them -----------------------------------------------------------------------------------------------------

MODELS = {"llm": "LLM", "slm": "SLM"}
CASES: dict[str, dict[str, Callable[[Shape], Call]]] = {
    "decode_attention": {
        "LLM, full cache": decode_attention, "LLM, full cache, in 8 bits": partial(decode_attention, int8=True),
    },
    "scored_attention": {
        "SLM, logits": partial(scored_attention, decay=0.0, logits=True),
        "SLM, logits, in 8 bits": partial(scored_attention, decay=0.0, logits=True, int8=True),
        **{f"SLM, decay {decay:g}": partial(scored_attention, decay=decay) for decay in (0.0, 0.5)},
    },
    "tiered_attention": {
        "LLM": partial(tiered_attention, marginal=False, remembered=False),
        "LLM, memory": partial(tiered_attention, marginal=False, remembered=True),
        "LLM, memory, in 8 bits": partial(tiered_attention, marginal=False, remembered=True, int8=True),
        "LLM, marginal": partial(tiered_attention, marginal=True, remembered=False),
        "LLM, marginal, memory": partial(tiered_attention, marginal=True, remembered=True),
        "LLM, marginal, memory, in 8 bits": partial(tiered_attention, marginal=True, remembered=True, int8=True),
    },
    "sum_scores": {
        "one layer": partial(sum_scores, single=True),
        "more": partial(sum_scores, single=False),
        "no plan, all layers": fade_memory,
    },
    "plan_layers": {
        "10 % enter, one layer": partial(plan_layers, share=0.1, single=True),
        "10 % enter": partial(plan_layers, share=0.1, single=False),
    },
    "assign_slots": {
        "10 % enter, one layer": partial(assign_slots, share=0.1, single=True),
        "10 % enter": partial(assign_slots, share=0.1, single=False),
    },
    "bring_rows": {
        "2 %": partial(bring_rows, share=0.02),
        "10 %": partial(bring_rows, share=0.1),
        "10 %, in 8 bits": partial(bring_rows, share=0.1, int8=True),
        "2 %, beside gate_product, split_product": partial(bring_rows, share=0.02, beside=True),
        "10 %, beside gate_product, split_product": partial(bring_rows, share=0.1, beside=True),
    },
    "store_rows": {"some layers": store_rows},
    "add_norm": {
        f"{name}, after {after}": partial(add_norm, of=of, after=after)
        for of, name in MODELS.items()
        for after in ("o", "down")
    },
    "rope_append": {
        name + ", in 8 bits" * int8: partial(rope_append, of=of, int8=int8)
        for of, name in MODELS.items()
        for int8 in (False, True)
    },
    "qkv": {f"{name}, the library's": partial(linear, of=of, which=0) for of, name in MODELS.items()},
    "o": {f"{name}, the library's": partial(linear, of=of, which=1) for of, name in MODELS.items()},
    "gate_product": {name: partial(gate_product, of=of) for of, name in MODELS.items()},
    "split_product": {name: partial(split_product, of=of) for of, name in MODELS.items()},
    "slm_layers": {f"attention: {kind}": partial(layers, of="slm", attention=kind) for kind in ("none", "scored")},
    "llm_layers": {
        f"attention: {kind}": partial(layers, of="llm", attention=kind) for kind in ("none", "full", "tiers")
    },
}
