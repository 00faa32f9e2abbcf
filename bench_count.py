"""What bench.py counts instead of measuring: the pairs, bytes of a step, operations of a prefill, the table.

Where it sits: under bench.py. Every figure here follows from the configurations alone, so that the floor beside a
measured time can be checked by hand.
"""

from dataclasses import dataclass

from frugal import kept_tokens
from model import Config
from overhead import cache_bytes, early
from quantize import int4_bytes
from settings import TierSizes
from shapes import SHAPES

TINY = {
    "model_type": "qwen2", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "intermediate_size": 48, "vocab_size": 97, "max_position_embeddings": 4096,
    "head_dim": 16, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
}  # fmt: skip
PAIRS = {
    "qwen2-7b": (SHAPES["Qwen2-7B"], SHAPES["Qwen2-0.5B"]),
    "qwen2.5-14b": (SHAPES["Qwen2.5-14B"], SHAPES["Qwen2.5-0.5B"]),
    "llama3.1-8b": (SHAPES["LLaMA-3.1-8B"], SHAPES["LLaMA-3.2-1B"]),
    "qwen2-72b": (SHAPES["Qwen2-72B"], SHAPES["Qwen2-7B"]),
    "qwen2-72b-0.5b": (SHAPES["Qwen2-72B"], SHAPES["Qwen2-0.5B"]),
    "tiny": (TINY, {**TINY, "num_attention_heads": 4, "tie_word_embeddings": True}),
}


def pair_configs(name: str, slm_layers: int | None = None) -> tuple[tuple[dict, dict], tuple[Config, Config]]:
    """config.json of both models, and what is read from them. slm_layers: the SLM stops after so many (A.3)."""
    raws = PAIRS[name]
    llm, slm = (Config.from_hf(raw) for raw in raws)
    return raws, (llm, early(slm, slm.layers if slm_layers is None else slm_layers))


@dataclass(frozen=True)
class Setting:
    """A batch of prompts of one length, and room for new tokens."""

    batch: int
    prompt: int
    new: int

    @property
    def name(self) -> str:
        return f"{self.batch}x{self.prompt}+{self.new}"

    @classmethod
    def many(cls, text: str) -> list["Setting"]:
        """`64x2048+256,4x16384+512` -> settings. ValueError (argparse's own message) if it reads otherwise."""
        settings = []
        for part in text.split(","):
            batch, rest = part.split("x")
            prompt, new = rest.split("+")
            settings.append(cls(int(batch), int(prompt), int(new)))
        return settings


def layer_products(config: Config) -> list[tuple[int, int]]:
    """Inputs and outputs of one layer's matrix products, those of the same input as one."""
    D, hidden, inner = config.head_dim, config.hidden_size, config.intermediate_size
    qkv, query = (config.query_heads + 2 * config.kv_heads) * D, config.query_heads * D
    return [(hidden, qkv), (query, hidden), (hidden, 2 * inner), (inner, hidden)]


def layer_parameters(config: Config) -> int:
    """Weights of all layers' matrix products; biases and norms are left out, which a table in ms cannot see."""
    return config.layers * sum(inputs * outputs for inputs, outputs in layer_products(config))


def product_bytes(products: list[tuple[int, int]], itemsize: int, int4: bool) -> int:
    """Bytes of their weights; INT4 with scales and zeros."""
    return sum(int4_bytes(*each) if int4 else itemsize * each[0] * each[1] for each in products)


def layer_bytes(config: Config, itemsize: int, int4: bool) -> int:
    """Bytes of all layers' weights."""
    return config.layers * product_bytes(layer_products(config), itemsize, int4)


def observed_bytes(slm: Config, itemsize: int, int4: bool) -> int:
    """`layer_bytes` without what comes after the last layer's attention: all that is asked of an SLM without drafts."""
    return layer_bytes(slm, itemsize, int4) - product_bytes(layer_products(slm)[1:], itemsize, int4)


