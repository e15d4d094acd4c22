"""The command line: `jaxllm VERB CONFIG [a.b=value ...]`. The schema of a verb's config is its reference."""

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import jaxllm
from jaxllm.core.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0; 1 (doctor: something is missing), 2 (a message for the user), 130 (interrupt), 141 (pipe)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        status = _run(*argv) if argv else _run("--help") or 2
        sys.stdout.flush()
        return status
    except UserError as e:
        print(e, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `| head` has seen enough; what is still in the buffer has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _run(verb: str, *argv: str) -> int:
    if verb in ("-h", "--help", "help"):
        print(HELP)
    elif verb == "--version":
        print(f"jaxllm {jaxllm.__version__}")
    elif verb in VERBS:
        return VERBS[verb][0](verb, list(argv)) or 0
    else:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        raise UserError(
            f"no verb {verb!r}; " + (f"did you mean {near[0]!r}?" if near else f"known: {', '.join(VERBS)}")
        )
    return 0


def _config_verb(verb: str, argv: list[str]) -> None:
    parser = _parser(verb, "CONFIG", "a YAML file")
    parser.add_argument("--fields", action="store_true", help="list every field of the config and stop")
    _call(parser.parse_intermixed_args(argv), verb, [])


def _generate(verb: str, argv: list[str]) -> None:
    start = "start_token=T: what an encoder-decoder's outputs begin with, such as mBART's token of a language"
    _speak(verb, argv, {"prompt": "prompt=[TEXT]; more than once for a batch"}, {"start_token": start})


def _chat(verb: str, argv: list[str]) -> None:
    turns = "turns=[TEXT]; more than once for several turns; none: a conversation in the terminal"
    template = "template=T: a .jinja file, the name of one in configs/chat or of one of the model's"
    _speak(
        verb, argv, {"prompt": turns, "system": "system=TEXT: what the conversation opens with"}, {"template": template}
    )


def _speak(verb: str, argv: list[str], texts: dict[str, str], names: dict[str, str]) -> None:
    parser = _parser(verb, "CONFIG", "a YAML file, or a model: a run, a checkpoint, a Hugging Face folder, a GGUF file")
    parser.add_argument("--fields", action="store_true", help="list every field of the config and stop")
    for name, doc in texts.items():
        parser.add_argument(f"--{name}", action="append", metavar="TEXT", help=doc)
    for name, doc in names.items():
        parser.add_argument(f"--{name.replace('_', '-')}", metavar="T", help=doc)
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="max_new_tokens=N")
    parser.add_argument(
        "--temperature", type=float, metavar="T", help="sampling.temperature=T; 0: sampling.kind=greedy"
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="sampling.top_k=K")
    parser.add_argument("--top-p", type=float, metavar="P", help="sampling.top_p=P")
    parser.add_argument("--seed", type=int, metavar="N", help="seed=N")
    taken = {}
    for name in texts:
        taken[name], argv = _take(f"--{name}", argv)
    args = parser.parse_intermixed_args(argv)
    given = {name: value for name, value in vars(args).items() if value is not None}
    given |= {name: [*said, *given.get(name, ())] for name, said in taken.items() if said or name in given}
    overrides = {name: given[name] for name in (*names, "max_new_tokens", "seed") if name in given}
    if "prompt" in given:
        overrides["turns" if verb == "chat" else "prompt"] = given["prompt"]
    if "system" in given:
        overrides["system"] = given["system"][-1]
    if sampling := {name: given[name] for name in ("temperature", "top_k", "top_p") if name in given}:
        if sampling.get("temperature") == 0:
            del sampling["temperature"]
            overrides["sampling.kind"] = "greedy"
        else:
            overrides["sampling.kind"] = "sample"
        overrides |= {f"sampling.{name}": value for name, value in sampling.items()}
    from jaxllm.core.config import override

    _call(args, verb, [override(path, value) for path, value in overrides.items()])


def _take(flag: str, argv: list[str]) -> tuple[list[str], list[str]]:
    """The texts given with `flag`, and the other arguments. argparse would not take a text that begins with a dash."""
    texts, others, rest = [], [], iter(argv)
    for arg in rest:
        if arg == "--":
            others += [arg, *rest]
        elif arg.startswith(f"{flag}="):
            texts.append(arg.removeprefix(f"{flag}="))
        elif arg == flag and (text := next(rest, None)) is not None:
            texts.append(text)
        else:
            others.append(arg)
    return texts, others


