"""The record of a trace equals the cache's tables; its page in a real browser, where there is one (chromium)."""

import base64
import itertools
import json
import math
import os
import shutil
import subprocess
import time
import zlib
from types import SimpleNamespace

import pytest
import torch

import cache
import generate as program
import tracing
from cache import TieredCache
from decode import Session
from smallkv import Settings
from test_checkpoint import WORDS, write_checkpoint

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PROMPT = WORDS.strip()
STEPS = 9


# ---- The record, read by loops ---------------------------------------------------------------------------------------


def unpacked(text: str) -> bytes:
    return zlib.decompress(base64.b64decode(text))


def decoded(record: dict, parts: list[dict]) -> list[list[list[int]]]:
    """By step, then by layer and KV head in one, the tier of every token."""
    heads, S = record["layers"] * record["kv_heads"], len(record["tokens"])
    changed, seen, now, out = [], [0, 0, 0], [0] * (heads * S), []
    for part in parts:
        at, places = 0, []
        for gap in unpacked(part["gaps"]):
            at += gap
            places += [at] * (gap < 255)
        changed.append(dict(zip(places, unpacked(part["to"]), strict=True)))
    for _ in range(record["steps"]):
        for i, was in enumerate(now):
            now[i] = changed[was].get(seen[was], was)
            seen[was] += 1
        out.append([now[h * S : (h + 1) * S] for h in range(heads)])
    return out


def held(table) -> list[list[int]]:
    """By layer and KV head in one, the tokens in the slots of sequence 0."""
    heads = [] if table is None else [head for layer in table for head in layer[0].tolist()]
    return [[token for token in head if token >= 0] for head in heads]


def in_places(slots) -> list[list[int]]:
    """By layer and KV head in one, the tokens in the places of sequence 0."""
    layers = [] if slots is None else zip(slots.token[:, 0].tolist(), slots.begin[:, 0].tolist())
    return [token[i:j] for token, begin in layers for i, j in itertools.pairwise(begin[:-1])]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    base, shape = tmp_path_factory.mktemp("pair"), {"max_position_embeddings": 1024}
    return write_checkpoint(base / "llm", **shape), write_checkpoint(base / "slm", heads=4, head_dim=8, seed=1, **shape)


@pytest.fixture
def traced(pair, tmp_path, monkeypatch):
    """Call the command with --trace and --json: the page's path, SmallKV's result, and of each step (critical,
    marginal), by head the tokens in the slots of its cache."""

    def call(*flags, prompt=PROMPT, models=pair):
        seen, step = [], Session.step

        def watched(self, tokens):
            logits, own = step(self, tokens), self.policy.cache
            if isinstance(own, TieredCache):
                seen.append((in_places(own.critical_slots), in_places(own.marginal_slots)))
            return logits

        names = ["--llm", models[0], "--slm", models[1], "--device", "cpu", "--max-new-tokens", STEPS + 1]
        paths = SimpleNamespace(page=tmp_path / "page.html", json=tmp_path / "r.json")
        with monkeypatch.context() as patch:
            patch.setattr(Session, "step", watched)
            arguments = *names, "--trace", paths.page, "--json", paths.json, *flags, prompt
            assert program.main([*map(str, arguments)]) == 0
        return paths.page, json.loads(paths.json.read_text())["smallkv"], seen

    return call


