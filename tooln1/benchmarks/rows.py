"""What the loaders of the benchmarks share: the data's folder, pairs of question and answer, cases from rows."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tooln1.benchmarks import Case
from tooln1.data import checked_example
from tooln1.io.errors import UserError
from tooln1.io.jsonl import read_rows


@contextmanager
def row_errors(where: str) -> Iterator[None]:
    """Turns what a row of an unexpected shape raises into a UserError that names its file and row."""
    try:
        yield
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{where}: not a row as the benchmark has them ({type(error).__name__}: {error})") from None


def data_folder(path: Path, subfolders: Iterable[str], pattern: str, benchmark: str) -> Path:
    """The first of `subfolders` of `path` that holds a file like `pattern`. Raises UserError if none does."""
    for folder in (path / name for name in subfolders):
        if any(folder.glob(pattern)):
            return folder
    raise UserError(f"{path} holds no {benchmark} data: no {pattern} in its folders {', '.join(subfolders)}")


def read_pairs(questions: Path, answers: Path, id_of: Callable[[dict], str]) -> list[tuple[str, dict, Any]]:
    """[(where, question, its "ground_truth")] of two JSONL files whose rows have the same ids, in the questions' order.

    where: file and row of the question, for messages. Raises UserError for a question without an answer.
    """
    accepted = {}
    for where, row in read_rows(answers):
        with row_errors(where):
            accepted[id_of(row)] = row["ground_truth"]
    pairs = []
    for where, row in read_rows(questions):
        with row_errors(where):
            if id_of(row) not in accepted:
                raise UserError(f'{where}: {answers} has no answer to "{id_of(row)}"; is a file cut off or too old?')
            pairs.append((where, row, accepted[id_of(row)]))
    return pairs


def cases_of(rows: Iterable[tuple], make: Callable[..., Case]) -> list[Case]:
    """The case `make(*parts)` of each row (where, *parts).

    Raises UserError, naming `where`, for what `make` raises, a malformed example and an id given twice.
    """
    seen: set[str] = set()
    cases = []
    for where, *parts in rows:
        with row_errors(where):
            cases.append(make(*parts))
            checked_example(vars(cases[-1].example), where, seen)
    return cases
