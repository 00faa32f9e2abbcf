"""INT4 weights: published layouts written by naive loops, rounding within its bound, kernels against their twins."""

import json
import random
import shutil

import pytest
import torch
from safetensors.torch import save_file

import quantize
from checkpoint import CheckpointError, checkpoint_weights, load_decoder, read_config, read_scheme, weight_bytes
from conftest import FP32, HALF, HERE, TOLERANCE, randn, random_prompts, tiny_decoder
from decode import Policy, generate
from model import Config, Decoder
from quantize import Int4Linear, Packed, Scheme, int4_bytes, int4_modules, pack, put_int4, round_to_int4
from smallkv import Settings, SmallKV
from test_checkpoint import edit_weights, save_decoder

SHAPE = {
    "model_type": "qwen2", "vocab_size": 97, "hidden_size": 192, "intermediate_size": 328, "num_hidden_layers": 1,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256,
}  # fmt: skip


def int4(decoder: Decoder) -> Decoder:
    """The same decoder with its layers' weights rounded, each joined product as one matrix."""
    weights = dict(decoder.named_parameters())
    put_int4(decoder, Scheme())
    for name, module in int4_modules(decoder).items():
        module.fill([round_to_int4(weights[f"{name}.weight"])])
        if module.bias is not None:
            module.bias.data = weights[f"{name}.bias"].data
    return decoder.requires_grad_(False)


def plain(decoder: Decoder) -> Decoder:
    """A decoder of nn.Linear with the weights of an INT4 one."""
    twin = Decoder(decoder.config).requires_grad_(False).eval()
    dense = {f"{name}.weight": module.weight(FP32) for name, module in int4_modules(decoder).items()}
    twin.load_state_dict({**dict(decoder.named_parameters()), **dense})
    return twin


# ---- Rounding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs, outputs, group", [(128, 24, 128), (100, 5, 128), (576, 40, 128), (896, 9, 64)])
def test_no_weight_is_off_by_more_than_half_a_step(inputs, outputs, group):
    """Nor a product by more than the sum of what its weights may be off; outliers and groups of zeros included."""
    weight = randn(outputs, inputs, device="cpu") * torch.rand(outputs, 1)
    weight[0, ::50] *= 40
    weight[1] = weight[1].abs() + 3  # all on one side
    weight[2, :64] = 0
    module = Int4Linear(inputs, outputs, False, group)
    module.fill([round_to_int4(weight, group)])
    half = module.scale.float().repeat_interleave(group, 0)[:inputs].T / 2 * (1 + 1e-5)  # (N, K)
    assert ((module.weight(FP32) - weight).abs() <= half).all()
    x = randn(3, inputs, seed=1, device="cpu")
    assert ((module(x) - x @ weight.T).abs() <= x.abs() @ half.T + 1e-4).all()


