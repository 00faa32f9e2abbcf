"""How fast, beside the floor: TTFT, TPOT, tokens per second, memory and traffic, at the real shapes, random weights.

    python bench.py --pair qwen2-7b --settings 64x2048+256,4x16384+512 --decode-only --table
    python bench.py --settings 64x2048+256 --decode-only --speculate 4 --acceptance 0.7       # rounds of drafts

Where it sits: on top of decode.py and speculative.py, whose sessions it times, beside generate.py. Methods run one
after another in one process on the same weights. Beside every time stands its floor: for TPOT the bytes that a step
must move on the device over the copy bandwidth, for TTFT the operations of the prefill over the matrix rate, both
measured in the same run. Under torchrun the LLM is split over the processes, and every figure is one rank's.

With random weights a plan is noise, so `--turnover 0.1` puts a ring in its place: the tokens rank by their place on it,
and it is turned before each plan, so that a tenth of the critical set leaves and another tenth comes; `--lopsided`
gives one KV head of a layer nearly all of its slots. `--decode-only`
fills the caches with random K and V and takes random heads as matched ones. Drafts are accepted by the chance
`--acceptance`. What moved and what was accepted is counted, and printed as counted.
"""

import argparse
import gc
import json
import re
import statistics
import sys
import time
from collections import namedtuple
from dataclasses import asdict, replace
from functools import partial

import torch
from torch import Tensor
from torch.profiler import profile as record

import command
import parallel
from baselines import BASELINES
from checkpoint import available_bytes, check_fits, weight_bytes
from decode import WARM_STEPS, Policy, Session
from floors import QWEN, SHAPES, early, prefill_flops, raw_config, step_bytes
from match import HeadMap, layers_within
from model import Config, Decoder, Span
from quantize import JOINED, Scheme, int4_modules, put_int4
from smallkv import Settings, SmallKV, TierSizes
from speculative import DraftedFull, RoundSession

OWN, OTHER = ("full", "smallkv"), "transformers"
METHODS = (*OWN, *BASELINES, OTHER)
PROFILED = 3  # steps under the profiler
PAIRS = {  # config.json of LLM and SLM
    "qwen2-7b": (SHAPES["Qwen2-7B"], SHAPES["Qwen2-0.5B"]),
    "qwen2.5-14b": (SHAPES["Qwen2.5-14B"], SHAPES["Qwen2.5-0.5B"]),
    "llama3.1-8b": (SHAPES["LLaMA-3.1-8B"], SHAPES["LLaMA-3.2-1B"]),
    "qwen2-72b": (SHAPES["Qwen2-72B"], SHAPES["Qwen2-7B"]),
    "qwen2-72b-0.5b": (SHAPES["Qwen2-72B"], SHAPES["Qwen2-0.5B"]),
    "tiny": (raw_config(QWEN, 2, 6, 2, 96, 48, 97, False), raw_config(QWEN, 2, 4, 2, 64, 48, 97, True)),
}


class Setting(namedtuple("Setting", "batch prompt new")):
    """A batch of prompts of one length, and room for new tokens."""

    @property
    def name(self) -> str:
        return f"{self.batch}x{self.prompt}+{self.new}"

    @classmethod
    def many(cls, text: str) -> list["Setting"]:
        """`64x2048+256,4x16384+512` -> settings. Mistake if it reads otherwise."""
        found = [re.fullmatch(r"([1-9]\d*)x([1-9]\d*)\+(\d+)", part) for part in text.split(",")]
        if None in found:
            raise command.Mistake(f"{text!r} should read BATCHxPROMPT+NEW, as 4x16384+512 does")
        return [cls(*map(int, part.groups())) for part in found]


# ---- The machine -----------------------------------------------------------------------------------------------------


def laps(device: torch.device, work, count: int) -> list[float]:
    """Seconds of each of `count` calls, back to back: on a GPU the next is launched before the last has ended."""
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for _ in range(count):
            work()
            marks.append(time.perf_counter())
        return [end - start for start, end in zip(marks, marks[1:])]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        work()
        event.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in zip(events, events[1:])]


