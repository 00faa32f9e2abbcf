"""A picture of an answer: the tier of every token in every step, for every layer and KV head, as one page.

    python generate.py --trace page.html [--compare] [--marginal]

Where it sits: behind a session (decode.py), in front of generate.py. When a step is over `Trace.add` reads the cache's
lists of slots; a step knows nothing of it. `Trace.record` makes plain JSON types of that, which `--json`
carries; `page` puts them into tracing.html, whose script shows them.

The record is of n steps; in step i the sequence has prompt + i + 1 tokens:

| key                  | what                                                                                       |
| -------------------- | ------------------------------------------------------------------------------------------ |
| `method`             | how the page calls it                                                                      |
| `tokens`, `prompt`   | the S tokens as pieces of text; so many of them are the prompt                             |
| `steps`, `layers`, `kv_heads` | n, L, G                                                                           |
| `recent`             | (n): so many of the newest tokens are critical whatever they score                         |
| `tiers`              | `changes` of (n, L, G, S): 0 offloaded or not there yet, 1 marginal, 2 critical            |
| `h2o`                | the same of H2O, given the same tokens: 2 kept, 0 dropped; null without `--compare`        |
| `step_scores`        | `levels` of (S, n): what a token ranks by in a step, mean over layers and KV heads         |
| `head_scores`        | `levels` of (L, G, S): the same for each KV head, mean over the steps that have the token  |
| `slm_heads`          | (L, G, H / G, 3): layer and head in the SLM, and their similarity; null if none is matched |

Shapes follow the legend in model.py.
"""

import json
import zlib
from base64 import b64encode
from pathlib import Path

import torch
from torch import Tensor

from cache import TieredCache
from decode import Policy, Session
from evicting import SlotCache
from model import Span
from ops import Slots
from smallkv import SmallKV
from text import Text

MARGINAL, CRITICAL = 1, 2
MOST = 1 << 27  # numbers of (n, L, G, S) that a page opens without a long wait


# ---- What is held ----------------------------------------------------------------------------------------------------


class Traced(SmallKV):
    """SmallKV that leaves what its plans have ranked the tokens by: totals (L, B, G, S) fp32."""

    def allocate(self, lengths: list[int], capacity: int) -> None:
        super().allocate(lengths, capacity)
        config, device = self.llm.config, self.llm.device
        self.totals = torch.zeros(config.layers, len(lengths), config.kv_heads, capacity, device=device)

    def rank(self, layer: int, span: Span) -> Tensor:
        total = super().rank(layer, span)
        self.totals[layer].copy_(total if self.settings.saliency_shift else self.cache.memory[layer])
        return total


def tiers(cache: TieredCache | SlotCache, count: int) -> Tensor:
    """The tiers of sequence 0's tokens, all of which are before `count`: (L, G, count) uint8."""
    G = cache.config.kv_heads
    found = torch.zeros(cache.config.layers, G * count + 1, dtype=torch.uint8)  # free slots have the last column
    for layer, row in enumerate(found):
        if isinstance(cache, SlotCache):
            tables = {CRITICAL: Slots.of(cache.position[layer])}
        else:
            tables = dict(zip((CRITICAL, MARGINAL), cache.slots_of(layer)))
        for tier, slots in tables.items():
            if slots is not None:
                row.scatter_(0, slots.cells(count)[0].cpu(), tier)
    return found[:, :-1].view(-1, G, count)


