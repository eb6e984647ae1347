"""Load an exported model with transformers: the same token ids, logits and greedy replies as ours?

    pip install transformers; python scripts/cross_check_export.py [--model assets/demo/model] [--data heldout.jsonl]
    pip install peft; python scripts/cross_check_export.py --model RUN/hf --adapter RUN/hf_adapter

With --adapter, ours has the merged weights and theirs the base and the adapter, as peft loads it.
Prints the number of prompts with other ids, and the largest difference of a logit; exit code 1 if they differ.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from tooln1.data import read_examples  # noqa: E402
from tooln1.model import load_model, sequence_logits  # noqa: E402
from tooln1.prompt import build_messages, format_reply  # noqa: E402
from tooln1.tokenizer import load_tokenizer  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(ROOT / "assets/demo/model"))
    parser.add_argument("--adapter", help="adapter of a LoRA run, on its base, in the place of their --model")
    parser.add_argument("--data", default=str(ROOT / "assets/demo/heldout.jsonl"))
    parser.add_argument("--limit", type=int, default=60, help="prompts to compare")
    options = parser.parse_args()
    ours, theirs = load_tokenizer(options.model), AutoTokenizer.from_pretrained(options.model)
    model = load_model(options.model, vocabulary=ours.vocab_size)
    if options.adapter:
        from peft import AutoPeftModelForCausalLM as TheirModel
    else:
        from transformers import AutoModelForCausalLM as TheirModel
    their_model = TheirModel.from_pretrained(options.adapter or options.model, dtype=torch.float32).eval()
    other_ids, gap, other_tokens = 0, 0.0, 0
    for example in read_examples(options.data)[: options.limit]:
        messages = build_messages(example)
        prompt = ours.prompt_ids(messages)
        their_prompt = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        text = ours.render([*messages, {"role": "assistant", "content": format_reply(example.answer, "So.")}])
        other_ids += prompt != their_prompt or ours.encode(text) != theirs.encode(text, add_special_tokens=False)
        with torch.no_grad():
            their_logits = their_model(torch.tensor([prompt])).logits[0, :, : ours.vocab_size]
        logits = sequence_logits(model, prompt)
        gap = max(gap, (logits - their_logits).abs().max().item())
        other_tokens += bool((logits.argmax(-1) != their_logits.argmax(-1)).any())
    print(f"{options.limit} prompts: {other_ids} with other ids, {other_tokens} with another likeliest token, ", end="")
    print(f"largest difference of a logit {gap:.1e}")
    sys.exit(int(bool(other_ids or other_tokens or gap > 1e-4)))


if __name__ == "__main__":
    main()
