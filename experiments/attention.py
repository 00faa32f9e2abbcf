"""What the paper looks at in attention itself: Fig. 1b, 1c, 2, 8, 9 and Tables 7, 8, 9, each as one command.

    python -m experiments.attention fig1b                                        # the embedded pair on its prose
    python -m experiments.attention fig8 --llm DIR --slm DIR --file test.txt --limit 200
    python -m experiments.attention table7 --llm DIR --slm DIR OTHER --prompts bbh.jsonl --field input --limit 50

Where it sits: outside the flow, on what its first arrows make: tokens -> SLM -> **scores**. It runs both models over
texts and compares accumulated scores (Eq. 1) of the LLM's heads with those of the SLM's heads that stand for them
(Eq. 2-3). What the paper found is in README.md beside this file. Similarities are cosines of accumulated scores without
the first SINKS tokens ("we removed the first few tokens", Appendix B).

Texts are windows of --tokens tokens from a file, one after the other, or the prompts of a file of JSON lines. The
folder --out gets run.json, rows.jsonl (what was measured of each text, as it comes), and the paper's picture.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from checkpoint import DTYPES
from command import (
    Parser,
    check_folder,
    device,
    ended,
    markdown_table,
    number,
    read_json,
    read_lines,
    read_text,
    whole,
    write_json,
)
from decode import Policy, generate
from evaluate import describe
from evicting import kept_tokens
from experiments.curve import pyplot
from generate import PAIR, Pair, load_pair
from match import MATCHERS, SINKS, WINDOW_MAX, WINDOW_MIN, head_scores, match_heads, score_similarity
from model import Config, Decoder, Span
from ops import Rope, rotate

BANDS = {"top 5 %": 0.05, "5-10 %": 0.10, "10-15 %": 0.15, "rest": 1.0}  # of Fig. 2: where each ends


# ---- Scores ----------------------------------------------------------------------------------------------------------


def scores_of(model: Decoder, ids: list[int]) -> Tensor:
    """Accumulated scores (Eq. 1) of every head over a text: (L * H, n) fp32."""
    return head_scores(model, torch.tensor([ids], device=model.device))


def chosen_heads(llm: Decoder, slm: Decoder, ids: list[int], matcher: str = "jaccard") -> Tensor:
    """f(i) of every LLM head (Eq. 3), as it is matched on the beginning of a text: (L * H,) int64."""
    return match_heads(llm, slm, ids[:WINDOW_MAX], matcher).index.flatten()


def by_kv_head(scores: Tensor, config: Config) -> Tensor:
    """Scores of every query head to one for each KV head, by sum, as tokens are kept: (L * H, n) -> (L * G, n)."""
    return scores.view(config.layers * config.kv_heads, -1, scores.shape[-1]).sum(1)


def cosine(one: Tensor, other: Tensor) -> Tensor:
    """Cosine of scores without the sinks: (..., n) x (..., n) -> (...)."""
    return torch.cosine_similarity(one[..., SINKS:], other[..., SINKS:], dim=-1)


def top_mask(scores: Tensor, count: int) -> Tensor:
    """Membership of the `count` largest, ties by position: (..., n) -> (..., n) bool."""
    best = scores.argsort(dim=-1, descending=True, stable=True)[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)


# ---- Fig. 1b: saliency shift -----------------------------------------------------------------------------------------


class TwoDrops:
    """The "real drop" of Fig. 1a as a cache for one forward over a text: after its first half each KV head drops all
    but its heavy hitters, and the second half attends to what is left and to itself.

    scores, of each layer (G, n): what every token has gathered at the end, -inf if it was dropped. O(n^2) memory.
    """

    def __init__(self, config: Config, half: int, budget: float):
        self.config, self.half, self.kept = config, half, int(kept_tokens(budget, torch.tensor(half)))
        self.scores: list[Tensor] = []

    def attend(self, layer: int, qkv: Tensor, rope: Rope, span: Span) -> Tensor:
        heads = rotate(qkv, rope, self.config.kv_heads, self.config.head_dim)
        query, key, value = (x[0].transpose(0, 1).float() for x in heads)  # (H, n, D), (G, n, D) twice
        G, n, D = key.shape
        logits = query.view(G, -1, n, D) * D**-0.5 @ key[:, None].mT  # (G, H/G, n, n)
        token = torch.arange(n, device=qkv.device)
        late, seen = token >= self.half, token <= token[:, None]
        before = logits[..., : self.half, :].masked_fill(~seen[: self.half], -torch.inf).softmax(-1).sum((1, 2))
        held = top_mask(before, self.kept) | late  # (G, n)
        seen = seen & (held[:, None, None] | ~late[:, None])  # (G, 1, n, n)
        rows = logits.masked_fill(~seen, -torch.inf).softmax(-1)
        self.scores.append(rows.sum((1, 2)).masked_fill(~held, -torch.inf))
        return (rows @ value[:, None]).view(1, -1, n, D).transpose(1, 2).to(qkv.dtype)


def jaccard(one: Tensor, other: Tensor) -> float:
    """Mean over the heads of the Jaccard similarity of two sets of tokens, (heads, n) bool each."""
    return ((one & other).sum(-1) / (one | other).sum(-1)).mean().item()


def saliency_shift(pair: Pair, ids: list[int], budget: float) -> dict:
    """Jaccard of the important tokens, per layer and KV head, of two views with those of an uncompressed cache.

    real drop: the second of two drops, each to the budget, chooses among what the first one left. matched heads: the
    tokens that the SLM names, which drops nothing (Section 4).
    """
    llm, kept = pair.llm, int(kept_tokens(budget, torch.tensor(len(ids))))
    drops = TwoDrops(llm.config, len(ids) // 2, budget)
    llm(torch.tensor([ids], device=llm.device), cache=drops, logits="none")
    important = top_mask(by_kv_head(scores_of(llm, ids), llm.config), kept)
    matched = scores_of(pair.slm, ids).to(llm.device)[chosen_heads(llm, pair.slm, ids)]
    return {"real drop": jaccard(top_mask(torch.cat(drops.scores), kept), important),
            "matched heads": jaccard(top_mask(by_kv_head(matched, llm.config), kept), important)}  # fmt: skip


def fig1b(pair: Pair, pieces: list[list[int]], args) -> Iterator[dict]:
    """Important tokens of a cache that drops twice, and those that the SLM names, beside those of a whole cache."""
    for budget in args.budget:
        yield {"budget": budget, **saliency_shift(pair, pieces[0], budget)}


# ---- Fig. 1c, 8, 9, Tables 7 and 8: similarity -----------------------------------------------------------------------


def fig1c(pair: Pair, pieces: list[list[int]], args) -> Iterator[dict]:
    """Mean cosine of matched heads; and attention by token of the LLM head of median cosine and of its match."""
    llm, slm, ids = pair.llm, pair.slm, pieces[0]
    scores, others = scores_of(llm, ids), scores_of(slm, ids).to(llm.device)
    for matcher in MATCHERS:
        chosen = chosen_heads(llm, slm, ids, matcher)
        similar = cosine(scores, others[chosen])
        head = similar.argsort(stable=True)[len(similar) // 2].item()
        places = divmod(head, llm.config.query_heads), divmod(chosen[head].item(), slm.config.query_heads)
        names = [f"{role} layer {layer}, head {at}" for role, (layer, at) in zip(("LLM", "SLM"), places)]
        curves = (scores[head].tolist(), others[chosen[head]].tolist())
        yield {"matcher": matcher, "cosine": similar.mean().item(), "curves": dict(zip(names, curves))}


def fig8(pair: Pair, pieces: list[list[int]], args) -> Iterator[dict]:
    """Similarity of every LLM head to the best SLM head, and to the one that each matcher picks."""
    best, picked = score_similarity(pair.llm, pair.slm, pieces[0], "jaccard")  # (L, H) each
    found = {"best": best, "jaccard": picked, "cosine": score_similarity(pair.llm, pair.slm, pieces[0], "cosine")[1]}
    for kind, heads in found.items():
        row = {"mean": heads.mean(), "worst": heads.min()}
        row |= {"above 0.9": (heads > 0.9), "above 0.8": (heads > 0.8), "below 0.5": (heads < 0.5)}
        numbers = {name: value.float().mean().item() for name, value in row.items()}
        yield {"head": kind, **numbers, "heads": heads.tolist()}


def fig9(pair: Pair, pieces: list[list[int]], args) -> Iterator[dict]:
    """Attention of each token, the mean over all heads, of the LLM and of the SLM."""
    llm, slm = (scores_of(model, pieces[0]).mean(0).cpu() for model in (pair.llm, pair.slm))
    yield {"cosine": cosine(llm, slm).item(), "curves": {"LLM": llm.tolist(), "SLM": slm.tolist()}}


# ---- Fig. 2: attention by rank ---------------------------------------------------------------------------------------


def fig2(pair: Pair, pieces: list[list[int]], args) -> Iterator[dict]:
    """Shares of all attention that the first, second and third 5 % of the tokens have, by rank.

    all heads: tokens ranked by their score summed over all heads and layers, as in the paper. each head: ranked in
    every head by itself, mean over heads, which is what a method sees that keeps tokens per head.
    """
    scores = scores_of(pair.llm, pieces[0])  # (L * H, n)
    together = scores.sum(0).sort(descending=True).values / scores.sum()
    apart = (scores.sort(dim=-1, descending=True).values / scores.sum(-1, keepdim=True)).mean(0)
    ends = [round(end * scores.shape[1]) for end in BANDS.values()]
    for kind, curve in (("all heads", together), ("each head", apart)):
        bands = [curve[start:end].sum().item() for start, end in zip([0, *ends], ends)]
        ratios = {"top 5 / 5-10": bands[0] / bands[1], "5-10 / 10-15": bands[1] / bands[2]}
        yield {"tokens ranked": kind, **dict(zip(BANDS, bands)), **ratios, "curves": {kind: curve.tolist()}}


# ---- Table 9: a dialogue ---------------------------------------------------------------------------------------------


def dialogue(pair: Pair, pieces: list[list[int]], answer_tokens: int) -> tuple[list[int], list[int]]:
    """A prompt and its turns with the answers that the full cache gives, greedily: token ids, and where the prompt and
    each turn end."""
    ids, ends = list(pieces[0]), [len(pieces[0])]
    for turn in pieces[1:]:
        ids += turn
        ids += generate(Policy(pair.llm), [ids], answer_tokens, pair.text.stop)[0]
        ends.append(len(ids))
    return ids, ends


def turn_similarity(pair: Pair, ids: list[int], ends: list[int]) -> list[float]:
    """Mean cosine of matched heads on the whole text, on its prompt and on each turn; heads stay as matched.

    A turn's scores are what its own queries give to all tokens so far: the difference of two accumulated scores.
    """
    chosen = chosen_heads(pair.llm, pair.slm, ids)
    before, found = [torch.zeros(1, 0)] * 2, []
    for end in ends:
        now = [scores_of(pair.llm, ids[:end]).cpu(), scores_of(pair.slm, ids[:end])[chosen.to(pair.slm.device)].cpu()]
        own = [b - torch.nn.functional.pad(a, (0, end - a.shape[1])) for a, b in zip(before, now)]  # (L * H, end) each
        found.append(cosine(*own).mean().item())
        before = now
    return [cosine(*before).mean().item(), *found]


def table9(pair: Pair, pieces: list[list[int]], args) -> Iterator[dict]:
    """Similarity of matched heads over the turns of a dialogue."""
    ids, ends = dialogue(pair, pieces, args.answer_tokens)
    if len(ids) < WINDOW_MIN:
        print(f"left out: a dialogue of {len(ids)} tokens, too few to match heads on", file=sys.stderr)
        return
    names = ["global", "prompt", *(f"turn {i}" for i in range(1, len(ends)))]
    yield dict(zip(names, turn_similarity(pair, ids, ends)))


# ---- Texts, table, picture -------------------------------------------------------------------------------------------


def texts(args, pair: Pair) -> list[list[list[int]]]:
    """Each text as its pieces, token ids: of table9 a prompt and its turns, else one of at most --tokens. Of the
    latter those too short to match heads on are left out, with a line on standard error."""
    encode = pair.text.encode
    if args.prompts:
        found = []
        for place, row in enumerate(read_lines(args.prompts)[: args.limit], 1):
            for key in args.field.split("."):
                row = row.get(key) if isinstance(row, dict) else None
            turns = [row] if isinstance(row, str) else row
            if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) for turn in turns):
                raise ValueError(f"{args.prompts}, line {place}: no text, nor a list of texts, at {args.field!r}; "
                                 "name another --field")  # fmt: skip
            first, later = (pair.text.chat, pair.text.next_turn) if args.chat else (encode, encode)
            found.append([first(turns[0]), *map(later, turns[1:])])
    elif args.task == "table9":
        document = read_json(PAIR / "demo.json")
        found = [[encode(document["text"]), *(encode(turn["question"]) for turn in document["turns"])]]
    else:
        ids = encode(read_text(args.file))
        found = [[ids[at : at + args.tokens]] for at in range(0, len(ids), args.tokens)][: args.limit]
    if args.task == "table9":  # the answer to a chat's first message is a turn too
        return [[pieces[0], *[[]] * args.chat, *pieces[1:]] for pieces in found]
    window = min(args.tokens, *(model.config.max_positions for model in (pair.llm, pair.slm)))
    fit = [[ids] for ids in (sum(pieces, [])[:window] for pieces in found) if len(ids) >= WINDOW_MIN]
    if len(fit) < len(found):
        print(f"left out: {len(found) - len(fit)} of {len(found)} texts, too short to match heads on", file=sys.stderr)
    return fit


def summary(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Means over the texts: rows are told apart by SLM, budget and what else is a word; numbers are averaged."""
    names = list(dict.fromkeys(name for row in rows for name in row if name not in ("text", "heads", "curves")))
    keys = [name for name in names if name == "budget" or isinstance(rows[0].get(name), str)]
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(str(row[key]) for key in keys), []).append(row)
    figures = [name for name in names if name not in keys]
    lines = []
    for group, members in groups.items():
        values = [[row[name] for row in members if name in row] for name in figures]
        lines.append([*group, *(f"{sum(known) / len(known):.3f}" if known else "-" for known in values)])
    return [*keys, *figures], lines


