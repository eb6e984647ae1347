"""Sampling: greedy equals transformers, and a reply depends on nothing but (seed, step, key, sample)."""

import json
import math
import random

import pytest
import torch
from conftest import MODELS, reference
from safetensors.torch import load_file

from tooln1.model import load_model, sequence_logits
from tooln1.sampler.sampler import Sampler
from tooln1.sampler.sampling import apply_top_k_top_p, reply_streams, sample_tokens, uniforms

PROMPTS = [[3, 9, 27], [5], [8, 8, 1, 40, 7, 13, 2], [100, 200]]
STOPS = [7, 50]


@pytest.fixture(scope="module")
def model():
    return load_model(reference("models/dev/qwen1p5b_12x2_tied_bf16_sharded"))


@pytest.fixture
def own_model():
    """One whose weights a test may change."""
    return load_model(reference("models/dev/qwen_mha_tied_fp32"))


def texts(rollouts):
    return {(rollout.group, rollout.sample): rollout.reply for rollout in rollouts}


def random_prompts(model, count, longest, seed):
    rng = random.Random(seed)
    return [[rng.randrange(model.config.vocab_size) for _ in range(rng.randint(1, longest))] for _ in range(count)]


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_and_logprobs_equal_transformers(name):
    folder = reference(f"models/dev/{name}")
    want = load_file(folder / "expected.safetensors")
    stops = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    padded = zip(want["gen.prompt_ids"], want["gen.prompt_mask"].bool(), strict=True)
    prompts = [ids[keep].tolist() for ids, keep in padded]
    rollouts = Sampler(load_model(folder), stops).generate(prompts, temperature=0.0, max_new_tokens=64)
    for i, rollout in enumerate(rollouts):
        length = int(want["gen.lengths"][i])
        assert rollout.reply == want["gen.new_tokens"][i, :length].tolist()
        assert rollout.finished == (rollout.reply[-1] in stops)
        logprobs = torch.tensor(rollout.logprobs)
        torch.testing.assert_close(logprobs, want["gen.logprobs_T1"][i, :length], atol=5e-5, rtol=0)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize(
    "settings",
    [
        {"max_num_seqs": 1},
        {"max_num_seqs": 4},
        {"block_size": 4},
        {"block_size": 8, "cache_tokens": 96},  # sequences are preempted again and again
        {"block_size": 8, "cache_tokens": 96, "max_num_seqs": 5, "max_prefill_tokens": 7},
        {"block_size": 4, "cache_tokens": 160, "lookahead": 1},  # as on CUDA: launches a step before reading the last
    ],
    ids=str,
)
def test_replies_do_not_depend_on_batch_blocks_schedule_or_order(model, temperature, settings):
    rng = random.Random(3)
    prompts, limits = random_prompts(model, 7, 40, 3), [rng.randint(1, 40) for _ in range(7 * 3)]
    how = dict(group_size=3, temperature=temperature, seed=4)
    base = Sampler(model, STOPS)
    want = texts(base.generate(prompts, max_new_tokens=limits, keys=list(range(7)), **how))
    assert len({len(reply) for reply in want.values()}) > 5
    sampler = Sampler(model, STOPS, **{name: value for name, value in settings.items() if name != "lookahead"})
    sampler.lookahead = settings.get("lookahead", 0)
    order = rng.sample(range(7), 7)
    shuffled = [limits[3 * i + sample] for i in order for sample in range(3)]
    got = sampler.generate([prompts[i] for i in order], max_new_tokens=shuffled, keys=order, **how)
    assert {(order[r.group], r.sample): r.reply for r in got} == want
    assert sampler.stats.prefilled == base.stats.prefilled == sum(map(len, prompts))
    assert (sampler.stats.preemptions > 0) == ("cache_tokens" in settings)
    single = sampler.generate([prompts[5]], max_new_tokens=limits[15:18], keys=[5], **how)
    assert [rollout.reply for rollout in single] == [want[5, sample] for sample in range(3)]


