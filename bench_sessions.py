"""What bench.py measures: sessions on random weights, filled caches, and a plan that is driven.

Where it sits: under bench.py and bench_speculative.py. With random weights a plan is noise, so a ring of ranks that is
turned before each plan outweighs every score: the turnover is the one asked for.
"""

import os
import statistics
from dataclasses import replace

import torch

from backend import Backend
from baselines import BASELINES
from bench_clock import draw
from bench_count import Setting, paper_throughput, prefill_flops, step_bytes
from decode import FullPolicy, Session
from evicting import Budget
from frugal import Prompt
from full_cache import FullCache, memory_dtype
from graph import Step
from int8_rows import LEVELS
from match import HeadMap
from model import Decoder
from quantize import int4_modules, run_on
from settings import Settings, TierSizes
from smallkv import SmallKV

RIVALS = ("h2o", "pyramidinfer", "streaming", "snapkv")  # h2o-published: with the n x n matrix of its prefill


class Driven:
    """The turning ring: ranks (B, S) of all positions, moved on by `shift` positions before each plan."""

    def __init__(self, batch: int, capacity: int, device):
        generator = torch.Generator().manual_seed(0)
        rank = torch.stack([torch.randperm(capacity, generator=generator) for _ in range(batch)])
        self.rank = rank.float().add_(8).to(device)  # above any sum of the 7 probabilities of a group
        self.low, self.capacity = 8, capacity
        self.shift = torch.zeros((), device=device)

    def turn(self) -> torch.Tensor:
        return self.rank.sub_(self.low).add_(self.shift).remainder_(self.capacity).add_(self.low)


class DrivenStep(Step):
    """The static step whose plan follows the ring. It is turned for the next plan when this step's are made, beside the
    LLM: a plan waits for nothing that it would not wait for without the ring."""

    def body(self, plan: bool) -> None:
        if self.slm is None:
            super().body(plan)
            return
        self.side.prior = self.driven.rank
        super().body(plan)
        if plan:
            with torch.cuda.stream(self.side.planner):  # None: where we are
                self.driven.turn()
            if self.side.planner is not None:
                torch.cuda.current_stream().wait_stream(self.side.planner)


class DrivenSmallKV(SmallKV):
    """The eager policy whose plan follows the ring."""

    def observe(self, tokens, span) -> None:
        super().observe(tokens, span)
        if self.refreshing:
            self.ring = self.driven.turn()[:, None, : self.end]  # (B, 1, n)

    def _ranking(self, layer: int) -> torch.Tensor:
        return super()._ranking(layer) + self.ring


def rival(method: str, llm: Decoder, settings: Settings):
    """The policy of a method that evicts, at the same budget; None for the full cache and SmallKV."""
    name, _, path = method.partition("-")
    options = {"eager": True} if path == "published" else {}
    return BASELINES[name](llm, Budget(settings.budget), **options) if name in RIVALS else None


def full_policy(method: str, llm: Decoder) -> FullPolicy:
    return FullPolicy(llm, int8="int8" in method)


def make_session(
    method: str, models, setting: Setting, settings: Settings, chunk: int, backend: Backend, filled: bool = False
) -> Session:
    """filled: `fill` takes the place of the prefill, and random heads that of the matching, which happens there."""
    llm, slm = models
    for model in models:
        run_on(model, backend)
    known = min(llm.config.vocab_size, slm.config.vocab_size)  # those of one series are padded differently
    prompts = torch.randint(known, (setting.batch, setting.prompt)).tolist()
    if method.startswith("full"):
        return Session(llm, full_policy(method, llm), prompts, setting.new, chunk)
    if policy := rival(method, llm, settings):
        return Session(llm, policy, prompts, setting.new, chunk)
    head_map = random_map(llm, slm, settings) if filled else None
    policy = DrivenSmallKV(llm, slm, settings, head_map, backend.column_sums)
    session = Session(llm, policy, prompts, setting.new, chunk)
    policy.driven = Driven(setting.batch, session.capacity, llm.device)
    return session


def random_map(llm: Decoder, slm: Decoder, settings: Settings) -> torch.Tensor:
    """A head map (L, H) within the settings' reach."""
    near = SmallKV(llm, slm, settings).needed
    return torch.stack([torch.randint(n * slm.config.query_heads, (llm.config.query_heads,)) for n in near])


