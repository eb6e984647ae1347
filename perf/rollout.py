"""The rollout engine: is it correct, and how fast is it compared with transformers' generate and the hardware's limit?

    python perf/rollout.py                                # checks, then the demo model and one of 25M parameters
    python perf/rollout.py --only check --device cuda     # on a GPU: the checks; perf/gpu.py times it there

Where transformers is installed it is timed in the same run, alternating with ours: same model, prompts and number of
new tokens, at its best batch size; disturbed turns do not count. Prints tables and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from shapes import DEMO, lognormal_lengths, machine, print_table, quiet_turns, qwen2, random_prompts, seconds_of, small

from tooln1.model import Transformer, load_model, random_model, save_model, sequence_logits
from tooln1.sampler.sampler import Sampler

try:
    import transformers
except ImportError:
    transformers = None

# ------------------------------------------------------------------------------------------------ correctness


def check(name: str, model: Transformer, device: str) -> dict:
    """The same tokens for every batch and schedule; log-probs of a plain pass. AssertionError if not."""
    torch._dynamo.reset()  # of kernels for other models: their number has a limit
    rng, group_size, cuda = random.Random(0), 5, device == "cuda"
    vocab, fp32 = model.config.vocab_size, model.head.dtype == torch.float32
    prompts = random_prompts(rng, [rng.randint(3, 150) for _ in range(12)], vocab)
    limits = lognormal_lengths(rng, len(prompts) * group_size, 30, 0.7, 100)
    stops = [rng.randrange(vocab) for _ in range(3)]
    result = {"model": name, "replies": len(limits), "greedy_tokens": 0, "sampled_tokens": 0, "worst_logprob": 0.0}
    result |= {"other_replies": 0, "preemptions": 0}
    # On CUDA one size of cache for all, because FlexAttention is compiled for it; on the CPU it may be tiny.
    common = {"cache_tokens": 128 * 256} if cuda else {}
    settings = [{"max_num_seqs": 1}, {"max_num_seqs": 64}, {"max_num_seqs": 7, "max_prefill_tokens": 50}]
    if not cuda:
        settings.append({"block_size": 8, "cache_tokens": 8 * (-(-(max(map(len, prompts)) + max(limits)) // 8) + 8)})
    for temperature in (0.0, 0.7):
        how = {"group_size": group_size, "temperature": temperature, "seed": 1}
        base = Sampler(model, stops, **common)
        want = {(r.group, r.sample): r for r in base.generate(prompts, max_new_tokens=limits, **how)}
        assert base.stats.prefilled == sum(map(len, prompts)), "prefilled tokens are not the prompts' lengths"
        for rollout in want.values():
            logits = sequence_logits(model, rollout.prompt + rollout.reply)[len(rollout.prompt) - 1 : -1]
            plain = torch.log_softmax(logits / (temperature or 1), -1)[range(len(rollout.reply)), rollout.reply]
            gap = (plain.cpu() - torch.tensor(rollout.logprobs)).abs().max().item()
            result["worst_logprob"] = max(result["worst_logprob"], gap)
        result["sampled_tokens" if temperature else "greedy_tokens"] = sum(len(r.reply) for r in want.values())
        order = rng.sample(range(len(prompts)), len(prompts))
        shuffled = [limits[i * group_size + s] for i in order for s in range(group_size)]
        for setting in settings if fp32 else []:  # in bf16 a token depends on the batch by rounding
            sampler = Sampler(model, stops, **common | setting)
            got = sampler.generate([prompts[i] for i in order], keys=order, max_new_tokens=shuffled, **how)
            others = sum(want[order[r.group], r.sample].reply != r.reply for r in got)
            assert others <= 1, f"{name} at temperature {temperature}: {others} other replies with {setting}"
            result["other_replies"] += others  # a uniform number may lie within rounding of two tokens' border
            result["preemptions"] += sampler.stats.preemptions
    assert result["worst_logprob"] < (1e-4 if fp32 else 0.2), result
    return result


def check_all(device: str) -> list[dict]:
    """`check` on random tiny models and the demo."""
    shapes = {"tiny GQA 6:1": qwen2(192, 3, 12, 2, 256, 300, True), "tiny MHA": qwen2(64, 2, 4, 4, 96, 300, False)}
    done = []
    for name, config in shapes.items():
        done.append(check(name, random_model(config, 0, device=device), device))
        if device == "cuda":
            done.append(check(name + ", bf16", random_model(config, 0, torch.bfloat16, device), device))
    return [*done, check("demo", load_model(DEMO, device=device), device)]


# ------------------------------------------------------------------------------------------------ the peer


class Peer:
    """transformers' generate on the same weights, with a limit for each reply."""

    def __init__(self, model: Transformer):
        dtype, device = model.head.dtype, model.head.device
        with tempfile.TemporaryDirectory() as folder:
            save_model(model, Path(folder) / "model")
            self.model = transformers.AutoModelForCausalLM.from_pretrained(Path(folder) / "model", dtype=dtype)
        self.model = self.model.to(device).eval()

    def sample(self, prompts: list[list[int]], group_size: int, limits: list[int], at_once: int) -> None:
        """The replies, `at_once` prompts a batch, prompts of like length together."""
        device, order = self.model.device, sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for start in range(0, len(order), at_once):
            batch = order[start : start + at_once]
            width = max(len(prompts[i]) for i in batch)
            ids = torch.tensor([[0] * (width - len(prompts[i])) + prompts[i] for i in batch], device=device)
            mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in batch], device=device)
            own = [limit for i in batch for limit in limits[i * group_size : (i + 1) * group_size]]
            limit = torch.tensor(own, device=device)

            def long_enough(ids, scores, limit=limit, width=width, **_):
                return ids.shape[1] - width >= limit

            criteria = transformers.StoppingCriteriaList([long_enough])
            how = {"do_sample": True, "temperature": 0.7, "top_k": 0, "top_p": 1.0, "num_return_sequences": group_size}
            how |= {"max_new_tokens": max(own), "pad_token_id": 0, "eos_token_id": None, "use_cache": True}
            self.model.generate(ids, attention_mask=mask, stopping_criteria=criteria, **how)


