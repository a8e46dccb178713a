"""The page: every part a run has the numbers for, a sentence for every part it has not, and what a browser makes of it."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html import unescape

import numpy as np
import pytest
from tiny_recipes import build_text, on_text, tiny

pytest.importorskip("matplotlib", reason="reports need the extra golf-jax[report]")

from golf_jax import pipeline, report  # noqa: E402
from golf_jax.config import GolfError, QuantConfig, QuantRule, ScoreFirstConfig  # noqa: E402
from golf_jax.opening import load  # noqa: E402
from golf_jax.reporting import contents, figures, measure  # noqa: E402
from golf_jax.reporting.page import page as page_of  # noqa: E402
from golf_jax.reporting.record import read_record  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick_compilation")
FIGURES = "loss-steps loss-time validation-steps validation-time lr momentum phases bytes positions documents quantization".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, quick_compilation):
    """A finished run, one with another seed and score, and one that has only begun."""
    root = tmp_path_factory.mktemp("runs")
    text = build_text(tmp_path_factory.mktemp("text") / "data")
    recipe = on_text(tiny("baseline", steps=6, vocab_size=300), text)
    rules = QuantRule("", "float16", max_numel=256), QuantRule("", "int6_row")
    recipe = replace(recipe, eval=replace(recipe.eval, every=3), quant=QuantConfig(rules, compressor="zstd"))
    pipeline.run(recipe, pipeline.Options(run_dir=str(root / "a"), devices=1))
    shutil.copytree(root / "a", root / "b", ignore=shutil.ignore_patterns("checkpoints"))
    config = json.loads((root / "b/config.json").read_text())
    (root / "b/config.json").write_text(json.dumps(config | {"seed": 7}))
    (root / "c").mkdir()
    (root / "c/config.json").write_text(json.dumps(config | {"seed": 8}))
    (root / "c/metrics.jsonl").write_text("".join((root / "a/metrics.jsonl").read_text().splitlines(True)[:3]) + '{"event": "tra')
    return root


@pytest.fixture(scope="module")
def page(folder):
    assert report.main([str(folder / "a"), "--score-again", "2048", "--sample", "8", "--figures", str(folder / "figures")]) == 0
    return folder / "a/report.html"


def test_page_is_complete_and_loads_nothing(folder, page):
    html = page.read_text()
    assert sorted(re.findall(r'<figure id="([^"]+)"', html)) == sorted(FIGURES)
    assert sorted(p.name for p in (folder / "figures").iterdir()) == sorted(f"{f}.{kind}" for f in FIGURES for kind in ("png", "svg"))
    loaded = re.findall(r'(?:src|href)="([^"]*)"|url\(([^)]*)\)|@import', html)
    assert all((a or b).startswith("#") for a, b in loaded) and "<script" not in html
    for value in json.loads((folder / "a/stages.json").read_text())["evaluations"].values():
        assert f"{value['val_bpb']:.5f}" in html  # readable without pictures
    sample = re.search(r"<blockquote>(.*?)</blockquote>", html, re.S)
    assert sample and unescape(sample[1]) == load(folder / "a").generate("", 8)


def rows_of(folder, tmp_path, **altered):
    """The record of a run whose third step says something else."""
    shutil.copytree(folder / "c", tmp_path / "d")
    rows = [json.loads(line) for line in (folder / "a/metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["event"] == "train"]
    steps[2] = {name: value for name, value in {**steps[2], **altered}.items() if value is not ...}
    (tmp_path / "d/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, *steps]))
    return read_record(tmp_path / "d")


def test_a_run_without_muon_or_with_a_gradient_that_was_not_finite_is_shown(folder, tmp_path):
    record = rows_of(folder, tmp_path, momentum=None, grad_norm=None)
    nothing = measure.Again({}, {}, {}, {})
    drawn = contents.draw([record], nothing)
    assert page_of("title", contents.sections([record], drawn, nothing))


@pytest.mark.parametrize(("name", "value"), [("step", "x"), ("lr_factor", [1]), ("loss", True), ("momentum", ...), ("seconds", 10**400)])
def test_a_row_without_its_numbers_is_refused_by_name(folder, tmp_path, name, value):
    with pytest.raises(GolfError, match=f"d/metrics.jsonl: step .*: {name} is .*; remove that line"):
        rows_of(folder, tmp_path, **{name: value})


def test_measured_again(folder):
    record = read_record(folder / "a")
    errors = {e.name: e for e in measure.quantization_errors(record)}
    assert all(0 < e.relative < 0.3 for e in errors.values() if e.kind.startswith("int"))
    assert all(e.relative < 1e-3 for e in errors.values() if e.kind.startswith("float")) and any(
        e.kind.startswith("int") for e in errors.values()
    )
    m = measure.score_again(record, 0)
    assert m.bpb == pytest.approx(record.evaluations["standard"]["val_bpb"], rel=1e-5)
    assert sum(p.tokens for p in m.positions) == sum(d.tokens for d in m.documents) == m.targets
    assert [p.label for p in m.positions] == ["1", "2", "3-4", "5-8", "9-16"]
    assert not m.chunks


@pytest.mark.slow
def test_chunks_of_test_time_training(folder):
    record = read_record(folder / "a")
    ttt = ScoreFirstConfig(stride=8, chunk_tokens=1024, epochs=1, ranks=2)
    record = replace(record, recipe=replace(record.recipe, eval=replace(record.recipe.eval, score_first=ttt)))
    m = measure.score_again(record, 4096)
    assert len(m.chunks) == 4 and sum(c.tokens for c in m.chunks) == m.targets
    assert np.mean([c.bpb for c in m.chunks]) == pytest.approx(m.bpb, rel=0.1)
    assert figures.chunks([(0, "a", m)])


def test_several_runs_and_what_they_do_not_hold(folder, capsys):
    out = folder / "all.html"
    report.main([str(folder), "--sample", "0", "--out", str(out)])
    html, said = out.read_text(), capsys.readouterr().out
    assert "What differs" in html and '<th scope="col">seed</th>' in html
    for sentence in (
        "c is not finished: 2 steps so far",
        "c has no artifact yet",
        "weights before quantization cannot be read",
        "--score-again",
    ):
        assert sentence in html
    assert "left out: b: the weights before quantization cannot be read" in said


def test_bad_input(tmp_path, folder):
    for arguments, word in (([], "nothing to show"), ([str(tmp_path)], "no run is there"), (["nowhere"], "nowhere: no run is there")):
        with pytest.raises(GolfError, match=word):
            report.main(arguments)
    with pytest.raises(GolfError, match="--sample must not be negative"):
        report.Options(sample=-1)
    with pytest.raises(GolfError, match="cannot be written"):
        report.main([str(folder / "c"), "--out", str(tmp_path / "no/such.html")])


PROBE = """<script>
const rgb = c => c.match(/[\\d.]+/g).slice(0, 3).map(v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
const light = c => rgb(c).reduce((s, v, i) => s + v * [.2126, .7152, .0722][i], 0);
const back = light(getComputedStyle(document.body).backgroundColor);
const contrast = c => (Math.max(light(c), back) + .05) / (Math.min(light(c), back) + .05);
const found = [...document.querySelectorAll('figure')].map(f => {
  const svg = f.querySelector('svg'), texts = [...svg.querySelectorAll('text')], scale = svg.getScreenCTM().a;
  return {id: f.id, width: svg.getBoundingClientRect().width, marks: svg.querySelectorAll('path').length, texts: texts.length,
          size: Math.min(...texts.map(t => scale * parseFloat(getComputedStyle(t).fontSize))),
          contrast: Math.min(...texts.map(t => contrast(getComputedStyle(t).fill)))};
});
document.title = 'probe' + JSON.stringify({found, wide: document.documentElement.scrollWidth - innerWidth});
</script>"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser(page, tmp_path, scheme):
    """A narrow window: nothing on the console, every figure drawn within the page, its text large and clear enough to read."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("needs Chromium (Debian: apt-get install chromium)")
    flags = "--headless --no-sandbox --disable-gpu --disable-background-networking --window-size=500,900 --enable-logging=stderr".split()
    flags += [f"--user-data-dir={tmp_path / 'profile'}", f"--blink-settings=preferredColorScheme={'light dark'.split().index(scheme) ^ 1}"]

    def dom(file):
        done = subprocess.run([browser, *flags, "--dump-dom", file.as_uri()], capture_output=True, text=True, timeout=120, check=True)
        assert "CONSOLE" not in done.stderr
        return done.stdout

    dom(page)
    probed = tmp_path / "probed.html"
    probed.write_text(
        re.sub('<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text()).replace("</body>", PROBE + "</body>")
    )
    seen = json.loads(re.search(r"<title>probe(.*?)</title>", dom(probed))[1])  # type: ignore[index]
    assert seen["wide"] <= 0 and [f["id"] for f in seen["found"]]
    assert {f["id"] for f in seen["found"]} == set(FIGURES)
    for f in seen["found"]:
        assert 300 < f["width"] <= 500 and f["marks"] > 3 and f["texts"] > 3 and f["size"] >= 7.5 and f["contrast"] >= 4.5, f
