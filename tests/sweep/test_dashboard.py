"""The dashboard in a real browser: it filters, sorts, draws and shows what Python computes, and asks for nothing."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from atma.commands.sweep_analysis import dashboard
from atma.sweep import dashboard_effects
from atma.sweep.contrasts import Effect, contrast, interactions, main_effects
from atma.sweep.dashboard import html, page
from atma.sweep.dashboard_data import payload
from atma.sweep.dashboard_effects import depth, judged, row
from atma.sweep.pareto import over_seeds, pareto
from atma.sweep.table import Cell, Table, table
from atma.sweep.table_reading import load_table
from tests.harness.watching import Watched
from tests.sweep.synthetic_sweep import HOSTILE, write_cell, write_sweep

PUBLISHED = Path(__file__).resolve().parents[3] / "shared" / "published" / "stage1_120_cells.csv"
METRIC = "needle_token_acc_16384"
TEXTS = "rows => rows.map(row => [...row.cells].map(cell => cell.textContent))"


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> Table:
    return load_table(write_sweep(tmp_path_factory.mktemp("sweep") / "invented"))


class View(Watched):
    """The dashboard in a browser."""

    def effects(self, place: str) -> list[list[str]]:
        return self.page.eval_on_selector_all(f"{place} tbody tr", TEXTS)

    def tick(self, factor: str, level: str) -> None:
        box = self.page.locator("fieldset", has=self.page.locator("legend", has_text=re.compile(f"^{factor}$")))
        box.get_by_label(level, exact=True).click()

    def cells(self) -> list[str]:
        read = "rows => rows.filter(row => !row.hidden).map(row => row.dataset.cell)"
        return self.page.eval_on_selector_all("#grid tbody tr", read)

    def column(self, name: str) -> list[float]:
        heads = self.page.locator("#grid thead th").all_text_contents()
        read = "cells => cells.map(cell => +cell.dataset.value)"
        return self.page.eval_on_selector_all(f"#grid tbody td:nth-child({heads.index(name) + 2})", read)

    def traces(self, chart: str, what: str = "trace.name") -> list:
        return self.page.evaluate(f"document.querySelector('{chart}').data.map(trace => {what})")


@pytest.fixture(scope="module")
def written(sweep: Table, tmp_path_factory) -> Path:
    return page(sweep, tmp_path_factory.mktemp("page") / "sweep.html")


@pytest.fixture
def view(tab, written: Path) -> Iterator[View]:
    opened = View(tab, written)
    yield opened
    opened.close()


def told(effects: list[Effect]) -> list[list[str]]:
    """The rows of the page's table of these effects."""
    return [[row(effect)[0], *row(effect)[7:]] for effect in effects]


def without_plotly(text: str) -> str:
    return re.sub(r"<script>/\*\*.*?</script>", "", text, flags=re.DOTALL)


def test_the_page_has_plotly_once_and_refers_to_nothing_outside(sweep):
    text = html(sweep)
    assert text.count("plotly.js v") == 1
    rest = without_plotly(text)
    assert not re.search(r"(src|href)=\"(?!data:|#)", re.sub(r"<script.*?</script>", "", rest, flags=re.DOTALL))
    assert not re.search("https?://", rest)
    assert len(rest.encode()) < 400_000


def test_text_of_cells_cannot_end_the_script_it_stands_in(sweep):
    text = html(sweep, title=HOSTILE)
    assert HOSTILE not in text
    assert without_plotly(text).count("</script>") == 3


def test_a_level_that_reads_like_markup_is_shown_as_text(tab, tmp_path):
    cells = [Cell(f"c{i}", {"core": core}, 0, {"clean_nll_64": i / 7}) for i, core in enumerate(("plain", HOSTILE))]
    view = View(tab, page(table("hostile", cells), tmp_path / "hostile.html"))
    assert HOSTILE in view.page.locator("#grid").inner_text()
    assert HOSTILE in view.page.locator("#length-chart").text_content()
    assert view.page.locator("img").count() == 0
    assert view.page.title() == "Sweep hostile"
    view.close()


def test_a_page_of_many_cells_with_long_logs_stays_below_its_limit(tmp_path):
    log = tmp_path / "work.log"
    log.write_text("a line of a log\n" * 20_000)
    config = {"train": {f"setting_{i}": i for i in range(100)}}
    cells = [Cell(f"c{i}", {"width": i}, 0, {"clean_nll_64": i / 7}, config, tmp_path) for i in range(200)]
    text = html(table("large", cells))
    assert len(without_plotly(text).encode()) < 2_500_000
    assert "the last 1,500 of 319,999 characters" in text


