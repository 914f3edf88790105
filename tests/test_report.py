"""The page of runs: what it says is what the runs say, and a real browser draws it."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from conftest import ROOT
from fedpref import Experiment, UserError, cli, config, run
from fedpref.experiments.run_files import EVALUATION, METRICS
from fedpref.numerics.intervals import interval
from fedpref.numerics.metrics import ACCURACY
from fedpref.numerics.topology import rho
from fedpref.reports import charts
from fedpref.reports import method_charts as methods
from fedpref.reports.figures import draw_lines
from fedpref.reports.page import page, sections, sums, told_apart, write_report
from fedpref.reports.page.sentences import cards, words
from fedpref.reports.page.tables import client_rows, newcomer_rows
from fedpref.reports.run import Run, read
from fedpref.reports.tables import client_table, metric_table
from fedpref.runs.sweep import SWEEP

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
SCREENSHOTS = ROOT / "build/screenshots"


def content_of(text: str) -> list[dict[str, Any]]:
    """The charts' data in a page."""
    found = re.search(
        r'<script type="application/json" id="charts">(.*?)</script>', text, re.DOTALL
    )
    assert found
    return list(json.loads(found.group(1)))


@pytest.fixture(scope="module")
def runs(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """A pooled run with what it is compared with, one of gossip, one with weights of objectives."""
    folder = tmp_path_factory.mktemp("runs")
    local = {"steps": 2, "batch_size": 3, "learning_rate": 0.01}
    objectives = {"objective_column": "kind", "objective_names": ["first", "second"]}
    contents = {
        "averaged": {"evaluate_every": 1, "baselines": ["alone", "pooled"]},
        "gossip": {
            "algorithm": {"name": "decdpo", "local": local},
            "network": {"topology": "ring"},
        },
        "weighed": {
            "algorithm": {"name": "firm", "local": local},
            "task": {**settings["task"], **objectives},
            "evaluate_every": 1,
        },
    }
    made = {}
    for name, content in contents.items():
        spec = config.parse(Experiment, {**settings, "workers": 1, "name": name, **content}, name)
        made[name] = read(run(spec, folder / name).path)
    return made


def test_noise_is_two_standard_errors_of_both_lines_pairs(runs: dict[str, Run]) -> None:
    one = runs["averaged"]
    noise, gains = one.noise("alone"), one.gains("alone")
    assert noise.keys() == gains.keys() == one.line.last.keys()
    for client, row in one.line.last.items():
        both = 0.0
        for line in (row, one.baselines["alone"].last[client]):
            pairs = line["num_examples"]
            p = (line["rewards/accuracies"] * pairs + 1) / (pairs + 2)
            both += p * (1 - p) / pairs
        assert noise[client] == pytest.approx(2 * 100 * both**0.5)


def test_what_the_page_says_is_what_the_run_says(runs: dict[str, Run]) -> None:
    one = runs["averaged"]
    text = page([one])
    values, alone = one.values(), one.values(one.baselines["alone"])
    mean = np.mean(list(values.values()))
    noise = one.noise("alone")
    better = sum(values[c] - alone[c] > noise[c] for c in values)
    worse = sum(alone[c] - values[c] > noise[c] for c in values)
    assert f"mean held-out pair accuracy is {mean:.1f}" in words(one)
    assert (better, worse) == (0, 0), "pairs are few"
    assert "surely better: none, surely worse: none, for 4 it may be luck" in words(one)
    told = {name: (value, note) for name, value, note in cards(one)}
    assert told["who took part"][0] == "4"
    assert told["surely better, surely worse"][0] == "0, 0"
    assert not one.paired, "clients have too few prompts for a standard error"
    low, high = interval(np.array([list(one.gains("alone").values())]))
    assert f"points [{low:+.1f}, {high:+.1f}], which cannot be told from none" in words(one)
    drawn = dict(sections([one], []))
    assert list(drawn) == ["What was learned", "Who gained, who lost", "What it cost"]
    (gain,) = charts.gains([one])
    assert dict(zip(gain.data[0]["y"], gain.data[0]["x"], strict=True)) == pytest.approx(
        {c: values[c] - alone[c] for c in values}
    )
    assert len(gain.data[0]["error_x"]["array"]) == 4
    (bars,) = charts.by_client([one])
    assert [trace["name"] for trace in bars.data] == ["feddpo", "alone", "pooled"]
    assert dict(zip(bars.data[0]["y"], bars.data[0]["x"], strict=True)) == values
    (over,) = charts.held_out([one])
    thin = [trace for trace in over.data if trace.get("legendgroup") == "clients"]
    assert len(thin) == 4
    assert sum(trace["showlegend"] for trace in thin) == 1
    titles = [chart.title for chart in charts.traffic([one])]
    assert titles == ["Held-out pair accuracy for data sent"], "the same in every round"
    uneven = replace(one, line=replace(one.line, metrics=[dict(r) for r in one.line.metrics]))
    uneven.line.metrics[0]["bytes_up"] = 5e6
    sent = next(chart for chart in charts.traffic([uneven]) if chart.title == "Data sent")
    assert sent.data[0]["y"] == [row["bytes_up"] / 1e6 for row in uneven.line.metrics]
    assert list(charts.times([one])) == [], "one bar is a number"
    (spent,) = charts.times([one, replace(one, title="again")])
    assert sum(trace["x"][0] for trace in spent.data) == pytest.approx(
        np.mean(one.line.column("seconds")), rel=0.02
    )
    for name in (*values, "feddpo", "seed", "torch"):
        assert name in text
    assert [set(chart) for chart in content_of(text)] == [{"data", "layout"}] * sum(
        map(len, drawn.values())
    )
    assert not re.search(
        r'(src|href)="(?!#)', re.sub("<script.*?</script>", "", text, flags=re.DOTALL)
    ), "nothing is fetched"
    assert len(text) < 3e6


def test_gossip_is_shown_against_its_bound_and_on_its_graph(runs: dict[str, Run]) -> None:
    (chart,) = methods.consensus([runs["gossip"]])
    after, before, bound = (np.array(trace["y"]) for trace in chart.data)
    assert (after <= bound * 1.2).all(), "they are estimates"
    assert (bound < before).all()
    (drawn,) = methods.graph([runs["gossip"]])
    assert len([end for end in drawn.data[0]["x"] if end is None]) == 4, (
        "the links of a ring of four"
    )
    assert drawn.data[1]["text"] == list(runs["gossip"].clients)


def test_weights_of_objectives_and_a_front_are_shown(runs: dict[str, Run], tmp_path: Path) -> None:
    reached, weights = methods.objectives([runs["weighed"]])
    for chart in (reached, weights):
        assert [trace["name"] for trace in chart.data] == ["first", "second"]
    assert np.sum([trace["y"] for trace in weights.data], axis=0) == pytest.approx(np.ones(3))
    last = runs["weighed"].line.evaluations[-1]["summary"]
    assert reached.data[1]["y"][-1] == last["rewards/accuracies/second"]["mean"]
    assert f"{last['rewards/accuracies/second']['mean']:.3f}" in page([runs["weighed"]])
    point = {"preference": [0.5, 0.5], "values": [0.2, 0.3], "beside": {}, "is_trained": True}
    found = {
        "objectives": ["a", "b"],
        "reference": [0, 0],
        "figures": {"hypervolume": 0.06},
        "points": [point],
    }
    (tmp_path / "front.json").write_text(json.dumps(found))
    text = write_report([tmp_path], tmp_path / "front.html").read_text()
    assert content_of(text)[0]["data"][0]["text"] == ["0.50 / 0.50"]
    third = {
        **found,
        "objectives": ["a", "b", "c"],
        "points": [{**point, "preference": [0.2, 0.3, 0.5], "values": [0.2, 0.3, 0.4]}],
    }
    assert methods.front(third).data[0]["marker"]["color"] == [0.4]


@pytest.mark.parametrize("text", ['{"objectives": ["a"', '{"objectives": ["a", "b"]}', "[]"])
def test_a_damaged_front_is_a_sentence(text: str, tmp_path: Path) -> None:
    (tmp_path / "front.json").write_text(text)
    with pytest.raises(UserError, match="the file is damaged"):
        write_report([tmp_path], tmp_path / "page.html")


def test_runs_side_by_side_are_told_apart(runs: dict[str, Run], tmp_path: Path) -> None:
    both = told_apart([runs["averaged"], replace(runs["averaged"], path=tmp_path / "again")])
    assert [one.title for one in both] == ["averaged", "again"]
    (bars,) = charts.by_client(both)
    assert [trace["name"] for trace in bars.data][:2] == ["averaged", "averaged: alone"]


def test_texts_of_a_run_are_text_in_the_page(runs: dict[str, Run], tmp_path: Path) -> None:
    place = tmp_path / "run"
    shutil.copytree(runs["averaged"].path, place)
    (place / "samples").mkdir()
    answer = {"completion": "</script><script>alert(1)</script>", "rewards": {"length": 0.5}}
    row = {"prompt": "<b>Why?</b>", "before": answer, "after": answer}
    (place / "samples/client-0.jsonl").write_text(json.dumps(row) + "\n")
    text = page([read(place)])
    assert "&lt;b&gt;Why?&lt;/b&gt;" in text
    assert "<script>alert" not in text
    assert "length 0.50" in text


def test_names_are_text_wherever_a_chart_has_them(runs: dict[str, Run], tmp_path: Path) -> None:
    place = tmp_path / "run"
    shutil.copytree(runs["averaged"].path, place)
    for file in (place / "clients.json", *place.rglob(EVALUATION)):
        file.write_text(file.read_text().replace("client-0", "<b>0</b>"))
    drawn = [chart for _, some in sections([read(place)], {}) for chart in some]
    assert "<b>" not in json.dumps([chart.content for chart in drawn])
    titled = charts.Chart("a", "b", [], charts.axes("over <i>x</i>", "y"))
    assert titled.content["layout"]["xaxis"]["title"]["text"] == "over &lt;i&gt;x&lt;/i&gt;"


def test_names_are_text_in_tables_of_a_terminal() -> None:
    table = metric_table({"a[/b]": {"loss": 1.0}, "[red]x": {"loss": 2.0}})
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table)
    assert {"a[/b]", "[red]x"} <= set(console.export_text().split())


