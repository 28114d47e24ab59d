"""The report: the promised keys, one set of facts in both files, and a page that loads nothing."""

import dataclasses
import io
import json
import math
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from fedward.plan import Model, Plan, Privacy, Rounds, Task
from fedward.simulations.report import (
    Report,
    Scores,
    Seen,
    render_page,
    render_seen,
    render_sites,
    render_table,
    write_report,
)

PLAN = Plan(
    name="four-hospitals",
    model=Model(path="base", quantize="nf4"),
    rounds=Rounds(count=3, steps=8, sampling_rate=0.06, normaliser=30, learning_rate=0.015),
    task=Task(objective="classify", labels=("heart", "lungs")),
)
SEEN = Seen(site="north", masked=bytes(range(200, 232)), total=[0.01, -0.02])
FACTS = Report(
    plan=PLAN,
    scores=Scores(
        base=0.55,
        alone={"north": 0.66, "south": 0.62},
        federated=0.81,
        central=0.82,
        central_without_privacy=0.88,
        classical=0.84,
    ),
    epsilon={"north": 7.1, "south": 6.5},
    bytes_up={"north": 120000, "south": 80000},
    rounds=3,
    seconds=41.5,
    curves={"federated": [0.55, 0.7, 0.78, 0.81], "north alone": [0.55, 0.6, 0.64, 0.66]},
    cohorts=[["north", "south"], ["north"], ["north", "south"]],
    seen=SEEN,
)
SFT = dataclasses.replace(PLAN, task=Task(objective="sft"))


class Page(HTMLParser):
    """Open tags and what they point at."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in {"meta"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_json_has_the_promised_keys(tmp_path):
    write_report(tmp_path / "out", FACTS)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert set(report["accuracy"]) == {"base", "alone", "federated", "central", "classical"}
    assert report["accuracy"]["alone"] == {"north": 0.66, "south": 0.62}
    assert report["without_privacy"] == {"central": 0.88}
    assert report["epsilon"] == {"north": 7.1, "south": 6.5}
    assert report["bytes_up"] == {"north": 120000, "south": 80000}
    assert (report["rounds"], report["seconds"]) == (3, 41.5)
    assert report["cohorts"][1] == ["north"]
    assert report["coordinator_saw"]["masked"] == SEEN.masked.hex()
    assert report["plan_hash"] == PLAN.hash().hex()
    assert report["plan"]["rounds"]["steps"] == 8


def test_text_plans_report_a_loss():
    report = dataclasses.replace(FACTS, plan=SFT).to_json()
    assert "accuracy" not in report
    assert report["loss"]["federated"] == 0.81


def test_infinity_and_nan_stay_valid_json(tmp_path):
    open_plan = dataclasses.replace(PLAN, privacy=Privacy(epsilon=math.inf))
    facts = dataclasses.replace(
        FACTS, plan=open_plan, epsilon={"north": math.inf}, curves={"federated": [math.nan, 0.5]}
    )
    write_report(tmp_path, facts)

    def refuse(token):
        raise AssertionError(token)

    report = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert report["plan"]["privacy"]["epsilon"] == "inf"
    assert report["curves"]["federated"] == [None, 0.5]
    assert "Privacy was switched off" in (tmp_path / "report.html").read_text()


def test_a_report_replaces_the_last_one_and_leaves_no_scraps(tmp_path):
    write_report(tmp_path, FACTS)
    write_report(tmp_path, dataclasses.replace(FACTS, rounds=2))
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.html"}
    assert json.loads((tmp_path / "report.json").read_text())["rounds"] == 2


def test_a_failed_write_keeps_the_last_report(tmp_path, monkeypatch):
    write_report(tmp_path, FACTS)
    before = (tmp_path / "report.json").read_bytes()

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_report(tmp_path, dataclasses.replace(FACTS, rounds=2))
    assert (tmp_path / "report.json").read_bytes() == before


def test_the_page_is_whole_and_loads_nothing():
    text = render_page(FACTS)
    page = Page(text)
    assert page.open == []
    names = {tag for tag, _ in page.tags}
    assert {"h1", "svg", "table"} <= names
    assert not names & {"script", "link", "img", "iframe"}
    assert not [attrs for _, attrs in page.tags if "src" in attrs or "href" in attrs]
    assert not re.search(r"url\(|@import|https?:", text)


def test_the_page_shows_the_facts():
    text = render_page(FACTS)
    for part in ("0.810", "0.640", "7.10", "120,000", "Round 2: without south.", "c8c9cacb"):
        assert part in text
    assert "prefers-color-scheme: dark" in text


def test_names_in_the_page_are_text_and_not_markup():
    site = "<script>alert(1)</script>"
    facts = dataclasses.replace(
        FACTS,
        scores=Scores(base=0.1, federated=0.2, alone={site: 0.1}),
        epsilon={site: 1.0},
        curves={site: [0.1]},
        cohorts=[[]],
        seen=Seen(site=site, masked=b"\0", total=[]),
    )
    assert "<script" not in render_page(facts)


def test_a_bare_report_is_still_a_page():
    bare = Report(
        plan=SFT,
        scores=Scores(base=2.5, federated=2.0),
        epsilon={},
        bytes_up={},
        rounds=0,
        seconds=0.1,
    )
    page = Page(render_page(bare))
    assert page.open == []
    assert "svg" not in {tag for tag, _ in page.tags}
    assert bare.to_json()["loss"]["classical"] is None


def printed(facts: Report) -> str:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(render_table(facts))
    return console.export_text(styles=True)


def test_the_table_has_every_score_and_marks_the_best():
    text = printed(FACTS)
    for name, score in FACTS.scores.rows():
        assert name in text
        assert f"{score:.3f}" in text
    assert re.search(r"\x1b\[1m[^\x1b]*central, no privacy", text)


def test_the_lowest_loss_is_the_best():
    text = printed(dataclasses.replace(FACTS, plan=SFT))
    assert re.search(r"\x1b\[1m[^\x1b]*base model", text)


def test_the_terminal_shows_what_each_site_spent_and_what_the_coordinator_saw():
    stream = io.StringIO()
    Console(file=stream, width=100).print(render_sites(FACTS))
    text = stream.getvalue()
    row = next(line for line in text.splitlines() if "south" in line)
    assert [word for word in row.split() if word[0].isdigit()] == ["6.50", "80,000", "2"]
    seen = render_seen(SEEN)
    assert "c8c9cacb" in seen
    assert "+0.0100 -0.0200" in seen
