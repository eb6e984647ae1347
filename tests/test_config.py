"""Settings: where a value comes from, what is refused, and the presets against the paper."""

import tomllib
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tooln1 import config as config_module
from tooln1.config import SECTION_OF, SETTINGS, Config, load_config, read_preset, to_toml
from tooln1.io.errors import UserError
from tooln1.run.setup import refuse_changes

ROOT = Path(__file__).resolve().parents[1]
PRESETS = sorted((ROOT / "configs").glob("*.toml"))

PAPER = {  # Table 6 and the released launch script
    "mode": "rl",
    "prompts_per_step": 1024,
    "group_size": 5,
    "prompts_per_minibatch": 256,
    "tokens_per_microbatch": 30720,
    "epochs": 7,
    "temperature": 0.7,
    "top_p": 1.0,
    "top_k": 0,
    "max_prompt_tokens": 4096,
    "max_reply_tokens": 8192,
    "reward": "binary",
    "clip_low": 0.2,
    "clip_high": 0.2,
    "dual_clip": 0.0,
    "kl_coef": 0.001,
    "entropy_coef": 0.0,
    "policy_loss": "clipped",
    "advantage": "std",
    "kl": "k3",
    "old_logprobs": "policy",
    "mask_truncated": False,
    "dynamic_sampling": 0,
    "advantage_eps": 1e-6,
    "learning_rate": 1e-6,
    "lr_schedule": "constant",
    "warmup_ratio": 0.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "eval_every": 10,
    "eval_before_training": False,
    "save_every": 10,
    "think": True,
}


@pytest.fixture
def preset(tmp_path):
    """Write a preset and return its path."""

    def write(text: str, name: str = "preset.toml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_defaults_and_help_have_the_papers_values():
    assert {name: asdict(Config())[name] for name in PAPER} == PAPER
    assert {name: SETTINGS[name].metadata["paper"] for name in PAPER} == PAPER


def test_the_command_line_overrides_the_preset_overrides_its_base_overrides_the_default(preset, monkeypatch):
    preset("steps = 1\ngroup_size = 3\ntop_k = 9", "grandparent.toml")
    preset('base = "../grandparent.toml"\nsteps = 2\ngroup_size = 4', "sub/parent.toml")
    child = preset('\ufeffbase = "sub/parent.toml"\n[any_section]\nsteps = 3', "child.toml")
    monkeypatch.chdir("/")
    config = load_config(["--kl-coef", "0.25", f"--config={child}"], preset("steps = 9"))
    assert (config.steps, config.group_size, config.top_k) == (3, 4, 9)
    assert (config.kl_coef, config.temperature) == (0.25, 0.7)


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        ("--group-size 3", "group_size", 3),
        ("--group_size=3", "group_size", 3),
        ("--learning-rate 1", "learning_rate", 1.0),
        ("--shuffle-rewards", "shuffle_rewards", True),
        ("--shuffle-rewards --steps 2", "shuffle_rewards", True),
        ("--compile False", "compile", False),
        ("--resume", "resume", "auto"),
        ("--resume --steps 2", "resume", "auto"),
        ("--resume runs/x/checkpoints/4", "resume", "runs/x/checkpoints/4"),
        ("--model=a_b=c", "model", "a_b=c"),
        ("--eval-data=", "eval_data", ""),
        ("--steps 1 --steps 2", "steps", 2),
    ],
)
def test_command_line_forms(preset, argv, name, value):
    found = getattr(load_config(argv.split(), preset("")), name)
    assert found == value and type(found) is type(value)


def test_preset_paths_fall_back_to_the_repository(preset, tmp_path, monkeypatch):
    repository, here = tmp_path / "repository", tmp_path / "here"
    for folder in (repository, here):
        folder.mkdir()
        (folder / "both.jsonl").touch()
    (repository / "train.jsonl").touch()
    monkeypatch.setattr(config_module, "REPOSITORY", repository)
    monkeypatch.chdir(here)
    path = preset('model = "some/id"\ntrain_data = "train.jsonl"\neval_data = "both.jsonl"\nrun_dir = "train.jsonl"')
    config = load_config([], path)
    assert config.train_data == str(repository / "train.jsonl")
    assert (config.model, config.eval_data, config.run_dir) == ("some/id", "both.jsonl", "train.jsonl")
    assert load_config(["--train-data", "train.jsonl"], path).train_data == "train.jsonl"  # what the user types: as is


