"""The decode step with fixed shapes, so that on a GPU it is one CUDA graph: no launch, no Python, no index on the CPU.

Where it sits: in place of `Session.step` (decode.py), after the same prefill, on the same caches. The step is an
ordinary function (`Step.body`) that runs eagerly anywhere; on CUDA it is captured once and replayed:

    first side stream: SLM layers, their attention rows into the scores       kernels_decode.py, graph_frugal.py
    second side stream, LLM layers in groups: scores -> plan -> slots         kernels_scores.py, kernels_plan.py
    (with a marginal tier slots of the V pool too, and what is lent)          kernels_tiers.py
    third side stream, layer by layer: rows from the host                     kernels_move.py
    LLM layers, each after its rows arrived: attention on the tiers (Eq. 6),  kernels_eq6.py
    with fused scores also its weights into the memory
    second side stream, after the plans: the newest rows to the host          kernels_move.py
    logits -> the next token                                                  greedy, or Gumbel noise drawn beforehand

With `Settings.refresh` r the plan and the movement run in every r-th step. In the steps between, nobody leaves and the
newest token takes a slot that the plan has left free (`Settings.planned`), so the recent ones are always there; those
steps are a second graph.

The SLM runs beside the LLM: what an LLM layer is matched with lies within `Settings.reach`, so its plan needs the SLM's
first few layers and not all of them (with reach inf it needs all, and the LLM waits). The SLM's small kernels fill what
the LLM's leave of the GPU, and rows come over PCIe from the step's beginning on.

What changes from step to step (lengths, tokens, tiers) lives in device tensors that the step itself updates. Capacity
is fixed at the start. `FullPolicy` gives the graphed full cache: the rival, with the same layers.

Shapes follow the legend in model.py; decode drops the T dimension.
"""

import gc

import torch
from torch import Tensor

from backend import Backend
from decode import Session
from full_cache import FullCache
from graph_frugal import FrugalSide
from graph_sides import FullSide, ScoredSide, TieredSide
from layers import Layers
from quantize import run_on


