"""Sampling: the released greedy tokens, the cache, the noise that depends on nothing but its key."""


from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import erv_min.generate as generation
from erv_min import decoding
from erv_min.base.errors import SettingsError
from erv_min.decoding import Decoder, unfinished
from erv_min.generate import generate, rollout, sample_token, sampling_noise
from erv_min.logps import Prompts, completion_logps, shared_prefix_hidden
from erv_min.model.attention import GroupCache
from erv_min.train.hooks import sample
from erv_min.train.settings import GRPOSettings
from tiny import plain_rollout, tiny_model, tiny_prompts


class FakeCuda(torch.Tensor):
    is_cuda = True


@pytest.mark.parametrize("lengths", [(7, 7), (3, 7)])
def test_cache_on_and_off_sample_the_same(lengths):
    model = tiny_model(3)
    noise = sampling_noise(5, 0, [4, 9], 3, 12)
    on, off = (sample(model, tiny_prompts(model, lengths), 3, 12, eos_token_id=17, noise=noise)
               for sample in (rollout, plain_rollout))
    assert torch.equal(on.ids, off.ids) and torch.equal(on.mask, off.mask)
    assert len({tuple(row.tolist()) for row in on.ids}) > 3  # it did sample, and rows differ


@pytest.mark.parametrize("lengths, every", [((7,), 1), ((7, 7, 7), 1), ((3, 7, 5), 1), ((7,), 8), ((3, 7, 5), 8)])
def test_dropping_finished_rows_samples_the_same(monkeypatch, lengths, every):
    """Token 17 made likely, so that rows end at many steps: the plain loop's tokens, on fewer and fewer rows, also if
    only each eighth token is looked at, as on CUDA."""
    model = tiny_model(3)
    monkeypatch.setitem(generation.LOOKS, "cpu", every)
    monkeypatch.setattr(decoding, "WINDOW", 4)
    sample = generation.sample_token
    monkeypatch.setattr(generation, "sample_token", lambda logits, *args: sample(  # a bias on one token's logit
        logits + 4.5 * torch.nn.functional.one_hot(torch.tensor(17), logits.shape[1]), *args))
    rows = []
    run = Decoder.run
    monkeypatch.setattr(Decoder, "run", lambda self, last: rows.append(len(last)) or run(self, last))
    noise = sampling_noise(5, 0, list(range(len(lengths))), 8, 24)
    on, off = (sample(model, tiny_prompts(model, lengths), 8, 24, 17, noise) for sample in (rollout, plain_rollout))
    assert torch.equal(on.ids, off.ids) and torch.equal(on.mask, off.mask)
    assert rows[0] == 8 * len(lengths) and rows[-1] <= rows[0] // 2
    assert every == 8 or len(set(rows)) >= 3
    assert rows == sorted(rows, reverse=True)


def test_which_rows_go_on_by_hand():
    # The first prompt has rows 1 and 3 left, the second none, the third row 11 alone, which takes finished row 8 along.
    done = torch.tensor([[1, 0, 1, 0], [1, 1, 1, 1], [1, 1, 1, 0]], dtype=torch.bool)
    prompts, rows = unfinished(done)
    assert prompts.tolist() == [0, 2] and rows.tolist() == [1, 3, 11, 8]


