"""DeepSeek-V3 assembled is that of transformers; counts are the published ones; drafting changes no token."""

import inspect
import itertools
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.modeling_layers import MtpModel

from noise2tokens.benchmark import Timing
from noise2tokens.deepseek_v3 import experiment, mtp, parallel
from noise2tokens.deepseek_v3.config import LATENT_EPS, MOONLIGHT, V2, V3, Config, tiny
from noise2tokens.deepseek_v3.count import (
    attention_parameters,
    checkpoint_numbers,
    count_parameters,
    eight_bit_matrices,
    prediction_flops,
    prediction_parameters,
    routing_biases,
    stored_numbers,
    training_flops,
)
from noise2tokens.deepseek_v3.experiment import (
    BUDGETS,
    acceptance,
    code,
    compare_prediction,
    drafting,
    equal_steps,
    full_scale,
    held_out_bits,
    pair_acceptance,
    prediction_weight,
)
from noise2tokens.deepseek_v3.model import decoder, from_checkpoint, to_checkpoint
from noise2tokens.deepseek_v3.mtp import (
    MultiToken,
    agreement,
    expected_tokens,
    model_from_checkpoint,
    model_to_checkpoint,
    prediction_loss,
    speculate,
)
from noise2tokens.deepseek_v3.pipeline import (
    METHODS,
    STAGES,
    Durations,
    Piece,
    activations,
    bubble,
    compare_methods,
    draw,
    dualpipe,
    one_forward_one_backward,
    simulate,
    zero_bubble,
)
from noise2tokens.mla.attention import Sizes
from noise2tokens.moe.balancing import Balancing
from noise2tokens.moe.experts import looped
from noise2tokens.moe.layer import MoEConfig, auxiliary_loss, balance, mixtures
from noise2tokens.text import Bytes, corpus, split_files, validation_windows, windows
from noise2tokens.training import seed_everything
from noise2tokens.transformer import generate, next_token_loss

ERRORS = (ValueError, TypeError)
PLAIN = Config(
    vocab_size=41,
    width=24,
    layers=3,
    heads=2,
    hidden=20,
    attention=Sizes(10, 6, 4, 5, query_rank=9),
    mixture=MoEConfig(8, 3, 7, shared=1, groups=4, top_groups=2, scale=2.5),
    predictions=2,
    rope_base=100,
)
CONFIGS = {
    "as V3": PLAIN,
    "no latent of queries": replace(PLAIN, attention=Sizes(7, 5, 6, 8), rope_base=10_000),
    "3 of 5 groups of 3": replace(
        PLAIN, mixture=MoEConfig(15, 4, 5, shared=2, groups=5, top_groups=3, scale=1.7)
    ),
    "2 of 3 groups of 2, 2 dense": replace(
        PLAIN, dense=2, mixture=MoEConfig(6, 2, 9, shared=3, groups=3, top_groups=2)
    ),
    "one group, as Moonlight": replace(
        PLAIN, norm_eps=1e-3, mixture=MoEConfig(6, 2, 9, shared=2, scale=2.446)
    ),
    "no dense layer": replace(PLAIN, dense=0, layers=2),
    "all dense": replace(PLAIN, dense=3),
    "YaRN by 4": replace(PLAIN, yarn_factor=4, trained_length=16),
    "YaRN by 40": replace(
        PLAIN,
        yarn_factor=40,
        trained_length=64,
        rope_base=10_000,
        attention=Sizes(10, 6, 8, 5, query_rank=9),
    ),
}


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


@torch.no_grad()
def stir(model, seed=0):
    """Give every number a value far from its first one: norms not 1, biases not 0, maps that keep the scale."""
    torch.manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn_like(weight)
        if weight.dim() == 1:
            weight.copy_(1 + 0.3 * noise)
        elif "embedding" in name:
            weight.copy_(noise)
        else:
            weight.copy_(1.5 * noise / weight.shape[-1] ** 0.5)
    for layer in mixtures(model):
        layer.bias.normal_(std=0.1)
    return model.double()


@contextmanager
def in_float64():
    """Let transformers' code, which names float32 for norms, softmax, router and angles, compute in float64."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float", torch.float64)
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield


def their_config(config, **options):
    sizes, mixture = config.attention, config.mixture
    rope = {"rope_type": "default", "rope_theta": float(config.rope_base)}
    if config.yarn_factor != 1:
        rope |= {"rope_type": "yarn", "factor": float(config.yarn_factor)}
        rope |= {"original_max_position_embeddings": config.trained_length}
        rope |= {"mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32.0, "beta_slow": 1.0}
    return DeepseekV3Config(
        vocab_size=config.vocab_size,
        hidden_size=config.width,
        intermediate_size=config.hidden,
        moe_intermediate_size=mixture.hidden,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        n_shared_experts=mixture.shared,
        n_routed_experts=mixture.experts,
        routed_scaling_factor=float(mixture.scale),
        kv_lora_rank=sizes.kv_rank,
        q_lora_rank=sizes.query_rank,
        qk_rope_head_dim=sizes.rope_dim,
        v_head_dim=sizes.value_dim,
        qk_nope_head_dim=sizes.nope_dim,
        n_group=mixture.groups,
        topk_group=mixture.top_groups,
        num_experts_per_tok=mixture.top_k,
        first_k_dense_replace=config.dense,
        max_position_embeddings=int(config.trained_length * config.yarn_factor),
        rms_norm_eps=float(config.norm_eps),
        rope_parameters=rope,
        attn_implementation="eager",
        experts_implementation="eager",
        eos_token_id=None,
        num_mtp_layers=config.predictions,
        **options,
    )


def peer_of(model, config):
    """transformers' model with our weights, all of it in float64."""
    with in_float64():
        peer = DeepseekV3ForCausalLM(their_config(config)).double().eval()
        peer.load_state_dict(to_checkpoint(model.state_dict(), config))
    assert peer.model.rotary_emb.inv_freq.dtype == torch.float64
    return peer


def test_logits_loss_and_gradients_are_those_of_transformers(config):
    model = stir(decoder(config))
    peer = peer_of(model, config)
    tokens = torch.randint(config.vocab_size, (2, 19))
    with in_float64():
        want = peer(input_ids=tokens, labels=tokens, use_cache=False)
        want.loss.backward()
    got = model(tokens)
    loss = next_token_loss(got[:, :-1], tokens[:, 1:])
    loss.backward()
    assert got.std() > 0.3  # else a comparison says little
    assert (got - want.logits).abs().max() <= 1e-6
    assert (got - want.logits).abs().max() <= 1e-11  # far below it, in fact
    assert abs(loss - want.loss) <= 1e-11
    theirs = {name: p.grad for name, p in peer.named_parameters()}
    biases = {n: b for n, b in peer.named_buffers() if n.endswith("correction_bias")}
    gradients = from_checkpoint(theirs | biases, config)
    for name, parameter in model.named_parameters():
        assert (parameter.grad - gradients[name]).abs().max() <= 1e-10, name