@pytest.mark.parametrize("flags", [
    (), ("--marginal",), ("--paper",), ("--marginal", "--no-saliency-shift"), ("--slm-budget", 0.4),
    ("--budget-tokens", 7, "--marginal"), ("--budget", 1),
], ids=lambda flags: " ".join(map(str, flags)))  # fmt: skip
def test_tiers_are_those_of_the_cache_after_every_step(traced, flags):
    _, result, slots = traced(*flags)
    record, report = result["trace"], result["report"]
    settings = program.make_settings(program.make_parser().parse_args([*map(str, flags)]))
    prompt, states = record["prompt"], decoded(record, record["tiers"])
    assert (record["steps"], len(states), len(slots), len(record["tokens"])) == (*[STEPS] * 3, prompt + STEPS + 1)
    assert "".join(record["tokens"]).startswith(PROMPT[:200]) and prompt == result["answers"][0]["prompt_tokens"]
    moved = [0, 0]
    for step, (tiers, (critical, marginal)) in enumerate(zip(states, slots)):
        sizes = settings.sizes(prompt + step + 1)
        assert record["recent"][step] == sizes.recent
        for head, tier in enumerate(tiers):
            lists = [critical[head], marginal[head] if marginal else []]
            assert sorted(sum(lists, [])) == [i for i, t in enumerate(tier) if t]  # no token is in two slots
            for found, own in zip((2, 1), lists):
                assert sorted(own) == [i for i, t in enumerate(tier) if t == found]
                if step:
                    fresh = [i for i in own if states[step - 1][head][i] != found and i != prompt + step]
                    moved[2 - found] += len(fresh)
            assert all(tier[i] == 2 for i in range(prompt + step + 1 - sizes.recent, prompt + step + 1))
        for held, size in ((critical, sizes.critical), (marginal, sizes.marginal)):
            counts = [len(own) for own in held] or [0, 0]
            if not settings.uniform:  # by the two KV heads of a layer
                counts = [sum(counts[i : i + 2]) / 2 for i in range(0, len(counts), 2)]
            assert set(counts) == {size}
    assert (report["moved"]["critical"], report["moved"]["marginal"]) == tuple(moved)


@pytest.mark.parametrize("flag", ["--marginal", "--no-saliency-shift", "--paper"])
def test_scores_are_what_the_plans_ranked_by(flag, traced, monkeypatch):
    totals, plan = [], cache.plan_tiers

    def watched(total, length, *rest):
        totals.append(total[0, :, : int(length[0])].clamp(min=0).tolist())
        plan(total, length, *rest)

    monkeypatch.setattr(cache, "plan_tiers", watched)
    record = traced(flag)[1]["trace"]
    (L, G, n), S = (record[name] for name in ("layers", "kv_heads", "steps")), len(record["tokens"])
    steps = [[head for layer in totals[i * L : (i + 1) * L] for head in layer] for i in range(n)]  # (n, L * G, length)

    def agrees(level: int, scores: list[float]) -> bool:
        mean = sum(scores) / len(scores) if scores else 0.0
        return level == 0 if mean == 0 else abs(level - 128 - math.log2(mean)) <= 0.501

    by_step, by_head = unpacked(record["step_scores"]), unpacked(record["head_scores"])
    for token in range(S):
        having = [heads for heads in steps if token < len(heads[0])]
        for i, heads in enumerate(steps):
            assert agrees(by_step[token * n + i], [own[token] for own in heads if token < len(own)])
        for head in range(L * G):
            assert agrees(by_head[head * S + token], [heads[head][token] for heads in having])


def test_heads_that_rank_are_the_matched_ones(pair, traced):
    record = traced()[1]["trace"]
    loaded = program.load_pair(*map(str, pair), "cpu")
    policy = program.make_policy("smallkv", loaded, Settings())
    Session(policy, [loaded.text.encode(PROMPT)], 1).prefill()
    heads = [head for layer in record["slm_heads"] for group in layer for head in group]
    assert [layer * 4 + head for layer, head, _ in heads] == policy.maps[0].index.flatten().tolist()
    alike = torch.tensor([head[2] for head in heads])
    torch.testing.assert_close(alike, policy.maps[0].similarity.flatten(), atol=5.1e-4, rtol=0)
    short = traced(prompt="the quick brown fox")[1]["trace"]
    first = decoded(short, short["tiers"])[0]
    assert short["slm_heads"] is None and {tier for head in first for tier in head[: short["prompt"]]} == {2}


def test_h2o_holds_what_it_would_of_the_same_tokens(pair, traced):
    result = traced("--compare", "--budget", 0.1, "--max-new-tokens", 40)[1]
    loaded, states = program.load_pair(*map(str, pair), "cpu"), decoded(result["trace"], result["trace"]["h2o"])
    session = Session(program.make_policy("h2o", loaded, Settings(budget=0.1)), [loaded.text.encode(PROMPT)], 39)
    session.prefill()
    for token, tiers in zip(result["answers"][0]["tokens"], states):
        session.step([token])
        kept = [sorted(own) for own in held(session.policy.cache.position)]
        assert [[i for i, t in enumerate(tier) if t] for tier in tiers] == kept
        assert {t for tier in tiers for t in tier} == {0, 2}
    assert len(states) == 39 and traced()[1]["trace"]["h2o"] is None


