"""Sampling: greedy equals transformers, and a reply depends on nothing but (seed, step, key, sample)."""

import json
import math
import random

import pytest
import torch
from conftest import reference
from safetensors.torch import load_file

from tooln1.model import load_model, sequence_logits
from tooln1.sampler.sampler import Sampler
from tooln1.sampler.sampling import choose, reply_streams, restrict
from tooln1.sampler.sampling import uniforms as uniforms_of

MODELS = sorted(path.name for path in reference("models/dev").iterdir())
PROMPTS = [[3, 9, 27], [5], [8, 8, 1, 40, 7, 13, 2], [100, 200]]


@pytest.fixture(scope="module")
def model():
    return load_model(reference("models/dev/qwen1p5b_12x2_tied_bf16_sharded"))


def texts(rollouts):
    return {(rollout.group, rollout.sample): rollout.reply for rollout in rollouts}


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
        torch.testing.assert_close(
            torch.tensor(rollout.logprobs), want["gen.logprobs_T1"][i, :length], atol=5e-5, rtol=0
        )


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_replies_do_not_depend_on_the_batch(model, temperature):
    how = dict(group_size=3, temperature=temperature, max_new_tokens=24, seed=5, step=2)
    together = texts(Sampler(model, [7, 50]).generate(PROMPTS, **how))
    assert len({tuple(reply) for reply in together.values()}) > len(PROMPTS) or temperature == 0
    three_rows = texts(Sampler(model, [7, 50], rows=3).generate(PROMPTS, **how))
    assert three_rows == together
    keys = [30, 10, 20, 0]
    keyed = texts(Sampler(model, [7, 50]).generate(PROMPTS, keys=keys, **how))
    for i, key in enumerate(keys):
        alone = Sampler(model, [7, 50]).generate([PROMPTS[i]], keys=[key], **how)
        assert [rollout.reply for rollout in alone] == [keyed[i, sample] for sample in range(3)]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize(
    "how",
    [
        {"rows": 1},
        {"rows": 4},
        {"page_size": 4},
        {"page_size": 8, "cache_tokens": 96},  # put back again and again
        {"page_size": 8, "cache_tokens": 96, "rows": 5, "prefill_tokens": 7},
        {"page_size": 4, "cache_tokens": 160, "lookahead": 1},  # as on CUDA: a step ahead of its results
    ],
    ids=str,
)
def test_replies_do_not_depend_on_slots_pages_schedule_or_order(model, temperature, how):
    draw = random.Random(3)
    prompts = [[draw.randrange(model.config.vocab_size) for _ in range(draw.randint(1, 40))] for _ in range(7)]
    caps = [draw.randint(1, 40) for _ in range(7 * 3)]
    keys = list(range(7))
    request = dict(group_size=3, temperature=temperature, seed=4)
    base = Sampler(model, [7, 50])
    want = texts(base.generate(prompts, max_new_tokens=caps, keys=keys, **request))
    assert len({len(reply) for reply in want.values()}) > 5
    how = dict(how)
    lookahead = how.pop("lookahead", 0)
    sampler = Sampler(model, [7, 50], **how)
    sampler.lookahead = lookahead
    order = draw.sample(range(7), 7)
    shuffled = sampler.generate(
        [prompts[i] for i in order],
        max_new_tokens=[caps[3 * i + s] for i in order for s in range(3)],
        keys=[keys[i] for i in order],
        **request,
    )
    assert {(order[r.group], r.sample): r.reply for r in shuffled} == want
    assert sampler.stats.prefilled == base.stats.prefilled == sum(map(len, prompts))
    assert (sampler.stats.preemptions > 0) == ("cache_tokens" in how)


def test_decoding_as_on_cuda_gives_the_same_replies(model):
    """All of the CUDA path but the graph: FlexAttention over page tables, padded rows, results a step behind."""
    draw = random.Random(5)
    prompts = [[draw.randrange(model.config.vocab_size) for _ in range(draw.randint(1, 70))] for _ in range(4)]
    how = dict(group_size=3, temperature=0.7, max_new_tokens=[40, 3, 25, 40], seed=2)
    want = texts(Sampler(model, [7, 50]).generate(prompts, **how))
    # 10 pages of 16: rows are put back
    sampler = Sampler(model, [7, 50], rows=7, page_size=16, cache_tokens=160)
    sampler.flex, sampler.lookahead = True, 1
    try:
        assert texts(sampler.generate(prompts, **how)) == want
    except torch._inductor.exc.InductorError as error:  # there is no C++ compiler
        pytest.skip(f"torch.compile does not work here: {error}")
    assert sampler.stats.preemptions > 0 and [rows for rows, _ in sampler.graphs] == [8]


