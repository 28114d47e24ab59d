"""The part of the coordinator that answers sites ends where it could no longer keep up."""

import threading

import pytest

from fedward.errors import IdentityError
from fedward.server import serve
from tests.server import office


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_link_that_can_follow_the_roster_no_more_ends_and_is_started_again(tmp_path, monkeypatch):
    def lost(*_: object) -> bool:
        raise IdentityError("the CA's key is elsewhere")

    monkeypatch.setattr(serve, "_ROSTER_SECONDS", 0.05)
    monkeypatch.setattr(serve, "_DAY_SECONDS", 0.0)
    monkeypatch.setattr(serve, "issue", lost)
    folder, stop = office.make_coordinator(tmp_path / "c"), threading.Event()
    link = threading.Thread(target=serve.run_link, args=(folder, stop), daemon=True)
    link.start()
    link.join(30)
    assert not link.is_alive()