def test_the_data_of_a_page_are_the_tables(sweep):
    data = json.loads(json.dumps(payload(sweep), allow_nan=False))
    assert [factor["levels"] for factor in data["factors"]] == [
        ["nope", "polar", "rope"],
        ["off", "on"],
        ["none", "64"],
    ]
    for cell, source in zip(data["cells"], sweep.cells, strict=True):
        assert cell["metrics"] == [source.metrics[name] for name in sweep.metrics]
        assert cell["curves"]["train"]["tokens"] == [1000.0 * step for step in range(1, 11)]
    assert data["trained"] == 256


def test_a_folder_is_no_page(sweep, tmp_path):
    with pytest.raises(ValueError, match="is a folder"):
        page(sweep, tmp_path)


def test_the_command_writes_the_page(tmp_path, capsys):
    out = tmp_path / "pages" / "sweep.html"
    dashboard(write_sweep(tmp_path / "s"), out, metric="clean_nll", title="Ours & theirs")
    assert "<title>Ours &amp; theirs</title>" in out.read_text(encoding="utf-8")
    assert str(out) in capsys.readouterr().out


def test_a_row_of_effects_tells_the_effect():
    differences = (2.0, -1.0, 5.0, 3.0)
    effect = Effect("memory on − off", "needle_token_acc_64", differences, 4, 1, 2.25, 2.5, 0.5, 4.0, 0.625)
    texts = ["+2.25", "+0.50 … +4.00", "+2.50", "-1.00 … +5.00", "3 / 0 / 1", "0.62", "4 (1 cells unmatched)"]
    assert row(effect) == ["memory on − off", "better", 2.25, 0.5, 4.0, -1.0, 5.0, *texts]
    assert row(replace(effect, metric="clean_nll_64"))[1] == "worse"
    assert row(replace(effect, low=-0.5))[1] == "unclear"


def test_the_effects_of_all_cells_are_pythons(view, sweep):
    shown = view.effects("#effect-table")
    assert len(shown) == 4
    assert shown == told(main_effects(sweep, METRIC))
    (other,) = view.effects("#other-table")
    assert other == told([contrast(sweep, METRIC, {"attention": "rope"}, {"attention": "polar"})])[0]
    assert view.traces("#effect-chart", "trace.x")[0] == pytest.approx(
        [effect.mean for effect in main_effects(sweep, METRIC)][::-1], rel=1e-4
    )


@pytest.mark.parametrize(
    ("ticked", "where"),
    [
        ([("attention", "polar")], {"attention": ["polar"]}),
        ([("attention", "polar"), ("memory", "on")], {"attention": ["polar"], "memory": [True]}),
        ([("memory", "on")], {"memory": [True]}),
    ],
)
def test_a_filter_leaves_its_cells_and_the_effects_within_them(view, sweep, ticked, where):
    for factor, level in ticked:
        view.tick(factor, level)
    kept = sweep.where(where)
    assert sorted(view.cells()) == sorted(cell.name for cell in kept.cells)
    assert view.page.inner_text("#shown") == f"{len(kept.cells)} of 24 cells shown"
    assert view.effects("#effect-table") == told(main_effects(kept, METRIC))
    assert view.effects("#effect-table")
    assert view.page.locator("#uncounted").is_hidden()
    view.page.get_by_role("button", name="Show all cells").click()
    assert len(view.cells()) == 24


def test_of_several_levels_the_cells_are_shown_and_words_say_where_their_contrasts_are(view):
    for level in ("polar", "rope"):
        view.tick("attention", level)
    assert len(view.cells()) == 16
    assert view.effects("#effect-table") == []
    assert "atma sweep analyse --where" in view.page.inner_text("#uncounted")
    view.tick("attention", "nope")
    assert len(view.effects("#effect-table")) == 4


def test_filters_go_only_as_deep_as_the_page_stays_small(sweep, monkeypatch):
    assert depth(sweep) == 3
    monkeypatch.setattr(dashboard_effects, "EFFECTS", 500)
    assert depth(sweep) == 1
    monkeypatch.setattr(dashboard_effects, "EFFECTS", 1)
    assert depth(sweep) == 0
    assert list(judged(sweep, 0)) == [",,"]


def test_another_metric_is_judged_by_at_once(view, sweep):
    view.page.select_option("select[name=metric]", label="clean nll 1K")
    assert view.effects("#effect-table") == told(main_effects(sweep, "clean_nll_1024"))
    assert view.column("clean nll 1K") == sorted(cell.metrics["clean_nll_1024"] for cell in sweep.cells)
    assert view.page.locator("select[name=family] option:checked").inner_text() == "clean nll"


