"""Sentences with figures of the benchmarks of accuracy, heads and reranking, and the result files that they quote.

Each pattern stands for one sentence or table row of a page, its groups for the figures in it.
"""

import re
import shlex
from collections.abc import Mapping

from tests.benchmarks import results
from tests.benchmarks.kernel_figures import N
from tests.benchmarks.results import Cell, Result

TASKS = ("engagement", "retention", "monetization")
ACCURACY, BEAUTY, BEAUTY_AGAIN, JOURNEY, COLD, HEADS, LOOP = (
    results.load(results.FOLDER / f"{name}.json")
    for name in ("accuracy", "beauty", "beauty_second_search", "journey", "cold", "heads", "closed_loop")
)
LOGS = (ACCURACY, BEAUTY, JOURNEY)
CI = rf"\({N} to {N}(?: %)?\)"


def number(value: Cell) -> float:
    assert isinstance(value, float | int)
    return float(value)


def select_rows(result: Result, **cells: Cell) -> list[dict[str, Cell]]:
    """Return the rows with all of these cells."""
    return [row for row in result.rows if cells.items() <= row.items()]


def summary(result: Result, model: str, steps: str, *columns: str) -> list[float]:
    """Return these columns of a ranking's means over events and seeds. steps: `all` or `untied`."""
    [row] = select_rows(result, kind="summary", model=model, steps=steps)
    return [number(row[column]) for column in columns]


def with_bounds(name: str) -> tuple[str, str, str]:
    return name, f"{name}_ci_low", f"{name}_ci_high"


def gain(result: Result, name: str) -> list[float]:
    """Return a relative gain and its bounds in percent."""
    return [100 * result.metrics[key] for key in with_bounds(name)]


def loss(result: Result, name: str) -> list[float]:
    """Return a negative gain and its bounds, the smaller loss first, in percent."""
    value, low, high = gain(result, name)
    return [-value, -high, -low]


def metrics(result: Result, *names: str) -> list[float]:
    return [result.metrics[name] for name in names]


def most_trials(result: Result) -> int:
    return 1 + max(int(number(row["trial"])) for row in select_rows(result, kind="trial"))


def count_seeds(result: Result) -> int:
    return 1 + max(int(number(row["seed"])) for row in select_rows(result, kind="test"))


def count_events(result: Result) -> float:
    [events] = {number(row["events"]) for row in select_rows(result, kind="test")}
    return events


def best_trial(result: Result, model: str) -> dict[str, Cell]:
    """Return the row of the trial whose options were tested."""
    return max(select_rows(result, kind="trial", model=model), key=lambda row: number(row["ndcg10"]))


def option(result: Result, name: str) -> float:
    """Return the value of an option of the command that wrote the file."""
    words = shlex.split(result.command)
    return float(words[words.index(name) + 1])


def closed_loop_means(weighting: str, rerank: str) -> list[float]:
    """Return money per event, engaged and returned percentages, each with its standard error."""
    [row] = select_rows(LOOP, weighting=weighting, rerank=rerank)
    columns = (("money_per_event", 1), ("engaged_share", 100), ("returned_share", 100))
    return [scale * number(row[name]) for column, scale in columns for name in (column, f"{column}_se")]


def money_gain(weighting: str) -> float:
    """Return by how much more money per event the slates bring when they are reranked for money."""
    money, ranked = (closed_loop_means(weighting, rerank)[0] for rerank in ("money", "off"))
    return money / ranked - 1


