"""Chapter 10: packers keep their guarantees, packed is alone, and a stream that is killed loses and repeats nothing."""

import inspect
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import config
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F

from noise2tokens.display import COLORS
from noise2tokens.sequence_packing import experiment, layout, packers, patch, pictures
from noise2tokens.sequence_packing.patch import following, without_padding
from noise2tokens.sequence_packing.stream import PackedStream
from noise2tokens.transformer import Attention, Config, Decoder, next_token_loss

lengths_and_capacity = st.integers(1, 12).flatmap(
    lambda capacity: st.tuples(st.lists(st.integers(1, capacity), max_size=8), st.just(capacity))
)
each_packer = pytest.mark.parametrize("name", packers.PACKERS)


# Packers


@each_packer
@settings(max_examples=150, deadline=None)
@given(lengths_and_capacity)
def test_packers_hold_everything_once_and_keep_their_guarantees(name, problem):
    lengths, capacity = problem
    bins = packers.PACKERS[name](lengths, capacity)
    assert sorted(i for places in bins for i in places) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in places) <= capacity for places in bins)
    best, found = packers.fewest_bins(lengths, capacity), len(bins)
    if name == "first fit, decreasing":
        assert 9 * found <= 11 * best + 6
    elif name == "best fit, decreasing":
        assert 9 * found <= 11 * best + 36
    elif name == "next fit":
        assert found <= max(1, 2 * best - 1) or best == 0
    else:
        assert 10 * found <= 17 * best


@pytest.mark.parametrize(
    ("fast", "slow"),
    [(packers.first_fit, packers.first_fit_slowly), (packers.best_fit, packers.best_fit_slowly)],
)
def test_fast_packers_do_what_the_slow_ones_do(fast, slow):
    generator = torch.Generator().manual_seed(0)
    for count, capacity, shortest in (
        (0, 5, 1),
        (1, 5, 5),
        (1500, 64, 1),
        (1500, 50, 20),
        (700, 9, 9),
    ):
        lengths = torch.randint(shortest, capacity + 1, (count,), generator=generator).tolist()
        assert fast(lengths, capacity) == slow(lengths, capacity)


def test_guarantees_are_reached_by_bad_luck():
    """Inputs on which a packer needs nearly as many bins as its guarantee allows: the bounds above are no accident."""
    lengths = [500, 1] * 20  # pairs of halves fit, and next fit never sees two
    assert (
        len(packers.next_fit(lengths, 1000)) == 20 and packers.fewest_bins(lengths[:16], 1000) == 5
    )
    assert len(packers.best_fit_decreasing(lengths, 1000)) == 11
    lengths = [144] * 6 + [334] * 6 + [501] * 6
    assert len(packers.first_fit(lengths, 1000)) == len(packers.best_fit(lengths, 1000)) == 10
    assert len(packers.first_fit_decreasing(lengths, 1000)) == 6


def test_decreasing_is_the_same_packer_on_sorted_lengths():
    lengths = [3, 9, 4, 4, 7]
    assert packers.first_fit_decreasing(lengths, 10) == [[1], [4, 0], [2, 3]]
    assert packers.best_fit_decreasing(lengths, 10) == [[1], [4, 0], [2, 3]]
    assert packers.next_fit(lengths, 10) == [[0], [1], [2, 3], [4]]


@pytest.mark.parametrize("bad", [[0, 3], [3, 11], [-1]])
@pytest.mark.parametrize("packer", [*packers.PACKERS.values(), packers.fewest_bins])
def test_lengths_that_fit_no_bin_are_named(packer, bad):
    with pytest.raises(ValueError, match="lengths must be 1 to 10, got"):
        packer(bad, 10)


@pytest.mark.parametrize("bad", [([np.int64(300), 200], 500), ([1.5, 2], 5), ([1, 2], 5.0)])
def test_lengths_that_are_no_python_integers_are_refused(bad):
    """Where bits are shifted NumPy's integers overflow, and best fit gave each length a bin of its own."""
    with pytest.raises(TypeError, match="must be int, got .*tolist"):
        inspect.unwrap(packers._check)(*bad)  # without the checker of types, which is on in tests


def test_efficiency():
    assert packers.efficiency([5, 5, 5], [[0, 1], [2]], 10) == 0.75
    for bins in ([[0, 1]], [[0, 1], [2], [2]], [[0, 1, 2]], []):
        with pytest.raises(ValueError):
            packers.efficiency([5, 5, 5], bins, 10)
    assert packers.padded_efficiency([1, 4, 2, 2], 2) == 9 / 12
    assert packers.padded_efficiency([1, 4, 2, 2, 3], 2) == 12 / 15
    assert packers.padded_efficiency([1, 4, 2, 2], 2, power=2) == 25 / 40
    for arguments in (([], 2), ([1], 0), ([1], 1, 0)):
        with pytest.raises(ValueError, match="batch >= 1"):
            packers.padded_efficiency(*arguments)
    with pytest.raises(ValueError, match="at most 16"):
        packers.fewest_bins([1] * 17, 2)


