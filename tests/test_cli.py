"""The command line's errors reach the terminal whole, with their exit codes."""

import pytest

from fedward import cli


@pytest.mark.parametrize(
    ("section", "code"), [('[data]\nunti = "x"', 2), ("[rounds]\ncount = 0", 2), ("nonsense", 2)]
)
def test_a_broken_plan_is_told_with_its_section(tmp_path, monkeypatch, capsys, section, code):
    plan = tmp_path / "plan.toml"
    plan.write_text(f'name = "x"\n[model]\npath = "m"\n{section}\n')
    monkeypatch.setattr("sys.argv", ["fedward", "simulate", str(plan), "--data", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == code
    shown = capsys.readouterr().err
    assert "plan.toml" in shown
    assert section.split("\n")[0] in shown or section == "nonsense"


def test_an_interruption_says_how_to_go_on(monkeypatch, capsys):
    def interrupted(*_args: object, **_options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fedward.simulations.simulate.run_simulation", interrupted)
    monkeypatch.setattr("sys.argv", ["fedward", "simulate"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 130
    assert "--resume" in capsys.readouterr().err
