"""Settings: where a value comes from, what is refused and how, and the presets against the paper."""

import ast
import tomllib
from dataclasses import FrozenInstanceError, asdict, fields, replace
from pathlib import Path

import pytest

from tooln1 import config as config_module
from tooln1.config import differences, help_text, load_config, read_preset, to_toml
from tooln1.settings import AGGREGATIONS, REWARD_NAMES, SECTION_OF, SETTINGS, Config, validate

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
    "scale_by_std": True,
    "advantage_eps": 1e-6,
    "learning_rate": 1e-6,
    "lr_schedule": "constant",
    "warmup_ratio": 0.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "activation_checkpointing": "on",
    "eval_every": 10,
    "eval_before_training": False,
    "save_every": 10,
    "think": True,
}


@pytest.fixture
def preset(tmp_path):
    """Write a preset and hand back its path."""

    def write(text: str, name: str = "preset.toml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


# --- where a value comes from


def test_defaults_are_the_papers_values():
    found = asdict(Config())
    by_size = {"activation_checkpointing": "auto"}  # on for the paper's models
    assert {name: found[name] for name in PAPER} == PAPER | by_size


def test_command_line_beats_preset_beats_default(preset):
    path = preset("group_size = 8\nkl_coef = 0.5\n")
    config = load_config(["--kl-coef", "0.25"], path)
    assert (config.group_size, config.kl_coef, config.temperature) == (8, 0.25, 0.7)


def test_config_option_replaces_the_default_preset(preset):
    default, other = preset("steps = 1", "a.toml"), preset("steps = 2", "b.toml")
    assert load_config([], default).steps == 1
    assert load_config(["--config", str(other)], default).steps == 2
    assert load_config([f"--config={other}", "--steps=3"], default).steps == 3


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--group-size", "3"], "group_size", 3),
        (["--group_size=3"], "group_size", 3),
        (["--learning-rate", "3e-4"], "learning_rate", 3e-4),
        (["--learning-rate", "1"], "learning_rate", 1.0),
        (["--shuffle-rewards"], "shuffle_rewards", True),
        (["--shuffle-rewards", "true", "--steps", "2"], "shuffle_rewards", True),
        (["--scale-by-std", "False"], "scale_by_std", False),
        (["--scale-by-std=false"], "scale_by_std", False),
        (["--resume"], "resume", "auto"),
        (["--resume", "--steps", "2"], "resume", "auto"),
        (["--resume", "runs/x/checkpoints/4"], "resume", "runs/x/checkpoints/4"),
        (["--model", "a=b c"], "model", "a=b c"),
        (["--model=a=b"], "model", "a=b"),
        (["--eval-data", ""], "eval_data", ""),
        (["--eval-data="], "eval_data", ""),
        (["--steps", "1", "--steps", "2"], "steps", 2),
    ],
)
def test_command_line_forms(preset, argv, name, value):
    found = getattr(load_config(argv, preset("")), name)
    assert found == value and type(found) is type(value)


def test_sections_and_flat_keys_read_the_same(preset):
    flat = preset('temperature = 1\nreward = "strict"\nrun_dir = "r"', "flat.toml")
    sections = preset(
        '[run]\nrun_dir = "r"\n[rollout]\ntemperature = 1.0\n[reward]\nreward = "strict"', "sections.toml"
    )
    assert load_config([], flat) == load_config([], sections)
    assert load_config([], flat).reward == "strict"