@pytest.mark.parametrize("often", [0.3, 0.002])
def test_changes_lead_back_to_what_they_are_made_of(often):
    """Gaps of thousands of tokens among them, and those of 254, 255 and 256."""
    generator, states = torch.Generator().manual_seed(0), torch.zeros(5, 2, 3, 600, dtype=torch.uint8)
    for step in range(5):
        turned = torch.rand(2, 3, 600, generator=generator) < often
        states[step] = torch.randint(3, (2, 3, 600), generator=generator).where(turned, states[max(0, step - 1)])
    states[0].view(-1)[:800] = 0
    states[0].view(-1)[[0, 254, 509, 765]] = 1
    record = {"layers": 2, "kv_heads": 3, "tokens": [""] * 600, "steps": 5}
    assert decoded(record, tracing.changes(states)) == states.flatten(1, 2).tolist()


def test_a_record_cannot_end_the_script_that_it_lies_in(traced):
    record = {**traced()[1]["trace"], "tokens": ["</script>", "<!--", "@record@", "\u2028", '"']}
    start, _, rest = tracing.page(record).partition('id="record">')
    assert json.loads(rest.partition("</script>")[0]) == record and tracing.page(record).count("</script>") == 2


@pytest.mark.parametrize("flags", [("--compare",), ("--paper",)], ids=" ".join)
def test_a_page_of_a_thousand_tokens_is_small_and_soon_there(flags, traced, monkeypatch):
    """64 steps of the embedded pair."""
    document, spent, record = json.loads((program.PAIR / "demo.json").read_text()), [], tracing.Trace.record

    def timed(*given):
        begin = time.perf_counter()
        made = tracing.page(record(*given))
        spent.append(time.perf_counter() - begin)
        return json.loads(made.partition('id="record">')[2].partition("</script>")[0])

    monkeypatch.setattr(tracing.Trace, "record", timed)
    text, models = document["text"] + document["turns"][0]["question"], (program.PAIR / "llm", program.PAIR / "slm")
    path, result, _ = traced("--max-new-tokens", 65, *flags, prompt=text, models=models)
    assert (result["trace"]["steps"], len(result["trace"]["tokens"])) == (64, 984 + 65)
    assert path.stat().st_size < 200_000 and sum(spent) < 5 + 5 * ("--compare" in flags)


def test_a_record_that_is_too_large_is_refused_before_the_work(pair, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tracing, "MOST", 10_000)
    names = ["--llm", pair[0], "--slm", pair[1], "--device", "cpu", "--trace", tmp_path / "page.html"]
    assert program.main([*map(str, names), PROMPT]) == 2 and not (tmp_path / "page.html").exists()
    out, err = capsys.readouterr()
    assert not out and "--trace of 4 KV heads" in err and "is too much for a page" in err and len(err.splitlines()) == 1


# ---- The page, in a browser ------------------------------------------------------------------------------------------


