"""Kimi-VL is transformers' Kimi K2.5 on single pictures; counts are the published ones; batches change nothing."""

import inspect
import itertools
import math
from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from test_deepseek_v3 import in_float64
from test_deepseek_v3 import their_config as their_text_config
from torch.nn import functional as F
from transformers import DeepseekV3Config
from transformers.models.kimi_k25.configuration_kimi_k25 import (
    Kimi_K25Config,
    Kimi_K25VisionConfig,
)
from transformers.models.kimi_k25.modeling_kimi_k25 import (
    Kimi_K25ForConditionalGeneration,
    Kimi_K25MultimodalProjection,
    Kimi_K25VisionModel,
)

from noise2tokens.deepseek_v3 import config as v3
from noise2tokens.deepseek_v3.model import below
from noise2tokens.kimi_vl import experiment, moonvit
from noise2tokens.kimi_vl.batch import Batch, Sample, collate, pack_pictures, prompt_tokens
from noise2tokens.kimi_vl.experiment import (
    BUDGETS,
    WAYS,
    Stage,
    anywhere,
    by_size,
    collated,
    compare_resolution,
    compare_ways,
    curriculum,
    direct,
    draw_gallery,
    draw_sizes,
    draw_ways,
    equal_squares,
    full_scale,
    held_out,
    occlusion,
    read,
    right,
    sample,
    samples,
    share_right,
    small_target,
    stage_at,
    train,
    tune,
)
from noise2tokens.kimi_vl.model import (
    A3B,
    Config,
    KimiVL,
    conventions,
    count_parameters,
    from_checkpoint,
    kimi_vl,
    tiny,
    to_checkpoint,
)
from noise2tokens.kimi_vl.moonvit import (
    MOONVIT,
    MoonViT,
    VisionConfig,
    bicubic_matrix,
    check_grids,
    cubic,
    interpolate_table,
    merge,
    positions_in,
    rotary_2d,
    space_to_depth,
    vision_parameters,
)
from noise2tokens.kimi_vl.preprocess import (
    Picture,
    as_pixels,
    grid_of,
    preprocess,
    resized,
    to_square,
    tokens,
)
from noise2tokens.kimi_vl.projector import Projector, projector_parameters
from noise2tokens.kimi_vl.reading import QUESTIONS, TRAINING, Glyphs, Task, glyphs, mnist_glyphs
from noise2tokens.mla.attention import Sizes
from noise2tokens.moe.layer import MoEConfig
from noise2tokens.muon.optimizer import split_parameters
from noise2tokens.text import Bytes
from noise2tokens.transformer import Config as PlainConfig
from noise2tokens.transformer import Decoder, next_token_loss, rotate

ERRORS = (ValueError, TypeError)
SMALL = VisionConfig(24, layers=2, heads=3, hidden=20, patch=2, table=5)
VISIONS = {
    "3 heads, table of 5": SMALL,
    "one head, table of 1": replace(SMALL, heads=1, table=1),
    "6 heads of 4, table of 8": replace(SMALL, heads=6, table=8, rope_base=50),
    "merge of 3": replace(SMALL, merge=3, hidden=31),
    "no merge, patches of 3": replace(SMALL, merge=1, patch=3, layers=1),
}
GRIDS = {  # in blocks of merged patches
    "odd": [(1, 1), (3, 2), (1, 5)],
    "as the table": [(5, 5), (8, 8), (1, 1)],
    "one": [(2, 7)],
    "the same twice": [(2, 3), (3, 2), (2, 3)],
}


def in_patches(blocks, config):
    return [(rows * config.merge, columns * config.merge) for rows, columns in blocks]


def patches_for(grids, config, seed=0):
    generator = torch.Generator().manual_seed(seed)
    number = sum(rows * columns for rows, columns in grids)
    size = config.channels * config.patch**2
    return torch.randn(number, size, generator=generator, dtype=torch.float64)


@torch.no_grad()
def stir(model, seed=0):
    """Give every number a value far from its first one: norms not 1, biases not 0, maps that keep the scale."""
    torch.manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn_like(weight)
        if name.endswith("bias"):
            weight.copy_(0.3 * noise)
        elif weight.dim() == 1:
            weight.copy_(1 + 0.3 * noise)
        elif "table" in name or "language.embedding" in name:
            weight.copy_(noise)
        else:
            weight.copy_(1.5 * noise / weight.shape[-1] ** 0.5)
    for name, bias in model.named_buffers():
        if name.endswith("bias"):
            bias.normal_(std=0.1)
    return model.double()


def their_vision_config(config):
    return Kimi_K25VisionConfig(
        patch_size=config.patch,
        pos_emb_height=config.table,
        pos_emb_width=config.table,
        num_attention_heads=config.heads,
        num_hidden_layers=config.layers,
        hidden_size=config.width,
        intermediate_size=config.hidden,
        merge_kernel_size=(config.merge, config.merge),
        rope_parameters={"rope_type": "axial", "rope_theta": float(config.rope_base)},
    )


def their_vision_names(state, config):
    """Our weights under transformers' names, by hand and not by way of the released checkpoint's names."""
    made = {
        "patch_embed.proj.weight": state["embedding.weight"].reshape(
            config.width, config.channels, config.patch, config.patch
        ),
        "patch_embed.proj.bias": state["embedding.bias"],
        "patch_embed.pos_emb.position_embeddings": state["table"],
        "final_layernorm.weight": state["norm.weight"],
        "final_layernorm.bias": state["norm.bias"],
    }
    for i, kind in itertools.product(range(config.layers), ("weight", "bias")):
        block = below(state, f"blocks.{i}.")
        q, k, v = block[f"attention.qkv.{kind}"].chunk(3)
        new = {"attn.q_proj": q, "attn.k_proj": k, "attn.v_proj": v}
        new |= {"attn.proj": block[f"attention.out.{kind}"], "mlp.fc1": block[f"up.{kind}"]}
        new |= {"mlp.fc2": block[f"down.{kind}"], "norm1": block[f"attention_norm.{kind}"]}
        new |= {"norm2": block[f"feed_forward_norm.{kind}"]}
        made |= {f"layers.{i}.{name}.{kind}": weight for name, weight in new.items()}
    return made


def thw(grids):
    return torch.tensor([(1, *grid) for grid in grids])


@pytest.mark.parametrize("name", VISIONS)
@pytest.mark.parametrize("shapes", GRIDS)
def test_encoder_and_gradients_are_those_of_transformers(name, shapes):
    config = VISIONS[name]
    grids = in_patches(GRIDS[shapes], config)
    model = stir(MoonViT(config))
    with in_float64():
        peer = Kimi_K25VisionModel(their_vision_config(config)).double().eval()
        peer.load_state_dict(their_vision_names(model.state_dict(), config), strict=True)
        flat = patches_for(grids, config)
        cut = flat.unflatten(1, (config.channels, config.patch, config.patch))
        want = peer(cut, grid_thw=thw(grids))
        want.pooler_output.square().sum().backward()
    got = model(flat, grids)
    got.square().sum().backward()
    assert got.std() > 0.3
    assert got.shape == want.pooler_output.shape
    assert (got - want.pooler_output).abs().max() <= 1e-12
    theirs = {n: p.grad for n, p in peer.named_parameters()}
    ours = their_vision_names({n: p.grad for n, p in model.named_parameters()}, config)
    for n, grad in ours.items():
        assert (grad - theirs[n]).abs().max() <= 1e-11 * (1 + grad.abs().max()), n


def test_published_encoder_is_that_of_transformers_too():
    """All defaults: epsilon, base and the kind of GELU, of one layer of the published width."""
    config = replace(MOONVIT, layers=1)
    grids = [(2, 4), (6, 2)]
    model = stir(MoonViT(config))
    with in_float64():
        peer = Kimi_K25VisionModel(Kimi_K25VisionConfig(num_hidden_layers=1)).double().eval()
        peer.load_state_dict(their_vision_names(model.state_dict(), config))
        flat = patches_for(grids, config)
        with torch.no_grad():
            want = peer(flat.unflatten(1, (3, 14, 14)), grid_thw=thw(grids)).pooler_output
            got = model(flat, grids)
    assert got.std() > 0.3
    assert (got - want).abs().max() <= 1e-10


@pytest.mark.parametrize("name", VISIONS)
def test_a_picture_alone_is_the_same_picture_packed_with_others(name):
    config = VISIONS[name]
    grids = in_patches([(3, 2), (1, 1), (2, 5), (3, 2)], config)
    model = stir(MoonViT(config))
    flat = patches_for(grids, config)
    together = model(flat, grids)
    sizes = [rows * columns for rows, columns in grids]
    alone = [model(x, [grid]) for x, grid in zip(flat.split(sizes), grids, strict=True)]
    assert (together - torch.cat(alone)).abs().max() <= 1e-13
    # and another picture elsewhere changes nothing at all
    other = flat.clone()
    other[: sizes[0]] = 7.0
    first = sizes[0] // config.merge**2
    assert torch.equal(model(other, grids)[first:], together[first:])
    assert not torch.equal(model(other, grids)[:first], together[:first])


@pytest.mark.parametrize(("old", "new"), [(5, 7), (8, 3), (1, 4), (64, 10), (4, 4), (3, 1)])
def test_bicubic_matrix_is_that_of_pytorch(old, new):
    table = torch.randn(old, old, 2, dtype=torch.float64)
    want = F.interpolate(table.permute(2, 0, 1)[None], (new, 2 * new), mode="bicubic")[0]
    rows, columns = bicubic_matrix(old, new), bicubic_matrix(old, 2 * new)
    got = torch.einsum("ro,opd,cp->drc", rows, table, columns)
    assert (got - want).abs().max() <= 1e-13
    assert (interpolate_table(table, (new, 2 * new)) - want.flatten(1).T).abs().max() == 0
    assert (rows.sum(1) - 1).abs().max() <= 1e-14
    if old == new:
        assert (rows - torch.eye(old)).abs().max() <= 1e-15


