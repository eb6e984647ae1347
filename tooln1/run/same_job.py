"""Whether all processes of a job run the same: nodes may hold other copies of the code, the packages or the files."""

import hashlib
import socket
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

from tooln1.config import REPOSITORY
from tooln1.distributed import World
from tooln1.io.errors import UserError


def code_version() -> str:
    """A hash of the source of train.py and tooln1/."""
    files = [REPOSITORY / "train.py", *sorted((REPOSITORY / "tooln1").rglob("*.py"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def require_same_on_all_ranks(world: World, facts: Mapping[str, Any]) -> None:
    """Raise UserError on all ranks if `facts`, values by name, differ between them: which, where (a collective)."""
    ranks = world.gather([(socket.gethostname(), facts)])
    places: dict[str, list[str]] = defaultdict(list)  # of each value that is not the usual one
    for name in facts:
        values = [repr(theirs.get(name)) for _, theirs in ranks]
        (usual, _), *_ = Counter(values).most_common()  # of equally usual ones rank 0's
        for rank, value in enumerate(values):
            if value != usual:
                places[f"{name} is {value} and not {usual}"].append(f"rank {rank} ({ranks[rank][0]})")
    if places:
        different = "; ".join(f"{what} on {', '.join(where)}" for what, where in places.items())
        way_out = "Give them the same code, settings and files; a task file must not be random."
        raise UserError(f"Not all processes run the same: {different}. {way_out}")