def _embed(verb: str, argv: list[str]) -> None:
    parser = argparse.ArgumentParser(f"jaxllm {verb}", description=f"{VERBS[verb][1]}: {VERBS[verb][2]}")
    parser.add_argument(
        "config", nargs="?", metavar="MODEL", help="a run, a checkpoint, a folder, a GGUF file; or a YAML file"
    )
    parser.add_argument("text", nargs="*", metavar="TEXT", help="text=[TEXT]; after `--` if one begins with a dash")
    parser.add_argument("--file", metavar="FILE", help="file=FILE: more texts, one a line")
    parser.add_argument("--out", metavar="FILE.npy", help="out=FILE.npy: where vectors go, float32 [texts, width]")
    parser.add_argument("--batch", type=int, metavar="N", help="batch=N: texts computed at once")
    parser.add_argument("--pool", choices=("mean", "cls", "last"), help="pool=mean: what becomes the vector")
    parser.add_argument("--no-normalise", dest="normalise", action="store_false", help="normalise=false", default=None)
    parser.add_argument("--max-tokens", type=int, metavar="N", help="max_tokens=N: longer texts are cut")
    parser.add_argument("--step", type=int, metavar="N", help="step=N: which checkpoint of a run")
    parser.add_argument("--precision", choices=("float32", "bfloat16", "float16"), help="precision=bfloat16")
    parser.add_argument("--fields", action="store_true", help="list every field of the config and stop")
    args = parser.parse_intermixed_args(argv)
    from jaxllm.core.config import override

    names = ("file", "out", "batch", "pool", "normalise", "max_tokens", "step", "precision")
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    if args.text:
        given["text"] = args.text
        if fields := [text for text in args.text if text.partition("=")[0] in (*names, "version")]:
            raise UserError(f"{fields[0]!r} among the texts: a field is set by its flag, as in --file FILE")
    args.overrides = [override(path, value) for path, value in given.items()]
    _call(args, verb, [])


def _call(args: argparse.Namespace, verb: str, overrides: list[str]) -> None:
    from jaxllm import verbs

    if args.fields:
        _print_fields(verbs.schema(verb))
    elif args.config is None:
        raise UserError(f"no config given; for example: {VERBS[verb][2]}")
    else:
        getattr(verbs, verb)(args.config, *overrides, *args.overrides)


def _print_fields(schema: type) -> None:
    from jaxllm.core.config import fields

    rows = [("field", "type", "default", "meaning"), *fields(schema)]
    widths = [max(len(row[i]) for row in rows) for i in range(3)] + [0]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def _convert(verb: str, argv: list[str]) -> None:
    parser = argparse.ArgumentParser(f"jaxllm {verb}", description=f"{VERBS[verb][1]}: {VERBS[verb][2]}")
    parser.add_argument("source", metavar="SRC", help="a run or checkpoint, a Hugging Face folder, a GGUF file")
    parser.add_argument("destination", metavar="DST", help="a folder or a *.gguf file that is not there yet")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16", "q8_0", "q4_0"),
        help="of the weights (as they are); blocks, q8_0 and q4_0, for *.gguf only",
    )  # fmt: skip
    parser.add_argument(
        "--family", metavar="NAME", help="of a Hugging Face folder or a GGUF file that is written: llama, gpt2, ..."
    )
    args = parser.parse_args(argv)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing is computed: accelerators are left to others
    from jaxllm import verbs

    print(verbs.convert(args.source, args.destination, dtype=args.dtype, family=args.family))


def _report(verb: str, argv: list[str]) -> None:
    parser = argparse.ArgumentParser(f"jaxllm {verb}", description="Draws RUN/loss.png from RUN/metrics.jsonl.")
    parser.add_argument("run", metavar="RUN", type=Path, help="a run folder")
    args = parser.parse_args(argv)
    from jaxllm.evaluation.report import draw_losses

    print(draw_losses(args.run))


def _doctor(verb: str, argv: list[str]) -> int:
    args = _parser(verb, "CONFIG", "a config, to check against this machine").parse_intermixed_args(argv)
    from jaxllm.doctor import examine

    return examine(args.config, args.overrides)