README = {
    rf"NDCG@10, MovieLens [^|]*, {N} seeds \| {N} \| SASRec {N}: {N} % ahead \(95 % interval {N} to {N} %\); "
    rf"co-occurrence {N}: {N} % {CI} \|": [
        count_seeds(ACCURACY),
        *metrics(ACCURACY, "ndcg10_hstu", "ndcg10_sasrec"), *gain(ACCURACY, "ndcg10_gain"),
        *metrics(ACCURACY, "ndcg10_cooccurrence"), *gain(ACCURACY, "ndcg10_gain_over_cooccurrence"),
    ],
    rf"Amazon Beauty, [^|]*, {N} seeds \| {N}, {N} \| SASRec, by ids, {N}, {N}: {N} % ahead in NDCG@10 {CI}; "
    rf"on [^|]* it is behind: {N} % {CI}; after a [^|]* behind on all steps: {N} % {CI} \|": [
        count_seeds(BEAUTY),
        *metrics(BEAUTY, "ndcg10_hstu_contents", "hr10_hstu_contents", "ndcg10_sasrec", "hr10_sasrec"),
        *gain(BEAUTY, "gain"), *gain(BEAUTY, "gain_untied"), *gain(BEAUTY_AGAIN, "gain"),
    ],
    rf"a year of groceries, [^|]*, {N} seeds \| {N} \| SASRec {N}: {N} % ahead {CI}; "
    rf"a user's own purchase frequency {N}: {N} % behind {CI} \|": [
        count_seeds(JOURNEY),
        *metrics(JOURNEY, "ndcg10_hstu", "ndcg10_sasrec"), *gain(JOURNEY, "ndcg10_gain"),
        *metrics(JOURNEY, "ndcg10_personal_frequency"), *loss(JOURNEY, "ndcg10_gain_over_personal_frequency"),
    ],
}  # fmt: skip

BENCHMARKS = {
    rf"NDCG@10 {N}, SASRec {N}, co-occurrence {N}; HR@10 {N}, SASRec {N}, co-occurrence {N} \| NDCG@10 {N} % ahead of "
    rf"SASRec \(95 % interval {N} to {N} %\), untied steps {N} % {CI}; over co-occurrence {N} % {CI} \|": [
        *metrics(ACCURACY, *(f"{c}_{m}" for c in ("ndcg10", "hr10") for m in ("hstu", "sasrec", "cooccurrence"))),
        *gain(ACCURACY, "ndcg10_gain"), *gain(ACCURACY, "ndcg10_gain_untied"),
        *gain(ACCURACY, "ndcg10_gain_over_cooccurrence"),
    ],
    rf"attributes, three seeds \| NDCG@10 {N}, SASRec {N}; HR@10 {N}, SASRec {N} \| NDCG@10 {N} % ahead {CI}; "
    rf"untied steps {N} % {CI}; by ids alone {N} % {CI} \|": [
        *metrics(BEAUTY, *(f"{c}_{m}" for c in ("ndcg10", "hr10") for m in ("hstu_contents", "sasrec"))),
        *gain(BEAUTY, "gain"), *gain(BEAUTY, "gain_untied"), *gain(BEAUTY, "gain_of_ids"),
    ],
    rf"other search spaces \| NDCG@10 {N}, SASRec {N}; HR@10 {N}, SASRec {N} \| NDCG@10 {N} % {CI}; "
    rf"untied steps {N} % {CI} \|": [
        *metrics(BEAUTY_AGAIN, *(f"{c}_{m}" for c in ("ndcg10", "hr10") for m in ("hstu_contents", "sasrec"))),
        *gain(BEAUTY_AGAIN, "gain"), *gain(BEAUTY_AGAIN, "gain_untied"),
    ],
    rf"NDCG@10 {N}, SASRec {N}, a user's purchase frequency {N}; HR@10 {N}, {N}, {N} \| "
    rf"NDCG@10 {N} % ahead of SASRec {CI}, {N} % behind the purchase frequency {CI} \|": [
        *metrics(JOURNEY, *(f"{c}_{m}" for c in ("ndcg10", "hr10") for m in ("hstu", "sasrec", "personal_frequency"))),
        *gain(JOURNEY, "ndcg10_gain"), *loss(JOURNEY, "ndcg10_gain_over_personal_frequency"),
    ],
    rf"{N} engagement, {N} retention, {N} monetization \| calibration errors {N}, {N}, {N} \|": [
        HEADS.metrics[f"{task}_{measure}"] for measure in ("gap", "ece") for task in TASKS
    ],
    rf"{N}, content-kNN {N} \| {N} times": metrics(COLD, "recall50_hstu", "recall50_contentknn", "ratio"),
    rf"money per event {N} ± {N} when reranked for money, {N} ± {N} as ranked \| engaged events {N} ± {N} % when "
    rf"reranked for engagement, {N} ± {N} % as ranked \|": [
        *closed_loop_means("fixed 1 1 1", "money")[:2], *closed_loop_means("fixed 1 1 1", "off")[:2],
        *closed_loop_means("fixed 1 1 1", "engagement")[2:4], *closed_loop_means("fixed 1 1 1", "off")[2:4],
    ],
}  # fmt: skip

