"""The house rules that can be read off the source: who imports whom, and what is never imported."""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PRODUCT = [*sorted((ROOT / "tooln1").rglob("*.py")), ROOT / "train.py", ROOT / "eval.py"]
ALLOWED = {"torch", "safetensors", "tokenizers", "numpy", "jinja2", "huggingface_hub", "tqdm", "tooln1", "__future__"}
OPTIONAL = {"matplotlib": "plot", "tensorboard": "tensorboard"}  # imported in a function, with a message when absent


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
    modules = {name_of(path): path for path in PRODUCT}
    return {
        name: {other for other in imports(path) if other in modules and other != name} for name, path in modules.items()
    }


def test_only_the_five_packages_and_what_they_bring():
    for path in PRODUCT:
        for module in imports(path):
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


def test_only_the_entry_points_and_run_see_the_config():
    users = {name for name, others in graph().items() if "tooln1.config" in others}
    assert {name for name in users if not name.startswith("tooln1.run.")} <= {"train", "eval", "tooln1.config"}
    assert "train" in users


def test_folders_import_along_the_way_of_the_data():
    """io/ imports nothing of ours outside itself; the algorithm nothing that stands beside it."""
    beside = ("tooln1.run", "tooln1.benchmarks", "tooln1.prepare", "tooln1.demo")
    for name, others in graph().items():
        if name.startswith("tooln1.io"):
            assert all(other.startswith("tooln1.io") for other in others), name
        elif name.startswith("tooln1.") and not name.startswith(beside):
            assert not {other for other in others if other.startswith(beside)}, name


def test_the_mathematics_is_pure():
    """grpo.py takes tensors and gives tensors: it imports torch and nothing of this project."""
    assert graph()["tooln1.grpo"] == set()


# Whatever makes code of data, or runs a program: neither a file nor a reply of a model may come near it.
READS_OBJECTS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml"}
RUNS_CODE = {"subprocess", "pty", "code", "codeop", "runpy", "multiprocessing.reduction", "torch.serialization"}
FORBIDDEN_MODULES = READS_OBJECTS | RUNS_CODE
BUILTINS = {"eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec", "builtins.compile"}
LOADERS = {"torch.load", "torch.hub.load", "torch.jit.load", "torch.package.PackageImporter", "np.load", "numpy.load"}
FORBIDDEN_CALLS = BUILTINS | LOADERS | {"os.system", "os.popen", "os.startfile"}
RUNS_A_PROGRAM = ("os.exec", "os.spawn", "os.posix_spawn")


def test_nothing_is_evaluated_unpickled_or_run():
    for path in PRODUCT:
        found = {name for name in imports(path) if FORBIDDEN_MODULES & {name, name.split(".")[0]}}
        # a study starts train.py, eval.py and modules of this package (study.PREPARE), no other program
        assert found == ({"subprocess"} if path.name == "study.py" else set()), path
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in FORBIDDEN_CALLS and not called.startswith(RUNS_A_PROGRAM), f"{path}: {called}"
            if isinstance(node, ast.ImportFrom):  # and none of them under another name
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                assert not names & FORBIDDEN_CALLS, f"{path}: {names}"
            assert not (isinstance(node, ast.keyword) and node.arg == "allow_pickle"), path
