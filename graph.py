"""The decode step with fixed shapes, so that on a GPU it is one CUDA graph: no launch, no Python, no index on the CPU.

Where it sits: in place of `Session.step` (decode.py), after the same prefill, on the same caches. The step is an
ordinary function (`Step.body`) that runs eagerly anywhere; on CUDA it is captured once and replayed:

    SLM layers, their attention rows into the scores                          kernels_decode.py
    side stream, for each LLM layer: plan -> slots -> rows from the host       kernels_tiers.py
    LLM layers, each after its rows arrived: attention on the tiers (Eq. 6)   kernels_decode.py
    logits -> the next token                                                  greedy, or Gumbel noise drawn beforehand

What changes from step to step (lengths, tokens, tiers) lives in device tensors that the step itself updates. Capacity
is fixed at the start. `FullPolicy` gives the graphed full cache: the rival, with the same layers.

Shapes follow the legend in model.py; decode drops the T dimension.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from backend import Backend
from cache import FullCache
from decode import Session
from kernels_move import Moves
from kernels_tiers import CRITICAL, MARGINAL
from model import Decoder

WARM = 2  # eager steps before a capture: the first fills the pools without a limit on moves, the second has it


class Layers:
    """A decoder's layers for a step: qkv and gate-up as one matrix product each, the rest in fused kernels.

    The joined weights replace the decoder's own, which become views of them: nothing is held twice.
    """

    def __init__(self, decoder: Decoder, capacity: int, backend: Backend):
        self.decoder, self.config, self.backend = decoder, decoder.config, backend
        cos, sin = decoder._rotary(torch.arange(capacity, device=decoder.device)[None], torch.float32)
        half = self.config.head_dim // 2
        self.cos, self.sin = cos[0, 0, :, :half].contiguous(), sin[0, 0, :, :half].contiguous()  # (S, D/2)
        self.qkv, self.both, self.norms = [], [], []
        for layer in decoder.layers:
            attention, mlp = layer.self_attn, layer.mlp
            self.qkv.append(join([attention.q_proj, attention.k_proj, attention.v_proj]))
            self.both.append(join([mlp.gate_proj, mlp.up_proj]))
            eps, normed = self.config.norm_eps, self.config.qk_norm
            self.norms.append((attention.q_norm.weight, attention.k_norm.weight, eps) if normed else None)

    def run(self, tokens: Tensor, attend) -> Tensor:
        """tokens (B,) through all layers and the last norm: (B, hidden).

        attend(layer, qkv (B, (H + 2G) D), rope tables, norms of the heads) -> (B, H, D).
        """
        backend, eps = self.backend, self.config.norm_eps
        x, update = F.embedding(tokens, self.decoder.embed_tokens.weight), None  # (B, hidden)
        for number, layer in enumerate(self.decoder.layers):
            hidden = backend.add_norm(x, update, layer.input_layernorm.weight, eps)
            out = attend(number, F.linear(hidden, *self.qkv[number]), (self.cos, self.sin), self.norms[number])
            update = layer.self_attn.o_proj(out.flatten(1))  # (B, hidden)
            hidden = backend.add_norm(x, update, layer.post_attention_layernorm.weight, eps)
            update = layer.mlp.down_proj(backend.gate(F.linear(hidden, *self.both[number])))
        return backend.add_norm(x, update, self.decoder.norm.weight, eps)


def join(linears: list[torch.nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """One weight and bias for several products of the same input; the modules' own become views of them."""
    weight = torch.cat([linear.weight.data for linear in linears])
    bias = None if linears[0].bias is None else torch.cat([linear.bias.data for linear in linears])
    start = 0
    for linear in linears:
        end = start + linear.out_features
        linear.weight.data = weight[start:end]
        if bias is not None:
            linear.bias.data = bias[start:end]
        start = end
    return weight, bias


class FullSide:
    """The LLM on its full cache: append, attend."""

    def __init__(self, cache: FullCache, backend: Backend, length: Tensor):
        self.cache, self.backend, self.length = cache, backend, length

    def begin(self) -> None:
        """Nothing to plan."""

    def join(self) -> None:
        """Nothing to wait for."""

    def attend(self, layer: int, qkv: Tensor, rope, norms) -> Tensor:
        key, value = self.cache.key[layer], self.cache.value[layer]
        query = self.backend.rope_append(qkv, *rope, self.length, norms, key, value)
        return self.backend.decode_attention(query, key, value, self.length)


class ScoredSide:
    """The SLM on its full cache: append, attend, and the row goes into the scores."""

    def __init__(self, cache, backend: Backend, length: Tensor, keep_row: bool):
        self.cache, self.backend, self.length, self.keep_row = cache, backend, length, keep_row

    def attend(self, layer: int, qkv: Tensor, rope, norms) -> Tensor:
        key, value = self.cache.key[layer], self.cache.value[layer]
        query = self.backend.rope_append(qkv, *rope, self.length, norms, key, value)
        row = self.cache.row[layer] if self.keep_row else None
        return self.backend.scored_attention(
            query, key, value, self.length, self.cache.score[layer], self.cache.decay, row
        )


