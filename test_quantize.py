"""INT4 weights: published layouts written by naive loops, rounding within its bound, kernels against their twins.

Without a GPU the kernels run in Triton's interpreter (conftest.py), in fp32 and fp16; on a GPU in bf16 too.
"""

import json
import random

import pytest
import torch
from safetensors.torch import load_file, save_file

import generate as command
import kernels_int4
from backend import TORCH, TRITON
from checkpoint import CheckpointError, load_decoder, read_config, read_scheme, weight_bytes
from conftest import random_prompts, tiny_decoder
from decode import FullPolicy, Session, generate
from layers import Layers
from model import Config, Decoder
from quantize import Int4Linear, Scheme, int4_bytes, int4_modules, join_int4, put_int4, round_to_int4, run_on
from settings import Settings
from smallkv import SmallKV
from test_generate import write_checkpoint
from test_graph import generate_static
from test_kernels import HALF, HERE, TOLERANCE, cases, close, randn

SHAPE = {
    "model_type": "qwen2", "vocab_size": 97, "hidden_size": 192, "intermediate_size": 328, "num_hidden_layers": 1,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256,
}  # fmt: skip
NEW = 8 if HERE == "cuda" else 3  # tokens of a static step: the interpreter is slow, and a GPU captures the third


@pytest.fixture
def device():
    return HERE


def int4(decoder: Decoder) -> Decoder:
    """The same decoder with its layers' weights rounded."""
    weights = {name: p.data for name, p in decoder.layers.named_parameters()}
    put_int4(decoder, Scheme())
    for name, module in int4_modules(decoder).items():
        name = name.removeprefix("layers.")
        Scheme().read(module, {"weight": weights[f"{name}.weight"]})
        if module.bias is not None:
            module.bias.data = weights[f"{name}.bias"]
    return decoder.requires_grad_(False)


def plain(decoder: Decoder) -> Decoder:
    """A decoder of nn.Linear with the weights of an INT4 one."""
    twin = Decoder(decoder.config).requires_grad_(False).eval()
    dense = {f"{name}.weight": module.weight(torch.float32) for name, module in int4_modules(decoder).items()}
    for name, parameter in twin.named_parameters():
        parameter.copy_(dense[name] if name in dense else decoder.get_parameter(name))
    return twin


# ---- rounding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs, outputs, group", [(128, 24, 128), (100, 5, 128), (576, 40, 128), (896, 9, 64)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_no_weight_is_off_by_more_than_half_a_step(inputs, outputs, group, symmetric):
    """Nor a product by more than the sum of what its weights may be off; outliers and groups of zeros included."""
    weight = randn(outputs, inputs) * torch.rand(outputs, 1)
    weight[0, ::50] *= 40
    weight[1] = weight[1].abs() + 3  # all on one side
    weight[2, :64] = 0
    nibbles, scale, zero = round_to_int4(weight, group, symmetric)
    module = Int4Linear(inputs, outputs, False, group)
    module.fill(nibbles, scale, zero)
    half = scale.float().repeat_interleave(group, 0)[:inputs].T / 2 * (1 + 1e-5)  # (N, K)
    assert ((module.weight(torch.float32) - weight).abs() <= half).all()
    x = randn(3, inputs, seed=1)
    assert ((module(x) - x @ weight.T).abs() <= x.abs() @ half.T + 1e-4).all()