def test_interactions_of_any_two_factors_are_pythons_with_their_means(view, sweep):
    wanted = {line[0]: line for line in told(interactions(sweep, METRIC))}
    for one, other in (("attention", "memory"), ("attention", "window"), ("memory", "window")):
        view.page.select_option("select[name=pair]", label=f"{one} × {other}")
        shown = view.effects("#interaction-table")
        assert shown == [wanted[line[0]] for line in shown]
        assert len(shown) == (2 if one == "attention" else 1)
    values = [c.metrics[METRIC] for c in sweep.where({"memory": [True], "window": [64]}).cells]
    means = view.effects("#means")
    assert means[1][0] == "memory on"
    assert float(means[1][2]) == pytest.approx(sum(values) / len(values), abs=0.005 + 1e-9)


def test_the_page_opens_at_the_largest_interaction(view):
    assert view.page.locator("select[name=pair] option:checked").inner_text() == "attention × memory"


def test_a_click_on_a_heading_sorts_and_another_sorts_the_other_way(view, sweep):
    heading = view.page.get_by_role("button", name="final val loss nats")
    losses = sorted(cell.metrics["final_val_loss_nats"] for cell in sweep.cells)
    heading.click()
    assert view.column("final val loss nats") == losses
    assert heading.locator("..").get_attribute("aria-sort") == "ascending"
    heading.click()
    assert view.column("final val loss nats") == losses[::-1]
    view.page.get_by_role("button", name="cell", exact=True).click()
    names = view.page.locator("#grid tbody th").all_inner_texts()
    assert names == sorted(names)


def test_ticking_cells_draws_their_curves_with_their_values(view, sweep):
    view.page.click("#pick-none")
    assert view.traces("#length-chart") == []
    chosen = [cell for cell in sweep.cells if cell.factors["attention"] == "polar"][:2]
    for cell in chosen:
        view.page.locator(f"tr[data-cell='{cell.name}'] input").check()
    for family, label in (("needle_token_acc", "needle token acc"), ("clean_nll", "clean nll")):
        view.page.select_option("select[name=family]", label=label)
        wanted = [[cell.metrics[f"{family}_{length}"] for length in (256, 1024, 4096, 16384)] for cell in chosen]
        assert view.traces("#length-chart", "trace.y") == wanted
        texts = view.page.eval_on_selector_all("#length-table tbody tr", TEXTS)
        assert [[float(text) for text in line[1:]] for line in texts] == [pytest.approx(y, abs=5e-5) for y in wanted]
    assert view.page.locator("#length-chart .scatterlayer .trace").count() == 2
    assert "trained at 256" in view.page.locator("#length-chart").text_content()
    colours = view.traces("#length-chart", "trace.line.color")
    view.page.locator(f"tr[data-cell='{chosen[0].name}'] input").uncheck()
    assert view.traces("#length-chart", "trace.line.color") == colours[1:]


def test_training_curves_stand_over_tokens_or_seconds(view, sweep):
    view.page.click("#pick-none")
    for memory in ("False", "True"):
        view.page.locator(f"tr[data-cell='polar-{memory}-none-0'] input").check()
    assert view.traces("#training-chart", "trace.x.at(-1)") == [10_000] * 4
    view.page.select_option("select[name=budget]", label="seconds")
    assert view.traces("#training-chart", "trace.x.at(-1)") == [2.5, 2.5, 5.0, 5.0]


def test_the_front_is_pythons_and_its_points_select_cells(view, sweep):
    """Of settings averaged over their seeds, in both."""
    best = pareto(over_seeds(sweep), [METRIC, "train_seconds"])[::-1]
    shown = view.page.locator("#front-list li").all_inner_texts()
    values = [f"{cell.metrics[METRIC]:.2f}, train seconds {cell.metrics['train_seconds']:.1f}" for cell in best]
    assert shown == [f"{cell.name}: {text}" for cell, text in zip(best, values, strict=True)]
    view.tick("attention", "rope")
    kept = over_seeds(sweep).where({"attention": ["rope"]})
    names = [cell.name for cell in pareto(kept, [METRIC, "train_seconds"])][::-1]
    assert [words.partition(": ")[0] for words in view.page.locator("#front-list li").all_inner_texts()] == names
    view.page.click("#pick-none")
    view.page.locator("#front-chart").scroll_into_view_if_needed()
    view.page.locator("#front-chart .points path").last.hover(force=True)
    view.page.mouse.down()
    view.page.mouse.up()
    view.page.wait_for_function("document.querySelector('#length-chart').data.length == 2")


def test_a_name_opens_the_cells_recipe_and_log_as_text(view):
    view.page.locator("tr[data-cell='polar-True-64-1'] button").click()
    dialog = view.page.locator("[popover]:popover-open")
    told = dialog.inner_text()
    assert "polar-True-64-1: 100 steps to go" in told
    assert HOSTILE in told
    assert '"length": 256' in told
    assert view.page.title() == "Sweep invented"
    view.page.keyboard.press("Escape")
    assert dialog.count() == 0


