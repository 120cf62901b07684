"""The cheap pass says what the full pass says, on every architecture, and does a fraction of its work.

That it is another way and not the same one is counted, block by block; what it would say if it were wrong is
the control of each test.
"""

from concurrent.futures import ThreadPoolExecutor

import peft
import pytest
import torch

from baft.errors import UnsupportedHostError
from baft.hosts.architecture import Site, find_architecture, intervention_dtype
from baft.hosts.encoding import EncodedEdit, Encoder
from baft.hosts.models import Host
from baft.hosts.passes import FullPass, Pass
from baft.hosts.patches import DeltaPatch, down_projection, weight_shape
from baft.hosts.positions import PositionSpec
from baft.hosts.suffix import LEAST_SHARED, SuffixPass, quickest_pass, sites_below
from baft.methods.key_value import AddAt, with_patch
from baft.nn.losses import target_cross_entropy
from tiny import (
    CHATML,
    D_MODEL,
    HOSTS,
    N_LAYERS,
    SLIDING_WINDOW,
    half_open_part,
    open_part,
    random_ids,
    shared_host,
    tiny_host,
    tiny_tokenizer,
)

FAMILIES = ["gpt2", "llama", "mistral", "gemma3_text", "mixtral"]
SITES = {
    "first": (Site(0),),
    "middle": (Site(1),),
    "last": (Site(N_LAYERS - 1),),
    "first and last": (Site(0), Site(N_LAYERS - 1)),
    "all": tuple(Site(layer) for layer in range(N_LAYERS)),
}
PEFT_IS_BEHIND = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def as_host(model):
    return Host("tiny", model, tiny_tokenizer(chat_template=CHATML), "a tiny random host")


@pytest.fixture(params=HOSTS, ids=lambda pair: "-".join(pair), scope="module")
def host(request):
    return as_host(shared_host(*request.param))


def texts():
    """Raw and chat prompts side by side, shorter than three tokens and longer than a sliding window; targets
    of one token and of several.
    """
    ids = random_ids(6, 30, seed=3).tolist()
    encoder = Encoder(tiny_tokenizer(chat_template=CHATML))
    lengths = [(9, 3), (2, 2), (1, 1), (20, 1), (SLIDING_WINDOW + 5, 4)]
    found = [
        EncodedEdit(tuple(row[:n]), tuple(row[n : n + m])) for row, (n, m) in zip(ids, lengths, strict=False)
    ]
    found += [encoder.edit("Who", "of it", chat=chat, eos=True) for chat in (False, True)]
    assert min(len(text.prompt_ids) for text in found) == 1
    assert max(len(text.prompt_ids) for text in found) > 2 * SLIDING_WINDOW
    assert {text.is_chat for text in found} == {False, True}
    return found


def both(host, sites, *, positions=None, given=None):
    """The full pass and the cheap one."""
    encoder = Encoder.for_host(host)
    asked = (host, encoder, positions or PositionSpec(), given or texts(), sites)
    return FullPass(*asked), SuffixPass(*asked)


def trained(host, sites):
    """A part with a gradient at each site, a half open one beside it at the first."""
    dtype = intervention_dtype(host.model)
    parts = {site: (open_part(seed=site.layer, dtype=dtype).requires_grad_(True),) for site in sites}
    return {**parts, sites[0]: (half_open_part(host.model, sites[0], seed=7), *parts[sites[0]])}


def measured(run: Pass, parts, own=None):
    """Logits, the loss, and its gradient for everything that asks for one."""
    parts_of = [part for one in parts.values() for part in one] + list((own or ({},))[0].values())
    wanted = [p for part in parts_of for p in part.parameters() if p.requires_grad]
    with torch.enable_grad():
        shown = run(parts, own)
        loss = target_cross_entropy(shown.logits, run.targets, run.rows)
    return shown, loss.detach(), torch.autograd.grad(loss, wanted)


def off(a, b):
    """How far apart two tensors are, in units of the larger of all their entries."""
    a, b = a.detach(), b.detach()
    return float((a - b).abs().max() / a.abs().max())


