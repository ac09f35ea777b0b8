"""The HTML page of a report: one file with styles, script, figures and tables in it, that asks the network for nothing.

plotly.js is in the page once. The page's policy (Content-Security-Policy) forbids every request, and all text that
comes from runs is escaped.
"""

from html import escape
from pathlib import Path

from atma.config import dump_toml
from atma.report.content import Report, Run, Section, first_value
from atma.report.figures import Table, figures
from atma.report.headline import headline
from atma.report.parts import figure_html, items, made_with, paragraph, table_html
from atma.report.recall import recall_html, recall_sentences
from atma.report.shell import shell, write_text

HASHES = {
    "weights": "weights_sha256",
    "tokenizer": "tokenizer_sha256",
    "evaluation data": "data_hash",
    "code": "code_sha256",
}
SETTINGS = ("parameters", "core", "memory", "dtype", "backend", "device", "threads", "seed", "version")


def page(report: Report, path: str | Path) -> Path:
    """Write the report to `path`, making its folder, and return the path. OSError if it cannot be written."""
    return write_text(path, html(report))


def html(report: Report) -> str:
    """The report as the text of one HTML file."""
    recalled = recall_html(report.recall) if report.recall else ""
    body = recalled + "".join(_section(section, f"s{i}") for i, section in enumerate(report.sections))
    environment = Table(["environment", ""], [[name, value] for name, value in report.environment.items()])
    return shell(report.title, f"{body}{made_with(report.command, environment)}", _above(report))


def _above(report: Report) -> str:
    """What comes before the sections: why, the recall, the slopes, what was cut."""
    why = "".join(paragraph(sentence) for sentence in report.opening)
    cuts = f'<div class="cuts"><h2>Cut to end in time</h2>{items(report.cuts)}</div>' if report.cuts else ""
    return f"{why}{_headlines(report)}{cuts}"


def _headlines(report: Report) -> str:
    parts = [f"<h2>Recall at length</h2>{items(recall_sentences(report.recall))}"] if report.recall else []
    for section in report.sections:
        told = items(headline(section))
        parts.append(f"<h2>{escape(section.title)}</h2>{told}" if told else "")
    return f'<div class="headline">{"".join(f"<div>{part}</div>" for part in parts if part)}</div>'


def _section(section: Section, name: str) -> str:
    drawn = "".join(figure_html(figure, f"{name}f{i}") for i, figure in enumerate(figures(section)))
    return (
        f'<section id="{name}"><h2>{escape(section.title)}</h2>{paragraph(section.note)}'
        f'<div class="figures">{drawn}</div>{_slopes(section)}{_samples(section)}{_recipes(section)}</section>'
    )


def _slopes(section: Section) -> str:
    """Slope and change of every loss measure with their intervals, the figures that a claim about length rests on."""
    rows = []
    for run in section.runs:
        for measure in ("fixed", "nested", "junk"):
            summary = run.summary(measure)
            if summary is not None and "slope" in summary:
                span = f"{summary['lengths'][0]:,} to {summary['lengths'][-1]:,}"
                slope, change = _interval(summary, "slope"), _interval(summary, "change")
                rows.append([section.label(run), measure, span, str(summary["documents"]), slope, change])
    if not rows:
        return ""
    header = ["run", "measure", "lengths", "documents", "nats per doubling of length", "last length − first, nats"]
    note = "Each document is its own control: slopes and changes are taken per document, intervals are 95% over them."
    return f"<h3>Does loss rise with length?</h3>{paragraph(note)}{table_html(Table(header, rows))}"


def _interval(summary: dict, key: str) -> str:
    value, low, high = summary[key], summary.get(f"{key}_low"), summary.get(f"{key}_high")
    return f"{value:+.4f}" if low is None or high is None else f"{value:+.4f} [{low:+.4f}, {high:+.4f}]"


def _samples(section: Section) -> str:
    parts = [
        f'<article><h4>{escape(section.label(run))}</h4><pre class="sample"><b>{escape(run.prompt)}</b>'
        f"{escape(run.sample)}</pre></article>"
        for run in section.runs
        if run.sample
    ]
    return f"<h3>A generated sample</h3><div class='figures'>{''.join(parts)}</div>" if parts else ""


def _recipes(section: Section) -> str:
    facts = [_facts(run) for run in section.runs]
    rows = [[name, *(column[name] for column in facts)] for name in facts[0]]
    table = Table(["", *(section.label(run) for run in section.runs)], rows)
    texts = "".join(_recipe_text(section.label(run), run) for run in section.runs)
    return f"<h3>How they were made and measured</h3>{table_html(table)}{texts}"


def _recipe_text(label: str, run: Run) -> str:
    text = escape(dump_toml(run.recipe))
    return f"<details><summary>Recipe of {escape(label)}</summary><pre>{text}</pre></details>"


def _facts(run: Run) -> dict[str, str]:
    train, data, model = run.recipe.train, run.recipe.data, run.recipe.model
    warmup = f"{data.copy_warmup_tokens:,} tokens over {data.copy_vocabulary} ids"
    facts = {
        "layers × width, vocabulary": f"{model.depth} × {model.width}, {model.vocab_size:,}",
        "training length": f"{train.length:,} tokens",
        "training tokens": f"{train.tokens:,} in {train.steps:,} steps",
        "synthetic recall rows": f"{data.recall_share:.0%} of the training rows" if data.recall_share else "none",
        "synthetic copy warm-up": warmup if data.copy_warmup_tokens else "none",
        "training seed": str(train.seed),
    }
    facts |= {key: _provenance(run, key) for key in SETTINGS}
    return facts | {f"{name}, SHA-256": _provenance(run, key)[:16] for name, key in HASHES.items()}


def _provenance(run: Run, key: str) -> str:
    told = [row.get("provenance", {}) for row in run.evaluation]
    value = first_value(told, key)
    absent = "none" if key in ("core", "memory") and any(told) else "not measured"
    return absent if value is None else str(value)