def test_the_keyboard_alone_filters_sorts_selects_and_opens(view):
    view.page.locator("fieldset input").first.focus()
    view.page.keyboard.press("Space")
    assert view.page.inner_text("#shown") == "8 of 24 cells shown"
    view.page.get_by_role("button", name="params").focus()
    view.page.keyboard.press("Enter")
    assert view.page.evaluate("document.activeElement.textContent") == "params"
    view.page.click("#pick-none")
    view.page.locator("#grid tbody tr:not([hidden]) input").first.focus()
    view.page.keyboard.press("Space")
    assert len(view.traces("#length-chart")) == 1
    view.page.keyboard.press("Tab")
    view.page.keyboard.press("Enter")
    assert view.page.locator("[popover]:popover-open").count() == 1


def test_columns_can_be_added_and_taken_away(view):
    view.page.locator("#columns summary").click()
    view.page.locator("#columns").get_by_label("window").check()
    view.page.locator("#columns").get_by_label("params").uncheck()
    words = view.page.locator("#grid thead").inner_text()
    assert "window" in words
    assert "params" not in words


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_phone_and_desk_in_light_and_dark(tab, written, width, scheme):
    view = View(tab, written, width, scheme)
    assert view.page.evaluate("document.documentElement.scrollWidth") <= width
    for chart in ("#length-chart", "#training-chart", "#effect-chart", "#front-chart"):
        box = view.page.locator(f"{chart} .main-svg >> nth=0").bounding_box()
        assert width / 2 < box["width"] <= width
    ratio = view.page.evaluate(CONTRAST)
    assert ratio >= 4.5  # WCAG 2, AA for text
    view.close()


CONTRAST = """() => {
    const light = (text) => {
        const parts = text.match(/[0-9.]+/g).slice(0, 3).map(v => v / 255);
        const linear = parts.map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
    };
    const ground = light(getComputedStyle(document.body).backgroundColor);
    const inks = ['#summary', '.note', '#grid .link', '#shown', '#grid td:nth-child(6)'];
    return Math.min(...inks.map(place => {
        const ink = light(getComputedStyle(document.querySelector(place)).color);
        return (Math.max(ink, ground) + 0.05) / (Math.min(ink, ground) + 0.05);
    }));
}"""


def test_a_table_without_seeds_logs_or_lengths_has_a_page_too(tab, tmp_path):
    path = tmp_path / "small.csv"
    path.write_text("width,final_val_loss_nats\n8,3.5\n16,3.25\n")
    view = View(tab, page(load_table(path), tmp_path / "small.html"))
    (line,) = view.effects("#effect-table")
    assert line[:3] == ["width 16 − 8", "-0.2500", "–"]
    assert view.page.locator("#lengths").is_hidden()
    assert view.page.locator("#training").is_hidden()
    assert view.page.locator("#interactions").is_hidden()
    view.close()


def test_a_sweep_of_seeds_alone_has_a_page_too(tab, tmp_path):
    for seed in (0, 1, 2):
        write_cell(tmp_path / "seeds", {"attention": "polar", "memory": True, "window": 64}, seed)
    for path in tmp_path.rglob("result.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"factors": {}}))
    view = View(tab, page(load_table(tmp_path / "seeds"), tmp_path / "seeds.html"))
    assert view.page.locator("#summary").inner_text() == "3 cells of seeds, without factors."
    assert len(view.cells()) == 3
    assert len(view.traces("#length-chart")) == 1
    assert view.page.locator("#front-list li").all_inner_texts()[0].startswith("nothing on, 3 seeds: ")
    for part in ("#filterbox", "#pick-each", "select[name=hue]", "#effects", "#interactions"):
        assert view.page.locator(part).is_hidden(), part
    view.page.click("#pick-best")
    assert len(view.traces("#length-chart")) == 3
    view.close()


@pytest.mark.slow
def test_the_published_tables_page_computes_what_python_does(tab, tmp_path):
    if not PUBLISHED.is_file():
        pytest.skip("the published table (../shared/published) is not beside this checkout")
    published = load_table(PUBLISHED)
    view = View(tab, page(published, tmp_path / "published.html"))
    assert view.effects("#effect-table") == told(main_effects(published, "needle_token_acc_65536"))
    view.tick("attention", "polar")
    shown = view.effects("#effect-table")
    assert shown == told(main_effects(published.where({"attention": ["polar"]}), "needle_token_acc_65536"))
    memory = next(line for line in shown if line[0] == "memory on − off")
    assert (memory[1], memory[3], memory[5]) == ("+47.75", "+51.25", "20 / 0 / 0")
    view.close()
