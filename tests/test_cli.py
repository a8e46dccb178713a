"""Overrides on the command line, and how mistakes are told."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from golf_jax import cli
from golf_jax.config import GolfError
from golf_jax.pipeline import Options


def parse(*argv: str):
    return cli.parse(argv, Options(), "text")


def test_default_is_the_quickstart():
    recipe, options = parse()
    assert recipe.name == "quickstart" and options == Options()


def test_any_field_is_a_flag():
    recipe, options = parse(
        "pr2005", "--model.num-layers", "12", "--budget.steps", "7", "--eval.score-first.epochs", "0", "--run-dir", "here"
    )
    assert (recipe.name, recipe.model.num_layers, recipe.budget.steps, recipe.eval.score_first.on) == ("pr2005", 12, 7, False)
    assert options.run_dir == "here" and recipe.model.loop_repeats == 2


def test_recipe_from_a_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("from golf_jax.config import Recipe\n\n\ndef recipe():\n    return Recipe(name='mine')\n")
    assert parse(str(file), "--seed", "5")[0].seed == 5


UNKNOWN = [("pr999", "no recipe 'pr999'; known: baseline, "), ("gone.py", "gone.py: no such recipe file")]


@pytest.mark.parametrize(("name", "message"), UNKNOWN)
def test_an_unknown_recipe_is_refused(name, message):
    with pytest.raises(GolfError, match=message):
        parse(name)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model.depth", "3"], ["--model.depth"]),
        (["--model.num-layers", "many"], ["--model.num-layers", "many"]),
        (["--model.attention", "magic"], ["magic", "cudnn"]),
        (["--model.width", "100"], ["model.width 100 is not divisible by model.num_heads 6"]),
        (["--eval.sliding.stride", "999"], ["eval.sliding.stride 999 exceeds the window of 256 tokens (data.seq_len)"]),
        (["--data.train", "x.bin"], ["data.val is empty: give the glob"]),
        (["--data.val", "x.bin"], ["data.val would not be read; give data.train, too"]),
    ],
)
def test_flags_that_cannot_be_are_refused(flags, words, capsys):
    """Nonzero status, and a text that names the field."""
    with pytest.raises((SystemExit, GolfError)) as stopped:
        parse(*flags)
    code = stopped.value.code if isinstance(stopped.value, SystemExit) else 2
    said = capsys.readouterr()
    text = re.sub(r"[\s│]+", " ", said.out + said.err + str(stopped.value))
    assert code not in (0, None) and all(word in text for word in words), text


def test_help_names_fields_and_recipes():
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-m", "golf_jax.train", "--help"], cwd=root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "--model.num-layers" in done.stdout and "pr2005" in done.stdout and "--resume" in done.stdout


def test_a_mistake_is_one_line_and_status_2(capsys, monkeypatch):
    def main(argv):
        raise GolfError("the field, and the fix")

    monkeypatch.setattr(sys, "argv", ["x"])
    with pytest.raises(SystemExit) as stopped:
        cli.run(main)
    assert stopped.value.code == 2 and capsys.readouterr().err == "error: the field, and the fix\n"


@pytest.mark.parametrize("argv", [["--resume", ""], ["pr638", "--run-dir="], ["a", ""]])
def test_an_empty_value_is_refused(argv, capsys, monkeypatch):
    """`--resume "$RUN"` with a variable that is not set must not start another run."""
    monkeypatch.setattr(sys, "argv", ["x", *argv])
    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda argv: 0)
    assert stopped.value.code == 2 and "its value is empty" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["x", "--prompt", ""])  # a document without a beginning
    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda argv: 0)
    assert stopped.value.code == 0


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("RESOURCE_EXHAUSTED: of a GPU"),
        RuntimeError("INTERNAL: Error dispatching computation: Out of memory allocating 65536000000 bytes."),  # of XLA:CPU
    ],
)
def test_memory_that_runs_out_is_one_line_with_the_remedy(capsys, monkeypatch, error):
    def main(argv):
        raise error

    monkeypatch.setattr(sys, "argv", ["x"])
    with pytest.raises(SystemExit) as stopped:
        cli.run(main)
    assert stopped.value.code == 2 and "out of memory; --micro-rows 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(28, "No space left on device"), "output: No space left on device"),
        (OSError(2, "No such file", "a\n"), "a\\n: No such file"),
    ],
)
def test_what_the_system_refuses_is_one_line_and_status_2(error, line, capsys, monkeypatch):
    def fails(argv):
        raise error

    monkeypatch.setattr(cli, "_silent", lambda status: status)  # it closes the stdout of this very process
    with pytest.raises(SystemExit) as caught:
        cli.run(fails)
    assert caught.value.code == 2 and capsys.readouterr().err == f"error: {line}\n"


def test_a_closed_terminal_leaves_no_number_to_the_next_file(tmp_path):
    """Libraries write to descriptor 2 whatever it is."""
    code = "from golf_jax import cli; cli.run(lambda argv: print(open('f', 'w').fileno(), file=open('n', 'w')) or 0)"
    subprocess.run(["sh", "-c", 'exec "$0" -c "$1" >&- 2>&-', sys.executable, code], cwd=tmp_path, check=True)
    assert int((tmp_path / "n").read_text()) > 2


def test_a_command_does_not_wait_for_what_compiles_beside_it():
    code = """import atexit, time
