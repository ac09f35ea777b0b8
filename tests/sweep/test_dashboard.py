"""The dashboard in a real browser: it filters, sorts, draws and computes what Python computes, and asks for nothing."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from atma.commands.sweep_analysis import dashboard
from atma.sweep.contrasts import Effect, bootstrap, contrast, interactions, main_effects, sign_test
from atma.sweep.dashboard import html, page
from atma.sweep.dashboard_data import payload
from atma.sweep.pareto import over_seeds, pareto
from atma.sweep.table import Cell, Table, table
from atma.sweep.table_reading import load_table
from tests.sweep.synthetic_sweep import HOSTILE, write_cell, write_sweep

MAC = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", MAC))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
PUBLISHED = Path(__file__).resolve().parents[3] / "shared" / "published" / "stage1_120_cells.csv"
METRIC = "needle_token_acc_16384"
EFFECT_ROWS = """rows => rows.filter(row => row.children.length > 2).map(row => {
    const cells = [...row.children];
    return {label: cells[0].textContent, mean: +cells[2].dataset.value, low: cells[3].dataset.low,
            high: cells[3].dataset.high, median: +cells[4].dataset.value, minimum: +cells[5].dataset.low,
            maximum: +cells[5].dataset.high, signs: cells[6].textContent, p: +cells[7].dataset.value,
            pairs: cells[8].textContent};
})"""


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> Table:
    return load_table(write_sweep(tmp_path_factory.mktemp("sweep") / "invented"))


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no chromium on the path; install it to test the page in a browser")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


class View:
    """The dashboard in a browser, with what it complained of and asked for."""

    def __init__(self, browser, path: Path, width: int = 1280, scheme: str = "light") -> None:
        self.page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.complaints: list[str] = []
        self.requests: list[str] = []
        kinds = ("error", "warning")
        self.page.on("console", lambda m: self.complaints.append(m.text) if m.type in kinds else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.address = path.as_uri()
        self.page.goto(self.address)

    def effects(self, place: str) -> list[dict]:
        return self.page.eval_on_selector_all(f"{place} tbody tr", EFFECT_ROWS)

    def toggle(self, factor: str, level: str) -> None:
        box = self.page.locator("fieldset", has=self.page.locator("legend", has_text=re.compile(f"^{factor}$")))
        box.get_by_label(level, exact=True).click()

    def cells(self) -> list[str]:
        return self.page.eval_on_selector_all("#grid tbody tr", "rows => rows.map(row => row.dataset.cell)")

    def column(self, number: int) -> list[float]:
        read = "cells => cells.map(cell => +cell.dataset.value)"
        return self.page.eval_on_selector_all(f"#grid tbody td:nth-child({number})", read)

    def lines(self, chart: str) -> list[str]:
        return self.page.eval_on_selector_all(f"{chart} .series title", "all => all.map(title => title.textContent)")


@pytest.fixture
def view(browser, sweep: Table, tmp_path: Path) -> Iterator[View]:
    opened = View(browser, page(sweep, tmp_path / "sweep.html"))
    yield opened
    assert opened.complaints == []
    assert [url for url in opened.requests if not url.startswith("data:")] == [opened.address]
    opened.page.close()


def agree(shown: list[dict], computed: list[Effect]) -> None:
    """The rows of a table of effects are the effects that Python computes, those without pairs left out."""
    computed = [effect for effect in computed if effect.mean is not None]
    assert [row["label"] for row in shown] == [effect.label for effect in computed]
    for row, effect in zip(shown, computed, strict=True):
        told = effect.as_dict()
        for name in ("mean", "median", "minimum", "maximum", "p"):
            assert row[name] == pytest.approx(told[name], rel=1e-9, abs=1e-9), (effect.label, name)
        bounds = [None if row[name] == "" else float(row[name]) for name in ("low", "high")]
        assert bounds == (
            pytest.approx([effect.low, effect.high], rel=1e-9, abs=1e-9) if effect.low is not None else [None] * 2
        )
        assert row["signs"] == f"{effect.positive} / {effect.zero} / {effect.negative}"
        assert row["pairs"].split()[0] == str(len(effect.differences))


def test_the_page_refers_to_nothing_outside_and_is_small(sweep):
    text = html(sweep)
    assert not re.search(r"(src|href)=\"(?!data:|#)", re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL))
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in text
    assert len(text.encode()) < 200_000


def test_text_of_cells_cannot_end_the_script_it_stands_in(sweep):
    text = html(sweep, title=HOSTILE)
    assert HOSTILE not in text
    assert text.count("</script>") == 2


def test_a_page_of_many_cells_with_long_logs_stays_below_its_limit(tmp_path):
    log = tmp_path / "work.log"
    log.write_text("a line of a log\n" * 20_000)
    config = {"train": {f"setting_{i}": i for i in range(100)}}
    cells = [Cell(f"c{i}", {"width": i}, 0, {"clean_nll_64": i / 7}, config, tmp_path) for i in range(200)]
    text = html(table("large", cells))
    assert len(text.encode()) < 1_500_000
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


def test_the_effects_of_all_cells_are_pythons(view, sweep):
    shown = view.effects("#effect-table")
    assert len(shown) == 4
    agree(shown, main_effects(sweep, METRIC))


@pytest.mark.parametrize(
    ("hidden", "where"),
    [
        ([("attention", "nope"), ("attention", "rope")], {"attention": ["polar"]}),
        ([("attention", "nope"), ("window", "64")], {"attention": ["polar", "rope"], "window": ["none"]}),
        ([("memory", "off")], {"memory": [True]}),
    ],
)
def test_a_filter_leaves_its_cells_and_the_effects_within_them(view, sweep, hidden, where):
    for factor, level in hidden:
        view.toggle(factor, level)
    kept = sweep.where(where)
    assert sorted(view.cells()) == sorted(cell.name for cell in kept.cells)
    assert view.page.inner_text("#shown") == f"{len(kept.cells)} of 24 cells shown"
    shown = view.effects("#effect-table")
    assert shown
    agree(shown, main_effects(kept, METRIC))
    view.page.click("#reset")
    assert len(view.cells()) == 24


def test_another_metric_is_judged_by_at_once(view, sweep):
    view.page.select_option("#metric", label="clean nll 1K")
    agree(view.effects("#effect-table"), main_effects(sweep, "clean_nll_1024"))
    assert view.column(3) == sorted(cell.metrics["clean_nll_1024"] for cell in sweep.cells)


def test_interactions_of_any_two_factors_are_pythons(view, sweep):
    wanted = {effect.label: effect for effect in interactions(sweep, METRIC)}
    for one, other in (("attention", "memory"), ("attention", "window"), ("memory", "window")):
        view.page.select_option("#one", label=one)
        view.page.select_option("#other", label=other)
        shown = view.effects("#interaction-table")
        agree(shown, [wanted[row["label"]] for row in shown])
        assert len(shown) == (2 if one == "attention" else 1)


def test_the_page_opens_at_the_largest_interaction(view):
    assert view.page.locator("#one option:checked").inner_text() == "attention"
    assert view.page.locator("#other option:checked").inner_text() == "memory"


def test_a_contrast_of_ones_own_is_pythons(view, sweep):
    for name, side, level in (
        ("attention", "first", "polar"),
        ("attention", "second", "nope"),
        ("memory", "first", "on"),
    ):
        view.page.get_by_label(f"{name}, {side} side").select_option(label=level)
    more, less = {"attention": "polar", "memory": True}, {"attention": "nope", "memory": True}
    agree(view.effects("#own-table"), [contrast(sweep, METRIC, more, less)])


def test_bootstrap_and_sign_test_are_pythons_for_groups_of_any_size(view):
    groups = [[1.5], [-2.0, 0.25], [3.0], [0.5, 0.5, -1.0]]
    assert view.page.evaluate("groups => bootstrap(groups)", groups) == pytest.approx(bootstrap(groups), rel=1e-12)
    for positive, negative in ((0, 0), (3, 3), (20, 0), (700, 650)):
        values = [1.0] * positive + [-1.0] * negative + [0.0]
        assert view.page.evaluate("v => signTest(v)", values) == pytest.approx(sign_test(values), rel=1e-9)


def test_a_click_on_a_heading_sorts_and_another_sorts_the_other_way(view, sweep):
    heading = view.page.get_by_role("button", name="final val loss nats")
    place = view.page.eval_on_selector_all("#grid thead th", "all => all.map(th => th.innerText)")
    number = next(i for i, words in enumerate(place, 1) if "final val loss" in words)
    losses = sorted(cell.metrics["final_val_loss_nats"] for cell in sweep.cells)
    heading.click()
    assert view.column(number) == losses
    assert view.page.locator(f"#grid th:nth-child({number})").get_attribute("aria-sort") == "ascending"
    heading.click()
    assert view.column(number) == losses[::-1]
    view.page.get_by_role("button", name="cell", exact=True).click()
    names = view.page.locator("#grid tbody th").all_inner_texts()
    assert names == sorted(names)


def test_ticking_cells_draws_their_curves_with_their_values(view, sweep):
    view.page.click("#pick-none")
    assert view.lines("#length-chart") == []
    chosen = [cell for cell in sweep.cells if cell.factors["attention"] == "polar"][:2]
    for cell in chosen:
        view.page.locator(f"tr[data-cell='{cell.name}'] input").check()
    assert len(view.lines("#length-chart")) == 2
    read = "rows => rows.map(row => [...row.querySelectorAll('td')].map(cell => +cell.dataset.value))"
    shown = view.page.eval_on_selector_all("#length-table tbody tr", read)
    assert shown == [
        [cell.metrics[f"needle_token_acc_{length}"] for length in (256, 1024, 4096, 16384)] for cell in chosen
    ]
    view.page.get_by_text("clean nll", exact=True).first.click()
    points = view.page.locator("#length-chart .series >> nth=0 >> polyline").get_attribute("points")
    heights = [float(point.split(",")[1]) for point in points.split()]
    losses = [chosen[0].metrics[f"clean_nll_{length}"] for length in (256, 1024, 4096, 16384)]
    slope = (heights[-1] - heights[0]) / (losses[-1] - losses[0])
    assert slope < 0
    assert heights == pytest.approx([heights[0] + slope * (loss - losses[0]) for loss in losses], abs=0.2)


def test_training_curves_stand_over_tokens_or_seconds(view, sweep):
    view.page.click("#pick-none")
    for memory in ("False", "True"):
        view.page.locator(f"tr[data-cell='polar-{memory}-none-0'] input").check()
    ends = "all => all.map(line => line.getAttribute('points').split(' ').at(-1).split(',')[0])"
    assert len(view.lines("#training-chart")) == 4
    assert len(set(view.page.eval_on_selector_all("#training-chart .series polyline", ends))) == 1
    view.page.locator("#budgets").get_by_text("seconds").click()
    fast, slow = sorted({float(x) for x in view.page.eval_on_selector_all("#training-chart .series polyline", ends)})
    assert slow > fast + 100


def test_the_front_is_pythons_and_its_points_select_cells(view, sweep):
    """Of settings averaged over their seeds, in both."""
    best = pareto(over_seeds(sweep), [METRIC, "train_seconds"])
    shown = view.page.locator("#front-list li").all_inner_texts()
    assert [words.partition(": ")[0] for words in shown] == [cell.name for cell in best[::-1]]
    values = [f"{cell.metrics[METRIC]:.2f}, train seconds {cell.metrics['train_seconds']:.1f}" for cell in best[::-1]]
    assert [words.partition(": ")[2] for words in shown] == values
    view.page.click("#pick-none")
    view.page.locator("#front-chart .point").nth(3).click()
    assert len(view.lines("#length-chart")) == 2


def test_a_name_opens_the_cells_recipe_and_log_as_text(view):
    view.page.locator("tr[data-cell='polar-True-64-1'] button").click()
    dialog = view.page.locator("dialog")
    told = dialog.inner_text()
    assert "polar-True-64-1: 100 steps to go" in told
    assert HOSTILE in told
    assert '"length": 256' in told
    assert view.page.title() == "Sweep invented"
    view.page.keyboard.press("Escape")
    assert not dialog.is_visible()


def test_the_keyboard_alone_filters_sorts_selects_and_opens(view):
    view.page.locator("fieldset input").first.focus()
    view.page.keyboard.press("Space")
    assert view.page.inner_text("#shown") == "16 of 24 cells shown"
    view.page.get_by_role("button", name="params").focus()
    view.page.keyboard.press("Enter")
    assert view.page.evaluate("document.activeElement.textContent").startswith("params")
    view.page.click("#pick-none")
    view.page.locator("#grid tbody input").first.focus()
    view.page.keyboard.press("Space")
    assert len(view.lines("#length-chart")) == 1
    view.page.keyboard.press("Tab")
    view.page.keyboard.press("Enter")
    assert view.page.locator("dialog").is_visible()


def test_columns_can_be_added_and_taken_away(view):
    view.page.locator(".menu summary").click()
    view.page.locator("#columns").get_by_label("window").check()
    view.page.locator("#columns").get_by_label("params").uncheck()
    words = view.page.locator("#grid thead").inner_text()
    assert "window" in words
    assert "params" not in words


def test_hiding_every_level_leaves_words_and_no_error(view):
    for level in ("nope", "polar", "rope"):
        view.toggle("attention", level)
    assert view.cells() == []
    assert view.effects("#effect-table") == []
    assert "no matched cells" in view.page.inner_text("#effect-table")


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_phone_and_desk_in_light_and_dark(browser, sweep, tmp_path, width, scheme):
    view = View(browser, page(sweep, tmp_path / "sweep.html"), width, scheme)
    assert view.page.evaluate("document.documentElement.scrollWidth") <= width
    for chart in ("#length-chart", "#training-chart", "#front-chart"):
        box = view.page.locator(f"{chart} > svg").bounding_box()
        assert width / 2 < box["width"] <= width
    ratio = view.page.evaluate(CONTRAST)
    assert ratio >= 4.5  # WCAG 2, AA for text
    assert view.complaints == []
    view.page.close()


CONTRAST = """() => {
    const light = (text) => {
        const parts = text.match(/[0-9.]+/g).slice(0, 3).map(v => v / 255);
        const linear = parts.map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
    };
    const ground = light(getComputedStyle(document.body).backgroundColor);
    const inks = ['#summary', '.note', '#grid .link', '#shown', '#grid td:nth-child(3)'];
    return Math.min(...inks.map(place => {
        const ink = light(getComputedStyle(document.querySelector(place)).color);
        return (Math.max(ink, ground) + 0.05) / (Math.min(ink, ground) + 0.05);
    }));
}"""


def test_a_table_without_seeds_logs_or_lengths_has_a_page_too(browser, tmp_path):
    path = tmp_path / "small.csv"
    path.write_text("width,final_val_loss_nats\n8,3.5\n16,3.25\n")
    view = View(browser, page(load_table(path), tmp_path / "small.html"))
    (row,) = view.effects("#effect-table")
    assert (row["label"], row["mean"], row["low"]) == ("width 16 − 8", -0.25, "")
    assert view.page.locator("#lengths").is_hidden()
    assert view.page.locator("#training").is_hidden()
    assert view.page.locator("#interactions").is_hidden()
    assert view.complaints == []
    view.page.close()


def test_a_sweep_of_seeds_alone_has_a_page_too(browser, tmp_path):
    for seed in (0, 1, 2):
        write_cell(tmp_path / "seeds", {"attention": "polar", "memory": True, "window": 64}, seed)
    for path in tmp_path.rglob("result.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"factors": {}}))
    view = View(browser, page(load_table(tmp_path / "seeds"), tmp_path / "seeds.html"))
    assert view.page.locator("#summary").inner_text() == "3 cells of seeds, without factors."
    assert len(view.cells()) == 3
    assert len(view.lines("#length-chart")) == 1
    assert view.page.locator("#front-list li").all_inner_texts()[0].startswith("nothing on, 3 seeds: ")
    for part in ("#filterbox", "#pick-each", "#hue", "#effects", "#interactions"):
        assert view.page.locator(part).is_hidden(), part
    view.page.click("#pick-best")
    assert len(view.lines("#length-chart")) == 3
    assert view.complaints == []
    view.page.close()


def test_the_published_tables_page_computes_what_python_does(browser, tmp_path):
    if not PUBLISHED.is_file():
        pytest.skip("the published table (../shared/published) is not beside this checkout")
    published = load_table(PUBLISHED)
    view = View(browser, page(published, tmp_path / "published.html"))
    agree(view.effects("#effect-table"), main_effects(published, "needle_token_acc_65536"))
    for level in ("nope", "rope"):
        view.toggle("attention", level)
    polar = published.where({"attention": ["polar"]})
    shown = view.effects("#effect-table")
    agree(shown, main_effects(polar, "needle_token_acc_65536"))
    memory = next(row for row in shown if row["label"] == "memory on − off")
    assert (memory["mean"], memory["median"], memory["signs"]) == (47.75, 51.25, "20 / 0 / 0")
    assert view.complaints == []
    view.page.close()