def test_sorting_within_pools_stays_within_them():
    lengths = [5, 2, 9, 1, 7, 3, 8]
    assert packers.sorted_in_pools(lengths, 3) == [1, 0, 2, 3, 5, 4, 6]
    assert packers.sorted_in_pools(lengths, 1) == list(range(7))
    assert packers.sorted_in_pools(lengths, 7) == [3, 1, 5, 0, 4, 6, 2]
    assert packers.sorted_in_pools([], 4) == []
    with pytest.raises(ValueError, match="got 0"):
        packers.sorted_in_pools(lengths, 0)


# Layout


def sequences(sizes, seed=0, vocabulary=50):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocabulary, (n,), generator=generator) for n in sizes]


def test_a_packed_row():
    found = layout.pack([torch.tensor([7, 8, 9]), torch.tensor([4]), torch.tensor([5, 6])])
    assert found.tokens.tolist() == [7, 8, 9, 4, 5, 6]
    assert found.labels.tolist() == [8, 9, -100, -100, 6, -100]
    assert found.positions.tolist() == [0, 1, 2, 0, 0, 1]
    assert found.cu_seqlens.tolist() == [0, 3, 4, 6] and found.cu_seqlens.dtype == torch.int32
    assert found.max_seqlen == 3
    for bad in ([], [torch.tensor([1]), torch.tensor([], dtype=torch.long)]):
        with pytest.raises(ValueError, match="one token or more"):
            layout.pack(bad)


@pytest.mark.parametrize("rest", [(), (3,), (2, 2)])
def test_pad_undoes_unpad(rest):
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1]]).bool()
    x = torch.randn(4, 4, *rest, dtype=torch.float64, requires_grad=True)
    tokens, places, cu, longest = layout.unpad(x, mask)
    assert len(tokens) == 9 and cu.tolist() == [0, 2, 5, 5, 9] and longest == 4
    back = layout.pad(tokens, places, 4, 4)
    assert torch.equal(back[mask], x[mask]) and not back[~mask].any()
    back.sum().backward()
    assert torch.equal(x.grad != 0, mask.view(4, 4, *[1] * len(rest)).expand_as(x))
    with pytest.raises(ValueError, match="no token"):
        layout.unpad(x, torch.zeros_like(mask))
    config.update("jaxtyping_disable", True)  # it sees this first, where it is on
    try:
        with pytest.raises(ValueError, match="need a mask of"):
            layout.unpad(x[:, :3], mask)
    finally:
        config.update("jaxtyping_disable", False)


@pytest.mark.parametrize("cu", [[1, 3, 6], [0, 3, 5], [0, 3, 7], []])
def test_offsets_that_do_not_cover_the_tokens_are_refused(cu):
    x = torch.randn(2, 6, 4)
    with pytest.raises(ValueError, match="lead from 0 to 6"):
        layout.varlen_attention(x, x, x, torch.tensor(cu, dtype=torch.int32), 3)


def test_a_mean_over_nothing_is_refused():
    model = experiment.decoder(11, 8, 1, 2)
    tokens = torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="no token has a label"):
        experiment.mean_loss(model, [(tokens, torch.full((1, 3), -100), None)])


def test_unpad_equals_that_of_transformers():
    from transformers.modeling_flash_attention_utils import _get_unpad_data

    mask = torch.tensor([[1, 1, 0], [0, 1, 1], [1, 1, 1]])
    places, cu, longest = _get_unpad_data(mask)
    _, ours, our_cu, our_longest = layout.unpad(mask, mask.bool())
    assert torch.equal(places, ours) and torch.equal(cu, our_cu) and longest == our_longest


def test_padding_on_the_right():
    tokens, mask = layout.pad_batch(sequences([2, 4]), 99)
    assert mask.tolist() == [[True, True, False, False], [True] * 4]
    assert tokens[0, 2:].tolist() == [99, 99]
    with pytest.raises(ValueError, match="at least one"):
        layout.pad_batch([], 0)


def test_block_diagonal_mask_by_hand():
    mask = layout.block_diagonal_mask(torch.tensor([0, 2, 2, 3], dtype=torch.int32))
    assert mask.tolist() == [[True, False, False], [True, True, False], [False, False, True]]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_of_each_equals_a_masked_whole(kv_heads):
    sizes = [3, 1, 6]
    q = torch.randn(1, 4, 10, 8, dtype=torch.float64)
    k, v = torch.randn(2, 1, kv_heads, 10, 8, dtype=torch.float64)
    cu = layout.offsets(sizes)
    mask = layout.block_diagonal_mask(cu)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True, scale=0.3)
    found = layout.varlen_attention(q[0], k[0], v[0], cu, 6, 0.3)
    assert torch.allclose(found, expected[0], rtol=0, atol=1e-14)
    plain = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    assert torch.allclose(
        layout.varlen_attention(q[0], k[0], v[0], cu, 6), plain[0], rtol=0, atol=1e-14
    )


