"""What libraries' kernels compute, by excerpts of programs that have them: shapes, options and names shortened."""

import math

import pytest

from jaxmodels.errors import UserError
from jaxmodels.models.kernels.visibility import Mask
from jaxmodels.plan import figures, program

ENTRY = """HloModule m, is_scheduled=true

ENTRY %main (a: f32[]) -> f32[] {{
{parameters}
{line}
}}
"""


def counted(line, *operands):
    """FLOPs of one instruction of these operands, a0, a1 and so on; and what is not counted of it."""
    parameters = "\n".join(f"  %a{i} = {shape} parameter({i})" for i, shape in enumerate(operands))
    found = program.parse(ENTRY.format(parameters=parameters, line=line))
    return sum(times * program.flops(found, where, each) for where, each, times in found.walk()), found


CONVOLUTION = 2 * 128 * 112 * 112 * 64 * 7 * 7 * 3
"""Of 128 images: 64 features of 112 x 112, of 7 x 7 pixels of 3 channels."""
IMAGES, WEIGHTS, FEATURES = "bf16[128,224,224,3]", "bf16[64,7,7,3]", "bf16[128,112,112,64]"


@pytest.mark.parametrize(
    ("target", "result", "operands"),
    [
        ("convForward", FEATURES, (IMAGES, WEIGHTS)),
        ("convBiasActivationForward", FEATURES, (IMAGES, WEIGHTS, "f32[64]")),
        ("convBackwardInput", IMAGES, (FEATURES, WEIGHTS)),
        ("convBackwardFilter", WEIGHTS, (IMAGES, FEATURES)),
    ],
)
def test_a_convolution_of_cudnn_counts_the_same_forward_and_backward(target, result, operands):
    names = ", ".join(f"%a{i}" for i in range(len(operands)))
    line = (
        f"  ROOT %cudnn-conv = ({result}{{3,2,1,0}}, u8[0]{{0}}) custom-call({names}), window={{size=7x7 stride=2x2 "
        f'pad=3_3x3_3}}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn${target}"'
    )
    flops, found = counted(line, *operands)
    assert flops == CONVOLUTION
    assert found.uncounted() == []


ROWS, EXPERTS, D, F = 16384, 8, 1024, 3584
RAGGED = [
    (f"bf16[{ROWS},{F}]", f"bf16[{ROWS},{D}]", f"bf16[{EXPERTS},{D},{F}]"),
    (f"bf16[{ROWS},{D}]", f"bf16[{ROWS},{F}]", f"bf16[{EXPERTS},{D},{F}]"),
    (f"f32[{EXPERTS},{D},{F}]", f"bf16[{ROWS},{D}]", f"bf16[{ROWS},{F}]"),
]


@pytest.mark.parametrize(("result", "left", "right"), RAGGED, ids=["forward", "inputs' gradient", "weights' gradient"])
def test_a_ragged_product_of_a_tpu_counts_each_row_with_one_expert(result, left, right):
    line = (
        f"  ROOT %ragged-dot-none.4 = {result}{{1,0:T(8,128)(2,1)}} custom-call(%a0, %a1, %a2), "
        'custom_call_target="tpu_custom_call", metadata={op_name="jit(run)/moe/ragged_dot_general/ragged-dot-none"}'
    )
    assert counted(line, "s32[1]", left, right)[0] == 2 * ROWS * D * F


def test_a_product_that_the_compiler_writes_as_a_masked_one_counts_all_that_it_computes():
    line = (
        "  ROOT %convolution-base-dilated.6 = bf16[8,3584,1024]{1,2,0} convolution(%a0, %a1), "
        "window={size=8 stride=7 lhs_dilate=8}, dim_labels=0fb_0io->0bf"
    )
    assert counted(line, "bf16[8,16384,3584]", "bf16[8,16384,1024]")[0] == 8 * 2 * ROWS * D * F