def test_ids_beyond_the_tokenizer_are_never_drawn_nor_counted():
    model = load_model(reference("models/dev/qwen1p5b_12x2_tied_bf16_sharded"), vocabulary=40)
    prompt = [3, 9, 27]
    rollouts = Sampler(model, []).generate([prompt], 20, 1.5, 20)
    assert max(token for rollout in rollouts for token in rollout.reply) < 40
    ids = prompt + rollouts[0].reply
    want = torch.log_softmax(sequence_logits(model, ids)[2:-1] / 1.5, -1)
    assert want.shape[1] == 40
    want = want[range(20), rollouts[0].reply]
    torch.testing.assert_close(torch.tensor(rollouts[0].logprobs), want, atol=1e-4, rtol=0)


def test_weights_may_change_in_place_between_calls():
    model = load_model(reference("models/dev/qwen_mha_tied_fp32"))
    sampler = Sampler(model, [])
    before = sampler.generate([[1, 2]], temperature=0.0, max_new_tokens=8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.1)
    after = sampler.generate([[1, 2]], temperature=0.0, max_new_tokens=8)
    assert texts(after) != texts(before)
    assert texts(after) == texts(Sampler(model, []).generate([[1, 2]], temperature=0.0, max_new_tokens=8))


def test_other_seed_step_or_key_gives_other_replies(model):
    how = dict(group_size=2, temperature=1.0, max_new_tokens=16)
    sampler = Sampler(model, [])
    base = texts(sampler.generate(PROMPTS[:1], seed=1, step=1, keys=[1], **how))
    for seed, step, key in [(2, 1, 1), (1, 2, 1), (1, 1, 2)]:
        assert texts(sampler.generate(PROMPTS[:1], seed=seed, step=step, keys=[key], **how)) != base
    assert base[0, 0] != base[0, 1]


def test_logprobs_equal_a_plain_forward_pass(model):
    for temperature in (0.7, 1.3):
        for rollout in Sampler(model, [7]).generate(PROMPTS, 2, temperature, 30, seed=3):
            logits = sequence_logits(model, rollout.prompt + rollout.reply)[len(rollout.prompt) - 1 : -1]
            logprobs = torch.log_softmax(logits / temperature, -1)
            want = logprobs[range(len(rollout.reply)), rollout.reply]
            torch.testing.assert_close(torch.tensor(rollout.logprobs), want, atol=1e-4, rtol=0)


def test_caps_stop_tokens_and_replies_handed_over_as_they_end(model):
    finished = []
    caps = [1, 5, 9, 40]
    rollouts = Sampler(model, [7]).generate(PROMPTS, 2, 1.0, caps, seed=1, on_finished=finished.append)
    for rollout in rollouts:
        assert 1 <= len(rollout.reply) <= caps[rollout.group]
        assert 7 not in rollout.reply[:-1]
        assert rollout.finished == (rollout.reply[-1] == 7)
        assert rollout.finished or len(rollout.reply) == caps[rollout.group]
    assert sorted(finished, key=lambda r: (r.group, r.sample)) == rollouts
    lengths = [len(rollout.reply) for rollout in finished]
    assert lengths[0] == min(lengths) < lengths[-1] == max(lengths) and finished != rollouts
    assert [(r.group, r.sample) for r in rollouts] == [(g, s) for g in range(4) for s in range(2)]


def uniforms(seed, step, keys, samples, positions):
    return uniforms_of(reply_streams(seed, step, keys, samples), positions)


def test_a_request_to_stop_ends_the_sampling_at_once(model):
    """No replies at all, within one step of the model; the sampler stays usable."""
    sampler, asked = Sampler(model, [7, 50], rows=3), []
    how = dict(group_size=3, temperature=1.0, max_new_tokens=24, seed=5)
    assert sampler.generate(PROMPTS, should_stop=lambda: asked.append(0) or len(asked) > 5, **how) == []
    assert len(asked) == 6
    assert texts(sampler.generate(PROMPTS, **how)) == texts(Sampler(model, [7, 50]).generate(PROMPTS, **how))


