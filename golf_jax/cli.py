"""What the command lines share: recipe overrides, and errors told in one line instead of a traceback."""

import atexit
import contextlib
import dataclasses
import io
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from golf_jax.ahead import busy
from golf_jax.config import GolfError, Recipe, load_recipe, recipe_names
from golf_jax.interrupt import Interrupted, catching
from golf_jax.starting import is_ours
from golf_jax.supervise import said_all

NO_MEMORY = "RESOURCE_EXHAUSTED|Out of memory allocating"  # as XLA calls it
LEAST_ADDRESSES, LEAST_FILES = 2 << 30, 64
GLOBS = ("--data.train", "--data.val", "--val")
TEXTS = ("--prompt", "--blurb")  # flags whose value may be any text
LISTS = ("--vary", "--accept")  # flags with several values behind them
WANTED = """The flags most runs want; the full list follows.

  --data.train GLOB --data.val GLOB --data.tokenizer MODEL   shards and their SentencePiece model
  --budget.steps N        stop after N steps        --budget.seconds S     stop after S seconds of training
  --model.width D         features per token        --model.num-layers N   physical layers
  --seed N                of parameters             --run-dir DIR          where the run is written
  --resume DIR            go on with that run"""


def parse(argv: Sequence[str], options: Any, description: str, default: str | Recipe = "quickstart") -> tuple[Recipe, Any]:
    """(recipe, options) from `[CONFIG] [--section.field value ...] [--option value ...]`.

    CONFIG: a shipped recipe's name or a Python file, first on the line. options: a dataclass instance whose fields become further
    flags. Raises GolfError for a recipe that contradicts itself; exits with tyro's message for an unknown flag.
    """
    argv = list(argv)
    chosen = argv.pop(0) if argv and not argv[0].startswith("-") else default
    recipe = load_recipe(chosen) if isinstance(chosen, str) else chosen
    name = chosen if isinstance(chosen, str) else chosen.name
    everything = dataclasses.make_dataclass(
        "Arguments",
        [
            ("options", Annotated[type(options), tyro.conf.arg(name="")], dataclasses.field(default=options)),
            ("recipe", Annotated[Recipe, tyro.conf.arg(name="")], dataclasses.field(default=recipe)),
        ],
        frozen=True,
    )
    text = f"{description}\n\n{WANTED}\n\nFirst argument: the recipe, one of {', '.join(recipe_names())}, or a .py or .json file ({name})."
    prog = f"python -m golf_jax.{Path(sys.argv[0]).stem} {name}"
    parsed = tyro.cli(everything, args=argv, prog=prog, description=text, config=(tyro.conf.AvoidSubcommands,))
    return parsed.recipe, parsed.options


def value_of(argv: Sequence[str], flag: str) -> str:
    """What `flag` is given on the line, before it is parsed; empty where it is not there."""
    for i, word in enumerate(argv):
        if word == flag and i + 1 < len(argv):
            return argv[i + 1]
        if word.startswith(f"{flag}="):
            return word.removeprefix(f"{flag}=")
    return ""


class _Notices(io.FileIO):
    """stderr: nobody reads there, or the disk behind it is full, and the work goes on all the same."""

    def write(self, data: Any) -> int:
        with contextlib.suppress(OSError):
            super().write(data)
        return len(data)


def run(main: Callable[[list[str]], int], *, computes: bool = False) -> None:
    """Run a command's main and exit with its status. The one door of all commands.

    computes: it works for minutes (`golf_jax.starting.COMPUTING`).

    A GolfError becomes one line on stderr and status 2, a signal status 128 + its number (Ctrl-C 130), a reader that went away (`| head`)
    141, as of a shell's own tools. What the terminal cannot show is written with backslash escapes. What the system refuses is one line.
    """
    for descriptor in range(3):  # closed ones: the next file would get the number, and what libraries print there would land in it
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdin = sys.stdin or open(0)
    if sys.stderr is sys.__stderr__:
        sys.stderr = io.TextIOWrapper(
            io.BufferedWriter(_Notices(2, "w", closefd=False)), getattr(sys.stderr, "encoding", None), line_buffering=True
        )
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "backslashreplace"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):  # what is read there and is no text is refused where it is used
            with contextlib.suppress(io.UnsupportedOperation):  # a debugger, or a script that runs this, has read from it
                stream.reconfigure(errors=errors)
    ended, ends = [1], computes or is_ours()
    if ends:
        atexit.register(_at_once, ended)  # before all others, so that it is called after them
    try:
        with catching():
            _refuse_slips(sys.argv[1:])
            if computes:
                _refuse_little_room()
            status = main(sys.argv[1:])
            if sys.stdout is not None:
                sys.stdout.flush()
    except GolfError as error:
        status = _fail(f"error: {error}", 2)
    except Interrupted as stop:
        status = stop.status if stop.told else _fail(f"interrupted by {stop}", stop.status)
        if ends:
            _leave_devices()
    except (MemoryError, RuntimeError, AssertionError) as error:
        named = os.environ.get("JAX_PLATFORMS")
        if named and traceback.extract_tb(error.__traceback__)[-1].filename.endswith("xla_bridge.py"):
            why = f" ({next(iter(str(error).splitlines()))})" if str(error) else ""
            found = GolfError(f"JAX_PLATFORMS={named}: jax has no such platform here{why}; unset it, or install jax for it")
            sys.exit(_fail(f"error: {found}", 2))
        if not (isinstance(error, MemoryError) or re.search(NO_MEMORY, str(error))):
            raise
        status = _fail("error: out of memory; --micro-rows 1 and --eval.batch-rows 1 need the least, --micro-rows auto takes what fits", 2)
    except ImportError as error:  # also of a library that finds no memory while it starts
        found = GolfError(f"{error.name or 'a library'} cannot be loaded: {error} (not installed, or too little memory)")
        status = _fail(f"error: {found}", 2)
    except BrokenPipeError:
        status = _silent(141)
    except OSError as error:  # a disk that is full, also behind stdout; a file that cannot be written
        found = GolfError(f"{error.filename or 'output'}: {error.strerror or error}")
        status = _silent(_fail(f"error: {found}", 2))
    ended[0] = status
    if ends and (status > 128 or _waiting()):  # before the interpreter waits for threads, which it does before it calls what is registered
        atexit._run_exitfuncs()
    sys.exit(status)