def tolerance(host):
    """Of float64 the issue's; eager hosts are float32 here, whose rounding passes through three blocks."""
    return {torch.float64: 1e-9, torch.float32: 2e-5}[host.model.dtype]


def check_the_same(full, quick, parts, tolerance, own=None):
    one, other = measured(full, parts, own), measured(quick, parts, own)
    assert torch.equal(full.targets, quick.targets)
    assert torch.equal(full.rows, quick.rows)
    assert off(one[1], other[1]) < tolerance
    assert off(one[0].logits, other[0].logits) < tolerance
    assert len(one[2]) == len(other[2]) > 0
    for a, b in zip(one[2], other[2], strict=True):
        assert float(a.abs().max()) > 0
        assert off(a, b) < tolerance
    assert torch.equal(full.state_rows, quick.state_rows)
    assert torch.equal(full.state_offsets, quick.state_offsets)
    assert torch.equal(one[0].state_rows, other[0].state_rows)
    before, after = full.states(), quick.states()
    assert before.keys() == after.keys()
    for site in before:
        assert off(before[site], after[site]) < tolerance
        assert off(one[0].states[site], other[0].states[site]) < tolerance
    return one, other


def n_hooks(model):
    return sum(len(one._forward_hooks) + len(one._forward_pre_hooks) for one in model.modules())


@pytest.mark.parametrize("where", SITES)
def test_the_loss_and_every_gradient_are_the_full_pass_s(host, where):
    sites = SITES[where]
    full, quick = both(host, sites)
    assert isinstance(full, Pass)
    assert isinstance(quick, Pass)
    parts = trained(host, sites)
    one, _ = check_the_same(full, quick, parts, tolerance(host))
    other = open_part(seed=9, dtype=parts[sites[0]][0].R.dtype).requires_grad_(True)
    wrong = measured(quick, {sites[0]: (other,)})
    assert off(one[0].logits, wrong[0].logits) > 1e-2  # control: what is in force makes a difference
    assert n_hooks(host.model) == 0


@pytest.mark.parametrize(
    "positions", [PositionSpec(3, False), PositionSpec(1), PositionSpec(0), PositionSpec(50)], ids=str
)
def test_whatever_tokens_are_edited(host, positions):
    full, quick = both(host, (Site(1),), positions=positions)
    parts = trained(host, (Site(1),))
    one, _ = check_the_same(full, quick, parts, tolerance(host))
    usual = measured(both(host, (Site(1),))[1], parts)
    assert off(one[0].logits, usual[0].logits) > 1e-2  # control
    assert set(quick.state_offsets.tolist()) != set(both(host, (Site(1),))[1].state_offsets.tolist())


def test_every_row_may_have_a_block_of_its_own(host):
    sites = (Site(0), Site(2))
    full, quick = both(host, sites)
    dtype = intervention_dtype(host.model)
    layers = {site: open_part(seed=site.layer, dtype=dtype).requires_grad_(True) for site in sites}
    blocks = torch.arange(len(texts())) % 2
    beside = {Site(0): (half_open_part(host.model, Site(0)),)}
    one, _ = check_the_same(full, quick, beside, tolerance(host), own=(layers, blocks))
    swapped = measured(quick, beside, own=(layers, 1 - blocks))
    assert off(one[0].logits, swapped[0].logits) > 1e-2  # control


@pytest.mark.parametrize("kept", [[0], [3, 1], [1, 2], [6, 5, 4, 3, 2, 1, 0], [1]], ids=str)
def test_some_of_the_texts(host, kept):
    """In any order; without the longest, and with short prompts alone, whose prefix is empty."""
    sites, rows = (Site(0), Site(1)), torch.tensor(kept)
    full, quick = both(host, sites)
    parts, less = trained(host, sites), quick.select(rows)
    check_the_same(full.select(rows), less, parts, tolerance(host))
    check_the_same(both(host, sites, given=[texts()[row] for row in kept])[0], less, parts, tolerance(host))
    longest = max(len(text.prompt_ids) - 3 for text in (texts()[row] for row in kept))
    assert int(less.n_left_out.max()) == max(longest, 0) == less._prefix[1][0].shape[2]
    again = torch.arange(len(kept) - 1, -1, -1)
    check_the_same(full.select(rows[again]), less.select(again), parts, tolerance(host))
    check_the_same(full, quick, parts, tolerance(host))  # and the whole is what it was
    other = quick.select((rows + 1) % len(texts()))  # control
    assert other.targets.tolist() != less.targets.tolist()