@pytest.mark.parametrize("lengths", [(5, 5, 5), (2, 5, 4)])
def test_rows_that_go_on_keep_their_own_keys_and_their_prompts(lengths):
    """Three prompts of two rows; after a token each, row 1 of the first and row 0 of the third go on: what they see is
    what they would have seen."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    prefix, mask = [(draw(3, 2, 5, 4), draw(3, 2, 5, 4))], torch.arange(5) < torch.tensor(lengths)[:, None]
    first, second = ((draw(6, 4, 1, 4), draw(6, 2, 1, 4), draw(6, 2, 1, 4)) for _ in range(2))  # queries, keys, values
    seen, rows = [], torch.tensor([1, 4])
    for drops in (False, True):
        cache = GroupCache(prefix, mask, 2, 3)
        cache.attend(0, cache.mask_of_step(), *first)
        cache.length += 1
        if drops:
            cache.keep(torch.tensor([0, 2]), rows)
            seen.append(cache.attend(0, cache.mask_of_step(), *(x[rows] for x in second)))
        else:
            seen.append(cache.attend(0, cache.mask_of_step(), *second)[rows])
    torch.testing.assert_close(seen[1], seen[0])


@pytest.mark.parametrize("autocast", [False, True])
def test_a_bfloat16_step_attends_as_the_training_pass(autocast):
    """Real key biases put all scores of a head near -120, where bfloat16 has steps of a half: they stay float32."""
    generator = torch.Generator().manual_seed(0)
    k, v, q = (torch.randn(1, 2, 9, 64, generator=generator).bfloat16() for _ in range(3))
    q, k = (q[:, :, :1] + 8).repeat(1, 2, 1, 1), k - 15 / 8
    kept = torch.float32 if autocast else torch.bfloat16  # what rotary positions leave q and k in
    cache = GroupCache([(k[:, :, :8].to(kept), v[:, :, :8])], torch.ones(1, 8, dtype=torch.bool), 1, 3)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = cache.attend(0, cache.mask_of_step(), q.to(kept), k[:, :, 8:].to(kept), v[:, :, 8:])
    exact = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), enable_gqa=True)
    assert found.dtype == torch.bfloat16 and (found - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("length, windows, steps", [(11, [4, 8], 8), (14, [4, 8, 14], 13), (20, [4, 8, 16], 16)])
def test_replayed_steps_sample_the_same(monkeypatch, length, windows, steps):
    """The path of CUDA graphs, its capture replaced by one that runs the recorded function at each replay: buffers are
    filled in place, and shapes that change are captured again. The graphs themselves need a GPU."""
    captured, graphs, replayed = [], [], []

    def capture(function, device):
        result = torch.empty(len(decoder.last), decoder.model.head_weight.shape[0])
        captured.append(decoder.cache.window)
        graphs.append(SimpleNamespace(replay=lambda: replayed.append(result.copy_(function()))))
        return graphs[-1], result

    def on_cuda(self, last, step):
        nonlocal decoder
        decoder = self
        return next_logits(self, FakeCuda(last), step)

    decoder, next_logits = None, Decoder.next_logits
    monkeypatch.setattr(decoding, "WINDOW", 4)
    monkeypatch.setattr(decoding, "WORTH", 3)
    model = tiny_model(3)
    noise = sampling_noise(5, 0, [4, 9], 8, length)
    plain = rollout(model, tiny_prompts(model, (3, 7)), 8, length, 17, noise)
    monkeypatch.setattr(decoding, "capture", capture)
    monkeypatch.setattr(Decoder, "next_logits", on_cuda)
    again = rollout(model, tiny_prompts(model, (3, 7)), 8, length, 17, noise)
    assert torch.equal(plain.ids, again.ids)
    assert captured == windows  # each twice as long, and none for the last steps
    assert len(replayed) == steps - len(windows)


def test_a_capture_is_on_the_tensors_device(monkeypatch):
    """Of two GPUs the current one may be another: what is recorded there is nothing, and replays would be silent."""
    seen, device = [], torch.device("cuda", 1)

    def within(name):
        @contextmanager
        def block(*given):
            seen.append((name, *given))
            try:
                yield
            finally:
                seen.append(f"end {name}")
        return block

    graph = SimpleNamespace(pool=lambda: (0, 7), capture_begin=lambda *pool: seen.append(("begin", *pool)),
                            capture_end=lambda: seen.append("end"))
    free = [2**40, 2**20]
    for name, value in {"CUDAGraph": lambda: graph, "device": within("device"), "stream": within("stream"),
                        "synchronize": lambda: None, "mem_get_info": lambda: (free.pop(0), 2**41),
                        "empty_cache": lambda: seen.append("emptied")}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(decoding, "capture_stream", lambda device: ("stream of", device))
    monkeypatch.setattr(decoding, "latest", {})
    around = [("device", device), ("stream", ("stream of", device))], ["end", "end stream", "end device"]
    assert decoding.capture(lambda: seen.append("recorded"), device) == (graph, None)
    assert seen == [*around[0], ("begin",), "recorded", *around[1]]
    seen.clear()
    with pytest.raises(ZeroDivisionError):  # with little room left, in the memory of the one before
        decoding.capture(lambda: 1 / 0, device)
    assert seen == [*around[0], "emptied", ("begin", (0, 7)), *around[1]]


def collator(model) -> SimpleNamespace:
    return SimpleNamespace(model=model, tokenizer=SimpleNamespace(eos_id=17))


def test_tokens_do_not_depend_on_the_rollout_batch():
    """Noise is keyed by the prompt's place, and a prompt's rows look at nothing of another's."""
    model, places = tiny_model(3), [9, 4, 6]
    prompts = tiny_prompts(model, (3, 7, 5))
    settings = [GRPOSettings(group_size=4, max_new_tokens=12, rollout_batch=size) for size in (0, 1, 2, 3)]
    found = [sample(collator(model), prompts, places, 2, each) for each in settings]
    assert all(torch.equal(found[0].ids, other.ids) and torch.equal(found[0].mask, other.mask) for other in found)
    assert len({tuple(row.tolist()) for row in found[0].ids}) == 12
    for change in ({"seed": 1}, {"temperature": 0.7}, {"top_k": 2}):
        assert not torch.equal(sample(collator(model), prompts, places, 2, replace(settings[0], **change)).ids, found[0].ids)


