"""The Python file that `--task` names, with functions in place of Tool-N1's (tooln1/task.py):

    def reward(reply, example): ...     # -> a finite number. Required; `reply` is without the stop token at its end
    def read(path): ...                 # -> list[Example]
    def messages(example): ...          # -> [{"role": str, "content": str}, ...]
    def metrics(reply, example): ...    # -> {name: number}; logged as task/name

It is run as code. So only the command line can name it: no preset, no config.toml and no checkpoint.
"""

import hashlib
import sys
import traceback
from collections.abc import Callable
from functools import partial
from importlib.machinery import SourceFileLoader
from numbers import Real
from types import ModuleType
from typing import Any

from tooln1.io.errors import UserError
from tooln1.io.jsonl import read_text
from tooln1.prompt import without_stop_token
from tooln1.task import Task


def load_task(file: str, think: bool = True, rule: str = "binary") -> Task:
    """Tool-N1 with the functions that a task file has; "" for Tool-N1 itself.

    Raises UserError, also in these functions: for an exception (with the example's id and the traceback), for a reward
    that is no finite number, and for a file that cannot be read or has no `reward`.
    """
    if not file:
        return Task(think, rule)
    task = Task(think, rule, file, hashlib.sha256(read_text(file).encode()).hexdigest()[:16])
    module = sys.modules["task_file"] = ModuleType("task_file")
    _checked(file, "import", lambda _: _Loader("task_file", file).exec_module(module), file)
    if not hasattr(module, "reward"):
        raise UserError(f"{file} has no function reward(reply, example), which every task needs.")
    for name in ("read", "messages", "reward", "metrics"):
        if hasattr(module, name):
            setattr(task, name, partial(_checked, file, name, getattr(module, name)))
    return task


class _Loader(SourceFileLoader):
    def get_code(self, name: str):  # of the file as it is now, without a cache
        return self.source_to_code(self.get_data(self.path), self.path)


def _checked(file: str, name: str, function: Callable, *arguments: Any) -> Any:
    """function(*arguments); the last argument is what an error names."""
    *reply, subject = arguments
    where = f"{file}, {name} of {getattr(subject, 'id', subject)!r}"
    try:
        value = function(*map(without_stop_token, reply), subject)
        if name == "read":
            return list(value)
        numbers = [value] if name == "reward" else list(value.values()) if name == "metrics" else []
    except UserError:
        raise
    except Exception:
        raise UserError(f"{where} failed:\n{traceback.format_exc()}") from None
    if not all(isinstance(number, Real) and abs(number) < 3e38 for number in numbers):
        raise UserError(f"{where} is {value!r}; it must be a finite number.")
    if name == "metrics":  # no name of the run's own
        return {key if key in ("accuracy", "format_ok") else f"task/{key}": number for key, number in value.items()}
    return value