def alike(n_shared):
    """Texts of unequal length that begin alike: the first one raw and alone, the others as chats."""
    ids = random_ids(1, 60, seed=5)[0].tolist()
    shared, rests = tuple(ids[:n_shared]), ids[n_shared:]
    found = [EncodedEdit((*shared, *rests[:4]), (7, 8))]
    for n in (3, 9, 5):
        found.append(EncodedEdit((*shared, n, *rests[:n]), tuple(rests[n : n + 3]), is_chat=True))
    return found


@pytest.mark.parametrize("n_shared", [0, LEAST_SHARED - 1, LEAST_SHARED, 2 * SLIDING_WINDOW + 3])
def test_what_texts_begin_with_is_run_once(host, n_shared):
    sites = (Site(0), Site(1))
    parts = trained(host, sites)
    with Counter(block=find_architecture(host.model).blocks[0]) as shown:
        full, quick = both(host, sites, given=alike(n_shared))
    sharing = n_shared >= LEAST_SHARED
    lengths = [len(text.prompt_ids) + len(text.target_ids) - 1 for text in alike(n_shared)]
    rest = 3 * (max(lengths[1:]) - n_shared)
    want = [n_shared, rest] if sharing else [3 * max(lengths[1:])]
    assert shown == {"block": [lengths[0], *want]}
    one, _ = check_the_same(full, quick, parts, tolerance(host))
    other = measured(both(host, sites, given=alike(n_shared + 1))[1], parts)  # control
    assert one[0].logits.shape == other[0].logits.shape
    assert off(one[0].logits, other[0].logits) > 1e-2


def test_more_texts_than_the_first_pass_takes_at_once(monkeypatch):
    monkeypatch.setattr("baft.hosts.suffix._ROWS_AT_ONCE", 3)
    host = as_host(shared_host("mistral"))
    sizes = []
    handle = host.model.register_forward_pre_hook(
        lambda _, __, named: sizes.append(tuple(named["input_ids"].shape)), with_kwargs=True
    )
    try:
        asked = (host, Encoder.for_host(host), PositionSpec(), texts(), (Site(0),))
        SuffixPass(*asked)
    finally:
        handle.remove()
    full, quick = both(host, (Site(0),))
    assert [rows for rows, _ in sizes] == [3, 3, 1]
    assert sizes[0][1] < sizes[1][1] < sizes[2][1]  # by length, so that little of it is padding
    check_the_same(full, quick, trained(host, (Site(0),)), 1e-9)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_hosts_in_half_precision(family, dtype):
    """Within their rounding, 2 ** -8 and 2 ** -11 a number: gradients by direction and length."""
    host = as_host(tiny_host(family, dtype=dtype))
    sites = (Site(0), Site(1))
    full, quick = both(host, sites)
    parts = trained(host, sites)
    one, other = measured(full, parts), measured(quick, parts)
    wrong = measured(quick, {**parts, Site(1): trained(host, (Site(1),))[Site(1)]})  # control
    rounding = {torch.bfloat16: 0.04, torch.float16: 0.005}[dtype]
    assert one[0].logits.dtype == other[0].logits.dtype == dtype
    assert off(one[0].logits, other[0].logits) < rounding < off(one[0].logits, wrong[0].logits)
    for a, b in zip(one[2], other[2], strict=True):
        assert a.dtype == torch.float32
        assert float((a - b).norm() / a.norm()) < 6 * rounding


