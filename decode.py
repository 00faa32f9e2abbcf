"""Prefill, the one decode step, its capture as a CUDA graph, the loop, sampling: how prompts become tokens.

Where it sits: it owns the order of things. A decode step, the whole project in six lines (`Session.forward`):

    policy.observe(tokens, span)             # SLM: attention rows -> scores                        smallkv.py
    for layer in layers:
        policy.plan(layer, span)             # scores -> tiers -> slots                             scores.py, tiers.py
        policy.migrate(layer)                # rows come from the offloaded tier                    ops.py
    logits = llm(tokens, span, cache)        # attention on critical K, V and marginal V (Eq. 6)    kernels.py
    policy.settle(span)                      # the SLM's newest rows go into its scores             cache.py

That function is what runs on a CPU, eagerly on a GPU, and, from the third step on, captured there as one CUDA graph:
every shape is fixed when the session is made, and nothing in it reads the device from the host. On a GPU its parts run
beside one another on streams of their own (`Lanes`): the SLM beside the LLM, the plan of an LLM layer as soon as the
SLM's layers that it needs are done, the movement beside both; an LLM layer waits for its own rows alone.

Shapes follow the legend in model.py.
"""

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from cache import Cache, Entry, FullCache
from model import Decoder, Span

WARM_STEPS = 2  # eager ones on a GPU: kernels are compiled, the first plan fills the slots
CHUNK_MIN = 512  # tokens of a prompt's chunk, whatever the memory


# ---- What a method keeps ---------------------------------------------------------------------------------------------


def read_prompt(model, tokens: Tensor, staged: Cache, chunk: int, logits: str = "last", progress=None) -> Tensor | None:
    """A prompt (1, n) through a model in chunks; what the model returns of the last. progress(tokens): after each."""
    out, n = None, tokens.shape[1]
    for start in range(0, n, chunk):
        end = min(start + chunk, n)
        out = model(tokens[:, start:end], Span.chunk(start, end, tokens.device), staged, logits=logits)
        if progress is not None:
            progress(end - start)
    return out


class Policy:
    """A method, as `Session` drives it; this one is the full cache, which keeps everything and plans nothing.

    In a step the session calls `observe` (the SLM), then for each LLM layer `plan` and `migrate`, then the LLM on
    `cache`, then `settle`. Nothing in these may read the device from the host: they are captured as a CUDA graph.
    """

    name = "full"
    whole_prompt = False  # a prompt may be prefilled in chunks
    drafts = 0  # of a round (speculative.py)
    maps: list | tuple = ()  # of the batch's heads, where a method matches any; None: not yet
    slm_cache: Cache | None = None
    needed: list[int] = []  # by LLM layer: how many of the SLM's layers its plan waits for

    def __init__(self, llm):
        self.llm, self.models = llm, [llm]

    def make_caches(self, lengths: list[int], capacity: int, device) -> dict[str, Cache]:
        """Of prompts of these lengths, for `capacity` positions: "LLM", and "SLM" where there is one."""
        return {"LLM": FullCache(self.llm.config, len(lengths), capacity, device, self.llm.dtype)}

    def allocate(self, lengths: list[int], capacity: int) -> None:
        self.caches = self.make_caches(lengths, capacity, self.llm.device)
        self.cache = self.caches["LLM"]

    def ledgers(self, lengths: list[int], capacity: int) -> dict[str, list[Entry]]:
        """What the caches would take, by model; nothing is allocated."""
        return {name: cache.ledger() for name, cache in self.make_caches(lengths, capacity, "meta").items()}

    def prefill(self, b: int, tokens: Tensor, chunk: int, progress=None) -> Tensor:
        """The prompt (1, n) of sequence b through the models; the LLM's logits (1, 1, V) of its last token."""
        staged = self.cache.staging(b, tokens.shape[1])
        logits = read_prompt(self.llm, tokens, staged, chunk, progress=progress)
        self.cache.load(b, staged)
        return logits

    def match(self, b: int, text: list[int]) -> None:
        """Before a step: sequence b has these tokens."""

    def observe(self, tokens: Tensor, span: Span, cache) -> None:
        """The SLM's step on tokens (B, 1), with its cache."""

    def plan(self, layer: int, span: Span) -> None:
        """Which tokens stay in this layer's cache, from what is known before the LLM's step."""

    def migrate(self, layer: int) -> None:
        """Move the rows that the plan asks for."""

    def settle(self, span: Span, kept: Tensor | None = None) -> None:
        """The step is over; kept (B,): with drafts, how many of the new tokens count."""