def test_the_kernels_way_through_a_packed_row_is_the_same(monkeypatch):
    """What a GPU takes, computed without one: heads and tokens change places, and so they do again at the end."""
    q = torch.randn(4, 10, 8, dtype=torch.float64)
    k, v = torch.randn(2, 2, 10, 8, dtype=torch.float64)
    cu = layout.offsets([3, 1, 6])
    for scale in (None, 0.3):
        expected = layout.varlen_attention(q, k, v, cu, 6, scale)
        with monkeypatch.context() as patched:
            patched.setattr(layout, "kernel_runs_on", lambda device: True)
            found = layout.varlen_attention(q, k, v, cu, 6, scale)
        assert torch.allclose(found, expected, rtol=0, atol=1e-14)


def test_padded_batches_attend_as_usual():
    q, k, v = torch.randn(3, 2, 4, 10, 8, dtype=torch.float64)
    angles = torch.zeros(1, 10, 4)
    where = layout.Layout(torch.arange(10), angles, angles, 10)
    for scale in (None, 0.3):
        expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        assert torch.allclose(
            layout.attend_each(q, k, v, where, scale), expected, rtol=0, atol=1e-14
        )


def test_offsets_also_fit_pytorchs_jagged_tensors():
    """Not causal, since nested tensors have no causal mask here: the same split by a third party."""
    parts = [torch.randn(n, 2, 8) for n in (3, 5)]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged)
    assert nested.offsets().tolist() == layout.offsets([3, 5]).tolist()


# Packed is alone


@pytest.fixture(scope="module")
def decoder():
    torch.manual_seed(0)
    return Decoder(
        Config(50, 32, 2, 4, kv_heads=2), attention=partial(Attention, core=layout.attend_each)
    ).double()


def test_packed_logits_and_gradients_are_those_of_each_alone(decoder):
    parts = sequences([5, 1, 8, 3])
    row = layout.pack(parts)
    logits = decoder(row.tokens, cu_seqlens=row.cu_seqlens, max_seqlen=row.max_seqlen)
    alone = torch.cat([decoder(tokens) for tokens in parts])
    assert (logits - alone).abs().max() < 1e-14
    loss = next_token_loss(logits, row.labels)
    loss.backward()
    packed = [p.grad.clone() for p in decoder.parameters()]
    decoder.zero_grad()
    labels = [F.pad(tokens[1:], (0, 1), value=-100) for tokens in parts]
    total = sum(
        F.cross_entropy(decoder(x), y, reduction="sum") for x, y in zip(parts, labels, strict=True)
    )
    (total / sum(len(x) - 1 for x in parts)).backward()
    for ours, right in zip(packed, decoder.parameters(), strict=True):
        assert torch.allclose(ours, right.grad, rtol=0, atol=1e-13)
    decoder.zero_grad()


def test_contamination_is_exactly_zero(decoder):
    first, second, third = sequences([4, 6, 5])
    row = layout.pack([first, second, third])
    before = decoder(row.tokens, cu_seqlens=row.cu_seqlens)
    other = layout.pack([first, (second + 1) % 50, third])
    after = decoder(other.tokens, cu_seqlens=row.cu_seqlens)
    assert torch.equal(before[:4], after[:4]) and torch.equal(before[10:], after[10:])
    assert not torch.equal(before[4:10], after[4:10])
    x = decoder.embedding(row.tokens).detach().requires_grad_()
    decoder.logits(decoder.hidden(x, cu_seqlens=row.cu_seqlens))[10:].sum().backward()
    decoder.zero_grad()
    assert not x.grad[:10].any() and x.grad[10:].all(dim=1).all()
    # A control: without the offsets the third is told of the others.
    plain = decoder(row.tokens), decoder(other.tokens)
    assert (plain[0] - plain[1])[10:].abs().max() > 1e-3


# The stream


def documents(sizes, seed=0):
    """Documents that say who they are: document i is i, i, i, ..."""
    return [torch.full((n,), i) for i, n in enumerate(sizes)]


SIZES = torch.randint(1, 40, (200,), generator=torch.Generator().manual_seed(3)).tolist()


def pieces_of(rows):
    return Counter(piece for row in rows for piece in row.documents)