def draw(name: str, rows: list[dict], path: Path) -> None:
    """The first SLM's picture: means by budget (1b), the first text's curves (1c, 2, 9), similarity by head (8)."""
    plt, rows = pyplot(), [row for row in rows if row["SLM"] == rows[0]["SLM"]]
    if name == "fig8":
        kinds = list(dict.fromkeys(row["head"] for row in rows))
        figure, panels = plt.subplots(1, len(kinds), figsize=(10, 4), sharey=True, layout="constrained")
        for axes, kind in zip(panels, kinds):
            heads = torch.tensor([row["heads"] for row in rows if row["head"] == kind]).mean(0)  # (L, H)
            image = axes.imshow(heads.tolist(), vmin=0, vmax=1, aspect="auto")
            axes.set(title=f"{kind}: mean {heads.mean():.3f}", xlabel="LLM head", ylabel="LLM layer")
        figure.colorbar(image, ax=panels, label="cosine of accumulated attention")
    else:
        figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
        if name == "fig1b":
            for view in ("real drop", "matched heads"):
                means = {row["budget"]: [] for row in rows}
                for row in rows:
                    means[row["budget"]].append(row[view])
                axes.plot(list(means), [sum(found) / len(found) for found in means.values()], "o-", label=view)
            axes.set(xlabel="budget", ylabel="Jaccard with the global view")
        else:
            for label, curve in rows[0]["curves"].items():
                axes.plot(curve, linewidth=1, label=label)
            axes.set(xlabel="rank" if name == "fig2" else "token", ylabel="accumulated attention", yscale="log")
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
    print(path)