class Browser:
    """Headless Chromium with one page, by the DevTools protocol over a pipe: messages are JSON that end with a zero."""

    def __init__(self, folder):
        ours, theirs = os.pipe(), os.pipe()
        flags = f"--user-data-dir={folder}", "--headless=new", "--no-sandbox", "--disable-gpu"

        def inherit():  # what Chromium reads is its file 3, what it writes its file 4
            os.dup2(ours[0], 3), os.dup2(theirs[1], 4)

        self.process = subprocess.Popen(
            [BROWSER, *flags, "--remote-debugging-pipe"], stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=(3, 4), preexec_fn=inherit,
        )  # fmt: skip
        os.close(ours[0]), os.close(theirs[1])
        self.out, self.into, self.number, self.session, self.events = ours[1], os.fdopen(theirs[0], "rb"), 0, {}, []
        self.rest = b""
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Network", "Log"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **given) -> dict:
        self.number += 1
        message = {"id": self.number, "method": method, "params": given, **self.session}
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.rest:
                piece = self.into.read1(1 << 16)
                assert piece, "the browser has ended"
                self.rest += piece
            answer, _, self.rest = self.rest.partition(b"\0")
            answer = json.loads(answer)
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def js(self, code: str):
        """The value of an expression in the page."""
        found = self("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def open(self, path) -> None:
        self("Page.navigate", url=path.as_uri())
        for _ in range(500):
            if self.js("document.body?.dataset.ready"):
                return
            time.sleep(0.02)
        raise AssertionError(f"{path} does not show anything")

    def press(self, key: str) -> None:
        codes = {" ": 32, "Home": 36, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
        for kind in ("rawKeyDown", "keyUp"):
            self("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=codes[key])

    def scheme(self, name: str) -> None:
        self("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def picture(self) -> bytes:
        return base64.b64decode(self("Page.captureScreenshot", format="png")["data"])

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.out), self.into.close()


@pytest.fixture
def browser(tmp_path):
    if BROWSER is None:
        pytest.skip("no chromium here to open the page in")
    opened = Browser(tmp_path / "browser")
    yield opened
    opened.close()


def test_the_page_shows_the_record(browser, traced):
    """Every token of both rows is filled as the record says, whatever moves the slider; no error, no request."""
    path, result, _ = traced("--compare", "--marginal")
    record, states = result["trace"], {}
    for name, part in (("tiers", "tiers"), ("kept", "h2o")):
        states[name] = decoded(record, record[part])
    heads, G, prompt = record["layers"] * record["kv_heads"], record["kv_heads"], record["prompt"]
    browser.open(path)

    def shows(step: int, chosen: list[int]) -> None:
        assert browser.js("+$('step').value") == step + 1
        for name, steps in states.items():
            fills = browser.js(f"spans.{name}.map(s => ['--c', '--m'].map(x => +s.style.getPropertyValue(x)))")
            for token, fill in enumerate(fills):
                own = [steps[step][head][token] for head in chosen]
                assert fill == pytest.approx([own.count(tier) / len(own) for tier in (2, 1)])

    def choose(layer: int, head: int) -> None:
        for name, value in (("layer", layer), ("head", head)):
            browser.js(f"(x => (x.value = {value}, x.dispatchEvent(new Event('change'))))($('{name}'))")

    shows(0, range(heads))
    browser.press("ArrowRight")
    shows(1, range(heads))
    browser.js("$('step').focus()")
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft"):
        browser.press(key)
    shows(2, range(heads))
    choose(1, -1)
    shows(2, range(G, 2 * G))
    choose(1, 0)
    shows(2, [G])
    back = browser.js("spans.tiers.flatMap((s, i) => s.classList.contains('back') ? [i] : [])")
    now, before = states["tiers"][2][G], states["tiers"][1][G]
    assert back == [i for i in range(prompt + 2) if now[i] == 2 and before[i] != 2] and back
    missed = browser.js("spans.kept.flatMap((s, i) => s.classList.contains('missed') ? [i] : [])")
    assert missed == [i for i, tier in enumerate(now) if tier == 2 and states["kept"][2][G][i] == 0] and missed

    picture = f"getComputedStyle(spans.tiers[{back[0]}]).backgroundSize"
    held = browser.js(picture)
    browser.press("ArrowLeft")
    assert browser.js(picture) != held
    browser.js("document.activeElement.blur()")
    browser.press(" ")
    for _ in range(500):
        if browser.js("step") == STEPS - 1 and not browser.js("timer"):
            break
        time.sleep(0.02)
    shows(STEPS - 1, [G])

    browser.js(f"spans.tiers[{back[0]}].dispatchEvent(new PointerEvent('pointerover', {{bubbles: true}}))")
    told = browser.js("$('token').textContent")
    layer, head, alike = record["slm_heads"][1][0][0]
    assert f"SLM layer {layer:.0f} head {head:.0f} ({alike:.2f})" in told and "about" in told
    browser.js("document.querySelector('.text').focus()")
    browser.press("ArrowRight")
    assert browser.js("shown") == back[0] + 1 and browser.js("step") == STEPS - 1

    pictures, colours = [], []
    for scheme in ("light", "dark"):
        browser.scheme(scheme)
        pictures.append(browser.picture())
        colours.append(browser.js("getComputedStyle(spans.tiers[0]).backgroundImage"))
    assert pictures[0] != pictures[1] and colours[0] != colours[1]
    named = [event["method"] for event in browser.events]
    assert not {"Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"} & set(named)
    asked = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert set(asked) == {path.as_uri()}