# ---- Prompts and their limits ----------------------------------------------------------------------------------------


def prefill_chunk(models: list[Decoder], free: int) -> int:
    """Tokens of a prompt that go through a model at once: as many as have activations in half of `free` bytes."""
    numbers = max(
        6 * c.hidden_size + 3 * c.intermediate_size + 3 * (c.query_heads + 2 * c.kv_heads) * c.head_dim
        for c in (model.config for model in models)
    )
    return max(CHUNK_MIN, free // 2 // (numbers * max(model.dtype.itemsize for model in models)))


def check_positions(models: list[Decoder], lengths: list[int], max_new_tokens: int) -> None:
    """ValueError if the longest prompt and its answer do not fit the positions of the models."""
    total, limit = max(lengths) + max_new_tokens, min(model.config.max_positions for model in models)
    if total > limit:
        raise ValueError(
            f"prompt of {max(lengths)} tokens plus {max_new_tokens} new ones is {total}, longer than the {limit} "
            "positions of the model; shorten the prompt or lower --max-new-tokens"
        )


def check_head_dims(models: list[Decoder]) -> None:
    """ValueError for a model on a GPU whose heads the kernels do not take: tiles have powers of two."""
    for model in models:
        if model.device.type == "cuda" and model.config.head_dim not in (16, 32, 64, 128, 256):
            found = model.config.head_dim
            raise ValueError(f"head_dim {found} does not fit the kernels: 16, 32, 64, 128 or 256 do; use --device cpu")


# ---- Streams ---------------------------------------------------------------------------------------------------------


class Lanes:
    """The streams of a step: "slm", "plan" and "move" beside the current one, on a GPU; on a CPU nothing but order."""

    def __init__(self, device: torch.device):
        self.streams = {}
        if device.type == "cuda":  # first in the queue: the LLM waits for them, and their kernels leave room
            self.streams = {name: torch.cuda.Stream(device, priority=-1) for name in ("slm", "plan", "move")}

    def fork(self) -> None:
        for stream in self.streams.values():
            stream.wait_stream(torch.cuda.current_stream())

    def join(self) -> None:
        """A captured graph must end on one stream."""
        for stream in self.streams.values():
            torch.cuda.current_stream().wait_stream(stream)

    def on(self, name: str, *after):
        """Work on a lane, once the events `after` have come."""
        stream = self.streams.get(name)
        if stream is None:
            return nullcontext()
        for event in after:
            stream.wait_event(event)
        return torch.cuda.stream(stream)

    def mark(self):
        """The event that what was launched so far on the current stream is done; None on a CPU."""
        return torch.cuda.current_stream().record_event() if self.streams else None


class Watched:
    """A cache as a model sees it in a step: layer l attends once before[l] has come, and leaves an event in `done`."""

    def __init__(self, cache, lanes: Lanes, before: Sequence = ()):
        self.cache, self.lanes, self.before, self.done = cache, lanes, before, []

    def attend(self, layer: int, qkv: Tensor, rope, span: Span) -> Tensor:
        if self.before and self.lanes.streams:
            torch.cuda.current_stream().wait_event(self.before[layer])
        out = self.cache.attend(layer, qkv, rope, span)
        if not self.before:
            self.done.append(self.lanes.mark())
        return out


# ---- A batch ---------------------------------------------------------------------------------------------------------


class Session:
    """A batch of sequences being decoded by one LLM under one policy.

    length (B,) int32 on the device: tokens of each sequence whose K and V the caches have; lengths: the same numbers on
    the host. texts: the tokens themselves, as long as the policy has heads to match.
    """

    def __init__(
        self, policy: Policy, prompts: list[list[int]], max_new_tokens: int, chunk: int | None = None,
        progress: Callable[[int], None] | None = None, spare: int = 0, capture: bool = True,
    ):  # fmt: skip
        """prompts: token ids, one list a sequence. max_new_tokens: the caches are made for that many more, and `spare`.

        chunk: prompt tokens at once; None: as many as the memory at hand allows. progress is called with the number of
        prompt tokens that both models have been given. capture: on a GPU, steps as a CUDA graph.
        """
        if not prompts or any(not prompt for prompt in prompts):
            raise ValueError("empty prompt: there is nothing to continue")
        self.policy, self.llm, self.prompts, self.progress = policy, policy.llm, prompts, progress
        self.lengths = [len(prompt) for prompt in prompts]
        self.capacity = max(self.lengths) + max_new_tokens + spare
        check_positions(policy.models, self.lengths, max_new_tokens)
        check_head_dims(policy.models)
        # Ids that only padding rows of the larger embedding have mean nothing, and the SLM could not read them.
        self.vocab = min(model.config.vocab_size for model in policy.models)
        device = self.llm.device
        policy.allocate(self.lengths, self.capacity)
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 1 << 30
        longest = max(self.lengths)
        self.chunk = min(longest, chunk or prefill_chunk(policy.models, free))
        if policy.whole_prompt:
            self.chunk = longest
        self.capture = device.type == "cuda" and capture
        self.lanes, self.steps, self.graph = Lanes(device), 0, None
        self.length = torch.tensor(self.lengths, dtype=torch.int32, device=device)
        self.tokens = torch.zeros(len(prompts), 1, dtype=torch.long, device=device)  # of the step at hand
        self.texts = [list(prompt) for prompt in prompts]

    @torch.inference_mode()
    def prefill(self) -> Tensor:
        """Both models over every prompt, one sequence at a time, in chunks; logits (B, V) of the last tokens.

        Nothing in the loop waits for the device: it launches the SLM's small kernels while the LLM's large ones of the
        prompt before are still running.
        """
        ids = torch.cat([torch.tensor(prompt) for prompt in self.prompts]).to(self.llm.device).split(self.lengths)
        logits = [self.policy.prefill(b, own[None], self.chunk, self.progress) for b, own in enumerate(ids)]
        return torch.cat(logits)[:, 0, : self.vocab]

    @torch.inference_mode()
    def step(self, tokens: list[int] | Tensor) -> Tensor:
        """One token for each sequence (B,), in; logits (B, V) of what comes next, valid until the next step, out."""
        if max(self.lengths) >= self.capacity:
            raise ValueError(f"no room for a token more than the capacity of {self.capacity} positions")
        self.take(tokens)
        self.tokens.copy_(torch.as_tensor(tokens)[:, None])
        self.run()
        self.lengths = [length + 1 for length in self.lengths]
        return self.logits

    def take(self, tokens: list[int] | Tensor) -> None:
        """New tokens on the host's side: a sequence that reaches the matching window gets its head map."""
        if any(found is None for found in self.policy.maps):
            for b, token in enumerate(tokens if isinstance(tokens, list) else tokens.tolist()):
                self.texts[b].append(token)
                self.policy.match(b, self.texts[b])

    def run(self) -> None:
        """`forward`, or its graph: captured once `WARM_STEPS` have compiled the kernels and filled the slots."""
        if self.capture and self.graph is None and self.steps >= WARM_STEPS:
            gc.collect()  # else an older session is given back in mid-capture, which must not wait
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            # Recording runs nothing: the state stays as it is. thread_local: NCCL's own thread may go on meanwhile.
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.forward()
        if self.graph is not None:
            self.graph.replay()
        else:
            self.forward()
        self.steps += 1

    def forward(self) -> None:
        """The step: `tokens` (B, 1) in, `logits` (B, V) out, `length` one longer."""
        self.length += 1
        span, slm = Span.step(self.length), Watched(self.policy.slm_cache, self.lanes)
        self.lanes.fork()
        with self.lanes.on("slm"):
            self.policy.observe(self.tokens, span, slm)
        self.logits = self.attend(self.tokens, span, slm.done)[:, 0]
        self.policy.settle(span)

    def attend(self, tokens: Tensor, span: Span, observed: list) -> Tensor:
        """Plans, movement and the LLM on tokens (B, T); logits (B, T, V). observed: by SLM layer, the event that its
        rows are there; empty: they all are."""
        policy, lanes, arrived = self.policy, self.lanes, []
        for layer in range(self.llm.config.layers):
            after = [observed[policy.needed[layer] - 1]] if observed else []
            with lanes.on("plan", *after):
                policy.plan(layer, span)
                planned = lanes.mark()
            with lanes.on("move", planned):
                policy.migrate(layer)
                arrived.append(lanes.mark())
        logits = self.llm(tokens, span, Watched(policy.cache, lanes, arrived))[..., : self.vocab]
        lanes.join()
        return logits


# ---- Sampling --------------------------------------------------------------------------------------------------------


class NotFinite(ValueError):
    """The model gave logits that are NaN or infinite: there is no next token."""

    def __init__(self):
        super().__init__("the model's logits are NaN or infinite: its weights are damaged, or float16 overflowed; try "
                         "--dtype bfloat16 or float32")  # fmt: skip


@dataclass(frozen=True)
class Sampler:
    """How the next token is chosen. temperature 0 is greedy. top_k 0 and top_p 1 keep the whole vocabulary."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if self.temperature != 0 and not 1e-4 <= self.temperature <= 1e4:
            raise ValueError(f"temperature {self.temperature} is not 0 (greedy) nor between 0.0001 and 10000")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed {self.seed} is outside [0, 2^63)")
        if self.top_k < 0:
            raise ValueError(f"top-k {self.top_k} is negative; 0 keeps every token")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top-p {self.top_p} is outside (0, 1]; 1 keeps every token")

    def generators(self, batch: int) -> list[torch.Generator]:
        """One source of randomness a sequence, seeded alike: a prompt's answer does not depend on its neighbours."""
        return [torch.Generator().manual_seed(self.seed) for _ in range(batch)]

    def probabilities(self, logits: Tensor) -> Tensor:
        """logits (..., V) -> the distributions that are drawn from, (..., V) fp32."""
        scaled = logits.float() / self.temperature
        if self.top_k:
            least = scaled.topk(min(self.top_k, scaled.shape[-1])).values[..., -1:]
            scaled = scaled.masked_fill(scaled < least, -torch.inf)
        if self.top_p < 1:
            ordered, order = scaled.softmax(-1).sort(descending=True)
            before = ordered.cumsum(-1) - ordered  # mass of the more likely tokens: the first one always stays
            unlikely = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= self.top_p)
            scaled = scaled.masked_fill(unlikely, -torch.inf)
        return scaled.softmax(-1)

    def __call__(self, logits: Tensor, generators: list[torch.Generator]) -> list[int]:
        """logits (B, V) -> one token id a sequence; NotFinite if any of them is none."""
        rows = logits if self.temperature == 0 else logits.cpu()
        sums = rows.sum(-1, dtype=torch.float32)  # NaN or infinite if one logit is
        best, sums = torch.stack((rows.argmax(-1), sums)).tolist()  # ids are below 2 ** 24: exact in fp32
        if not all(map(math.isfinite, sums)):
            raise NotFinite
        if self.temperature == 0:
            return [int(token) for token in best]
        return [torch.multinomial(self.probabilities(row), 1, generator=g).item() for row, g in zip(rows, generators)]