@pytest.mark.parametrize(
    "name",
    [
        "as V3",
        "no latent of queries",
        "3 of 5 groups of 3",
        "one group, as Moonlight",
        "YaRN by 40",
    ],
)
def test_generation_is_that_of_transformers_token_by_token(name):
    config = CONFIGS[name]
    model = stir(decoder(config)).eval()
    peer = peer_of(model, config)
    prompt = torch.randint(config.vocab_size, (2, 7))
    got = generate(model, prompt, 12)
    with in_float64():
        whole = torch.ones_like(prompt)  # no token of it is padding
        want = peer.generate(prompt, attention_mask=whole, max_new_tokens=12, do_sample=False)
    assert len(set(got[:, 7:].flatten().tolist())) > 6  # not the same token again and again
    tokens = prompt
    for _ in range(12):  # without a cache
        with torch.no_grad():
            tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], 1)
    assert torch.equal(got, tokens)
    assert torch.equal(got, want)


@pytest.mark.parametrize("separate", [True, False])
def test_checkpoints_convert_both_ways(config, separate):
    model = stir(decoder(config))
    state = model.state_dict()
    there = to_checkpoint(state, config, separate=separate)
    back = from_checkpoint(there, config)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    if separate and config.dense < config.layers:
        last = f"model.layers.{config.layers - 1}.mlp.experts.{config.mixture.experts - 1}."
        assert there[last + "gate_proj.weight"].shape == (config.mixture.hidden, config.width)
    for name in list(there)[:: 1 if config is PLAIN else 7]:
        with pytest.raises(ERRORS, match="need|missing|unknown"):
            from_checkpoint({n: w for n, w in there.items() if n != name}, config)
    with pytest.raises(ValueError, match="unknown"):
        from_checkpoint(there | {"model.layers.77.mlp.up_proj.weight": there[name]}, config)


def test_latents_norms_keep_their_own_epsilon():
    """Moonlight's norms have 1e-5 and its latents' 1e-6, by a default in the released code."""
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

    config = replace(PLAIN, norm_eps=1e-3)
    peer = DeepseekV3Attention(their_config(config), 0)
    assert peer.kv_a_layernorm.variance_epsilon == LATENT_EPS
    block = decoder(config).blocks[1]
    assert block.attention.kv_norm.eps == block.attention.query_norm.eps == LATENT_EPS
    assert block.attention_norm.eps == block.feed_forward_norm.eps == 1e-3


# Published: DeepSeek-V3's abstract, 671B and 37B; its README_WEIGHTS, 36.6B with the head (first said to be 36.7B with
# both), 11.5B in a module of prediction; 685B on the model hub. DeepSeek-V2's abstract, 236B and 21B. Liu et al. 2025,
# table 5: 15.29B and 2.24B without embedding and head.
def total(config, *, active=False, without=()):
    parts = count_parameters(config, active=active)
    return sum(number for name, number in parts.items() if name not in without)


def test_counts_are_the_published_ones():
    ends = ("embedding", "head")
    assert total(V3) == 671_026_404_352
    assert total(V3) + routing_biases(V3) == 671_026_419_200
    assert routing_biases(V3) == 58 * 256
    assert total(V3, active=True, without=ends) == 35_698_924_544
    assert total(V3, active=True, without=("embedding",)) == 36_625_603_584
    assert total(V3, active=True) == 37_552_282_624
    module = prediction_parameters(V3)
    assert sum(module.values()) == 11_610_067_968
    assert module["projection"] == 102_760_448
    assert module["block"] == 11_507_286_016
    # embedding and head of the module once more, and the biases of 58 + 1 routers
    assert checkpoint_numbers(V3) == 684_489_845_504
    assert total(V2) == 235_741_434_880
    assert total(V2, active=True) == 21_375_800_320
    assert round(total(MOONLIGHT, without=ends) / 1e9, 2) == 15.29
    assert round(total(MOONLIGHT, active=True, without=ends) / 1e9, 2) == 2.24
    # 61 layers: with 62, which a file with the module's layer suggests, the total would be another
    assert total(replace(V3, layers=62)) - total(V3) == 11_507_286_016


@pytest.mark.parametrize("name", ["V3", "V2", "Moonlight", *CONFIGS])
def test_closed_forms_are_what_a_model_holds(name):
    config = {"V3": V3, "V2": V2, "Moonlight": MOONLIGHT}.get(name) or CONFIGS[name]
    with torch.device("meta"):
        model = decoder(config)
    held = {part: 0 for part in count_parameters(config)}
    for weight_name, weight in model.named_parameters():
        inner = weight_name.split(".", 2)[-1]
        if weight_name == "embedding.weight" or weight_name == "head.weight":
            part = weight_name.split(".")[0]
        elif weight.dim() == 1:
            part = "norms"
        elif inner.startswith("attention."):
            part = "attention"
        else:
            part = {"experts": "routed experts", "shared": "shared experts", "router": "routers"}
            part = part.get(inner.split(".")[1], "dense layers")
        held[part] += weight.numel()
    assert held == count_parameters(config)
    assert sum(layer.bias.numel() for layer in mixtures(model)) == routing_biases(config)


def test_active_parameters_are_those_that_have_a_gradient(config):
    """Of one token, counted by the rows and experts that its loss reaches."""
    model = stir(decoder(config))
    model(torch.tensor([[3]])).sum().backward()
    reached = 0
    for name, weight in model.named_parameters():
        if ".experts." in name:
            reached += weight[0].numel() * int(weight.grad.flatten(1).any(1).sum())
        elif not name.endswith("query.weight") or weight.grad.abs().max() > 1e-12:
            reached += weight.numel()
    want = total(config, active=True)
    # a single token attends to itself whatever its query and key are, so maps to them get no gradient
    unread = sum(p.numel() for n, p in model.named_parameters() if n.endswith("query.weight"))
    assert reached in (want, want - unread)


def padding(config, layers, texts, length):
    """Operations, three passes, on the zeros that bring expanded values to the width of keys: made, and not counted."""
    sizes = config.attention
    columns = max(0, sizes.nope_dim + sizes.rope_dim - sizes.value_dim)
    return 6 * layers * texts * config.heads * length**2 * columns