@pytest.mark.slow
def test_decoding_as_on_cuda_gives_the_same_replies(model):
    """All of the CUDA path but the graph: FlexAttention over block tables, padded batches, results a step behind."""
    prompts = random_prompts(model, 4, 70, 5)
    how = dict(group_size=3, temperature=0.7, max_new_tokens=[40, 3, 25, 40], seed=2)
    want = texts(Sampler(model, STOPS).generate(prompts, **how))
    sampler = Sampler(model, STOPS, max_num_seqs=7, block_size=16, cache_tokens=160)
    sampler.decode, sampler.lookahead = "eager", 1
    try:
        assert texts(sampler.generate(prompts, **how)) == want
    except torch._inductor.exc.InductorError as error:  # there is no C++ compiler
        pytest.skip(f"torch.compile does not work here: {error}")
    assert sampler.stats.preemptions > 0 and [size for size, _ in sampler.graphs] == [8]


def test_ids_beyond_the_tokenizer_are_neither_sampled_nor_counted():
    model = load_model(reference("models/dev/qwen1p5b_12x2_tied_bf16_sharded"), vocabulary=40)
    rollouts = Sampler(model, []).generate([[3, 9, 27]], 20, 1.5, 20)
    assert max(token for rollout in rollouts for token in rollout.reply) < 40
    want = torch.log_softmax(sequence_logits(model, [3, 9, 27] + rollouts[0].reply)[2:-1] / 1.5, -1)
    assert want.shape[1] == 40
    want = want[range(20), rollouts[0].reply]
    torch.testing.assert_close(torch.tensor(rollouts[0].logprobs), want, atol=1e-4, rtol=0)


def test_weights_may_change_in_place_between_calls(own_model):
    sampler, how = Sampler(own_model, []), dict(temperature=0.0, max_new_tokens=8)
    before = texts(sampler.generate([[1, 2]], **how))
    with torch.no_grad():
        for parameter in own_model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.1)
    after = texts(sampler.generate([[1, 2]], **how))
    assert before != after == texts(Sampler(own_model, []).generate([[1, 2]], **how))
    assert all(parameter.requires_grad for parameter in own_model.parameters())  # it can still be trained


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_logprobs_equal_a_plain_forward_pass(model, temperature):
    for rollout in Sampler(model, [7]).generate(PROMPTS, 2, temperature, 30, seed=3):
        logits = sequence_logits(model, rollout.prompt + rollout.reply)[len(rollout.prompt) - 1 : -1]
        want = torch.log_softmax(logits / temperature, -1)[range(len(rollout.reply)), rollout.reply]
        torch.testing.assert_close(torch.tensor(rollout.logprobs), want, atol=1e-4, rtol=0)


def test_limits_stop_tokens_and_replies_reported_as_they_finish(model):
    finished, limits = [], [1, 5, 9, 40]
    rollouts = Sampler(model, [7]).generate(PROMPTS, 2, 1.0, limits, seed=1, on_finished=finished.append)
    for rollout in rollouts:
        assert 1 <= len(rollout.reply) <= limits[rollout.group]
        assert 7 not in rollout.reply[:-1]
        assert rollout.finished == (rollout.reply[-1] == 7)
        assert rollout.finished or len(rollout.reply) == limits[rollout.group]
    assert sorted(finished, key=lambda r: (r.group, r.sample)) == rollouts
    lengths = [len(rollout.reply) for rollout in finished]
    assert lengths[0] == min(lengths) < lengths[-1] == max(lengths) and finished != rollouts


def test_should_stop_ends_the_sampling_before_the_next_step(model):
    sampler, calls = Sampler(model, STOPS, max_num_seqs=3), []
    how = dict(group_size=3, temperature=1.0, max_new_tokens=24, seed=5)
    assert sampler.generate(PROMPTS, should_stop=lambda: calls.append(0) or len(calls) > 5, **how) == []
    assert len(calls) == 6
    assert texts(sampler.generate(PROMPTS, **how)) == texts(Sampler(model, STOPS).generate(PROMPTS, **how))


