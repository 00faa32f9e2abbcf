"""The report after an answer: what lies in which tier, what moved, how alike the heads are, how fast it went.

Where it sits: behind a session (decode.py, speculative.py), in front of generate.py and evaluate.py. `make_report`
turns a session into plain numbers, for `--json`; the rest prints them.
"""

from functools import partial
from itertools import zip_longest

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text as Words

from cache import TieredCache
from decode import Policy, Session, Timing
from evicting import SlotCache
from model import Decoder
from quantize import int4_modules
from smallkv import SmallKV
from speculative import RoundSession
from text import Text

REACH_LOSS = 0.01  # of the mean similarity of heads: a reach that costs more is named
HOLDS = {"critical": "critical: K, V", "marginal": "marginal: V alone", "offloaded": "offloaded: K, V elsewhere"}
ALIKE = 0.85  # mean similarity of heads below which an SLM's scores are a poor guide


def make_report(session: Session, timing: Timing) -> dict:
    """Everything the report says, as JSON types.

    tokens: of each sequence, in each tier's slots at the end, mean over layers and KV heads; what a baseline evicts is
    dropped. ledger: bytes allocated. full_cache_bytes: of the LLM's full cache for the same positions. moved: rows that
    came from the third tier into the others in `steps` steps, without the first plan's, which fill the slots.
    similarity: of the matched heads, and `anywhere` of those that would be if every SLM layer were within reach.
    """
    policy, cache, config = session.policy, session.policy.cache, session.llm.config
    prompts = [len(prompt) for prompt in session.prompts]
    tokens, similarity, moved, speculation = [], None, None, None
    rest = "dropped" if isinstance(cache, SlotCache) else "offloaded"
    for b, length in enumerate(session.lengths):
        held = cache.tokens(b) if isinstance(cache, (SlotCache, TieredCache)) else {"critical": length, "marginal": 0}
        tokens.append({**held, rest: length - sum(held.values()), "all": length})
    if isinstance(policy, SmallKV):
        maps = [found for found in policy.maps if found is not None]
        if maps:
            near, far = (torch.stack([getattr(m, name) for m in maps]) for name in ("similarity", "anywhere"))
            similarity = {"mean": near.mean().item(), "worst": near.min().item(), "matched": len(maps),
                          "mean_anywhere": far.mean().item(), "worst_anywhere": far.min().item()}  # fmt: skip
        # The first plan brings all of its tiers but the newest token, which is made on the device.
        critical, _, marginal = policy.sizes[[n + 1 for n in prompts]].sum(0).tolist()
        first = [config.layers * config.kv_heads * count for count in (critical - len(prompts), marginal)]
        critical, marginal = (max(0, n - filled) for n, filled in zip(cache.moved.sum(0).tolist(), first))
        size, steps = cache.row_bytes(critical, marginal), max(0, session.steps - 1)
        moved = {"critical": critical, "marginal": marginal, "bytes": size, "steps": steps}
    if isinstance(session, RoundSession):
        counts = session.counts
        speculation = {"drafts": policy.drafts, "drafted": counts.drafted, "accepted": counts.accepted,
                       "acceptance": counts.acceptance, "tokens_per_step": counts.tokens_per_round}  # fmt: skip
    ledger = [(model, line) for model, part in policy.caches.items() for line in part.ledger()]
    return {
        "tokens": tokens,
        "ledger": [{"model": model, "what": line.what, "device": "host" if line.host else session.llm.device.type,
                    "bytes": line.size} for model, line in ledger],
        "full_cache_bytes": sum(line.size for line in Policy(session.llm).ledgers(prompts, session.capacity)["LLM"]),
        "similarity": similarity,
        "moved": moved,
        "speculation": speculation,
        "prompt": {"tokens": sum(prompts), "chunk": session.chunk},
        "ttft_s": timing.first_token,
        "tpot_ms": timing.per_token * 1e3 if timing.steps else None,
        "decode_steps": timing.steps,
    }  # fmt: skip


def run_line(llm: Decoder, policy: Policy) -> str:
    """What runs, in one line: nothing is chosen silently."""
    device, memory = llm.device, "host memory"
    name, steps = f"{torch.get_num_threads()} threads", f"plain PyTorch {torch.__version__}"
    if device.type == "cuda":
        name, steps, memory = torch.cuda.get_device_name(device), "Triton kernels in a CUDA graph", "pinned host memory"
    third = "no third tier"
    if isinstance(policy, SmallKV):
        third = f"third tier in {memory if policy.settings.offload == 'cpu' else 'the device memory'}"
        third += ", as many slots for every KV head" * policy.settings.uniform
    dtype = str(llm.dtype).removeprefix("torch.") + ", INT4 weights" * bool(int4_modules(llm))
    return f"runs on {device} ({name}), {dtype}: {steps}, {third}"