@pytest.mark.parametrize("length", [1, 6])
def test_operations_are_those_that_pytorch_counts(config, length):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # with experts in a loop, each on the rows that go to it
    model = stir(decoder(config, compute=looped))
    for block in model.blocks:
        block.attention.absorbed = False
    tokens = torch.randint(config.vocab_size, (2, length))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens)
    counted = 3 * counter.get_total_flops() - padding(config, config.layers, 2, length)
    assert counted == 2 * length * training_flops(config, length)
    matrices = training_flops(config, 1) - (training_flops(config, 2) - training_flops(config, 1))
    half = training_flops(config, 7, causal=True)
    assert half - matrices == pytest.approx((training_flops(config, 7) - matrices) * 4 / 7)


def test_v3_is_the_default_of_transformers():
    ours, theirs = their_config(V3).to_dict(), DeepseekV3Config().to_dict()
    for name in (
        "n_group", "topk_group", "num_experts_per_tok", "routed_scaling_factor", "first_k_dense_replace",
        "hidden_size", "intermediate_size", "moe_intermediate_size", "num_attention_heads", "rms_norm_eps",
        "kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "vocab_size",
        "n_routed_experts", "n_shared_experts", "num_hidden_layers",
    ):  # fmt: skip
        assert ours[name] == theirs[name], name
    assert V3.rope_base == theirs["rope_parameters"]["rope_theta"]


def test_counts_refuse_bad_input():
    with pytest.raises(ValueError, match="length"):
        training_flops(V3, 0)
    assert attention_parameters(7168, 128, V3.attention) == 187_105_280