def _plan(verb: str, argv: list[str]) -> None:
    parser = _parser(verb, "CONFIG", "a YAML file of a training run")
    parser.add_argument(
        "--on", metavar="CHIPS", help="topology: v5e-256, v6e-256x2, v5p-128, tpu7x-64, h100-8x4, cpu-4"
    )
    parser.add_argument(
        "--search", action="store_true", help="find the best mesh, schedule, microbatches, remat, offload"
    )
    parser.add_argument("--top", type=int, default=3, metavar="K", help="plans of a search that are compiled (3)")
    parser.add_argument("--formulas", action="store_true", help="do not compile: formulas alone answer, in a second")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that is known to FILE")
    parser.add_argument("--tokens", type=float, metavar="N", help="tokens to train on (the config's steps)")
    parser.add_argument("--price", type=float, metavar="P", help="price of a chip and hour")
    parser.add_argument("--pue", type=float, default=1.1, metavar="P", help="power usage effectiveness (1.1)")
    parser.add_argument("--grid", type=float, metavar="G", help="grams of CO2e a kWh")
    parser.add_argument("--watts", type=float, metavar="W", help="power of a chip (what is typical)")
    args = parser.parse_intermixed_args(argv)
    if args.config is None:
        raise UserError(f"no config given; for example: {VERBS[verb][2]}")
    from jaxllm import verbs

    verbs.plan(
        args.config, *args.overrides, on=args.on, search=args.search, top=args.top, proof=not args.formulas,
        file=args.json, tokens=args.tokens, price=args.price, pue=args.pue, grid=args.grid, watts=args.watts,
    )  # fmt: skip


def _bench(verb: str, argv: list[str]) -> None:
    from jaxllm import bench

    parser = argparse.ArgumentParser(f"jaxllm {verb}", description="Prints one JSON object; ratio > 1: ours is better.")
    parser.add_argument("name", choices=bench.names(), help="what to measure")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the object to FILE too")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="rounds, ours and the peer's in turn (5)")
    parser.add_argument(
        "--model", metavar="PATH", help="of `decode`: a Hugging Face folder or GGUF file (random weights)"
    )
    parser.add_argument("--peer", metavar="PEER", help="of `plan`: maxtext, whose programs are compiled beside ours")
    parser.add_argument("--peer-python", metavar="PYTHON", default="python3", help="the interpreter that has the peer")
    args = parser.parse_args(argv)
    peer = {} if args.peer is None else {"peer": args.peer, "python": args.peer_python}
    bench.run(args.name, rounds=args.rounds, file=args.json, model=args.model, **peer)


def _models(verb: str, argv: list[str]) -> None:
    parser = argparse.ArgumentParser(f"jaxllm {verb}", description="Published models as configs, and chat formats.")
    parser.add_argument("name", nargs="?", metavar="NAME", help="a preset, to print whole; or a family, to list alone")
    parser.add_argument("--markdown", action="store_true", help="print docs/models.md")
    args = parser.parse_args(argv)
    from jaxllm import presets

    print(presets.markdown() if args.markdown else presets.listing(args.name))


def _parser(verb: str, config: str, doc: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(f"jaxllm {verb}", description=f"{VERBS[verb][1]}: {VERBS[verb][2]}")
    parser.add_argument("config", nargs="?", metavar=config, help=doc)
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="fields to set")
    return parser


VERBS = {
    "prepare": (_config_verb, "documents to packed token shards", "jaxllm prepare configs/data/quickstart.yaml"),
    "plan": (_plan, "proves and predicts a run on chips, or finds it", "jaxllm plan configs/train/125m_v5e8.yaml"),
    "train": (_config_verb, "shards to a model", "jaxllm train configs/train/quickstart.yaml steps=500"),
    "generate": (_generate, "a model continues prompts", "jaxllm generate runs/quickstart --prompt 'def '"),
    "chat": (_chat, "a conversation with a model, in the terminal", "jaxllm chat SmolLM2-135M-Instruct.Q4_1.gguf"),
    "embed": (_embed, "vectors of texts", "jaxllm embed all-MiniLM-L6-v2 'A text.' 'Another.'"),
    "convert": (
        _convert,
        "folders, checkpoints, GGUF files into each other",
        "jaxllm convert runs/quickstart quickstart.gguf",
    ),
    "models": (_models, "published models as configs, with their sources", "jaxllm models llama2_7b"),
    "report": (_report, "draws the loss curves of a run", "jaxllm report runs/quickstart"),
    "doctor": (_doctor, "what is here, what is missing, what to type for it", "jaxllm doctor [CONFIG]"),
    "bench": (_bench, "measures ours beside a peer", "jaxllm bench train --json FILE"),
}
HELP = f"""usage: jaxllm VERB CONFIG [a.b=value ...]

{chr(10).join(f"  {verb:9} {does:51} {example}" for verb, (_, does, example) in VERBS.items())}

CONFIG is a YAML file; a.b=value sets one of its fields, in YAML too: model.num_layers=12
`jaxllm train --fields` lists every field with type, default and meaning; prepare and generate likewise.
`jaxllm VERB --help` shows the options of a verb."""
