"""A model directory and data small enough for tests (random weights, byte-level tokenizer, ChatML); runs of them."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import tokenizers
from tokenizers import AddedToken

import eval as evaluation_script
import train
from tooln1.config import Config, to_toml
from tooln1.data import Example, write_examples
from tooln1.distributed import launch
from tooln1.io.errors import exit_on_user_error
from tooln1.io.model_config import parse_config
from tooln1.model import random_model, save_model
from tooln1.prompt import XLAM_SYSTEM

ROOT = Path(__file__).resolve().parents[1]
TIMES = ("seconds/", "tokens_per_second/")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "initializer_range": 0.3,  # wide, so that greedy choices are clear and ratios move
    "torch_dtype": "float32",
    "use_sliding_window": False,
    "max_position_embeddings": 4096,
}
QWEN3 = {"model_type": "qwen3", "head_dim": 16}  # changes of CONFIG: more query width than hidden width


def write_model(folder: Path, seed: int = 0, **changes) -> Path:
    """A random Qwen2 with its tokenizer in Hugging Face layout; `changes` override its config."""
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(alphabet)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(token, special=True) for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    )
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": CHAT_TEMPLATE, "eos_token": "<|im_end|>"})
    )
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [258, 256]}))
    config = parse_config({**CONFIG, "vocab_size": 259, **changes})
    model = random_model(config, seed)
    model.source = folder
    save_model(model, folder / "model")
    return folder / "model"


def examples(count: int) -> list[Example]:
    """Examples of varying length with one tool each."""
    tool = {"name": "add", "description": "Adds.", "parameters": {"a": {"type": "int"}, "b": {"type": "int"}}}
    return [
        Example(
            id=f"tiny-{i}",
            source="tiny",
            system=XLAM_SYSTEM[:20],
            tools=[tool],
            messages=[{"role": "user", "content": f"Add {i} and {i * 37} " * (1 + i % 3)}],
            answer=[{"name": "add", "arguments": {"a": i, "b": i * 37}}],
        )
        for i in range(count)
    ]


def write_data(folder: Path, count: int = 12) -> Path:
    """`examples` as a JSONL file."""
    write_examples(examples(count), folder / "data.jsonl")
    return folder / "data.jsonl"


# ------------------------------------------------------------------------------------------- runs of train.py


def settings(place: Path, run: str, **changes) -> dict:
    """Settings of a short run of the model and data in `place`, by name."""
    data = str(place / "data.jsonl")
    defaults = dict(
        model=str(place / "model"),
        train_data=data,
        eval_data=data,
        run_dir=str(place / run),
        steps=3,
        prompts_per_step=4,
        prompts_per_minibatch=2,
        group_size=3,
        max_reply_tokens=12,
        tokens_per_microbatch=5000,
        learning_rate=1e-3,
        temperature=1.0,
        activation_checkpointing="off",
        eval_every=2,
        save_every=2,
        log_rollouts=99,
    )
    return defaults | changes


def write_preset(place: Path, run: str, **changes) -> list[str]:
    """`settings` as a file; the arguments of train.py that name it."""
    (place / f"{run}.toml").write_text(to_toml(Config(**settings(place, run, **changes))))
    return ["--config", str(place / f"{run}.toml")]


def run(place: Path, name: str, **changes) -> Path:
    """A run in this process; its directory."""
    with launch("cpu") as world:
        train.train(Config(**settings(place, name, **changes)), world)
    return place / name


def measured(run_dir: Path, log: str = "metrics.jsonl") -> list[dict]:
    """The rows of a log, without the times; those of metrics.jsonl merged by step."""
    rows = [json.loads(line) for line in (run_dir / log).read_text(encoding="utf-8").splitlines()]
    rows = [{key: value for key, value in row.items() if not key.startswith(TIMES)} for row in rows]
    if log != "metrics.jsonl":
        return rows
    steps: dict[int, dict] = {}
    for row in rows:
        steps.setdefault(row["step"], {}).update(row)
    return list(steps.values())


def assert_same_run(run_dir: Path, reference: Path) -> None:
    """Bit-equal weights, optimizer state and logs, every step once, and the same files."""
    for log in ("metrics.jsonl", "rollouts.jsonl"):
        assert measured(run_dir, log) == measured(reference, log), f"{log} differs"
    steps = [row["step"] for row in measured(run_dir)]
    assert steps == list(range(len(steps))), steps
    files = [{path.relative_to(top) for path in top.rglob("*") if path.is_file()} for top in (run_dir, reference)]
    assert files[0] == files[1]
    for path in files[0]:
        if path.suffix == ".safetensors":
            assert tensors(run_dir / path) == tensors(reference / path), f"{path} differs"
        elif path.parts[0] == "hf":
            assert (run_dir / path).read_bytes() == (reference / path).read_bytes(), f"{path} differs"


def tensors(file: Path) -> tuple[dict, bytes]:
    """Header and data of a safetensors file; the library writes the header's metadata in a random order."""
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def torchrun_command(processes: int, *flags: str) -> list[str]:
    """The command that starts a script in this many processes; flags: further ones of torchrun."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *flags]


def torchrun(processes: int, *arguments: str) -> subprocess.CompletedProcess:
    """Run a script of this repository under torchrun."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [*torchrun_command(processes), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


class Job:
    """A command that runs beside the test; what it prints goes to `log`."""

    def __init__(self, log: Path, command: list[str], **environment: str):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **environment}
        self.output = log.open("w+")
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=self.output, stderr=subprocess.STDOUT, start_new_session=True
        )

    def text(self) -> str:
        """What has been printed."""
        self.output.seek(0)
        return self.output.read()

    def wait_for(self, words: str, count: int = 1, seconds: float = 240) -> bool:
        """Wait until `words` have been printed `count` times; False if the job ends before."""
        until = time.monotonic() + seconds
        while self.text().count(words) < count:
            if self.process.poll() is not None:
                return False
            assert time.monotonic() < until, f"{words!r} was not printed\n{self.text()}"
            time.sleep(0.002)
        return True

    def workers(self) -> list[int]:
        """The process ids of the ranks: torchrun's children, or the only process."""
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [int(child) for child in children] or [pid]

    def end(self, seconds: float = 120) -> tuple[int, str]:
        """Wait for the end; exit code and what was printed."""
        return self.process.wait(timeout=seconds), self.text()

    def kill(self) -> None:
        """SIGKILL everything and wait until it is gone."""
        with contextlib.suppress(OSError):
            for pid in {self.process.pid, *self.workers()}:
                os.kill(pid, signal.SIGKILL)
        self.process.wait(timeout=60)


def is_running(pid: int) -> bool:
    """Whether a process is there and not a zombie."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


def exit_code(main: Callable[[], None]) -> int:
    """The exit code of an entry point, run in this process."""
    try:
        exit_on_user_error(main)
    except SystemExit as stop:
        return stop.code or 0
    return 0


def run_eval(*arguments) -> int:
    """eval.py's exit code for these arguments."""
    return exit_code(lambda: evaluation_script.main([*map(str, arguments)]))


def read_rows(path: Path) -> list[dict]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_rows(path: Path, rows: list[dict]) -> Path:
    """A JSONL file of these rows."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