def test_a_run_at_work_has_a_page_whatever_is_written_of_it(
    runs: dict[str, Run], tmp_path: Path
) -> None:
    place = tmp_path / "run"
    shutil.copytree(runs["averaged"].path, place)
    (place / "done").unlink()
    rows = (place / METRICS).read_text().splitlines(keepends=True)
    (place / METRICS).write_text("".join(rows[:-1]))  # the last round's is not there yet
    assert write_report([place], tmp_path / "one.html").exists()
    first = json.loads((place / EVALUATION).read_text().splitlines()[0])
    (place / EVALUATION).write_text(json.dumps({**first, "round": 0}) + "\n")
    (place / METRICS).unlink()  # killed in its first round
    assert write_report([place], tmp_path / "two.html").exists()


def test_a_run_whose_figures_are_sums_has_charts_of_training(runs: dict[str, Run]) -> None:
    one = runs["averaged"]
    rows = [{**row, "clients": {}, "evaluate_pairs": 4, "bins": {}} for row in one.line.evaluations]
    del rows[-1]["evaluate_pairs"]
    summed = replace(one, line=replace(one.line, evaluations=rows), baselines={})
    titles = [chart.title for _, some in sums.sections(summed) for chart in some]
    assert "Training loss" in titles
    # the last evaluation is of more rows than those before
    assert [row["round"] for row in summed.line.course] == [row["round"] for row in rows[:-1]]