@pytest.mark.parametrize(
    "change",
    [
        dict(dense=4),
        dict(dense=-1),
        dict(predictions=-1),
        dict(yarn_factor=0.5),
        dict(yarn_factor=math.nan),
        dict(trained_length=0),
        dict(vocab_size=0),
        dict(layers=0, dense=0),
        dict(width=25),
        dict(rope_base=0),
        dict(norm_eps=-1),
        dict(hidden=0),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change):
    with pytest.raises(ERRORS):
        replace(PLAIN, **change)


def test_tiny():
    for bad in (0, 31, 48):
        with pytest.raises(ValueError, match="32"):
            tiny(width=bad)
    config = tiny(65, predictions=2, width=96, layers=4)
    assert (config.vocab_size, config.predictions, config.width, config.layers) == (65, 2, 96, 4)
    model = decoder(config)
    assert model(torch.zeros(1, 3, dtype=torch.long)).shape == (1, 3, 65)
    assert len(mixtures(model)) == 3


# Multi-token prediction


def multi(config, seed=0):
    model = MultiToken(config)
    stir(model.main, seed)
    for k, module in enumerate(model.depths, 1):
        embedding, head = module.decoder.embedding, module.decoder.head
        module.decoder.embedding, module.decoder.head = torch.nn.Identity(), torch.nn.Identity()
        stir(module, seed + k)
        module.decoder.embedding, module.decoder.head = embedding, head
    return model.eval()


def theirs_of(model, config, **options):
    """transformers' modules of prediction with our weights, by the names of a checkpoint."""
    with in_float64():
        main = DeepseekV3ForCausalLM(their_config(config, **options)).double().eval()
        peer = MtpModel(main, config.predictions).double().eval()
    state = {}
    for name, weight in model_to_checkpoint(model.state_dict(), config, separate=False).items():
        part = name.removeprefix("model.layers.")
        if part == name or int(part.split(".")[0]) < config.layers:
            continue
        layer, inner = part.split(".", 1)
        if inner.startswith(("embed_tokens", "shared_head.head")):
            continue
        inner = inner.replace("shared_head.norm", "post_norm")
        if not inner.startswith(("enorm", "hnorm", "eh_proj", "post_norm")):
            inner = "mtp_block." + inner
        state[f"layers.{int(layer) - config.layers}.{inner}"] = weight
    missing, unexpected = peer.load_state_dict(state, strict=False)
    assert not unexpected
    assert all("shared_head" in name or "embed_tokens" in name for name in missing)
    return peer


@pytest.mark.parametrize("hidden_first", [False, True])
@pytest.mark.parametrize(
    "name", ["as V3", "no latent of queries", "YaRN by 40", "one group, as Moonlight"]
)
def test_modules_of_prediction_are_those_of_transformers(name, hidden_first):
    """Each depth on the stream that we hand it: transformers hands on what its norm has normalized already."""
    config = CONFIGS[name]
    model = multi(config)
    peer = theirs_of(model, config, mtp_hidden_states_first=hidden_first)
    tokens = torch.randint(config.vocab_size, (2, 9))
    streams, logits = model.streams(tokens), model.logits(tokens)
    for k, layer in enumerate(peer.layers, 1):
        if hidden_first:  # the order of the paper, with the same numbers
            with torch.no_grad():
                layer.eh_proj.weight.copy_(torch.cat(layer.eh_proj.weight.chunk(2, 1)[::-1], 1))
        length = tokens.shape[1] - k
        mask = torch.full((length, length), -math.inf, dtype=torch.float64).triu(1)[None, None]
        positions = torch.arange(length)[None]
        embedded = model.main.embedding(tokens[:, k:])
        with in_float64():
            angles = peer.rotary_emb(embedded, positions)
            inputs = embedded, streams[k - 1][:, :-1], angles, mask, positions, None
            normed = layer(*inputs)
            layer.use_post_norm = False
            plain = layer(*inputs)
        assert streams[k].std() > 0.3
        assert (plain - streams[k]).abs().max() <= 1e-10
        assert (model.main.head(normed) - logits[k]).abs().max() <= 1e-10


def test_checkpoints_with_modules_convert_both_ways(config):
    model = multi(config)
    state = model.state_dict()
    for separate in (True, False):
        there = model_to_checkpoint(state, config, separate=separate)
        numbers = sum(weight.numel() for weight in there.values())
        assert numbers == checkpoint_numbers(config)
        back = model_from_checkpoint(there, config)
        assert back.keys() == state.keys()
        assert all(torch.equal(back[name], state[name]) for name in state)
    width = config.width
    joined = there[f"model.layers.{config.layers + 1}.eh_proj.weight"]
    ours = model.depths[1].projection.weight
    assert torch.equal(joined[:, :width], ours[:, width:])  # the embedding's half comes first
    for wrong in ("eh_proj", "enorm", "shared_head.norm", "mlp.gate", "self_attn.o_proj"):
        name = f"model.layers.{config.layers}.{wrong}.weight"
        with pytest.raises(ValueError, match="need"):
            model_from_checkpoint({n: w for n, w in there.items() if n != name}, config)
    with pytest.raises(ValueError, match="unknown"):  # a layer more than there are modules
        last = f"model.layers.{config.layers + 1}."
        model_from_checkpoint(there, replace(config, predictions=1))
        assert last


def test_modules_are_counted(config):
    with torch.device("meta"):
        model = MultiToken(config)
    own = sum(weight.numel() for weight in model.parameters())
    modules = config.predictions * sum(prediction_parameters(config).values())
    assert own == total(config) + modules
    module = model.depths[0]
    assert prediction_parameters(config)["projection"] == module.projection.weight.numel()
    block = sum(weight.numel() for weight in module.decoder.blocks.parameters())
    assert prediction_parameters(config)["block"] == block
    active = prediction_parameters(config, active=True)["block"]
    spared = config.mixture.experts - config.mixture.top_k
    assert block - active == spared * 3 * config.width * config.mixture.hidden


def test_embedding_and_head_are_shared():
    model = multi(PLAIN)
    for module in model.depths:
        assert module.decoder.embedding is model.main.embedding
        assert module.decoder.head is model.main.head
        assert module.decoder.norm is not model.main.norm
    before = model.logits(torch.arange(6)[None])
    with torch.no_grad():
        model.main.head.weight.mul_(2)
    after = model.logits(torch.arange(6)[None])
    assert all(torch.allclose(2 * x, y) for x, y in zip(before, after, strict=True))


def test_each_depth_sees_what_it_may_and_all_of_it():
    """Depth k at token i depends on tokens up to i + k, on each of them, and on none after: not on what it predicts."""
    model = multi(replace(PLAIN, predictions=3))
    tokens = torch.randint(PLAIN.vocab_size, (1, 8))
    before = model.logits(tokens)
    assert [logits.shape[1] for logits in before] == [8, 7, 6, 5]
    for changed in range(8):
        other = tokens.clone()
        other[0, changed] = (tokens[0, changed] + 1) % PLAIN.vocab_size
        for k, (x, y) in enumerate(zip(before, model.logits(other), strict=True)):
            differs = ((x - y).abs() > 1e-10).any(-1)[0]
            assert differs.tolist() == [changed <= i + k for i in range(8 - k)]


def test_losses_are_equation_24():
    config = replace(PLAIN, predictions=3)
    model = multi(config)
    text = torch.randint(config.vocab_size, (2, 9))
    inputs, targets = text[:, :-1], text[:, 1:].clone()
    targets[0, 2:4] = -100  # as of a prompt that is not to be learned
    main, depths = model.losses(inputs, targets)
    logits = model.logits(inputs)
    wanted = targets != -100
    for k, (found, scores) in enumerate(zip([main, *depths], logits, strict=True)):
        total = 0.0
        for row in range(2):
            for i in range(2 + k, 10):  # t_i, counted from 1
                if wanted[row, i - 2]:
                    chances = scores[row, i - 2 - k].softmax(-1)
                    total -= math.log(chances[text[row, i - 1]].item())
        assert found.item() == pytest.approx(total / wanted.sum().item(), rel=1e-12)
    assert prediction_loss(depths, 0.3).item() == pytest.approx(
        0.1 * sum(loss.item() for loss in depths)
    )
    assert prediction_loss([], 0.3) == 0
    first = torch.full_like(targets, -100)
    first[:, 0] = targets[:, 0]  # wanted where no depth has a target
    assert [loss.item() for loss in model.losses(inputs, first)[1]] == [0, 0, 0]
    for bad in (-0.1, math.nan):
        with pytest.raises(ValueError, match="weight"):
            prediction_loss(depths, bad)
    with pytest.raises(ValueError, match="depths"):
        model.losses(inputs[:, :3], targets[:, :3])


def test_prediction_trains_the_main_model_and_changes_nothing_else():
    """The loss of the depths reaches the main model's layers; the main model's own loss is what it was."""
    model = multi(PLAIN)
    text = torch.randint(PLAIN.vocab_size, (2, 9))
    main, depths = model.losses(text[:, :-1], text[:, 1:])
    alone = next_token_loss(model.main(text[:, :-1]), text[:, 1:])
    assert main.item() == pytest.approx(alone.item(), rel=1e-12)
    prediction_loss(depths, 1).backward()
    for name, weight in model.main.named_parameters():
        assert weight.grad is not None and weight.grad.any() or name == "norm.weight", name
    assert model.main.norm.weight.grad is None  # h⁰ is taken before it
    torch.manual_seed(3)
    with_modules = MultiToken(PLAIN)
    torch.manual_seed(3)
    without = decoder(PLAIN)
    assert all(map(torch.equal, with_modules.main.parameters(), without.parameters()))


def drafts_anew(model, text):
    """What the depths propose after a text of which the main model has read all but the last token: without memory."""
    h = model.main.hidden(model.main.embedding(text[:, :-1]))
    length = text.shape[1]
    for k, module in enumerate(model.depths, 1):
        h = module(h, text[:, k:])
        guess = model.main.head(module.decoder.norm(h[:, -1:])).argmax(-1)
        text = torch.cat([text, guess], 1)
    return text[:, length:]


def few_tokens(depth, vocab=3, seed=0):
    """A model of so few tokens that drafts are accepted now and then by chance."""
    return multi(replace(PLAIN, layers=2, vocab_size=vocab, predictions=depth), seed)


def steps_of(model, prompt, n):
    """How many drafts each step accepts, from the two models' greedy tokens alone, without any memory."""
    whole = generate(model.main, prompt, n + len(model.depths))
    at, found = prompt.shape[1] + 1, []
    while at < prompt.shape[1] + n:
        drafts = drafts_anew(model, whole[:, :at])[0]
        agree = (whole[0, at : at + len(drafts)] == drafts).tolist()
        found.append((agree + [False]).index(False))
        at += found[-1] + 1
    return found


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_drafting_changes_no_token(depth, monkeypatch):
    plain = mtp.Drafter.draft

    def spy(self, text):
        found = plain(self, text)
        assert torch.equal(
            found, drafts_anew(self.model, text)
        )  # nothing is left of rejected drafts
        return found

    monkeypatch.setattr(mtp.Drafter, "draft", spy)
    seen = set()
    for seed in range(3):
        model = few_tokens(depth, 2 + seed, seed)
        prompt = torch.randint(2, (1, 1 + seed))
        for n in (1, 10):
            tokens, accepted = speculate(model, prompt, n)
            assert torch.equal(tokens, generate(model.main, prompt, n))
            assert accepted == steps_of(model, prompt, n)
        seen |= set(accepted)
    assert len(seen) >= min(2 * depth, 3) if depth else seen == {0}


def test_drafts_of_a_perfect_drafter_are_all_accepted(monkeypatch):
    model = few_tokens(3, vocab=41)
    prompt = torch.randint(41, (1, 4))
    want = generate(model.main, prompt, 40)
    monkeypatch.setattr(
        mtp.Drafter, "draft", lambda self, text: want[:, text.shape[1] : text.shape[1] + 3]
    )
    monkeypatch.setattr(mtp.Drafter, "settle", lambda self, known, h: None)
    tokens, accepted = speculate(model, prompt, 21)  # 1 + 5 steps of 4
    assert accepted == [3] * 5
    assert torch.equal(tokens, want[:, :25])


def test_agreement_is_what_would_be_accepted_after_the_text():
    model = few_tokens(2, vocab=4)
    text = torch.randint(4, (2, 12))
    found = agreement(model, text)
    assert [agree.shape for agree in found] == [(2, 11), (2, 10)]
    assert all(0 < agree.double().mean() < 1 for agree in found)
    for row in range(2):
        for i in range(
            11
        ):  # the main model has read tokens 0 to i, the first depth has been shown token i + 1
            draft = drafts_anew(model, text[row : row + 1, : i + 2])[0, 0]
            own = model.main(text[row : row + 1, : i + 2])[0, -1].argmax()
            assert found[0][row, i] == (draft == own)


def test_expected_tokens():
    assert expected_tokens([]) == 1
    assert expected_tokens([0.85]) == pytest.approx(1.85)
    assert expected_tokens([0.5, 0.25]) == pytest.approx(1.625)
    share = 0.7  # Leviathan et al., equation 1
    assert expected_tokens([share] * 4) == pytest.approx((1 - share**5) / (1 - share))
    for bad in ([1.1], [0.5, -0.1], [math.nan]):
        with pytest.raises(ValueError, match="shares"):
            expected_tokens(bad)


def test_speculation_refuses_bad_input():
    model = few_tokens(1)
    prompt = torch.zeros(1, 3, dtype=torch.long)
    for bad, n in ((prompt, 0), (prompt.expand(2, 3), 4), (prompt[:, :0], 4)):
        with pytest.raises(ValueError, match="need n"):
            speculate(model, bad, n)


# Pipelines

RANKS = (4, 6, 8, 10, 12, 14, 16)
TIMES = [  # W at most F and b, which are equal
    Durations(10, 20, 10),
    Durations(10, 20, 10, 25),
    Durations(12, 20, 8, 21),
    Durations(12, 17, 5, 20),
]


@pytest.mark.parametrize("place, ranks", list(enumerate(RANKS)))
def test_bubbles_and_activations_are_the_published_ones(place, ranks):
    more = (2 * ranks + 6, TIMES[1 + place % 3])
    for batches, times in ((2 * ranks, TIMES[place % 4]), *([more] if ranks <= 10 else [])):
        for name, row in compare_methods(ranks, batches, times).items():
            assert row["bubble"] == row["published bubble"] == bubble(name, ranks, times)
            assert row["activations"] == activations(name, ranks)
        work = times.forward + times.backward
        for make in (one_forward_one_backward, zero_bubble):
            run = simulate(make(ranks, batches), times)
            assert len(set(run.bubbles)) == 1
            assert run.end == batches * work + run.bubbles[0]
        run = simulate(dualpipe(ranks, batches), times)
        saved = work - times.both
        outwards = [max(0, abs(2 * rank - ranks + 1) // 2 - 1) for rank in range(ranks)]
        published = bubble("DualPipe", ranks, times)
        assert run.bubbles == [published - further * saved for further in outwards]
        assert set(run.peaks) == {ranks + 1}
    assert [STAGES[name] for name in METHODS] == [1, 1, 2]


def test_where_the_published_bubbles_hold():
    """Durations of all kinds: 1F1B's always, ZB1P's if W fits into the gaps, DualPipe's if besides F = b."""
    seen = set()
    for forward, inputs, weights in itertools.product((4, 6, 9), repeat=3):
        for both in {forward + inputs + weights, max(forward, inputs + weights)}:
            times = Durations(forward, inputs + weights, weights, both)
            rows = compare_methods(6, 12, times)
            right = {name: row["bubble"] == row["published bubble"] for name, row in rows.items()}
            assert right["1F1B"]
            fits = weights <= min(forward, inputs)
            assert right["ZB1P"] == fits
            if fits:
                assert right["DualPipe"] == (forward == inputs)
                general = 2 * (both + forward - 2 * weights)
                assert rows["DualPipe"]["bubble"] == general or forward < inputs
            seen.add((fits, right["DualPipe"]))
    assert {(True, True), (True, False), (False, False)} <= seen


@pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("ranks, batches", [(2, 4), (4, 8), (6, 14), (8, 20)])
def test_all_work_is_done_once_and_in_order(make, ranks, batches):
    times = Durations(5, 11, 4, 13)
    run = simulate(make(ranks, batches), times)
    both_ways = make is dualpipe
    ends: dict = {}
    starts: dict = {}
    for rank, spans in enumerate(run.spans):
        for before, after in itertools.pairwise(spans):
            assert before.end <= after.start  # one step at a time
        for span in spans:
            kinds = [piece.kind for piece in span.step]
            assert len(kinds) == 1 or kinds == ["F", "B"]
            length = {"F": 5, "B": 11, "b": 7, "W": 4}[kinds[0]] if len(kinds) == 1 else 13
            assert span.end - span.start == length
            for piece in span.step:
                for kind in {"F": "F", "B": "bW", "b": "b", "W": "W"}[piece.kind]:
                    key = kind, piece.direction, piece.batch, rank
                    assert key not in ends
                    starts[key], ends[key] = span.start, span.end
    sides = (0, 1) if both_ways else (0,)
    each = batches // len(sides)
    assert len(ends) == 3 * ranks * batches
    for side, batch in itertools.product(sides, range(each)):
        way = range(ranks) if side == 0 else range(ranks)[::-1]
        for a, b in itertools.pairwise(way):
            assert ends["F", side, batch, a] <= starts["F", side, batch, b]
            assert ends["b", side, batch, b] <= starts["b", side, batch, a]
        for rank in way:
            assert ends["F", side, batch, rank] <= starts["b", side, batch, rank]
            assert ends["b", side, batch, rank] <= ends["W", side, batch, rank]
    for rank, peak in enumerate(run.peaks):  # the same from the times alone
        events = [(time, 1) for (kind, *_, r), time in starts.items() if kind == "F" and r == rank]
        events += [(time, -1) for (kind, *_, r), time in ends.items() if kind == "W" and r == rank]
        assert peak == max(itertools.accumulate(change for _, change in sorted(events)))


def test_a_first_batch_by_hand():
    """Two ranks, two batches, F = 1, B = 2: rank 0 waits for the gradient, rank 1 for the first batch."""
    run = simulate(one_forward_one_backward(2, 2), Durations(1, 2, 1))
    assert [(s.start, s.end, s.step[0].kind, s.step[0].batch) for s in run.spans[0]] == [
        (0, 1, "F", 0), (1, 2, "F", 1), (4, 6, "B", 0), (7, 9, "B", 1),
    ]  # fmt: skip
    assert [(s.start, s.end) for s in run.spans[1]] == [(1, 2), (2, 4), (4, 5), (5, 7)]
    assert (run.end, run.bubbles, run.peaks) == (9, [3, 3], [2, 1])


def test_pipelines_refuse_bad_input():
    for ranks, batches in ((3, 8), (4, 6), (4, 9), (0, 0)):
        with pytest.raises(ValueError, match="even"):
            dualpipe(ranks, batches)
    for make in (one_forward_one_backward, zero_bubble):
        for ranks, batches in ((0, 1), (4, 3)):
            with pytest.raises(ValueError, match="ranks"):
                make(ranks, batches)
    for function in (lambda name: bubble(name, 4, TIMES[0]), lambda name: activations(name, 4)):
        with pytest.raises(ValueError, match="GPipe"):
            function("GPipe")
    for bad in ((0, 2, 1), (1, 2, 0), (1, 2, 2), (1, 2, 1, 0), (math.nan, 2, 1)):
        with pytest.raises(ValueError, match="need forward"):
            Durations(*bad)
    backwards = [rank[::-1] for rank in one_forward_one_backward(2, 2)]
    alone = [[(Piece("B", 0),), (Piece("F", 0),)]]  # its own forward comes after
    for never in (backwards, alone):
        with pytest.raises(ValueError, match="no rank can go on"):
            simulate(never, Durations())
    assert Durations().both == 3


def test_gantt_charts():
    import matplotlib.pyplot as plt

    run = simulate(dualpipe(4, 8), Durations(1, 2, 1, 2.5))
    ax = plt.figure().subplots()
    draw(ax, run)
    drawn = sorted(
        (bar.get_x(), bar.get_width(), round(bar.get_y() + 0.45, 2)) for bar in ax.patches
    )
    want = sorted(
        (span.start, span.end - span.start, round(rank + place * 0.9 / len(span.step), 2))
        for rank, spans in enumerate(run.spans)
        for span in spans
        for place, _ in enumerate(span.step)
    )
    assert torch.allclose(torch.tensor(drawn).double(), torch.tensor(want).double())
    hatched = sum(bar.get_hatch() is not None for bar in ax.patches)
    assert hatched == len(ax.patches) // 2
    assert {text for text in ax.get_legend_handles_labels()[1]} == {"F", "B", "b", "W"}
    assert ax.yaxis_inverted() and ax.get_xlim() == (0, run.end)  # the first rank on top
    plt.close("all")


# The experiment


def test_operations_of_a_module_are_those_that_pytorch_counts(config):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    module = MultiToken(config, compute=looped).double().depths[0]
    module.decoder.blocks[0].attention.absorbed = False
    tokens = torch.randint(config.vocab_size, (2, 5))
    h = torch.randn(2, 5, config.width).double()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        module.logits(module(h, tokens))
    counted = 3 * counter.get_total_flops() - padding(config, 1, 2, 5)
    assert counted == 2 * 5 * prediction_flops(config, 5)
    half = prediction_flops(config, 7, causal=True)
    assert half == prediction_flops(config, 4)
    with pytest.raises(ValueError, match="length"):
        prediction_flops(config, 0)


def test_weight_of_prediction_and_equal_steps():
    assert [prediction_weight(share) for share in (0, 0.5, 0.675, 0.676, 1)] == [
        0.3, 0.3, 0.3, 0.1, 0.1,
    ]  # fmt: skip
    for bad in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="share"):
            prediction_weight(bad)
    config = tiny(predictions=2)
    steps = equal_steps(config, 100, 64)
    main, module = training_flops(config, 64), prediction_flops(config, 64)
    assert abs(steps * main - 100 * (main + 2 * module)) <= main / 2
    assert equal_steps(replace(config, predictions=0), 100, 64) == 100


def stream_of(text="the cat sat on the mat. ", times=40):
    return Bytes().encode(text * times)


SIZES = dict(steps=12, batch=4, length=16)


def test_training_learns_balances_and_weighs(monkeypatch):
    config, stream = tiny(predictions=2, width=32, layers=2), stream_of()
    weights = []

    def spy(depths, weight):
        weights.append((len(depths), weight))
        return prediction_loss(depths, weight)

    monkeypatch.setattr(experiment, "prediction_loss", spy)
    model, seconds = experiment.train(config, stream, seed=1, **SIZES, learning_rate=1e-2)
    assert weights == [(2, 0.3)] * 9 + [(2, 0.1)] * 3  # 9 / 12 > 10 / 14.8
    assert seconds > 0
    held_out = validation_windows(stream, 16, 8)
    fresh = MultiToken(config)
    assert held_out_bits(model, held_out, 4) < held_out_bits(fresh, held_out, 4) - 1
    for layer in mixtures(model):  # 12 steps up or down, of the main model and of its modules
        moved = layer.bias / 0.005
        assert moved.any() and torch.allclose(moved, moved.round(), atol=1e-3)
        assert layer.balancing.alpha == 1e-4 and moved.abs().max() <= 12
    short = SIZES | dict(steps=2)
    first, again, other = (
        experiment.train(config, stream, seed=seed, **short)[0].main.head.weight
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_bits_are_of_all_windows():
    model, held_out = MultiToken(tiny(width=32, layers=2)), validation_windows(stream_of(), 16, 7)
    with torch.no_grad():
        whole = next_token_loss(model.main(held_out[0]), held_out[1]).item()
    assert held_out_bits(model, held_out, 3) == pytest.approx(whole / math.log(2), rel=1e-5)


def test_acceptance_by_depth_is_what_drafting_after_each_token_gives():
    model = few_tokens(2, vocab=3)
    inputs = torch.randint(3, (5, 9))
    first, both = [], []
    for row in inputs:
        for i in range(
            7
        ):  # text up to token i + 1, the newest of which the main model has not read
            whole = row[None]
            own = model.main(whole).argmax(-1)[0]
            guess = [logits.argmax(-1)[0] for logits in model.logits(whole)[1:]]
            first.append(bool(guess[0][i] == own[i + 1]))
            both.append(first[-1] and bool(guess[1][i] == own[i + 2]))
    found = acceptance(model, inputs, 2)
    assert found[0] == pytest.approx(sum(first) / len(first))
    assert found[1] == pytest.approx(sum(both) / sum(first))
    assert 0 < sum(both) < sum(first) < len(first)


def test_a_depth_that_is_never_asked_accepts_nothing(monkeypatch):
    never = [torch.zeros(2, length, dtype=torch.bool) for length in (7, 6)]
    monkeypatch.setattr(experiment, "agreement", lambda model, rows: never)
    assert acceptance(few_tokens(2), torch.zeros(2, 8, dtype=torch.long), 2) == [0, 0]


def test_a_table_of_pairs_in_the_place_of_a_module():
    model = few_tokens(1, vocab=4)
    stream, inputs = torch.randint(4, (200,)), torch.randint(4, (9, 8))
    pairs = list(itertools.pairwise(stream.tolist()))
    follower = {a: max(range(4), key=lambda b, a=a: pairs.count((a, b))) for a in range(4)}
    own = model.main(inputs).argmax(-1)
    right = [follower[int(inputs[r, i])] == own[r, i] for r in range(9) for i in range(1, 8)]
    assert pair_acceptance(model, stream, inputs) == pytest.approx(sum(right) / len(right))
    assert 0 < sum(right) < len(right)


@pytest.fixture
def timed(monkeypatch):
    """Call what is to be timed once, and say that drafting takes 0.8 of the time; return what was called."""
    found = {}

    def compare(calls, **options):
        found.update({name: call() for name, call in calls.items()})
        return {"plain": Timing(1.0, 1.0, 1.0, 1.0, 5), "drafts": Timing(1.0, 1.0, 1.0, 0.8, 5)}

    monkeypatch.setattr(experiment, "compare", compare)
    return found


def test_drafting_is_measured(timed, monkeypatch):
    model, prompts = few_tokens(2, vocab=3), torch.randint(3, (2, 5))
    found = drafting(model, prompts, 8, 0.1)
    accepted = [count for row in prompts.split(1) for count in speculate(model, row, 9)[1]]
    tokens = 1 + sum(accepted) / len(accepted)
    assert found == {"tokens": tokens, "identical": 1.0, "speed": pytest.approx(1.25)}
    assert tokens > 1
    assert torch.equal(timed["plain"], timed["drafts"][0])
    wrong = torch.zeros(1, 14, dtype=torch.long)
    monkeypatch.setattr(experiment, "generate", lambda *_: wrong)
    assert drafting(model, prompts, 8, 0.1)["identical"] == 0


SLICE = SIZES | dict(steps=3, count=6, prompts=1, new=4, seconds=0.01, learning_rate=1e-2)


def test_the_comparison_is_what_single_trainings_give(timed, monkeypatch):
    config, data = tiny(predictions=1, width=32, layers=2), (stream_of(), stream_of("a cat. ", 60))
    train, continued = experiment.train, []
    with monkeypatch.context() as patch:
        patch.setattr(experiment, "train", lambda *a, **options: (train(*a, **options)[0], 2.0))
        patch.setattr(experiment, "drafting", lambda *a: continued.append(a[1]) or drafting(*a))
        results, model = compare_prediction(config, data, (3, 4), **SLICE)
    more = equal_steps(config, 3, 16)
    assert more > 3
    assert results["steps"] == {
        "without": 3, "with": 3, "without, equal operations": more,
    }  # fmt: skip
    main, module = training_flops(config, 16), prediction_flops(config, 16)
    assert results["operations"] == {
        "without": 3 * 64 * main,
        "with": 3 * 64 * (main + module),
        "without, equal operations": more * 64 * main,
    }
    held_out = validation_windows(data[1], 16, 6)
    options = dict(batch=4, length=16, learning_rate=1e-2)
    alone = replace(config, predictions=0)
    for name, sizes, steps in (
        ("without", alone, 3), ("with", config, 3), ("without, equal operations", alone, more),
    ):  # fmt: skip
        single, _ = experiment.train(sizes, data[0], seed=4, steps=steps, **options)
        assert results["bits"][name][1] == pytest.approx(held_out_bits(single, held_out, 4))
        assert len(results["bits"][name]) == 2
        if name == "with":
            assert results["acceptance"][1] == acceptance(single, held_out[0], 4)
            assert results["table"][1] == pair_acceptance(single, data[0], held_out[0])
            assert all(map(torch.equal, model.parameters(), single.parameters()))
    assert results["expected"] == [1 + shares[0] for shares in results["acceptance"]]
    for what in ("acceptance", "table", "expected", "tokens", "identical", "speed"):
        assert len(results[what]) == 2
    assert results["tokens a second"] == [3 * 64 / 2.0] * 2
    assert all(torch.equal(prompts, held_out[0][:1, :8]) for prompts in continued)
    assert len(continued) == 2
    for sizes, seeds in ((alone, (0,)), (config, ())):
        with pytest.raises(ValueError, match="need predictions and seeds"):
            compare_prediction(sizes, data, seeds, **SLICE)


def test_code_is_the_corpus():
    data = code(torch.device("cpu"))
    for found, part in zip(data, split_files(corpus()), strict=True):
        assert Bytes().decode(found) == "".join(part.values())


def test_full_scale_on_a_slice(timed, monkeypatch):
    import matplotlib.pyplot as plt

    for budget in BUDGETS.values():
        inspect.signature(full_scale).bind(torch.device("cpu"), seed=0, **budget)
        assert budget.keys() == BUDGETS["full"].keys()
        given = set(budget) - {"width", "layers", "predictions", "seeds"}
        wanted = set(inspect.signature(compare_prediction).parameters)
        wanted |= set(inspect.signature(experiment.train).parameters)
        assert given <= wanted
    data, called = (stream_of(), stream_of("a cat. ", 60)), []

    def spy(*arguments, **options):
        called.append((arguments, options))
        return compare_prediction(*arguments, **options)

    monkeypatch.setattr(experiment, "compare_prediction", spy)
    monkeypatch.setattr(experiment, "code", lambda device: data)
    sizes = SLICE | dict(width=32, layers=2, predictions=2, seeds=2)
    results, pictures = full_scale(torch.device("cpu"), seed=5, **sizes)
    assert called == [((tiny(257, 2, 32, 2), data, range(5, 7)), SLICE)]
    assert json.loads(json.dumps(results)) == results  # a record can hold it
    assert results["sample"].startswith("def ") and len(results["acceptance"][1]) == 2
    bits, shares = pictures.values()
    lines = bits.axes[0].lines
    assert [line.get_label() for line in lines] == list(experiment.WAYS)
    for line in lines:
        assert line.get_ydata().tolist() == results["bits"][line.get_label()]
        assert set(line.get_xdata().tolist()) == {results["operations"][line.get_label()]}
    drawn = [line.get_ydata().tolist() for line in shares.axes[0].lines]
    assert drawn[::2] == results["acceptance"] and drawn[1::2] == [[x] for x in results["table"]]
    plt.close("all")


def test_released_files_are_counted_to_the_last_number():
    # What the hub counts in the files of deepseek-ai/DeepSeek-V3, by type.
    expected = {"BF16": 3_918_786_560, "F8_E4M3": 680_571_043_840, "F32": 41_555_600}
    assert stored_numbers(V3) == expected
    assert stored_numbers(MOONLIGHT)["F32"] > 26 * 64  # no latent for queries, no prediction
    small = tiny(width=32)
    state = mtp.MultiToken(small).state_dict()
    names = mtp.model_to_checkpoint(state, small)
    assert sum(w.numel() for w in names.values()) == sum(stored_numbers(small).values()) - sum(
        -(-rows // 128) * -(-columns // 128) * count
        for rows, columns, count in eight_bit_matrices(small)
    )


@pytest.mark.parametrize("name", [*CONFIGS, "V2", "Moonlight"])
def test_matrices_in_eight_bits_are_those_of_a_checkpoint(name):
    config = replace(
        {"V2": V2, "Moonlight": MOONLIGHT}.get(name) or CONFIGS[name],
        vocab_size=8,  # so that no other matrix looks like one of these
    )
    with torch.device("meta"):
        names = model_to_checkpoint(MultiToken(config).state_dict(), config)
    want, found = Counter(), Counter()
    for there, weight in names.items():
        if weight.dim() == 2 and not re.search(r"embed|head|mlp\.gate\.weight|eh_proj", there):
            shared = config.mixture.shared if "shared_experts" in there else 1
            parts = weight.chunk(shared, 1 if "down_proj" in there else 0)
            # "down" is listed as the other two are, which it is the transpose of
            want.update(part.shape[:: -1 if "down_proj" in there else 1] for part in parts)
    for rows, columns, count in eight_bit_matrices(config):
        found[rows, columns] += count
    assert +found == want


# Several processes


def test_the_newest_whole_checkpoint_is_taken(tmp_path):
    assert parallel.latest(tmp_path) is None
    for step in (9, 30, 100, 120):
        (tmp_path / f"step-{step}").mkdir()
        (tmp_path / f"step-{step}" / "__0_0.distcp").touch()
    for step in (9, 100, 30):  # 120 was being written when all stopped
        (tmp_path / f"step-{step}" / ".metadata").touch()
    assert parallel.latest(tmp_path) == tmp_path / "step-100"


def test_each_process_reads_its_own_part_of_a_batch(monkeypatch, tmp_path):
    stream = torch.arange(500)
    monkeypatch.setattr(parallel.dist, "get_world_size", lambda: 2)

    def read(rank, seed=3, first=4):
        monkeypatch.setattr(parallel.dist, "get_rank", lambda: rank)
        return list(parallel.batches(stream, seed, first, 6, 4, 8))

    for step, (a, b) in enumerate(zip(read(0), read(1), strict=True), 4):
        whole = windows(stream, 8, torch.Generator().manual_seed(3 * 1_000_003 + step))(4)
        for parts in zip(a, b, whole, strict=True):
            assert torch.equal(torch.cat(parts[:2]), parts[2])
    assert torch.equal(read(1, first=5)[0][0], read(1)[1][0])
    assert not torch.equal(read(1, seed=4)[0][0], read(1)[0][0])
    for bad in (dict(steps=0, every=1), dict(steps=1, every=0), dict(steps=1, every=1, batch=3)):
        with pytest.raises(ValueError, match="2 processes divide"):
            parallel.train(tmp_path, **bad)


def test_the_command_trains_as_it_says(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(parallel, "start", lambda: called.append("start"))
    monkeypatch.setattr(parallel, "train", lambda *args, **kwargs: called.append((args, kwargs)))
    monkeypatch.setattr(parallel.dist, "destroy_process_group", lambda: called.append("end"))
    folder = tmp_path / "new"
    options = ["--steps", "7", "--every", "2", "--seed", "5"]
    monkeypatch.setattr(sys, "argv", ["parallel", "--checkpoints", str(folder), *options])
    parallel.main()
    assert called == ["start", ((folder,), dict(steps=7, every=2, seed=5)), "end"]
    assert folder.is_dir()


def losses_of_one_process(steps, batch, length):
    """What `parallel.train` does, in one process and with whole matrices."""
    seed_everything(0)
    balancing = Balancing(alpha=1e-4, speed=0.005)
    model, losses = MultiToken(tiny(257, width=32), balancing=balancing), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(steps):
        draw = windows(code(torch.device("cpu"))[0], length, torch.Generator().manual_seed(step))
        main, depths = model.losses(*draw(batch))
        (main + prediction_loss(depths, 0.3) + auxiliary_loss(model)).backward()
        optimizer.step()
        optimizer.zero_grad()
        balance(model)
        losses.append(main.item())
    return losses


def torchrun(root, processes, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={processes}", *arguments]
    path = os.pathsep.join([str(root / "src"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)


@pytest.mark.parametrize("processes", [2, 4])
def test_training_on_several_processes_has_the_gradients_of_one(processes, root):
    done = torchrun(root, processes, str(root / "tests" / "v3_processes.py"), "equal")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("equal") == processes


def test_a_training_goes_on_exactly_after_a_process_was_killed(root, tmp_path):
    script = str(root / "tests" / "v3_processes.py")
    done = torchrun(root, 2, "--max-restarts=1", script, "train", str(tmp_path), "6", "5")
    assert done.returncode == 0 and "exitcode: -9" in done.stderr, done.stderr
    lines = (tmp_path / "losses.jsonl").read_text().splitlines()
    steps, losses = zip(*(json.loads(line).values() for line in lines), strict=True)
    # Killed after step 5, it goes on from the checkpoint of step 3 and repeats two steps, to the last bit.
    assert steps == (1, 2, 3, 4, 5, 4, 5, 6)
    assert losses[5:7] == losses[3:5] and len(set(losses)) == 6
    once = losses_of_one_process(6, batch=4, length=16)
    assert losses[:5] + losses[7:] == pytest.approx(once, rel=1e-5)