def test_to_toml_round_trips_every_kind_of_value(preset):
    config = replace(
        Config(),
        learning_rate=1 / 3 * 1e-5,
        kl_coef=5e-324,
        max_grad_norm=1.7976931348623157e308,
        seed=2**62,
        shuffle_rewards=True,
        model='a "quoted" \\ path\twith\nlines, \x01, ünï, 工具 and \U0001f600',
    )
    path = preset(to_toml(config))
    assert repr(load_config([], path)) == repr(config)
    sections = tomllib.loads(path.read_text(encoding="utf-8"))
    assert {name: section for section, inner in sections.items() for name in inner} == SECTION_OF


def test_a_resumed_run_refuses_changed_and_unknown_settings():
    def resume(before: dict, processes=(1, 1), **now) -> None:
        refuse_changes(asdict(Config()) | before, replace(Config(), **now), "step-3", processes)

    resume({}, save_every=3, train_data="x", steps=4)
    resume({}, kl_coef=0.5, allow_changes="kl_coef")
    resume({}, kl_coef=0.5, allow_changes="all")
    resume({}, (1, 2))
    with pytest.raises(UserError, match=r"step-3 .* kl_coef 0.001 \(now 0.5\).*--allow-changes kl_coef,seed"):
        resume({}, kl_coef=0.5, seed=1)
    for cosine in ({"lr_schedule": "cosine"}, {"warmup_ratio": 0.1}):  # the learning rate depends on the steps
        with pytest.raises(UserError, match="steps 0"):
            resume(cosine, steps=4, **cosine)
    with pytest.raises(UserError, match="lora_rank 0"):
        resume({}, lora_rank=8)
    packed = {"loss_aggregation": "microbatch_token_mean"}
    with pytest.raises(UserError, match="1 processes"):
        resume(packed, (1, 2), **packed)
    with pytest.raises(UserError, match="tokens_per_microbatch"):
        resume(packed, tokens_per_microbatch=5, **packed)
    with pytest.raises(UserError, match="step-3: there is no setting 'kl_coeff'. Did you mean 'kl_coef'"):
        resume({"kl_coeff": 0.1})


def test_help_lists_every_setting(preset, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        load_config(["--nonsense", "--help"], preset("group_size = 77"))
    text = capsys.readouterr().out
    assert not stop.value.code and text.count("\n  --") >= len(SETTINGS)
    assert all(f"--{name.replace('_', '-')} " in text for name in SETTINGS)
    assert "[replies; default: 77; paper: 5]" in text and "sequence_mean_token_sum" in text


@pytest.mark.parametrize("size", ["7", "14"])
def test_the_papers_presets_state_every_value(size):
    table = tomllib.loads((ROOT / "configs" / f"tool_n1_{size}b.toml").read_text(encoding="utf-8"))
    own = {name: (section, value) for section, inner in table.items() for name, value in inner.items()}
    expected = {
        name: section for name, section in SECTION_OF.items() if name not in ("resume", "allow_changes", "check")
    }
    assert {name: section for name, (section, _) in own.items()} == expected
    ours = {"tokens_per_microbatch": 16384} if size == "14" else {}  # no other gradient
    assert {name: own[name][1] for name in PAPER} == PAPER | ours
    assert own["model"][1] == f"Qwen/Qwen2.5-{size}B-Instruct" and own["activation_checkpointing"][1] == "on"


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_every_preset_is_read_and_written_back(preset, tmp_path):
    config = load_config(["--config", str(preset)], preset)
    (tmp_path / "again.toml").write_text(to_toml(config))
    assert load_config(["--config", str(tmp_path / "again.toml")], preset) == config


def test_presets_differ_from_the_papers_run_in_what_they_are_about():
    def changed(name: str) -> dict:
        paper, other = (read_preset(ROOT / "configs" / f"{preset}.toml") for preset in ("tool_n1_7b", name))
        return {key: other[key] for key in other if other[key] != paper.get(key) and key != "run_dir"}

    assert changed("tool_n1_14b") == {"model": "Qwen/Qwen2.5-14B-Instruct", "tokens_per_microbatch": 16384}
    assert changed("ablation_format_partial") == {"reward": "format_partial"}
    assert changed("ablation_format_name_partial") == {"reward": "format_name_partial"}
    assert changed("ablation_no_think") == {"reward": "binary_no_think", "think": False}
    assert set(changed("ablation_xlam_only")) == set(changed("ablation_toolace_only")) == {"train_data", "eval_data"}
    assert changed("tool_n1_llama3.1_8b") == {"model": "meta-llama/Llama-3.1-8B-Instruct"}
    directories = [load_config([], path).run_dir for path in PRESETS]
    assert len(set(directories)) == len(directories)