RANKINGS: dict[str, tuple[Result, Mapping[str, str]]] = {  # by section: the models of its table by their labels
    "MovieLens 100k": (ACCURACY, {
        "`hstu`": "hstu",
        "co-occurrence": "cooccurrence",
        "SASRec": "sasrec",
        "`itemknn`": "itemknn",
        "`recent_popularity`": "recent_popularity",
        "popularity": "popularity",
        "`hstu`, no item content": "hstu, no contents",
        "`hstu`, no strength": "hstu, no strength",
        "`hstu`, sessions": "hstu, sessions",
        "`hstu`, no time bias": "hstu, no time bias",
        "`hstu`, ids only": "hstu, ids only",
    }),
    "Amazon Beauty": (BEAUTY, {
        "`hstu`, with the items' attributes": "hstu_contents",
        "SASRec": "sasrec",
        "`hstu`, ids only": "hstu",
        "co-occurrence": "cooccurrence",
        "`itemknn`": "itemknn",
        "popularity": "popularity",
    }),
    "Groceries": (JOURNEY, {
        "a user's purchase frequency": "personal_frequency",
        "co-occurrence, counting on": "counting_cooccurrence",
        "co-occurrence": "cooccurrence",
        "`hstu`, ids only": "hstu, ids only",
        "`hstu`": "hstu",
        "SASRec": "sasrec",
        "popularity, counting on": "counting_popularity",
        "popularity of 7 days, counting on": "counting_popularity_7_days",
        "`itemknn`": "itemknn",
    }),
}  # fmt: skip
RANKINGS_TABLES = {
    rf"### {section} (?:(?!### ).)*?\| {re.escape(label)} \| {N} {CI} \| {N} {CI} \| {N} \| {N} \|": [
        *summary(result, model, "all", *with_bounds("ndcg10"), *with_bounds("hr10")),
        *summary(result, model, "untied", "ndcg10", "hr10"),
    ]
    for section, (result, models) in RANKINGS.items()
    for label, model in models.items()
}
GAINS_TABLE = {
    rf"\| {re.escape(label)} \| {N} % {CI} \| {N} % {CI} \|": [*gain(result, name), *gain(result, f"{name}_untied")]
    for label, result, name in (
        ("MovieLens | SASRec", ACCURACY, "ndcg10_gain"),
        ("MovieLens | co-occurrence", ACCURACY, "ndcg10_gain_over_cooccurrence"),
        ("MovieLens, ids only | SASRec", ACCURACY, "ndcg10_gain_of_ids"),
        ("Beauty | SASRec", BEAUTY, "gain"),
        ("Beauty, second search | SASRec", BEAUTY_AGAIN, "gain"),
        ("Beauty | co-occurrence", BEAUTY, "gain_over_cooccurrence"),
        ("Beauty, ids only | SASRec", BEAUTY, "gain_of_ids"),
        ("groceries | SASRec", JOURNEY, "ndcg10_gain"),
        ("groceries | co-occurrence, counting on", JOURNEY, "ndcg10_gain_over_cooccurrence"),
        ("groceries | a user's purchase frequency", JOURNEY, "ndcg10_gain_over_personal_frequency"),
    )
}
PUBLISHED_TABLE = {
    rf"\| {row['model']} \| {N} \| {N} \| (?!\d)": [number(row["ndcg10"]), number(row["hr10"])]
    for row in select_rows(BEAUTY, kind="published")
}
HEADS_TABLE = {
    rf"\| {task} \| {N} \| {N} \| {N} \|": [
        HEADS.metrics[f"{task}_auc"],
        HEADS.metrics[f"{task}_auc"] + HEADS.metrics[f"{task}_gap"],
        HEADS.metrics[f"{task}_ece"],
    ]
    for task in TASKS
}