def test_cubic_is_a_partition_of_one():
    x = torch.linspace(0, 1, 101, dtype=torch.float64)
    total = cubic(x + 1) + cubic(x) + cubic(x - 1) + cubic(x - 2)
    assert (total - 1).abs().max() <= 1e-14
    assert cubic(torch.tensor([0.0, 1.0, 2.0, 2.5])).tolist() == [1, 0, 0, 0]


def test_rotary_scores_depend_on_the_distance_in_rows_and_columns_alone():
    torch.manual_seed(0)
    q, k = torch.randn(2, 8, dtype=torch.float64)

    def score(a, b):
        turns = rotary_2d(torch.tensor([a, b]), 8, 100)
        one, two = (rotate(x.expand(2, 8), *turns) for x in (q, k))
        return (one[0] * two[1]).sum()

    assert (score((3, 5), (4, 9)) - score((10, 2), (11, 6))).abs() <= 1e-13
    assert (score((3, 5), (4, 9)) - score((3, 5), (9, 4))).abs() > 0.1  # rows are not columns
    assert (score((3, 5), (4, 9)) - score((3, 5), (5, 9))).abs() > 0.01


def test_first_pair_turns_by_a_radian_a_column_and_the_second_by_one_a_row():
    cos, sin = rotary_2d(torch.tensor([[0, 0], [0, 1], [1, 0], [2, 3]]), 8, 10_000)
    angles = torch.atan2(sin, cos)
    want = [[0, 0, 0, 0], [1, 0, 0.01, 0], [0, 1, 0, 0.01], [3, 2, 0.03, 0.02]]
    assert (angles - torch.tensor(want, dtype=torch.float64)).abs().max() <= 1e-12
    assert torch.equal(
        positions_in([(2, 3), (1, 2)]),
        torch.tensor([[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2], [0, 0], [0, 1]]),
    )
    for dim in (0, 6, -4):
        with pytest.raises(ValueError, match="multiple of 4"):
            rotary_2d(torch.zeros(1, 2, dtype=torch.int64), dim)


def test_merge_is_space_to_depth_with_channels_last():
    x = torch.arange(4 * 6 * 3).view(4, 6, 3).float()
    blocks = space_to_depth(x, 2)
    assert blocks.shape == (6, 4, 3)
    for block, (y, z) in zip(blocks, itertools.product((0, 2), (0, 2, 4)), strict=True):
        want = [x[y, z], x[y, z + 1], x[y + 1, z], x[y + 1, z + 1]]
        assert torch.equal(block, torch.stack(want))
    # PyTorch's has the channel first: the same numbers in another order
    theirs = F.pixel_unshuffle(x.permute(2, 0, 1), 2).permute(1, 2, 0).reshape(6, 3, 4)
    assert torch.equal(theirs.transpose(1, 2), blocks)
    assert not torch.equal(theirs.flatten(1), blocks.flatten(1))
    packed = merge(torch.cat([x.flatten(0, 1), x[:2].flatten(0, 1)]), [(4, 6), (2, 6)], 2)
    assert torch.equal(packed, torch.cat([blocks, space_to_depth(x[:2], 2)]))


@pytest.mark.parametrize(
    ("grids", "patches", "words"),
    [
        ([], 0, "at least one"),
        ([(3, 2)], 6, "multiples of 2"),
        ([(2, 5)], 10, "multiples of 2"),
        ([(0, 2)], 0, "multiples of 2"),
        ([(-2, -2)], 4, "multiples of 2"),
        ([(2, 2), (4, 2)], 13, "12 patches, got 13"),
    ],
)
def test_grids_that_do_not_fit_are_refused(grids, patches, words):
    with pytest.raises(ValueError, match=words):
        check_grids(grids, 2, patches)
    with pytest.raises(ValueError, match=words):
        MoonViT(SMALL)(torch.zeros(patches, 12), grids)


def test_other_bad_input_of_the_encoder_is_refused():
    with pytest.raises(ValueError, match="12 numbers in a patch, got 13"):
        MoonViT(SMALL)(torch.zeros(4, 13), [(2, 2)])
    for shape in ((3, 4), (4, 3)):
        with pytest.raises(ValueError, match="multiples of 2"):
            space_to_depth(torch.zeros(*shape, 5), 2)
    with pytest.raises(ValueError, match="one point or more"):
        bicubic_matrix(0, 3)
    for name in ("width", "layers", "heads", "hidden", "patch", "table", "merge", "channels"):
        with pytest.raises(ValueError, match=name):
            replace(SMALL, **{name: 0})
    for bad in (dict(heads=4), dict(rope_base=0), dict(norm_eps=-1), dict(rope_base=math.nan)):
        with pytest.raises(ValueError):
            replace(SMALL, **bad)


def test_first_maps_keep_the_scale_and_biases_are_zero():
    torch.manual_seed(0)
    model = MoonViT(VisionConfig(64, layers=8, heads=4, hidden=256, patch=8, table=16))
    std = {name: weight.std().item() for name, weight in model.named_parameters()}
    assert all(std[name] == 0 for name in std if name.endswith("bias"))
    want = {"table": 0.02, "embedding.weight": 192**-0.5, "blocks.3.attention.qkv.weight": 1 / 8}
    want |= {"blocks.0.up.weight": 1 / 8, "blocks.3.attention.out.weight": 1 / 32}
    want |= {"blocks.7.down.weight": 1 / 64}
    for name, value in want.items():
        assert abs(std[name] / value - 1) < 0.05, name
    projector = Projector(24, 4, 50)
    assert abs(projector.inner.weight.std().item() * 96**0.5 - 1) < 0.05
    assert abs(projector.out.weight.std().item() * 96**0.5 - 1) < 0.05
    assert projector.inner.bias.abs().max() == projector.out.bias.abs().max() == 0


@pytest.mark.parametrize("parts", [1, 4])
def test_projector_is_that_of_transformers(parts):
    vision = Kimi_K25VisionConfig(
        hidden_size=12, num_attention_heads=3, merge_kernel_size=(1, parts)
    )
    text = DeepseekV3Config(hidden_size=10)
    theirs = Kimi_K25Config(text_config=text, vision_config=vision, projection_hidden_size=12)
    peer = Kimi_K25MultimodalProjection(theirs).double()
    ours = stir(Projector(12, parts, 10))
    names = {"norm": "pre_norm", "inner": "in_proj", "out": "out_proj"}
    state = {f"{names[n.split('.')[0]]}.{n.split('.')[1]}": w for n, w in ours.state_dict().items()}
    peer.load_state_dict(state)
    x = torch.randn(5, parts, 12, dtype=torch.float64)
    assert (ours(x) - peer(x)[:, 0]).abs().max() <= 1e-13
    assert sum(w.numel() for w in ours.parameters()) == projector_parameters(12, parts, 10)
    with pytest.raises(ValueError, match="1 or more"):
        Projector(12, 0, 10)


# Preprocessing


def test_own_resolution_up_to_the_limit():
    assert resized(896, 896) == (896, 896)  # 64 x 64 patches
    assert resized(900, 905) == (900, 905)  # partial patches do not count
    assert resized(910, 896) == (
        int(910 * math.sqrt(4096 / 4160)),
        int(896 * math.sqrt(4096 / 4160)),
    )
    assert resized(13, 100_000) == (13, 100_000)  # less than a patch high: nothing counts
    assert resized(1792, 1792, limit=16384) == (1792, 1792)
    assert resized(14, 28_000, limit=1) == (1, 626)  # a strip keeps a pixel


def test_what_a_picture_costs():
    assert tokens(28, 28) == 1
    assert tokens(29, 28) == 2
    assert tokens(896, 896) == 1024
    assert tokens(1792, 1792) == 1024
    assert tokens(1792, 1792, limit=16384) == 4096
    assert tokens(480, 640) == 18 * 23
    # the limit holds before filling up: 924 x 924 pixels after it
    assert resized(1000, 1000) == (901, 901)
    assert grid_of(1000, 1000) == (66, 66)
    assert tokens(1000, 1000) == 1089


def their_resize():
    """transformers' rule for Kimi K2.5, read from its source: the file itself wants torchvision."""
    import ast
    import importlib.util

    spec = importlib.util.find_spec("transformers.models.kimi_k25.image_processing_kimi_k25")
    with open(spec.origin, encoding="utf8") as file:
        tree = ast.parse(file.read())
    (function,) = (n for n in tree.body if getattr(n, "name", "") == "navit_resize")
    scope = {"math": math}
    exec(compile(ast.Module([function], []), spec.origin, "exec"), scope)
    return scope["navit_resize"]