class TieredSide:
    """The LLM on its tiers; the plan of each layer and the movement it asks for run on a side stream.

    moves: at most that many tokens enter a critical set in a step (`--max-moves`); None is no limit. `prior` (B, S)
    fp32, if set, is added to the scores: bench.py drives the turnover of the tiers with it.
    """

    def __init__(self, policy, backend: Backend, length: Tensor, moves: int | None):
        settings = policy.settings
        if not settings.saliency_shift:
            raise ValueError("--no-saliency-shift has no graph: its plan needs the weights of the step before")
        if moves is not None and settings.marginal:
            raise ValueError("--max-moves goes with --no-marginal: a marginal tier moves tokens of its own")
        self.policy, self.cache, self.backend, self.length = policy, policy.cache, backend, length
        self.marginal, self.moves, self.prior = settings.marginal, moves, None
        L, B, G, _ = self.cache.key_position.shape
        N, S = self.cache.value_position.shape[3], self.cache.host_key.shape[3]
        device = self.cache.key.device
        table = [settings.sizes(n) for n in range(S + 1)]
        rows = [(size.critical, size.recent, size.marginal) for size in table]
        self.sizes = torch.tensor(rows, dtype=torch.int32, device=device)  # (S + 1, 3)
        # What the LLM's stream reads of a layer is that layer's own: the side stream may be layers ahead.
        self.key_slot = torch.zeros(L, B, G, dtype=torch.int32, device=device)
        self.new_value_slot = torch.zeros(L, B, G, dtype=torch.int32, device=device)
        self.tier = torch.zeros(B, G, S, dtype=torch.int8, device=device)
        self.key_moves = Moves.none(self.cache.key_position[0])
        self.value_moves = Moves.none(self.cache.value_position[0]) if self.marginal else self.key_moves
        self.moved = torch.zeros(2, 1, dtype=torch.int64, device=device)  # keys and values brought from the host
        self.borrowed = None
        if not self.marginal:
            self.cache.value_position = self.cache.key_position  # both pools hold the same tokens in the same slots
        else:
            self.borrowed = torch.zeros(L, B, self.policy.llm.config.query_heads, N, device=device)
        self.stored = torch.zeros(B, dtype=torch.int32, device=device)  # position of the token in `newest`
        # First in the queue: the LLM's layer waits for it, and it leaves room for the LLM's kernels beside it.
        self.stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
        self.arrived: list[torch.cuda.Event] = []

    def tensors(self) -> list[Tensor]:
        """What this object holds beside the caches, for the ledger."""
        return [value for value in vars(self).values() if torch.is_tensor(value)]

    def begin(self) -> None:
        """The SLM is done: plan and move every layer, on the side stream where there is one."""
        if self.stream is None:
            for layer in range(len(self.key_slot)):
                self._move(layer)
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        self.arrived = []
        with torch.cuda.stream(self.stream):
            for layer in range(len(self.key_slot)):
                self._move(layer)
                self.arrived.append(self.stream.record_event())

    def store(self) -> None:
        """The last step's token goes to the host, beside the SLM; it was a recent token since: nobody has asked yet."""
        if self.stream is None:
            self._store()
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self._store()

    def _store(self) -> None:
        cache = self.cache
        self.backend.store_newest(cache.newest, cache.host_key, cache.host_value, self.stored)

    def _move(self, layer: int) -> None:
        cache, backend, index = self.cache, self.backend, self.policy.index[:, layer]
        position = cache.key_position[layer]
        backend.plan_layer(
            self.policy.slm_cache.score, index, self.length, self.sizes, self.tier, self.prior, position, self.moves
        )
        slot = self.key_slot[layer]
        backend.assign_slots(position, self.tier, CRITICAL, self.length, self.key_moves, slot, self.moved[0])
        if self.marginal:
            slot, values = self.new_value_slot[layer], cache.value_position[layer]
            backend.assign_slots(values, self.tier, MARGINAL, self.length, self.value_moves, slot, self.moved[1])
            backend.lend_rows(
                self.policy.slm_cache.row, index, self.tier, position, values, cache.value_slot[layer],
                self.borrowed[layer],
            )  # fmt: skip
        backend.bring_rows(
            cache.key[layer], cache.value[layer], cache.host_key[layer], cache.host_value[layer], self.key_moves,
            self.value_moves,
        )  # fmt: skip

    def attend(self, layer: int, qkv: Tensor, rope, norms) -> Tensor:
        cache = self.cache
        if self.stream is not None:
            torch.cuda.current_stream().wait_event(self.arrived[layer])
        key, value, position = cache.key[layer], cache.value[layer], cache.key_position[layer]
        slots = self.key_slot[layer], self.new_value_slot[layer] if self.marginal else self.key_slot[layer]
        query = self.backend.rope_append(
            qkv, *rope, self.length, norms, key, value, *slots, newest=cache.newest[:, layer]
        )
        if not self.marginal:
            return self.backend.tiered_attention(query, key, value, position)
        return self.backend.tiered_attention(query, key, value, position, cache.value_slot[layer], self.borrowed[layer])

    def join(self) -> None:
        """The side stream's last work belongs to this step: a captured graph must end on one stream."""
        self.stored.copy_(self.length - 1)
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)