@pytest.mark.parametrize("open_bins", [1, 4])
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_an_epoch_has_every_document_once(workers, open_bins):
    data = documents(SIZES)
    source = PackedStream(data, 64, workers=workers, open_bins=open_bins)
    epochs = [list(source), list(source)]
    for rows in epochs:
        assert pieces_of(rows) == Counter({(i, 0, n): 1 for i, n in enumerate(SIZES)})
        for row in rows:
            assert len(row.packed.tokens) == sum(b - a for _, a, b in row.documents) <= 64
            expected = torch.cat([data[i][a:b] for i, a, b in row.documents])
            assert torch.equal(row.packed.tokens, expected)
    assert [r.documents for r in epochs[0]] != [r.documents for r in epochs[1]]
    assert source.epoch == 2


def test_more_open_bins_waste_less():
    used = [
        sum(SIZES) / (64 * len(list(PackedStream(documents(SIZES), 64, open_bins=count))))
        for count in (1, 2, 8, 32)
    ]
    assert used[0] < used[1] < used[2] <= used[3] and used[0] < 0.85 and used[3] > 0.95


@pytest.mark.parametrize("workers", [0, 2, 3])
@pytest.mark.parametrize("stop", [0, 1, 7, 30, 42])
def test_a_stream_goes_on_where_it_stopped_row_by_row(workers, stop):
    settings = dict(workers=workers, open_bins=3, seed=5)
    whole = PackedStream(documents(SIZES), 90, **settings)
    expected = [row.documents for row in whole]
    source = PackedStream(documents(SIZES), 90, **settings)
    rows = iter(source)
    head = [next(rows).documents for _ in range(stop)]
    state = json.loads(json.dumps(source.state_dict()))
    del rows  # rows made ahead by workers are lost here
    again = PackedStream(documents(SIZES), 90, **settings)
    again.load_state_dict(state)
    tail = [row.documents for row in again]
    assert head + tail == expected
    assert [row.documents for row in again] == [
        row.documents for row in whole
    ]  # and the next epoch


@pytest.mark.parametrize("stop", [3, 20])
def test_a_document_in_pieces_is_resumed_between_them(stop):
    sizes = [200, 3, 150, 64, 65, 7, 400]
    settings = dict(open_bins=2, too_long="split")
    expected = [row.documents for row in PackedStream(documents(sizes), 32, **settings)]
    source = PackedStream(documents(sizes), 32, **settings)
    rows = iter(source)
    head = [next(rows).documents for _ in range(stop)]
    again = PackedStream(documents(sizes), 32, **settings)
    again.load_state_dict(source.state_dict())
    assert head + [row.documents for row in again] == expected
    tokens = Counter()
    for row in expected:
        for number, start, end in row:
            tokens[number] += end - start
    assert tokens == Counter(dict(enumerate(sizes)))


def test_long_documents_are_refused_split_or_dropped():
    sizes = [5, 30, 8]
    with pytest.raises(
        ValueError, match='document 1 has 30 tokens, a row 10: choose too_long="split"'
    ):
        list(PackedStream(documents(sizes), 10))
    split = pieces_of(PackedStream(documents(sizes), 10, too_long="split"))
    assert split == Counter(
        {(0, 0, 5): 1, (1, 0, 10): 1, (1, 10, 20): 1, (1, 20, 30): 1, (2, 0, 8): 1}
    )
    dropped = pieces_of(PackedStream(documents(sizes), 10, too_long="drop"))
    assert dropped == Counter({(0, 0, 5): 1, (2, 0, 8): 1})


def test_bad_streams():
    data = documents([3])
    for bad in (dict(capacity=0), dict(workers=-1), dict(open_bins=0), dict(documents=[])):
        with pytest.raises(ValueError, match="need documents"):
            PackedStream(**{"documents": data, "capacity": 5} | bad)
    with pytest.raises(ValueError, match="got 'cut'"):
        PackedStream(data, 5, too_long="cut")
    with pytest.raises(ValueError, match="document 0 is empty"):
        list(PackedStream(documents([0]), 5))


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (dict(seed=1), "seed 0, here 1"),
        (dict(capacity=41), "capacity 40, here 41"),
        (dict(open_bins=3), "open_bins 8, here 3"),
        (dict(workers=2), "workers 0, here 2"),
        (dict(too_long="drop"), "too_long 'error', here 'drop'"),
        (dict(documents=documents([3, 4])), "documents 1, here 2"),
    ],
)
def test_a_state_is_of_use_to_its_own_stream_alone(other, told):
    own = dict(documents=documents([3]), capacity=40)
    state = json.loads(json.dumps(PackedStream(**own).state_dict()))
    stream = PackedStream(**own | other)
    before = stream.state_dict()
    with pytest.raises(ValueError, match=f"of another stream: {told}$"):
        stream.load_state_dict(state)
    assert stream.state_dict() == before
    PackedStream(**own).load_state_dict(state)


