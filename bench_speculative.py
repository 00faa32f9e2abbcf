"""Rounds of drafts on the clock: `bench.py --speculate 4 --acceptance 0.7`.

    python bench.py --settings 64x2048+256 --decode-only --methods full-graph,smallkv-graph --speculate 4 --table

Where it sits: under bench.py, in place of its `measure`; it times the rounds of graph_speculative.py. Random weights
accept nothing, so acceptance is driven as the turnover is: a table of numbers drawn beforehand says which drafts count
as accepted, each with the same probability; the LLM's own choice is computed all the same. What was accepted is counted
and printed as counted. TPOT is the time of a round over the tokens that a round gives a sequence, and so are the bytes
of its floor: the LLM's once a round, the SLM's K + 1 times.
"""

import gc
import statistics
from dataclasses import replace

import torch
from torch import Tensor

import bench_sessions
from backend import pick_backend
from bench_clock import Clock, profile
from bench_count import Setting, step_bytes
from decode import Sampler
from graph_speculative import Round
from quantize import int4_modules, run_on
from settings import Settings
from speculative import SpeculativeFull, SpeculativeSession, SpeculativeSmallKV

METHODS = ("full-graph", "smallkv-graph")
DRAWN = 256  # rounds until the table of accepted drafts begins anew


class DrivenRound(Round):
    """The round whose plan follows the ring, and whose drafts are accepted as a table says."""

    def __init__(self, session: SpeculativeSession, backend, acceptance: float):
        super().__init__(session, backend, Sampler())
        generator = torch.Generator().manual_seed(0)
        stays = torch.rand(DRAWN, len(session.lengths), self.drafts, generator=generator) < acceptance
        self.counts = stays.long().cumprod(-1).sum(-1).to(self.tokens.device)  # (DRAWN, B)
        self.number = torch.zeros(1, dtype=torch.long, device=self.tokens.device)

    def body(self) -> None:
        if self.tiered:
            self.side.prior = self.session.policy.driven.turn()
        super().body()

    def accept(self, logits: Tensor, believed: list[Tensor]) -> tuple[Tensor, Tensor]:
        _, after = super().accept(logits, believed)
        count = self.counts.index_select(0, self.number)[0]
        self.number.add_(1).remainder_(DRAWN)
        return count, after


def make_session(method: str, models, setting: Setting, settings: Settings, args, backend) -> SpeculativeSession:
    llm, slm = models
    for model in models:
        run_on(model, backend)
    known = min(llm.config.vocab_size, slm.config.vocab_size)
    prompts = torch.randint(known, (setting.batch, setting.prompt)).tolist()
    if method == "full-graph":
        policy = SpeculativeFull(llm, slm, args.speculate)
        return SpeculativeSession(llm, policy, prompts, setting.new, chunk=args.chunk)
    head_map = bench_sessions.random_map(llm, slm, settings) if args.decode_only else None
    policy = SpeculativeSmallKV(llm, slm, settings, args.speculate, head_map, backend.column_sums)
    session = SpeculativeSession(llm, policy, prompts, setting.new, chunk=args.chunk)
    policy.driven = bench_sessions.Driven(setting.batch, session.capacity, llm.device)
    return session


def round_bytes(models, setting: Setting, length: int, settings: Settings | None, drafts: int) -> dict[str, int]:
    """Bytes that one round cannot avoid to read, by kind; settings None is the full cache."""
    llm, slm = (model.config for model in models)
    llm = replace(llm, vocab_size=models[0].lm_head.out_features)
    itemsize, int4 = models[0].dtype.itemsize, tuple(bool(int4_modules(model)) for model in models)
    size, marginal = (settings.planned(length), settings.marginal) if settings else (None, False)
    once = step_bytes(llm, None, setting.batch, length, itemsize, size, marginal, int4)
    again = step_bytes(llm, slm, setting.batch, length, itemsize, Settings().sizes(length), False, int4,
                       drafts=True)  # fmt: skip
    again = {kind: (drafts + 1) * again[kind] for kind in ("SLM weights", "SLM K, V", "scores")[: 2 + bool(settings)]}
    return {**once, **again, "SLM output": drafts * itemsize * slm.vocab_size * slm.hidden_size}


def measure(method: str, models, setting: Setting, settings: Settings, args, clock: Clock) -> list[dict]:
    """One method in one setting: a row for each turnover (one for the full cache), as bench.measure."""
    cuda, tiered = clock.device.type == "cuda", method == "smallkv-graph"
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    backend = pick_backend(args.backend, clock.device)
    session = make_session(method, models, setting, settings, args, backend)
    logits: list[Tensor] = []
    ttft = None if args.decode_only else clock.once(lambda: logits.append(session.prefill()))
    tokens = bench_sessions.fill(session) if args.decode_only else logits[0].argmax(-1)
    if args.decode_only:
        slm_cache = session.policy.slm_cache
        slm_cache.key.normal_(), slm_cache.value.normal_()
    with torch.inference_mode():
        rounds = DrivenRound(session, backend, args.acceptance)
        rounds.tokens.copy_(tokens)
    first = clock.once(rounds.run)
    rounds.run()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        rounds.capture()
    rows, turnovers = [], args.turnover if tiered else [None]
    for number, turnover in enumerate(turnovers):
        if tiered:
            session.policy.driven.shift.fill_(bench_sessions.ring_shift(turnover, session))
        clock.laps(rounds.run, 2)
        before, moved = rounds.length.tolist(), moved_rows(rounds)
        room = (session.capacity - max(before)) // (args.speculate + 1) - 1
        count = min(args.steps, room // (len(turnovers) - number) - 3)  # the next turnover warms up too
        if count < 1:
            raise ValueError(f"{setting.name} leaves no room for rounds of {args.speculate + 1} tokens: more +NEW")
        laps = clock.laps(rounds.run, count)
        after, moved = rounds.length.tolist(), [end - at for end, at in zip(moved_rows(rounds), moved)]
        given = statistics.mean(end - at for end, at in zip(after, before)) / count  # tokens a round and sequence
        length = (before[0] + after[0]) // 2
        tpot = [seconds / given for seconds in laps]
        moved = [rows / count for rows in moved]
        row = bench_sessions.row(method, models, setting, settings, length, tpot, ttft, turnover, moved)
        if tiered:
            planned = session.policy.settings.planned(length).critical
            heads = setting.batch * models[0].config.layers * models[0].config.kv_heads
            row["turnover"] = moved[0] / planned / heads
            row["pcie_bytes_step"] /= given
        floor = round_bytes(models, setting, length, session.policy.settings if tiered else None, args.speculate)
        taken = statistics.median(laps)
        rows.append(row | {
            "method": f"{method}, {args.speculate} drafts, {given:.2f} tokens in {1e3 * taken:.2f} ms",
            "drafts": args.speculate, "tokens_round": given, "round_s": taken,
            "acceptance": (given - 1) / args.speculate, "step_bytes": {kind: n / given for kind, n in floor.items()},
            "first_step_s": first, "predicted_bytes": None, "tiers": bench_sessions.tiers(session),
            "peak_prefill_bytes": None, "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        })  # fmt: skip
        if args.profile:
            profile(rounds.run, f"{args.profile}.{method}.{setting.name}.drafts.txt")
    return rows


def moved_rows(rounds: Round) -> list[int]:
    """Keys and values brought from the host so far."""
    if not rounds.tiered:
        return [0, 0]
    keys, values = rounds.side.moved.flatten().tolist()
    return [keys, values if rounds.side.marginal else keys]