def step_bytes(
    llm: Config, slm: Config | None, batch: int, length: int, itemsize: int, size: TierSizes | None, marginal: bool,
    int4: tuple[bool, bool] = (False, False), memory: int = 0, slm_budget: float = 1.0, drafts: bool = False,
    logits: bool = False, int8: tuple[bool, bool] = (False, False),
) -> dict[str, int]:  # fmt: skip
    """Bytes that one decode step cannot avoid to read, by kind; size None is the full cache, slm None a method without.

    The LLM's output projection counts, its embedding does not (one row a token); of the SLM neither, and nothing after
    its last attention, but with drafts its layers are read whole. Scores are read once by the plan, and with a marginal
    tier the rows are those lent. int4: whether the layers of LLM and SLM are INT4, with their scales and zeros. memory:
    bytes of a number in the LLM's own scores, which fused ones read too; 0: not fused. slm_budget: below 1 the SLM's K,
    V and scores are those of the tokens that it keeps, and what H2O's rule reads of each comes to it: attention
    gathered and position. logits: the SLM's scores are its newest row's, with no more bits than the weights
    (full_cache.hold_logits). int8: whether the K and V of LLM and SLM are in 8 bits.
    """
    layers = [layer_bytes(config, itemsize, small) if config else 0 for config, small in zip((llm, slm), int4)]
    weights = layers[0] + itemsize * llm.vocab_size * llm.hidden_size
    number = [1 if small else itemsize for small in int8]  # bytes of one in K and V
    pair = cache_bytes(llm, 1, batch, number[0])  # K and V of one token
    if size is None:
        return {"LLM weights": weights, "LLM K, V": pair * length}
    held = pair * size.critical + pair // 2 * (size.marginal if marginal else 0)
    if slm is None:
        return {"LLM weights": weights, "LLM K, V": held}
    kept = length if slm_budget == 1 else kept_tokens(slm_budget, length)
    numbers = 4 * slm.layers * kept * batch  # bytes of one fp32 or int32 a token and layer
    scores = numbers // 4 * slm.query_heads * (min(4, itemsize) if logits else 4)
    found = {
        "LLM weights": weights,
        "LLM K, V": held,
        "SLM weights": layers[1] if drafts else observed_bytes(slm, itemsize, int4[1]),
        "SLM K, V": cache_bytes(slm, kept, batch, number[1]),
        "scores": scores + memory * llm.layers * llm.kv_heads * length * batch,
    }
    return found if slm_budget == 1 else found | {"SLM slots": 2 * numbers * slm.kv_heads}


def prefill_flops(llm: Config, slm: Config | None, batch: int, prompt: int) -> int:
    """Multiplications and additions of a prefill: matrix products of every token, causal attention, the last logits."""
    total = 0
    for config in (llm, slm) if slm else (llm,):
        attention = 2 * 2 * config.layers * config.query_heads * config.head_dim * prompt * (prompt + 1) // 2
        total += batch * (2 * layer_parameters(config) * prompt + attention)
    return total + 2 * batch * llm.vocab_size * llm.hidden_size


def paper_throughput(setting: Setting, ttft: float, tpot: float) -> float:
    """The paper's "throughput": prompt and output tokens of one sequence over the time; the batch does not count."""
    return (setting.prompt + setting.new) / (ttft + setting.new * tpot)


def table(report: dict) -> str:
    """Markdown, one line a row; floors from the measured ceilings.

    `floor` is the memory's: the bytes a step must read on the device. What comes over PCIe travels at the same time, so
    a step lasts at least as long as the longer of the two: `with PCIe`.
    """
    ceiling = report["ceilings"]
    lines = [
        "| setting | method | moved | TPOT ms (p10-p90) | floor ms | x floor | tokens/s | PCIe MB/step (ms) | "
        "with PCIe ms | TTFT s | floor s | x floor | paper's tok/s | peak GB (predicted) |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in report["rows"]:
        if "error" in row:
            lines.append(f"| {row['setting']} | {row['method']} | {row['error']} |" + " |" * 11)
            continue
        floor = sum(row["step_bytes"].values()) / ceiling["copy_bytes_s"]
        low, high = row["tpot_p10_p90"]
        moved = "-" if row["turnover"] is None else f"{row['turnover']:.1%}"
        pcie = row["pcie_bytes_step"]
        cells = [
            row["setting"], row["method"], moved, f"{1e3 * row['tpot_s']:.2f} ({1e3 * low:.2f}-{1e3 * high:.2f})",
            f"{1e3 * floor:.2f}", f"{row['tpot_s'] / floor:.2f}", f"{row['tokens_s']:.0f}",
            f"{pcie / 1e6:.0f} ({1e3 * pcie / ceiling['pcie_bytes_s']:.2f})" if pcie else "-",
            f"{1e3 * max(floor, pcie / ceiling['pcie_bytes_s']):.2f}",
        ]  # fmt: skip
        if row["ttft_s"] is None:
            cells += ["-"] * 4
        else:
            least = row["prefill_flops"] / ceiling["matrix_flops_s"]
            cells += [f"{row['ttft_s']:.2f}", f"{least:.2f}", f"{row['ttft_s'] / least:.2f}",
                      f"{row['paper_throughput']:.0f}"]  # fmt: skip
        peak, predicted = row["peak_bytes"], row["predicted_bytes"]
        cells.append("-" if not peak else f"{peak / 1e9:.2f}" + (f" ({predicted / 1e9:.2f})" if predicted else ""))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