CONSUMER = """
import json, os, sys, time
import torch
sys.path.insert(0, {tests!r})
from test_sequence_packing import SIZES, documents
from noise2tokens.sequence_packing.stream import PackedStream

if __name__ == "__main__":
    source = PackedStream(documents(SIZES), 64, workers=2, open_bins=4, seed=1)
    if os.path.exists("state.json"):
        saved = json.load(open("state.json"))
        source.load_state_dict(saved["stream"])
    else:
        saved = {{"seen": []}}
    for row in source:
        saved["seen"] += [list(piece) for piece in row.documents]
        saved["stream"] = source.state_dict()
        with open("state.part", "w") as file:
            json.dump(saved, file)
        os.replace("state.part", "state.json")
        time.sleep(0.03)
    open("done", "w").close()
"""


def test_a_consumer_that_is_killed_loses_nothing_and_sees_nothing_twice(tmp_path):
    """With real worker processes, killed without warning several times in the middle of an epoch."""
    from pathlib import Path

    script = tmp_path / "consume.py"
    script.write_text(CONSUMER.format(tests=str(Path(__file__).parent)))
    kills = 0
    for patience in (40, 45, 50, None):
        process = subprocess.Popen(
            [sys.executable, str(script)], cwd=tmp_path, start_new_session=True
        )
        if patience is None:
            assert process.wait(timeout=300) == 0
            break
        start = seen = len(_seen(tmp_path))
        for _ in range(3000):
            time.sleep(0.02)
            seen = len(_seen(tmp_path))
            if seen >= start + patience or process.poll() is not None:
                break
        assert seen > start
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills >= 2 and (tmp_path / "done").exists()
    seen = Counter(tuple(piece) for piece in _seen(tmp_path))
    assert seen == Counter({(i, 0, n): 1 for i, n in enumerate(SIZES)})


def _seen(folder):
    try:
        return json.loads((folder / "state.json").read_text())["seen"]
    except FileNotFoundError:
        return []


# Hugging Face models without padding


def tiny(kind):
    import transformers

    options = dict(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**options)
    return getattr(transformers, f"{kind}ForCausalLM")(config).double().eval()


@pytest.fixture(params=["Llama", "Qwen2", "Qwen3"])
def model(request):
    return tiny(request.param)


def padded(parts, side):
    ids = torch.zeros(len(parts), max(map(len, parts)), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, tokens in enumerate(parts):
        place = (
            slice(0, len(tokens)) if side == "right" else slice(ids.shape[1] - len(tokens), None)
        )
        ids[i, place], mask[i, place] = tokens, 1
    return ids, mask


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_patched_model_gives_what_each_sample_alone_gives(model, side):
    parts = sequences([5, 9, 3], vocabulary=60)
    ids, mask = padded(parts, side)
    labels = ids.masked_fill(mask == 0, -100)
    with without_padding(model):
        found = model(ids, attention_mask=mask, labels=labels)
    found.loss.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    alone = [model(tokens[None]).logits[0] for tokens in parts]
    for i, right in enumerate(alone):
        assert (found.logits[i][mask[i] == 1] - right).abs().max() < 1e-14
    assert not found.logits[mask == 0].any()
    pairs = zip(alone, parts, strict=True)
    total = sum(F.cross_entropy(a[:-1], x[1:], reduction="sum") for a, x in pairs)
    (total / sum(len(x) - 1 for x in parts)).backward()
    assert abs(found.loss.item() - total.item() / 14) < 1e-13
    for ours, right in zip(grads, model.parameters(), strict=True):
        assert torch.allclose(ours, right.grad, rtol=0, atol=1e-13)


def test_the_patch_comes_off_and_computes_real_tokens_only(model):
    ids, mask = padded(sequences([2, 9], vocabulary=60), "right")
    config, forward = model.config._attn_implementation, type(model).forward
    before = model(ids, attention_mask=mask).logits
    seen = []
    hook = model.model.layers[0].mlp.register_forward_hook(lambda m, a, o: seen.append(o.shape))
    with pytest.raises(RuntimeError, match="stop"), without_padding(model):
        model(ids, attention_mask=mask)
        raise RuntimeError("stop")
    hook.remove()
    assert seen == [(1, 11, 32)]
    assert model.config._attn_implementation == config and "forward" not in vars(model)
    assert model.forward.__func__ is forward
    assert torch.equal(model(ids, attention_mask=mask).logits, before)


def test_a_cache_or_a_mask_of_ones_contaminates(model):
    """Positions that restart tell transformers of packed sequences, unless it makes a cache or is given any mask."""
    parts = sequences([5, 9, 3], vocabulary=60)
    row = layout.pack(parts)
    alone = torch.cat([model(tokens[None]).logits[0] for tokens in parts])
    options = dict(input_ids=row.tokens[None], position_ids=row.positions[None])

    def error(**more):
        return (model(**options, **more).logits[0] - alone).abs().max()

    assert error(use_cache=False) < 1e-13
    assert error() > 0.1
    assert error(use_cache=False, attention_mask=torch.ones_like(row.tokens[None])) > 0.1


def test_a_patched_model_refuses_what_it_cannot_do(model):
    ids = torch.ones(2, 4, dtype=torch.long)
    with without_padding(model):
        with pytest.raises(TypeError, match="no cache"):
            model(ids, use_cache=True)
        with pytest.raises(TypeError, match="no cache"):
            model(ids, past_key_values=object())
        with pytest.raises(ValueError, match="of the same shape"):
            model(ids, attention_mask=torch.ones(2, 3))
        with pytest.raises(ValueError, match="no token"):
            model(ids, attention_mask=torch.zeros(2, 4))
        assert model(ids).logits.shape == (2, 4, 60)
    with pytest.raises(TypeError, match="got Linear"), without_padding(nn.Linear(2, 2)):
        pass


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        (dict(sliding_window=4), "sliding_window"),
        (dict(dropout=0.1), "dropout"),
        (dict(softcap=30.0), "softcap"),
        (dict(s_aux=torch.zeros(4)), "s_aux"),
    ],
)
def test_an_attention_that_asks_for_more_is_refused(options, asked):
    qkv = torch.randn(3, 1, 4, 5, 8)
    where = dict(cu_seqlens=layout.offsets([2, 3]), max_seqlen=3)
    harmless = dict(sliding_window=None, dropout=0.0, softcap=None, s_aux=None, position_ids=None)
    for scaling in (None, 0.1):  # Granite and Gemma have one of their own
        out, _ = patch._attention(nn.Identity(), *qkv, None, scaling, **where, **harmless)
        expected = layout.varlen_attention(*(x[0] for x in qkv), where["cu_seqlens"], 3, scaling)
        assert torch.equal(out[0], expected.transpose(0, 1))
    with pytest.raises(NotImplementedError, match=asked):
        patch._attention(nn.Identity(), *qkv, None, **where, **harmless | options)
    with pytest.raises(TypeError, match="no cu_seqlens"):
        patch._attention(nn.Identity(), *qkv, None)


