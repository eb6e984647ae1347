"""The house rules that can be read off the source: who imports whom, and what is never imported."""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PRODUCT = [*sorted((ROOT / "tooln1").rglob("*.py")), ROOT / "train.py", ROOT / "eval.py"]
ALLOWED = {"torch", "safetensors", "tokenizers", "numpy", "jinja2", "huggingface_hub", "tqdm", "tooln1", "__future__"}
OPTIONAL = {"matplotlib": "plot", "tensorboard": "metrics"}  # imported in a function, with a message when absent


def type_checking(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def imports(path: Path) -> set[str]:
    """Dotted names of the modules a file imports when it runs (not those only for type checkers)."""
    tree, found = ast.parse(path.read_text(encoding="utf-8")), set()
    skipped = {id(inner) for node in ast.walk(tree) if type_checking(node) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def graph() -> dict[str, set[str]]:
    modules = {name_of(path): path for path in PRODUCT if path.exists()}
    return {name: {other for other in imports(path) if other in modules and other != name}
            for name, path in modules.items()}  # fmt: skip


def test_only_the_five_packages_and_what_they_bring():
    for path in PRODUCT:
        for module in imports(path) if path.exists() else ():
            top = module.split(".")[0]
            known = top in ALLOWED or top in sys.stdlib_module_names
            assert known or OPTIONAL.get(top) == path.stem, f"{path.name} imports {module}"


def test_imports_have_no_cycles():
    edges, done = graph(), set()

    def visit(name, above):
        assert name not in above, " -> ".join([*above, name])
        if name not in done:
            for other in edges[name]:
                visit(other, [*above, name])
            done.add(name)

    for name in edges:
        visit(name, [])


def test_only_the_entry_points_see_the_config():
    users = {name for name, others in graph().items() if {"tooln1.config", "tooln1.settings"} & others}
    assert users <= {"train", "eval", "tooln1.config"}
    assert "train" in users


def test_nothing_on_the_path_imports_what_stands_beside_it():
    """Benchmarks are for evaluation only, and evaluation for the entry points: train.py evaluates as it goes."""
    beside = ("tooln1.demo", "tooln1.plot", "tooln1.benchmarks", "tooln1.evaluation")
    for name, others in graph().items():
        found = {other for other in others if other.startswith(beside)}
        if name == "train":
            assert found == {"tooln1.evaluation"}
        elif name != "eval" and not name.startswith(beside):
            assert not found, name


def test_the_mathematics_is_pure():
    """grpo.py takes tensors and gives tensors: it imports torch and nothing of this project."""
    assert graph()["tooln1.grpo"] == set()


def test_nothing_is_evaluated_or_unpickled():
    for path in PRODUCT:
        if not path.exists():
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec", "compile", "torch.load", "pickle.load", "pickle.loads"), path
