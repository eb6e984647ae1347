"""Raw xLAM and ToolACE files to train.jsonl, heldout.jsonl and report.json.

    python -m tooln1.prepare --xlam xlam_function_calling_60k.json --toolace data.json --out DIR

docs/data.md lists the differences from the released preprocessing (verl/examples/data_preprocess).
"""

import argparse
import json

from tooln1.data import write_examples
from tooln1.io.errors import UserError, exit_on_user_error
from tooln1.io.files import atomic_write, check_writable
from tooln1.prepare.augment import add_irrelevance, mask_names
from tooln1.prepare.convert import SOURCES, convert_toolace, convert_xlam
from tooln1.prepare.split import split
from tooln1.prompt import drop_long
from tooln1.tokenizer import load_tokenizer

TABLE_NOTE = (
    "Raw: rows; a ToolACE row is multi with more than one assistant turn.\n"
    "Processed: instances, one per call step; multi from the third turn on, as the released code has it."
)


def prepare(args: argparse.Namespace) -> dict:
    """Convert, filter, split and write train.jsonl, heldout.jsonl and report.json; returns the report."""
    if not (args.xlam or args.toolace):
        raise UserError("nothing to convert: pass --xlam FILE, --toolace FILE or both")
    if not all(0 <= fraction <= 1 for fraction in (args.irrelevance, args.mask_functions, args.mask_parameters)):
        raise UserError("--irrelevance, --mask-functions and --mask-parameters take a share from 0 to 1")
    out = check_writable(args.out, "--out")
    conversions = {}
    if args.xlam:
        conversions["xlam"] = convert_xlam(args.xlam, args.keep_no_call)
    if args.toolace:
        conversions["toolace"] = convert_toolace(args.toolace, args.keep_no_call)
    examples = [example for conversion in conversions.values() for example in conversion.examples]
    too_long = None
    if args.tokenizer:
        examples, too_long = drop_long(examples, load_tokenizer(args.tokenizer), args.max_prompt_tokens)
    if not examples:
        dropped = [f"{reason}: {count}; " for c in conversions.values() for reason, count in c.dropped.items()]
        raise UserError(f"no example is left, nothing was written ({''.join(dropped)}too long: {too_long or 0})")
    sides = split(examples, args.seed, args.held_out)
    sides = [add_irrelevance(side, args.irrelevance, args.seed) for side in sides]
    copies, masked = sum(map(len, sides)) - len(examples), {}
    for part, fraction in (("functions", args.mask_functions), ("parameters", args.mask_parameters)):
        sides[0], masked[part] = mask_names(sides[0], part, fraction, args.seed)
    rows = {source: count for conversion in conversions.values() for source, count in conversion.rows.items()}
    report = {
        "raw": {source: rows.get(source, 0) for source in SOURCES},
        "processed": {source: sum(e.source == source for e in examples) for source in SOURCES},
        "train": len(sides[0]),
        "heldout": len(sides[1]),
        "irrelevance_copies": copies,
        "masked": masked,
        "dropped": {name: dict(sorted(conversion.dropped.items())) for name, conversion in conversions.items()},
        "too_long": too_long,
        "options": {key: value for key, value in vars(args).items() if key != "out"},
    }
    for name, side in zip(("train.jsonl", "heldout.jsonl"), sides, strict=True):
        write_examples(side, out / name)
    with atomic_write(out / "report.json") as file:
        file.write(json.dumps(report, indent=2) + "\n")
    return report


def format_report(report: dict) -> str:
    """The counts of the paper's Table 1 as a table, then the dropped rows by reason."""
    lines = ["| | xLAM single | ToolACE single | ToolACE multi |", "|---|---|---|---|"]
    for key in ("raw", "processed"):
        lines.append(f"| {key} | " + " | ".join(f"{report[key][source]:,}" for source in SOURCES) + " |")
    lines += ["", TABLE_NOTE, ""]
    for source, unit in (("xlam", "xLAM rows"), ("toolace", "ToolACE assistant turns")):
        for reason, count in report["dropped"].get(source, {}).items():
            lines.append(f"dropped {unit}, {reason}: {count:,}")
    options = report["options"]
    counted = "not checked, pass --tokenizer" if report["too_long"] is None else f"{report['too_long']:,}"
    lines.append(f"dropped examples, prompt over {options['max_prompt_tokens']:,} tokens: {counted}")
    if report["irrelevance_copies"]:
        lines.append(f"irrelevance copies added after the split: {report['irrelevance_copies']:,}")
    if any(report["masked"].values()):
        lines.append("training examples with masked {}: {:,}, {}: {:,}".format(*sum(report["masked"].items(), ())))
    lines.append(f"train {report['train']:,}, held out {report['heldout']:,} (seed {options['seed']})")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tooln1.prepare", description=__doc__.splitlines()[0])
    parser.add_argument("--xlam", help="xLAM rows, JSON array or JSONL: {query, tools, answers}")
    parser.add_argument("--toolace", help="ToolACE rows, JSON array or JSONL: {system, conversations}")
    parser.add_argument("--out", required=True, help="folder for train.jsonl, heldout.jsonl and report.json")
    parser.add_argument("--held-out", type=float, default=0.1, help="share of rows held out (paper: 0.1)")
    parser.add_argument("--seed", type=int, default=0, help="of the split, and of what the fractions draw")
    for option, text in (
        ("--irrelevance", "copies without the answer's tools, as a share of all (paper: 0)"),
        ("--mask-functions", "share of training examples whose functions get random names, in place (paper: 0)"),
        ("--mask-parameters", "share of training examples whose parameters get random names, in place (paper: 0)"),
    ):
        parser.add_argument(option, type=float, default=0.0, metavar="FRACTION", help=text)
    parser.add_argument("--keep-no-call", action="store_true", help="keep turns without a call, as answer []")
    parser.add_argument("--tokenizer", help="model folder or hub id; with it, over-long prompts are dropped")
    parser.add_argument("--max-prompt-tokens", type=int, default=4096, help="longest prompt kept")
    print(format_report(prepare(parser.parse_args())))


if __name__ == "__main__":
    exit_on_user_error(main)