FMHA = (
    "  ROOT %fwd = (bf16[2,8,4096,128]{{3,1,2,0}}, u8[0]{{0}}) custom-call(%a0, %a1, %a1), "
    'custom_call_target="{target}", backend_config={{"cudnn_fmha_backend_config": {{"mask_type": "{mask}", '
    '"sliding_window_length": {window}}}}}'
)
PAIRS = {("NO_MASK", 0): 4096**2, ("CAUSAL", 0): 4096 * 4097 // 2, ("CAUSAL", 512): 512 * 513 // 2 + 512 * (4096 - 512)}


@pytest.mark.parametrize(("mask", "window"), PAIRS)
@pytest.mark.parametrize(("target", "products"), [("__cudnn$fmhaSoftmax", 2), ("__cudnn$fmhaSoftmaxBackward", 5)])
def test_attention_of_cudnn_counts_what_its_mask_shows(mask, window, target, products):
    line = FMHA.format(target=target, mask=mask, window=window)
    flops, _ = counted(line, "bf16[2,4096,8,128]", "bf16[2,4096,4,128]")
    assert flops == products * 2 * 2 * 8 * 128 * PAIRS[mask, window]


SPLASH = (
    "  ROOT %splash_mha_{kind} = bf16[8,4096,128]{{2,1,0}} custom-call(%a0, %a1, %a2, %a2), "
    'custom_call_target="tpu_custom_call", frontend_attributes={{kernel_metadata={{\n'
    '"xprof_metadata":"{{\\"block_q{of}\\": 512, \\"block_kv{of}\\": 512, \\"q_layout\\": 1}}"\n'
    '}}}}, metadata={{op_name="jit(run)/layers/attn/{scope}splash/shard_map/pallas_call"}}'
)
BLOCKS = {
    (False, None): 64,
    (True, None): 8 * 9 // 2,
    (True, 1024): 1 + 2 + 6 * 3,
    (False, 512): 8 + 7 + 7,
}


@pytest.mark.parametrize(("causal", "window"), BLOCKS)
@pytest.mark.parametrize(("kind", "of", "products"), [("fwd", "", 2), ("dq", "_dq", 3), ("dkv", "_dkv", 4)])
def test_splash_attention_counts_the_blocks_of_which_its_mask_shows_any(causal, window, kind, of, products):
    scope = Mask(4096, 4096, causal, window).scope + "/"
    line = SPLASH.format(kind=kind, of=of, scope=scope)
    flops, found = counted(line, "s8[1,8,8]", "bf16[8,4096,128]", "bf16[4,4096,128]")
    assert flops == products * 2 * 8 * 128 * BLOCKS[causal, window] * 512**2
    assert found.kernels() == ["splash"]
    (product,) = [one for where, each, _ in found.walk() for one in program.products.products({}, where, each)]
    assert (product.peak, product.attention) == ("", True), "its masks of bytes make it no product of int8"


def test_a_kernel_whose_work_is_not_known_is_named_and_no_time_is_given():
    line = SPLASH.format(kind="fwd", of="", scope="")
    assert counted(line, "s8[1,8,8]", "bf16[8,4096,128]", "bf16[4,4096,128]")[1].uncounted() == [
        "splash_mha_fwd (tpu_custom_call)"
    ]
    other = '  ROOT %mine = f32[8] custom-call(%a0), custom_call_target="__gpu$xla.gpu.triton"'
    assert counted(other, "f32[8]")[1].uncounted() == ["mine (__gpu$xla.gpu.triton)"]
    for target in ("__cub$DeviceRadixSort", "GatherScatterIndicesBitpacked", "SliceId", "ZeroCrop"):
        known = f'  ROOT %known = f32[8] custom-call(%a0), custom_call_target="{target}"'
        assert counted(known, "f32[8]")[1].uncounted() == []


@pytest.mark.parametrize(
    ("queries", "keys", "causal", "window"), [(7, 7, True, None), (9, 9, True, 4), (6, 9, False, 3)]
)
@pytest.mark.parametrize("block", [(1, 1), (2, 3)])
def test_pairs_of_a_mask_are_those_that_a_loop_finds(queries, keys, causal, window, block):
    def seen(t, s):
        return (not causal or s <= t) and (window is None or (t - s < window and (causal or s - t < window)))

    blocks = {(t // block[0], s // block[1]) for t in range(queries) for s in range(keys) if seen(t, s)}
    mask = Mask(queries, keys, causal, window)
    ends = sum(min(block[1], keys - b * block[1]) for _, b in blocks) * block[0]
    assert ends <= mask.pairs(block) <= len(blocks) * math.prod(block)
    assert Mask.of(f"jit(run)/attn/{mask.scope}/xla/dot_general") == mask


def test_a_thin_product_that_is_multiplied_and_added_up_counts():
    line = (
        '  ROOT %sum = f32[64] reduce(%a0, %a1), dimensions={1}, to_apply=%add, metadata={op_name="jit(f)/dot_general"}'
    )
    assert counted(line, "f32[64,1024]", "f32[]")[0] == 2 * 64 * 1024


DOT = (
    "  {root}%{name} = f32[{out}] dot(%a0, %a0), lhs_contracting_dims={{0}}, rhs_contracting_dims={{0}}, "
    'metadata={{op_name="jit(f)/{label}"}}'
)


@pytest.mark.parametrize(
    ("label", "reason"),
    [
        (Mask(8192, 8192, True, 256).scope + "/xla/dot_general", "attention's (kernel xla), which computes much that"),
        (Mask(8192, 8192, False, None).scope + "/xla/dot_general", "of jit(f)/attend[8192x8192]/xla/dot_general"),
        ("moe/dot_general", "of jit(f)/moe/dot_general"),
    ],
)
def test_a_program_of_many_times_the_model_s_products_says_of_what_they_are(label, reason):
    lines = [
        DOT.format(root="", name="few", out="64,64", label="head/dot_general"),
        DOT.format(root="ROOT ", name="many", out="64,64", label=label),
    ]
    lines[0] = lines[0].replace("%a0, %a0", "%a1, %a1")
    total, found = counted("\n".join(lines), "f32[900,64]", "f32[100,64]")
    assert total == 2 * 64 * 64 * 1000
    assert figures.excess(found, 2.5) == ""
    assert figures.excess(found, 3.1).startswith("computes 3.1 x the model's products: 90% are ")
    assert reason in figures.excess(found, 3.1)


def test_counts_that_cannot_be_are_no_plan():
    figures.check_counts("h100:1x8", computed=1.2e15, needed=1e15, mfu=0.4)
    with pytest.raises(UserError, match="some of its products are not counted"):
        figures.check_counts("h100:1x8", computed=0.35e15, needed=1e15, mfu=0.4)
    for mfu in (1.2, 0.0, math.nan):
        with pytest.raises(UserError, match="of the peak, expected at most 100 %"):
            figures.check_counts("h100:1x8", computed=1.2e15, needed=1e15, mfu=mfu)