def test_what_has_nothing_to_show_says_so(runs: dict[str, Run], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run here"):
        write_report([tmp_path], tmp_path / "report.html")
    place = tmp_path / "begun"
    shutil.copytree(runs["averaged"].path, place)
    (place / EVALUATION).unlink()
    with pytest.raises(UserError, match="has lost its rows"):
        write_report([place], tmp_path / "report.html")
    (place / "done").unlink()
    with pytest.raises(UserError, match="no evaluation yet"):
        write_report([place], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_many_rounds_and_clients_fit_in_a_page(runs: dict[str, Run], tmp_path: Path) -> None:
    place = tmp_path / "many"
    shutil.copytree(runs["averaged"].path, place)
    names = [f"hospital-{k:02d}" for k in range(64)]
    rng = np.random.default_rng(0)
    row, measured = read(place).line.metrics[0], {"rewards/accuracies": 0.6, "num_examples": 50.0}
    (place / METRICS).write_text(
        "".join(json.dumps({**row, "round": k + 1}) + "\n" for k in range(200))
    )
    summary = read(place).line.evaluations[0]["summary"]
    rows = (
        {n: {**measured, "rewards/accuracies": float(rng.uniform(0.4, 0.9))} for n in names}
        for _ in range(200)
    )
    (place / EVALUATION).write_text(
        "".join(
            json.dumps({"round": k + 1, "clients": c, "summary": summary}) + "\n"
            for k, c in enumerate(rows)
        )
    )
    (place / "clients.json").write_text(
        json.dumps(
            {name: {"train": 10, "test": 50, "truncated": 0, "digest": ""} for name in names}
        )
    )
    shutil.rmtree(place / "baselines")
    found = CliRunner().invoke(cli.app, ["report", str(place)])
    assert found.exit_code == 0, found.output
    assert (place / "report.html").stat().st_size < 3e6


def test_a_run_that_was_killed_in_a_reference_has_a_page(
    runs: dict[str, Run], tmp_path: Path
) -> None:
    place = tmp_path / "killed"
    shutil.copytree(runs["averaged"].path, place)
    shutil.rmtree(place / "baselines/pooled")
    for name in ("done", EVALUATION):
        (place / "baselines/alone" / name).unlink()
    text = page([read(place)])
    assert "against training alone" not in text
    assert "not finished" in text
    rows = (
        (runs["averaged"].path / "baselines/alone" / EVALUATION)
        .read_text()
        .splitlines(keepends=True)
    )
    (place / "baselines/alone" / EVALUATION).write_text(rows[0])
    again = read(place)
    assert again.gains("local") == {}, "nothing is compared after different numbers of rounds"
    assert "alone, after round 1" in page([again])


def test_a_client_that_was_left_out_of_an_evaluation_has_an_empty_cell(
    runs: dict[str, Run], tmp_path: Path
) -> None:
    place = tmp_path / "left-out"
    shutil.copytree(runs["averaged"].path, place)
    for file, number in ((place / EVALUATION, 0), (place / "baselines/alone" / EVALUATION, -1)):
        rows = [json.loads(row) for row in file.read_text().splitlines()]
        del rows[number]["clients"]["client-2"]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    one = read(place)
    assert "client-2" not in one.gains("local")
    (row,) = (row for row in client_rows([one]) if row[0] == "client-2")
    assert row[3][0]
    assert row[3][1] == row[3][3] == ""
    assert content_of(page([one]))
    client_table(
        place, {name: line.last for name, line in {"feddpo": one.line, **one.baselines}.items()}
    )


def test_newcomers_are_no_clients_that_trained(settings: dict[str, Any], tmp_path: Path) -> None:
    spec = config.parse(
        Experiment, {**settings, "federation": {"newcomers": ["client-3"], "join_steps": 1}}, "test"
    )
    one = read(run(spec, tmp_path / "run").path)
    assert words(one).startswith("3 clients trained 3 of 3 rounds of feddpo, 1 joined afterwards")
    assert [row[0] for row in client_rows([one])] == ["client-0", "client-1", "client-2"]
    ((name, _, _, cells),) = newcomer_rows([one])
    row = one.line.evaluations[-1]
    assert name == "client-3"
    assert cells == [
        f"{100 * row[when]['client-3'][ACCURACY]:.1f}" for when in ("newcomers_before", "newcomers")
    ]


@pytest.mark.parametrize("weighting", ["equal", "examples"])
def test_the_bound_is_that_of_each_round(
    weighting: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    algorithm = {"name": "decdpo", "local": {"steps": 2, "batch_size": 3, "learning_rate": 0.01}}
    federation = {"weighting": weighting, "clients_per_round": 3}
    network = {"topology": "complete", "link_failure": 0.4}
    content = {
        **settings,
        "algorithm": algorithm,
        "network": network,
        "federation": federation,
        "rounds": 6,
    }
    one = read(run(config.parse(Experiment, content, "test"), tmp_path / "run").path)
    left = methods.left_by_mixing(one, one.line.metrics)
    assert len(set(left)) > 1
    names, sizes = list(one.clients), [about["train"] for about in one.clients.values()]
    for row, found in zip(one.line.metrics, left, strict=True):
        active, _ = one.experiment.federation.cohort(
            [1.0] * 4, one.experiment.seed, row["round"] - 1
        )
        matrix = one.experiment.network.matrix(
            names, one.experiment.seed, row["round"] - 1, active
        )[active, :][:, active]
        assert found == pytest.approx(
            rho(matrix, [sizes[i] for i in active] if weighting == "examples" else ())
        )
        assert (
            row["consensus_error"] <= 1.2 * found**2 * row["consensus_error_before_mixing"] + 1e-12
        ), "they are estimates"


def test_a_round_that_somebody_was_left_out_of_has_no_bound(runs: dict[str, Run]) -> None:
    one = runs["gossip"]
    rows = [
        {**row, "clients": 3 if k == 1 else row["clients"]}
        for k, row in enumerate(one.line.metrics)
    ]
    left = methods.left_by_mixing(one, rows)
    assert np.isnan(left[1])
    assert left[0] == left[2] == methods.left_by_mixing(one, one.line.metrics)[0]


def named(runs: dict[str, Run], names: list[str], place: Path) -> Path:
    """A run whose clients have other names."""
    shutil.copytree(runs["averaged"].path, place)
    other = dict(zip(runs["averaged"].clients, names, strict=True))
    for file in (place / EVALUATION, *place.glob(f"baselines/*/{EVALUATION}")):
        rows = [json.loads(row) for row in file.read_text().splitlines()]
        file.write_text(
            "".join(
                json.dumps({**row, "clients": {other[c]: r for c, r in row["clients"].items()}})
                + "\n"
                for row in rows
            )
        )
    known = json.loads((place / "clients.json").read_text())
    (place / "clients.json").write_text(
        json.dumps({other[client]: about for client, about in known.items()})
    )
    return place


def swept(runs: dict[str, Run], place: Path) -> Path:
    """A sweep of two variants by two seeds, copies of a run whose figures are moved a little."""
    planned = {}
    for number, (variant, seed) in enumerate([("one", 0), ("one", 1), ("two", 0), ("two", 1)]):
        folder = place / variant / f"seed-{seed}"
        shutil.copytree(runs["averaged"].path, folder)
        content = yaml.safe_load((folder / "config.yaml").read_text())
        content |= {"name": variant, "seed": seed}
        (folder / "config.yaml").write_text(yaml.safe_dump(content))
        rows = [json.loads(row) for row in (folder / EVALUATION).read_text().splitlines()]
        for row in rows:
            for k, metrics in enumerate(row["clients"].values()):
                moved = metrics["rewards/accuracies"] + 0.03 * number * (k % 3 - 1)
                metrics["rewards/accuracies"] = min(max(moved, 0.0), 1.0)
        (folder / EVALUATION).write_text("".join(json.dumps(row) + "\n" for row in rows))
        planned[f"{variant}/seed-{seed}"] = content
    (place / SWEEP).write_text(json.dumps({"select": None, "runs": planned}))
    return place


# ---- a browser


@pytest.fixture(scope="module")
def shown(runs: dict[str, Run], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A function that opens a page at a width, and the messages of its console."""
    api = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM:
        pytest.skip("there is no Chromium here; install it to have pages looked at")
    file = tmp_path_factory.mktemp("page") / "one.html"
    write_report([runs["averaged"].path], file)
    write_report([runs["averaged"].path, runs["gossip"].path], file.with_name("both.html"))
    names = [
        "<!--<script>",
        "1001",
        "<b>bold</b> & <a href='http://there.example'>x</a>",
        "$a name of very many words, which no chart has room for$",
    ]
    write_report([named(runs, names, file.with_name("odd"))], file.with_name("odd.html"))
    write_report([swept(runs, file.with_name("variants"))], file.with_name("sweep.html"))
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])

        def open_page(
            width: int, which: str = "one", scheme: str = "light"
        ) -> tuple[Any, list[str]]:
            opened = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            messages: list[str] = []
            opened.on("console", lambda message: messages.append(message.text))
            opened.on("pageerror", lambda error: messages.append(str(error)))
            opened.on(
                "request",
                lambda request: (
                    None
                    if request.url.startswith(("file:", "data:", "blob:"))
                    else messages.append(request.url)
                ),
            )
            opened.goto(file.with_name(f"{which}.html").as_uri())
            opened.wait_for_selector(".chart .main-svg")
            return opened, messages

        yield open_page
        browser.close()


@pytest.mark.parametrize(
    ("width", "scheme", "which"),
    [
        (1280, "light", "both"),
        (390, "light", "both"),
        (1280, "dark", "both"),
        (390, "light", "odd"),
        (1280, "light", "sweep"),
        (390, "light", "sweep"),
    ],
)
@pytest.mark.long
def test_a_browser_draws_every_chart(width: int, scheme: str, which: str, shown: Any) -> None:
    opened, messages = shown(width, which, scheme)
    assert messages == []
    counts = opened.evaluate("""[...document.querySelectorAll('.chart')].map(
        (chart) => chart.querySelectorAll('.scatterlayer path, .barlayer path').length)""")
    assert len(counts) >= (5 if which == "sweep" else 6)
    assert all(count > 0 for count in counts), counts
    assert opened.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), (
        "nothing is scrolled sideways"
    )
    clipped = opened.evaluate("""[...document.querySelectorAll('.chart')].flatMap((chart) => {
        const room = chart.getBoundingClientRect();
        return [...chart.querySelectorAll('text')].filter((text) => {
            const box = text.getBoundingClientRect();
            return box.width && (box.left < room.left - 2 || box.right > room.right + 2);
        }).map((text) => text.textContent);
    })""")
    assert clipped == []
    over = opened.evaluate("""[...document.querySelectorAll('.chart')].filter((chart) => {
        const drawn = chart.querySelector('.main-svg').getBoundingClientRect();
        return drawn.bottom > chart.getBoundingClientRect().bottom + 1;
    }).length""")
    assert over == 0, "no chart lies over what follows"
    across = opened.evaluate("""[...document.querySelectorAll('.chart')].flatMap((chart) => {
        const labels = '.legendtext, .xtick text, .ytick text, .xtitle, .ytitle';
        const boxes = [...chart.querySelectorAll(labels)]
            .map((text) => [text.textContent, text.getBoundingClientRect()])
            .filter(([, box]) => box.width);
        const touch = (a, b) => a.left + 1 < b.right && b.left + 1 < a.right
            && a.top + 3 < b.bottom && b.top + 3 < a.bottom;
        return boxes.flatMap(([one, a], k) => boxes.slice(k + 1)
            .filter(([, b]) => touch(a, b)).map(([other]) => [one, other]));
    })""")
    assert across == [], "no label lies over another"
    cut = opened.evaluate("""[...document.querySelectorAll('.card *, td, th, dd, .lead, h1, h2')]
        .filter((one) => one.scrollWidth > one.clientWidth + 1 && one.clientWidth)
        .map((one) => one.textContent)""")
    assert cut == [], "no tile, cell or sentence is cut"
    ink, paper = (
        opened.evaluate(f"getComputedStyle(document.body).{name}")
        for name in ("color", "backgroundColor")
    )
    light, dark = (
        sum(map(int, re.findall(r"\d+", colour)[:3]))
        for colour in ((paper, ink) if scheme == "light" else (ink, paper))
    )
    assert light > dark + 400
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    opened.screenshot(path=SCREENSHOTS / f"report-{which}-{width}-{scheme}.png", full_page=True)


def test_a_click_on_a_legend_hides_a_line(shown: Any) -> None:
    opened, messages = shown(1280)
    chart = opened.locator(".chart").first
    lines = (
        "(chart) => [...chart.querySelectorAll('.scatterlayer .trace')].filter((line) => "
        "line.querySelector('path')).length"
    )
    before = chart.evaluate(lines)
    chart.locator(".legendtoggle").first.click()
    opened.wait_for_timeout(800)  # a second click within this time would be a double one
    assert chart.evaluate(lines) < before
    assert messages == []


def test_names_are_text_in_charts(shown: Any) -> None:
    opened, messages = shown(1280, "odd")
    assert messages == []
    labels = opened.evaluate(
        "[...document.querySelectorAll('.chart .ytick text')].map((text) => text.textContent)"
    )
    assert {"<!--<script>", "1001"} <= set(labels)
    assert not opened.evaluate("document.querySelectorAll('.chart a').length")


def test_a_printed_page_has_every_chart_whole(shown: Any, tmp_path: Path) -> None:
    opened, messages = shown(1280)
    widths = (
        "[...document.querySelectorAll('.chart .main-svg:first-child')].map((chart) => "
        "chart.clientWidth)"
    )
    closed = "document.querySelectorAll('details:not([open])').length"
    before, count = opened.evaluate(widths), opened.evaluate(closed)
    opened.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert set(opened.evaluate(widths)) == {660}
    assert opened.evaluate(closed) == 0 < count
    opened.evaluate("dispatchEvent(new Event('afterprint'))")
    assert opened.evaluate(widths) == before
    assert opened.evaluate(closed) == count
    opened.pdf(path=tmp_path / "report.pdf")
    assert messages == []


@pytest.mark.long
def test_a_run_ends_with_its_page(settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**settings, "workers": 1}))
    ran = CliRunner().invoke(
        cli.app, ["run", str(tmp_path / "config.yaml"), "--output", str(tmp_path / "run")]
    )
    assert ran.exit_code == 0, ran.output
    assert f"report: {tmp_path}/run/report.html" in ran.output
    assert (tmp_path / "run/report.html").read_text().startswith("<!DOCTYPE html>")


def test_names_at_the_ends_of_lines_are_drawn_too() -> None:
    figures = pytest.importorskip("matplotlib.figure")
    names = {"type": "scatter", "mode": "text", "x": [1], "y": [2.0], "text": ["clinic"]}
    data = [charts.lined("mean", [0, 1], [1.0, 2.0], 0), names]
    axes = figures.Figure().subplots()
    draw_lines(charts.Chart("Held-out", "", data, charts.axes("round", "accuracy")), axes)
    assert [text.get_text() for text in axes.texts] == ["clinic"]
    assert len(axes.lines) == 1