@pytest.mark.parametrize("inputs, group", [(128, 128), (64, 128), (200, 128), (130, 64)])
def test_what_is_packed_comes_out(inputs, group):
    """scale * (nibble - zero) for each weight by itself; zeros up to 16, which GPTQ can store."""
    groups, draw = -(-inputs // group), random.Random(0)
    nibbles = torch.tensor([[draw.randrange(16) for _ in range(3)] for _ in range(inputs)], dtype=torch.uint8)
    zero = torch.tensor([[draw.randrange(17) for _ in range(3)] for _ in range(groups)], dtype=torch.uint8)
    scale = torch.rand(groups, 3).half()
    module = Int4Linear(inputs, 3, False, group)
    module.fill(nibbles, scale, zero)
    weight = module.weight(torch.float32)
    for k in range(inputs):
        for n in range(3):
            expected = scale[k // group, n].item() * (nibbles[k, n].item() - zero[k // group, n].item())
            assert weight[n, k].item() == pytest.approx(expected, rel=1e-6)
    assert sum(b.nbytes for b in module.buffers()) == int4_bytes(inputs, 3, group)


def test_loading_rounds_on_the_way(tmp_path, device):
    """What loads with quantize="int4" is the checkpoint within its bound, its logits those of the rounded weights."""
    folder = write_checkpoint(tmp_path / "llm", heads=4)
    original, loaded = load_decoder(folder), load_decoder(folder, device, quantize="int4")
    modules = int4_modules(loaded)
    assert len(modules) == 2 * 7 and torch.equal(loaded.lm_head.weight.cpu(), original.lm_head.weight)
    for name, module in modules.items():
        off = (module.weight(torch.float32).cpu() - original.get_submodule(name).weight).abs()
        assert (off <= module.scale.float().max().item() / 2 * (1 + 1e-5)).all() and off.max() > 0
    tokens = torch.tensor(random_prompts(80))
    for backend in (TORCH, TRITON) if device == "cuda" else (TORCH,):
        run_on(loaded, backend)
        for T in (3, 80):  # a product of few rows, and dequantise-and-multiply
            expected = plain(loaded)(tokens[:, :T])
            torch.testing.assert_close(loaded(tokens[:, :T].to(device)).cpu(), expected, atol=1e-4, rtol=1e-3)


# ---- published checkpoints -------------------------------------------------------------------------------------------

METHODS = {
    "gptq": {"quant_method": "gptq", "group_size": 128, "desc_act": False, "sym": True},
    "gptq_v2": {"quant_method": "gptq", "group_size": 128, "desc_act": False, "checkpoint_format": "gptq_v2"},
    "gptq-no-g_idx": {"quant_method": "gptq", "group_size": 128},
    "gptq-act-order": {"quant_method": "gptq", "group_size": 64, "desc_act": True},
    "gptq-one-group": {"quant_method": "gptq", "group_size": -1, "desc_act": False},
    "gptq-256": {"quant_method": "gptq", "group_size": 256, "desc_act": False},
    "awq": {"quant_method": "awq", "group_size": 64, "version": "gemm", "zero_point": True},
    "awq-keeps": {"quant_method": "awq", "group_size": 64, "version": "GEMM", "modules_to_not_convert": ["down_proj"]},
}  # fmt: skip


def words(nibbles, order):
    """Lists of 4-bit numbers, eight a word: the number `order[i]` of the eight at bits 4 i."""
    out = []
    for line in nibbles:
        row = []
        for start in range(0, len(line), 8):
            word = sum(line[start + order[i]] << 4 * i for i in range(8))
            row.append(word - (1 << 32) if word >= 1 << 31 else word)
        out.append(row)
    return torch.tensor(out, dtype=torch.int32)


def transpose(lists):
    return [list(line) for line in zip(*lists)]


def write_published(folder, name: str, seed: int = 0) -> Decoder:
    """A tiny checkpoint of random 4-bit numbers as that tool would store it; returns the decoder it stands for."""
    folder.mkdir()
    about = {"bits": 4, **METHODS[name]}
    config = Config.from_hf(SHAPE)
    decoder, draw = Decoder(config).requires_grad_(False).eval(), random.Random(seed)
    torch.manual_seed(seed)
    tensors = {}
    for part, module in decoder.named_modules():
        if not isinstance(module, torch.nn.Linear) or part == "lm_head":
            continue
        if any(kept in part for kept in about.get("modules_to_not_convert", [])):
            continue
        N, K = module.weight.shape
        size = K if about["group_size"] == -1 else about["group_size"]
        groups = -(-K // size)
        index = [k // size for k in range(K)]
        if about.get("desc_act"):
            random.Random(part.rsplit(".", 1)[0]).shuffle(index)  # products of one input have one order
        q = [[draw.randrange(16) for _ in range(N)] for _ in range(K)]
        zero = [[draw.randrange(1, 16) for _ in range(N)] for _ in range(groups)]
        scale = (torch.rand(groups, N) / 40).half()
        at = torch.tensor(index)
        module.weight.copy_((scale.float()[at] * (torch.tensor(q) - torch.tensor(zero)[at])).T)
        part = f"model.{part}"
        if about["quant_method"] == "gptq":
            lower = 0 if about.get("checkpoint_format") == "gptq_v2" else 1
            tensors[f"{part}.qweight"] = words(transpose(q), range(8)).T
            tensors[f"{part}.qzeros"] = words([[z - lower for z in line] for line in zero], range(8))
            if name != "gptq-no-g_idx":
                tensors[f"{part}.g_idx"] = torch.tensor(index, dtype=torch.int32)
            if module.bias is None and name == "gptq":
                tensors[f"{part}.bias"] = torch.zeros(N).half()  # AutoGPTQ stores one everywhere
        else:
            tensors[f"{part}.qweight"] = words(q, (0, 2, 4, 6, 1, 3, 5, 7))
            tensors[f"{part}.qzeros"] = words(zero, (0, 2, 4, 6, 1, 3, 5, 7))
        tensors[f"{part}.scales"] = scale
    quantised = {part.rsplit(".", 1)[0] for part in tensors}
    for part, parameter in decoder.named_parameters():
        stored = part if part == "lm_head.weight" else f"model.{part}"
        if stored.removesuffix(".weight") not in quantised:
            parameter.copy_(parameter.half())
            tensors[stored] = parameter.half()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    write_config(folder, quantization_config=about)
    return decoder


def write_config(folder, **changes):
    (folder / "config.json").write_text(json.dumps({**SHAPE, "torch_dtype": "float16", **changes}))


@pytest.mark.parametrize("name", METHODS)
def test_a_published_checkpoint_has_the_logits_of_its_weights(name, tmp_path, device):
    """hidden size 192 and inner size 328: with groups of 128 and 256 the last one is short."""
    expected = write_published(tmp_path / "llm", name)
    loaded = load_decoder(tmp_path / "llm", device, torch.float32)
    assert len(int4_modules(loaded)) == (6 if name == "awq-keeps" else 7)
    tokens = torch.tensor(random_prompts(80))
    for T in (5, 80):
        logits = loaded(tokens[:, :T].to(device)).cpu()
        torch.testing.assert_close(logits, expected(tokens[:, :T]), atol=1e-4, rtol=1e-3)
    config, scheme = read_config(tmp_path / "llm"), read_scheme(tmp_path / "llm")
    held = sum(tensor.nbytes for tensor in (*loaded.parameters(), *loaded.buffers()))
    assert weight_bytes(config, torch.float32, scheme) == held


@pytest.mark.parametrize("name", ["gptq", "gptq-act-order"])
def test_a_published_checkpoint_decodes_in_the_static_step(name, tmp_path, device):
    write_published(tmp_path / "llm", name)
    prompts = random_prompts(40, 17)
    eager = load_decoder(tmp_path / "llm", "cpu", torch.float32)
    expected = generate(eager, FullPolicy(eager), prompts, NEW)
    llm = load_decoder(tmp_path / "llm", device, torch.float32)
    assert generate_static(Session(llm, FullPolicy(llm), prompts, NEW), NEW, TRITON) == expected


Q0 = "model.layers.0.self_attn.q_proj"
DAMAGE = {
    "unknown quant_method 'bitsandbytes'.*supported: gptq, awq": {"quant_method": "bitsandbytes"},
    "unknown quant_method None": {"quant_method": None},
    "should be a JSON object, not 'gptq'": "gptq",
    "quantization_config lacks bits, group_size": {"bits": None, "group_size": None},
    "bits 8 is not supported with gptq; supported: 4": {"bits": 8},
    "group_size 32 is not supported": {"group_size": 32},
    "group_size '128' is not supported": {"group_size": "128"},
    "checkpoint_format 'marlin' is not supported": {"checkpoint_format": "marlin"},
    "lm_head True is not supported": {"lm_head": True},
    "version 'gemv' is not supported with awq; supported: gemm": {"quant_method": "awq", "version": "GEMV"},
    "zero_point False is not supported": {"quant_method": "awq", "zero_point": False},
    r"down_proj.qweight has shape \(41, 192\), config.json says \(328, 24\)": {"quant_method": "awq"},
    r"down_proj.qzeros has shape \(3, 24\), config.json says \(6, 24\)": {"group_size": 64},
}


@pytest.fixture(scope="module")
def gptq(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published") / "llm"
    write_published(folder, "gptq")
    return folder


@pytest.mark.parametrize("message", DAMAGE)
def test_a_wrong_quantization_config_is_named(message, gptq):
    changes = DAMAGE[message]
    right = {"bits": 4, **METHODS["gptq"]}
    write_config(gptq, quantization_config={**right, **changes} if isinstance(changes, dict) else changes)
    with pytest.raises(CheckpointError, match=message):
        load_decoder(gptq)
    write_config(gptq, quantization_config=right)


@pytest.mark.parametrize("damage, message", [
    (lambda t: t.pop(f"{Q0}.scales"), f"missing tensor {Q0}.scales"),
    (lambda t: t.pop(f"{Q0}.qweight"), f"missing tensor {Q0}.qweight"),
    (lambda t: t.update({f"{Q0}.weight": torch.ones(192, 192)}), rf"unexpected tensor {Q0}.weight \(192, 192\)"),
    (lambda t: t.update({f"{Q0}.qweight": t[f"{Q0}.qweight"][1:]}), rf"{Q0}.qweight has shape \(23, 192\)"),
    (lambda t: t.update({f"{Q0}.qweight": t[f"{Q0}.qweight"].float()}), f"{Q0}: qweight should be int32"),
    (lambda t: t["model.layers.0.mlp.up_proj.bias"].fill_(1), "up_proj.bias is not zero, and config.json says"),
    (lambda t: t[f"{Q0}.g_idx"].fill_(0), f"{Q0}: g_idx does not divide 192 inputs into groups of 128"),
    (lambda t: t.update({f"{Q0}.g_idx": t[f"{Q0}.g_idx"].roll(3)}), f"{Q0}: g_idx is not in order, but desc_act"),
], ids=range(8))  # fmt: skip
def test_damaged_int4_checkpoints_are_named(damage, message, gptq, tmp_path):
    tensors = load_file(gptq / "model.safetensors")
    damage(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((gptq / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=message):
        load_decoder(tmp_path)


def test_act_order_needs_its_index_and_one_for_products_that_are_joined(tmp_path):
    write_published(tmp_path / "llm", "gptq-no-g_idx")
    write_config(tmp_path / "llm", quantization_config={"bits": 4, **METHODS["gptq"], "desc_act": True})
    with pytest.raises(CheckpointError, match=f"{Q0}: desc_act is true, but there is no g_idx"):
        load_decoder(tmp_path / "llm")
    modules = [Int4Linear(128, 8, False, ordered=True) for _ in range(2)]
    modules[0].order.copy_(torch.randperm(128))
    with pytest.raises(ValueError, match="different g_idx and cannot be joined; use --backend torch"):
        join_int4(modules)


def test_without_its_config_an_int4_checkpoint_is_strange(tmp_path):
    write_published(tmp_path / "llm", "awq")
    write_config(tmp_path / "llm")
    with pytest.raises(CheckpointError, match="holds INT4 weights.*quantization_config"):
        load_decoder(tmp_path / "llm")


def test_a_matrix_that_cannot_be_eight_a_word_is_named(tmp_path):
    write_published(tmp_path / "llm", "awq")
    write_config(tmp_path / "llm", intermediate_size=330, quantization_config={"bits": 4, **METHODS["awq"]})
    with pytest.raises(CheckpointError, match="192 x 330 cannot be stored by awq, 8 numbers a word"):
        load_decoder(tmp_path / "llm")


# ---- kernels ---------------------------------------------------------------------------------------------------------


def int4_case(device, dtype, M, K, N, group):
    groups, generator = -(-K // group), torch.Generator().manual_seed(0)
    packed = torch.randint(-(2**15), 2**15, (groups * group // 4, N), generator=generator).short()
    zero = torch.randint(17, (groups, N), generator=generator).byte()
    scale = (0.01 + torch.rand(groups, N, generator=generator) / 100).to(torch.bfloat16)
    layout = [tensor.to(device) for tensor in (packed, scale, zero)]
    return randn(M, K, dtype=dtype, device=device), *layout, randn(N, seed=1, dtype=dtype, device=device)


@pytest.mark.parametrize("M, K, N, group", cases(
    (1, 128, 64, 128), (3, 200, 77, 128), (17, 576, 130, 64), (2, 1100, 40, 128),
    gpu=[(4, 896, 1152, 128), (33, 1536, 576, 128), (64, 577, 300, 128), (64, 4864, 896, 64), (8, 3584, 4608, 128)],
))  # fmt: skip
def test_product_equals_its_twin(M, K, N, group, device):
    """Rows padded, short last groups, outputs no multiple of a block, groups split among programs."""
    for dtype in HALF[device] + [torch.float32] * (M < 33):  # fp32 takes long to compile
        x, *layout, bias = int4_case(device, dtype, M, K, N, group)
        for added in (None, bias):
            expected = kernels_int4.int4_matmul_torch(x.float(), *layout, None if added is None else added.float())
            # The kernel takes (16 + zero) * sum of the inputs from sums of up to 31 times as much: in fp32 that costs
            # some 2e-8 for each input, more than fp32's bound where there are thousands.
            bound = max(TOLERANCE[dtype], 2e-8 * K)
            out = kernels_int4.int4_matmul_triton(x, *layout, added).float()
            torch.testing.assert_close(out, expected, atol=bound, rtol=TOLERANCE[dtype])


def test_groups_are_split_where_outputs_are_few():
    shapes = ((1, 64), (64, 231), (462, 64), (4000, 8), (3, 1))
    assert [kernels_int4.split_groups(*shape) for shape in shapes] == [4, 29, 64, 8, 1]


def test_product_of_a_part_of_joined_weights(device):
    """After a join a module's weights are columns of wider tensors."""
    modules = []
    for seed, N in enumerate((40, 24)):
        modules.append(Int4Linear(200, N, True).to(device))
        nibbles, scale, zero = round_to_int4(randn(N, 200, seed=seed))
        modules[-1].fill(*(tensor.to(device) for tensor in (nibbles, scale, zero)))
        modules[-1].bias.data = randn(N, seed=seed + 5, device=device)
    x = randn(3, 200, seed=9, device=device) / 16
    expected = [module(x) for module in modules]
    whole = join_int4(modules)
    for module in (whole, *modules):
        module.matmul = kernels_int4.int4_matmul_triton
    close(whole(x), torch.cat(expected, 1))
    for module, before in zip(modules, expected):
        close(module(x), before)
        assert module.packed.untyped_storage().data_ptr() == whole.packed.untyped_storage().data_ptr()


@pytest.mark.parametrize("K, N, group", [(128, 64, 128), (200, 301, 128), (577, 40, 64)])
def test_dequantised_weights_equal_their_twin(K, N, group, device):
    for dtype in (torch.float32, *HALF[device]):
        _, *layout, _ = int4_case(device, dtype, 1, K, N, group)
        expected = kernels_int4.dequantize_torch(*layout, K, dtype)
        assert torch.equal(kernels_int4.dequantize_triton(*layout, K, dtype), expected)


# ---- the steps and the commands --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, model_type", [("torch", "llama"), ("torch", "qwen2"), ("triton", "qwen2")])
def test_static_step_with_int4_weights(name, model_type, device):
    """SmallKV in the static step (captured on a GPU) against the eager path, both models INT4."""
    if device == "cuda" and name == "torch":
        pytest.skip("captured steps take the Triton kernels")
    torch_case, triton_case = (random_prompts(120, 97), 8, TORCH), (random_prompts(40), NEW, TRITON)
    prompts, new, backend = torch_case if name == "torch" else triton_case

    def pair(where):
        llm = tiny_decoder(head_dim=32, model_type=model_type)
        slm = tiny_decoder(heads=4, head_dim=32, seed=1, model_type=model_type)
        for model in (llm, slm):
            for part, parameter in model.named_parameters():
                if part.endswith("bias"):  # tiny_decoder leaves them as they come
                    parameter.copy_(randn(*parameter.shape, seed=len(part)))
        return [int4(model).to(where) for model in (llm, slm)]

    eager = pair("cpu")
    expected = generate(eager[0], SmallKV(*eager, Settings()), prompts, new)
    llm, slm = pair(device)
    assert generate_static(Session(llm, SmallKV(llm, slm, Settings()), prompts, new), new, backend) == expected


def test_layers_run_on_the_backend_they_are_given():
    llm = int4(tiny_decoder())
    for backend in (TORCH, TRITON):
        layers = Layers(llm, 8, backend)
        for module in (layers.qkv[0], layers.both[0], llm.layers[0].self_attn.o_proj):
            assert (module.matmul, module.dequantize) == (backend.int4_matmul, backend.dequantize)


def test_the_command_rounds_and_says_so(tmp_path, capsys):
    """The answer is that of models rounded by hand."""
    llm, slm = write_checkpoint(tmp_path / "llm"), write_checkpoint(tmp_path / "slm", heads=4, head_dim=8, seed=1)
    arguments = ["--llm", str(llm), "--slm", str(slm), "--device", "cpu", "--max-new-tokens", "8"]
    assert command.main([*arguments, "--quantize", "int4", "--slm-quantize", "int4", "the quick brown fox " * 20]) == 0
    out, err = capsys.readouterr()
    assert "float32, INT4 weights" in err
    pair = command.load_pair(str(llm), str(slm), "cpu")
    policy = SmallKV(int4(pair.llm), int4(pair.slm), Settings())
    (answer,) = generate(pair.llm, policy, [pair.text.encode("the quick brown fox " * 20)], 8, stop=pair.text.stop)
    assert out.strip() == pair.text.decode(answer).strip()


def test_what_is_quantised_is_not_rounded_again(tmp_path):
    write_published(tmp_path / "llm", "awq")
    with pytest.raises(CheckpointError, match=r"is quantised already \(awq\); leave --quantize int4 out"):
        load_decoder(tmp_path / "llm", quantize="int4")
