"""The report after the answer: tokens and bytes per tier against the full cache, the SLM's share, similarity, times.

Where it sits: at the end of generate.py. `make_report` turns a finished session into plain numbers (for `--json`),
`print_report` and `print_comparison` into rich tables.
"""

from itertools import zip_longest

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text as Words

from decode import Session, Timing
from evicting import EvictingCache
from full_cache import FullCache
from smallkv import SmallKV
from speculative import SpeculativeFull, SpeculativeSession
from text import Text


def make_report(session: Session, timing: Timing) -> dict:
    """Everything the report says, as JSON types.

    tokens: per sequence, tokens in the slots of each tier at the end, mean over layers and KV heads; what a baseline
    evicted is dropped, not offloaded. ledger: bytes allocated, by model, kind and device. full_cache_bytes: what the
    LLM's full cache would take for the same positions. moved: rows brought from the host. parallel.py joins the reports
    of several ranks to one with `ranks`, the ledger of each.
    """
    policy, cache, llm = session.policy, session.cache, session.llm
    batch, capacity = len(session.prompts), session.capacity
    full = FullCache.predict(llm.config, batch, capacity, llm.device.type, llm.dtype)
    ledgers = {"LLM": cache.ledger()}
    if isinstance(policy, (SmallKV, SpeculativeFull)):
        ledgers["SLM"] = policy.slm_cache.ledger()
    tokens, similarity, moved = [], None, None
    if isinstance(policy, SmallKV):
        for b, length in enumerate(session.lengths):
            critical, marginal = cache.tokens(b)
            offloaded = length - critical - marginal
            tokens.append({"critical": critical, "marginal": marginal, "offloaded": offloaded, "all": length})
        maps = [m.similarity for m in policy.maps if m is not None]
        if maps:
            values = torch.stack(maps)
            similarity = {"mean": values.mean().item(), "worst": values.min().item(), "matched": len(maps)}
        moved = {"keys": cache.keys_moved, "values": cache.values_moved, "steps": cache.steps}
    elif isinstance(cache, EvictingCache):
        for b, length in enumerate(session.lengths):
            kept = cache.tokens(b)
            tokens.append({"critical": kept, "dropped": length - kept, "all": length})
    else:
        tokens = [{"critical": n, "marginal": 0, "offloaded": 0, "all": n} for n in session.lengths]
    return {
        "tokens": tokens,
        "ledger": [
            {"model": model, "what": entry.what, "device": entry.device, "bytes": entry.size}
            for model, entries in ledgers.items()
            for entry in entries
        ],
        "full_cache_bytes": sum(entry.size for entry in full),
        "similarity": similarity,
        "moved": moved,
        "speculation": speculation(session) if isinstance(session, SpeculativeSession) else None,
        "ttft_s": timing.first_token,
        "tpot_ms": timing.per_token * 1e3 if timing.steps else None,
        "decode_steps": timing.steps,
    }


def speculation(session: SpeculativeSession) -> dict:
    """acceptance: share of the drafts that the LLM kept. tokens_per_step: of a sequence in one verify step."""
    counts = session.counts
    return {"drafts": session.policy.drafts, "drafted": counts.drafted, "accepted": counts.accepted,
            "acceptance": counts.acceptance, "tokens_per_step": counts.tokens_per_round}  # fmt: skip


def _size(count: int) -> str:
    return f"{count / 2**20:,.2f} MiB"


def print_report(name: str, report: dict, console: Console) -> None:
    """Tables and two lines: what was kept where, and how fast it went."""
    full = report["full_cache_bytes"]
    table = Table(title=f"{name}: bytes allocated, full cache of the LLM = {_size(full)}", title_justify="left")
    for heading in ("model", "tier", "where"):
        table.add_column(heading)
    for heading in ("bytes", "of full"):
        table.add_column(heading, justify="right")
    for entry in report["ledger"]:
        share = f"{entry['bytes'] / full:.1%}"
        table.add_row(entry["model"], entry["what"], entry["device"], _size(entry["bytes"]), share)
    fast = sum(entry["bytes"] for entry in report["ledger"] if entry["device"] != "host")
    table.add_section()
    table.add_row("both", "all but the host tier", "", _size(fast), f"{fast / full:.1%}", style="bold")
    console.print(table)
    if "ranks" in report:
        sizes = [sum(entry["bytes"] for entry in rank if entry["device"] != "host")
                 for rank in report["ranks"]]  # fmt: skip
        console.print(f"on each of {len(sizes)} processes: {', '.join(map(_size, sizes))}", highlight=False)
    if report["ttft_s"] is None:
        console.print("ended in the prefill: nothing was generated", highlight=False)
        return
    if report["moved"] and not report["moved"]["steps"]:
        console.print("no decode step ran, so the whole prompt is still on the host", highlight=False)
    for number, tokens in enumerate(report["tokens"], 1):
        which = f"sequence {number}: " if len(report["tokens"]) > 1 else ""
        tiers = [(tier, count) for tier, count in tokens.items() if tier != "all"]
        shares = ", ".join(f"{count:.0f} {tier} ({count / tokens['all']:.0%})" for tier, count in tiers)
        console.print(f"{which}{tokens['all']} tokens per KV head: {shares}", highlight=False)
    if report["similarity"]:
        console.print(
            f"head similarity (cosine of accumulated scores): mean {report['similarity']['mean']:.3f}, "
            f"worst {report['similarity']['worst']:.3f}", highlight=False,
        )  # fmt: skip
    elif report["moved"]:
        console.print("heads not matched: fewer than 100 tokens, so nothing was evicted either", highlight=False)
    drafts = report["speculation"]
    if drafts and drafts["drafted"]:
        console.print(
            f"drafts: {drafts['accepted']} of {drafts['drafted']} accepted ({drafts['acceptance']:.0%}), "
            f"{drafts['tokens_per_step']:.2f} tokens per step and sequence", highlight=False,
        )  # fmt: skip
    tpot = f", TPOT {report['tpot_ms']:.1f} ms" if report["tpot_ms"] is not None else ""
    console.print(f"TTFT {report['ttft_s']:.2f} s{tpot}", highlight=False)


def first_difference(one: list[int], other: list[int]) -> int | None:
    """Index of the first token where two answers part; None if they are the same."""
    for index, (a, b) in enumerate(zip_longest(one, other)):
        if a != b:
            return index
    return None


def print_comparison(text: Text, left, right, console: Console, names=("full cache", "SmallKV")) -> None:
    """Two methods' answers side by side; what comes after the first difference is coloured."""
    for number, (one, other) in enumerate(zip(left.tokens, right.tokens), 1):
        parting = first_difference(one, other)
        table = Table(*names, title=f"answer {number}", show_lines=True)
        # Styled text, not markup: an answer may hold brackets and backslashes of its own.
        cut = len(one) if parting is None else parting
        cells = []
        for tokens in (one, other):
            same, rest = text.decode(tokens[:cut]), text.decode(tokens)
            rest = rest[len(same) :] if rest.startswith(same) else text.decode(tokens[cut:])
            cells.append(Words.assemble(same, (rest, "yellow")))
        table.add_row(*cells)
        console.print(table)
        if parting is None:
            console.print(f"the same {len(one)} tokens", highlight=False)
        else:
            pieces = [repr(text.decode(tokens[parting : parting + 1])) for tokens in (one, other)]
            line = f"they part at token {parting + 1}: {pieces[0]} against {pieces[1]}"
            console.print(line, highlight=False, markup=False)
