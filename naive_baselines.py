"""The baselines once more, as loops over explicit lists of kept positions: what test_baselines.py compares with.

Where it sits: beside the tests. Of the methods' own code only PyramidInfer's solved shares are taken, which have tests
of their own; of the model only its layers.
"""

import itertools
import math

import torch

from model import apply_rope
from pyramid import answer_shares, solve_pyramid

# ---- The naive decoder -----------------------------------------------------------------------------------------------


class Naive:
    """One sequence, one token at a time, every K and V kept for ever; `see(layer, position)` says which are seen.

    weights(layer, position) -> (H, seen) are remembered, for rules that look back at them.
    """

    def __init__(self, llm):
        self.llm, self.config = llm, llm.config
        self.key = [[] for _ in llm.layers]  # a layer: (G, D) for every position
        self.value = [[] for _ in llm.layers]
        self.query = [[] for _ in llm.layers]
        self.rows = [[] for _ in llm.layers]  # a layer: {kv head: {position: weights of its query heads (H/G,)}}

    def token(self, token, see):
        """Feed one token; see(layer, g, position) -> the positions, itself among them, that KV head g attends to."""
        config, n = self.config, len(self.key[0])
        H, G, D = config.query_heads, config.kv_heads, config.head_dim
        x = self.llm.embed_tokens.weight[token]
        cos, sin = self.llm._rotary(torch.tensor([[n]]), x.dtype)
        for layer, block in enumerate(self.llm.layers):
            attention, y = block.self_attn, block.input_layernorm(x)
            query = apply_rope(attention.q_proj(y).view(1, H, 1, D), cos, sin)[0, :, 0]
            self.key[layer].append(apply_rope(attention.k_proj(y).view(1, G, 1, D), cos, sin)[0, :, 0])
            self.value[layer].append(attention.v_proj(y).view(G, D))
            self.query[layer].append(query)
            out, seen_weights = [], {}
            for g in range(G):
                seen = see(layer, g, n)
                key = torch.stack([self.key[layer][j][g] for j in seen])
                value = torch.stack([self.value[layer][j][g] for j in seen])
                weights = (query[g * H // G : (g + 1) * H // G] @ key.T / math.sqrt(D)).softmax(-1)
                out.append(weights @ value)
                seen_weights[g] = dict(zip(seen, weights.T))
            self.rows[layer].append(seen_weights)
            x = x + attention.o_proj(torch.cat(out).flatten())
            x = x + block.mlp(block.post_attention_layernorm(x))
        return self.llm.lm_head(self.llm.norm(x))

    def prompt(self, tokens):
        for token in tokens:
            logits = self.token(token, lambda layer, g, n: list(range(n + 1)))
        return logits


def top(scores, count):
    """The `count` positions of highest score in {position: score}, in order."""
    return sorted(sorted(scores, key=lambda j: -scores[j])[:count])


def naive_h2o(llm, prompt, fed, budget):
    naive, G, layers = Naive(llm), llm.config.kv_heads, range(llm.config.layers)
    logits = [naive.prompt(prompt)]
    heads = list(itertools.product(layers, range(G)))
    score = {(layer, g): {j: 0.0 for j in range(len(prompt))} for layer, g in heads}
    for layer, g in heads:
        for row in naive.rows[layer]:
            for j, weights in row[g].items():
                score[layer, g][j] += weights.sum().item()
    held = []
    for token in fed:
        n = len(naive.key[0]) + 1
        kept = budget.kept(n, len(prompt))
        heavy = kept // 2
        for layer, g in heads:
            newest = [j for j in score[layer, g] if j >= n - (kept - heavy)]
            rest = {j: s for j, s in score[layer, g].items() if j not in newest}
            stays = newest + top(rest, kept - 1 - len(newest))
            score[layer, g] = {j: score[layer, g][j] for j in stays}
            score[layer, g][n - 1] = 0.0
        logits.append(naive.token(token, lambda layer, g, n: sorted(score[layer, g])))
        for layer, g in heads:
            for j, weights in naive.rows[layer][-1][g].items():
                score[layer, g][j] += weights.sum().item()
        held.append({head: sorted(score[head]) for head in heads})
    return logits, held


def naive_streaming(llm, prompt, fed, budget, sinks=4):
    naive, G, layers = Naive(llm), llm.config.kv_heads, range(llm.config.layers)
    logits, held, seen = [naive.prompt(prompt)], [], list(range(len(prompt)))
    for token in fed:
        n = len(naive.key[0]) + 1
        kept = budget.kept(n, len(prompt))
        first = [j for j in seen if j < min(sinks, kept // 2)]  # of those that are there: what is dropped is gone
        seen = first + [j for j in seen if j not in first][len(seen) + 1 - kept :] + [n - 1]
        logits.append(naive.token(token, lambda layer, g, n: seen))
        held.append({(layer, g): seen for layer in layers for g in range(G)})
    return logits, held


def naive_window(llm, prompt, fed, budget):
    return naive_streaming(llm, prompt, fed, budget, sinks=0)


def naive_snapkv(llm, prompt, fed, budget, pooling="max"):
    naive, G, layers = Naive(llm), llm.config.kv_heads, range(llm.config.layers)
    logits, held, seen = [naive.prompt(prompt)], [], {}
    n, kept = len(prompt), budget.kept(len(prompt))
    window = max(1, min(32, kept // 2))
    for layer, g in itertools.product(layers, range(G)):
        votes = [sum(naive.rows[layer][i][g][j].sum().item() for i in range(n - window, n)) for j in range(n - window)]
        around = [votes[max(0, j - 3) : j + 4] for j in range(len(votes))]
        pooled = {j: max(near) if pooling == "max" else sum(near) / 7 for j, near in enumerate(around)}
        seen[layer, g] = top(pooled, kept - window) + list(range(n - window, n))
    for token in fed:
        for head in seen:
            seen[head] = seen[head] + [len(naive.key[0])]
        logits.append(naive.token(token, lambda layer, g, n: seen[layer, g]))
        held.append(dict(seen))
    return logits, held


def naive_oracle(llm, prompt, fed, budget):
    """Top-k of the full attention, worked out before the step by the very query of that step."""
    naive, held = Naive(llm), []
    logits = [naive.prompt(prompt)]
    H, G, D = llm.config.query_heads, llm.config.kv_heads, llm.config.head_dim
    for token in fed:
        seen = {}

        def see(layer, g, n):
            key = torch.stack([k[g] for k in naive.key[layer]])
            rows = (naive.query[layer][n][g * H // G : (g + 1) * H // G] @ key.T / math.sqrt(D)).softmax(-1)
            seen[layer, g] = top(dict(enumerate(rows.sum(0).tolist())), budget.kept(n + 1, len(prompt)))
            return seen[layer, g]

        logits.append(naive.token(token, see))
        held.append(dict(seen))
    return logits, held


def naive_pyramid(llm, prompt, fed, budget):
    """Prefill layer by layer on the hidden states that survive, then the legacy decode rule."""
    config, N = llm.config, len(prompt)
    L, H, G, D = config.layers, config.query_heads, config.kv_heads, config.head_dim
    kept = budget.kept(N)
    entering, size, cut = solve_pyramid(N, kept, L)
    naive = Naive(llm)
    naive.key = [[None] * N for _ in range(L)]
    naive.value = [[None] * N for _ in range(L)]
    naive.query = [[None] * N for _ in range(L)]
    alive, states = list(range(N)), {j: llm.embed_tokens.weight[token] for j, token in enumerate(prompt)}
    held = []
    for layer, block in enumerate(llm.layers):
        attention, rows = block.self_attn, {}
        for j in alive:
            cos, sin = llm._rotary(torch.tensor([[j]]), torch.float32)
            y = block.input_layernorm(states[j])
            query = apply_rope(attention.q_proj(y).view(1, H, 1, D), cos, sin)[0, :, 0]
            naive.key[layer][j] = apply_rope(attention.k_proj(y).view(1, G, 1, D), cos, sin)[0, :, 0]
            naive.value[layer][j] = attention.v_proj(y).view(G, D)
            seen = [i for i in alive if i <= j]
            out, rows[j] = [], dict.fromkeys(seen, 0.0)
            for h in range(H):
                g = h * G // H
                weights = torch.stack([query[h] @ naive.key[layer][i][g] / math.sqrt(D) for i in seen]).softmax(0)
                out.append(weights @ torch.stack([naive.value[layer][i][g] for i in seen]))
                for i, weight in zip(seen, weights.tolist()):
                    rows[j][i] += weight / H
            states[j] = states[j] + attention.o_proj(torch.cat(out))
            states[j] = states[j] + block.mlp(block.post_attention_layernorm(states[j]))
        context, recent = alive[:-size], alive[-size:]
        weight = [1 + 0.2 * i / max(1, size - 1) for i in range(size)]
        score = {j: sum(w * rows[q][j] for w, q in zip(weight, recent)) for j in context}
        score.update({j: math.inf for j in context[:4]})
        survivors = (top(score, entering[layer + 1]) if entering[layer + 1] < len(context) else context) + recent
        held.append(survivors if cut else alive)
        alive = survivors
    logits = [llm.lm_head(llm.norm(states[N - 1]))]
    held, history = [list(positions) for positions in held], []
    settled, keep = [len(positions) for positions in held], answer_shares(kept / N, L)
    ratio = min(0.2, kept / N / 4)
    for token in fed:
        recent = int(ratio * len(held[0]) + 1e-9)
        for layer in range(L):
            if len(held[layer]) - recent - settled[layer] >= 16:
                segment = held[layer][len(held[layer]) - recent - 16 : len(held[layer]) - recent]
                rows = naive.rows[layer][-(recent + 1) :]
                weight = [1 + 0.2 * i / max(1, recent) for i in range(recent + 1)]
                score = dict.fromkeys(segment, 0.0)
                for w, row in zip(weight, rows):
                    for j in segment:
                        score[j] += w * sum(row[g][j].sum().item() for g in range(G)) / H
                gone = set(segment) - set(top(score, keep[layer]))
                held[layer] = [j for j in held[layer] if j not in gone]
                settled[layer] = len(held[layer]) - recent
            held[layer] = held[layer] + [len(naive.key[0])]
        logits.append(naive.token(token, lambda layer, g, n: held[layer]))
        history.append({(layer, g): list(held[layer]) for layer in range(L) for g in range(G)})
    return logits, history


NAIVE = {
    "h2o": naive_h2o, "streaming": naive_streaming, "window": naive_window, "snapkv": naive_snapkv,
    "oracle": naive_oracle, "pyramidinfer": naive_pyramid,
}  # fmt: skip
