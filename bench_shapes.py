"""One setting of bench_kernels.py: the sizes that its kernels see, random inputs for them, and what a call is.

Where it sits: under bench_cases.py, the table of what is timed.

Shapes follow the legend in model.py; decode drops the T dimension.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from backend import Backend
from bench_clock import draw
from bench_count import Setting
from full_cache import logits_dtype, memory_dtype
from graph_sides import layers_together
from host_memory import rows_on_host
from model import Config, Decoder
from settings import Settings
from smallkv import pool_slots

FP32 = 4


@dataclass(frozen=True)
class Call:
    """One call on inputs of its own. read, written: what it cannot avoid on the device, tensors or bytes. pcie: bytes
    that cross. launches: how often `work` calls the kernel. layers: for how many layers a launch is."""

    work: Callable
    read: list[Tensor | int]
    written: list[Tensor | int]
    pcie: int = 0
    launches: int = 1
    layers: int = 1

    @property
    def size(self) -> int:
        """Bytes on the device."""
        return sum(part if isinstance(part, int) else part.nbytes for part in (*self.read, *self.written))


class Shape:
    """One setting: the sizes that its kernels see, and random inputs for them."""

    def __init__(self, setting: Setting, configs: tuple[Config, Config], decoders: dict[str, Decoder], backend: Backend,
                 device: torch.device, budget: float):  # fmt: skip
        """decoders: those made so far by name, llm or slm; the settings of a run share them."""
        self.backend, self.device, self.decoders, (self.llm, self.slm) = backend, device, decoders, configs
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.remembered = memory_dtype(self.dtype, Settings.score_decay)
        self.batch, self.capacity = setting.batch, setting.prompt + setting.new
        self.tokens = setting.prompt + (setting.new + 1) // 2  # of each sequence, the newest included
        self.length = torch.full((self.batch,), self.tokens, dtype=torch.int32, device=device)
        kinds = Settings(budget), Settings(budget, marginal=True)
        self.sizes = [kind.planned(self.tokens) for kind in kinds]  # without a marginal tier, and with
        self.slots = [pool_slots(kind, setting.prompt, self.capacity) for kind in kinds]  # of the K and V pool
        self.critical = self.sizes[0].critical
        self.together = min(layers_together(self.pairs, self.capacity), self.llm.layers)  # at most, in a step
        self.held: dict[str, list[Tensor]] = {}

    @property
    def pairs(self) -> int:
        """Of a sequence and a KV head of the LLM."""
        return self.batch * self.llm.kv_heads

    def draw(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        table = draw(torch.empty(shape, device=self.device, dtype=dtype or self.dtype))
        return table if scale == 1 else table.mul_(scale)

    def pool(self, config: Config, slots: int, *layers: int, int8: bool = False) -> Tensor:
        shape = *layers, self.batch, config.kv_heads, slots, config.head_dim
        return self.draw(*shape, dtype=torch.int8 if int8 else None)

    def query(self, config: Config) -> Tensor:
        return self.draw(self.batch, config.query_heads, config.head_dim)

    def pick(self, count: int, among: int, *layers: int) -> Tensor:
        """`count` different numbers below `among` for each KV head of the LLM, in any order: (..., B, G, count)."""
        noise = torch.rand(*layers, self.batch, self.llm.kv_heads, among, device=self.device)
        return noise.argsort(-1)[..., :count].int()

    def positions(self, filled: int, slots: int, *layers: int) -> Tensor:
        """A pool of random tokens, the slots behind them empty."""
        return F.pad(self.pick(filled, self.tokens, *layers), (0, slots - filled), value=-1).contiguous()

    def memory(self, *layers: int) -> Tensor:
        """Scores of the LLM's tokens, (..., B, G, S)."""
        rows = torch.rand(*layers, self.batch, self.llm.kv_heads, self.capacity, device=self.device) / self.tokens
        return rows.to(self.remembered)

    def ranking(self) -> Tensor:
        """The SLM's newest rows (L', B, H', S), as uneven as attention."""
        shape = self.slm.layers, self.batch, self.slm.query_heads, self.capacity
        row = self.draw(*shape, dtype=torch.float32, scale=2.0).exp_()
        return row.div_(row.sum(-1, keepdim=True))

    def matched(self, layers: int) -> tuple[Tensor, int]:
        """A head map (B, L, H), the same for all sequences, and the bytes of the SLM's rows that it names."""
        heads = self.slm.layers * self.slm.query_heads
        index = torch.randint(heads, (layers, self.llm.query_heads), device=self.device)
        size = logits_dtype(self.dtype).itemsize * len(index.unique()) * self.batch * self.tokens
        return index.repeat(self.batch, 1, 1), size

    def shared(self, name: str, make: Callable[[], list[Tensor]]) -> list[Tensor]:
        """What all calls of a case write to or read a little of, made once."""
        if name not in self.held:
            self.held[name] = make()
        return self.held[name]

    def on_host(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """K and V on the host; nobody looks at the numbers."""
        return self.shared(f"host, {dtype}", lambda: [rows_on_host(shape, dtype, self.device)])[0]