class Trace:
    """What sequence 0 of a session holds after each step; its policy is `Traced`."""

    def __init__(self, policy: Traced):
        self.policy = policy
        self.states, self.recent, self.step_scores, self.head_scores = [], [], [], 0.0

    def add(self, session: Session) -> None:
        """After a step; before the first one there is nothing to add."""
        if session.steps == len(self.states):
            return
        policy, length = self.policy, session.lengths[0]
        self.prompt = len(session.prompts[0])
        self.states.append(tiers(policy.cache, session.capacity))
        self.recent.append(policy.sizes[length, 1].item())
        scores = torch.zeros(policy.totals[:, 0].shape)  # (L, G, S)
        scores[..., :length] = policy.totals[:, 0, :, :length].clamp(min=0)  # below 0: never taken
        self.step_scores.append(scores.mean((0, 1)))
        self.head_scores += scores

    def record(self, text: Text, ids: list[int], method: str, h2o: Policy | None = None) -> dict:
        """ids: the prompt's tokens and all that came after them. h2o: a policy to be given the same tokens."""
        n, S, prompt, config = len(self.states), len(ids), self.prompt, self.policy.llm.config
        stream, kept = text.stream(), None
        if h2o is not None:
            kept = changes(replay(h2o, ids[:prompt], ids[prompt : prompt + n], S))
        having = (prompt + n - torch.arange(S)).clamp(1, n)  # steps that have a token
        return {
            "method": method,
            "tokens": [stream.push(token) for token in ids],
            "prompt": prompt,
            "steps": n,
            "layers": config.layers,
            "kv_heads": config.kv_heads,
            "recent": self.recent,
            "tiers": changes(torch.stack(self.states)[..., :S]),
            "h2o": kept,
            "step_scores": levels(torch.stack(self.step_scores, 1)[:S]),
            "head_scores": levels(self.head_scores[..., :S] / having),
            "slm_heads": self.slm_heads(),
        }

    def slm_heads(self) -> list | None:
        found, width = self.policy.maps[0], self.policy.slm.config.query_heads
        if found is None:
            return None
        rows = torch.stack((found.index // width, found.index % width, found.similarity.double().round(decimals=3)), -1)
        return rows.unflatten(1, (self.policy.llm.config.kv_heads, -1)).tolist()


def replay(policy: Policy, prompt: list[int], fed: list[int], count: int) -> Tensor:
    """The tiers of another method that is given the same tokens, after each step: (n, L, G, count)."""
    session, states = Session(policy, [prompt], len(fed)), []
    session.prefill()
    for token in fed:
        session.step([token])
        states.append(tiers(policy.cache, count))
    return torch.stack(states)


# ---- The record ------------------------------------------------------------------------------------------------------


def packed(numbers: Tensor) -> str:
    """uint8 as text: deflated, in base64."""
    return b64encode(zlib.compress(numbers.numpy().tobytes(), 9)).decode()


def changes(states: Tensor) -> list[dict[str, str]]:
    """(n, L, G, S) uint8 of 0, 1, 2 as what changes from step to step: for the tokens that were 0, for those that were
    1, for those that were 2; before the first step all are 0.

    Over such tokens of all steps in order, `gaps` says how far it is from one that changes to the next, the first from
    0 on: 255 stands for 255 tokens and no change, a smaller number ends at one. `to` has what it changes to.
    """
    before, parts = torch.cat((torch.zeros_like(states[:1]), states[:-1])), []
    for tier in range(3):
        now = states[before == tier]
        at = (now != tier).nonzero()[:, 0]
        gap = at.diff(prepend=at.new_zeros(1))
        ends = (gap // 255 + 1).cumsum(0)
        gaps = torch.full((int(ends[-1]) if len(ends) else 0,), 255, dtype=torch.uint8)
        gaps[ends - 1] = (gap % 255).to(torch.uint8)
        parts.append({"gaps": packed(gaps), "to": packed(now[at])})
    return parts


def levels(scores: Tensor) -> str:
    """Scores as powers of two, one byte each: 128 is 1, 118 is 2 ** -10; 0 is a score of 0."""
    level = (128 + scores.log2().round()).clamp(1, 255).where(scores > 0, 0)
    return packed(level.to(torch.uint8))


def check_size(llm, tokens: int, steps: int) -> None:
    """ValueError for a record that would be too much for a page."""
    heads = llm.config.layers * llm.config.kv_heads
    if heads * tokens * steps > MOST:
        raise ValueError(f"--trace of {heads} KV heads, {tokens} tokens and {steps} steps is too much for a page; "
                         f"at most {MOST // (heads * tokens)} such steps; lower --max-new-tokens")  # fmt: skip


def page(record: dict) -> str:
    """The record in tracing.html: no part of it can end the script that it lies in."""
    before, _, after = Path(__file__).with_suffix(".html").read_text(encoding="utf-8").partition("@record@")
    return before + json.dumps(record, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c") + after
