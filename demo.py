"""What SmallKV is for, in a few seconds: one long text, four questions, three caches, side by side.

Where it sits: behind a bare `python generate.py`. A held-out document of recall.py (facts hidden in prose that the pair
has not seen) is prefilled; then its questions come one after the other through decode steps, on one kept cache. Each
needs another fact, so what matters shifts after the prefill: the saliency shift of the paper's Section 3. The last
column says where the tokens went: how many of the LLM's KV heads hold the facts in their critical tier, at the first
token of the question and at most while it is answered. A method that drops tokens for good cannot bring them back.
"""

import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text as Words

from baselines import Window
from cache import TieredCache
from corpus import Recall, read_text
from decode import FullPolicy, Session, Timing
from evicting import Budget
from recall import Document, exact
from report import make_report, print_report
from settings import Settings
from smallkv import SmallKV

PAIR = Path(__file__).parent / "pair"  # the embedded pair, and prose that it has not seen
SEED, LENGTH, TURNS = "evaluation-6", 1000, 4  # a document of `evaluate.py recall` whose facts all come early
ANSWER_TOKENS = 32


@dataclass(frozen=True)
class Told:
    """One answer. heads: how many KV heads held its facts when the question began, and at most during the answer."""

    answer: str
    right: bool
    heads: tuple[int, int]


def sample_document(tokenizer) -> Document:
    source = Recall.from_books([read_text(PAIR / "prose.txt")], tokenizer, "test", TURNS)
    return source.document(random.Random(SEED), LENGTH)


def fact_positions(document: Document) -> dict[tuple, list[int]]:
    """Key of a task -> the positions of its facts' tokens in the prompt."""
    positions: dict[tuple, list[int]] = {}
    facts, at = iter([*document.facts, None]), 0
    fact = next(facts)
    for (text, _), ids in zip(document.segments, document.segment_ids):
        if fact is not None and text == fact.text:
            positions.setdefault(fact.key, []).extend(range(at, at + len(ids)))
            fact = next(facts)
        at += len(ids)
    return positions


def heads_holding(cache, positions: list[int]) -> int:
    """KV heads of all layers whose critical tier holds most of these tokens, of one sequence; 0 without tiers."""
    if not isinstance(cache, TieredCache):
        return 0
    held = cache.key_position[:, 0]  # (L, G, C)
    wanted = torch.tensor(positions, device=held.device)
    return int(((held[..., None] == wanted).any(2).float().mean(-1) > 0.5).sum())


@torch.inference_mode()
def ask(pair, policy, document: Document) -> tuple[list[Told], dict]:
    """All questions of one document, one after the other, answered greedily on one kept cache; and the report."""
    questions = document.segment_ids[-2 * len(document.turns) :: 2]
    room = sum(map(len, questions)) + ANSWER_TOKENS * len(questions)
    session, timing = Session(pair.llm, policy, [document.prompt_ids], room), Timing()
    begin = time.perf_counter()
    session.prefill()
    timing.first_token = time.perf_counter() - begin
    positions, told = fact_positions(document), []
    for turn, question in zip(document.turns, questions):
        holding, answer = [], []
        for token in question:
            logits = session.step([token])
            holding.append(heads_holding(session.cache, positions[turn.key]))
        while len(answer) < ANSWER_TOKENS and "." not in pair.text.decode(answer):
            answer.append(logits.argmax(-1).item())
            logits = session.step(answer[-1:])
            holding.append(heads_holding(session.cache, positions[turn.key]))
        text = pair.text.decode(answer)
        heads = holding[0], max(holding[len(question) :])
        told.append(Told(text.strip(), exact(turn.answer, text, turn.kind), heads))
    timing.steps = session.lengths[0] - len(document.prompt_ids)
    timing.per_token = (time.perf_counter() - begin - timing.first_token) / timing.steps
    return told, make_report(session, timing)


def show(pair, settings: Settings, console: Console) -> None:
    """Run the three caches and print: the answers side by side on standard output, the report on `console`."""
    document = sample_document(pair.text.tokenizer)
    budget = Budget(settings.budget, settings.budget_tokens)
    policies = {
        "full cache": FullPolicy(pair.llm),
        "SmallKV": SmallKV(pair.llm, pair.slm, settings),
        "window": Window(pair.llm, budget),
    }
    told, reports = {}, {}
    for name, policy in policies.items():
        console.print(f"{name} ...", style="dim", end=" ", highlight=False)
        told[name], reports[name] = ask(pair, policy, document)
    console.print()
    share = f"{settings.budget:.0%}" if settings.budget_tokens is None else f"{settings.budget_tokens} tokens"
    length, heads = len(document.prompt_ids), pair.llm.config.layers * pair.llm.config.kv_heads
    table = Table(
        "question", "full cache", f"SmallKV, {share}", f"the newest {share} alone", "KV heads that hold the fact",
        title=f"a text of {length} tokens, then {len(document.turns)} questions one after the other", show_lines=True,
    )  # fmt: skip
    for i, turn in enumerate(document.turns):
        answers = [Words(told[name][i].answer, "green" if told[name][i].right else "red") for name in policies]
        facts = " /".join(fact.text for fact in document.facts if fact.key == turn.key)
        before, during = told["SmallKV"][i].heads
        where = f"{before} -> {during} of {heads}:{facts}"
        table.add_row(turn.question.strip().removesuffix("\nAnswer:").removeprefix("Question: "), *answers, where)
    Console().print(table)
    counts = ", ".join(f"{name} {sum(t.right for t in told[name])} of {len(told[name])}" for name in policies)
    Console().print(f"right answers: {counts}", highlight=False)
    print_report("smallkv", reports["SmallKV"], console)