# ------------------------------------------------------------------------------------------------ CPU


def cpu_race(name: str, model: Transformer, batch_sizes: list[int], repeats: int) -> dict:
    """16 prompts of 200 to 900 tokens x 8 replies of ~100 tokens (at most 512): tokens/s, alternating with the peer."""
    rng = random.Random(0)
    prompts = random_prompts(rng, [rng.randint(200, 900) for _ in range(16)], model.config.vocab_size)
    limits = lognormal_lengths(rng, 128, 100, 0.8, 512)
    sampler = Sampler(model, [])

    def ours() -> None:
        sampler.generate(prompts, 8, 0.7, limits, seed=1)

    peer, best = Peer(model) if transformers else None, batch_sizes[0]
    ours()
    if peer:
        tried = {size: seconds_of(lambda size=size: peer.sample(prompts, 8, limits, size)) for size in batch_sizes}
        best = min(tried, key=tried.get)

    def both(turn: int) -> tuple[float, float]:
        return seconds_of(ours), seconds_of(lambda: peer.sample(prompts, 8, limits, best)) if peer else math.nan

    turns, waited = quiet_turns(both, repeats)
    own, other = zip(*turns, strict=True)
    return {
        "model": name,
        "parameters": model.config.num_parameters,
        "new tokens": sum(limits),
        "tokens/s": sum(limits) / statistics.median(own),
        "generate": sum(limits) / statistics.median(other),
        "its prompts at once": best,
        "ratios": [round(b / a, 2) for a, b in zip(own, other, strict=True)],
        "waited": [round(share, 3) for share in waited],
    }


def cpu(repeats: int) -> list[dict]:
    """Both models, as a table."""
    demo = load_model(DEMO)
    demo.config.raw["max_position_embeddings"] = 4096  # the workload is longer than what the demo was made for
    runs = [cpu_race("demo", demo, [1, 2, 4], repeats), cpu_race("25M", random_model(small(), 0), [1, 2], repeats)]
    print_table([tuple(runs[0]), *(tuple(run.values()) for run in runs)])
    return runs


def main() -> None:
    """Check, time, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of the checks")
    parser.add_argument("--only", choices=("check", "time"), help="one half")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    print(f"{machine()}; torch {torch.__version__}, transformers {transformers and transformers.__version__}")
    results = {"machine": machine(), "torch": torch.__version__}
    if args.only != "time":
        results["check"] = check_all(args.device)
        print_table([tuple(results["check"][0]), *(tuple(one.values()) for one in results["check"])])
    if args.only != "check":
        results["cpu"] = cpu(args.repeats)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