# ---- The command -----------------------------------------------------------------------------------------------------

STUDIES: dict[str, Callable[[Pair, list[list[int]], argparse.Namespace], Iterator[dict]]] = {
    "fig1b": fig1b, "fig1c": fig1c, "fig2": fig2, "fig8": fig8, "fig9": fig9,
    "table7": fig8, "table8": fig8, "table9": table9,
}  # fmt: skip


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="task", required=True, metavar="EXPERIMENT")
    for name, study in STUDIES.items():
        what = study.__doc__.partition("\n")[0].replace("%", "%%")
        own = commands.add_parser(name, help=what, description=what)
        own.add_argument("--llm", default=str(PAIR / "llm"), help="folder or hub id (default: pair/llm)")
        own.add_argument("--slm", nargs="+", default=[str(PAIR / "slm")], help="one or more (default: pair/slm)")
        own.add_argument("--dtype", default="auto", choices=("auto", *DTYPES), help="as in evaluate.py (default: auto)")
        own.add_argument("--device", type=device, default="auto", help="auto, cpu, cuda, cuda:1 (default: auto)")
        if name != "table9":
            own.add_argument("--file", type=Path, default=PAIR / "prose.txt", help="a text (default: pair/prose.txt)")
            own.add_argument("--tokens", type=whole(WINDOW_MIN), default=512, help="of a text at most (default: 512)")
        else:
            own.add_argument("--answer-tokens", type=whole(1), default=32, help="of an answer at most (default: 32)")
        other = " of a dialogue each (default: the demonstration)" if name == "table9" else " instead of --file"
        own.add_argument("--prompts", type=Path, metavar="JSONL", help="a file of JSON lines" + other)
        own.add_argument("--field", default="prompt", help="where a line has its text or list of turns, as in "
                         "question, or arguments.gen_args_0.arg_0 (default: prompt)")  # fmt: skip
        own.add_argument("--chat", action="store_true", help="prompts go into the chat template")
        own.add_argument("--limit", type=whole(1), default=8, help="texts at most (default: 8)")
        if name == "fig1b":
            own.add_argument("--budget", type=number(0, 1, above=True), nargs="+", default=[0.5, 0.3, 0.2, 0.1, 0.05],
                             help="shares of the tokens (default: 0.5 0.3 0.2 0.1 0.05)")  # fmt: skip
        own.add_argument("--out", type=Path, default=Path("runs") / name, help=f"folder (default: runs/{name})")
    return parser


@torch.inference_mode()
def run(args) -> int:
    rows, out = [], check_folder(args.out)
    for slm in args.slm:
        pair = load_pair(args.llm, slm, str(args.device), args.dtype)
        found = texts(args, pair)
        if not rows:
            write_json(out / "run.json", describe(args, pair))
        with (out / "rows.jsonl").open("a" if rows else "w", encoding="utf-8") as file:
            for place, pieces in enumerate(tqdm(found, desc=args.task, unit="text", disable=None)):
                for row in STUDIES[args.task](pair, pieces, args):
                    rows.append({"SLM": slm, "text": place, **row})
                    file.write(json.dumps(rows[-1], ensure_ascii=False) + "\n")
                file.flush()
    if not rows:
        raise ValueError(f"no text of at least {WINDOW_MIN} tokens, on which heads are matched; give longer ones")
    print(markdown_table(*summary(rows)))
    if args.task.startswith("fig"):
        try:
            draw(args.task, rows, out / f"{args.task}.png")
        except ValueError as error:
            print(f"note: {error}", file=sys.stderr)
    return 0


def main(argv: list[str] | None = None) -> int:
    return ended(lambda: run(make_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