def ceilings(device: torch.device) -> dict[str, float]:
    """What this machine reaches: copy bandwidth (read + written), PCIe, and the bf16 matrix rate."""
    cuda = device.type == "cuda"
    size, side = (1 << 30, 8192) if cuda else (1 << 22, 128)
    source = torch.randint(255, (size,), dtype=torch.uint8, device=device)
    target, host = torch.empty_like(source), torch.empty(size // 4, dtype=torch.uint8, pin_memory=cuda)
    matrix = torch.randn(side, side, device=device, dtype=torch.bfloat16 if cuda else torch.float32)

    def rate(work, amount):
        laps(device, work, 3)
        return amount / statistics.median(laps(device, work, 10))

    return {
        "copy_bytes_s": rate(lambda: target.copy_(source), 2 * size),
        "pcie_bytes_s": rate(lambda: target[: size // 4].copy_(host, non_blocking=True), size // 4),
        "matrix_flops_s": rate(lambda: matrix @ matrix, 2 * side**3),
    }


def profile(work, path: str, calls: int) -> None:
    """`calls` of `work` under the torch profiler; the 40 costliest kernels go to the file."""
    with record() as found:
        for _ in range(calls):
            work()
    order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    with open(path, "w", encoding="utf-8") as file:
        file.write(found.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=60))


def random_decoder(
    config: Config, device: torch.device, dtype: torch.dtype, int4: bool = False, team: parallel.Team = parallel.Team()
) -> Decoder:
    """int4: the layers' products are made as INT4, so that a model fits whose 16-bit weights do not. team: this rank's
    part of an LLM."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            decoder = team.split(config).eval()
        if int4:
            put_int4(decoder, Scheme())
        decoder.requires_grad_(False).to_empty(device=device)
    finally:
        torch.set_default_dtype(before)
    team.tie(decoder)  # moving has parted them
    for name, parameter in decoder.named_parameters():
        parameter.normal_(std=0.02) if parameter.dim() > 1 else parameter.fill_("norm" in name)  # biases are 0
    for module in int4_modules(decoder).values():
        module.packed.random_(-(2**15), 2**15)
        module.scale.fill_(0.02 / 4.6)  # the spread of 16 levels in a row is 4.6
        module.zero.fill_(8)
    return decoder


def weights_of(model: Decoder) -> int:
    storages = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]
    return sum({held.data_ptr(): held.nbytes() for held in storages}.values())  # views of one tensor count once


# ---- Sessions --------------------------------------------------------------------------------------------------------


class DrivenSmallKV(SmallKV):
    """SmallKV whose plans follow a ring (B, G, S) fp32 of scores below `period` (G, 1), turned by `shift` of it before
    each step's first. A KV head whose period is larger takes more of the slots that the heads share."""

    def allocate(self, lengths: list[int], capacity: int) -> None:
        super().allocate(lengths, capacity)
        generator, device = torch.Generator().manual_seed(0), self.llm.device
        ranks = torch.stack([torch.randperm(capacity, generator=generator) for _ in lengths])
        self.ring = (ranks / capacity).to(device)[:, None].repeat(1, self.llm.config.kv_heads, 1)
        self.period = torch.ones(self.llm.config.kv_heads, 1, device=device)
        self.shift = torch.zeros_like(self.period)

    def rank(self, layer: int, span: Span) -> Tensor:
        super().rank(layer, span)  # its time counts, what it finds is noise
        if layer == 0:  # plans follow one another on one stream
            self.ring.add_(self.shift).remainder_(self.period)
        return self.ring

    def turn_by(self, turnover: float, length: int) -> None:
        """So far that this share of the critical set changes; recent tokens stay in any case."""
        size = self.settings.sizes(length, self.drafts)
        self.shift.copy_(self.period * turnover * size.critical / (length - size.recent))

    def favour(self, head: int) -> None:
        """One KV head scores so much higher that it gets nearly all slots but the others' recent ones."""
        self.ring[:, head] *= 64
        self.period[head] *= 64


class TransformersPolicy(Policy):
    """The full cache as Transformers has it (SDPA, DynamicCache), on the same weights."""

    name = OTHER

    def allocate(self, lengths: list[int], capacity: int) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

        llm, shared = self.llm, {}
        config = AutoConfig.for_model(**llm.raw)
        with torch.device("meta"):
            self.model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=llm.dtype).eval()
        rotary = type(self.model.model.rotary_emb)(config).to(llm.device)
        heads, inner = (llm.config.query_heads, *[llm.config.kv_heads] * 2), llm.config.intermediate_size
        rows = {"qkv_proj": [count * llm.config.head_dim for count in heads], "gate_up_proj": [inner, inner]}
        for name, tensor in llm.state_dict().items():
            kind = name.split(".")[-2]
            for part, piece in zip(JOINED.get(kind, [kind]), tensor.split(rows.get(kind, len(tensor)))):
                shared["model." * (kind != "lm_head") + name.replace(kind, part)] = piece
        self.model.load_state_dict(shared, strict=False, assign=True)
        self.model.model.rotary_emb, self.caches, self.cache = rotary, {}, DynamicCache(config=config)

    def logits(self, tokens: Tensor) -> Tensor:
        out = self.model(input_ids=tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, 0]


class TransformersSession(Session):
    """One prefill of the whole batch, then one token at a time, as its `generate` does."""

    @torch.inference_mode()
    def prefill(self) -> Tensor:
        return self.policy.logits(torch.tensor(self.prompts, device=self.llm.device))

    def forward(self) -> None:
        self.length += 1
        self.logits = self.policy.logits(self.tokens)


def make_policy(method: str, models: list[Decoder], settings: Settings, drafts: int, filled: bool = False) -> Policy:
    """filled: random heads take the place of the matching, which happens in a prefill."""
    llm, slm = models
    if method == "full":
        return DraftedFull(llm, slm, drafts) if drafts else Policy(llm)
    if method != "smallkv":
        shares = settings.budget, settings.budget_tokens
        return TransformersPolicy(llm) if method == OTHER else BASELINES[method](llm, *shares)
    (L, H), heads, head_map = (llm.config.layers, llm.config.query_heads), slm.config.query_heads, None
    if filled:
        near = [layers_within(settings.reach, layer, L, slm.config.layers) for layer in range(L)]
        head_map = torch.stack([torch.randint(layers * heads, (H,)) for layers in near])
    return DrivenSmallKV(llm, slm, settings, head_map, drafts)


def make_session(policy: Policy, setting: Setting, drafts: int, chunk: int) -> Session:
    known = min(model.config.vocab_size for model in policy.models)
    prompts = torch.randint(known, (setting.batch, setting.prompt)).tolist()
    if policy.name == OTHER:
        return TransformersSession(policy, prompts, setting.new, capture=False)
    return (RoundSession if drafts else Session)(policy, prompts, setting.new, chunk=chunk)


def fill(session: Session) -> None:
    """Random K and V in every cache, as if prefilled, and random sums of what they were attended to."""
    policy, config = session.policy, session.llm.config
    for cache in policy.caches.values():
        for b, length in enumerate(session.lengths):
            staged = cache.staging(b, length)
            for table in (staged.key, staged.value):
                table.normal_()
            for sums in getattr(staged, "sums", {}).values():
                sums.uniform_()
            cache.load(b, staged)
    if isinstance(policy, SmallKV):
        policy.maps = [HeadMap(policy.given_map, None, None)] * len(policy.maps)
        policy.index.copy_(policy.given_map[:, None].expand_as(policy.index))
    elif policy.name == OTHER:
        shape = len(session.lengths), config.kv_heads, session.lengths[0], config.head_dim
        for layer in range(config.layers):
            made = torch.randn(2, *shape, device=session.llm.device, dtype=session.llm.dtype)
            policy.cache.update(*made, layer)


def stepper(session: Session, tokens: Tensor, acceptance: float):
    """One step, or one round, on the tokens of the one before: nothing in it waits for the device."""
    if not isinstance(session, RoundSession):
        newest = tokens.clone()
        return lambda: newest.copy_(session.step(newest).argmax(-1))
    session.forced = acceptance
    session.allowed.fill_(session.policy.drafts)
    session.tokens.copy_(tokens[:, None])

    def round():
        session.chance.uniform_()
        session.run()
        session.tokens.copy_(session.answer.gather(1, session.kept[:, None].long() - 1))

    return round


def tidy() -> None:
    """Memory of sessions that are over goes back to the device."""
    gc.collect()
    torch.cuda.empty_cache()


def largest(policy: Policy, setting: Setting) -> Setting:
    """The largest batch whose ledgers fit: 92 % of what is free on the device, 85 % of what is on the host."""
    entries = [entry for ledger in policy.ledgers([setting.prompt], sum(setting[1:])).values() for entry in ledger]
    tidy()
    fits = []
    for host, device, share in ((False, policy.llm.device, 0.92), (True, torch.device("cpu"), 0.85)):
        needed, free = sum(entry.size for entry in entries if entry.host == host), share * available_bytes(device)
        if host and needed:  # pinned memory comes in powers of two
            free = 1 << int(free).bit_length() - 1
        fits.append(int(free // max(1, needed)))
        if fits[-1] < 1:
            raise ValueError(f"--largest {setting.name}, {policy.name}: a sequence takes {needed / 1e9:.1f} GB on "
                             f"{'the host' if host else device}, and {free / 1e9:.1f} are free")  # fmt: skip
    return setting._replace(batch=min(fits))


# ---- Measuring -------------------------------------------------------------------------------------------------------


def make_row(policy, models, setting, settings, drafts, length, times, ttft, given, asked, moved) -> dict:
    """The numbers of one method in one setting, in seconds and bytes. times: of each lap; given: tokens of a lap and
    sequence; asked: turnover; moved: rows of a lap that were brought, critical and marginal."""
    slm, itemsize, method = models[1].config, models[0].dtype.itemsize, policy.name
    llm = replace(models[0].config, vocab_size=models[0].lm_head.out_features)  # a rank's part of the projection
    size = planned = settings.sizes(length, drafts)
    if method != "smallkv":  # the oracle looks at every key
        size = TierSizes(policy.kept(length), 1, 0) if hasattr(policy, "kept") and "oracle" not in method else None
    slm = slm if method == "smallkv" or drafts else None
    tpot, int4 = sorted(seconds / given for seconds in times), [bool(int4_modules(model)) for model in models]
    median, cuts = statistics.median(tpot), statistics.quantiles(tpot, n=10) if len(tpot) > 1 else tpot
    floor = step_bytes(llm, slm, setting.batch, length, itemsize, size, settings, int4, drafts)
    critical = planned.critical * setting.batch * llm.layers * llm.kv_heads  # rows of all heads
    brought = (2 * moved[0] + moved[1]) * llm.head_dim * itemsize / given
    return {
        "method": method, "setting": setting.name, "length": length, "tokens_s": setting.batch / median,
        "tpot_s": median, "tpot_p10_p90": [cuts[0], cuts[-1]], "tokens_round": given, "ttft_s": ttft,
        # The paper's "throughput": prompt and output tokens of one sequence over the time; the batch does not count.
        "paper_throughput": ttft and (setting.prompt + setting.new) / (ttft + setting.new * median),
        "turnover_asked": asked, "turnover": None if asked is None else moved[0] / critical,
        "pcie_bytes_step": brought if settings.offload == "cpu" else 0.0,
        "step_bytes": {kind: amount / given for kind, amount in floor.items()},
        "prefill_flops": prefill_flops(llm, slm, setting.batch, setting.prompt),
    }  # fmt: skip


@torch.inference_mode()
def measure(method: str, models: list[Decoder], setting: Setting, settings: Settings, args, device) -> list[dict]:
    """One method in one setting: a row for each turnover (one for the others)."""
    drafts, path = args.speculate, f"{args.profile}.{method}.{setting.name}"
    turnovers = args.turnover if method == "smallkv" else [None]
    warm, room = WARM_STEPS + 1, setting.new // (drafts + 1) - PROFILED * bool(args.profile)
    count = min(args.steps, (room - warm) // len(turnovers) - 2)  # steps that are timed, two more before them
    if count < 1:
        least = setting.new + (drafts + 1) * (warm + 3 * len(turnovers) - room)
        raise ValueError(f"--settings {setting.name} leaves no steps to time; {least} new tokens at least")
    filled = args.decode_only and setting.name not in args.prefill and method in (*OWN, OTHER)
    ttft, make = None, partial(make_policy, method, models, settings, drafts, filled)
    tidy()
    if not filled:  # kernels are compiled and chosen at their first call
        first = make_session(make(), Setting(1, setting.prompt, 2), drafts, args.chunk)
        first.prefill()
        if args.profile:
            profile(first.prefill, f"{path}.prefill.txt", 1)
        del first
    tidy()
    policy, tokens = make(), [torch.zeros(setting.batch, dtype=torch.long, device=device)]
    session, rows = make_session(policy, setting, drafts, args.chunk), []
    ledgers = policy.ledgers(session.lengths, session.capacity)
    entries = [vars(entry) | {"model": model} for model, ledger in ledgers.items() for entry in ledger]
    on_host, here = (sum(entry["size"] for entry in entries if entry["host"] == host) for host in (True, False))
    weights = sum(map(weights_of, policy.models))
    memory = {"ledger": entries, "host_bytes": on_host, "ledger_bytes": here + weights, "peak_bytes": None}
    if args.lopsided and method == "smallkv":
        policy.favour(0)
    if filled:
        fill(session)
    else:
        ttft = laps(device, lambda: tokens.append(session.prefill().argmax(-1)), 1)[0]
    work = stepper(session, tokens[-1], args.acceptance)
    laps(device, work, warm)  # compiled, the pools filled, captured
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def counters() -> tuple[list[int], list[int]]:
        return session.length.tolist(), policy.cache.moved.sum(0).tolist() if method == "smallkv" else [0, 0]

    for turnover in turnovers:
        if turnover is not None:
            policy.turn_by(turnover, int(session.length[0]))
        laps(device, work, 2)
        before, times, after = counters(), laps(device, work, count), counters()
        given, *moved = [[(end - start) / count for start, end in zip(*pair)] for pair in zip(before, after)]
        row = make_row(policy, models, setting, settings, drafts, (before[0][0] + after[0][0]) // 2, times, ttft,
                       statistics.mean(given), turnover, *moved)  # fmt: skip
        if device.type == "cuda":  # without an SLM that stands by
            memory["peak_bytes"] = torch.cuda.max_memory_allocated() - sum(map(weights_of, models)) + weights
        rows.append(row | memory)
    if args.profile:
        profile(work, f"{path}.txt", PROFILED)
    return rows


def table(report: dict) -> str:
    """One line a row; floors from the measured ceilings. `floor` is the memory's; what comes over PCIe travels at the
    same time, so a step lasts at least as long as the longer of the two: `with PCIe`."""
    copy, pcie, matrix = (report["ceilings"][kind] for kind in ("copy_bytes_s", "pcie_bytes_s", "matrix_flops_s"))
    lines = [["setting", "method", "moved", "TPOT ms (p10-p90)", "floor ms", "x floor", "tokens/s", "PCIe MB (ms)",
              "with PCIe ms", "TTFT s", "floor s", "x floor", "paper's tok/s", "peak GB (ledger)"]]  # fmt: skip
    for row in report["rows"]:
        if "error" in row:
            lines.append([row["setting"], row["method"], row["error"], *[""] * (len(lines[0]) - 3)])
            continue
        floor, least, ttft = sum(row["step_bytes"].values()) / copy, row["prefill_flops"] / matrix, row["ttft_s"]
        travel, (low, high) = row["pcie_bytes_step"], row["tpot_p10_p90"]
        peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.2f}"
        prefill = ["-"] * 4
        if ttft is not None:
            prefill = [f"{ttft:.2f}", f"{least:.2f}", f"{ttft / least:.2f}", f"{row['paper_throughput']:.0f}"]
        lines.append([
            row["setting"], row["method"] + f", {row['tokens_round']:.2f} a round" * bool(report["speculate"]),
            "-" if row["turnover"] is None else f"{row['turnover']:.1%}",
            f"{1e3 * row['tpot_s']:.2f} ({1e3 * low:.2f}-{1e3 * high:.2f})", f"{1e3 * floor:.2f}",
            f"{row['tpot_s'] / floor:.2f}", f"{row['tokens_s']:.0f}",
            f"{travel / 1e6:.0f} ({1e3 * travel / pcie:.2f})" if travel else "-",
            f"{1e3 * max(floor, travel / pcie):.2f}", *prefill, f"{peak} ({row['ledger_bytes'] / 1e9:.2f})",
        ])  # fmt: skip
    return command.markdown_table(lines[0], lines[1:])


# ---- The command -----------------------------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    parser = command.Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument

    def shares(text: str) -> list[float]:
        return [command.share(share) for share in text.split(",")]

    add("--pair", choices=PAIRS, default="qwen2-7b")
    add("--settings", type=Setting.many, default="64x2048+256,4x16384+512,32x16384+256",
        help="BATCHxPROMPT+NEW, separated by commas")  # fmt: skip
    add("--largest", type=Setting.many, default=[], metavar="1xPROMPT+NEW", help="the largest batch that fits, too")
    add("--methods", type=lambda text: text.split(","), default=[*OWN], help=f"of {', '.join(METHODS)}; with commas")
    add("--turnover", type=shares, default=[0.1], help="share of the critical set that a plan changes; or several")
    add("--lopsided", action="store_true", help="one KV head of each layer takes nearly all of its slots")
    add("--decode-only", action="store_true", help="random caches instead of a prefill; methods that evict have one")
    add("--prefill", type=lambda text: text.split(","), default=[], metavar="SETTINGS", help="prefilled all the same")
    add("--chunk", type=command.whole(1), help="prompt tokens that go through a model at once (default: by memory)")
    add("--steps", type=command.whole(1), default=30, help="timed steps or rounds, at most")
    add("--speculate", type=command.whole(0), default=0, metavar="K", help="rounds of K drafts, of full and smallkv")
    add("--acceptance", type=command.share, default=0.7, help="with it: the chance that a draft is accepted")
    add("--slm-layers", type=command.whole(1), metavar="N", help="the SLM's first N layers alone (A.3)")
    add("--quantize", choices=("int4", "int4-both"), help="INT4 weights of the LLM, or of both models")
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda (default: auto)")
    add("--profile", metavar="PREFIX", help="write PREFIX.METHOD.SETTING.txt, the costliest kernels")
    add("--table", action="store_true", help="print the table in markdown")
    command.add_fields(add, Settings)
    return parser


def check(args, ranks: int) -> None:
    """ValueError names flags that do not go together, before anything is made."""
    unknown, drafts = [method for method in args.methods if method not in METHODS], args.speculate
    for wrong, message in (
        (unknown, f"unknown method {', '.join(unknown)}; supported: {', '.join(METHODS)}"),
        (drafts and set(args.methods) - set(OWN), f"--speculate is for --methods {','.join(OWN)}"),
        (args.quantize and OTHER in args.methods, f"--quantize has no Transformers beside it; leave {OTHER} out"),
        (ranks > 1 and (args.quantize or args.largest or drafts or OTHER in args.methods),
         "--quantize, --largest, --speculate and the method transformers need one process; leave them out here"),
    ):  # fmt: skip
        if wrong:
            raise ValueError(message)


def run(args) -> int:
    """Lines as it goes on, then the table, and everything as JSON in the last line."""
    team = parallel.start(args.device)
    args.chunk = args.chunk or team.chunk
    check(args, team.size)
    device = team.device or command.device(args.device)
    cuda = device.type == "cuda"
    dtype, name = (torch.bfloat16, torch.cuda.get_device_name()) if cuda else (torch.float32, "CPU")
    settings = Settings(**{"scores": "slm" if args.speculate else Settings.scores, **command.typed(args, Settings)})
    settings = team.settings(settings)
    llm, slm = (Config.from_hf(raw) for raw in PAIRS[args.pair])
    kinds = {"LLM": (llm, args.quantize is not None, team),
             "SLM": (early(slm, args.slm_layers), args.quantize == "int4-both", parallel.Team())}  # fmt: skip
    check_fits({f"{role} weights": weight_bytes(config, dtype, Scheme() if rounded else None, ranks)
                for role, (config, rounded, ranks) in kinds.items()}, device)  # fmt: skip
    models = [random_decoder(config, device, dtype, *how) for config, *how in kinds.values()]
    models[0].raw = PAIRS[args.pair][0]
    report = {**vars(args), **asdict(settings), "reach": str(settings.reach),
              "device": name, "dtype": str(dtype), "torch": torch.__version__,
              "ranks": team.size, "weights": [weights_of(model) for model in models], "ceilings": ceilings(device),
              "rows": []}  # fmt: skip
    print(f"{team.size} x {name}, {dtype}, ceilings {report['ceilings']}", flush=True)
    work = [(setting, method) for setting in args.settings for method in args.methods]
    work += [(largest(make_policy(method, models, settings, args.speculate), setting), method)
             for setting in args.largest for method in args.methods]  # fmt: skip
    for setting, method in work:
        begin = time.perf_counter()
        try:
            found = measure(method, models, setting, settings, args, device)
        except torch.OutOfMemoryError as error:
            found = [{"method": method, "setting": setting.name, "error": str(error).splitlines()[0][:120]}]
        report["rows"] += found
        for row in found:
            tpot = row.get("error") or f"{1e3 * row['tpot_s']:.2f} ms"
            moved = "" if row.get("turnover") is None else f", {row['turnover']:.1%} moved"
            print(f"{setting.name} {method}{moved}: {tpot} ({time.perf_counter() - begin:.1f} s spent)", flush=True)
    if args.table:
        print(table(report))
    print(json.dumps(report))
    return 0


def main(argv: list[str] | None = None) -> int:
    return command.ended(lambda: run(make_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(parallel.run(main))
