"""What a site's answers tell of its ledger is the same whoever its patients are (ADR 0008)."""

from flwr.app import Message

from fedward.messages import open_letter
from fedward.simulations.grid import FIRST_NODE
from fedward.tuning.records import group
from tests.simulations import tiny


def test_the_numbers_of_lines_do_not_depend_on_the_patients(tmp_path, base):
    """Four patients; one with a single note; three of whom no record fits the plan."""
    useless = [{**row, "label": "unknown"} for row in tiny.make_rows("c", 3)]
    sites = {
        "a": tiny.make_records("a", 4),
        "b": tiny.make_records("b", 1, notes=1),
        "c": group(useless, "patient"),
    }
    replies = list[Message]()
    plan = tiny.make_plan(base, rounds=tiny.make_rounds(sampling_rate=0.5))
    federation = tiny.make_federation(tmp_path, plan, tiny.recorders(sites), watch=replies.append)
    federation.run()
    told: dict[int, list[tuple[str, list[int]]]] = {0: [], 1: [], 2: []}
    heads = set[str]()
    for message in replies:
        site = message.metadata.src_node_id - FIRST_NODE
        if site in told:
            letter = open_letter(message.content, federation.roster.key(site), "site")
            told[site].append((letter.action, [number for number, _ in letter.lines]))
            heads |= {head for _, head in letter.lines}
    assert told[0] == told[1] == told[2]
    assert told[0][-1] == ("unmask", [len(tiny.ledger_entries(tmp_path, 0))])
    numbers = {number for _, lines in told[0] for number in lines}
    assert numbers >= {2, 3, 4, 5}
    assert len(heads) == 3 * len(numbers), "salted: no two sites share a hash"