@PEFT_IS_BEHIND
@pytest.mark.parametrize("how", ["get_peft_model", "add_adapter"])
def test_a_host_that_wears_an_adapter(how):
    plain = tiny_host("llama")
    targets = ["q_proj", "v_proj"]
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if how == "add_adapter":
            plain.add_adapter(config)
        model = plain if how == "add_adapter" else peft.get_peft_model(plain, config)
    host = as_host(model.double().eval())
    assert any(weight.requires_grad for weight in model.parameters())
    parts = trained(host, (Site(0),))
    one, _ = check_the_same(*both(host, (Site(0),)), parts, 1e-9)
    bare = measured(both(as_host(shared_host("llama")), (Site(0),))[1], parts)
    assert off(one[1], bare[1]) > 1e-3  # control: the adapter does something
    assert all(weight.grad is None for weight in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_host_whose_weights_ask_for_gradients(dtype):
    """They get none, and keep asking."""
    host = as_host(tiny_host("llama", dtype=dtype).requires_grad_(True))
    full, quick = both(host, (Site(0),))
    parts = trained(host, (Site(0),))
    _, other = check_the_same(full, quick, parts, tolerance(host))
    frozen = measured(both(as_host(tiny_host("llama", dtype=dtype)), (Site(0),))[1], parts)
    assert all(off(a, b) < tolerance(host) for a, b in zip(frozen[2], other[2], strict=True))
    assert all(weight.grad is None and weight.requires_grad for weight in host.model.parameters())
    assert not any(state.requires_grad for state in quick.states().values())


# --- modules inside blocks


@pytest.mark.parametrize("layer", range(1, N_LAYERS))
@pytest.mark.parametrize("kind", ["block", "down-projection"])
@pytest.mark.parametrize("whole", [False, True], ids=["part of the prompts", "all of them"])
def test_modules_may_be_patched_above_the_first_site_and_below_it(host, layer, kind, whole):
    """What is in force below comes with the first pass; what is trained above is reached by gradients."""
    dtype, device = intervention_dtype(host.model), host.model.device
    if "Mixtral" in type(host.model).__name__:  # experts, and no matrix of the whole part
        with pytest.raises(UnsupportedHostError, match="0 down-projections"):
            down_projection(host.model, layer)
        return
    down = {i: down_projection(host.model, i) for i in range(N_LAYERS)}
    generator = torch.Generator().manual_seed(layer)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    shapes = {i: weight_shape(host.model.get_submodule(name)) for i, name in down.items()}
    there = {down[i]: DeltaPatch([(0.3 * normal(shapes[i][0], 2), normal(2, shapes[i][1]))]) for i in down}
    block = find_architecture(host.model).blocks[layer]
    name = next(name for name, one in host.model.named_modules() if one is block)
    module = name if kind == "block" else down[layer]
    lengths = torch.tensor([len(text.prompt_ids) for text in texts()])
    places = (lengths - torch.tensor([4, 1, 1, 2, 3, 1, 3])).clamp(min=0)
    vectors = normal(len(places), D_MODEL).requires_grad_()
    reach = int(lengths.max() if whole else (lengths - places).max())
    asked = (host, Encoder.for_host(host), PositionSpec(), texts(), sites_below(Site(layer)))
    full = FullPass(*asked)
    quick = SuffixPass(*asked, reach=reach, patches=there)
    assert int(quick.n_left_out.max()) == int(lengths.max()) - reach
    assert whole == (not quick.n_left_out.any())
    assert full.n_left_out.tolist() == [0] * len(places)

    def told(run, patches):
        at = AddAt(vectors, torch.arange(len(places)), places - run.n_left_out)
        run.edited.patches = with_patch(patches, module, at)
        with torch.enable_grad():
            shown = run({})
            loss = target_cross_entropy(shown.logits, run.targets, run.rows)
        return shown.logits, torch.autograd.grad(loss, vectors)[0]

    one, other = told(full, there), told(quick, there)
    assert off(one[0], other[0]) < tolerance(host)
    assert off(one[1], other[1]) < tolerance(host)
    # In the last block, only the last token of a prompt reaches what is predicted.
    reached = [layer + 1 < N_LAYERS or place + 1 == n for place, n in zip(places, lengths, strict=True)]
    assert (one[1].abs().amax(-1) > 0).tolist() == reached
    less = {name: patch for name, patch in there.items() if name != down[0]}  # controls
    assert off(one[0], told(SuffixPass(*asked, reach=reach, patches=less), less)[0]) > 1e-2
    assert off(one[0], told(quick, less)[0]) < tolerance(host)  # it is in the first pass
    quick.edited.patches = there
    assert off(one[0], quick({}).logits) > 1e-2  # without the vectors


def test_a_first_block_edited_inside_takes_the_whole_pass():
    host = as_host(shared_host("llama"))
    asked = (host, Encoder.for_host(host), PositionSpec(), texts())
    down = down_projection(host.model, 0)
    d_out, d_in = weight_shape(host.model.get_submodule(down))
    there = {down: DeltaPatch([torch.ones(d_out, d_in, dtype=host.model.dtype)])}
    run, why = quickest_pass(*asked, sites_below(Site(0)), patches=there)
    assert isinstance(run, FullPass)
    assert why == "its first block is edited inside"
    assert run.edited.patches == there
    run, why = quickest_pass(*asked, sites_below(Site(1)), patches=there)  # control
    assert isinstance(run, SuffixPass)
    assert why is None


# --- what it costs


class Counter:
    """How many tokens each module was shown, and how often, by hooks of our own."""

    def __init__(self, **modules):
        self.shown = {name: [] for name in modules}
        self._handles = [
            one.register_forward_pre_hook(self._note(name), with_kwargs=True) for name, one in modules.items()
        ]

    def _note(self, name):
        def hook(_, args, named):
            x = next(x for x in (*args, *named.values()) if isinstance(x, torch.Tensor))
            self.shown[name].append(x.shape[0] * x.shape[1])

        return hook

    def __enter__(self):
        return self.shown

    def __exit__(self, *_):
        for handle in self._handles:
            handle.remove()


@pytest.mark.parametrize("first", range(N_LAYERS))
def test_a_step_runs_the_blocks_above_over_edited_tokens_and_the_head_over_targets(host, first):
    full, quick = both(host, (Site(first),))
    parts = trained(host, (Site(first),))
    blocks = find_architecture(host.model).blocks
    modules = {f"block{i}": block for i, block in enumerate(blocks)}
    modules["head"] = host.model.get_output_embeddings()
    with Counter(**modules) as shown:
        measured(quick, parts)
    n_rows, width = len(texts()), max(min(len(t.prompt_ids), 3) + len(t.target_ids) - 1 for t in texts())
    want = {f"block{i}": [n_rows * width] if i > first else [] for i in range(N_LAYERS)}
    assert shown == {**want, "head": [len(quick.targets)]}
    with Counter(**modules) as shown:
        measured(full, parts)
    longest = max(len(t.prompt_ids) + len(t.target_ids) - 1 for t in texts())  # control
    assert all(shown[f"block{i}"] == [n_rows * longest] for i in range(N_LAYERS))
    assert shown["head"][0] >= len(quick.targets)
    with Counter(**modules) as shown:
        quick.states()
    assert not any(shown.values())  # they are known from the first pass


# --- the host's other users


@pytest.mark.parametrize("changed", [0, 1, 2], ids=["the first site", "above it", "a later site"])
def test_other_people_s_hooks_fire_and_stay(changed):
    host = as_host(shared_host("llama"))
    architecture = find_architecture(host.model)
    calls = dict.fromkeys(("host", "stack", "block 0", "block 1", "change"), 0)

    def count(name):
        def hook(*_):
            calls[name] += 1

        return hook

    def change(_, __, output):
        calls["change"] += 1
        return (output[0].flip(-1), *output[1:]) if isinstance(output, tuple) else output.flip(-1)

    sites = (Site(0), Site(2))
    parts = trained(host, sites)
    bare = measured(both(host, sites)[1], parts)
    handles = [
        host.model.register_forward_hook(count("host")),
        architecture.stack.register_forward_pre_hook(count("stack")),
        architecture.blocks[0].register_forward_hook(count("block 0")),
        architecture.blocks[1].register_forward_hook(count("block 1")),
        architecture.blocks[changed].register_forward_hook(change),
    ]
    try:
        n = n_hooks(host.model)
        full, quick = both(host, sites)
        before = dict(calls)
        shown = measured(quick, parts)
        # Block 0 is not run, but what it put out is shown again.
        assert {name: calls[name] - before[name] for name in calls} == dict.fromkeys(calls, 1)
        want = measured(full, parts)
        assert off(want[1], shown[1]) < 1e-9
        for site in sites:
            assert off(full.states()[site], quick.states()[site]) < 1e-9
        assert off(want[1], bare[1]) > 1e-3  # control: the hook changes what the host says
        assert n_hooks(host.model) == n
    finally:
        for handle in handles:
            handle.remove()
    assert n_hooks(host.model) == 0


@pytest.mark.parametrize("where", ["the first pass", "a step"])
def test_nothing_is_left_on_the_host_when_it_breaks_off(where, monkeypatch):
    host = as_host(shared_host("llama"))
    names = {id(one): list(one._modules) for one in host.model.modules()}
    _, quick = both(host, (Site(0),))
    parts = trained(host, (Site(0),))

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = find_architecture(host.model).blocks[2].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        both(host, (Site(0),)) if where == "the first pass" else quick(parts)
    handle.remove()
    assert n_hooks(host.model) == 0
    assert {id(one): list(one._modules) for one in host.model.modules()} == names
    check_the_same(*both(host, (Site(0),)), parts, 1e-9)


def test_the_host_itself_stays_whole():
    """A copy is taken apart: in a step, and after it, the host runs all of its blocks and its own head."""
    host = as_host(shared_host("gemma3_text"))
    ids = random_ids(2, 9)
    want = host.model(ids).logits
    _, quick = both(host, (Site(1),))
    quick(trained(host, (Site(1),)))
    assert torch.equal(host.model(ids).logits, want)
    assert quick._trunk_of.view is not host.model
    view = quick._trunk_of.view
    own = {id(p) for p in host.model.parameters()}
    assert {id(p) for p in view.parameters()} <= own
    with pytest.raises(AttributeError, match="trunk"):  # control: the copy runs no host, only a step
        both(host, (Site(1),))[1]._trunk_of.view(ids)


def test_two_threads_run_passes_on_one_host():
    host = as_host(shared_host("llama"))
    jobs = []
    for sites in (SITES["first"], SITES["last"], SITES["all"]):
        parts = trained(host, sites)
        jobs.append(lambda sites=sites, parts=parts: measured(both(host, sites)[1], parts))
        jobs.append(lambda sites=sites, parts=parts: measured(both(host, sites)[0], parts))
    want = [job() for job in jobs]
    for _ in range(3):
        with ThreadPoolExecutor(len(jobs)) as pool:
            got = list(pool.map(lambda job: job(), jobs))
        for one, other in zip(want, got, strict=True):
            assert torch.equal(one[1], other[1])
            assert all(torch.equal(a, b) for a, b in zip(one[2], other[2], strict=True))
    assert len({float(one[1]) for one in want[::2]}) == 3  # control: they are not all the same
    assert n_hooks(host.model) == 0


def test_a_host_that_keeps_no_keys_is_refused():
    host = as_host(tiny_host("llama"))
    attention = find_architecture(host.model).blocks[1].self_attn
    forward = attention.forward
    attention.forward = lambda *args, **named: forward(*args, **{**named, "past_key_values": None})
    with pytest.raises(UnsupportedHostError, match="layer 1 of this host keeps no keys of every token"):
        both(host, (Site(0),))
    both(host, (Site(1),))  # control: a layer below the first edited one need not