@pytest.mark.parametrize("inputs, group", [(128, 128), (64, 128), (200, 128), (130, 64)])
def test_what_is_packed_comes_out(inputs, group):
    """scale * (nibble - zero) for each weight by itself; zeros up to 16, which GPTQ can store."""
    groups, draw = -(-inputs // group), random.Random(0)
    nibbles = torch.tensor([[draw.randrange(16) for _ in range(3)] for _ in range(inputs)], dtype=torch.uint8)
    zero = torch.tensor([[draw.randrange(17) for _ in range(3)] for _ in range(groups)], dtype=torch.uint8)
    scale = torch.rand(groups, 3).half()
    module = Int4Linear(inputs, 3, False, group)
    module.fill([Packed(pack(nibbles, group), scale, zero)])
    weight = module.weight(FP32)
    for k in range(inputs):
        for n in range(3):
            expected = scale[k // group, n].item() * (nibbles[k, n].item() - zero[k // group, n].item())
            assert weight[n, k].item() == pytest.approx(expected, rel=1e-6)
    assert sum(b.nbytes for b in module.buffers()) == int4_bytes(inputs, 3, group)


def test_loading_rounds_on_the_way(tmp_path, device):
    """What loads with quantize is the checkpoint rounded by hand, its logits those of the rounded weights."""
    folder = save_decoder(tiny_decoder(heads=4, vocab=280), tmp_path / "llm")
    expected, loaded = int4(load_decoder(folder)), load_decoder(folder, device, quantize=True)
    modules, by_hand = int4_modules(loaded), int4_modules(expected)
    assert modules.keys() == by_hand.keys() and len(modules) == 2 * 4
    for name, module in modules.items():
        for mine, other in zip(module.buffers(), by_hand[name].buffers(), strict=True):
            assert torch.equal(mine.cpu(), other), name
    assert torch.equal(loaded.lm_head.weight.cpu(), expected.lm_head.weight)
    tokens = torch.tensor(random_prompts(80))
    for T in (3, 80):  # a product of few rows, and dequantise-and-multiply
        logits = loaded(tokens[:, :T].to(device)).cpu()
        torch.testing.assert_close(logits, plain(expected)(tokens[:, :T]), atol=1e-4, rtol=1e-3)


# ---- Published checkpoints -------------------------------------------------------------------------------------------

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
    rows = [[sum(line[start + order[i]] << 4 * i for i in range(8)) for start in range(0, len(line), 8)]
            for line in nibbles]  # fmt: skip
    return torch.tensor(rows).int()  # the highest bit becomes the sign


def write_published(folder, name: str, seed: int = 0) -> Decoder:
    """A tiny checkpoint of random 4-bit numbers as that tool would store it; returns the decoder it stands for."""
    folder.mkdir()
    about = {"bits": 4, **METHODS[name]}
    decoder, draw = Decoder(Config.from_hf(SHAPE)).requires_grad_(False).eval(), random.Random(seed)
    torch.manual_seed(seed)
    tensors = {}
    for stored, weight in checkpoint_weights(decoder).items():  # views: what is written here is the decoder's
        part, _, leaf = stored.rpartition(".")
        kept = any(keep in part for keep in about.get("modules_to_not_convert", []))
        if "_proj" not in part or leaf == "bias" or kept:
            weight.copy_(weight.half())
            tensors[stored] = weight.half()
            continue
        N, K = weight.shape
        size = K if about["group_size"] == -1 else about["group_size"]
        groups = -(-K // size)
        index = [k // size for k in range(K)]
        if about.get("desc_act"):
            random.Random(part.rpartition(".")[0]).shuffle(index)  # products of one input have one order
        q = [[draw.randrange(16) for _ in range(N)] for _ in range(K)]
        zero = [[8 if about.get("sym") else draw.randrange(16) for _ in range(N)] for _ in range(groups)]
        scale, at = (torch.rand(groups, N) / 40).half(), torch.tensor(index)
        weight.copy_((scale.float()[at] * (torch.tensor(q) - torch.tensor(zero)[at])).T)
        if about["quant_method"] == "gptq":
            less = 0 if about.get("checkpoint_format") == "gptq_v2" else 0x11111111  # of a word of eight: with borrows
            tensors[f"{part}.qweight"] = words(list(zip(*q)), range(8)).T
            tensors[f"{part}.qzeros"] = words(zero, range(8)) - less
            if name != "gptq-no-g_idx":
                tensors[f"{part}.g_idx"] = torch.tensor(index, dtype=torch.int32)
            if name == "gptq":
                tensors.setdefault(f"{part}.bias", torch.zeros(N).half())  # AutoGPTQ stores one everywhere
        else:
            tensors[f"{part}.qweight"] = words(q, (0, 2, 4, 6, 1, 3, 5, 7))
            tensors[f"{part}.qzeros"] = words(zero, (0, 2, 4, 6, 1, 3, 5, 7))
        tensors[f"{part}.scales"] = scale
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    write_config(folder, quantization_config=about)
    return decoder


def write_config(folder, **changes):
    (folder / "config.json").write_text(json.dumps({**SHAPE, "torch_dtype": "float16", **changes}))


@pytest.mark.parametrize("name", METHODS)
def test_a_published_checkpoint_has_the_logits_of_its_weights(name, tmp_path, device):
    """hidden size 192 and inner size 328: with groups of 128 and 256 the last one is short."""
    expected = write_published(tmp_path / "llm", name)
    loaded = load_decoder(tmp_path / "llm", device, FP32)
    assert len(int4_modules(loaded)) == (3 if name == "awq-keeps" else 4)
    tokens = torch.tensor(random_prompts(80))
    for T in (5, 80):
        logits = loaded(tokens[:, :T].to(device)).cpu()
        torch.testing.assert_close(logits, expected(tokens[:, :T]), atol=1e-4, rtol=1e-3)
    config, scheme = read_config(tmp_path / "llm"), read_scheme(tmp_path / "llm")
    held = sum(tensor.nbytes for tensor in (*loaded.parameters(), *loaded.buffers()))
    assert weight_bytes(config, FP32, scheme) == held


@pytest.mark.parametrize("name", ["gptq", "gptq-act-order"])
def test_a_published_checkpoint_decodes_by_the_kernels(name, tmp_path, kernels_on):
    decoder = write_published(tmp_path / "llm", name)
    policies = Policy(decoder.to(HERE)), Policy(load_decoder(tmp_path / "llm", HERE, FP32))
    assert len({str(generate(policy, random_prompts(30, 17), 3)) for policy in policies}) == 1


Q0, K0 = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
WRONG_CONFIG = {
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
    r"q_proj: sym is true, and qzeros hold \[7\]: a checkpoint_format": {"checkpoint_format": "gptq_v2"},
    f"llm: {Q0} alone are INT4, but of products of one input all": {"modules_in_block_to_quantize": [["q_proj"]]},
}
DAMAGE = {
    f"missing tensor {Q0}.scales": lambda t: t.pop(f"{Q0}.scales"),
    f"missing tensor {Q0}.qweight": lambda t: t.pop(f"{Q0}.qweight"),
    rf"unexpected tensor {Q0}.weight \(192, 192\)": lambda t: t.update({f"{Q0}.weight": torch.ones(192, 192)}),
    rf"{Q0}.qweight has shape \(23, 192\)": lambda t: t.update({f"{Q0}.qweight": t[f"{Q0}.qweight"][1:]}),
    f"{Q0}: qweight should be int32": lambda t: t.update({f"{Q0}.qweight": t[f"{Q0}.qweight"].float()}),
    "up_proj.bias is not zero, and config.json says": lambda t: t["model.layers.0.mlp.up_proj.bias"].fill_(1),
    f"{Q0}: g_idx does not divide 192 inputs into groups of 128": lambda t: t[f"{Q0}.g_idx"].fill_(0),
    f"{Q0}: g_idx is not in order, but desc_act": lambda t: t.update({f"{Q0}.g_idx": t[f"{Q0}.g_idx"].roll(3)}),
}


@pytest.fixture(scope="module")
def gptq(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published") / "llm"
    write_published(folder, "gptq")
    return folder


@pytest.mark.parametrize("message", WRONG_CONFIG)
def test_a_wrong_quantization_config_is_named(message, gptq):
    changes = WRONG_CONFIG[message]
    right = {"bits": 4, **METHODS["gptq"]}
    write_config(gptq, quantization_config={**right, **changes} if isinstance(changes, dict) else changes)
    with pytest.raises(CheckpointError, match=message):
        load_decoder(gptq)
    write_config(gptq, quantization_config=right)


@pytest.mark.parametrize("message", DAMAGE)
def test_damaged_int4_checkpoints_are_named(message, gptq, tmp_path):
    shutil.copytree(gptq, tmp_path, dirs_exist_ok=True)
    edit_weights(tmp_path, DAMAGE[message])
    with pytest.raises(CheckpointError, match=message):
        load_decoder(tmp_path)


def test_act_order_needs_its_index_and_one_for_products_that_are_joined(tmp_path):
    write_published(tmp_path / "one", "gptq-no-g_idx")
    write_config(tmp_path / "one", quantization_config={"bits": 4, **METHODS["gptq-no-g_idx"], "desc_act": True})
    with pytest.raises(CheckpointError, match=f"{Q0}: desc_act is true, but there is no g_idx"):
        load_decoder(tmp_path / "one")
    write_published(tmp_path / "two", "gptq-act-order")
    edit_weights(tmp_path / "two", lambda t: t.update({f"{K0}.g_idx": t[f"{K0}.g_idx"].flip(0)}))
    with pytest.raises(CheckpointError, match="products of one input have different g_idx and cannot be joined"):
        load_decoder(tmp_path / "two")


def test_int4_checkpoints_and_their_configs_must_fit(tmp_path):
    write_published(tmp_path / "llm", "awq")
    with pytest.raises(CheckpointError, match=r"is quantised already \(awq\); leave --quantize out"):
        load_decoder(tmp_path / "llm", quantize=True)
    write_config(tmp_path / "llm", intermediate_size=330, quantization_config={"bits": 4, **METHODS["awq"]})
    with pytest.raises(CheckpointError, match="192 x 330 cannot be stored by awq, 8 numbers a word"):
        load_decoder(tmp_path / "llm")
    write_config(tmp_path / "llm")
    with pytest.raises(CheckpointError, match="holds INT4 weights.*quantization_config"):
        load_decoder(tmp_path / "llm")


# ---- Kernels ---------------------------------------------------------------------------------------------------------


def int4_case(dtype, M, K, N, group):
    groups, generator = -(-K // group), torch.Generator().manual_seed(0)
    packed = torch.randint(-(2**15), 2**15, (groups * group // 4, N), generator=generator).short()
    zero = torch.randint(17, (groups, N), generator=generator).byte()
    scale = (0.01 + torch.rand(groups, N, generator=generator) / 100).to(torch.bfloat16)
    layout = [tensor.to(HERE) for tensor in (packed, scale, zero)]
    return randn(M, K, dtype=dtype), *layout, randn(N, seed=1, dtype=dtype)


SHAPES = [(1, 128, 64, 128), (3, 200, 77, 128), (17, 576, 130, 64), (2, 1100, 40, 128)]
if HERE == "cuda":  # the interpreter is slow
    SHAPES += [(4, 896, 1152, 128), (33, 1536, 576, 128), (64, 577, 300, 128), (64, 4864, 896, 64)]


@pytest.mark.parametrize("M, K, N, group", SHAPES)
def test_product_equals_its_twin(M, K, N, group):
    """Rows padded, short last groups, outputs no multiple of a block, groups split among programs."""
    for dtype in [HALF] + [FP32] * (M < 33):  # fp32 takes long to compile
        x, *layout, bias = int4_case(dtype, M, K, N, group)
        for added in (None, bias):
            expected = quantize.int4_matmul_torch(x.float(), *layout, None if added is None else added.float())
            # The kernel takes (16 + zero) * sum of the inputs from sums of up to 31 times as much: in fp32 that costs
            # some 2e-8 for each input, more than fp32's bound where there are thousands.
            bound = max(TOLERANCE[dtype], 2e-8 * K)
            out = quantize.int4_matmul_triton(x, *layout, added).float()
            torch.testing.assert_close(out, expected, atol=bound, rtol=TOLERANCE[dtype])


def test_groups_are_split_where_outputs_are_few():
    shapes = ((1, 64), (64, 231), (462, 64), (4000, 8), (3, 1))
    assert [quantize.split_groups(*shape) for shape in shapes] == [4, 29, 64, 8, 1]


@pytest.mark.parametrize("K, N, group", [(128, 64, 128), (200, 301, 128), (577, 40, 64)])
def test_dequantised_weights_equal_their_twin(K, N, group):
    for dtype in (FP32, HALF):
        _, *layout, _ = int4_case(dtype, 1, K, N, group)
        expected = quantize.dequantize_torch(*layout, K, dtype)
        assert torch.equal(quantize.dequantize_triton(*layout, K, dtype), expected)


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_smallkv_on_int4_weights(model_type):
    """Tokens of two INT4 models are those of the models that their weights stand for."""
    llm = tiny_decoder(head_dim=32, model_type=model_type)
    slm = tiny_decoder(heads=4, head_dim=32, seed=1, model_type=model_type)
    for model in (llm, slm):
        for part, parameter in model.named_parameters():
            if part.endswith("bias"):  # tiny_decoder leaves them as they come
                parameter.copy_(randn(*parameter.shape, seed=len(part), device="cpu"))
    rounded = int4(llm), int4(slm)
    tokens = [generate(SmallKV(*models, Settings()), random_prompts(120, 97), 8)
              for models in (rounded, [plain(model) for model in rounded])]  # fmt: skip
    assert tokens[0] == tokens[1]