def _leave_devices() -> None:
    """Not taken down when the process ends (`_at_once`): a thread of XLA's own may compile for them, for which a signal ended the wait."""
    if jax := sys.modules.get("jax"):
        with contextlib.suppress(ImportError, AttributeError):
            from jax._src.api import clean_up  # no public way to it

            atexit.unregister(clean_up)
            atexit.register(jax.distributed.shutdown)


def _at_once(ended: list[int]) -> None:
    """End while a program still compiles in a thread that nobody will ask, before the interpreter takes down what that thread uses."""
    if busy() or ended[0] > 128 or _waiting():
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(ended[0])


def _waiting() -> bool:
    """Whether threads of orbax are left: where a checkpoint's folder could not be made they wait ten minutes for it."""
    return any(type(thread).__module__.startswith("orbax.") for thread in threading.enumerate())


def _refuse_little_room() -> None:
    """GolfError where `ulimit` leaves less than the libraries need: without addresses they end in C++, without files they never end."""
    with contextlib.suppress(ImportError):  # no such limits on this system
        import resource

        if 0 < (limit := resource.getrlimit(resource.RLIMIT_AS)[0]) < LEAST_ADDRESSES:
            raise GolfError(f"ulimit -v leaves {limit / 1e9:.1f} GB of addresses; jax needs more than {LEAST_ADDRESSES >> 30} to start")
        if 0 < (limit := resource.getrlimit(resource.RLIMIT_NOFILE)[0]) < LEAST_FILES:
            raise GolfError(f"ulimit -n leaves {limit} open files; at least {LEAST_FILES} are needed")


def _refuse_slips(argv: Sequence[str]) -> None:
    """GolfError for a value that the shell left otherwise than was meant: empty, as `--resume "$RUN"` with a variable that is not set,
    which must not start another run; `~` as it stands, which would become a folder of that name; several files of a glob. Also for a
    flag of several values that is there twice, of which only the last would count, or has none."""
    for flag in LISTS:
        places = [place for place, word in enumerate(argv) if word.partition("=")[0] == flag]
        if len(places) > 1:
            raise GolfError(f"{flag} is there {len(places)} times, and only the last would count; give all its values behind one, as A B C")
        if places and argv[places[0]] == flag and "".join(argv[places[0] + 1 : places[0] + 2])[:2] in ("", "--"):
            raise GolfError(f"{flag}: names nothing; give its values, or leave it out")
    for before, flag, word in zip(["", "", *argv], ["", *argv], argv, strict=False):
        if before in GLOBS and Path(flag).suffix == Path(word).suffix == ".bin":
            raise GolfError(f"{before}: the shell has made several files of the glob; put it in quotes: {before} '{Path(flag).parent}/...'")
        name, mark, value = word.partition("=")
        if name.startswith("--") and mark:
            flag, word = name, value
        if flag in TEXTS:
            continue
        what = flag if flag.startswith("-") else "an argument"
        if not word:
            raise GolfError(f"{what}: its value is empty (a variable that is not set?); give one, or leave it out")
        if word.split("/")[0] == "~":
            raise GolfError(f'{what}: no shell has put a home directory into {word}, in quotes or behind "="; write "$HOME{word[1:]}"')


def _fail(message: str, status: int) -> int:
    print(message, file=sys.stderr)
    said_all(status)
    return status


def _silent(status: int) -> int:
    """`status`; what is still to be written to stdout is dropped, which the interpreter would try once more when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return status