def test_sizes_are_those_of_transformers_where_a_side_is_short_enough():
    """Beyond 512 patches a side Kimi K2.5 shrinks, where Kimi-VL refuses."""
    navit_resize = their_resize()
    generator = np.random.default_rng(0)
    for _ in range(300):
        height, width = (int(x) for x in np.exp(generator.uniform(np.log(14), np.log(6000), 2)))
        for limit in (64, 4096, 16384):
            small, whole = navit_resize(height, width, 14, 2, limit, 512)
            if max(whole) >= 512 * 14:
                continue
            assert resized(height, width, limit=limit) == small
            assert grid_of(height, width, limit=limit) == (whole[0] // 14, whole[1] // 14)
    small, whole = navit_resize(14, 8000, 14, 2, 4096, 512)
    assert small == (12, 7168)
    with pytest.raises(ValueError, match="fewer than 512"):
        grid_of(14, 8000)


@pytest.mark.parametrize(("side", "fits"), [(510 * 14, True), (510 * 14 + 1, False)])
def test_512_patches_a_side_are_refused(side, fits):
    if fits:
        assert grid_of(side, 20) == (510, 2)
        assert grid_of(20, side) == (2, 510)
    else:
        for size in ((side, 20), (20, side)):
            with pytest.raises(ValueError, match="fewer than 512 patches a side"):
                grid_of(*size)
        assert grid_of(side, 28, crop=True) == (510, 2)


def test_patches_hold_the_picture_row_by_row():
    config = replace(SMALL, patch=2)
    array = np.random.default_rng(0).integers(0, 256, (7, 6, 3), np.uint8)
    made = preprocess(array, config)
    assert made.grid == (4, 4) and made.content == (7, 6) and made.tokens(2) == 4
    assert made.patches.dtype == torch.float32
    filled = np.zeros((8, 8, 3), np.uint8)
    filled[:7, :6] = array
    pixels = torch.tensor(filled.astype(np.float32) / 255).permute(2, 0, 1)
    pixels = (pixels - 0.5) / 0.5  # as the released configuration has it
    want = F.unfold(pixels[None], 2, stride=2)[0].T
    assert (made.patches - want).abs().max() <= 1e-6
    assert made.patches[-1].tolist() == [-1] * 12  # filled with black, before the mean is taken


def test_cropping_keeps_the_middle():
    config = replace(SMALL, patch=2, channels=1)
    array = np.arange(7 * 9, dtype=np.uint8).reshape(7, 9)
    made = preprocess(array, config, crop=True)
    assert made.grid == (2, 4) and made.content == (4, 8)
    want = torch.tensor(array[1:5, 0:8].astype(np.float32)) / 127.5 - 1
    assert torch.allclose(made.patches, F.unfold(want[None, None], 2, stride=2)[0].T)
    with pytest.raises(ValueError, match="to crop, got 3 x 9"):
        preprocess(array[:3], config, crop=True)


def test_large_pictures_are_shrunk_and_nothing_else_is():
    config = replace(SMALL, patch=2)
    array = np.random.default_rng(0).integers(0, 256, (40, 20, 3), np.uint8)
    assert preprocess(array, config, limit=200).content == (40, 20)
    made = preprocess(array, config, limit=50)
    assert made.content == (20, 10) and made.grid == (10, 6)
    small = np.asarray(Image.fromarray(array).resize((10, 20), Image.Resampling.BICUBIC))
    again = preprocess(small, config)
    assert torch.equal(made.patches, again.patches)


def test_pictures_of_every_kind_are_read(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (9, 5, 3), np.uint8)
    path = tmp_path / "a.png"
    Image.fromarray(array).save(path)
    color, gray = replace(SMALL), replace(SMALL, channels=1)
    want = preprocess(array, color).patches
    for kind in (torch.tensor(array), Image.fromarray(array), path, str(path)):
        assert torch.equal(preprocess(kind, color).patches, want)
    one = np.asarray(Image.fromarray(array).convert("L"))
    assert np.array_equal(as_pixels(array, 1)[:, :, 0], one)
    for kind in (one, one[:, :, None], torch.tensor(one)):
        assert torch.equal(preprocess(kind, gray).patches, preprocess(array, gray).patches)
    assert np.array_equal(as_pixels(one, 3), np.stack([one] * 3, 2))


def test_photographs_are_turned_as_their_camera_notes(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (6, 10, 3), np.uint8)
    path = tmp_path / "photo.png"
    noted = Image.Exif()
    noted[0x0112] = 6  # the camera lay on its side: a quarter turn to the right
    Image.fromarray(array).save(path, exif=noted)
    want = preprocess(np.rot90(array, -1), SMALL)
    for kind in (path, Image.open(path)):
        made = preprocess(kind, SMALL)
        assert made.content == (10, 6) and torch.equal(made.patches, want.patches)


def test_what_is_transparent_lies_on_white(tmp_path):
    """As a drawing program saves it: black ink, and nothing around it."""
    drawn = np.zeros((6, 10, 4), np.uint8)
    drawn[1:3, 2:5, 3] = 255
    Image.fromarray(drawn).save(tmp_path / "ink.png")
    for kind in (Image.fromarray(drawn), tmp_path / "ink.png"):
        pixels = as_pixels(kind, 1)
        assert np.array_equal(pixels[:, :, 0], 255 - drawn[:, :, 3])


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_pictures_of_more_than_8_bits_are_refused(dtype, tmp_path):
    image = Image.fromarray(np.full((4, 4), 1000, dtype))
    image.save(tmp_path / "deep.tiff")
    for kind in (image, tmp_path / "deep.tiff"):
        with pytest.raises(TypeError, match="8 bits a channel, got a picture of mode"):
            preprocess(kind, SMALL)


@pytest.mark.parametrize(
    ("picture", "words"),
    [
        ([[0]], "got list"),
        (None, "got NoneType"),
        (np.zeros((4, 4), np.float32), "uint8, got float32"),
        (torch.zeros(4, 4), "uint8, got float32"),
        (np.zeros((4,), np.uint8), "height, width"),
        (np.zeros((4, 4, 4), np.uint8), "height, width"),
        (np.zeros((3, 4, 5), np.uint8), "height, width"),
        (np.zeros((0, 4), np.uint8), "height, width"),
        (np.zeros((1, 4, 4, 3), np.uint8), "height, width"),
    ],
)
def test_what_is_no_picture_is_refused(picture, words):
    with pytest.raises(ERRORS, match=words):
        preprocess(picture, SMALL)


@pytest.mark.parametrize(
    "bad",
    [(0, 4), (4, -1), (4.0, 4), (True, 4), (4, 4, 0), (4, 4, 14, 0), (4, 4, 14, 2.5)],
)
def test_sizes_that_are_none_are_refused(bad):
    with pytest.raises((*ERRORS, Exception), match="need|integer|type"):
        resized(*bad)


def test_square_has_the_same_side_both_ways():
    array = np.zeros((10, 40, 3), np.uint8)
    array[:, 20:] = 255
    square = to_square(array, 8)
    assert square.shape == (8, 8, 3)
    assert (square[:, :3] == 0).all() and (square[:, 5:] == 255).all()
    assert to_square(array, 8, 1).shape == (8, 8, 1)
    with pytest.raises(ValueError, match="side >= 1"):
        to_square(array, 0)


# The whole model

WHOLE = {
    "tiny": Config(
        replace(SMALL, table=3),
        v3.Config(
            vocab_size=263,
            width=24,
            layers=2,
            heads=2,
            hidden=20,
            attention=Sizes(10, 6, 4, 5),
            mixture=MoEConfig(8, 3, 7, shared=2, scale=2.446),
            rope_base=100,
            norm_eps=1e-5,
        ),
        image_token=260,
    ),
    "other widths": Config(
        replace(SMALL, width=16, heads=2, merge=3, layers=1),
        v3.Config(
            vocab_size=259,
            width=32,
            layers=3,
            heads=4,
            hidden=24,
            attention=Sizes(12, 6, 8, 7, query_rank=9),
            mixture=MoEConfig(6, 2, 9, shared=1, groups=3, top_groups=2, scale=1.3),
        ),
        image_token=258,
    ),
}


@pytest.fixture(params=WHOLE)
def config(request):
    return WHOLE[request.param]


def picture(config, blocks=(1, 1), seed=0):
    """A picture of random pixels, of so many blocks of merged patches."""
    side = config.vision.patch * config.vision.merge
    size = [side * number for number in blocks]
    generator = np.random.default_rng(seed)
    shape = (*size, 1) if config.vision.channels == 1 else (*size, 3)
    return preprocess(generator.integers(0, 256, shape, np.uint8), config.vision)


def mixed(config):
    """Samples with no picture, one, and two, of different lengths."""
    return [
        Sample(("what? ", picture(config, (2, 3)), " and?"), "ab"),
        Sample(("no picture",), "c"),
        Sample((picture(config, (1, 1), 1), picture(config, (3, 1), 2), "compare"), "defgh"),
        Sample((picture(config, (1, 2), 3),), ""),
    ]


def batched(config, samples):
    batch = collate(samples, config.image_token, config.vision.merge)
    patches = None if batch.patches is None else batch.patches.double()
    return Batch(batch.tokens, batch.labels, patches, batch.grids)


def their_config(config):
    return Kimi_K25Config(
        text_config=their_text_config(config.language, tie_word_embeddings=False),
        vision_config=their_vision_config(config.vision),
        projection_hidden_size=config.vision.width,
        image_token_id=config.image_token,
        video_token_id=config.language.vocab_size - 2,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )


def peer_of(model, config, folder):
    """transformers' model, which reads what we write as a released checkpoint by its own rules for names."""
    from safetensors.torch import save_file

    state = to_checkpoint(model.state_dict(), config)
    # Kimi K2.5 has one other name than Kimi-VL: of the projector
    new = {"multi_modal_projector.": "mm_projector.", "linear_1": "proj.0", "linear_2": "proj.2"}
    renamed = {}
    for name, weight in state.items():
        if name.startswith("multi_modal_projector."):
            for old, other in new.items():
                name = name.replace(old, other)
        renamed[name] = weight.contiguous()
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    their_config(config).save_pretrained(folder)
    with in_float64():
        peer, said = Kimi_K25ForConditionalGeneration.from_pretrained(
            folder,
            dtype=torch.float64,
            output_loading_info=True,
            attn_implementation="eager",
            experts_implementation="eager",
        )
    assert not said["missing_keys"] and not said["unexpected_keys"], said
    return peer.eval()


def test_logits_and_gradients_are_those_of_transformers(config, tmp_path):
    model = stir(kimi_vl(config))
    peer = peer_of(model, config, tmp_path)
    batch = batched(config, mixed(config))
    channels, patch = config.vision.channels, config.vision.patch
    with in_float64():
        want = peer(
            input_ids=batch.tokens,
            attention_mask=torch.ones_like(batch.tokens),
            pixel_values=batch.patches.unflatten(1, (channels, patch, patch)),
            image_grid_thw=thw(batch.grids),
            use_cache=False,
        ).logits
        next_token_loss(want, batch.labels).backward()
    got = model(batch.tokens, batch.patches, batch.grids)
    next_token_loss(got, batch.labels).backward()
    assert got.std() > 0.3
    assert (got - want).abs().max() <= 1e-11
    theirs = dict(peer.named_parameters())
    pairs = {
        "vision.embedding.bias": "model.vision_tower.patch_embed.proj.bias",
        "vision.table": "model.vision_tower.patch_embed.pos_emb.position_embeddings",
        "projector.inner.weight": "model.mm_projector.in_proj.weight",
        "projector.norm.weight": "model.mm_projector.pre_norm.weight",
        "language.head.weight": "lm_head.weight",
    }
    ours = dict(model.named_parameters())
    for mine, other in pairs.items():
        assert ours[mine].grad.abs().max() > 1e-6
        assert (ours[mine].grad - theirs[other].grad).abs().max() <= 1e-10, mine


def test_checkpoints_convert_both_ways(config):
    model = stir(kimi_vl(config))
    state = model.state_dict()
    there = to_checkpoint(state, config)
    back = from_checkpoint(there, config)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    for name in there:
        with pytest.raises(ERRORS, match="need|missing|unknown"):
            from_checkpoint({n: w for n, w in there.items() if n != name}, config)
    for unknown in ("vision_tower.encoder.blocks.77.wo.weight", "head.weight", "language_model.x"):
        with pytest.raises(ValueError, match="unknown"):
            from_checkpoint(there | {unknown: torch.zeros(1)}, config)
    for name in ("vision.table", "projector.out.bias"):
        with pytest.raises(ValueError, match="need"):
            to_checkpoint({n: w for n, w in state.items() if n != name}, config)


def test_names_are_the_released_ones():
    """As other readers of the released files list them: vLLM, and Moonshot's modeling_kimi_vl.py."""
    with torch.device("meta"):
        there = to_checkpoint(kimi_vl(A3B).state_dict(), A3B)
    shapes = {name: tuple(weight.shape) for name, weight in there.items()}
    for name, shape in {
        "vision_tower.patch_embed.proj.weight": (1152, 3, 14, 14),
        "vision_tower.patch_embed.proj.bias": (1152,),
        "vision_tower.patch_embed.pos_emb.weight": (64, 64, 1152),
        "vision_tower.encoder.blocks.26.norm0.weight": (1152,),
        "vision_tower.encoder.blocks.26.norm1.bias": (1152,),
        "vision_tower.encoder.blocks.0.wqkv.weight": (3456, 1152),
        "vision_tower.encoder.blocks.0.wqkv.bias": (3456,),
        "vision_tower.encoder.blocks.0.wo.weight": (1152, 1152),
        "vision_tower.encoder.blocks.0.mlp.fc0.weight": (4304, 1152),
        "vision_tower.encoder.blocks.0.mlp.fc1.weight": (1152, 4304),
        "vision_tower.encoder.final_layernorm.weight": (1152,),
        "multi_modal_projector.pre_norm.weight": (1152,),
        "multi_modal_projector.linear_1.weight": (4608, 4608),
        "multi_modal_projector.linear_2.weight": (2048, 4608),
        "language_model.model.embed_tokens.weight": (163840, 2048),
        "language_model.model.layers.0.self_attn.q_proj.weight": (3072, 2048),
        "language_model.model.layers.0.mlp.gate_proj.weight": (11264, 2048),
        "language_model.model.layers.26.mlp.experts.63.down_proj.weight": (2048, 1408),
        "language_model.model.layers.26.mlp.gate.e_score_correction_bias": (64,),
        "language_model.model.layers.26.mlp.shared_experts.up_proj.weight": (2816, 2048),
        "language_model.model.norm.weight": (2048,),
        "language_model.lm_head.weight": (163840, 2048),
    }.items():
        assert shapes.pop(name) == shape, name
    assert "vision_tower.encoder.blocks.27.wo.weight" not in shapes


def test_queries_and_keys_are_reordered_and_values_are_not():
    config = WHOLE["tiny"]
    state = kimi_vl(config).state_dict()
    width = config.vision.width
    number = torch.arange(3.0 * width)
    state["vision.blocks.0.attention.qkv.bias"] = number
    there = to_checkpoint(state, config)["vision_tower.encoder.blocks.0.wqkv.bias"]
    head = [0, 4, 1, 5, 2, 6, 3, 7]  # halves to pairs
    want = [3 * 0 + 8 * h + i for h in range(3) for i in head]
    assert there[:width].tolist() == want
    assert (there[width : 2 * width] - width).tolist() == want
    assert torch.equal(there[2 * width :], number[2 * width :])


def test_published_context_is_the_long_one():
    assert A3B.language.rope_base == 800_000 and A3B.language.trained_length == 128 * 1024
    assert A3B.language.layers == 27 and A3B.vision == MOONVIT


def test_counts_are_the_published_ones():
    assert sum(vision_parameters(MOONVIT).values()) == 416_866_032
    assert projector_parameters(1152, 4, 2048) == 30_679_808
    ways = conventions(A3B)
    assert ways["layers"] == {"all": 15_289_019_904, "active": 2_243_685_888}
    assert ways["layers and head"]["active"] == 2_579_230_208
    assert ways["language model"] == {"all": 15_960_108_544, "active": 2_914_774_528}
    assert ways["all parts"] == {"all": 16_407_654_384, "active": 3_362_320_368}
    # a table of 27 x 27, as in encoders of 384 pixels, would be missed in the count
    other = replace(MOONVIT, table=27)
    assert sum(vision_parameters(other).values()) == 416_866_032 - (4096 - 729) * 1152


@pytest.mark.parametrize("name", ["A3B", "tiny()", *WHOLE])
def test_closed_forms_are_what_a_model_holds(name):
    config = {"A3B": A3B, "tiny()": tiny()}.get(name) or WHOLE[name]
    with torch.device("meta"):
        model = kimi_vl(config)
    counted = count_parameters(config)
    assert sum(counted.values()) == sum(weight.numel() for weight in model.parameters())
    held = {part: 0 for part in vision_parameters(config.vision)}
    for weight_name, weight in model.vision.named_parameters():
        part = "feed-forward"
        for start, other in (("embedding", "patch embedding"), ("table", "table")):
            part = other if weight_name.startswith(start) else part
        part = "norms" if "norm" in weight_name else part
        part = "attention" if ".attention." in weight_name else part
        held[part] += weight.numel()
    assert held == vision_parameters(config.vision)
    assert counted["projector"] == sum(w.numel() for w in model.projector.parameters())
    assert counted["vision"] == sum(held.values())


def test_a_batch_is_each_sample_alone(config):
    model = stir(kimi_vl(config)).eval()
    samples = mixed(config)
    batch = batched(config, samples)
    together = model(batch.tokens, batch.patches, batch.grids)
    counted = batch.labels != -100
    for i, drawn in enumerate(samples):
        one = batched(config, [drawn])
        alone = model(one.tokens, one.patches, one.grids)[0]
        length = alone.shape[0]
        assert (together[i, :length] - alone).abs().max() <= 1e-12
        assert torch.equal(batch.labels[i, :length], one.labels[0])
        assert not counted[i, length:].any()
        alone_labels = alone[one.labels[0] != -100]
        assert len(alone_labels) == len(drawn.answer) + 1
    # the loss of a batch is the mean over all of its answers' bytes
    total = sum(
        next_token_loss(model(b.tokens, b.patches, b.grids), b.labels) * (b.labels != -100).sum()
        for b in (batched(config, [drawn]) for drawn in samples)
    )
    loss = next_token_loss(together, batch.labels)
    assert abs(loss - total / counted.sum()) <= 1e-12


def test_pictures_stand_where_their_tokens_are(config):
    """Another picture changes what comes after its place, and nothing before it."""
    model = stir(kimi_vl(config)).eval()
    one, two, three = (picture(config, (2, 1), seed) for seed in (1, 2, 3))
    token, merge_ = config.image_token, config.vision.merge

    def logits(*parts):
        tokens_T = prompt_tokens(parts, token, merge_)
        patches, grids = pack_pictures([p for p in parts if isinstance(p, Picture)])
        return model(tokens_T[None], patches.double(), grids)[0]

    base = logits("abc", one, "de", two, "f")
    second = logits("abc", one, "de", three, "f")
    assert (
        base[:7] - second[:7]
    ).abs().max() <= 1e-13  # experts' rows may be summed in another order
    assert (base[7:] - second[7:]).abs().amax(1).min() > 1e-3
    swapped = logits("abc", two, "de", one, "f")
    assert (base[:3] - swapped[:3]).abs().max() <= 1e-13
    assert (base[3:] - swapped[3:]).abs().amax(1).min() > 1e-3
    # each embedding is that of its own picture
    tokens_T = prompt_tokens(("abc", one, "de", two, "f"), token, merge_)
    patches, grids = pack_pictures([one, two])
    embedded = model.embed(tokens_T[None], patches.double(), grids)[0]
    for start, single in ((3, one), (7, two)):
        vectors = model.projector(model.vision(single.patches.double(), [single.grid]))
        assert (embedded[start : start + 2] - vectors).abs().max() <= 1e-13
    words = [0, 1, 2, 5, 6, 9]
    assert torch.equal(embedded[words], model.language.embedding(tokens_T[words]))


def test_only_the_image_token_stands_for_a_picture():
    model = kimi_vl(WHOLE["tiny"])
    tokens_BT = torch.tensor([[259, 261, 262]])  # its neighbors are tokens like others
    assert torch.equal(model.embed(tokens_BT), model.language.embedding(tokens_BT))


def test_cached_generation_is_generation_without_a_cache(config):
    model = stir(kimi_vl(config)).eval()
    prompt = ("read ", picture(config, (2, 3)), "now")
    row = prompt_tokens(prompt, config.image_token, config.vision.merge)[None]
    patches, grids = pack_pictures([prompt[1]])
    got = model.generate(row, 9, patches.double(), grids)
    assert len(set(got[0, row.shape[1] :].tolist())) > 3
    tokens_T = row
    for _ in range(9):
        vectors = model.projector(model.vision(patches.double(), grids))
        embedded = model.language.embedding(tokens_T)
        embedded[0, 5 : 5 + len(vectors)] = vectors
        with torch.no_grad():
            new = model.language.logits(model.language.hidden(embedded))[:, -1:].argmax(-1)
        tokens_T = torch.cat([tokens_T, new], 1)
    assert torch.equal(got, tokens_T)
    cache = model.language.new_cache()
    with torch.no_grad():
        parts = [
            model(row[:, :4], cache=cache),
            model(row[:, 4:], patches.double(), grids, cache=cache),
        ]
        whole = model(row, patches.double(), grids)
    assert (torch.cat(parts, 1) - whole).abs().max() <= 1e-12


def test_answers_of_many_are_those_of_one_at_a_time(config):
    model = stir(kimi_vl(config)).float().eval()
    prompts = [drawn.prompt for drawn in mixed(config)] + [
        ("what? ", picture(config, (2, 3), 9), " and?")
    ]
    prompts.append(("another p.",))  # as long as another prompt without a picture
    answers = model.answers(prompts, 6)
    assert answers == [model.answer(prompt, 6) for prompt in prompts]
    assert len(set(answers)) > 3
    # it ends at the end token, which is no text, and neither is the image token
    with torch.no_grad():
        model.language.head.weight.zero_()
    assert model.answer(("x",), 4) == "\0" * 4
    model.language.head.weight.data[Bytes().end] = model.language.norm.weight.data
    hidden = model.language.norm(model.language.hidden(model.embed(torch.tensor([[120]]))))
    model.language.head.weight.data[Bytes().end] = hidden[0, -1].detach()
    assert model.answer(("x",), 4) == ""
    model.language.head.weight.data[config.image_token] = 2 * hidden[0, -1].detach()
    assert "\x00" not in model.answer(("x",), 1) and model.answer(("x",), 1) == ""


def test_an_answer_ends_at_the_end_token(monkeypatch):
    """What would come after it is never asked for; rows that end first wait for the last."""
    model = kimi_vl(WHOLE["tiny"]).eval()
    end = Bytes().end
    said = iter(torch.tensor([[97, end, 98, 98], [99, 260, 99, end], [255, 98, end, 98]]).T)

    def logits(hidden):
        assert not torch.is_grad_enabled()
        return F.one_hot(next(said), 263).float()[:, None]

    monkeypatch.setattr(model.language, "logits", logits)
    assert model.answers([("x",), ("y",), ("z",)], 9) == ["a", "cc", "\N{REPLACEMENT CHARACTER}b"]
    assert next(said, None) is None


def test_answers_take_the_options_of_generation(config):
    model = stir(kimi_vl(config)).float().eval()
    prompt = ("read ", picture(config, (1, 2)))

    def drawn(seed, **options):
        generator = torch.Generator().manual_seed(seed)
        return model.answer(prompt, 8, temperature=3.0, generator=generator, **options)

    assert drawn(0) == drawn(0) != drawn(1)
    assert drawn(0, top_k=1) == drawn(1, top_k=1) == model.answer(prompt, 8)
    graphs = []  # which nobody needs: not of the encoder either
    model.projector.register_forward_hook(lambda *_: graphs.append(torch.is_grad_enabled()))
    model.answer(prompt, 1)
    assert graphs == [False]


def test_pictures_are_embedded_under_autocast_and_in_half_precision(config):
    model = stir(kimi_vl(config)).float()
    batch = collate(mixed(config), config.image_token, config.vision.merge)
    want = model.embed(batch.tokens, batch.patches, batch.grids)
    with torch.autocast("cpu", torch.bfloat16):
        mixed_types = model.embed(batch.tokens, batch.patches, batch.grids)
    mixed_types.square().mean().backward()
    assert all(weight.grad.isfinite().all() for weight in model.vision.parameters())
    half = model.bfloat16()
    low = half.embed(batch.tokens, batch.patches.bfloat16(), batch.grids)
    assert mixed_types.dtype == torch.float32 and low.dtype == torch.bfloat16
    for got in (mixed_types, low):
        assert (got.float() - want).norm() <= 0.05 * want.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_pictures_come_to_the_type_of_the_weights(dtype, monkeypatch):
    turned = set()

    def watched(x, cos, sin):
        turned.add((x.dtype, cos.dtype, sin.dtype))
        return rotate(x, cos, sin)

    monkeypatch.setattr(moonvit, "rotate", watched)
    model = kimi_vl(tiny()).to(dtype).eval()
    made = preprocess(np.full((9, 20), 255, np.uint8), model.vision.config)
    got = model.vision(made.patches, [made.grid])
    assert got.dtype == dtype
    assert torch.equal(got, model.vision(made.patches.to(dtype), [made.grid]))
    angles = torch.promote_types(dtype, torch.float32)  # in single precision or better
    assert turned == {(dtype, angles, angles)}
    one = Sample(("what? ", made), "1")
    assert model.answer(one.prompt, 3) == model.answers([one.prompt] * 2, 3)[1]
    assert right(model, [one]).shape == (1,) and occlusion(model, one).shape == (1, 4, 6)


def test_any_decoder_of_the_ground_floor_is_a_language_model():
    plain = Decoder(PlainConfig(300, 16, 1, 2))
    model = KimiVL(SMALL, plain, 299)
    made = preprocess(np.zeros((4, 8, 3), np.uint8), SMALL)
    assert model.answer((made, "x"), 2) == model.answer((made, "x"), 2)
    loss = model(torch.tensor([[299, 299, 5]]), made.patches, [made.grid]).sum()
    loss.backward()
    assert all(w.grad is not None for w in model.parameters())


def test_batches_say_what_is_predicted():
    config = WHOLE["tiny"]
    samples = [Sample(("ab", picture(config, (1, 2))), "c"), Sample(("z",), "")]
    batch = collate(samples, 260)
    end = Bytes().end
    assert batch.tokens.tolist() == [[97, 98, 260, 260, 99], [122, end, end, end, end]]
    assert batch.labels.tolist() == [[-100, -100, -100, 99, end], [end, -100, -100, -100, -100]]
    assert batch.grids == [(2, 4)] and batch.patches.shape == (8, 12)
    moved = batch.to(torch.device("meta"))
    assert moved.tokens.is_meta and moved.labels.is_meta and moved.patches.is_meta
    assert collate([Sample(("z",), "")], 260).to(torch.device("meta")).patches is None
    assert samples[0].pictures == [samples[0].prompt[1]] and samples[1].pictures == []


def test_bad_input_of_the_model_is_refused():
    config = WHOLE["tiny"]
    model = kimi_vl(config)
    made = picture(config, (1, 2))
    for row, count in (([1, 2], 0), ([260, 1], 1), ([260, 260, 260], 3)):
        with pytest.raises(ValueError, match=f"2 embeddings for {count} image tokens"):
            model(torch.tensor([row]), made.patches, [made.grid])
    with pytest.raises(ValueError, match="0 embeddings for 1 image"):
        model(torch.tensor([[260]]))
    with pytest.raises(ValueError, match="come together"):
        model(torch.tensor([[260]]), None, [(2, 2)])
    with pytest.raises(ValueError, match="come together"):
        model(torch.tensor([[260]]), made.patches)
    for token in (0, 256):
        with pytest.raises(ValueError, match="from 257 on"):
            prompt_tokens(("x",), token)
    for prompt in ((), ("",)):
        with pytest.raises(ValueError, match="one token or more"):
            prompt_tokens(prompt, 257)
    with pytest.raises((TypeError, Exception), match="int|texts and pictures"):
        prompt_tokens((3,), 257)
    for token in (263, -1):
        with pytest.raises(ValueError, match="one of 263 tokens"):
            replace(config, image_token=token)
    with pytest.raises(ValueError, match="at least one sequence"):
        collate([], 257)


# What is read

PLAIN_TASK = Task(glyphs(True), (12, 40), (12, 50), digits=(1, 3))


def test_training_and_test_digits_are_disjoint_and_all_are_there():
    from noise2tokens.images import digits

    both = [glyphs(True), glyphs(False)]
    assert [len(part.labels) for part in both] == [TRAINING, 1797 - TRAINING]
    seen = [{image.tobytes() for image in part.images} for part in both]
    assert not seen[0] & seen[1]
    images, labels = digits()
    ours = sorted(
        (int(label), image.tobytes())
        for part in both
        for image, label in zip(part.images, part.labels, strict=True)
    )
    theirs = (images * (255 / 16)).round().byte().numpy()
    want = sorted((int(x), image.tobytes()) for image, x in zip(theirs, labels, strict=True))
    assert ours == want
    assert both[0].images.max() == 255 and both[0].side == 8


def test_mnist_digits_are_its_two_sets(monkeypatch):
    asked = []

    def mnist(train):
        asked.append(train)
        return torch.full((2, 28, 28), 3 + train, dtype=torch.uint8), torch.tensor([1, 2])

    monkeypatch.setattr("noise2tokens.kimi_vl.reading.mnist", mnist)
    assert mnist_glyphs(True).images.max() == 4 and mnist_glyphs(False).images.max() == 3
    assert asked == [True, False] and mnist_glyphs(True).side == 28


def numbered(side=3):
    """Ten digits whose pixels say which they are: 10 to 19."""
    labels = np.arange(10)
    images = (10 + labels)[:, None, None].repeat(side, 1).repeat(side, 2).astype(np.uint8)
    return Glyphs(images, labels)


def in_reading_order(canvas, side, room):
    """Read such a canvas without a model: digits in the order of their cells, wherever the cells begin."""
    left = canvas.copy()
    places = []
    while left.any():
        y, x = np.argwhere(left)[0]
        places.append((y, x, int(left[y, x]) - 10))
        assert (left[y : y + side, x : x + side] == left[y, x]).all()
        left[y : y + side, x : x + side] = 0
    places.sort()
    lines, rest = [], places
    while rest:  # a line is what begins less than a cell below its highest digit
        line = [p for p in rest if p[0] <= rest[0][0] + room]
        lines.append(sorted(line, key=lambda p: p[1]))
        rest = [p for p in rest if p not in line]
    return "".join(str(p[2]) for line in lines for p in line)


@pytest.mark.parametrize(("room", "step"), [(0, 1), (2, 1), (2, 2), (3, 1)])
def test_canvases_show_the_answer(room, step):
    task = Task(numbered(4), (8, 30), (8, 40), digits=(1, 4), room=room, step=step)
    generator = Random(0)
    drawn = [task.draw(generator) for _ in range(300)]
    for canvas, question, answer in drawn:
        assert canvas.dtype == np.uint8 and question == QUESTIONS[0]
        assert 8 <= canvas.shape[0] <= 30 and 8 <= canvas.shape[1] <= 40
        assert (canvas > 0).sum() == 16 * len(answer)
        assert in_reading_order(canvas, 4, room) == answer
        if step == 2:
            assert all(place % 2 == 0 for place in np.argwhere(canvas)[0])
    assert {len(answer) for _, _, answer in drawn} == {1, 2, 3, 4}
    assert {canvas.shape[0] for canvas, _, _ in drawn} == set(range(8, 31))
    assert len({answer for _, _, answer in drawn}) > 100


@pytest.mark.parametrize(
    ("side", "room", "step", "want"),
    [
        (6, 2, 1, {0, 1, 2}),  # one cell, which is the canvas
        (7, 0, 1, {0, 1, 2, 3}),  # one cell without room, somewhere on the canvas
        (9, 5, 2, {0, 2, 4}),
        (12, 2, 3, {0, 6}),  # two cells a side, with less room than a step
    ],
)
def test_digits_stand_at_every_place_that_there_is(side, room, step, want):
    task = Task(numbered(4), (side, side), (side, side), digits=(1, 1), room=room, step=step)
    generator = Random(0)
    found = {tuple(np.argwhere(task.draw(generator)[0])[0].tolist()) for _ in range(400)}
    assert found == set(itertools.product(want, want))
    shown = {task.draw(generator)[2] for _ in range(400)}
    assert shown == set("0123456789")


def test_small_canvases_hold_fewer_digits():
    task = Task(numbered(), (3, 3), (3, 8), digits=(2, 5), room=0)
    drawn = [task.draw(Random(seed)) for seed in range(50)]
    assert {len(answer) for _, _, answer in drawn} == {1, 2}
    assert all(len(answer) == min(2, canvas.shape[1] // 3) for canvas, _, answer in drawn)


def test_counts_are_asked_about_digits_that_are_there_and_others():
    task = replace(PLAIN_TASK, glyphs=numbered(8), digits=(3, 3), questions=QUESTIONS[1:])
    drawn = [task.draw(Random(seed)) for seed in range(200)]
    first, absent = [], set()
    for canvas, question, answer in drawn:
        digit = int(question.removeprefix("how many ")[0])
        assert question == f"how many {digit}s? "
        assert int(answer) == (canvas == 10 + digit).sum() // 64
        first.append(in_reading_order(canvas, 8, task.room).find(str(digit)))
        absent |= {digit} if answer == "0" else set()
    share = np.mean([answer != "0" for _, _, answer in drawn])
    assert 0.5 < share < 0.75  # half of them, and a quarter of the others
    assert absent == set(range(10))
    assert min(first.count(place) for place in range(3)) > 20  # none of the three is preferred
    both = replace(task, questions=QUESTIONS)
    assert len({both.draw(Random(seed))[1][:4] for seed in range(20)}) == 2


def test_the_same_seed_draws_the_same():
    one, two, other = (PLAIN_TASK.draw(Random(seed)) for seed in (3, 3, 4))
    assert np.array_equal(one[0], two[0]) and one[1:] == two[1:]
    assert one[0].shape != other[0].shape or not np.array_equal(one[0], other[0])


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (dict(heights=(9, 20)), "heights must rise from 12"),
        (dict(widths=(30, 20)), "widths must rise"),
        (dict(digits=(0, 2)), "digits must rise from 1"),
        (dict(digits=(3, 2)), "digits must rise"),
        (dict(room=-1), "room >= 0"),
        (dict(step=0), "step >= 1"),
        (dict(questions=()), "questions out of"),
        (dict(questions=("why?",)), "questions out of"),
    ],
)
def test_tasks_that_make_no_sense_are_refused(bad, words):
    with pytest.raises(ValueError, match=words):
        replace(PLAIN_TASK, **bad)


def test_parameters_are_divided_by_kind():
    model = kimi_vl(tiny())
    muon, rest = split_parameters(model, ("embedding", "head", "table"))
    assert muon["muon"] and not rest["muon"]
    names = {id(p): name for name, p in model.named_parameters()}
    there = {names[id(p)] for p in muon["params"]}
    assert not any("embedding" in n or "head" in n or "table" in n or "norm" in n for n in there)
    assert "vision.blocks.0.attention.qkv.weight" in there and "projector.out.weight" in there
    assert "language.blocks.1.feed_forward.experts.up" in there
    assert len(muon["params"]) + len(rest["params"]) == len(names)


# The experiment


QUICK = Task(glyphs(True), (8, 8), (8, 8), room=0, digits=(1, 1))


@pytest.fixture(scope="module")
def reader():
    """A model that reads one digit on a canvas of eight pixels, after twenty seconds less."""
    return train(tiny(), direct(QUICK), seed=0, steps=40, batch=32)


def test_a_model_learns_to_read_digits_that_it_has_not_seen(reader):
    model, history = reader
    drawn = samples(held_out(QUICK, glyphs(False)), model.vision.config, 200, seed=1)
    assert share_right(model, drawn) >= 0.8
    assert not model.training and history.losses[-1] < 0.5
    blank = kimi_vl(tiny()).eval()
    assert share_right(blank, drawn) <= 0.2


def test_right_is_what_generation_says(reader):
    model, _ = reader
    task = Task(glyphs(False), (8, 8), (8, 20), digits=(1, 2), room=0)
    drawn = samples(task, model.vision.config, 60, seed=3)
    said = model.answers([one.prompt for one in drawn], 8)
    want = [a == one.answer for a, one in zip(said, drawn, strict=True)]
    assert right(model, drawn, batch=7).tolist() == want
    assert 0.1 < np.mean(want) < 0.9
    assert share_right(model, drawn) == np.mean(want)


def test_every_byte_of_an_answer_counts_and_so_does_its_end(monkeypatch):
    model = kimi_vl(tiny()).eval()
    for said, want in (([0, 256], True), ([1, 256], False), ([0, 0], False)):
        logits = F.one_hot(torch.tensor([said]), 258).float()
        monkeypatch.setattr(model, "forward", lambda *_, logits=logits: logits)
        assert right(model, [Sample(("x",), "\0")]).tolist() == [want]
    for function in (right, share_right):
        with pytest.raises(ValueError, match="one sample or more"):
            function(model, [])


def test_experts_are_balanced_while_it_trains():
    model, _ = train(tiny(16, 32, 1, 2), direct(QUICK), seed=0, steps=3, batch=4)
    (bias,) = (b for name, b in model.named_buffers() if name.endswith("bias"))
    assert 0.01 - 1e-6 <= bias.abs().max() <= 0.03 + 1e-6  # three steps of 0.01 at most


@pytest.mark.parametrize("muon", [True, False])
def test_optimizer_is_the_one_that_was_asked_for(monkeypatch, muon):
    made, real = [], experiment.Muon

    def watched(groups, **options):
        made.append(([dict(group) for group in groups], options))
        return real(groups, **options)

    monkeypatch.setattr(experiment, "Muon", watched)
    options = dict(seed=0, steps=1, batch=1, muon=muon, rates=(0.02, 0.03))
    model, _ = train(tiny(16, 32, 1, 2), direct(QUICK), **options)
    ((groups, _),) = made
    hidden, other = groups
    assert (hidden["lr"], other["lr"]) == (0.02, 0.03)
    assert all(p.dim() > 1 for p in hidden["params"])
    there = {id(p) for group in groups if group["muon"] for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in there}
    assert bool(names) == muon
    for part in ("embedding", "head", "table", "norm"):
        assert not any(part in name for name in names)


def test_training_is_decided_by_its_seed():
    small = tiny(16, 32, 1, 1)
    kwargs = dict(steps=2, batch=2)
    runs = [train(small, direct(QUICK), seed=seed, **kwargs) for seed in (0, 0, 1)]
    assert runs[0][1].losses == runs[1][1].losses != runs[2][1].losses
    adam = train(small, direct(QUICK), seed=0, muon=False, **kwargs)
    assert adam[1].losses[0] == runs[0][1].losses[0] and adam[1].losses[1] != runs[0][1].losses[1]
    square = train(small, direct(QUICK), seed=0, square=16, **kwargs)
    assert square[1].losses[0] != runs[0][1].losses[0]
    for shares in ((), (0.5,), (1.5, -0.5)):
        with pytest.raises(ValueError, match="0 or more and add up to 1"):
            train(small, [Stage(QUICK, share) for share in shares], seed=0, **kwargs)


def test_stages_follow_one_another():
    stages = curriculum(PLAIN_TASK)
    assert sum(stage.share for stage in stages) == 1
    alone, somewhere, target = (stage.task for stage in stages)
    assert target is PLAIN_TASK and direct(PLAIN_TASK) == [Stage(PLAIN_TASK, 1)]
    canvas, _, answer = alone.draw(Random(0))
    assert canvas.shape == (8, 8) and len(answer) == 1
    assert somewhere.heights == somewhere.widths == (12, 24) and somewhere.digits == (1, 1)
    shares = [i / 100 for i in range(100)]
    found = [stages.index(stage_at(stages, share)) for share in shares]
    assert found == [0] * 10 + [1] * 25 + [2] * 65
    # 0.1 + 0.2 is a little more than 0.3, which begins the third all the same
    tenths = [Stage(PLAIN_TASK, 0.1), Stage(PLAIN_TASK, 0.2), Stage(QUICK, 0.7)]
    assert stage_at(tenths, 0.3) is tenths[2] and stage_at(tenths, 1.0) is tenths[2]


def test_training_goes_through_the_stages(monkeypatch):
    drawn = []
    real = experiment.sample

    def watched(task, *args):
        drawn.append(task)
        return real(task, *args)

    monkeypatch.setattr(experiment, "sample", watched)
    stages = curriculum(QUICK)
    train(tiny(16, 32, 1, 1), stages, seed=0, steps=20, batch=2)
    want = [stages[0].task] * 4 + [stages[1].task] * 10 + [stages[2].task] * 26
    assert drawn == want


def test_a_training_draws_its_samples_by_its_seed(monkeypatch):
    answers, real = [], experiment.sample

    def watched(*args):
        answers.append((one := real(*args)).answer)
        return one

    monkeypatch.setattr(experiment, "sample", watched)
    for seed in (0, 1):
        train(tiny(16, 32, 1, 1), direct(QUICK), seed=seed, steps=2, batch=10)
    assert answers[:20] != answers[20:]


def test_samples_ask_first_and_show_then():
    config = tiny().vision
    one = sample(PLAIN_TASK, config, Random(5))
    canvas, question, answer = PLAIN_TASK.draw(Random(5))
    assert one.prompt[0] == question and one.answer == answer
    assert torch.equal(one.prompt[1].patches, preprocess(canvas, config).patches)
    squared = sample(PLAIN_TASK, config, Random(5), 24)
    assert squared.prompt[1].grid == (6, 6) and squared.answer == answer
    want = preprocess(to_square(canvas, 24, 1), config).patches
    assert torch.equal(squared.prompt[1].patches, want)
    many = samples(PLAIN_TASK, config, 3, seed=5)
    assert many[0].answer == answer and len(many) == 3


def test_sizes_are_what_is_asked_for(reader, monkeypatch):
    model, _ = reader
    seen = []

    def watched(model, drawn):
        seen.append({one.prompt[1].content for one in drawn})
        return 0.5

    monkeypatch.setattr(experiment, "share_right", watched)
    found = by_size(model, PLAIN_TASK, [(12, 40), (33, 12)], n=5, seed=0)
    assert found == {"12 x 40": 0.5, "33 x 12": 0.5}
    assert seen == [{(12, 40)}, {(33, 12)}]
    by_size(model, PLAIN_TASK, [(12, 40)], n=5, seed=0, square=16)
    assert seen[2] == {(16, 16)}


def test_squares_cost_about_as_many_tokens():
    config = tiny().vision
    (low, high), mean = equal_squares(PLAIN_TASK, config)
    drawn = samples(PLAIN_TASK, config, 2000, seed=7)
    assert abs(np.mean([one.prompt[1].tokens() for one in drawn]) / mean - 1) < 0.03
    assert high == low + 8 and (low / 8) ** 2 <= mean <= (high / 8) ** 2
    alone = replace(PLAIN_TASK, heights=(16, 16), widths=(16, 16))
    assert equal_squares(alone, config) == ([16], 4)


def test_a_picture_of_your_own_is_read(reader, tmp_path):
    model, _ = reader
    images, labels = glyphs(False).images[:40], glyphs(False).labels[:40]
    said = [read(model, image) for image in images]
    want = [str(label) for label in labels]
    assert np.mean([a == b for a, b in zip(said, want, strict=True)]) >= 0.75
    # dark on bright paper, in color, enlarged, in a file
    for i in range(6):
        large = np.kron(255 - images[i], np.ones((5, 5), np.uint8))
        path = tmp_path / "own.png"
        Image.fromarray(large).convert("RGB").save(path)
        small = np.asarray(Image.fromarray(large).resize((8, 8), Image.Resampling.BICUBIC))
        assert read(model, path, digit=40) == read(model, 255 - small)
    assert read(model, images[0], square=8) == said[0]
    with pytest.raises(ValueError, match="one pixel or more"):
        read(model, images[0], digit=0)


def test_what_the_model_is_shown_of_a_picture_of_your_own(monkeypatch):
    model = kimi_vl(tiny()).eval()
    config, seen = model.vision.config, []
    monkeypatch.setattr(model, "answer", lambda prompt, n: seen.append(prompt) or "")

    def shown(*args, **options):
        read(model, *args, **options)
        return seen[-1][1]

    wide = np.random.default_rng(0).integers(0, 100, (10, 30), np.uint8)
    squared = shown(wide, "how many 3s? ", square=16)
    assert seen[-1][0] == "how many 3s? "
    assert torch.equal(squared.patches, preprocess(to_square(wide, 16, 1), config).patches)
    assert torch.equal(shown(wide).patches, preprocess(wide, config).patches)
    assert seen[-1][0] == QUESTIONS[0]
    assert shown(np.zeros((60, 200), np.uint8), digit=40).content == (12, 40)
    assert shown(np.zeros((1, 200), np.uint8), digit=40).content == (1, 40)
    # only paper is turned: what most pixels are
    paper = np.full((8, 8), 255, np.uint8)
    paper[:3] = 0
    assert torch.equal(shown(paper).patches, preprocess(255 - paper, config).patches)
    assert torch.equal(shown(255 - paper).patches, preprocess(255 - paper, config).patches)
    dim = np.full((8, 8), 100, np.uint8)
    dim[:3] = 255  # most are dark, though the mean is bright
    assert torch.equal(shown(dim).patches, preprocess(dim, config).patches)


def test_occlusion_says_where_the_answer_comes_from(reader):
    model, _ = reader
    task = Task(glyphs(False), (8, 8), (8, 16), room=0, digits=(1, 1))
    drawn = samples(task, model.vision.config, 8, seed=0)
    one = next(s for s in drawn if s.prompt[1].grid == (2, 4))
    found = occlusion(model, one)
    assert found.shape == (1, 2, 4)
    # by hand, for one patch
    patches = one.prompt[1].patches.clone()
    patches[5] = -1
    covered = Sample((one.prompt[0], replace(one.prompt[1], patches=patches)), one.answer)

    def log_probability(s):
        batch = collated(model, [s])
        with torch.no_grad():
            logits = model(batch.tokens, batch.patches, batch.grids)[0]
        place = int((batch.labels[0] >= 0).nonzero()[0])
        return logits[place].log_softmax(-1)[batch.labels[0, place]]

    want = log_probability(one) - log_probability(covered)
    assert abs(found[0, 1, 1] - want) <= 1e-5
    black = (one.prompt[1].patches == -1).all(1).unflatten(0, (2, 4))
    assert black.any() and found[0][black].abs().max() <= 1e-5
    for bad in (Sample(("x",), "1"), Sample(one.prompt, "")):
        with pytest.raises(ValueError, match="one picture and an answer"):
            occlusion(model, bad)


def test_occlusion_is_that_of_each_byte_by_each_patch():
    model = stir(kimi_vl(tiny())).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (8, 16), np.uint8)
    made = preprocess(pixels, model.vision.config)
    prompt, answer = [*b"x", 257, 257, *b"y"], b"ab\0"

    @torch.no_grad()
    def log_probabilities(patches):
        tokens = torch.tensor([[*prompt, *answer]])
        logits = model(tokens, patches, [made.grid])[0, len(prompt) - 1 : -1]
        return logits.log_softmax(-1)[range(3), list(answer)]

    found = occlusion(model, Sample(("x", made, "y"), answer.decode()))
    assert found.shape == (3, 2, 4) and found.abs().amax((1, 2)).min() > 0.01
    for i in range(8):
        covered = made.patches.clone()
        covered[i] = -1
        want = log_probabilities(made.patches) - log_probabilities(covered)
        assert (found[:, i // 4, i % 4] - want).abs().max() <= 1e-12


def test_ways_differ_in_optimizer_and_stages_alone(monkeypatch):
    seen = []

    def watched(config, stages, **options):
        seen.append((len(stages), options))
        model = kimi_vl(config).eval()
        model.number = len(seen)
        return model, None

    monkeypatch.setattr(experiment, "train", watched)
    tested = []
    monkeypatch.setattr(
        experiment, "share_right", lambda model, drawn: tested.append(drawn) or float(len(tested))
    )
    test = held_out(QUICK, glyphs(False))
    rates = {"Muon": (0.02, 0.01), "AdamW": (0.004, 0.003)}
    found = compare_ways(QUICK, test, tiny(), (3, 4), rates=rates, steps=5, batch=6, n=7)
    assert found == {name: [i + 1.0, i + 5.0] for i, name in enumerate(WAYS)}
    assert [length for length, _ in seen] == [3, 1, 3, 1] * 2
    assert [options["muon"] for _, options in seen] == [True, True, False, False] * 2
    assert [options["seed"] for _, options in seen] == [3] * 4 + [4] * 4
    for _, options in seen:
        assert options["steps"] == 5 and options["batch"] == 6
        assert options["rates"] == rates["Muon" if options["muon"] else "AdamW"]
    pictures = {image.tobytes() for image in glyphs(False).images}
    shown = (((one.prompt[1].patches + 1) * 127.5).round().byte() for one in tested[0])
    for patches in shown:
        picture = patches.view(2, 2, 4, 4).transpose(1, 2).reshape(8, 8).numpy()
        assert picture.tobytes() in pictures  # of the test
    for i, drawn in enumerate(tested):
        want = samples(test, tiny().vision, 7, seed=4 + i // 4)  # not the seed of the training
        assert [one.answer for one in drawn] == [one.answer for one in want]


def test_rates_are_tried_on_the_target_alone_and_with_each_seed(monkeypatch):
    seen = []

    def watched(config, stages, **options):
        seen.append((stages, options["muon"], options["rates"], options["seed"]))
        return len(seen), None

    monkeypatch.setattr(experiment, "train", watched)
    monkeypatch.setattr(experiment, "share_right", lambda model, drawn: float(model))
    one, other, third = (0.1, 0.2), (0.1, 0.3), (0.3, 0.3)
    rates = {"Muon": (one, other), "AdamW": (third,)}
    found = tune(QUICK, QUICK, tiny(), (5, 6), rates, steps=1, batch=1, n=1)
    assert found == {"Muon": {one: 1.5, other: 3.5}, "AdamW": {third: 5.5}}
    settings = [(True, one), (True, other), (False, third)]
    assert seen == [(direct(QUICK), *setting, seed) for setting in settings for seed in (5, 6)]


def test_stages_to_digits_anywhere():
    target = small_target()
    grid, any_pixel = anywhere(target)
    assert grid.task == target and any_pixel.task == replace(target, step=1)
    assert grid.share + any_pixel.share == 1 and grid.share < any_pixel.share


def test_resolution_is_compared_at_equal_steps(monkeypatch):
    seen, tested = [], []

    def watched(config, stages, **options):
        assert stages == curriculum(PLAIN_TASK)
        seen.append(options)
        return kimi_vl(config).eval(), len(seen)

    monkeypatch.setattr(experiment, "train", watched)

    def share(model, drawn):
        tested.append(drawn)
        return float(len(tested))

    monkeypatch.setattr(experiment, "share_right", share)
    test = held_out(PLAIN_TASK, numbered(8))
    sizes = [(12, 30), (50, 12)]
    found, models = compare_resolution(
        PLAIN_TASK, test, tiny(), (3, 4), sizes, steps=5, batch=6, n=7
    )
    sides, mean = equal_squares(PLAIN_TASK, tiny().vision)
    assert [options.pop("square") for options in seen] == [None, *sides] * 2
    assert [options.pop("seed") for options in seen] == [3] * 3 + [4] * 3
    assert all(options == dict(steps=5, batch=6, device=None) for options in seen)
    low, high = (f"square of {(side // 8) ** 2} tokens" for side in sides)
    assert found["exact"] == {"native": [1, 10], low: [4, 13], high: [7, 16]}
    assert found["by size"]["native"] == {"12 x 30": [2, 11], "50 x 12": [3, 12]}
    assert found["by size"][low] == {"12 x 30": [5, 14], "50 x 12": [6, 15]}
    assert found["by size"][high] == {"12 x 30": [8, 17], "50 x 12": [9, 18]}
    low_tokens, high_tokens = ((side // 8) ** 2 for side in sides)
    assert found["tokens"] == {"native": mean, low: low_tokens, high: high_tokens}
    assert set(models) == {"native", low, high}
    grids = [{one.prompt[1].grid for one in drawn} for drawn in tested]
    assert grids[1] == {(4, 8)} and grids[2] == {(14, 4)}
    for i, side in zip((3, 6), sides, strict=True):
        assert all(g == {(side // 4, side // 4)} for g in grids[i : i + 3])
    # digits of the test alone, which are dark; and drawn by another seed than the training's
    assert all(one.prompt[1].patches.max() < 30 / 127.5 - 1 for drawn in tested for one in drawn)
    wide, tall = (replace(test, heights=(h, h), widths=(w, w)) for h, w in sizes)
    kinds = [(test, 1), (wide, 2), (tall, 2)] * 3
    for drawn, (task, more), seed in zip(tested, kinds * 2, [3] * 9 + [4] * 9, strict=True):
        want = samples(task, tiny().vision, 7, seed=seed + more)
        assert [one.answer for one in drawn] == [one.answer for one in want]


def test_dots_stand_by_their_names():
    ways, sizes = Figure().subplots(), Figure().subplots()

    def dots(ax):
        return [(list(line.get_xdata()), list(line.get_ydata())) for line in ax.lines]

    draw_ways(ways, {"a": [0.1, 0.2], "b": [0.5]})
    assert dots(ways) == [([0.1, 0.2], [0, 0]), ([0.5], [1])]
    assert [text.get_text() for text in ways.get_yticklabels()] == ["a", "b"]
    native, square = {"1 x 2": [0.3], "3 x 4": [0.4, 0.5]}, {"1 x 2": [0.1], "3 x 4": [0.6]}
    draw_sizes(sizes, {"native": native, "square": square})
    want = [([0], [0.3]), ([1, 1], [0.4, 0.5]), ([0.2], [0.1]), ([1.2], [0.6])]
    assert dots(sizes) == want
    assert [text.get_text() for text in sizes.get_xticklabels()] == ["1 x 2", "3 x 4"]
    assert [text.get_text() for text in sizes.get_legend().get_texts()] == ["native", "square"]


def test_gallery_says_what_was_read_and_what_was_right(monkeypatch):
    monkeypatch.setattr(experiment, "read", lambda model, canvas, question: "7")
    figure = Figure()
    draw_gallery(figure, kimi_vl(tiny()), QUICK, 3)
    generator = Random(3)
    for ax in figure.axes:
        canvas, _, answer = QUICK.draw(generator)
        assert np.array_equal(ax.images[0].get_array(), canvas)
        assert ax.get_title() == ("7" if answer == "7" else f"7, not {answer}")
    titles = [ax.get_title() for ax in figure.axes]
    assert len(titles) == 12 and "7" in titles and len(set(titles)) > 3


def test_small_target_is_two_digits_on_a_patch_grid():
    task, test = small_target(), small_target(False)
    assert replace(test, glyphs=task.glyphs) == task
    assert len(task.glyphs.labels) == TRAINING and len(test.glyphs.labels) == 1797 - TRAINING
    assert {len(task.draw(Random(seed))[2]) for seed in range(50)} == {2}
    assert task.step == tiny().vision.patch


def test_full_scale_uses_its_budget(monkeypatch, fake_mnist):
    from noise2tokens.kimi_vl import reading

    fake_mnist(reading)
    sizes = dict(BUDGETS["long"]) | dict(
        seeds=2, steps=1, batch=2, mnist_steps=2, mnist_batch=1, width=32, layers=1, n=3,
        rates={"Muon": ((0.01, 0.01), (0.02, 0.01)), "AdamW": ((0.003, 0.001),)}, reader_steps=3,
    )  # fmt: skip
    seen, tested, trained, shown = [], [], [], []
    real, real_samples, draw = experiment.train, experiment.samples, experiment.draw_gallery

    def watched(config, stages, **options):
        seen.append((config, stages[-1].task, options))
        trained.append(real(config, stages, **options))
        return trained[-1]

    def watched_samples(task, *args, **options):
        tested.append((task, args[1]))
        return real_samples(task, *args, **options)

    def watched_draw(figure, model, task, seed):
        shown.append((model, task))
        draw(figure, model, task, seed)

    monkeypatch.setattr(experiment, "train", watched)
    monkeypatch.setattr(experiment, "samples", watched_samples)
    monkeypatch.setattr(experiment, "draw_gallery", watched_draw)
    results, pictures = full_scale(torch.device("cpu"), seed=5, **sizes)
    assert set(results["ways"]) == set(WAYS)
    assert all(len(values) == 2 for values in results["ways"].values())
    assert len(pictures) == 4
    budget = [(options["steps"], options["batch"]) for _, _, options in seen]
    assert budget == [(1, 2)] * 11 + [(3, 2)] + [(2, 1)] * 6  # rates, ways, reader, MNIST
    seeds = [options["seed"] for _, _, options in seen]
    assert seeds == [7] * 3 + [5] * 4 + [6] * 4 + [5] + [5] * 3 + [6] * 3
    rates = {optimizer: max(found, key=found.get) for optimizer, found in results["rates"].items()}
    assert set(results["rates"]["Muon"]) == {"0.01, 0.01", "0.02, 0.01"}
    for _, _, options in seen[3:11]:
        best = rates["Muon" if options["muon"] else "AdamW"]
        assert options["rates"] == tuple(map(float, best.split(", ")))
    assert (seen[11][1].step, seen[11][1].digits) == (1, (2, 2))
    assert set(results["reader"]) == {"anywhere", "on the grid"}
    for config, task, _ in seen[12:]:
        assert config.vision.patch == 14 and config.vision.width == 32
        assert config.vision.layers == config.language.layers == 1
        assert task.glyphs.side == 28 and task.step == 1 and task.digits == (1, 2)
        assert task.room == 14
    # digits that no training has seen
    assert [len(task.glyphs.labels) for task, _ in tested] == [1797 - TRAINING] * 13 + [397] * 42
    assert {len(task.glyphs.labels) for _, task, _ in seen[12:]} == {1400}
    assert {n for _, n in tested} == {3}
    assert [(model, len(task.glyphs.labels), task.step) for model, task in shown] == [
        (trained[11][0], 1797 - TRAINING, 1),
        (trained[-3][0], 397, 1),
    ]
    assert set(results["by size"]["native"]) == {
        "84 x 84",
        "112 x 112",
        "42 x 112",
        "112 x 42",
        "42 x 160",
        "160 x 42",
    }
    import matplotlib.pyplot as plt

    plt.close("all")
    assert inspect.signature(full_scale).parameters.keys() == {"device", "seed", *sizes}