def test_base_is_relative_to_the_preset_and_weaker(preset, tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    preset("steps = 1\ngroup_size = 3\ntop_k = 9", "grand.toml")
    preset('base = "../grand.toml"\nsteps = 2\ngroup_size = 4', "sub/parent.toml")
    child = preset('base = "sub/parent.toml"\nsteps = 3', "child.toml")
    monkeypatch.chdir("/")
    config = load_config([], child)
    assert (config.steps, config.group_size, config.top_k) == (3, 4, 9)


def test_byte_order_mark_is_read_over(tmp_path):
    path = tmp_path / "bom.toml"
    path.write_bytes(b"\xef\xbb\xbfsteps = 5\n")
    assert load_config([], path).steps == 5


# --- paths


def test_preset_paths_fall_back_to_the_repository(preset, tmp_path, monkeypatch):
    repository = tmp_path / "repository"
    (repository / "data").mkdir(parents=True)
    (repository / "data" / "train.jsonl").touch()
    (repository / "both.jsonl").touch()
    here = tmp_path / "here"
    here.mkdir()
    (here / "both.jsonl").touch()
    monkeypatch.setattr(config_module, "REPOSITORY", repository)
    monkeypatch.chdir(here)
    lines = ["model = 'Some/HubId'", "run_dir = 'data'"]
    lines += ['train_data = "data/train.jsonl"', 'eval_data = "both.jsonl"']
    path = preset("\n".join(lines))
    config = load_config([], path)
    assert config.train_data == str(repository / "data" / "train.jsonl")
    assert config.eval_data == "both.jsonl"  # it exists here, so it stays as given
    assert config.model == "Some/HubId"  # exists nowhere: a hub id, or an error that train.py words
    assert config.run_dir == "data"  # written, not read: always from the current directory
    assert config.reference_model == ""
    assert load_config(["--train-data", "data/train.jsonl"], path).train_data == "data/train.jsonl"
    (repository / Config().train_data).parent.mkdir()
    (repository / Config().train_data).touch()
    assert load_config([], preset("")).train_data == str(repository / Config().train_data)


def test_config_option_falls_back_to_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config(["--config", "configs/tool_n1_14b.toml"], "none.toml").model.endswith("14B-Instruct")


# --- settings together (what is refused: mistakes.py)


@pytest.mark.parametrize(
    "changes",
    [
        {"epochs": 0, "steps": 1},
        {"dual_clip": 3.0},
        {"mode": "sft", "group_size": 1},
        {"mode": "sft", "think": False},
        {"think": False, "reward": "binary_no_think"},
        {"prompts_per_minibatch": 1024},
    ],
)
def test_settings_that_go_together(changes):
    validate(replace(Config(), **changes))


def test_config_is_frozen():
    with pytest.raises(FrozenInstanceError):
        Config().steps = 3


# --- writing and comparing


def test_to_toml_round_trips_every_kind_of_value(preset, tmp_path):
    config = replace(
        Config(),
        learning_rate=1 / 3 * 1e-5,
        kl_coef=5e-324,
        max_grad_norm=1.7976931348623157e308,
        temperature=0.1 + 0.2,
        seed=2**62,
        think=False,
        reward="binary_no_think",
        model='a "quoted" \\ path\twith\nlines, \x7f, \x01, ünï, 工具 and \U0001f600',
        resume="auto",
    )
    again = load_config([], preset(to_toml(config)))
    assert again == config
    assert repr(again) == repr(config)  # 0.0 and -0.0, 1 and 1.0 would pass ==
    assert to_toml(again) == to_toml(config)


def test_to_toml_stands_in_sections():
    table = tomllib.loads(to_toml(Config()))
    assert list(table) == list(dict.fromkeys(SECTION_OF.values()))
    assert {name: section for section, inner in table.items() for name in inner} == SECTION_OF


def test_differences():
    a, b = Config(), replace(Config(), steps=4, model="other")
    assert differences(a, a) == {}
    assert differences(a, b) == {"steps": (0, 4), "model": ("Qwen/Qwen2.5-7B-Instruct", "other")}


def test_two_spellings_of_one_path_do_not_differ(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a, b = replace(Config(), train_data="t.jsonl"), replace(Config(), train_data=str(tmp_path / "t.jsonl"))
    assert differences(a, b) == {}
    assert differences(a, replace(Config(), train_data=str(tmp_path / "u.jsonl"))) != {}
    assert set(differences(replace(a, run_dir="r"), replace(b, run_dir="./r"))) == {"run_dir"}
    monkeypatch.chdir("/")
    assert differences(replace(a, eval_data=""), replace(a, eval_data=".")) == {"eval_data": ("", ".")}


# --- help


def test_help_lists_every_setting_and_exits_0(preset, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")
    path = preset("group_size = 77")
    with pytest.raises(SystemExit) as caught:
        load_config(["--help", "--nonsense", "1"], path)
    assert caught.value.code == 0
    out = capsys.readouterr().out
    lines = {line.split()[0]: line for line in out.splitlines() if line.startswith("  --")}
    assert list(lines) == ["--" + name.replace("_", "-") for name in SETTINGS]
    assert lines["--group-size"].split()[1:3] == ["77", "5"]  # this preset's value, then the paper's
    reply_line = lines["--max-reply-tokens"]
    assert reply_line.split()[1:3] == ["8192", "8192"] and reply_line.endswith("[tokens]")
    assert "sequence_mean_token_sum" in out and "binary_no_think" in out
    assert max(len(line) for line in out.splitlines() if str(path) not in line) <= 110
    assert f"preset: {path}\n" in out


def test_short_help_flag_and_its_place(preset):
    for argv in (["-h"], ["--steps", "-h"], ["--steps", "3", "--help"]):
        with pytest.raises(SystemExit) as caught:
            load_config(argv, preset(""))
        assert caught.value.code == 0


def test_help_shows_the_papers_values_where_it_has_them():
    text_of = {float: lambda v: f"{float(v):g}", int: str, bool: lambda v: str(v).lower(), str: str}
    for name, value in PAPER.items():
        paper = SETTINGS[name].metadata["paper"]
        if paper == "off":
            assert value == 0
        else:
            kind = type(value)
            assert text_of[kind](kind(paper) if kind in (int, float) else paper) == text_of[kind](value), name


def test_every_setting_is_described():
    for entry in fields(Config):
        assert entry.metadata["help"], entry.name
        if entry.type in ("int", "float"):
            assert entry.metadata["within"], f"{entry.name} has no range, so NaN or -1 would pass"


def test_help_text_keeps_long_values_whole():
    model = "/somewhere/" + "long/" * 20
    lines = help_text(replace(Config(), model=model), "x.toml").splitlines()
    where = lines.index(f"  --model                     {model}")
    paper, meaning = SETTINGS["model"].metadata["paper"], SETTINGS["model"].metadata["help"]
    header = next(line for line in lines if line.startswith("  option"))
    assert lines[where + 1].index(paper) == header.index("paper")
    assert lines[where + 1].index(meaning[:20]) == header.index("meaning")


# --- the presets


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_every_preset_loads(path):
    validate(load_config([], path))


def test_all_presets_are_there():
    assert {path.stem for path in PRESETS} >= {
        "demo",
        "tool_n1_7b",
        "tool_n1_14b",
        "sft",
        "ablation_format_partial",
        "ablation_format_name_partial",
        "ablation_no_think",
        "ablation_xlam_only",
        "ablation_toolace_only",
    }


@pytest.mark.parametrize("size", ["7", "14"])
def test_the_papers_presets_spell_the_paper_out(size):
    table = tomllib.loads((ROOT / "configs" / f"tool_n1_{size}b.toml").read_text(encoding="utf-8"))
    own = {name: value for section in table.values() for name, value in section.items()}
    assert set(own) == set(SETTINGS) - {"resume", "allow_changes", "check"}  # nothing left to a default
    assert {name: own[name] for name in PAPER} == PAPER
    assert own["model"] == f"Qwen/Qwen2.5-{size}B-Instruct"


def test_presets_differ_from_the_papers_run_in_what_they_are_about():
    def against_7b(name):
        paper = Config(**read_preset(ROOT / "configs" / "tool_n1_7b.toml"))
        changed = differences(paper, Config(**read_preset(ROOT / "configs" / f"{name}.toml")))
        assert changed.pop("run_dir")[1].startswith("runs/")
        return {key: new for key, (_, new) in changed.items()}

    assert against_7b("tool_n1_14b") == {"model": "Qwen/Qwen2.5-14B-Instruct"}
    assert against_7b("ablation_format_partial") == {"reward": "format_partial"}
    assert against_7b("ablation_format_name_partial") == {"reward": "format_name_partial"}
    assert against_7b("ablation_no_think") == {"reward": "binary_no_think", "think": False}
    assert set(against_7b("ablation_xlam_only")) == {"train_data", "eval_data"}
    assert set(against_7b("ablation_toolace_only")) == {"train_data", "eval_data"}
    sft = against_7b("sft")
    assert (sft["mode"], sft["lr_schedule"], sft["warmup_ratio"]) == ("sft", "cosine", 0.1)


def test_run_directories_of_presets_are_distinct():
    folders = [load_config([], path).run_dir for path in PRESETS]
    assert len(set(folders)) == len(folders)


# --- its neighbours


def test_reward_names_are_the_rewards():
    rewards = pytest.importorskip("tooln1.rewards")
    assert tuple(rewards.REWARDS) == REWARD_NAMES


def test_aggregations_are_the_losses():
    grpo = pytest.importorskip("tooln1.grpo")
    assert tuple(grpo.AGGREGATIONS) == AGGREGATIONS


@pytest.mark.parametrize("room,needs", [("settings", {"errors"}), ("config", {"errors", "settings"})])
def test_reading_settings_imports_no_other_room(room, needs):
    tree = ast.parse((ROOT / "tooln1" / f"{room}.py").read_text(encoding="utf-8"))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    ours = {name for name in imported if name.split(".")[0] in ("tooln1", "torch", "numpy")}
    assert ours == {f"tooln1.{name}" for name in needs}