def test_models_with_a_window_dropout_or_capped_scores_are_refused():
    ids = torch.ones(1, 4, dtype=torch.long)
    window, capped, dropout = tiny("Mistral"), tiny("Gemma2"), tiny("Llama")
    dropout.config.attention_dropout = 0.1
    for module in dropout.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1
    for model, asked in (
        (window, "sliding_window"),
        (capped, "softcap"),
        (dropout.train(), "dropout"),
    ):
        with pytest.raises(NotImplementedError, match=asked), without_padding(model):
            model(ids)
    with without_padding(dropout.eval()):  # where nothing is dropped
        model(ids)


def test_a_model_without_position_ids_is_refused():
    model = tiny("Llama")
    model.forward = lambda input_ids, **options: None
    with pytest.raises(TypeError, match="takes no position_ids"), without_padding(model):
        pass


def test_labels_never_cross_an_end():
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]]).bool()
    labels = torch.tensor([[4, 5, 6], [7, 8, 9]])
    assert following(labels, mask).tolist() == [5, -100, -100, 8, 9, -100]


# Pictures


def test_bins_are_drawn_as_they_fill():
    lengths = [3, 9, 4, 3, 7]
    ways = {
        name: pictures.falls(packer, lengths, 10)
        for name, packer in (("next", packers.next_fit), ("best", packers.best_fit))
    }
    assert ways["next"] == [(0, 0), (1, 1), (2, 2), (2, 3), (3, 4)]
    assert ways["best"] == [(0, 0), (1, 1), (0, 2), (0, 3), (2, 4)]
    figure, empty = Figure(), Figure()
    pictures.draw_bins(figure, ways, lengths, 10, 4)
    pictures.draw_bins(empty, ways, lengths, 10, 0)
    bars = [
        [(bar.get_center()[0], bar.get_y(), bar.get_height()) for bar in ax.patches]
        for ax in figure.axes
    ]
    expected = [[(0, 0, 3), (1, 0, 9), (2, 0, 4), (2, 4, 3)], [(0, 0, 3), (1, 0, 9), (0, 3, 4), (0, 7, 3)]]  # fmt: skip
    for found, right in zip(bars, expected, strict=True):
        assert torch.allclose(torch.tensor(found).double(), torch.tensor(right).double())
    for ax in figure.axes:
        colors = [bar.get_facecolor() for bar in ax.patches]
        assert colors == [to_rgba(COLORS[0])] * 3 + [to_rgba(COLORS[1])]
        assert ax.get_xlim()[1] == pytest.approx(3.6) and ax.lines[0].get_ydata()[0] == 10
    titles = [ax.get_title() for ax in (*figure.axes, *empty.axes)]
    assert titles[:2] == ["next: 3 bins, 63% full", "best: 2 bins, 95% full"]
    assert titles[2:] == ["next: 0 bins, 0% full", "best: 0 bins, 0% full"]