def test_uniform_numbers_are_uniform_and_unrelated():
    n = 200_000
    keys, zero = torch.arange(n), torch.zeros(n, dtype=torch.int64)
    streams = [
        uniforms(0, 0, keys, zero, zero),
        uniforms(0, 0, zero, keys, zero),
        uniforms(0, 0, zero, zero, keys),
        uniforms(1, 0, keys, zero, zero),
        uniforms(0, 1, keys, zero, zero),
    ]
    for u in streams:
        assert u.min() > 0 and u.max() < 1
        counts = torch.histc(u, 100, 0, 1)
        assert ((counts - n / 100) ** 2 / (n / 100)).sum() < 160  # chi², 99 degrees: p < 1e-4 above
        assert abs(torch.corrcoef(torch.stack((u[1:], u[:-1])))[0, 1]) < 4 / math.sqrt(n)
    assert torch.corrcoef(torch.stack(streams)).fill_diagonal_(0).abs().max() < 5 / math.sqrt(n)
    # neither arithmetic on seed and step leads from one stream to another
    first = uniforms(0, 31, keys[:3], zero[:3], zero[:3])
    assert not any(torch.equal(first, uniforms(1, t, keys[:3], zero[:3], zero[:3])) for t in range(64))
    assert uniforms(0, 0, keys[:3], zero[:3], zero[:3]).tolist() == streams[0][:3].tolist()


def test_logits_that_are_not_finite_are_a_sentence_and_leave_nothing_behind():
    model = load_model(reference("models/dev/qwen_mha_tied_fp32"))
    sampler = Sampler(model, [7])
    want = texts(sampler.generate([[1, 2]], temperature=0.0, max_new_tokens=4))
    weight = model.model.layers[0].self_attn.v_proj.weight
    before = weight.detach().clone()
    for temperature in (0.0, 1.0):
        with torch.no_grad():
            weight.fill_(torch.nan)
        with pytest.raises(ValueError, match="not finite at token 0 of reply 0 to prompt 0"):
            sampler.generate([[1] * 20], temperature=temperature, max_new_tokens=2)
        with torch.no_grad():
            weight.copy_(before)
        assert texts(sampler.generate([[1, 2]], temperature=0.0, max_new_tokens=4)) == want


def test_sampling_leaves_the_model_trainable(model):
    Sampler(model, [7]).generate([[1]], max_new_tokens=2)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_draws_follow_the_distribution():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -torch.inf]])
    u = (torch.arange(100_000) + 0.5) / 100_000
    token, logprob = choose(logits.expand(len(u), -1), u, 0.7, 0, 1.0)
    probs = torch.softmax(logits[0] / 0.7, -1)
    torch.testing.assert_close(torch.bincount(token, minlength=5) / len(u), probs, atol=2e-5, rtol=0)
    torch.testing.assert_close(logprob, probs.log()[token])


def test_the_ends_of_the_unit_interval_never_draw_the_impossible():
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]]).expand(2, -1)
    token, _ = choose(logits, torch.tensor([2.0**-24, 1 - 2.0**-24]), 1.0, 0, 1.0)
    assert token.tolist() == [1, 2]


def test_top_k_and_top_p():
    logits = torch.log(torch.tensor([[0.1, 0.4, 0.2, 0.3]]))
    assert torch.isfinite(restrict(logits, 2, 1.0)).tolist() == [[False, True, False, True]]
    assert torch.isfinite(restrict(logits, 0, 0.6)).tolist() == [[False, True, False, True]]
    assert torch.isfinite(restrict(logits, 0, 0.75)).tolist() == [[False, True, True, True]]
    assert torch.isfinite(restrict(logits, 0, 1e-9)).tolist() == [[False, True, False, False]]
    assert torch.isfinite(restrict(logits, 9, 1.0)).all()


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"prompts": [[1], []]}, "prompt 1 is empty"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": [1, 2]}, "1 prompts .*, but 2"),
        ({"keys": []}, "0 keys"),
        ({"temperature": -1.0}, "temperature -1.0"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"group_size": 0}, "group_size"),
        ({"prompts": [[1], [1] * 5000]}, "prompt 1 has 5000 tokens; the model's context is"),
        ({"prompts": [[1], [3, 999_999]]}, "prompt 1 holds token id 999999; the model knows 0 to"),
        ({"max_new_tokens": 400}, "may need 416 tokens of cache, which holds 64: raise cache_tokens"),
    ],
)
def test_bad_requests_are_sentences_and_leave_the_sampler_usable(model, bad, words):
    sampler = Sampler(model, [7], cache_tokens=64, page_size=16)
    with pytest.raises(ValueError, match=words):
        sampler.generate(**({"prompts": [[1]], "max_new_tokens": 5} | bad))
    assert len(sampler.generate([[1]], max_new_tokens=5)) == 1
    assert sampler.generate([[1]], max_new_tokens=2)
    assert sampler.generate([]) == []
