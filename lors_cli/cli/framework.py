"""What every command shares: how it is made, the console's mode, and one map from exceptions to exit codes."""

from __future__ import annotations

import functools
import inspect
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import typer
from rich.markup import escape
from typer.core import TyperCommand, TyperGroup

from lors_cli.cli.options import Json, Quiet, Verbose
from lors_cli.errors import INTERRUPTED, PeerError, translate
from lors_cli.machine import processes
from lors_cli.machine.signals import Stopped, stopping
from lors_cli.output import console
from lors_cli.output.redaction import redact

PIPELINE, STAGES, AROUND, SHARE, HELP = "Whole pipelines", "One stage", "Look and measure", "Share", "Help"
"""Panels of `lors --help`."""


class _FlagsWithoutType:
    """Flags say no type in the help: `--json <bool>` looks as if it took a value."""

    def get_params(self, ctx: Any) -> list[Any]:
        params: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for param in params:
            if getattr(param, "is_flag", False) or getattr(param, "count", False):
                param.display_type_rich = lambda ctx: None
        return params


class Command(_FlagsWithoutType, TyperCommand):
    """One command of `lors`."""


class Group(_FlagsWithoutType, TyperGroup):
    """Commands under a name."""


class Commands(Group):
    """The commands of `lors`; with --json a mistake on the command line is a JSON document on stdout too."""

    _json = False

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        self._json = "--json" in args
        with self._documented():
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: Any) -> Any:
        with self._documented():
            return super().invoke(ctx)

    @contextmanager
    def _documented(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if self._json and hasattr(error, "format_message"):  # click's, which typer brings under its own name
                console.configure(json_mode=True)
                _fail_document(error.format_message(), "lors COMMAND --help lists what there is.", 2)
            raise


def command(
    app: typer.Typer, panel: str, *examples: str, name: str | None = None, sections: Sequence[str] = (),
    flags: Sequence[inspect.Parameter] = (), hidden: bool = False,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:  # fmt: skip
    """Makes a function a guarded command of a panel, with examples at the end of its help.

    As `**flags` it takes `flags`, or those of some sections of a recipe (`flags.FLAGS`).
    """
    lines = "\n".join(escape(example) for example in examples)
    epilog = f"[bold]Examples[/bold]\n{lines}" if examples else None

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        class WithFlags(Command):
            """Its flags are made when it is used: they read the schema, which `lors --help` has no time for."""

            def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
                from lors_cli.cli.flags import parameters

                alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
                alone.command(name=name, cls=Command, epilog=epilog)(guarded(function, parameters(sections)))
                return typer.main.get_command(alone).make_context(info_name, args, parent, **extra)

        wrapped = guarded(function, flags)
        kind = WithFlags if sections else Command
        app.command(name=name, cls=kind, rich_help_panel=panel, epilog=epilog, hidden=hidden)(wrapped)
        return wrapped

    return register


def guarded(function: Callable[..., Any], flags: Iterable[inspect.Parameter] = ()) -> Callable[..., Any]:
    """Configure the console and turn every exception into one message and its exit code."""

    @functools.wraps(function)
    def command(*args: Any, **kwargs: Any) -> Any:
        quiet, verbose = kwargs.pop("quiet", False), kwargs.pop("verbose", 0)
        console.configure(json_mode=kwargs.pop("json_mode", False), verbosity=-1 if quiet else verbose)
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        if console.verbosity() < 2:  # the libraries' own bars; downloads keep theirs
            if processes.num_processes() > 1:  # torch's words on connections that another process has closed
                os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
            os.environ.setdefault("TQDM_DISABLE", "1")
            os.environ.setdefault("HF_HUB_VERBOSITY", "error")
            os.environ.setdefault("DATASETS_VERBOSITY", "error")
            warnings.filterwarnings("ignore", category=FutureWarning)  # for the libraries' users, not for ours
        try:
            with stopping():
                return function(*args, **kwargs)
        except (KeyboardInterrupt, Exception) as error:
            fail(error)

    command.__signature__ = _signature(function, flags)  # type: ignore[attr-defined]
    return command


def _signature(function: Callable[..., Any], flags: Iterable[inspect.Parameter]) -> inspect.Signature:
    """The command's signature, with the flags before what is keyword-only in it, and --json, -q and -v at its end."""
    signature = inspect.signature(function, eval_str=True)
    own = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
    first = [each for each in own if each.kind is not inspect.Parameter.KEYWORD_ONLY]
    common = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=kind, default=default)
        for name, kind, default in (("json_mode", Json, False), ("quiet", Quiet, False), ("verbose", Verbose, 0))
    ]
    return signature.replace(parameters=[*first, *flags, *own[len(first) :], *common])


def fail(error: BaseException) -> NoReturn:
    """Say what went wrong and leave with the right exit code."""
    if isinstance(error, typer.Exit):
        raise error
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):  # the latter is Ctrl-C, or Ctrl-D, at a question
        how = f"stopped by {error.name}" if isinstance(error, Stopped) else "interrupted"
        _leave_to_another(INTERRUPTED)
        console.error(f"{how}; what was finished is kept.", "The same command resumes from there.")
        _fail_document(how, None, INTERRUPTED)
        _leave(INTERRUPTED)
    if isinstance(error, BrokenPipeError):  # `lors … | head`: the reader has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(141) from None
    known = translate(error)
    _leave_to_another(1 if known is None else known.exit_code)
    if isinstance(known, PeerError) and processes.LAUNCHER in os.environ:  # which says so itself
        _leave(known.exit_code)
    if known is None:
        _print_traceback(error)
        console.error(
            f"this is a bug in lors: {type(error).__name__}: {error}", "Please report it with the lines above."
        )
        _fail_document(str(error), None, 1)
        _leave(1)
    if console.verbosity() >= 2:
        _print_traceback(error)
    console.error(known.message, known.hint)
    _fail_document(known.message, known.hint, known.exit_code)
    _leave(known.exit_code)


def _leave_to_another(exit_code: int) -> None:
    """Leave without a word where another process of the job failed before, which has said why."""
    earlier = processes.first_failure(exit_code)
    if earlier is not None:
        _leave(earlier)


def _leave(exit_code: int) -> NoReturn:
    """End this process, at once where others wait for it: its connections to them cannot be closed in order."""
    if processes.is_joined():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    raise typer.Exit(exit_code) from None


def _print_traceback(error: BaseException) -> None:
    sys.stderr.write(redact("".join(traceback.format_exception(error))))


def _fail_document(message: str, hint: str | None, exit_code: int) -> None:
    console.document({"error": {"message": message, "hint": hint, "exit_code": exit_code}}, anyone=True)