# ---- The loop --------------------------------------------------------------------------------------------------------


@dataclass
class Timing:
    """Seconds, measured on the host around work that ends on the host (the sampled token)."""

    first_token: float | None = None  # TTFT: prefill of the whole batch and the first token; None before there is one
    per_token: float = 0.0  # TPOT: mean over the decode steps
    steps: int = 0


def generate_ids(
    session: Session, sampler: Sampler, max_new_tokens: int, stop: set[int] = frozenset(), timing: Timing | None = None
) -> Iterator[list[list[int]]]:
    """Yield each step's new tokens, a list a sequence, the stop token too; none for a sequence that has ended."""
    timing = timing if timing is not None else Timing()
    begin = time.perf_counter()
    generators = sampler.generators(len(session.prompts))
    tokens = sampler(session.prefill(), generators)
    timing.first_token = time.perf_counter() - begin
    ended, spent = [False] * len(tokens), 0.0
    for made in range(1, max_new_tokens + 1):
        yield [[] if done else [token] for token, done in zip(tokens, ended)]
        ended = [done or token in stop for token, done in zip(tokens, ended)]
        if all(ended) or made == max_new_tokens:
            return
        begin = time.perf_counter()
        tokens = sampler(session.step(tokens), generators)
        spent += time.perf_counter() - begin
        timing.steps += 1
        timing.per_token = spent / timing.steps


def generate(
    policy: Policy, prompts: list[list[int]], max_new_tokens: int, stop: set[int] = frozenset(),
    sampler: Sampler = Sampler(),
) -> list[list[int]]:  # fmt: skip
    """All answers at once, as token ids without the stop token."""
    answers: list[list[int]] = [[] for _ in prompts]
    for step in generate_ids(Session(policy, prompts, max_new_tokens), sampler, max_new_tokens, stop):
        for answer, tokens in zip(answers, step):
            answer += [token for token in tokens if token not in stop]
    return answers