class Step:
    """Decode steps of one prefilled session. `run` is one step; its tokens are fed to the next by the step itself.

    temperature 0 is greedy. Above it, `noise` (B, vocabulary) Gumbel noise is added to logits / temperature, drawn by
    the caller between steps: the largest sum is then a sample.
    """

    def __init__(self, session: Session, tokens: Tensor, backend: Backend, temperature: float = 0.0):
        """session: prefilled. tokens (B,): what the prefill's logits chose."""
        self.session, self.backend, self.temperature = session, backend, temperature
        device, capacity, policy = session.llm.device, session.capacity, session.policy
        self.tokens = tokens.to(device, torch.long).clone()
        self.length = torch.tensor(session.lengths, dtype=torch.int32, device=device)  # (B,), newest token included
        self.logits: Tensor | None = None
        self.refresh = 1  # a plan in every refresh-th step
        self.steps = 0
        self.noise = torch.zeros(len(tokens), session.vocab, device=device) if temperature else None
        self.llm, self.slm = Layers(session.llm, capacity, backend), None
        if isinstance(session.cache, FullCache):
            self.side = FullSide(session.cache, backend, self.length)
        else:
            self.slm = Layers(policy.slm, capacity, backend)
            scored, lse = (policy.slm_cache, backend, self.length), None
            if policy.settings.slm_budget < 1:
                self.scored = FrugalSide(*scored, capacity, policy.settings.marginal)
            else:
                self.scored = ScoredSide(*scored, policy.settings.marginal)
                lse = self.scored.lse
            self.side = TieredSide(policy, backend, self.length, lse)
            self.moves, self.refresh = policy.settings.max_moves, policy.settings.refresh
            # First in the queue too: the LLM waits for it, and its kernels are small.
            self.beside = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
        # Eager steps before a capture: the first plan fills the pools without a limit on moves, the second has it.
        self.warm = self.refresh + 1
        self.graphs: dict[bool, tuple[torch.cuda.CUDAGraph, Tensor]] = {}  # with a plan, and without: and its logits

    @torch.inference_mode()
    def body(self, plan: bool) -> None:
        """One step: everything on the device, nothing returned; the same function is run eagerly and captured."""
        self.length += 1
        if self.slm is None:
            self.side.begin(plan)
        else:
            self.side.begin(plan, self._observe(plan))
        hidden = self.llm.run(self.tokens, self.side.attend)
        logits = self.session.llm.lm_head(hidden)[:, : self.session.vocab]
        self.logits = logits
        if self.noise is not None:
            logits = logits.float() / self.temperature + self.noise
        self.side.join()
        if self.slm is not None and self.beside is not None:
            torch.cuda.current_stream().wait_stream(self.beside)
        self.tokens.copy_(logits.argmax(-1))

    def _observe(self, plan: bool) -> list[torch.cuda.Event] | None:
        """The SLM's step, on a stream of its own where there is one: when the rows of each of its layers are there."""
        if self.beside is not None:
            self.beside.wait_stream(torch.cuda.current_stream())
        done = []

        def attend(*layer) -> Tensor:
            out = self.scored.attend(*layer)
            if self.beside is not None:
                done.append(self.beside.record_event())
            return out

        with torch.cuda.stream(self.beside):  # None: where we are
            self.scored.begin(plan)
            self.slm.run(self.tokens, attend, output=False)
        return done if self.beside is not None else None

    def run(self) -> None:
        """One step, replayed if it was captured; `tokens` holds the next tokens afterwards, on the device."""
        if max(self.session.lengths) >= self.session.capacity:
            raise ValueError(f"no room for a token more than the capacity of {self.session.capacity} positions")
        if self.slm is not None:
            self._match()
        plan = self.steps % self.refresh == 0
        if self.graphs:
            graph, self.logits = self.graphs[plan]
            graph.replay()
        else:
            self.body(plan)
        self.steps += 1
        self.session.lengths = [length + 1 for length in self.session.lengths]
        if self.slm is not None:
            self.side.moves = self.moves

    def _match(self) -> None:
        """What the eager policy does between steps: a sequence that reaches the matching window gets its head map."""
        policy = self.session.policy
        policy.lengths = [length + 1 for length in self.session.lengths]
        if all(found is not None for found in policy.maps):
            return
        for b, token in enumerate(self.tokens.tolist()):
            policy.tokens[b].append(token)
            policy._match(b)

    def capture(self) -> None:
        """Record the body as a CUDA graph, or two, once `warm` steps have compiled the kernels and filled the pools."""
        gc.collect()  # or an older session's memory on the host is given back in mid-capture, which must not wait
        torch.cuda.synchronize()
        graphs, pool = {}, None
        for plan in (True, False)[: self.refresh]:
            graph = torch.cuda.CUDAGraph()
            # Recording runs nothing: the state stays as it is. thread_local: NCCL's own thread may go on meanwhile.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                self.body(plan)
            graphs[plan] = graph, self.logits
            pool = graph.pool()  # one replay ends before the next begins: they share their memory
        self.graphs = graphs


class StaticSession(Session):
    """A session for decode.generate_ids whose steps are static ones: captured on CUDA, run eagerly elsewhere."""

    def __init__(self, backend: Backend, *args, **options):
        super().__init__(*args, **options)
        self.backend = backend
        for model in self.policy.models:
            run_on(model, backend)

    def prefill(self) -> Tensor:
        logits = super().prefill()
        self.static = Step(self, logits.argmax(-1), self.backend)
        return logits

    @torch.inference_mode()
    def step(self, tokens: list[int]) -> Tensor:
        static = self.static
        static.tokens.copy_(torch.tensor(tokens))  # the step fed itself its own choice; what counts is the sampler's
        if static.steps == static.warm and static.tokens.is_cuda:
            static.capture()
        static.run()
        if static.slm is not None:
            static.side.report(static.steps)
        return static.logits