def test_a_prompt_that_stands_twice_in_a_step_is_sampled_twice():
    """Fewer clips than prompts per step: each place has noise of its own."""
    model = tiny_model(3)
    one = tiny_prompts(model, (7,))
    twice = Prompts(one.embeds.repeat(2, 1, 1), one.mask.repeat(2, 1))
    ids = sample(collator(model), twice, [0, 1], 2, GRPOSettings(group_size=4, max_new_tokens=12)).ids
    assert not torch.equal(ids[:4], ids[4:])


def test_a_row_does_not_depend_on_its_batch():
    model = tiny_model(3)
    prompts = tiny_prompts(model, (7, 7, 7))
    together = rollout(model, prompts, 2, 10, 17, sampling_noise(5, 2, [10, 11, 12], 2, 10))
    for i, number in enumerate((10, 11, 12)):
        alone = rollout(model, Prompts(prompts.embeds[i : i + 1], prompts.mask[i : i + 1]), 2, 10, 17,
                        sampling_noise(5, 2, [number], 2, 10))
        width = alone.ids.shape[1]
        assert torch.equal(together.ids[2 * i : 2 * i + 2, :width], alone.ids)
        assert torch.equal(together.mask[2 * i : 2 * i + 2, :width], alone.mask)


def test_sampled_tokens_have_the_log_probs_of_the_training_pass():
    """At noise u the token is the first whose cumulative probability passes u, by the training pass's numbers."""
    model = tiny_model(3)
    prompts = tiny_prompts(model)
    noise = sampling_noise(0, 0, [0, 1], 4, 6)
    completions = rollout(model, prompts, 4, 6, 17, noise)
    rows, length = completions.ids.shape
    first, rest = shared_prefix_hidden(model, prompts, completions.ids, torch.ones(rows, length, dtype=torch.bool))
    hidden = torch.cat([first[:, None], rest.view(rows, length - 1, -1)], 1)
    probs = (hidden @ model.head_weight.T).softmax(-1)
    cumulative = probs.double().cumsum(-1)
    upper = cumulative.gather(-1, completions.ids[..., None])[..., 0]
    lower = upper - probs.gather(-1, completions.ids[..., None])[..., 0]
    u = noise[:, : completions.ids.shape[1]]
    assert ((u <= upper + 1e-5) & (u >= lower - 1e-5))[completions.mask].all()
    logps, _ = completion_logps(model, prompts, completions)
    expected = (upper - lower)[completions.mask].log()
    torch.testing.assert_close(logps[completions.mask].double(), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("temperature,top_k", [(1.0, 0), (0.5, 0), (0.5, 3)])
def test_the_samplers_log_probs_are_the_trainers_at_its_temperature(temperature, top_k):
    """log pi(o_t) at the sampling temperature from both; top-k cuts what is drawn, and neither's log-probs."""
    model = tiny_model(3)
    prompts = tiny_prompts(model, (3, 7))
    completions = rollout(model, prompts, 4, 10, 17, sampling_noise(0, 0, [0, 1], 4, 10), temperature, top_k)
    logps, _ = completion_logps(model, prompts, completions, temperature)
    torch.testing.assert_close(completions.logps, logps, atol=1e-4, rtol=0)
    assert (completion_logps(model, prompts, completions, 2.0)[0] - logps).abs().max() > 0.1


def test_noise_is_a_function_of_its_key():
    a = sampling_noise(1, 2, [3, 4], 2, 5)
    assert torch.equal(a[2:], sampling_noise(1, 2, [4], 2, 5))
    assert torch.equal(a[0], sampling_noise(1, 2, [3], 1, 9)[0, :5])
    others = [sampling_noise(*key, 1, 5) for key in ((1, 2, [5]), (1, 3, [3]), (2, 2, [3]))]
    assert all(not torch.equal(a[0], other[0]) for other in others)
    big = sampling_noise(0, 0, [0], 200, 100)
    assert 0 <= big.min() and big.max() < 1 and abs(big.mean() - 0.5) < 0.01


def test_stops_when_all_rows_are_done_and_masks_what_follows():
    model = tiny_model()
    prompts = tiny_prompts(model)
    first = rollout(model, prompts, 1, 1, -1, torch.zeros(2, 1), temperature=0).ids  # greedy first token of each prompt
    eos = first[0, 0].item()
    completions = rollout(model, prompts, 1, 8, eos, torch.zeros(2, 8), temperature=0)
    assert completions.mask[0].tolist() == [True] + [False] * (completions.mask.shape[1] - 1)  # its EOS counts
    assert (completions.ids[0] == eos).all()
    alone = rollout(model, Prompts(prompts.embeds[:1], prompts.mask[:1]), 3, 8, eos, torch.zeros(3, 8), temperature=0)
    assert alone.ids.shape == (3, 1)


def test_cuts_and_temperature_reach_the_sampler():
    """The best token alone, by top-k or by top-p, or at a temperature next to 0: what is greedy."""
    model, prompts = tiny_model(3), tiny_prompts(tiny_model(3))
    noise = sampling_noise(5, 0, [4, 9], 3, 8)
    greedy = rollout(model, prompts, 3, 8, 17, noise, temperature=0).ids
    for cut in (dict(top_k=1), dict(top_p=1e-9), dict(temperature=1e-4)):
        assert torch.equal(rollout(model, prompts, 3, 8, 17, noise, **cut).ids, greedy), cut
    assert not torch.equal(rollout(model, prompts, 3, 8, 17, noise).ids[:, :2], greedy[:, :2])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_cuts_keep_the_tokens_that_transformers_keeps(dtype):
    """In bfloat16 and in whole numbers many logits tie."""
    process = pytest.importorskip("transformers.generation.logits_process")
    draw = torch.Generator().manual_seed(0)
    noise = torch.linspace(0, 1, 200, dtype=torch.float64)[:-1]
    for case in range(300):
        size, spread, temperature, top_p = torch.rand(4, generator=draw).tolist()
        top_k = case % 7 * 3
        logits = (torch.randn(int(2 + 60 * size), generator=draw) * 6 * spread).to(dtype)
        logits = logits.round() if case % 2 else logits
        scores = logits.float()[None] / (temperature + 0.1)
        scores = process.TopKLogitsWarper(top_k)(None, scores) if top_k else scores
        probs = process.TopPLogitsWarper(top_p)(None, scores).softmax(-1)[0]
        expected = torch.searchsorted(probs.cumsum(-1, dtype=torch.float64), noise * probs.sum(dtype=torch.float64),
                                      right=True).clamp_max(len(probs) - 1)
        drawn = sample_token(logits.expand(len(noise), -1), noise, temperature + 0.1, top_k, top_p)
        assert torch.equal(drawn, expected), (case, dtype)


def test_generate_is_a_rollout_of_one_prompt():
    model, ids = tiny_model(3), torch.tensor([5, 6, 7])
    prompts = Prompts(model.model.embed_tokens(ids)[None], torch.ones(1, 3, dtype=torch.bool))
    found = []
    for temperature in (0.5, 1.0):
        for seed in (0, 1):
            noise = sampling_noise(seed, 0, [0], 4, 6)
            found.append(generate(model, ids, group_size=4, max_new_tokens=6, temperature=temperature,
                                             eos_token_id=17, seed=seed))
            assert torch.equal(found[-1], rollout(model, prompts, 4, 6, 17, noise, temperature).ids)
    assert len({tuple(x.flatten().tolist()) for x in found}) == 4


def test_generate_ends_at_the_id_that_config_json_names():
    """As released folders hold it; without one the message says which argument is missing."""
    model, ids = tiny_model(3), torch.tensor([5, 9, 7])
    expected = generate(model, ids, group_size=4, max_new_tokens=8, eos_token_id=-1)
    with pytest.raises(SettingsError, match="eos_token_id"):
        generate(model, ids, max_new_tokens=8)
    for ended in (expected[0, 2].item(), expected[1, 0].item()):
        model.config.extra["eos_token_id"] = ended
        found = generate(model, ids, group_size=4, max_new_tokens=8)
        assert torch.equal(found, generate(model, ids, group_size=4, max_new_tokens=8, eos_token_id=ended))
        assert (found == ended).any() and not torch.equal(found, expected[:, : found.shape[1]])