def test_packers_are_drawn_by_their_empty_places():
    found = {
        "one": {"efficiency": 0.75, "seconds": 2.0},
        "other": {"efficiency": 0.5, "seconds": 3.0},
    }
    figure = experiment.draw_packers(found)
    widths = [[bar.get_width() for bar in ax.patches] for ax in figure.axes]
    assert widths == [[25, 50], [2, 3]]


# The experiment


def test_rows_of_all_ways_hold_the_same_tokens():
    parts = sequences([5, 9, 3, 7])
    rows = experiment.arrange(parts, 16)
    counts = {
        name: sum(int((y != -100).sum()) for _, y, _ in batches) for name, batches in rows.items()
    }
    assert set(counts.values()) == {20}
    shapes = {name: [tuple(x.shape) for x, _, _ in batches] for name, batches in rows.items()}
    assert shapes == {"padded": [(4, 9)], "unpadded": [(24,)], "packed": [(16,), (8,)]}


def test_ways_to_arrange_a_batch_have_one_loss_and_one_gradient():
    torch.manual_seed(0)
    model = experiment.decoder(50, 32, 2, 4).double()
    parts = sequences([5, 9, 3, 7])
    found = {}
    for name, batches in experiment.arrange(parts, 16).items():
        loss = experiment.mean_loss(model, batches)
        loss.backward()
        found[name] = [loss.detach(), *(p.grad.clone() for p in model.parameters())]
        model.zero_grad()
    for values in found.values():
        for ours, right in zip(values, found["padded"], strict=True):
            assert torch.allclose(ours, right, rtol=0, atol=1e-12)


def test_losses_are_added_up_in_single_precision_or_better():
    """2048 losses of ln 50 each: added in bfloat16, they would stop at a power of two."""
    torch.manual_seed(0)
    model = experiment.decoder(50, 32, 1, 2).bfloat16()
    with torch.no_grad():
        model.head.weight.zero_()
        loss = experiment.mean_loss(model, experiment.arrange(sequences([2049]), 4096)["padded"])
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(math.log(50), rel=1e-5)


def test_a_training_takes_a_batch_a_step_and_the_mean_of_the_last_quarter(monkeypatch):
    """Adam moves a weight whose gradient is always 1 by its rate in each step, so that every loss is known."""
    asked = []

    def batch_of(number):
        asked.append(number)
        return {"padded": 0.0, "packed": 1.0}

    def loss(model, batches):
        return batches * model.norm.weight[0]

    monkeypatch.setattr(experiment, "mean_loss", loss)
    found = experiment._train(experiment.decoder(50, 32, 1, 2).double(), "packed", batch_of, 8, 2)
    assert asked == list(range(2000, 2008)) and found == pytest.approx(1 - 6.5e-3, abs=1e-9)
    found = experiment._train(experiment.decoder(50, 32, 1, 2).double(), "packed", batch_of, 2, 2)
    assert found == pytest.approx(1 - 1e-3, abs=1e-9)  # of two steps the last


def test_long_functions_are_dropped_or_split():
    kept, pieces = experiment.functions(300), experiment.functions(300, "split")
    assert max(map(len, kept)) <= 300 and max(map(len, pieces)) == 300
    everything = experiment.functions(10**6)
    assert sum(map(len, kept)) == sum(len(x) for x in everything if len(x) <= 300)
    # Split, all tokens are there but for pieces of one, which have nothing to predict.
    ones = sum(len(x) % 300 == 1 for x in everything)
    assert sum(map(len, pieces)) == sum(map(len, everything)) - ones
    assert all(x[-1] == 256 for x in kept)
    with pytest.raises(ValueError, match="got 'error'"):
        experiment.functions(300, "error")