class Step:
    """Decode steps of one prefilled session. `run` is one step; its tokens are fed to the next by the step itself.

    temperature 0 is greedy. Above it, `noise` (B, vocabulary) Gumbel noise is added to logits / temperature, drawn by
    the caller between steps: the largest sum is then a sample.
    """

    def __init__(
        self, session: Session, tokens: Tensor, backend: Backend, moves: int | None = None, temperature: float = 0.0
    ):
        """session: prefilled. tokens (B,): what the prefill's logits chose."""
        self.session, self.backend, self.temperature = session, backend, temperature
        device, capacity, policy = session.llm.device, session.capacity, session.policy
        self.tokens = tokens.to(device, torch.long).clone()
        self.length = torch.tensor(session.lengths, dtype=torch.int32, device=device)  # (B,), newest token included
        self.logits: Tensor | None = None
        self.noise = torch.zeros(len(tokens), session.vocab, device=device) if temperature else None
        self.llm, self.slm = Layers(session.llm, capacity, backend), None
        if isinstance(session.cache, FullCache):
            self.side = FullSide(session.cache, backend, self.length)
        else:
            self.slm = Layers(policy.slm, capacity, backend)
            self.scored = ScoredSide(policy.slm_cache, backend, self.length, policy.settings.marginal)
            self.side = TieredSide(policy, backend, self.length, None)  # the first plan fills the pools: no limit
            self.moves = moves
            self._hand_over()
        self.graph: torch.cuda.CUDAGraph | None = None

    def _hand_over(self) -> None:
        """The eager cache keeps no newest row before its first step; ours is the prompt's last token, stored twice."""
        cache, lengths = self.session.cache, self.session.lengths
        if self.tokens.is_cuda:
            torch.cuda.synchronize()  # the prompt's copies to the host, which nobody has waited for
        for b, n in enumerate(lengths):
            cache.newest[0, :, b] = cache.host_key[:, b, :, n - 1].to(cache.newest.device)
            cache.newest[1, :, b] = cache.host_value[:, b, :, n - 1].to(cache.newest.device)
        self.side.stored.copy_(self.length - 1)

    @torch.inference_mode()
    def body(self) -> None:
        """One step: everything on the device, nothing returned; the same function is run eagerly and captured."""
        self.length += 1
        if self.slm is not None:
            self.side.store()
            self.slm.run(self.tokens, self.scored.attend)
        self.side.begin()
        hidden = self.llm.run(self.tokens, self.side.attend)
        logits = F.linear(hidden, self.session.llm.lm_head.weight)[:, : self.session.vocab]
        self.logits = logits
        if self.noise is not None:
            logits = logits.float() / self.temperature + self.noise
        self.tokens.copy_(logits.argmax(-1))
        self.side.join()

    def run(self) -> None:
        """One step, replayed if it was captured; `tokens` holds the next tokens afterwards, on the device."""
        if max(self.session.lengths) >= self.session.capacity:
            raise ValueError(f"no room for a token more than the capacity of {self.session.capacity} positions")
        if self.slm is not None:
            self._match()
        if self.graph is None:
            self.body()
        else:
            self.graph.replay()
        self.session.lengths = [length + 1 for length in self.session.lengths]
        if self.slm is not None:
            self.side.moves = self.moves

    def _match(self) -> None:
        """What the eager policy does between steps: a sequence that reaches the matching window gets its head map."""
        policy = self.session.policy
        policy.lengths = [length + 1 for length in self.session.lengths]
        if all(found is not None for found in policy.maps):
            return
        for b, token in enumerate(self.tokens.tolist()):
            policy.tokens[b].append(token)
            policy._match(b)

    def capture(self) -> None:
        """Record the body as a CUDA graph, once WARM steps have compiled every kernel and filled the pools."""
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):  # recording runs nothing: the state stays as it is
            self.body()


def generate_static(session: Session, max_new_tokens: int, backend: Backend, **options) -> list[list[int]]:
    """Answers (B lists of tokens) of a new session by the static step, captured on CUDA; no token stops them."""
    step = Step(session, session.prefill().argmax(-1), backend, **options)
    made = [step.tokens.tolist()]
    for number in range(max_new_tokens - 1):
        if number == WARM and session.llm.device.type == "cuda":
            step.capture()
        step.run()
        made.append(step.tokens.tolist())
    return [list(answer) for answer in zip(*made)]
