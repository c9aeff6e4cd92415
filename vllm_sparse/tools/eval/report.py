"""One HTML page of an evaluation: a table and plots, all inside the file."""

from __future__ import annotations

import base64
import io
from html import escape
from pathlib import Path

from vllm_sparse.tools.eval import pairs, plots
from vllm_sparse.tools.eval.summary import Summary, cells_of, columns

STYLE = """body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 } th, td { padding: .2rem .7rem; text-align: right }
th:first-child, td:first-child { text-align: left } tr:nth-child(even) { background: #f4f5f7 }
th { border-bottom: 1px solid #999 } img { max-width: 100% } small { color: #555 }"""
INTERVALS = (
    "Intervals of 95 %: Wilson's for scores; Newcombe's of pairs for differences from dense on the same samples; "
    "for losses of text the bootstrap over passages, from five on. Lost, won: samples worse, better than dense."
)
PLOTS = (
    (
        "Text under decode sparsity",
        plots.text_by_budget,
        "The last tokens of each text are fed to decode steps, one by one. KL is a lower bound of the divergence "
        "from dense: tokens among the likeliest of both are told apart, all others count as one. Recall is the "
        "exact attention mass of the chosen pages relative to that of the best pages, of the same number.",
    ),
    ("Tasks", plots.tasks_by_budget, "Mean score of the greedy output, over all lengths."),
    ("A needle over depth and length", plots.needles, "Share found; red is none."),
    ("Attention recall by layer and head", plots.recall_by_head, "At the smallest budget, over all texts."),
    ("Fit", plots.fits, "log KL = a + b log(length) + c log(budget), least squares for each decode policy."),
)


def write(path: Path, summary: Summary) -> None:
    path.write_text(page(summary), encoding="utf-8")


def page(summary: Summary) -> str:
    first = summary.rows[0]
    versions = ", ".join(sorted({f"vLLM {row['vllm']}, torch {row['torch']}" for row in summary.rows}))
    kv_dtype = first.get("kv_dtype", first["dtype"])
    dtypes = first["dtype"] + (f", KV {kv_dtype}" if kv_dtype != first["dtype"] else "")
    where = (
        f"{first['model']}, {first['device']}, {dtypes}, pages of {first['page_size']} tokens; half of "
        f"the text and seeds: {first['split']}; last {first['score_tokens']} tokens of a text scored; {versions}"
    )
    parts = [f"<h1>What a budget costs: {escape(first['model'])}</h1>", f"<p><small>{escape(where)}</small></p>"]
    parts += [_table(summary), _lengths(summary), f"<h2>With intervals</h2><p>{escape(INTERVALS)}</p>"]
    parts.append(_rows(pairs.HEADINGS, list(pairs.lines(summary))))
    for title, draw, note in PLOTS:
        figure = draw(summary)
        if figure is not None:
            parts.append(f"<h2>{escape(title)}</h2><p>{escape(note)}</p>{_image(figure, title)}")
            if draw is plots.fits:
                parts.append(_fits(summary))
    head = f"<meta charset='utf-8'><title>{escape(first['model'])}</title><style>{STYLE}</style>"
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{''.join(parts)}</body></html>\n"


def _table(summary: Summary) -> str:
    lines = [(setting.describe(), *cells_of(summary, setting)) for setting in summary.settings]
    return _rows(("setting", *(heading for heading, *_ in columns(summary))), lines)


def _lengths(summary: Summary) -> str:
    tasks = [row["task"] for row in summary.of(summary.settings[0])]
    counts = ", ".join(f"{task}: {tasks.count(task)}" for task in summary.tasks)
    lengths = ", ".join(f"{length:,}" for length in summary.lengths)
    return f"<p><small>Means over {lengths} tokens; samples of each setting: {counts}.</small></p>"


def _fits(summary: Summary) -> str:
    lines = []
    for policy in dict.fromkeys(setting.policy for setting in summary.settings):
        fit = summary.fit(policy)
        if fit is not None:
            lines.append((policy, f"{fit.intercept:+.2f}", f"{fit.length:+.2f}", f"{fit.budget:+.2f}",
                          f"{fit.residual:.2f}", str(len(fit.points))))  # fmt: skip
    return _rows(("policy", "a", "b, length", "c, budget", "rms of log residuals", "points"), lines)


def _rows(headings: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    head = "".join(f"<th>{escape(text)}</th>" for text in headings)
    body = "".join("<tr>" + "".join(f"<td>{escape(text)}</td>" for text in line) + "</tr>" for line in lines)
    return f"<table><tr>{head}</tr>{body}</table>"


def _image(figure, title: str) -> str:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110)
    return f"<img alt='{escape(title)}' src='data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}'>"
