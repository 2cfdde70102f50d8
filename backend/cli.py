"""``deephair <verb>``: one command for everything. Heavy libraries are imported by the verb that needs them (DESIGN section 3)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from backend import __version__, console

Run = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line and runs the verb; returns 0 done, 1 failed, 2 wrong usage, 3 done with rejected items."""
    parser = build_parser()
    arguments = parser.parse_args(argv) if not _has_intermixed(argv) else _parse_intermixed(parser, argv)
    run: Run = arguments.run
    return console.guarded(lambda: run(arguments))


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="deephair", description="Try on a hairstyle at your photo's own resolution; train the model that does it."
    )
    parser.add_argument("--version", action="version", version=f"deephair {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    _add_run(verbs)
    console.add_prepare_arguments(_stage(verbs, "prepare", _prepare, "Stage 0: photos and labels become training data"))
    for name, run, text in (
        ("texture", _texture, "Stage 1: train the hair texture encoder ('texture predict IMAGE...' to use it)"),
        ("train", _train, "Stage 2: fine-tune the SDXL inpainting UNet"),
        ("evaluate", _evaluate, "measure the newest checkpoint or the deployed model without deploying"),
    ):
        _stage(verbs, name, run, text)
    export = _stage(verbs, "export", _export, "Stage 3: evaluate, decide, deploy")
    export.add_argument("--force", metavar="REASON", default="", help="deploy even if the gate fails; the reason is recorded in the bundle")
    export.add_argument("--rollback", action="store_true", help="bring the previously deployed model back; a second time undoes it")
    export.add_argument("--diffusers", metavar="FOLDER", default="", help="write the deployed UNet as a diffusers folder")
    export.add_argument("--single-file", metavar="FILE", default="", help="write the deployed UNet as one file with the original SDXL keys")
    _stage(verbs, "serve", _serve, "serve the deployed model and the web page")
    _add_tryon(verbs)
    verify = verbs.add_parser(
        "verify", help="check a deploy bundle", description="Checks a deploy bundle: exit code 0, or 1 with the reason."
    )
    verify.add_argument("bundle", metavar="BUNDLE")
    verify.add_argument("--json", action="store_true", help="print what the bundle says of itself")
    verify.set_defaults(run=_verify)
    _stage(verbs, "doctor", _doctor, "say what this machine lacks for 'deephair run', with the command that mends it")
    _stage(verbs, "models", _models, "the pretrained parts: 'models list', 'models download [PART...|all]', 'models verify [PART...]'")
    demo = _stage(verbs, "demo-data", _demo_data, "write the miniature K-Hairstyle set and the miniature pretrained parts")
    demo.add_argument(
        "--set", choices=("demo", "bench", "learn", "learn-long"), default="demo", help="how many heads and views (default: demo)"
    )
    return parser


def _stage(verbs: Any, name: str, run: Run, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    console.add_stage_arguments(parser)
    parser.set_defaults(run=run)
    return parser


def _add_run(verbs: Any) -> None:
    parser = _stage(verbs, "run", _run, "all four stages in order; finished work is skipped")
    parser.add_argument(
        "--from-stage", type=int, choices=range(4), default=0, metavar="N", help="begin at stage N: 0 prepare, 1 texture, 2 train, 3 export"
    )
    parser.add_argument("--force", metavar="REASON", default="", help="deploy even if the gate fails; the reason is recorded")


def _add_tryon(verbs: Any) -> None:
    parser = verbs.add_parser("tryon", help="put the hair of REFERENCE on PHOTO", description="Puts the hair of one photo on another.")
    parser.add_argument("photo", metavar="PHOTO", help="whose hair is changed; a folder does each picture in it; '-' reads standard input")
    parser.add_argument("reference", metavar="REFERENCE", nargs="?", help="whose hair it gets")
    parser.add_argument(
        "-o", "--output", metavar="OUT", required=True, help="PNG to write, or folder for a folder; '-' writes standard output"
    )
    parser.add_argument("--prompt", default="", help="a description of the hair, instead of or beside the reference")
    for name in ("length", "curl", "color", "bangs"):  # what they can be is in prompts.choices; a wrong one is refused with the list
        parser.add_argument(f"--{name}", metavar="WORD", help=f"the wanted {name}, as a word of the training labels")
    parser.add_argument(
        "--mode", choices=("full", "colour", "shape"), default="full", help="all of the hair, only its colour, or all but it"
    )
    parser.add_argument(
        "--strength", type=_between(float, 0, 1), default=1.0, metavar="0..1", help="how far to leave the present hair (default: 1)"
    )
    parser.add_argument("--mask", metavar="PNG", help="where hair may change: of the upright photo's size, not black there")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=_between(int, 1, 200), help="sampling steps (default: sample.steps)")
    parser.add_argument(
        "--guidance", type=_between(float, 1, 20), help="how closely reference and words are followed (default: sample.guidance)"
    )
    parser.add_argument("--face", type=int, help="which face of the photo, 0 is the largest")
    parser.add_argument("--config", metavar="FILE", help="configuration file (default: configs/rtx3060.yaml)")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="key=value", help="a setting; may be given again")
    parser.add_argument("--json", action="store_true", help="print what was done as JSON on standard error")
    parser.set_defaults(run=_tryon)