@torch.inference_mode()
def fill(session: Session) -> torch.Tensor:
    """Random K and V in every cache, as if prefilled; first tokens (B,)."""
    cache, policy = session.cache, session.policy
    if cache.scale is not None:
        cache.scale.fill_(1 / LEVELS)
    batch, device = len(session.prompts), session.llm.device
    if isinstance(cache, FullCache):
        draw(cache.key), draw(cache.value)
    else:
        for b, length in enumerate(session.lengths):
            staged = policy.slm_cache.staging(b, length)
            staged.key.normal_(), staged.value.normal_(), staged.score.zero_()
            if isinstance(staged, Prompt):
                staged.gathered.uniform_()  # who stays in a cut cache: the newest, and others at random
            policy.slm_cache.load(b, staged, length)
        if policy.own_decay is not None:
            cache.score.zero_()
        some = draw(torch.empty(cache.host.shape[2:], device=device, dtype=cache.key.dtype))  # of one sequence
        for host in cache.host.flatten(0, 1):
            host.copy_(some, non_blocking=True)
        if device.type == "cuda":
            torch.cuda.synchronize()  # what reads the host next does not wait for these copies
        policy.index.copy_(policy.given_map.expand_as(policy.index))
        policy.maps = [HeadMap(policy.given_map, torch.full(policy.given_map.shape, torch.nan))] * batch
        policy.tokens = [list(prompt) for prompt in session.prompts]
    return torch.zeros(batch, dtype=torch.long, device=device)


def ring_shift(turnover: float, session: Session) -> float:
    """Ring positions a plan, so that `turnover` of the critical set changes; recent tokens stay, in any case."""
    length = session.lengths[0]
    size = session.policy.settings.planned(length)
    return round(turnover * size.critical * session.capacity / (length - size.recent))


def largest(method: str, models, prompt: int, new: int, settings: Settings) -> Setting:
    """The largest batch whose predicted caches fit: 92 % of the GPU beside the weights, 85 % of the host's free RAM."""
    llm, slm = models
    policy = full_policy(method, llm) if method.startswith("full") else rival(method, llm, settings)
    policy = policy or SmallKV(llm, slm, settings)
    options = {"static": True} if method == "smallkv-graph" else {}
    one = [entry for entries in policy.predict([prompt], prompt + new, **options).values() for entry in entries]
    device = sum(entry.size for entry in one if entry.device == llm.device.type)
    host = sum(entry.size for entry in one if entry.device != llm.device.type)
    room = 0.92 * torch.cuda.mem_get_info()[1] - sum(weights_of(model) for model in models)
    free = 0.85 * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    batch = int(min(room // device, free // host) if host else room // device)
    if batch < 1:
        raise ValueError(f"--largest: {prompt} + {new} tokens of {method} need {device / 1e9:.1f} GB on the GPU and "
                         f"{host / 1e9:.1f} on the host; free are {room / 1e9:.1f} and {free / 1e9:.1f}")  # fmt: skip
    return Setting(batch, prompt, new)


def moved_rows(method: str, session: Session, step) -> tuple[int, int]:
    if method == "smallkv-eager":
        return session.cache.keys_moved, session.cache.values_moved
    return step.side.moved_rows()


def weights_of(model: Decoder) -> int:
    storages = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]
    return sum({held.data_ptr(): held.nbytes() for held in storages}.values())  # views of one tensor count once


# ---- Rows of the table -----------------------------------------------------------------------------------------------


def row(method, models, setting, settings, length, laps, ttft, turnover, moved) -> dict:
    """The numbers of one method in one setting, all in seconds and bytes."""
    llm, slm = (model.config for model in models)
    llm = replace(llm, vocab_size=models[0].lm_head.out_features)  # a rank's part of the output projection
    slm = slm if method.startswith("smallkv") else None
    size = settings.sizes(length) if slm else None
    if method.partition("-")[0] in RIVALS:
        size = TierSizes(Budget(settings.budget).kept(length), 1, 0)
    tpot = statistics.median(laps)
    cuts = statistics.quantiles(laps, n=10) if len(laps) > 1 else [tpot]
    int8 = (settings.llm_int8, settings.slm_int8) if slm else ("int8" in method, False)
    row_bytes = llm.head_dim * (1 if settings.llm_int8 else models[0].dtype.itemsize)
    per_plan = settings.planned(length).critical * setting.batch * llm.layers * llm.kv_heads
    memory = settings.fused * memory_dtype(models[0].dtype, settings.score_decay).itemsize
    out = {
        "method": method, "setting": setting.name, "length": length, "tpot_s": tpot,
        "tpot_p10_p90": [cuts[0], cuts[-1]],
        "tokens_s": setting.batch / tpot, "ttft_s": ttft, "turnover_asked": turnover,
        "turnover": moved[0] * settings.refresh / per_plan if slm else None, "pcie_bytes_step": sum(moved) * row_bytes,
        "step_bytes": step_bytes(llm, slm, setting.batch, length, models[0].dtype.itemsize, size, settings.marginal,
                                 tuple(bool(int4_modules(model)) for model in models), memory,
                                 settings.slm_budget, logits=settings.logits and method == "smallkv-graph",
                                 int8=int8),
        "prefill_flops": prefill_flops(llm, slm, setting.batch, setting.prompt),
    }  # fmt: skip
    out["paper_throughput"] = paper_throughput(setting, ttft, tpot) if ttft is not None else None
    return out


def tiers(session: Session) -> list[dict]:
    ledgers = {"LLM": session.cache.ledger()}
    if hasattr(session.policy, "slm_cache"):
        ledgers["SLM"] = session.policy.slm_cache.ledger()
    return [vars(entry) | {"model": model} for model, entries in ledgers.items() for entry in entries]