RETENTION_GAPS = {str(row["weighting"]): number(row["retention_gap"]) for row in HEADS.rows}
CONTENT_KNNS = select_rows(COLD, model="contentknn")
EVALUATION = RANKINGS_TABLES | GAINS_TABLE | PUBLISHED_TABLE | HEADS_TABLE | {
    rf"scored events: {N}, {N} and {N} trials\.": [most_trials(result) for result in LOGS],
    rf"with {N}, {N} and {N} seeds": [count_seeds(result) for result in LOGS],
    rf"{N} % of the scored steps of MovieLens, {N} % of Beauty's and {N} % of the groceries'": [
        100 * result.metrics["tied_share"] for result in LOGS
    ],
    rf"{N} users, {N} scored events": [count_events(ACCURACY) / 10, count_events(ACCURACY)],
    rf"in HR@10 by {N} % {CI}\. Against the co-occurrence": gain(ACCURACY, "hr10_gain"),
    rf"in HR@10 the gain is {N} % {CI}": gain(ACCURACY, "hr10_gain_over_cooccurrence"),
    rf"each user's last event, {N} in total": [count_events(BEAUTY)],
    rf"ahead of SASRec; in HR@10 by {N} % {CI}\. On untied": gain(BEAUTY, "hr10_gain"),
    rf"it is behind, in HR@10 too: {N} % {CI}": gain(BEAUTY, "hr10_gain_untied"),
    rf"there HSTU ends at {N} and SASRec at {N}\.": metrics(BEAUTY_AGAIN, "ndcg10_hstu_contents", "ndcg10_sasrec"),
    rf"at 80 %: {N} of the events after it": [count_events(JOURNEY)],
    rf"end at their last epoch, {N}:": [number(best_trial(JOURNEY, "hstu")["epoch"])],
    rf"new items: {N} events of items with": [number(CONTENT_KNNS[0]["events"])],
    rf"recall@50 is {N}, a mean of {N} seeds\. The best of {N} content-kNNs, [^.]*, has {N}\.": [
        COLD.metrics["recall50_hstu"], len(select_rows(COLD, model="hstu")),
        len(CONTENT_KNNS), COLD.metrics["recall50_contentknn"],
    ],
    rf"dense, with {N} events per item": [option(HEADS, "--events") / option(HEADS, "--items")],
    rf"retention's is {N}, and with the three [^,]* it is up to {N}\.": [
        HEADS.metrics["retention_gap"], max(RETENTION_GAPS.values()),
    ],
    rf"learned weighting is {N} below [^(]*\(95 % interval over users: {N} to {N}\)": [
        -HEADS.metrics["learnt_over_fixed"],
        *metrics(HEADS, "learnt_over_fixed_ci_low", "learnt_over_fixed_ci_high"),
    ],
}  # fmt: skip

LOOP_TABLE = {
    "none shown": ("nothing shown", "off"),
    "as ranked": ("fixed 1 1 1", "off"),
    "`engagement = 1`": ("fixed 1 1 1", "engagement"),
    "`retention = 1`": ("fixed 1 1 1", "retention"),
    "`monetization = 1`": ("fixed 1 1 1", "monetization"),
    "`monetization = value = 1`": ("fixed 1 1 1", "money"),
    "all four 0.5": ("fixed 1 1 1", "all"),
    "`uncertainty`, as ranked": ("uncertainty", "off"),
    "`uncertainty`, `monetization = value = 1`": ("uncertainty", "money"),
    "`dwa`, as ranked": ("dwa", "off"),
    "`dwa`, `monetization = value = 1`": ("dwa", "money"),
}


MODEL = {
    rf"\| {re.escape(label)} \| {N} ± {N} \| {N} ± {N} % \| {N} ± {N} % \|": closed_loop_means(*row)
    for label, row in LOOP_TABLE.items()
} | {
    rf"by money brings {N} % more money per event [^.]* fixed weights, {N} % with `uncertainty` and {N} % with `dwa`": [
        100 * money_gain(weighting) for weighting in ("fixed 1 1 1", "uncertainty", "dwa")
    ],
    rf"by engagement brings {N} % more engaged events": [100 * LOOP.metrics["engagement_gain_by_rerank"]],
}  # fmt: skip