def print_report(name: str, report: dict, console: Console) -> None:
    """Bytes and tokens by tier as tables, and a line each for what moved, the heads, the drafts and the times."""

    def fast(ledger: list[dict]) -> int:
        return sum(line["bytes"] for line in ledger if line["device"] != "host")

    say, full, moved = partial(console.print, highlight=False), report["full_cache_bytes"], report["moved"]
    heads, drafts, prompt = report["similarity"], report["speculation"], report["prompt"]
    table = Table("model", "tier", "where", title=f"{name}: bytes allocated")
    table.add_column("MiB", justify="right")
    table.add_column("of full cache", justify="right")
    lines = [tuple(line.values()) for line in report["ledger"]]  # model, what, device, bytes
    lines += [("LLM", "full cache, to compare", "", full), ("all", "but the host's", "", fast(report["ledger"]))]
    for *where, size in lines:
        table.add_row(*where, f"{size / 2**20:,.2f}", f"{size / full:.1%}")
    say(table)
    if "ranks" in report:
        sizes = ", ".join(f"{fast(ledger) / 2**20:,.2f} MiB" for ledger in report["ranks"])
        say(f"on each of {len(report['ranks'])} processes: {sizes}")
    if report["ttft_s"] is None:
        return say("ended in the prefill: nothing was generated")
    tiers = [tier for tier in report["tokens"][0] if tier != "all"]
    names = (HOLDS.get(tier, tier) for tier in tiers)
    table = Table("sequence", "tokens", *names, title=f"{name}: tokens per KV head (mean)")
    for number, held in enumerate(report["tokens"], 1):
        shares = [f"{held[tier]:.0f} ({held[tier] / held['all']:.0%})" for tier in tiers]
        table.add_row(f"{number}", f"{held['all']:.0f}", *shares)
    say(table)
    if moved and moved["steps"]:
        rows = f"{moved['critical']:,} critical rows (K and V), {moved['marginal']:,} marginal ones (V)"
        say(f"moved after the first plan: {rows}, {moved['bytes'] / 2**20:,.2f} MiB in {moved['steps']} steps")
    if heads:
        say(f"head similarity (cosine of accumulated scores): mean {heads['mean']:.3f}, worst {heads['worst']:.3f}; "
            f"over all SLM layers {heads['mean_anywhere']:.3f}, {heads['worst_anywhere']:.3f}")  # fmt: skip
        if heads["mean"] < ALIKE:
            say(f"below {ALIKE:.2f} this SLM does not look at this text as the LLM does, and the answer may lack "
                "what it needs: give a larger --budget, an SLM of the LLM's own series, or one that training.distill "
                "has trained on such text")  # fmt: skip
        if heads["mean_anywhere"] - heads["mean"] > REACH_LOSS:
            say("more similar heads are beyond the reach: --reach inf may answer better")
    elif moved:
        say("heads not matched: fewer than 100 tokens, so nothing was evicted either")
    if drafts and drafts["drafted"]:
        say(f"drafts: {drafts['accepted']} of {drafts['drafted']} accepted ({drafts['acceptance']:.0%}), "
            f"{drafts['tokens_per_step']:.2f} tokens per step and sequence")  # fmt: skip
    tpot = f", TPOT {report['tpot_ms']:.1f} ms" if report["tpot_ms"] is not None else ""
    say(f"TTFT {report['ttft_s']:.2f} s ({prompt['tokens']} prompt tokens, up to {prompt['chunk']} at once){tpot}")


def print_comparison(text: Text, results: dict[str, dict], console: Console) -> None:
    """Two methods' answers side by side; what comes after the first difference is coloured."""
    for number, both in enumerate(zip(*([own["tokens"] for own in x["answers"]] for x in results.values())), 1):
        parting = next((at for at, (one, other) in enumerate(zip_longest(*both)) if one != other), None)
        table = Table(*results, title=f"answer {number}", show_lines=True)
        cells = []
        for tokens in both:  # styled text, not markup: an answer may hold brackets and backslashes of its own
            same, rest = text.decode(tokens[:parting]), text.decode(tokens)
            rest = rest[len(same) :] if rest.startswith(same) else text.decode(tokens[parting:])
            cells.append(Words.assemble(same, (rest, "yellow")))
        table.add_row(*cells)
        console.print(table)
        line = f"the same {len(both[0])} tokens"
        if parting is not None:
            pieces = [repr(text.decode(tokens[parting : parting + 1])) for tokens in both]
            line = f"they part at token {parting + 1}: {' against '.join(pieces)}"
        console.print(line, highlight=False, markup=False)