def test_uniform_numbers_are_uniform_and_unrelated():
    n = 200_000
    count, zero = torch.arange(n), torch.zeros(n, dtype=torch.int64)

    def numbers(seed, step, keys, samples, positions):
        return uniforms(reply_streams(seed, step, keys, samples), positions)

    several = [
        numbers(0, 0, count, zero, zero),
        numbers(0, 0, zero, count, zero),
        numbers(0, 0, zero, zero, count),
        numbers(1, 0, count, zero, zero),
        numbers(0, 1, count, zero, zero),
    ]
    for u in several:
        assert u.min() > 0 and u.max() < 1
        counts = torch.histc(u, 100, 0, 1)
        assert ((counts - n / 100) ** 2 / (n / 100)).sum() < 160  # chi², 99 degrees: p < 1e-4 above
        assert abs(torch.corrcoef(torch.stack((u[1:], u[:-1])))[0, 1]) < 4 / math.sqrt(n)
    assert torch.corrcoef(torch.stack(several)).fill_diagonal_(0).abs().max() < 5 / math.sqrt(n)
    # neither arithmetic on seed and step leads from one stream to another
    first = numbers(0, 31, count[:3], zero[:3], zero[:3])
    assert not any(torch.equal(first, numbers(1, t, count[:3], zero[:3], zero[:3])) for t in range(64))


def test_logits_that_are_not_finite_raise_and_leave_no_nan_in_the_cache(own_model):
    sampler, how = Sampler(own_model, [7]), dict(temperature=0.0, max_new_tokens=4)
    want = texts(sampler.generate([[1, 2]], **how))
    weight = own_model.model.layers[0].self_attn.v_proj.weight
    before = weight.detach().clone()
    for temperature in (0.0, 1.0):
        with torch.no_grad():
            weight.fill_(torch.nan)
        with pytest.raises(ValueError, match="not finite at token 0 of reply 0 to prompt 0"):
            sampler.generate([[1] * 20], temperature=temperature, max_new_tokens=2)
        with torch.no_grad():
            weight.copy_(before)
        assert texts(sampler.generate([[1, 2]], **how)) == want


def test_sampled_tokens_follow_the_distribution():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -torch.inf]])
    u = (torch.arange(100_000) + 0.5) / 100_000
    token, logprob = sample_tokens(logits.expand(len(u), -1), u, 0.7, 0, 1.0)
    probs = torch.softmax(logits[0] / 0.7, -1)
    torch.testing.assert_close(torch.bincount(token, minlength=5) / len(u), probs, atol=2e-5, rtol=0)
    torch.testing.assert_close(logprob, probs.log()[token])
    impossible_ends = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]]).expand(2, -1)
    token, _ = sample_tokens(impossible_ends, torch.tensor([2.0**-24, 1 - 2.0**-24]), 1.0, 0, 1.0)
    assert token.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [(2, 1.0, [1, 3]), (0, 0.6, [1, 3]), (0, 0.75, [1, 2, 3]), (0, 1e-9, [1]), (9, 1.0, [0, 1, 2, 3])],
)
def test_top_k_and_top_p(top_k, top_p, kept):
    logits = torch.log(torch.tensor([[0.1, 0.4, 0.2, 0.3]]))
    assert apply_top_k_top_p(logits, top_k, top_p)[0].isfinite().nonzero().flatten().tolist() == kept


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"prompts": [[1], []]}, "prompt 1 has 0 tokens"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": [1, 2]}, "1 prompts .*, but 2"),
        ({"group_size": 0}, "group_size"),
        ({"prompts": [[1], [1] * 5000]}, "prompt 1 has 5000 tokens, not 1 to .*context"),
        ({"max_new_tokens": 400}, "may need 401 tokens of cache, which holds 64: raise cache_tokens"),
    ],
)
def test_bad_requests_raise_and_leave_the_sampler_usable(model, bad, words):
    sampler = Sampler(model, [7], cache_tokens=64, block_size=16)
    with pytest.raises(ValueError, match=words):
        sampler.generate(**({"prompts": [[1]], "max_new_tokens": 5} | bad))
    assert len(sampler.generate([[1]], max_new_tokens=5)) == 1
    assert sampler.generate([]) == []