def test_operations_are_those_that_pytorch_counts():
    """Its counter has all pairs of a masked attention, and ours the half that a causal kernel computes."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    for core, share in ((layout.attend_each, 2), (experiment.no_attention, 0)):
        model = experiment.decoder(50, 32, 3, 4, core)
        for batches in experiment.arrange(sequences([5, 9, 3, 7]), 16).values():
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                for tokens, _, cu in batches:
                    model(tokens, cu_seqlens=cu)
            linear = experiment.operations(model, batches, attention=False)
            pairs = experiment.operations(model, batches) - linear
            assert counter.get_total_flops() == linear + share * pairs


def test_attention_switched_off_computes_each_token_by_itself():
    model = experiment.decoder(50, 32, 2, 4, experiment.no_attention).double()
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    found = model(tokens)
    assert (found[0, 1] - found[0, 3]).abs().max() < 1e-14
    assert (model(tokens[:, 4:])[0, 0] - found[0, 4]).abs().max() < 1e-14


def test_ways_are_compared_with_the_first(monkeypatch):
    """With a clock that says what each way takes: the medians, quartiles and quotients are as written."""
    from noise2tokens.benchmark import Timing

    model, ways = experiment.decoder(50, 32, 1, 2), experiment.arrange(sequences([8, 4]), 8)
    gradients = []
    model.head.weight.register_hook(gradients.append)
    found, base = iter([4, 1, 3, 2, 5]), iter([2.0, 1.0, 9.0, 2.0, 3.0])

    def compare(calls, *, device, seconds, rounds):
        assert list(calls) == list(ways) and seconds == 2 and rounds == 3
        for number, call in enumerate(calls.values(), len(gradients) + 1):  # forward and backward
            call()
            assert len(gradients) == number and all(p.grad is None for p in model.parameters())
        ratio = dict(zip(calls, (1.0, next(found) / 10, 0.25), strict=True))
        padded = next(base)
        return {name: Timing(padded * ratio[name], 0.0, 0.0, ratio[name], 3) for name in calls}

    monkeypatch.setattr(experiment, "compare", compare)
    rows = experiment.compare_ways(model, ways, torch.device("cpu"), 10.0, comparisons=5)
    padded, row = rows["padded"], rows["unpadded"]
    assert padded["work"] == padded["FLOPs"] == padded["time"] == padded["time / FLOPs"] == 1
    assert row["work"] == 12 / 16 and 80 / 128 < row["FLOPs"] < 12 / 16
    assert (row["low"], row["time"], row["high"]) == (0.2, 0.3, 0.4)
    assert row["time / FLOPs"] == pytest.approx(0.3 / row["FLOPs"])
    assert padded["tokens a second"] == 12 / 2 and row["tokens a second"] == pytest.approx(12 / 0.6)


def test_values_of_a_slice_of_full_scale(monkeypatch):
    arranged, arrange = [], experiment.arrange

    def recorded(parts, capacity):
        arranged.append(tuple(map(len, parts)))
        return arrange(parts, capacity)

    timed, compare_ways = [], experiment.compare_ways

    def watched(model, *rest, **options):
        timed.append((model.blocks[1].attention.core, model.head.weight.dtype))
        return compare_ways(model, *rest, **options, comparisons=3)

    def slowly(lengths, capacity):
        time.sleep(0.05)
        return packers.next_fit(lengths, capacity)

    monkeypatch.setitem(packers.PACKERS, "next fit", slowly)
    monkeypatch.setattr(experiment, "arrange", recorded)
    monkeypatch.setattr(experiment, "compare_ways", watched)
    results, pictures = experiment.full_scale(
        torch.device("cpu"), seed=0, million=3000, capacity=64, batch=8, width=32, layers=2, heads=2, seeds=2, steps=3,
        seconds=0.05,
    )  # fmt: skip
    assert results["packers"].keys() == packers.PACKERS.keys()
    used = {name: row["efficiency"] for name, row in results["packers"].items()}
    assert used["next fit"] < used["first fit"] <= used["best fit, decreasing"] + 0.01 <= 1.01
    assert all(row["seconds"] > 0 for row in results["packers"].values())
    assert results["packers"]["next fit"]["seconds"] >= 0.05
    cores = (layout.attend_each, experiment.no_attention)
    assert timed == [(core, torch.float32) for core in cores]
    ways, shares = results["ways"], results["batch"]
    three = {"padded", "unpadded", "packed"}
    assert ways.keys() == three | {f"{name}, attention off" for name in three}
    for name, row in ways.items():
        assert row["tokens a second"] > 0 and row["low"] <= row["time"] <= row["high"]
        if not name.startswith("padded"):
            assert row["work"] == pytest.approx(shares["tokens"]) and row["work"] < 0.9
            least = shares["tokens"] if "off" in name else shares["pairs"]
            assert least <= row["FLOPs"] + 1e-12 and row["FLOPs"] <= row["work"] + 1e-12
            assert ("off" in name) == (row["FLOPs"] == pytest.approx(row["work"]))
    assert shares["tokens"] ** 2 < shares["pairs"] < shares["tokens"]
    curves = results["losses"]
    assert curves.keys() == three and all(len(runs) == 2 for runs in curves.values())
    for name in ("unpadded", "packed"):
        assert curves[name] == pytest.approx(curves["padded"], rel=1e-5)
    # The batch that is timed is the first of the first training; each way sees the same, and each seed others.
    assert len(arranged) == 1 + 3 * 2 * 3 and len(set(arranged)) == 2 * 3
    assert len(pictures) == 1