def _between(kind: Callable[[str], float], low: float, high: float) -> Callable[[str], float]:
    def read(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value

    read.__name__ = kind.__name__  # argparse names it in its own message
    return read


def _has_intermixed(argv: Sequence[str] | None) -> bool:
    """Whether the verb takes overrides that may stand among options; argparse needs another call for that."""
    words = list(sys.argv[1:] if argv is None else argv)
    return bool(words) and words[0] in {
        "run",
        "prepare",
        "texture",
        "train",
        "evaluate",
        "export",
        "serve",
        "models",
        "doctor",
        "demo-data",
    }


def _parse_intermixed(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    words = list(sys.argv[1:] if argv is None else argv)
    if "-h" in words or "--help" in words:
        return parser.parse_args(words)
    action = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return action.choices[words[0]].parse_intermixed_args(words[1:])


# ---- verbs ----


def _run(parsed: argparse.Namespace) -> int:
    arguments = console.stage_arguments(parsed)
    from backend.training.pipeline_run import run_stages

    return run_stages(arguments)


def _prepare(parsed: argparse.Namespace) -> int:
    arguments = console.stage_arguments(parsed)
    from backend.training.prepare_dataset_deephair import verb

    return verb(arguments)


def _texture(parsed: argparse.Namespace) -> int:
    if parsed.overrides[:1] == ["predict"]:
        images = [word for word in parsed.overrides[1:] if "=" not in word]
        parsed.overrides = [word for word in parsed.overrides[1:] if "=" in word]
        return _texture_predict(parsed, images)
    arguments = console.stage_arguments(parsed)
    from backend.training.train_texture import verb

    return verb(arguments)


def _texture_predict(parsed: argparse.Namespace, images: list[str]) -> int:
    from pathlib import Path

    from backend.errors import UsageError

    arguments = console.stage_arguments(parsed)
    if not images:
        raise UsageError("no picture was named", hint="deephair texture predict hair1.png hair2.jpg")
    from backend.training.texture_predict import predict

    for row in predict(arguments.config, [Path(image) for image in images]):
        console.print_result(row)
    return console.DONE


def _train(parsed: argparse.Namespace) -> int:
    arguments = console.stage_arguments(parsed)
    from backend.training.train_stage2 import verb

    return verb(arguments)


def _evaluate(parsed: argparse.Namespace) -> int:
    arguments = console.stage_arguments(parsed)
    from backend.training.export_model import evaluate_verb

    return evaluate_verb(arguments)


def _export(parsed: argparse.Namespace) -> int:
    arguments = console.stage_arguments(parsed)
    from backend.training.export_model import verb

    return verb(arguments)


def _serve(parsed: argparse.Namespace) -> int:
    arguments = console.stage_arguments(parsed)
    from backend.app.server import serve

    return serve(arguments.config)


def _tryon(parsed: argparse.Namespace) -> int:
    console.set_up_logging(quiet=True)
    from backend.config import load_config
    from backend.tryon.command import try_on_files

    return try_on_files(load_config(parsed.config, parsed.overrides), parsed)


def _verify(parsed: argparse.Namespace) -> int:
    from pathlib import Path

    from backend import artifacts
    from backend.training.models.bundle import read_bundle

    header, _ = read_bundle(Path(parsed.bundle))
    digest = artifacts.sha256_file(Path(parsed.bundle))
    if parsed.json:
        console.print_result({"sha256": digest, **header})
    else:
        over = f", a LoRA over the base with sha256 {header['base']['sha256']}" if "lora" in header else ""
        sys.stdout.write(f"{parsed.bundle}: a whole bundle, sha256 {digest}{over}\n")
    return console.DONE


def _models(parsed: argparse.Namespace) -> int:
    import os

    from backend.errors import UsageError

    words = [word for word in parsed.overrides if "=" not in word]
    parsed.overrides = [word for word in parsed.overrides if "=" in word]
    action, names = (words[0], words[1:]) if words else ("list", [])
    if action not in {"list", "download", "verify"} or (action == "list" and names):
        raise UsageError(f"unknown action '{' '.join(words)}'", hint="deephair models list | download [PART...] | verify [PART...]")
    if action == "download":  # the one verb that may connect; whoever has set the variable is obeyed
        os.environ.setdefault("HF_HUB_OFFLINE", os.environ.get("TRANSFORMERS_OFFLINE", "0"))
    arguments = console.stage_arguments(parsed)
    from backend import models_command

    if action == "download":
        return models_command.download(arguments.config, names, dry_run=arguments.dry_run, as_json=arguments.json)
    if action == "verify":
        return models_command.verify(arguments.config, names, as_json=arguments.json)
    return models_command.show(arguments.config, as_json=arguments.json)


def _doctor(parsed: argparse.Namespace) -> int:
    arguments = console.stage_arguments(parsed)
    from backend.doctor import verb

    return verb(arguments)


def _demo_data(parsed: argparse.Namespace) -> int:
    arguments = console.stage_arguments(parsed)
    from backend.demo.world import build_world

    result = build_world(arguments.config, parsed.set)
    if arguments.json:
        console.print_result(result)
    return console.DONE


if __name__ == "__main__":
    raise SystemExit(main())