from golf_jax import ahead, cli
from golf_jax.config import GolfError
def main(argv):
    atexit.register(print, "left")
    ahead.beside(time.sleep, 60)
    raise GolfError("no such file")
cli.run(main, computes=True)"""
    environment = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (2, "left\n", "error: no such file\n")


def test_a_signal_leaves_the_devices_for_which_xla_may_still_compile():
    """Its threads do not end with the wait for them; 3 of 18 commands crashed when jax and the interpreter took the devices down."""
    code = """import atexit, os, signal
from golf_jax import cli
class Device:
    def __del__(self): print("gone")
device = Device()
def main(argv):
    import jax
    jax.devices()
    atexit.register(print, "left")
    os.kill(os.getpid(), signal.SIGTERM)
def look():
    from jax._src import xla_bridge
    print(bool(xla_bridge._backends))
end, cli._at_once = cli._at_once, lambda ended: (look(), end(ended))
cli.run(main, computes=True)"""
    environment = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (143, "left\nTrue\n", "interrupted by SIGTERM\n")


@pytest.mark.parametrize("platform", ["cuda", "nosuch"])
def test_a_platform_that_is_not_here_is_one_line(platform):
    code = "from golf_jax import cli; import jax; cli.run(lambda argv: jax.devices() and 0)"
    environment = os.environ | {"JAX_PLATFORMS": platform, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and f"error: JAX_PLATFORMS={platform}: jax has no such platform here" in done.stderr.splitlines()[-1]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_stdout_is_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "golf_jax"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (2, "error: output: No space left on device\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("behind", ["/dev/full", "&-"])
def test_what_is_told_on_stderr_never_ends_the_work(behind):
    code = "import sys; from golf_jax import cli; cli.run(lambda argv: sys.stderr.buffer.write(b'x') and print('x', file=sys.stderr) or 0)"
    assert subprocess.run(["bash", "-c", f'"$0" -c "$1" 2>{behind}', sys.executable, code]).returncode == 0


@pytest.mark.parametrize("argv", [["--data.train", "~/x/train_*.bin"], ["--run-dir=~/r"], ["~"]])
def test_a_home_directory_that_no_shell_has_put_there_is_told(argv, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", *argv])
    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda argv: pytest.fail("ran"))
    assert stopped.value.code == 2 and 'write "$HOME' in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["x", "--prompt", "~/.bashrc"])
    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda argv: 0)
    assert stopped.value.code == 0


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--vary", "seed=1", "--vary", "x=2"], "--vary is there 2 times, and only the last would count"),
        (["--accept=seed", "--accept", "x"], "--accept is there 2 times"),
        (["--vary", "--seed", "1"], "--vary: names nothing"),
        (["--seed", "1", "--accept"], "--accept: names nothing"),
        (["--vary", "seed=1", "x=2", "--seed", "1", "--seed", "2"], ""),
    ],
)
def test_values_that_would_be_lost_are_told(argv, told, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", *argv])
    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda argv: 0)
    assert stopped.value.code == 2 * bool(told) and told in capsys.readouterr().err


def test_a_glob_that_the_shell_has_replaced_is_told(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", "--data.train", "d/a.bin", "d/b.bin", "--seed", "1"])
    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda argv: pytest.fail("ran"))
    assert stopped.value.code == 2 and "put it in quotes: --data.train 'd/...'" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["x", "--val", "d/val_*.bin", "artifact.golf"])
    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda argv: 0)
    assert stopped.value.code == 0


def test_what_is_no_text_on_standard_input_reaches_whoever_can_refuse_it():
    code = "import sys; from golf_jax import cli; cli.run(lambda argv: print(ascii(sys.stdin.readline())) or 0)"
    made = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run([sys.executable, "-c", code], input=b"caf\xe9\n", env=made, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, b"'caf\\udce9\\n'\n"), done.stderr


def test_a_debugger_that_has_read_from_standard_input_may_run_a_command():
    code = "import sys; from golf_jax import cli; sys.stdin.readline(); cli.run(lambda argv: print(sys.stdin.readline()) or 0)"
    done = subprocess.run([sys.executable, "-c", code], input="c\nprompt\n", capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "prompt\n\n"), done.stderr


def test_a_closed_standard_input_is_an_empty_one():
    code = f"{sys.executable} -c 'import sys; from golf_jax import cli; cli.run(lambda argv: len(sys.stdin.readline()))' <&-"
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_signal_held_back_over_the_second_start_is_heard_then():
    code = "import os, signal; signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM}); os.kill(os.getpid(), signal.SIGTERM)\n"
    code += "from golf_jax import cli; cli.run(lambda argv: 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (143, "", "interrupted by SIGTERM\n")


@pytest.mark.parametrize(
    ("limit", "line"),
    [
        ("-v 1000000", "ulimit -v leaves 1.0 GB of addresses; jax needs more than 2 to start"),
        ("-n 20", "ulimit -n leaves 20 open files; at least 64 are needed"),
    ],
)
def test_too_little_room_is_one_line_before_any_library_meets_it(limit, line):
    command = f"ulimit {limit}; exec {sys.executable} -m golf_jax.train"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, f"error: {line}\n")


def test_other_errors_keep_their_traceback(monkeypatch):
    def main(argv):
        raise ZeroDivisionError

    monkeypatch.setattr(sys, "argv", ["x"])
    with pytest.raises(ZeroDivisionError):
        cli.run(main)


RECIPE = "from golf_jax.config import ModelConfig, Recipe\n\n\ndef recipe():\n    return {}\n"
BROKEN = [
    ("def recipe(:\n    pass\n", r"mine.py, line 1: invalid syntax"),
    (RECIPE.format("Recipe(name='mine', model=ModelConfig(xsa_lost=4))"), r"mine.py, line 5: ModelConfig has no field 'xsa_lost'; did you"),
    (RECIPE.format("1 / 0"), r"mine.py, line 5: ZeroDivisionError: division by zero"),
    ("raise SystemExit(3)\n", r"mine.py, line 1: SystemExit: 3"),
    (RECIPE.format("Recipe(name='mine', seed='7')"), r"mine.py: Recipe.seed: expected int, found '7'"),
    ("import no_such_module\n", r"mine.py, line 1: ModuleNotFoundError: No module named 'no_such_module'"),
]


@pytest.mark.parametrize(("text", "message"), BROKEN)
def test_a_broken_recipe_file_is_told_with_its_line(text, message, tmp_path):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(GolfError, match=message):
        parse(str(tmp_path / "mine.py"))


def test_threads_that_wait_for_a_checkpoint_that_cannot_be_made_do_not_hold_the_end_up():
    code = (
        "import atexit, threading, golf_jax.cli as cli\n"
        "Waiting = type('Waiting', (threading.Thread,), {'__module__': 'orbax.futures'})\n"
        "def main(argv):\n"
        "    atexit.register(print, 'what is registered is called')\n"
        "    Waiting(target=threading.Event().wait).start()\n"
        "    raise cli.GolfError('the disk is read-only')\n"
        "cli.run(main, computes=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (2, "error: the disk is read-only\n") and done.stdout == "what is registered is called\n"
