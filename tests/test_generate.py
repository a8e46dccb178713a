"""The command and Model.generate: what is written, where it ends, prompts from the terminal."""

import io
import re
import sys

import numpy as np
import pytest
from tiny_recipes import build_text, tiny

import golf_jax
from golf_jax.artifact.model import pack_model
from golf_jax.config import GolfError
from golf_jax.data.tokenizer import Tokenizer
from golf_jax.generate import main
from golf_jax.model import leaves
from golf_jax.model.decode import Sampling


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    """Noise in every parameter, small in the head: all tokens are about as likely."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = build_text(folder / "data") / "tokenizer.model"
    recipe, rng = tiny("baseline", vocab_size=300, seq_len=48), np.random.default_rng(0)
    params = {name: rng.standard_normal(leaf.shape).astype(np.float32) for name, leaf in leaves(recipe.model).items()}
    params["tok_emb"] *= 0.05
    (folder / "artifact.golf").write_bytes(pack_model(recipe, params, Tokenizer(tokenizer).sha256, code_bytes=0).data)
    (folder / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    return folder / "artifact.golf"


def written(capsys, *arguments):
    assert main([*map(str, arguments)]) == 0
    return capsys.readouterr()


def test_text_and_speed(artifact, capsys):
    flags = ("--prompt", "the end", "--max-tokens", "60", "--seed", "3")  # more than the row holds
    first, again = written(capsys, artifact, *flags), written(capsys, artifact, *flags)
    assert first.out == again.out and first.out.startswith("the end")
    count = int(re.match(r"(\d+) tokens, [\d.]+ tokens/s; the first after [\d.]+ s \(compilation, \d+ tokens of prompt\)", first.err)[1])
    model = golf_jax.load(artifact)
    assert first.out == "the end" + model.decode([*model.encode("the end")[1:], *continued(model, "the end", 60, 3)])[7:] + "\n"
    assert count == len(continued(model, "the end", 60, 3)) > 40


def continued(model, prompt, most, seed):
    tokens = []
    for token in model.stream(model.encode(prompt), Sampling(seed=seed)):
        if token == model.tokenizer.bos_id or len(tokens) == most:
            return tokens
        tokens.append(token)


def test_the_text_ends_with_the_document(artifact):
    model = golf_jax.load(artifact)
    short = next(seed for seed in range(100) if len(continued(model, "a", 40, seed)) < 40)
    assert model.generate("a", 40, seed=short) == model.decode(continued(model, "a", 40, short))


def test_what_a_model_writes_does_not_steer_the_terminal(artifact, capsys, monkeypatch):
    text = "a\x1b]0;title\x07\x0eb\x9b2Jc\u00a0é\t\n日"
    monkeypatch.setattr(golf_jax.opening.Model, "decode", lambda model, tokens: "p" + text)
    flags = ("--max-tokens", "1", "--prompt", "p")
    assert written(capsys, artifact, *flags).out == "p" + text + "\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert written(capsys, artifact, *flags).out == "pa\\x1b]0;title\\x07\\x0eb\\x9b2Jc\u00a0é\t\n日\n"


def test_a_prompt_in_a_locale_that_is_not_utf8(artifact, capsys):
    escaped = "é".encode().decode("ascii", "surrogateescape")  # as Python hands it over there
    flags = ("--max-tokens", "1", "--prompt")
    assert written(capsys, artifact, *flags, escaped).out == written(capsys, artifact, *flags, "é").out


def test_prompts_from_the_terminal(artifact, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    said = written(capsys, artifact, "--max-tokens", "3")
    assert re.fullmatch(r"one[^\n]*\ntwo[^\n]*\n", said.out) and said.err.count("> ") == 3 and said.err.count("tokens/s") == 2


def test_refused(artifact, tmp_path):
    (tmp_path / "alone.golf").write_bytes(artifact.read_bytes())
    with pytest.raises(GolfError, match="no tokenizer lies beside it"):
        main([str(tmp_path / "alone.golf"), "--prompt", "x"])
    with pytest.raises(GolfError, match="character 1 is half a surrogate pair; is it UTF-8"):
        main([str(artifact), "--prompt", "a\udcff", "--max-tokens", "1"])
    with pytest.raises(GolfError, match="too large a number"):
        Sampling(seed=2**65)
    with pytest.raises(GolfError, match="--max-tokens must be positive"):
        main([str(artifact), "--max-tokens", "0"])
